"""A model's weights in the formats in which transformers loads them on a CPU.

    model = with_weights(model, "torchao-int4")

torchao's formats quantize what `TorchAoConfig` does: every linear layer except the output embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from ..storage import storage_nbytes

AS_THEY_ARE = "unquantized"
# The group size of llama.cpp's 4-bit weights.
_GROUP_SIZE = 32


def _int8() -> Any:
    return import_module("torchao.quantization").Int8WeightOnlyConfig()


def _int4() -> Any:
    # The formats of `Int4WeightOnlyConfig` are for GPUs.
    return import_module("torchao.prototype.quantization.int4").PrototypeInt4WeightOnlyConfig(group_size=_GROUP_SIZE)


_TORCHAO: dict[str, Callable[[], Any]] = {"torchao-int8": _int8, "torchao-int4": _int4}
WEIGHTS = (AS_THEY_ARE, *_TORCHAO)


def with_weights(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The model itself, or a copy with quantized weights.

    Raises:
        ImportError: torchao, or a library that it needs, is not installed.
    """
    if name == AS_THEY_ARE:
        return model
    config = _TORCHAO[name]()
    model = copy.deepcopy(model)
    kept = model.get_output_embeddings()  # type: ignore[operator]  # of PreTrainedModel

    def is_quantized(module: torch.nn.Module, _: str) -> bool:
        return isinstance(module, torch.nn.Linear) and module is not kept

    import_module("torchao.quantization").quantize_(model, config, is_quantized)
    return model


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters; shared ones count once."""
    return storage_nbytes(dict(model.named_parameters()))
