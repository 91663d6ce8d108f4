"""The project's goals for decode attention on a GPU: what memory allows, and a share of a good BF16 kernel's time.

Memory bounds a call, and some of its time no byte explains: launches, the first and the last blocks, merging. At short
contexts this overhead is all there is. So the time is compared with that of the bytes plus OVERHEAD_US. A BF16 kernel
has the same overhead, and reads so much that it counts little from BF16_FROM tokens on.
"""

from __future__ import annotations

OVERHEAD_US = 4.0
# The least share of the bandwidth of a device-to-device copy (bytes read and written), without the overhead.
SHARE_OF_COPY = {"int8": 0.85, "fp8": 0.85, "int4": 0.75}
OVER_BF16 = {"int8": 0.54, "fp8": 0.54, "int4": 0.31}
# The shortest contexts for which the two goals are set.
TIME_FROM, BF16_FROM = 4096, 65536


def time_limit(name: str, nbytes: float, copy_gb_per_s: float) -> float:
    """The most microseconds that a call may take that reads `nbytes`."""
    return nbytes / (SHARE_OF_COPY[name] * copy_gb_per_s * 1e3) + OVERHEAD_US
