"""One GPU: loads compiled kernels onto it and launches them on torch's current stream.

A launch costs no more than filling an array of addresses, because kernels are compiled, loaded and made ready at their
first use. So the first use must not be in the capture of a CUDA graph. The driver is called directly: cuda-core's own
`launch` takes no structs by value, and its objects for loaded code have changed their names between its versions.
"""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

from . import nvrtc
from .specialisation import Specialisation

MIN_CAPABILITY = (8, 0)
# From this architecture on a kernel may start before the one ahead of it has ended; the oldest driver, in its own
# numbers, that captures such launches in CUDA graphs.
_EARLY_ARCH, _EARLY_DRIVER = 90, 12030
# The shared memory that a kernel may have without asking for more.
_SHARED_BYTES = 48 << 10

_Parameters = ctypes.c_void_p * 2

_gpus: dict[int, Gpu] = {}
_lock = threading.RLock()


def too_old(capability: tuple[int, int]) -> str:
    """The message about a GPU that is too old."""
    found, expected = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
    return f"compute capability {found} is too old; expected {expected} or newer"


def starts_early(arch: str) -> bool:
    """Whether kernels compiled for `arch` ("sm_90") wait for the kernel ahead of them, and so may start before it has
    ended (primitives.h)."""
    return int(arch[3:]) >= _EARLY_ARCH


def of(tensor: torch.Tensor) -> Gpu:
    """The GPU of a tensor.

    Raises:
        ValueError: the tensor is not on a GPU.
        RuntimeError: the GPU is too old.
    """
    index = tensor.get_device()
    if index < 0:
        raise ValueError(f"states on {tensor.device} are not allowed; the CUDA backend needs them on a CUDA device")
    found = _gpus.get(index)
    if found is None:
        with _lock:
            found = _gpus.get(index) or _gpus.setdefault(index, Gpu(index))
    return found


