"""Huge pages for large storage in main memory.

A cache is read from end to end in every step. With pages of 4 KB the processor looks up addresses for much of that
time, on virtual machines above all; pages of 2 MB need a 512th of the look-ups. Linux gives them to memory that asks
before it is first written (`madvise(2)`, where `/sys/kernel/mm/transparent_hugepage/enabled` says `madvise`, as most
systems do).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import lru_cache

import torch

# Less would hold hardly a whole huge page.
LARGE_BYTES = 4 << 20


@lru_cache(maxsize=None)
def _madvise():
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def with_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, new and not yet written, on huge pages where the system has them: nothing else changes."""
    if tensor.device.type == "cpu" and tensor.nbytes >= LARGE_BYTES and sys.platform == "linux":
        # Whole pages only: the first and the last may belong to others, too.
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        # It is advice: a system without huge pages refuses it, and no harm is done.
        _madvise()(start, end - start, mmap.MADV_HUGEPAGE)
    return tensor
