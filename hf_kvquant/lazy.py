"""`LazyStates`: the tensor that a model gets if it reads a quantized layer's keys or values in the middle of a step.

Mllama calls `layer.keys.numel()` on every layer in every step. A tensor that de-quantizes only when its elements are
used answers that, and gives its shape, dtype and device, at no cost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_map_only


class LazyStates(torch.Tensor):
    """A tensor of a known shape. The first operation on it calls `read`, once, for its elements."""

    @staticmethod
    def __new__(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device, read: Callable[[], torch.Tensor]):
        tensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        tensor._read, tensor._elements = read, None
        return tensor

    def _known(self) -> torch.Tensor:
        if self._elements is None:
            self._elements = self._read()
        return self._elements

    def __repr__(self, **kwargs) -> str:
        return f"LazyStates({self._known()!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, cls._known, (args, kwargs or {}))
        return function(*args, **kwargs)
