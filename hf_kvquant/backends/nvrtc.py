"""Compiles the CUDA kernels of `kernels/cuda` with NVRTC, for one specialisation and one architecture.

NVRTC is a library that needs neither a GPU, nor a driver, nor the CUDA toolkit. The sources come with the package.
Compiled kernels are kept on disk under a hash of everything that they depend on.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import threading
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from . import disk_cache
from .specialisation import Specialisation

if TYPE_CHECKING:
    from cuda.core import ProgramOptions

# The source files, each with its compiler options besides macros.
SOURCES: dict[str, dict] = {
    "decode_attention.cu": {},
    # The definition of the bytes has one IEEE rounding per step.
    "quantize_append.cu": {"fma": False},
}
KERNELS = {
    "decode_attention_kernel": "decode_attention.cu",
    "merge_splits_kernel": "decode_attention.cu",
    "quantize_append_kernel": "quantize_append.cu",
}
_STANDARD = "c++17"
_importing = threading.Lock()


class CompileError(RuntimeError):
    """A kernel does not compile; the message holds NVRTC's log."""


@dataclass(frozen=True)
class Usage:
    """The compiler's report on one kernel. `registers`: per thread; `spills`: bytes per thread that are stored and
    loaded for want of registers; `stack`: bytes per thread; `shared`: bytes of static shared memory per block."""

    registers: int
    spills: int
    stack: int
    shared: int


@dataclass(frozen=True)
class Launch:
    """The threads of a block and the bytes of dynamic shared memory that a kernel's source asks for."""

    threads: int
    shared_bytes: int


@dataclass(frozen=True)
class Compiled:
    """Machine code of one source file. `usage`, `launches`: by kernel; `cached`: whether it was found on disk;
    `seconds`: the time that compiling or reading took."""

    cubin: bytes
    usage: dict[str, Usage]
    launches: dict[str, Launch]
    cached: bool
    seconds: float


def missing() -> str | None:
    """None if kernels can be compiled here, else what is missing and how to get it."""
    try:
        from cuda.bindings import nvrtc

        cuda_core()
        nvrtc.nvrtcVersion()
    # If a shared library is missing, the packages raise errors of their own.
    except Exception as error:
        return f"NVRTC cannot be used ({type(error).__name__}: {str(error).splitlines()[0]}); {remedy()}"
    return None


def cuda_core() -> ModuleType:
    """The package `cuda.core`, imported under a lock: if two threads import it at once, one gets an ImportError."""
    with _importing:
        import cuda.core
    return cuda.core


def remedy() -> str:
    """The command that installs NVRTC of the major version that torch was built with."""
    major = (torch.version.cuda or "13").partition(".")[0]
    nvrtc = "nvidia-cuda-nvrtc-cu12" if major == "12" else f"nvidia-cuda-nvrtc=={major}.*"
    return f"pip install cuda-core 'cuda-bindings=={major}.*' '{nvrtc}'"


@lru_cache(maxsize=None)
def version() -> tuple[int, int]:
    """The major and minor version of NVRTC."""
    from cuda.bindings import nvrtc

    return nvrtc.nvrtcVersion()[1:]


def version_name() -> str:
    return "{}.{}".format(*version())


@lru_cache(maxsize=None)
def architectures() -> tuple[str, ...]:
    """The architectures that this NVRTC compiles for, from sm_80 on, for which the kernels are written."""
    from cuda.bindings import nvrtc

    return tuple(f"sm_{number}" for number in nvrtc.nvrtcGetSupportedArchs()[1] if number >= 80)


