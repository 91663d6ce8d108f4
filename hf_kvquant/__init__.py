"""hf_kvquant: a quantized KV cache for HuggingFace transformers that attends to it as stored.

import hf_kvquant
model.generate(**inputs, cache_implementation="kvquant-int4")
"""

from .cache import QuantizedCache
from .calibration import calibrate
from .config import KVQuantConfig, LayerOverride
from .export import register_for_export
from .feedback import Feedback
from .integration import attention, cache_implementations, install, uninstall
from .quantization import FORMATS, QuantizedTensor, QuantSpec, quantize
from .scoring import cache_read_share, score, score_by_decoding, score_chunks, score_tokens
from .states import QuantizedStates

__version__ = "0.2.0"

__all__ = [
    "FORMATS",
    "Feedback",
    "KVQuantConfig",
    "LayerOverride",
    "QuantSpec",
    "QuantizedCache",
    "QuantizedStates",
    "QuantizedTensor",
    "__version__",
    "attention",
    "cache_implementations",
    "cache_read_share",
    "calibrate",
    "install",
    "quantize",
    "register_for_export",
    "score",
    "score_by_decoding",
    "score_chunks",
    "score_tokens",
    "uninstall",
]

install()
