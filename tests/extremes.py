"""Elements that quantization has to survive, for the tests of every backend that writes bytes."""

from __future__ import annotations

import torch


def put_extremes(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` float32 `[2, 2, kv_len, head_dim]` as `dtype`, some of it replaced: zeros, subnormals, constants, NaN and
    infinities."""
    x[0, 0, 3] = 0
    x[0, 0, 4] = -0.0
    x[0, 0, 5] *= 1e-9
    x[0, 0, 6, 1] = 3e4
    x[0, 0, 7] = 0.37
    x[0, 0, 8] = 2.0**-14 * torch.randn(x.shape[3], generator=torch.Generator().manual_seed(8))
    x[0, 1, 10, 2] = torch.nan
    x[0, 1, 11, 3] = torch.inf
    x[0, 1, 12, 4] = -torch.inf
    x[1, 0, :, 0] = 0.1  # constant channels: a zero point above the maximum, a negative or zero scale
    x[1, 0, :, 1] = -1.7
    x[1, 0, :, 2] = 0
    x[1, 0, ::2, 3] = 0
    x[1, 0, 1::2, 3] = -0.0
    x[1, 0, :, 4] *= 1e-7
    x[1, 1, 64:128, 5] = torch.nan
    if dtype != torch.float16:
        x[1, 1, 20, 6] = 1e30
        x[1, 1, 21, 7] = -3e38
        x[1, 1, 22] = 3e38
    return x.to(dtype)
