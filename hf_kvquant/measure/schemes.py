"""Other schemes of quantization as short references, scored with the same exact tokens as ours.

    compare(model, documents, [Scheme("kivi-4", sink_length=4, recent_length=32), *presets(["int4"])], settings, facts)

Each quantizes and reads back in plain PyTorch, after the cited paper or source; it stores nothing. So a table of them
compares what the schemes lose at their bits, and neither their windows nor their packages. Where a scheme shares
scales among tokens, a query reads its own block of tokens exactly, as with our channel grid. What needs a calibration
of the model (KVQuant's codebooks and outliers) is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..config import KVQuantConfig
from ..quantization import QuantSpec, rotate
from .caches import Preset, one_pass

Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Rule:
    """How a scheme stores keys or values: `stored(x)` are states `[.., length, head_dim]` as they are read back,
    `bits(head_dim)` the bits per element, `block_length` the number of tokens that share a scale (None: one)."""

    stored: Function
    bits: Callable[[int], float]
    block_length: int | None = None

    def read_back(self, x: torch.Tensor) -> ReadBack:
        return ReadBack(self.stored(x.float()))


@dataclass(frozen=True)
class ReadBack:
    """States as a scheme reads them back."""

    x: torch.Tensor

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return self.x.to(dtype)


def fp16(x: torch.Tensor) -> torch.Tensor:
    """`x` rounded to FP16."""
    return x.to(torch.float16).float()


def _in_groups(x: torch.Tensor, size: int | None, function: Function) -> torch.Tensor:
    """`function` of each group of `size` (None: all) elements along the last axis; the last group may be shorter."""
    return torch.cat([function(part) for part in x.split(size or x.shape[-1], dim=-1)], dim=-1)


def _rotated(function: Function) -> Function:
    return lambda x: rotate(function(rotate(x)))


def affine(bits: int, group: int | None, per_channel: bool = False, rotated: bool = False) -> Rule:
    """Zero point and scale in FP16 from the extremes of a group: of channels of a token, or of tokens of a channel."""

    def quantized(x: torch.Tensor) -> torch.Tensor:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        zero = fp16(low)
        scale = fp16((high - zero) / (2**bits - 1))
        codes = ((x - zero) / torch.where(scale != 0, scale, 1.0)).round().clamp(0, 2**bits - 1)
        return zero + codes * scale

    def stored(x: torch.Tensor) -> torch.Tensor:
        return _in_groups(x.mT, group, quantized).mT if per_channel else _in_groups(x, group, quantized)

    return Rule(
        _rotated(stored) if rotated else stored, lambda d: bits + 32 / (group or d), group if per_channel else None
    )


def symmetric(bits: int, group: int) -> Rule:
    """A scale in FP16 for each group of channels of a token, codes on both sides of zero."""
    most = 2 ** (bits - 1) - 1

    def quantized(x: torch.Tensor) -> torch.Tensor:
        scale = fp16(x.abs().amax(-1, keepdim=True) / most)
        return (x / torch.where(scale > 0, scale, 1.0)).round().clamp(-most, most) * scale

    return Rule(lambda x: _in_groups(x, group, quantized), lambda d: bits + 16 / group)


def signed_peak(bits: int, rotated: bool = False) -> Rule:
    """llama.cpp's q4_0 and q5_0: the element of a group of 32 with the largest magnitude becomes the lowest code."""
    half = 2 ** (bits - 1)

    def quantized(x: torch.Tensor) -> torch.Tensor:
        peak = x.gather(-1, x.abs().argmax(-1, keepdim=True))
        inverse = torch.where(peak != 0, -half / peak, 0.0)
        return ((x * inverse + half + 0.5).floor().clamp(0, 2 * half - 1) - half) * fp16(peak / -half)

    def stored(x: torch.Tensor) -> torch.Tensor:
        return _in_groups(x, 32, quantized)

    return Rule(_rotated(stored) if rotated else stored, lambda d: bits + 16 / 32)


