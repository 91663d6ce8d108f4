"""`LazyStates`: what a model sees that looks inside of a quantized layer in the middle of a step.

Mllama asks `layer.keys.numel()` of every layer in every step. A tensor that de-quantizes only when its numbers are
used answers that, and what its shape, dtype and device are, for nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_map_only


class LazyStates(torch.Tensor):
    """A tensor of a known shape whose numbers `read` gives, called once, by the first operation on it."""

    @staticmethod
    def __new__(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device, read: Callable[[], torch.Tensor]):
        tensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        tensor._read, tensor._numbers = read, None
        return tensor

    def _known(self) -> torch.Tensor:
        if self._numbers is None:
            self._numbers = self._read()
        return self._numbers

    def __repr__(self, **kwargs) -> str:
        return f"LazyStates({self._known()!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, cls._known, (args, kwargs or {}))
        return function(*args, **kwargs)
