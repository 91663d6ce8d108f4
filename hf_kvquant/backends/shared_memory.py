"""Bytes of dynamic shared memory that the attention kernels are launched with.

A mirror of the layout in kernels/cuda/part.h: the macro KVQUANT_ATTENTION_BYTES carries the number into every
compilation, which fails if the kernel counts otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping

from .arguments import FORMATS

_ROWS = 16
_TILES_LIMIT = 46 * 1024


def attention_bytes(macros: Mapping[str, int]) -> int:
    """Of `decode_attention_kernel` compiled with these macros."""
    stored_keys, stored_values = _Side(macros, "K"), _Side(macros, "V")
    copied_keys, copied_values = stored_keys.copied(), stored_values.copied()
    parts = [(stored_keys, stored_values, False)]
    if stored_keys.scaled:
        parts.append((copied_keys, stored_values, True))
        if stored_values.scaled:
            parts.append((copied_keys, copied_values, True))
    if stored_values.scaled and not stored_keys.channel:
        parts.append((stored_keys, copied_values, True))
    return max(_part_bytes(*part, macros["KVQUANT_THREADS"] // 32) for part in parts)


def merge_bytes(macros: Mapping[str, int]) -> int:
    """Of `merge_splits_kernel`."""
    floats = -(-macros["KVQUANT_V_HEAD_DIM"] // 128) * 128
    return 4 * (2 * floats + 1) * (macros["KVQUANT_THREADS"] // 32)


class _Side:
    def __init__(self, macros: Mapping[str, int], side: str):
        self.format = macros[f"KVQUANT_{side}_FORMAT"]
        self.dim = macros["KVQUANT_HEAD_DIM" if side == "K" else "KVQUANT_V_HEAD_DIM"]
        self.scaled = self.format != FORMATS["dense"]
        self.channel = self.scaled and macros.get(f"KVQUANT_{side}_GRID", 0) == 1
        self.group = macros[f"KVQUANT_{side}_GROUP"]

    def copied(self) -> _Side:
        copy = object.__new__(_Side)
        copy.__dict__.update(self.__dict__, format=FORMATS["dense"], scaled=False, channel=False)
        return copy

    @property
    def parts(self) -> int:
        return -(-self.dim // 32) * 4 if self.format == FORMATS["int4"] else self.dim // 8

    @property
    def stride(self) -> int:
        """Of rows in shared memory: an odd number of chunks."""
        row = {FORMATS["int4"]: self.dim // 2, FORMATS["dense"]: self.dim * 2}.get(self.format, self.dim)
        return 16 * (-(-row // 16) | 1)

    @property
    def groups(self) -> int:
        """Scales of a token."""
        return self.dim // self.group if self.scaled and not self.channel else 0


def _part_bytes(keys: _Side, values: _Side, is_list: bool, warps: int) -> int:
    row = warps * (keys.stride + values.stride)
    wide = not is_list and not (keys.channel and keys.group < 32) and 2 * 32 * row <= _TILES_LIMIT
    tile = 32 if wide else 16
    stages = 1 if is_list else min(max(_TILES_LIMIT // (tile * row), 2), 4)
    tiles = max(stages * tile * row, warps // 2 * values.parts * 512)
    headers = stages * warps * 4 * keys.dim if keys.channel else 0
    queries = 256 * keys.parts + 4 * _ROWS * (1 + max(keys.groups, 1))
    return tiles + headers + queries + warps * (4 * tile * (keys.groups + values.groups) + 8 * _ROWS)
