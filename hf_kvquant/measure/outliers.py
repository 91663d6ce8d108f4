"""What stands out in keys or values and can break a format: a constant, a channel, a token, or tiny elements.

Every figure is a ratio to the typical spread: the median over channels of the median distance of a channel's elements
from their own median. Medians do not see what stands out, so a large token does not make its channel look large.
"""

from __future__ import annotations

from typing import Any

import torch

# Of FP16, which holds the scales. Below it they lose bits, and then vanish.
_SMALLEST_NORMAL = 2.0**-14
# The least ratio that stands out.
_STANDS_OUT = 10.0


@torch.no_grad()
def stand_outs(x: torch.Tensor, ids: torch.Tensor, reach: float) -> list[dict]:
    """What stands out in keys or values `[1, num_kv_heads, length, head_dim]`, the largest ratio first.

    Each entry has a `kind` and a `ratio`, and `head` and `channel` where the ratio is largest:

        constant   a channel far from zero, as a bias makes it
        channel    a channel with a large spread
        token      a token far from the others, also `position` and `token` (its id)
        tiny       elements so small that FP16 has no scale for them, also `largest`
        nonfinite  a NaN or an infinity

    Args:
        ids: the tokens `[1, length]`.
        reach: the largest code of the format on the token grid; see `quantization.Format`.
    """
    x = x[0].double()
    if not x.isfinite().all():
        head, position, channel = (int(i) for i in (~x.isfinite()).nonzero()[0])
        return [{"kind": "nonfinite", "ratio": float("inf"), "head": head, "channel": channel, "position": position}]
    middle = x.median(1, keepdim=True).values
    spread = (x - middle).abs().median(1, keepdim=True).values
    typical = spread.median(2, keepdim=True).values
    # If most channels are constant, their largest element is the measure.
    typical = torch.where(typical > 0, typical, x.abs().amax((1, 2), keepdim=True)).clamp(min=1e-300)
    # In a channel with a large spread neither a constant nor a token of that size stands out.
    usual = torch.maximum(spread, typical)
    ratios = {"constant": middle.abs() / usual, "channel": spread / typical, "token": (x - middle).abs() / usual}
    found: list[dict[str, Any]] = []
    for kind, ratio in ratios.items():
        head, position, channel = (int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
        entry: dict[str, Any] = {"kind": kind, "ratio": ratio.max().item(), "head": head, "channel": channel}
        if kind == "token":
            entry |= {"position": position, "token": int(ids[0, position])}
        found.append(entry)
    largest = x.abs().amax((1, 2))
    head = int(largest.argmin())
    if 0 < largest[head] < reach * _SMALLEST_NORMAL:
        too_small = _STANDS_OUT * reach * _SMALLEST_NORMAL / largest[head].item()
        found.append({"kind": "tiny", "ratio": too_small, "head": head, "largest": largest[head].item()})
    return sorted((entry for entry in found if entry["ratio"] >= _STANDS_OUT), key=lambda entry: -entry["ratio"])
