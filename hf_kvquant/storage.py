"""The storage of one layer's keys or values: the quantized body, and the exact copies that override its columns."""

from __future__ import annotations

from collections import Counter
from functools import partial

import torch

from .expected import COUNT
from .huge_pages import empty_storage
from .quantization import QuantSpec
from .states import HasStored, QuantizedStates, Stored

# The most tokens that a crop may remove without losing exact copies that the next query reads.
ROLLBACK = 64
# Where offloaded layers are while they do not work.
HOST = "cpu"


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the main memory, on its way there when this returns. torch pins its memory."""
    return tensor.to(HOST, non_blocking=True)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on a device, on its way there when this returns."""
    return tensor.to(device, non_blocking=True)


class Side(HasStored):
    """Storage of keys or of values: the body, and the exact copies that override its columns."""

    def __init__(self, spec: QuantSpec, states: torch.Tensor, capacity: int, sink_length: int, recent_length: int):
        batch, num_kv_heads, _, self.head_dim = states.shape
        self.spec = spec
        self.dtype = states.dtype
        # New storage is on the device of the one before; for the first one the states take its place.
        self.stored = Stored(states)
        self.recent_start = 0
        window = max(recent_length, spec.block_length or 0)
        self._ring_length = 0 if spec.is_dense or window == 0 else window + ROLLBACK
        sink = None if spec.is_dense or sink_length == 0 else self._empty(batch, num_kv_heads, sink_length)
        self.stored = self._allocated(batch, num_kv_heads, capacity)._replace(sink=sink)

    def _empty(self, *size: int, head_dim: int | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        # Not in inference mode, because its tensors could not be written outside of it later.
        with torch.inference_mode(False):
            return empty_storage(*size, head_dim or self.head_dim, dtype=dtype or self.dtype, device=self.device)

    def _allocated(self, batch: int, num_kv_heads: int, capacity: int) -> Stored:
        """New storage for `capacity` columns, without sinks. If memory runs out here, nothing has changed."""
        spec, heads = self.spec, (batch, num_kv_heads)
        scale = zero_point = recent = None
        if spec.is_dense:
            data = self._empty(*heads, capacity)
        else:
            data = self._empty(*heads, capacity, head_dim=spec.row_bytes(self.head_dim), dtype=torch.uint8)
            rows = -(-capacity // spec.block_length) if spec.is_channel else capacity
            num_scales = spec.num_scales(self.head_dim)
            new_scales = partial(self._empty, *heads, rows, head_dim=num_scales, dtype=torch.float16)
            scale = new_scales()
            zero_point = new_scales() if spec.has_zero_point else None
        if self._ring_length:
            recent = self._empty(*heads, min(self._ring_length, capacity))
        return Stored(data, scale, zero_point, recent)

    @property
    def capacity(self) -> int:
        return self.stored.data.shape[2]

    @property
    def shape(self) -> tuple[int, int, int]:
        """batch, num_kv_heads, head_dim"""
        batch, num_kv_heads, _, _ = self.stored.data.shape
        return batch, num_kv_heads, self.head_dim

    def grow(self, capacity: int, length: int) -> None:
        """Move the first `length` columns into larger storage."""
        self.stored = self.moved(capacity, length)

    def moved(self, capacity: int, length: int, gone: int = 0, front: int = 0) -> Stored:
        """The first `length` columns, except the `gone` ones behind the `front`, in new storage of `capacity` columns.
        Both numbers are whole blocks."""
        batch, num_kv_heads, _ = self.shape
        new, block = self._allocated(batch, num_kv_heads, capacity), self.spec.block_length or 1
        for wider, old, step in ((new.data, self.data, 1), *zip(new[1:3], self.stored[1:3], (block, block))):
            if old is not None:
                first, skipped, end = front // step, gone // step, -(-length // step)
                wider[:, :, :first] = old[:, :, :first]
                wider[:, :, first : end - skipped] = old[:, :, first + skipped : end]
        if self.recent is not None:
            columns = torch.arange(max(self.recent_start, front + gone if gone else 0), length, device=self.device)
            ring, old = new.recent, self.recent
            ring[:, :, (columns - gone) % ring.shape[2]] = old[:, :, columns % old.shape[2]]
        return new._replace(sink=self.sink)

    def make_way(self, end: int) -> None:
        """Note that columns up to `end` are about to be stored: the ring then loses all but the last `ring_length`."""
        if self.recent is not None:
            self.recent_start = max(self.recent_start, end - self.recent.shape[2])

    def refill(self, states: QuantizedStates) -> bool:
        """After a crop, put de-quantized values into the ring for lost columns that the next query reads."""
        needed = int(states.dense_from(states.length))
        self.recent_start = min(self.recent_start, states.length)
        if self.recent is None or needed >= self.recent_start:
            return False
        columns = torch.arange(needed, self.recent_start, device=self.device)
        self.recent[:, :, columns % self.recent.shape[2]] = states.body(self.dtype)[:, :, columns]
        self.recent_start = needed
        return True

    def state(self, length: int, is_sink: torch.Tensor) -> dict:
        """The first `length` columns for a layer's `state`; elements that were never written are zero."""
        whole, block = length, 1
        if self.spec.is_channel:
            block = self.spec.block_length
            whole = length - length % block
        state = {
            "head_dim": self.head_dim,
            "data": self.data[:, :, :length].clone(),
            "recent_start": self.recent_start,
        }
        state["data"][:, :, whole:] = 0
        for name in ("scale", "zero_point"):
            tensor = getattr(self, name)
            if tensor is not None:
                state[name] = tensor[:, :, : -(-length // block)].clone()
                state[name][:, :, whole // block :] = 0
        if self.recent is not None:
            columns = torch.arange(self.recent_start, length, device=self.recent.device)
            state["recent"] = self.recent[:, :, columns % self.recent.shape[2]]
        if self.sink is not None:
            state["sink"] = torch.where(is_sink.to(self.sink.device), self.sink, 0)
        return state

    def expected(self, states: QuantizedStates, recent_start: int) -> dict:
        """The pattern (see `expected.py`) for a `state`, from a side on meta whose capacity is its length."""
        starts = range(1)
        pattern = {name: tensor for name, tensor in self.stored._asdict().items() if tensor is not None}
        if self.recent is not None:
            # The ring holds the columns that the next query reads, and no more columns than its length.
            starts = range(max(0, states.length - self._ring_length), states.dense_from(states.length) + 1)
            pattern["recent"] = self._empty(*self.data.shape[:2], states.length - recent_start)
        return pattern | {"head_dim": COUNT, "recent_start": starts}

    def restore(self, state: dict, length: int) -> None:
        """Take over a `state` unchanged, except that the ring is laid out anew: its slots depend on the capacity."""
        self.recent_start = state["recent_start"]
        recent, sink = None, state["sink"].clone() if "sink" in state else None
        if self._ring_length:
            recent = self._empty(*self.data.shape[:2], min(self._ring_length, length))
            columns = torch.arange(self.recent_start, length, device=self.device)
            recent[:, :, columns % recent.shape[2]] = state["recent"]
        self.stored = Stored(state["data"], state.get("scale"), state.get("zero_point"), recent, sink)

    def memory_report(self, length: int) -> Counter:
        batch, num_kv_heads, _ = self.shape
        dense = sum(t.nbytes for t in (self.recent, self.sink) if t is not None)
        body = sum(t.nbytes for t in (self.data, self.scale, self.zero_point) if t is not None)
        heads = batch * num_kv_heads
        rows = length // self.spec.block_length if self.spec.is_channel else length
        columns = rows * self.spec.block_length if self.spec.is_channel else length
        codes = heads * columns * self.data.shape[-1] * self.data.element_size()
        scales = sum(
            heads * rows * t.shape[-1] * t.element_size() for t in (self.scale, self.zero_point) if t is not None
        )
        equivalent = heads * length * self.head_dim * self.dtype.itemsize
        if self.spec.is_dense:
            dense, codes, body = dense + codes, 0, body - codes
        report = {"codes": codes, "scales": scales, "dense": dense, "slack": body - codes - scales}
        return Counter(report | {"total": sum(report.values()), "dense_equivalent": equivalent})


def storage_nbytes(root: object) -> int:
    """Bytes of the distinct storages behind the tensors that are reachable from an object: through attributes, lists
    and dicts, and through the tensors that a subclass of tensors (quanto's) is made of."""
    storages, seen, pending = {}, set(), [root]
    while pending:
        item = pending.pop()
        if id(item) in seen or isinstance(item, type) or callable(item):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            if hasattr(item, "__tensor_flatten__"):
                pending.extend(getattr(item, name) for name in item.__tensor_flatten__()[0])
            else:
                storage = item.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple)):
            pending.extend(item)
        else:
            pending.extend(getattr(item, "__dict__", {}).values())
    return sum(storages.values())
