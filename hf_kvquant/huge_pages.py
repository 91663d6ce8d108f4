"""Huge pages for large storage in main memory.

A cache is read from end to end in every step. With pages of 4 KB the processor looks up addresses for much of that
time, above all on virtual machines; pages of 2 MB need a 512th of the look-ups. Linux gives them to memory for which
they are requested before it is first written (`madvise(2)`; most systems have the setting `madvise` in
`/sys/kernel/mm/transparent_hugepage/enabled`).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Callable
from functools import lru_cache

import torch

HUGE_PAGE = 2 << 20
# Smaller tensors hold no whole huge page.
LARGE_BYTES = HUGE_PAGE


@lru_cache(maxsize=None)
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def empty_storage(*size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return an empty tensor. A large one in Linux's main memory is on huge pages, and begins with one.

    It has a mapping of its own. The addresses before the first huge page are never used, so they take no memory.
    """
    nbytes = math.prod(size) * dtype.itemsize
    if device.type != "cpu" or nbytes < LARGE_BYTES or sys.platform != "linux":
        return torch.empty(*size, dtype=dtype, device=device)
    mapping = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    skipped = -ctypes.addressof(ctypes.c_char.from_buffer(mapping)) % HUGE_PAGE
    flat = torch.frombuffer(mapping, dtype=dtype, count=nbytes // dtype.itemsize, offset=skipped)
    return with_huge_pages(flat).view(size)


def with_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, which is new and not yet written, after asking the system to put it on huge pages."""
    if tensor.device.type == "cpu" and tensor.nbytes >= LARGE_BYTES and sys.platform == "linux":
        # Whole pages only, because other memory may share the first and the last.
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        # This is advice: a system without huge pages refuses it, which does no harm.
        _madvise()(start, end - start, mmap.MADV_HUGEPAGE)
    return tensor