class Gpu:
    """One GPU and the kernels that are loaded on it."""

    def __init__(self, index: int):
        capability = torch.cuda.get_device_capability(index)
        if capability < MIN_CAPABILITY:
            raise RuntimeError(f"cuda:{index}: {too_old(capability)}")
        self._index = index
        self._arch = nvrtc.architecture(*capability)
        is_new = starts_early(self._arch) and _checked("driver", *_driver().cuDriverGetVersion()) >= _EARLY_DRIVER
        self._early = _Early() if is_new else None
        # The driver's handle of each kernel of a kind, and its threads and shared memory.
        self._functions: dict[Specialisation, dict[str, tuple[object, nvrtc.Launch]]] = defaultdict(dict)

    def launch(
        self,
        kernels: Mapping[str, Sequence[int]],
        kind: Specialisation,
        struct: ctypes.Structure,
        memory: torch.Tensor | None,
    ) -> None:
        """Start `kernels`, the grid of each by name, one after the other on torch's current stream.

        Every kernel has two parameters: `struct`, passed by value, and the address of `memory` (None: null).
        """
        index = self._index
        if torch.cuda.current_device() != index:
            with torch.cuda.device(index):
                return self.launch(kernels, kind, struct, memory)
        # These need not outlive the call: the driver copies the parameters before a launch returns.
        address = ctypes.c_void_p(None if memory is None else memory.data_ptr())
        parameters = _Parameters(ctypes.addressof(struct), ctypes.addressof(address))
        stream, functions = torch._C._cuda_getCurrentRawStream(index), self._functions[kind]
        for kernel, grid in kernels.items():
            function, needs = functions.get(kernel) or self._load(kernel, kind)
            launch = function, grid, needs, stream, ctypes.addressof(parameters)
            status = self._start(*launch)
            if not status:
                continue
            if status == _driver().CUresult.CUDA_ERROR_INVALID_CONTEXT:
                # This thread has not yet called the CUDA runtime.
                self._enter()
                status = self._start(*launch)
            if status:
                told = f"{_name(status)}, grid {grid}"
                raise RuntimeError(f"{kernel} ({kind}) cannot be launched on cuda:{index}: {told}")

    def _start(self, function: object, grid: Sequence[int], needs: nvrtc.Launch, stream: int, parameters: int) -> Any:
        """The driver's status. `parameters`: the address of their addresses."""
        if self._early is None:
            launch = function, *grid, needs.threads, 1, 1, needs.shared_bytes, stream, parameters, 0
            return _driver().cuLaunchKernel(*launch)[0]
        config = self._early.config
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.sharedMemBytes, config.hStream = needs.threads, needs.shared_bytes, stream
        return _driver().cuLaunchKernelEx(config, function, parameters, 0)[0]

    def _enter(self) -> None:
        nvrtc.cuda_core().Device(self._index).set_current()

    def _load(self, kernel: str, kind: Specialisation) -> tuple[object, nvrtc.Launch]:
        """The driver's handle of a kernel on this GPU, and its threads and shared memory; compiled if need be."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{kernel} ({kind}) is used for the first time while a CUDA graph is captured; call it once before, "
                "so that it is compiled and loaded"
            )
        with _lock:
            if kernel not in self._functions[kind]:
                self._enter()
                compiled = nvrtc.compiled(nvrtc.KERNELS[kernel], kind, self._arch)
                # Never unloaded: launches may be in flight, or captured, until the process ends.
                status, library = _driver().cuLibraryLoadData(compiled.cubin, [], [], 0, [], [], 0)
                if status:
                    raise RuntimeError(self._cannot_load(kernel, kind, status))
                loaded = _checked(kernel, *_driver().cuLibraryGetKernel(library, kernel.encode()))
                function = _checked(kernel, *_driver().cuKernelGetFunction(loaded))
                attributes = _driver().CUfunction_attribute
                needs = compiled.launches[kernel]
                if needs.shared_bytes > _SHARED_BYTES:
                    limit = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                    _checked(kernel, *_driver().cuFuncSetAttribute(function, limit, needs.shared_bytes))
                # All of a multiprocessor's memory: the driver's own choice may have room for fewer blocks than
                # registers have, and another choice for each kernel of a step would make it wait in between.
                share = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
                _checked(kernel, *_driver().cuFuncSetAttribute(function, share, 100))
                # Reading an attribute loads the code now. The first launch would load it, perhaps in a capture.
                _checked(kernel, *_driver().cuFuncGetAttribute(attributes.CU_FUNC_ATTRIBUTE_NUM_REGS, function))
                self._functions[kind][kernel] = function, needs
        return self._functions[kind][kernel]

    def _cannot_load(self, kernel: str, kind: Specialisation, status: Any) -> str:
        """The message for refused machine code: a driver loads none of a newer major version of CUDA than its own."""
        known = _checked(kernel, *_driver().cuDriverGetVersion())
        return (
            f"{kernel} ({kind}), compiled by NVRTC {nvrtc.version_name()} for {self._arch}, cannot be loaded on "
            f"cuda:{self._index}: {_name(status)}; the driver is for CUDA {known // 1000}.{known % 1000 // 10}. Where "
            f"NVRTC's major version is newer than the driver's: {nvrtc.remedy()}"
        )


class _Early(threading.local):
    """A launch that may start before the kernel ahead of it has ended: one for each thread, filled in for each launch,
    because making one takes longer than the launch."""

    def __init__(self) -> None:
        driver = _driver()
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        self.config = driver.CUlaunchConfig()
        self.config.attrs, self.config.numAttrs = [attribute], 1
        self.config.blockDimY = self.config.blockDimZ = 1


@lru_cache(maxsize=None)
def _driver() -> ModuleType:
    from cuda.bindings import driver

    return driver


def _checked(what: str, status: Any, *values: Any) -> Any:
    if status:
        raise RuntimeError(f"{what}: the driver says {_name(status)}")
    return values[0] if values else None


def _name(status: object) -> str:
    return getattr(status, "name", str(status))