def architecture(major: int, minor: int) -> str:
    """The newest architecture whose machine code runs on a GPU of this compute capability.

    Raises:
        RuntimeError: this NVRTC does not know any.
    """
    # Machine code runs on GPUs of the same major and the same or a higher minor version.
    runs = [arch for arch in architectures() if (n := int(arch[3:])) // 10 == major and n % 10 <= minor]
    if not runs:
        known = f"NVRTC {version_name()} compiles for {', '.join(architectures())}"
        raise RuntimeError(f"compute capability {major}.{minor} is not supported: {known}")
    return runs[-1]


@lru_cache(maxsize=None)
def source_folder() -> Path:
    """The folder `kernels` of the package."""
    folder = Path(str(files(__package__.rpartition(".")[0]) / "kernels"))
    if not folder.is_dir():
        raise OSError(f"{folder} does not exist: the CUDA sources are not in the package; install it with pip install")
    return folder


def compiled(source: str, specialisation: Specialisation, arch: str) -> Compiled:
    """Machine code of `source`, a name in `SOURCES`, for `arch` ("sm_90"): from disk, or compiled now and kept.

    Raises:
        CompileError: naming the specialisation, with NVRTC's log.
    """
    start = time.perf_counter()
    key = _key(source, specialisation, arch)
    found = disk_cache.read(key)
    if found is not None:
        facts, cubin = found
        usage = {name: Usage(**numbers) for name, numbers in facts["usage"].items()}
        return Compiled(cubin, usage, read_launches(cubin), True, time.perf_counter() - start)
    cubin, log = _compile(source, specialisation, arch)
    usage = read_usage(log)
    facts = {"source": source, "arch": arch, "specialisation": str(specialisation)}
    disk_cache.write(key, {**facts, "usage": {name: asdict(numbers) for name, numbers in usage.items()}}, cubin)
    return Compiled(cubin, usage, read_launches(cubin), False, time.perf_counter() - start)


def _key(source: str, specialisation: Specialisation, arch: str) -> str:
    depends = [source, specialisation, arch, version(), SOURCES[source], _STANDARD, _sources_hash(source_folder())]
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=None)
def _sources_hash(folder: Path) -> str:
    """A hash over every file that a kernel may include, so that no dependency can be forgotten."""
    content = hashlib.sha256()
    for file in sorted([*(folder / "include").rglob("*.h"), *(folder / "cuda").rglob("*")]):
        if file.suffix in (".h", ".cu"):
            text = file.read_bytes()
            content.update(f"{file.relative_to(folder).as_posix()} {len(text)}\n".encode() + text)
    return content.hexdigest()


def options(source: str, specialisation: Specialisation, arch: str) -> ProgramOptions:
    """The options for compiling `source`, as cuda-core's `ProgramOptions`."""
    folder = source_folder()
    return cuda_core().ProgramOptions(
        name=source,
        arch=arch,
        std=_STANDARD,
        define_macro=[(name, str(value)) for name, value in specialisation.items()],
        include_path=[str(folder), str(folder / "include")],
        # Otherwise NVRTC looks for headers in the folder that Python was started in, too.
        no_source_include=True,
        # Constexpr functions without a qualifier are device functions, not host functions.
        device_as_default_execution_space=True,
        ptxas_options=["-v"],
        **SOURCES[source],
    )


def source_text(source: str) -> str:
    return (source_folder() / "cuda" / source).read_text(encoding="utf-8")


def _compile(source: str, specialisation: Specialisation, arch: str) -> tuple[bytes, str]:
    core, log = cuda_core(), io.StringIO()
    try:
        program = core.Program(source_text(source), "c++", options(source, specialisation, arch))
        cubin = program.compile("cubin", logs=log).code
        program.close()
    # Not a type of cuda-core, because its error types have moved between its versions.
    except Exception as error:
        told = str(error).replace("\0", "")
        raise CompileError(f"{source} for {arch} ({specialisation}) does not compile: {told}") from error
    return bytes(cubin), log.getvalue()


def read_launches(cubin: bytes) -> dict[str, Launch]:
    """The constants `{kernel}_launch` that the macro KVQUANT_KERNEL leaves in machine code, an ELF file (elf(5))."""
    at, size, count = *struct.unpack_from("<Q", cubin, 40), *struct.unpack_from("<HH", cubin, 58)
    # For each section: type, offset in the file, length, index of the section with its symbols' names.
    sections = [struct.unpack_from("<4xI16xQQI", cubin, at + i * size) for i in range(count)]
    found = {}
    for kind, begin, length, names in sections:
        if kind != 2:  # SHT_SYMTAB
            continue
        for name, section, place in struct.iter_unpack("<IxxHQ8x", cubin[begin : begin + length]):
            start = sections[names][1] + name
            kernel, is_launch, _ = cubin[start : cubin.index(0, start)].decode().partition("_launch")
            if is_launch:
                found[kernel] = Launch(*struct.unpack_from("<ii", cubin, sections[section][1] + place))
    return found


def read_usage(log: str) -> dict[str, Usage]:
    """The reports of ptxas on each kernel, from the log of NVRTC or nvcc with `-v`.

    Raises:
        ValueError: a report lacks one of the expected figures.
    """
    found = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        name = part.partition("'")[0]
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if not stack or not registers:
            raise ValueError(f"the compiler's report of {name} cannot be read: {part!r}")
        shared = re.search(r"(\d+) bytes smem", part)
        frame, stored, loaded = (int(n) for n in stack.groups())
        found[name] = Usage(int(registers[1]), stored + loaded, frame, int(shared[1]) if shared else 0)
    return found