@lru_cache(maxsize=None)
def gaussian_levels(bits: int) -> tuple[float, ...]:
    """The levels of least mean square error for a standard normal variable (Lloyd-Max), rising."""
    ends = torch.tensor([torch.inf], dtype=torch.float64)
    levels = torch.special.ndtri((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    for _ in range(2000):
        # Each level moves to the mean of the variable between the middles to its neighbours.
        borders = torch.cat([-ends, (levels[1:] + levels[:-1]) / 2, ends])
        levels = -torch.exp(-borders.square() / 2).diff() / (2 * torch.pi) ** 0.5 / torch.special.ndtr(borders).diff()
    return tuple(levels.tolist())


def gaussian(bits: int) -> Rule:
    """Rotated, a norm in FP16 for each token and head, and the nearest level of a normal distribution (TurboQuant)."""

    def quantized(x: torch.Tensor) -> torch.Tensor:
        levels = torch.tensor(gaussian_levels(bits), device=x.device)
        size = fp16(x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5)
        codes = torch.bucketize(x / torch.where(size > 0, size, 1.0), (levels[1:] + levels[:-1]) / 2)
        return levels[codes] * size

    return Rule(_rotated(quantized), lambda d: bits + 16 / d)


# Keys and values of each scheme.
SCHEMES: dict[str, tuple[Rule, Rule]] = {
    # Liu et al., KIVI, https://arxiv.org/abs/2402.02750: groups of 32.
    **{f"kivi-{bits}": (affine(bits, 32, per_channel=True), affine(bits, 32)) for bits in (4, 2)},
    # Transformers' caches of HQQ and quanto, as it configures them: zero points and scales for groups of 64 channels.
    "hqq-8": (affine(8, 64), affine(8, 64)),
    **{f"quanto-{bits}": (affine(bits, 64), affine(bits, 64)) for bits in (4, 2)},
    # ggml's block formats, as llama.cpp takes them for its cache.
    "q8_0": (symmetric(8, 32), symmetric(8, 32)),
    "q5_0": (signed_peak(5), signed_peak(5)),
    "q4_0": (signed_peak(4), signed_peak(4)),
    "q4_0-rotated": (signed_peak(4, rotated=True), signed_peak(4, rotated=True)),
    # Ashkboos et al., QuaRot, https://arxiv.org/abs/2404.00456: rotated, asymmetric, groups of 128 channels.
    "quarot-4": (affine(4, None, rotated=True), affine(4, None, rotated=True)),
    # Zandieh et al., TurboQuant, https://arxiv.org/abs/2504.19874, with a Hadamard rotation.
    **{f"turboquant-{bits}": (gaussian(bits), gaussian(bits)) for bits in (4, 3, 2)},
    # int8 in groups of 8 channels: 10 bits.
    "int8-groups-of-8": (symmetric(8, 8), symmetric(8, 8)),
}


class Scheme(Preset):
    """A candidate of `compare`, by its name in `SCHEMES`, with exact tokens as a config has them."""

    kind = "peer"

    def __init__(self, name: str, sink_length: int = 0, recent_length: int = 0):
        self.keys, self.values = SCHEMES[name]
        length = self.keys.block_length
        keys = QuantSpec("int8") if length is None else QuantSpec("int8", "channel", block_length=length)
        # Its formats are not used, only its rules about exact tokens.
        config = KVQuantConfig(keys, QuantSpec("int8"), sink_length=sink_length, recent_length=recent_length)
        super().__init__(name, config)

    def settings(self) -> dict:
        windows = {"sink_length": self.config.sink_length, "recent_length": self.config.recent_length}
        return {"scheme": self.name, "block_length": self.keys.block_length, **windows}

    def bits_per_element(self, head_dim: int) -> float:
        """Stored bits, exact tokens left out: the mean of keys and values."""
        return (self.keys.bits(head_dim) + self.values.bits(head_dim)) / 2

    def rows(self, model, ids, context, first):
        quantizers = tuple(lambda x, *_, rule=rule: rule.read_back(x) for rule in (self.keys, self.values))
        yield one_pass(model, ids, context, self.config, first, quantizers=lambda layer_idx: quantizers)
