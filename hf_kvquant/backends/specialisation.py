"""The macros that fix dtype, head_dim, formats and grids of a CUDA kernel at compile time.

The kernels read everything else (lengths, strides, masks, heads) from their argument at run time, so that a model
needs one or two specialisations, not one per shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ..quantization import QuantSpec
from . import gpu_refusal
from .arguments import DTYPES, FORMATS, Form

# The most columns that one block of threads attends to; fewer, but a multiple of UNIT, where all heads of a sequence
# would have fewer than BLOCKS blocks. Neither the GPU nor the batch decides, so results do not depend on them.
# With 8 KV heads SPLIT leaves it at BLOCKS blocks for up to 524,288 tokens.
SPLIT, UNIT, BLOCKS = 16384, 256, 256
# The most threads of a block; attention takes fewer if a GPU lacks the shared memory for them.
THREADS = 128
# The query rows (queries of the heads that share a KV head) of one block: the kernels are compiled for either.
ROWS = (8, 16)
MAX_HEAD_DIM, WIDE_HEAD_DIM = 256, 512  # all multiples of 16 up to the first, and the second
# Above this head_dim, 16 rows and values on the channel grid need more registers than a thread has; so do 16 rows in
# float32.
_MAX_HEAD_DIM_OF_BLOCKS = 192
_FLOAT32 = DTYPES[torch.float32]
# Slices (partials.h) of a query row besides those of stored columns: one for each kind of columns with copies.
COPY_SLICES = 3
# The most shared memory of a block of threads on the smallest GPUs.
_SHARED_BYTES = 99 << 10
HEAD_DIMS = f"a multiple of 16 up to {MAX_HEAD_DIM}, or {WIDE_HEAD_DIM}"
_FORMAT_NAMES = {number: name for name, number in FORMATS.items()}


def most_splits(kv_len: int, num_kv_heads: int) -> int:
    """The largest number of splits of sequences of at most `kv_len` columns (`Splits` in kernels/cuda/partials.h)."""
    return max(min(-(-kv_len // UNIT), _enough(num_kv_heads)), -(-kv_len // SPLIT))


def split_length(kv_len: int, num_kv_heads: int) -> int:
    """The columns of each split of a sequence of `kv_len` columns."""
    return min(max(-(-kv_len // (UNIT * _enough(num_kv_heads))), 1) * UNIT, SPLIT)


@contextmanager
def splits_of(columns: int) -> Iterator[None]:
    """Within this context all splits have as many columns, whatever the length: for measurements."""
    global SPLIT, UNIT
    kept = SPLIT, UNIT, _made.copy()
    _made.clear()
    SPLIT = UNIT = columns
    try:
        yield
    finally:
        SPLIT, UNIT, made = kept
        _made.clear()
        _made.update(made)


def rows_taken(dtype: int, channel_values: bool, head_dim: int, has_rotary: bool = False) -> tuple[int, ...]:
    """The query rows that a block may have; `dtype`: a value of `arguments.DTYPES`; `head_dim`: the larger one of keys
    and values."""
    if head_dim == WIDE_HEAD_DIM or has_rotary:
        return ROWS[1:]
    few = dtype == _FLOAT32 or (channel_values and head_dim > _MAX_HEAD_DIM_OF_BLOCKS)
    return ROWS[:1] if few else ROWS


def value_shares(dtype: int, v_head_dim: int) -> int:
    """The blocks among which the channels of a row of values are divided (`kShares` in specialisation.h)."""
    if dtype == _FLOAT32:
        return {MAX_HEAD_DIM: 4, WIDE_HEAD_DIM: 8}.get(v_head_dim, 1)
    return 4 if v_head_dim == WIDE_HEAD_DIM else 1


def takes_head_dim(head_dim: int) -> bool:
    """Whether the kernels take this head_dim, one of `HEAD_DIMS`."""
    return head_dim == WIDE_HEAD_DIM or (head_dim % 16 == 0 and 0 < head_dim <= MAX_HEAD_DIM)


def feedback_bytes(block_length: int, head_dim: int) -> int:
    """The shared memory in which an append with error feedback holds a block (`kBytes` in feedback.h)."""
    panel = 4 if block_length > 64 else 8
    return 4 * (block_length * (head_dim + 4 + panel) + 2 * panel * head_dim)


def rows_of_block(rows: int, taken: tuple[int, ...]) -> int:
    """The query rows of a block where there are `rows` for each KV head: one of those that are `rows_taken`."""
    return taken[0] if rows <= taken[0] else taken[-1]


def _enough(num_kv_heads: int) -> int:
    """The splits of each head that give a sequence BLOCKS blocks, or half of them: a power of two."""
    return max(BLOCKS >> (num_kv_heads - 1).bit_length(), 1)


class Specialisation(dict):
    """Macros by name. It is hashable, so it must not be changed after it is made."""

    def __init__(self, macros: dict[str, int]):
        super().__init__(macros)
        self._hash = hash(tuple(self.items()))

    def __hash__(self) -> int:  # type: ignore[override]  # a dict has none
        return self._hash

    def __str__(self) -> str:
        """A description in words, for messages and tables."""
        k, v = self["KVQUANT_HEAD_DIM"], self["KVQUANT_V_HEAD_DIM"]
        dtype = ("float32", "float16", "bfloat16")[self["KVQUANT_DTYPE"]]
        sides = f"keys {self._side('K')}, values {self._side('V')}"
        if "KVQUANT_R_HEAD_DIM" in self:
            sides += f", rotary keys of {self['KVQUANT_R_HEAD_DIM']} {self._side('R')}"
        pages = f", pages of {self['KVQUANT_PAGE_LENGTH']}" if "KVQUANT_PAGE_LENGTH" in self else ""
        return f"{dtype}, head_dim {k if k == v else f'{k}/{v}'}, {sides}, {self['KVQUANT_ROWS']} rows{pages}"

    def _side(self, side: str) -> str:
        name = _FORMAT_NAMES[self[f"KVQUANT_{side}_FORMAT"]]
        if name == "dense":
            return name
        grid = "channel" if self.get(f"KVQUANT_{side}_GRID") else "token"
        return f"{name} {grid} {self[f'KVQUANT_{side}_GROUP']}" + (
            " rotated" if self[f"KVQUANT_{side}_ROTATE"] else " feedback" if f"KVQUANT_{side}_FEEDBACK" in self else ""
        )


def for_source(source: str, kind: Specialisation) -> list[Specialisation]:
    """The specialisations of a source file that calls with any number of query rows need: `kind`, then others."""
    head_dim = max(kind["KVQUANT_HEAD_DIM"], kind["KVQUANT_V_HEAD_DIM"])
    has_rotary = "KVQUANT_R_HEAD_DIM" in kind
    taken = rows_taken(kind["KVQUANT_DTYPE"], bool(kind["KVQUANT_V_GRID"]), head_dim, has_rotary)
    rows = taken if source == "decode_attention.cu" else (kind["KVQUANT_ROWS"],)
    return [kind if kind["KVQUANT_ROWS"] == n else Specialisation({**kind, "KVQUANT_ROWS": n}) for n in rows]


class RotaryKeys(NamedTuple):
    """How the rotary keys of latent attention are stored."""

    spec: QuantSpec
    head_dim: int

    def go_with(self, dtype: int, latents: QuantSpec) -> bool:
        """Whether the kernels read them beside latents of this spec: where a query reads exact copies of one, it has
        to read those of the other. Not in float32 (`dtype`, a value of `arguments.DTYPES`)."""
        return (
            dtype != _FLOAT32
            and self.head_dim <= MAX_HEAD_DIM
            and takes_head_dim(self.head_dim)
            and (self.spec.is_dense, self.spec.block_length) == (latents.is_dense, latents.block_length)
        )


# The results of `plan`, `append_kind` and `specialisation` by their arguments; they depend on SPLIT and UNIT, too.
_made: dict[tuple, Any] = {}


class Plan(NamedTuple):
    """What of an attention call's kernels is the same at every length.

    rows: the query rows of a block; one of `ROWS`.
    copy_slices: the number of slices for columns with exact copies.
    shares: `value_shares`.
    """

    kind: Specialisation
    rows: int
    copy_slices: int
    shares: int


def plan(dtype: int, keys: Form, values: Form, rows: int, page_length: int = 0, rotary: Form | None = None) -> Plan:
    """The plan for `rows` query rows of each KV head; the other arguments are as in `specialisation`.

    Raises:
        ValueError: the kernels do not take this, or a side lacks the copies of columns that the other side has.
    """
    key = plan, dtype, keys, values, rows, page_length, rotary
    found = _made.get(key)
    if found is None:
        taken = rows_taken(dtype, values.spec.is_channel, max(keys.head_dim, values.head_dim), rotary is not None)
        of_block = rows_of_block(rows, taken)
        second = None if rotary is None else RotaryKeys(rotary.spec, rotary.head_dim)
        kind = specialisation(
            dtype, keys.spec, values.spec, keys.head_dim, values.head_dim, of_block, page_length, second
        )
        shares = value_shares(dtype, values.head_dim)
        found = _made[key] = Plan(kind, of_block, _copy_slices(keys, values), shares)
    return found


def append_kind(
    dtype: int, keys: Form, values: Form, page_length: int = 0, feedback: tuple[bool, bool] = (False, False)
) -> Specialisation:
    """The kind of an append; the arguments are as in `specialisation`."""
    key = append_kind, dtype, keys, values, page_length, feedback
    found = _made.get(key)
    if found is None:
        found = _made[key] = specialisation(
            dtype, keys.spec, values.spec, keys.head_dim, values.head_dim, page_length=page_length, feedback=feedback
        )
    return found


def _copy_slices(keys: Form, values: Form) -> int:
    for name, side, others, other in (("keys", keys, "values", values), ("values", values, "keys", keys)):
        lacks_recent = not side.has_recent and other.has_recent and not _reaches_farther(other.spec, side.spec)
        lacks_sink = not side.has_sink and other.has_sink and not side.spec.is_dense
        if lacks_recent or lacks_sink:
            what = "recent" if lacks_recent else "sink"
            # The kernels look for such columns on both sides (partials.h).
            raise ValueError(f"{name} {what}: None is not allowed; expected copies of tokens as the {others} have")
    has_any = keys.has_recent or keys.has_sink or values.has_recent or values.has_sink
    return COPY_SLICES if has_any else 0


def _reaches_farther(a: QuantSpec, b: QuantSpec) -> bool:
    """Whether there may be copies of columns of side `a` alone (`kReachesFarther` in partials.h)."""
    return not a.is_dense and (b.is_dense or (a.block_length or 1) > (b.block_length or 1))


def specialisation(
    dtype: int,
    k_spec: QuantSpec,
    v_spec: QuantSpec,
    k_head_dim: int,
    v_head_dim: int,
    rows: int = ROWS[0],
    page_length: int = 0,
    rotary: RotaryKeys | None = None,
    feedback: tuple[bool, bool] = (False, False),
) -> Specialisation:
    """The macros for these specs; `dtype` is a value of `arguments.DTYPES`, and `rows`, which only attention depends
    on, is one of `ROWS`; `page_length`: 0 for storage without pages; `rotary`: of attention that reads rotary keys
    beside latents, which are its keys and its values; `feedback`: of an append, whether keys and whether values have
    error feedback. Equal arguments give the same object.

    Raises:
        ValueError: the kernels do not support this head_dim, format, dtype or block with feedback; the message names
            it.
    """
    key = (
        specialisation, dtype, k_spec.code, v_spec.code, k_head_dim, v_head_dim, rows, page_length, rotary, feedback,
    )  # fmt: skip
    found = _made.get(key)
    if found is None:
        found = _made[key] = _make(dtype, k_spec, v_spec, k_head_dim, v_head_dim, rows, page_length, rotary, feedback)
    return found


def _make(
    dtype: int,
    k_spec: QuantSpec,
    v_spec: QuantSpec,
    k_head_dim: int,
    v_head_dim: int,
    rows: int,
    page_length: int,
    rotary: RotaryKeys | None,
    feedback: tuple[bool, bool],
) -> Specialisation:
    for name, head_dim in (("head_dim", k_head_dim), ("values head_dim", v_head_dim)):
        if not takes_head_dim(head_dim):
            raise ValueError(f"{name}: {head_dim} is not supported by the CUDA kernels; expected {HEAD_DIMS}")
    if k_head_dim == WIDE_HEAD_DIM and v_spec.is_channel and _MAX_HEAD_DIM_OF_BLOCKS < v_head_dim < WIDE_HEAD_DIM:
        expected = f"expected at most {_MAX_HEAD_DIM_OF_BLOCKS}, or {WIDE_HEAD_DIM}"
        beside = f"on the channel grid is not supported beside keys of {k_head_dim}"
        raise ValueError(f"values head_dim: {v_head_dim} {beside}; {expected}")
    if reason := gpu_refusal(k_spec, v_spec, (k_head_dim, v_head_dim)):
        raise ValueError(reason)
    for name, spec, head_dim, has in zip(("keys", "values"), (k_spec, v_spec), (k_head_dim, v_head_dim), feedback):
        if has:
            _check_feedback(name, spec, head_dim)
    return Specialisation(
        {
            "KVQUANT_DTYPE": dtype,
            "KVQUANT_HEAD_DIM": k_head_dim,
            "KVQUANT_V_HEAD_DIM": v_head_dim,
            **_side_macros("K", k_spec, k_head_dim),
            **_side_macros("V", v_spec, v_head_dim),
            **{f"KVQUANT_{side}_FEEDBACK": 1 for side, has in zip("KV", feedback) if has},
            "KVQUANT_SPLIT": SPLIT,
            "KVQUANT_UNIT": UNIT,
            "KVQUANT_BLOCKS": BLOCKS,
            "KVQUANT_THREADS": THREADS,
            "KVQUANT_ROWS": rows,
            **({"KVQUANT_PAGE_LENGTH": page_length} if page_length else {}),
            **({"KVQUANT_R_HEAD_DIM": rotary.head_dim, **_side_macros("R", *rotary)} if rotary else {}),
        }
    )


def _check_feedback(name: str, spec: QuantSpec, head_dim: int) -> None:
    length = spec.block_length
    if length is None:
        raise ValueError(f"{name} factors: not allowed for {spec.code}; expected the channel grid")
    if feedback_bytes(length, head_dim) > _SHARED_BYTES:
        largest = length
        while feedback_bytes(largest, head_dim) > _SHARED_BYTES:
            largest //= 2
        raise ValueError(
            f"{name} block_length: {length} with error feedback at head_dim {head_dim} is not supported by the CUDA "
            f"kernels, which hold a block in shared memory; expected at most {largest}"
        )


def _side_macros(side: str, spec: QuantSpec, head_dim: int) -> dict[str, int]:
    return {
        f"KVQUANT_{side}_FORMAT": FORMATS[spec.format],
        f"KVQUANT_{side}_GRID": int(spec.is_channel),
        f"KVQUANT_{side}_GROUP": spec.block_length or spec.group_size or head_dim,
        f"KVQUANT_{side}_ROTATE": int(spec.rotate),
    }
