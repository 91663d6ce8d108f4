"""Error feedback in the encoder: the file of its factors, and how they come from costs.

    feedback = hf_kvquant.calibrate(model, token_ids)   # see `calibration`
    feedback.save("model.feedback")
    KVQuantConfig(keys, values, error_feedback="model.feedback")

Attention reads a key through products with queries, and a value through the output projection. So an error e of a
token's key costs about e H e, where H is the second moment of the queries of its KV head, and that of a value the
same with H = W W' of the projection's columns W of these heads. Rounding a channel can make up for the errors of those
before it: channels are rounded one after another, and what the error of one costs is taken from the others (GPTQ,
https://arxiv.org/abs/2210.17323; LDLQ in QuIP, https://arxiv.org/abs/2307.13304; there for weights). The steps are in
`quantization`. Only blocks of the channel grid are encoded so, and what is stored is read as ever.

The file is a safetensors file. `layers.{i}.keys` and `layers.{i}.values` are the factors of layer i, float32
`[num_kv_heads, head_dim, head_dim]`, zero on and above the diagonal; the metadata says what they were measured on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from . import tensors_file
from .message import told
from .quantization import NO_FACTORS, Factors, QuantSpec, check_factors

FORMAT, VERSION = "hf_kvquant error feedback", "1"
# Added to the diagonal of H, as a part of its mean, so that no direction counts nothing.
_DAMPING = 0.01
_NAME = re.compile(r"layers\.(\d{1,6})\.(keys|values)")


def factors_of(cost: torch.Tensor) -> torch.Tensor:
    """The factors, float32, for costs H, `[num_kv_heads, head_dim, head_dim]`.

    With the channels in reverse order, and U'U the Cholesky decomposition of H's inverse, a unit of error of channel i
    takes U[i, j] / U[i, i] from channel j > i: what the least cost of all channels after i needs (GPTQ). Keys lose
    less from the last channel on, whose rotary embedding turns slowest (eval/results/NOTES.md).
    """
    cost = cost.double().flip(-1, -2)
    mean = cost.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    # A head whose errors cost nothing has no feedback.
    damping = torch.where(mean > 0, _DAMPING * mean, 1.0)
    inverse = torch.linalg.inv(cost + damping * torch.eye(cost.shape[-1], dtype=cost.dtype, device=cost.device))
    upper = torch.linalg.cholesky(inverse, upper=True)
    return (upper / upper.diagonal(dim1=-2, dim2=-1)[..., None]).triu(1).flip(-1, -2).float()


@dataclass(frozen=True, eq=False)
class Feedback:
    """The factors of a model.

    layers    by layer index, those of keys and of values: float32 `[num_kv_heads, head_dim, head_dim]`
    facts     what they were measured on, as text
    """

    layers: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
    facts: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the file that `load` reads.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {
            f"layers.{i}.{side}": x.cpu().contiguous()
            for i, sides in self.layers.items()
            for side, x in zip(("keys", "values"), sides)
        }
        try:
            save_file(tensors, path, {"format": FORMAT, "version": VERSION, **self.facts})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error

    @classmethod
    def load(cls, path: str | Path) -> Feedback:
        """The factors in a file, on the CPU.

        Raises:
            ValueError: the file cannot be read or is none of these, or a tensor is not allowed; it is named.
        """
        metadata, tensors = tensors_file.read(path, mapped=False)
        found = metadata.get("format"), metadata.get("version")
        if found != (FORMAT, VERSION):
            raise ValueError(
                f"{path}: is not a file of error feedback of version {VERSION} (its format is {told(found[0])}, its "
                f"version {told(found[1])})"
            )
        layers: dict[int, dict[str, torch.Tensor]] = {}
        for name, x in tensors.items():
            match = _NAME.fullmatch(name)
            if match is None:
                raise ValueError(f"{path}: tensor {told(name)} is unknown; expected layers.N.keys or layers.N.values")
            if x.dtype != torch.float32 or x.ndim != 3 or x.shape[1] != x.shape[2]:
                raise ValueError(
                    f"{path}: {name}: {tuple(x.shape)} of {x.dtype} is not allowed; expected [num_kv_heads, head_dim, "
                    "head_dim] of torch.float32"
                )
            if not x.isfinite().all():
                raise ValueError(f"{path}: {name}: NaN or infinity is not allowed; expected finite factors")
            if x.triu().any():
                raise ValueError(
                    f"{path}: {name}: factors on or above the diagonal are not allowed; expected zeros there"
                )
            layers.setdefault(int(match[1]), {})[match[2]] = x
        for i, sides in layers.items():
            if len(sides) < 2:
                raise ValueError(f"{path}: layers.{i} has {list(sides)} only; expected keys and values")
        return cls({i: (sides["keys"], sides["values"]) for i, sides in sorted(layers.items())}, metadata)

    def to(self, device: torch.device) -> Feedback:
        return Feedback(
            {i: (keys.to(device), values.to(device)) for i, (keys, values) in self.layers.items()}, self.facts
        )

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for sides in self.layers.values() for x in sides)


def loaded(path: str, device: torch.device) -> Feedback:
    """The factors in a file, on a device: read once for each device, and again if the file has changed.

    Raises:
        ValueError: as in `Feedback.load`, with the name of the config's field.
    """
    try:
        return _loaded(path, _version(path), device)
    except (OSError, ValueError) as error:
        reason = f"{path}: cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
        raise ValueError(f"error_feedback: {reason}; expected a file that `hf-kvquant calibrate` writes") from None


def _version(path: str) -> tuple[int, ...]:
    """The time, the size and the inode of a file, by which a changed file is known."""
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size, status.st_ino


@lru_cache(maxsize=16)
def _loaded(path: str, version: tuple[int, ...], device: torch.device) -> Feedback:
    # Not in inference mode, because compiled steps do not take its tensors.
    with torch.inference_mode(False):
        return Feedback.load(path).to(device)


def check_layers(path: str | None, num_layers: int) -> None:
    """Check that a file is not that of a model with more layers; its header is read once, and again if the file has
    changed. A cache that is only read needs no file, so all else that is wrong with it is said by `factors_in`.

    Args:
        path: the config's `error_feedback`.
        num_layers: those of the model.

    Raises:
        ValueError: the file has more.
    """
    if path is None:
        return
    try:
        found = _layers_in(path, _version(path))
    except (OSError, ValueError):
        return
    if found and found[-1] >= num_layers:
        raise ValueError(
            f"error_feedback: {path} has layers {told(found)}; expected at most those of the model's {num_layers} "
            "layers: calibrate this model"
        )


@lru_cache(maxsize=16)
def _layers_in(path: str, version: tuple[int, ...]) -> list[int]:
    _, tensors = tensors_file.read(path, mapped=True)
    return sorted({int(match[1]) for match in map(_NAME.fullmatch, tensors) if match is not None})


def factors_in(
    path: str | None, layer_idx: int, specs: tuple[QuantSpec, QuantSpec], shapes: tuple[tuple[int, int], ...],
    device: torch.device,
) -> Factors:  # fmt: skip
    """The factors of a layer's sides on the channel grid; None for a side that is on another one.

    Args:
        path: the config's `error_feedback`.
        shapes: num_kv_heads and head_dim of keys and of values.

    Raises:
        ValueError: the file cannot be read, has no such layer, or its factors have another shape.
    """
    if path is None or not any(spec.is_channel for spec in specs) or device.type == "meta":
        return NO_FACTORS
    layers = loaded(path, device).layers
    if layer_idx not in layers:
        raise ValueError(
            f"error_feedback: {path} has layers {told([*layers])}; expected layer {layer_idx} too: calibrate this "
            "model"
        )
    found: list[torch.Tensor | None] = []
    for name, spec, (num_kv_heads, head_dim), factors in zip(("keys", "values"), specs, shapes, layers[layer_idx]):
        if spec.is_channel:
            try:
                check_factors(f"layers.{layer_idx}.{name}", factors, spec, num_kv_heads, head_dim)
            except ValueError as error:
                raise ValueError(f"error_feedback: {path}: {error}; calibrate this model") from None
        found.append(factors if spec.is_channel else None)
    return Factors(*found)
