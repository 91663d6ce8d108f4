"""Huge pages for large storage in main memory.

A cache is read from end to end in every step. With pages of 4 KB the processor looks up addresses for much of that
time, above all on virtual machines; pages of 2 MB need a 512th of the look-ups. Linux gives them to memory for which
they are requested before it is first written (`madvise(2)`; most systems have the setting `madvise` in
`/sys/kernel/mm/transparent_hugepage/enabled`).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from functools import lru_cache

import torch

# Smaller tensors hold hardly one whole huge page.
LARGE_BYTES = 4 << 20


@lru_cache(maxsize=None)
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def with_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, which is new and not yet written, after asking the system to put it on huge pages."""
    if tensor.device.type == "cpu" and tensor.nbytes >= LARGE_BYTES and sys.platform == "linux":
        # Whole pages only, because other memory may share the first and the last.
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        # This is advice: a system without huge pages refuses it, which does no harm.
        _madvise()(start, end - start, mmap.MADV_HUGEPAGE)
    return tensor
