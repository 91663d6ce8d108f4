"""hf_kvquant: a quantized KV cache for HuggingFace transformers that attends to it as stored.

    import hf_kvquant
    model.generate(**inputs, cache_implementation="kvquant-int4")
"""

from .cache import QuantizedCache
from .config import KVQuantConfig, LayerOverride
from .integration import attention, cache_implementations, install, uninstall
from .quantization import FORMATS, QuantizedTensor, QuantSpec, quantize
from .states import QuantizedStates

__all__ = [
    "FORMATS",
    "KVQuantConfig",
    "LayerOverride",
    "QuantSpec",
    "QuantizedCache",
    "QuantizedStates",
    "QuantizedTensor",
    "attention",
    "cache_implementations",
    "install",
    "quantize",
    "uninstall",
]

install()
