"""`ArmLibrary`: the CPU library compiled for 64-bit ARM Linux, run by an emulated processor inside this process.

It takes the place of `ctypes.CDLL` in hf_kvquant/backends/cpu.py, so that a test's arguments are those of users. Zig
has the compiler and headers for ARM (used through the same CMakeLists as every build), and Unicorn emulates the
processor. The processor has no memory of its own: a page of this process appears in it, at the same address, when it
is first touched, so pointers mean the same to both. The C library is limited to the functions that one thread needs;
expf and the like come from Zig, as ARM code.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import shutil
import subprocess
import sys
from collections.abc import Callable
from operator import mul
from pathlib import Path
from struct import iter_unpack, pack, unpack, unpack_from

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
_RETURN = 0xD65F03C0  # the instruction `ret`
_AT_HWCAP, _HWCAP_ASIMDDP, _AT_HWCAP2, _HWCAP2_I8MM = 16, 1 << 20, 26, 1 << 13  # getauxval(3)
_SMMLA, _SMMLA_MASK = 0x4E80A400, 0xFFE0FC00  # the registers of the instruction are in the other bits
_STACK_BYTES = 1 << 20
_THREAD_LOCAL = "where a thread's variable is"

# Program headers, tags of the dynamic section and relocations: elf(5) and "ELF for the Arm 64-bit Architecture".
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_PLTRELSZ, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_JMPREL = 2, 4, 5, 6, 7, 8, 23
_R_ABS64, _R_GLOB_DAT, _R_JUMP_SLOT, _R_RELATIVE, _R_TLSDESC = 257, 1025, 1026, 1027, 1031


def unavailable() -> str | None:
    """None if ARM code can be compiled and run here, else the reason why not."""
    if not sys.platform.startswith("linux"):
        return f"the platform is {sys.platform}; expected linux"
    missing = [name for name in ("ziglang", "unicorn") if importlib.util.find_spec(name) is None]
    missing += [] if shutil.which("cmake") else ["cmake"]
    return f"{', '.join(missing)} not installed; `make arm` does" if missing else None


def build(folder: Path) -> Path:
    """Compile the library for ARM Linux with the project's CMakeLists, and return its path.

    Raises:
        RuntimeError: cmake or the compiler failed, or warned.
    """
    import ziglang

    zig = Path(ziglang.__file__).parent / "zig"
    options = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": f"{zig};c++",
        "CMAKE_CXX_COMPILER_TARGET": "aarch64-linux-gnu",
        "CMAKE_CXX_FLAGS": "-Werror",
        # Linking a program needs the C++ library, which Zig takes a minute to compile.
        "CMAKE_TRY_COMPILE_TARGET_TYPE": "STATIC_LIBRARY",
        "CMAKE_SHARED_LINKER_FLAGS": "-nostdlib -lcompiler_rt",
    }
    _run("cmake", "-S", str(KERNELS), "-B", str(folder), *(f"-D{name}={value}" for name, value in options.items()))
    _run("cmake", "--build", str(folder))
    return folder / "_kvquant_cpu.so"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


class ArmLibrary:
    """The library's functions as attributes; they take integers or results of `ctypes.byref` and return an integer.

    `dot_products`: whether the processor has the instructions `sdot` and `udot`, and tells so.
    `matrix_products`: whether it has `smmla`, which Unicorn does not know: Python executes it, in 25 microseconds.

    Raises:
        RuntimeError: on a call, if the code touches memory outside of this process, calls a missing function, or
            contains an instruction that the processor does not have.
    """

    def __init__(self, path: Path, dot_products: bool = True, matrix_products: bool = True):
        import unicorn
        from unicorn import arm64_const

        self._hardware = {
            _AT_HWCAP: _HWCAP_ASIMDDP if dot_products else 0,
            _AT_HWCAP2: _HWCAP2_I8MM if matrix_products else 0,
        }
        self._matrix_products = matrix_products
        self.products = 0  # the number of times that `smmla` was executed
        self._model = arm64_const.UC_CPU_ARM64_MAX if dot_products else arm64_const.UC_CPU_ARM64_A57

        self._unicorn, self._registers = unicorn, arm64_const
        self._libc = ctypes.CDLL(None)
        self._libc.aligned_alloc.restype = ctypes.c_void_p
        self._pages: list[mmap.mmap] = []
        self._imports: list[str] = []
        self._touched = 0
        self._stubs = self._allocate(mmap.PAGESIZE)
        self._thread_locals = self._allocate(mmap.PAGESIZE)
        self._stack = self._allocate(_STACK_BYTES)
        self._symbols = self._load(path.read_bytes())

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name.startswith("_") or name not in self._symbols:
            raise AttributeError(name)
        return lambda *arguments: self._call(self._symbols[name], [_integer(a) for a in arguments])

    # ---- loading ---------------------------------------------------------------------------------------------------

    def _allocate(self, size: int) -> int:
        """Address of zeroed pages that live as long as the library."""
        self._pages.append(mmap.mmap(-1, size))
        return ctypes.addressof(ctypes.c_char.from_buffer(self._pages[-1]))

    def _load(self, file: bytes) -> dict[str, int]:
        """Lay the file out in memory and fill in addresses; return those of its symbols."""
        machine, offset, count = unpack_from("<18xH12xQ16xH", file)[0], *unpack_from("<32xQ16xH", file)
        assert file[:5] == b"\x7fELF\x02" and machine == 183, "not a library for 64-bit ARM"
        headers = [unpack_from("<IIQQQQQQ", file, offset + 56 * i) for i in range(count)]
        segments = [(start, at, size, whole) for kind, _, start, at, _, size, whole, _ in headers if kind == _PT_LOAD]
        base = self._allocate(max(at + whole for _, at, _, whole in segments))
        for start, at, size, _ in segments:
            ctypes.memmove(base + at, file[start : start + size], size)
        dynamic = next(h for h in headers if h[0] == _PT_DYNAMIC)
        tags = dict(iter_unpack("<qQ", file[dynamic[2] : dynamic[2] + dynamic[5]]))
        names, symbols = base + tags[_DT_STRTAB], []
        for i in range(ctypes.c_uint32.from_address(base + tags[_DT_HASH] + 4).value):
            name, _, section, at, _ = unpack_from("<IHHQQ", ctypes.string_at(base + tags[_DT_SYMTAB] + 24 * i, 24))
            name = ctypes.string_at(names + name).decode()
            symbols.append((name, base + at if section else 0))
        for table, size in ((_DT_RELA, _DT_RELASZ), (_DT_JMPREL, _DT_PLTRELSZ)):
            relocations = ctypes.string_at(base + tags[table], tags[size]) if table in tags else b""
            for at, info, addend in iter_unpack("<QQq", relocations):
                self._relocate(base, base + at, info & 0xFFFFFFFF, symbols[info >> 32], addend)
        return {name: address for name, address in symbols if address}

    def _relocate(self, base: int, place: int, kind: int, symbol: tuple[str, int], addend: int) -> None:
        word = ctypes.c_uint64.from_address(place)
        if kind == _R_RELATIVE:
            word.value = base + addend
        elif kind in (_R_ABS64, _R_GLOB_DAT, _R_JUMP_SLOT):
            word.value = (symbol[1] or self._stub(symbol[0])) + addend
        elif kind == _R_TLSDESC:
            # The address of a function, which returns an offset from the thread's register, and its argument.
            word.value = self._stub(_THREAD_LOCAL)
            ctypes.c_uint64.from_address(place + 8).value = addend
        else:
            raise RuntimeError(f"relocation {kind} is not known")

    def _stub(self, name: str) -> int:
        """Address of a function that returns at once, after Python has done the work of `name`."""
        if name not in self._imports:
            self._imports.append(name)
            ctypes.c_uint32.from_address(self._stubs + 4 * len(self._imports)).value = _RETURN
        return self._stubs + 4 * (self._imports.index(name) + 1)

    # ---- running ---------------------------------------------------------------------------------------------------

    def _call(self, function: int, arguments: list[int]) -> int:
        # A new processor for each call, because the host may move its memory between two calls.
        uc, registers = self._unicorn, self._registers
        processor = uc.Uc(uc.UC_ARCH_ARM64, uc.UC_MODE_ARM)
        processor.ctl_set_cpu_model(self._model)
        processor.reg_write(registers.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # floating point is switched on
        processor.reg_write(registers.UC_ARM64_REG_TPIDR_EL0, self._thread_locals)
        processor.reg_write(registers.UC_ARM64_REG_SP, self._stack + _STACK_BYTES)
        processor.reg_write(registers.UC_ARM64_REG_LR, self._stubs)
        for i, argument in enumerate(arguments):
            processor.reg_write(registers.UC_ARM64_REG_X0 + i, argument)
        processor.hook_add(uc.UC_HOOK_MEM_UNMAPPED, self._show_memory)
        processor.hook_add(uc.UC_HOOK_INTR, self._execute)
        processor.hook_add(uc.UC_HOOK_CODE, self._imported, begin=self._stubs + 4, end=self._stubs + mmap.PAGESIZE)
        try:
            processor.emu_start(function, self._stubs)
        except uc.UcError as error:
            at = processor.reg_read(registers.UC_ARM64_REG_PC) - function
            raise RuntimeError(
                f"{error}: {at:#x} bytes into the function, last new address {self._touched:#x}"
            ) from None
        return ctypes.c_int32(processor.reg_read(registers.UC_ARM64_REG_X0) & 0xFFFFFFFF).value

    def _show_memory(self, processor, access, address, size, value, _) -> bool:
        """Let the processor see the host's memory around an address; False if there is none."""
        self._touched = address
        for begin, end in _writable():
            if begin <= address < end:
                shown = [(first, last + 1) for first, last, _ in processor.mem_regions()]
                begin = max([begin, *(last for _, last in shown if last <= address)])
                end = min([end, *(first for first, _ in shown if first > address)])
                processor.mem_map_ptr(begin, end - begin, self._unicorn.UC_PROT_ALL, begin)
                return True
        return False

    def _execute(self, processor, exception, _) -> None:
        """Do the work of `smmla`: to four sums, add the products of two rows of eight bytes with two others."""
        registers = self._registers
        at = processor.reg_read(registers.UC_ARM64_REG_PC)
        word = ctypes.c_uint32.from_address(at).value
        if not self._matrix_products or word & _SMMLA_MASK != _SMMLA:
            raise RuntimeError(f"the instruction {word:#010x} raises exception {exception}")
        self.products += 1
        sums, left, right = (registers.UC_ARM64_REG_Q0 + (word >> shift & 31) for shift in (0, 5, 16))
        a, b = (unpack("16b", processor.reg_read(q).to_bytes(16, "little")) for q in (left, right))
        before = unpack("<4i", processor.reg_read(sums).to_bytes(16, "little"))
        products = [sum(map(mul, a[i : i + 8], b[j : j + 8])) for i in (0, 8) for j in (0, 8)]
        after = [(x + y) & 0xFFFFFFFF for x, y in zip(before, products)]
        processor.reg_write(sums, int.from_bytes(pack("<4I", *after), "little"))
        processor.reg_write(registers.UC_ARM64_REG_PC, at + 4)

    def _imported(self, processor, address, size, _) -> None:
        name = self._imports[(address - self._stubs) // 4 - 1]
        x0 = self._registers.UC_ARM64_REG_X0
        first, second = processor.reg_read(x0), processor.reg_read(x0 + 1)
        if name == _THREAD_LOCAL:
            result = ctypes.c_uint64.from_address(first + 8).value
        elif name == "aligned_alloc":
            result = self._libc.aligned_alloc(ctypes.c_size_t(first), ctypes.c_size_t(second)) or 0
        elif name == "free":
            result = 0
            self._libc.free(ctypes.c_void_p(first))
        elif name == "__cxa_thread_atexit":
            result = 0
        elif name == "getauxval":
            result = self._hardware.get(first, 0)
        else:
            raise RuntimeError(f"the code calls {name!r}, which does not exist here")
        processor.reg_write(x0, result)


def _integer(argument) -> int:
    return ctypes.addressof(argument._obj) if hasattr(argument, "_obj") else argument


def _writable() -> list[list[int]]:
    """Begin and end of each stretch of this process's writable memory."""
    stretches: list[list[int]] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, access = line.split()[:2]
        begin, end = (int(x, 16) for x in where.split("-"))
        if not access.startswith("rw"):
            continue
        if stretches and stretches[-1][1] == begin:
            stretches[-1][1] = end
        else:
            stretches.append([begin, end])
    return stretches
