"""A stand-in for the capture of a CUDA graph."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Recorded(TorchDispatchMode):
    """Records operations that a CUDA graph cannot capture: reads from the device, and tensors made from host data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        asks = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "aten::equal")
        assert not any(name in func.name() for name in asks), f"{func.name()} cannot be captured"
        return func(*args, **(kwargs or {}))
