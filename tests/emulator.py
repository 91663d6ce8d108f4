"""`Device`: runs the kernels of kernels/cuda on the host, in the emulator of tests/emulator, with CPU tensors.

It takes the place of the CUDA device in hf_kvquant/backends/cuda.py, so that tests run the arguments, grids and
specialisations of users. A kernel is compiled with g++ once per specialisation and session. A fault that hardware
would not report ends a launch with `Fault`: see tests/emulator/machine.h.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from once import once

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels"
EMULATOR = ROOT / "tests" / "emulator"
_FLAGS = "-std=c++20 -g1 -fPIC -fvisibility=hidden -fno-gnu-unique -ffp-contract=off -Wall -Wextra -Werror"
_INCLUDE = (f"-I{KERNELS}", f"-I{KERNELS / 'include'}", f"-I{EMULATOR}")
_ENTRY = re.compile(r"KVQUANT_KERNEL\(\s*(\w+)")


class Fault(RuntimeError):
    """A kernel did something wrong; the message names the kernel, the block, the thread, the line and the access."""


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_int32 * 3),
        ("threads", ctypes.c_int32),
        ("dynamic_shared_bytes", ctypes.c_int32),
        ("starts_early", ctypes.c_int32),
    ]


class Device:
    """An emulated GPU.

    Args:
        arch: compute capability times 100, as `__CUDA_ARCH__` has it.
        sources: files with kernels, besides those of kernels/cuda.
        starts_early: whether kernels of these files start before the ones ahead have ended. Those of kernels/cuda
            always do here, as gpu.py lets them from sm_90 on.
    """

    def __init__(self, arch: int = 800, sources: Sequence[Path] = (), *, starts_early: bool = False):
        self._arch, self._starts_early = arch, starts_early
        self._sources = (*sorted((KERNELS / "cuda").glob("*.cu")), *sources)
        self._allowed: list[tuple[torch.Tensor, bool]] = []

    def allow(self, *tensors: torch.Tensor | None, writable: bool = True) -> None:
        """Let all later launches touch these tensors."""
        self._allowed += [(tensor, writable) for tensor in tensors if tensor is not None]

    def launch(
        self,
        kernels: Mapping[str, Sequence[int]],
        specialisation: Mapping[str, int],
        *arguments: ctypes.Structure | torch.Tensor | None,
        reads: Sequence[torch.Tensor | None] = (),
        writes: Sequence[torch.Tensor | None] = (),
    ) -> None:
        """Run kernels, one after the other, with the threads and the shared memory that their sources ask for.

        Args:
            kernels: the grid of each by name.
            specialisation: macros and their values.
            arguments: the parameters of each: structs are passed by value, tensors by their address.
            reads, writes: the tensors whose addresses the structs hold; tensors in `arguments` count as written.

        Raises:
            Fault: the kernel broke a rule of the emulator.
            ValueError: no source has this kernel, or several do.
        """
        for kernel, grid in kernels.items():
            self._run(kernel, specialisation, grid, arguments, reads, writes)

    def _run(self, kernel, specialisation, grid, arguments, reads, writes) -> None:
        macros = {"KVQUANT_ARCH": self._arch, **specialisation}
        source = self._source_of(kernel)
        library = _library(source, tuple(sorted(macros.items())))
        library.kvquant_emulate_forget()
        given = [a for a in arguments if isinstance(a, torch.Tensor)]
        for tensor, writable in (
            *self._allowed,
            *((t, True) for t in (*given, *writes)),
            *((t, False) for t in reads),
        ):
            if tensor is not None and tensor.numel():
                library.kvquant_emulate_allow(*_extent(tensor), ctypes.c_int(writable))
        values = [_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        needs = (ctypes.c_int32 * 2).in_dll(library, f"{kernel}_launch")
        launch = _Launch((*grid, 1, 1)[:3], *needs, self._starts_early or source.parent == KERNELS / "cuda")
        message = ctypes.create_string_buffer(1000)
        run = getattr(library, f"kvquant_emulate_{kernel}")
        if run(ctypes.byref(launch), pointers, message, ctypes.c_int(len(message))):
            raise Fault(message.value.decode())

    def _source_of(self, kernel: str) -> Path:
        found = [source for source in self._sources if kernel in _kernels_of(source)]
        if len(found) != 1:
            names = [str(source) for source in self._sources]
            raise ValueError(f"kernel: {kernel!r} is in {len(found)} of the sources {names}; expected one")
        return found[0]


def _value(argument: ctypes.Structure | torch.Tensor | None):
    if isinstance(argument, ctypes.Structure):
        return argument
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())


def _extent(tensor: torch.Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    """Address and size in bytes of a tensor, from its first to its last element, gaps included."""
    if tensor.device.type != "cpu":
        raise ValueError(f"device: a tensor on {tensor.device} cannot be emulated; expected cpu")
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64((last + 1) * tensor.element_size())


@lru_cache(maxsize=None)
def _kernels_of(source: Path) -> frozenset[str]:
    return frozenset(_ENTRY.findall(source.read_text()))


def _compile(*arguments: str) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise OSError("the emulator needs a C++ compiler: neither g++ nor c++ is on the PATH")
    command = [compiler, *_FLAGS.split(), *_INCLUDE, *arguments]
    # The compiler itself needs no sanitizer.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}

    def run(target: Path) -> None:
        done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")

    return once(".so", command, run)


@lru_cache(maxsize=None)
def _sanitizers() -> tuple[str, ...]:
    """Kernels are sanitized in a process that has loaded the runtime library, as `make sanitize` does."""
    watched = hasattr(ctypes.CDLL(None), "__asan_init")
    return ("-fsanitize=address,undefined", "-fno-sanitize-recover") if watched else ()


@lru_cache(maxsize=None)
def _machine() -> tuple[str, ...]:
    """The emulator itself, which is linked to every specialisation."""
    return tuple(str(_compile("-O2", *_sanitizers(), "-c", str(source))) for source in sorted(EMULATOR.glob("*.cc")))


@lru_cache(maxsize=None)
def _library(source: Path, macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    defines = [f"-D{name}={value}" for name, value in (("KVQUANT_EMULATOR", 1), *macros)]
    # -O1 takes twice as long, and a launch, most of which is in the machine, as long. g++ does not know the pragmas of
    # the GPU's compiler (unroll).
    kernel = ("-O0", "-Wno-unknown-pragmas", "-x", "c++", str(source), "-x", "none")
    return ctypes.CDLL(str(_compile("-shared", *_sanitizers(), *defines, *kernel, *_machine())))
