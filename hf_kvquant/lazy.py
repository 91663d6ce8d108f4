"""`LazyStates`: the tensor that a model gets if it reads a quantized layer's keys or values in the middle of a step.

Mllama calls `layer.keys.numel()` on every layer in every step. A tensor that de-quantizes only when its elements are
used answers that, and gives its shape, dtype and device, at no cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only


class LazyStates(torch.Tensor):
    """A tensor of a known shape. The first operation on it calls `read`, once, for its elements."""

    _read: Callable[[], torch.Tensor]
    _elements: torch.Tensor | None

    @staticmethod
    def __new__(
        cls, shape: torch.Size, dtype: torch.dtype, device: torch.device, read: Callable[[], torch.Tensor]
    ) -> LazyStates:
        tensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        tensor._read, tensor._elements = read, None
        return tensor

    def _known(self) -> torch.Tensor:
        if self._elements is None:
            self._elements = self._read()
        return self._elements

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]  # torch names no keyword
        return f"LazyStates({self._known()!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own is a builtin without `function`
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, cls._known, (args, kwargs or {}))
        return function(*args, **kwargs)
