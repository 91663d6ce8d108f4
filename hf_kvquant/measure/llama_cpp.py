"""llama.cpp on a model and a KV cache of ours: the same weights as a GGUF file, the same K and V as a saved state.

llama.cpp gets keys and values quantized to its format, in the order of its position embedding, and rotated as it
rotates quantized states, so no prefill is needed. It needs `INSTALL`; `MISSING` says what is not installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM

from ..quantization import rotate, rotation_block
from .checks import is_true
from .step import Shape, random_states, tokens

try:
    import gguf
    import llama_cpp
except ImportError as error:
    MISSING = str(error)
else:
    MISSING = None

INSTALL = "pip install gguf; CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python"
LOG_LEVEL_ERROR = 4  # ggml's
WEIGHTS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
# llama.cpp rotates heads whose size is a multiple of this, and V in blocks of it.
ROTATION = 64


if not MISSING:

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _) -> None:
        """Log errors only: llama.cpp reports every tensor, and its package's filter takes warnings for errors."""
        if level == LOG_LEVEL_ERROR:
            sys.stderr.write(text.decode(errors="replace"))


def facts() -> dict:
    """The version of llama.cpp, and the features that it was built for."""
    features = llama_cpp.llama_print_system_info().decode().strip(" |")
    return {"llama-cpp-python": llama_cpp.__version__, "features": features}


# ---- the model as llama.cpp reads it -------------------------------------------------------------------------------


def interleaved(x: np.ndarray) -> np.ndarray:
    """Rows `[.., head_dim, n]` in the order of GGUF's Llama: the two channels that turn together are neighbours."""
    *_, head_dim, n = x.shape
    return x.reshape(-1, 2, head_dim // 2, n).swapaxes(1, 2).reshape(x.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, shape: Shape) -> None:
    """The weights of `model` as they are (norms in float32), and no tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        weight = parameter.detach().float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleaved(weight.reshape(-1, config.head_dim, config.hidden_size)).reshape(weight.shape)
        kind = gguf.GGMLQuantizationType["F32" if weight.ndim == 1 else WEIGHTS[shape.dtype]]
        stored = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(stored, gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextlib.contextmanager
def loaded(model: LlamaForCausalLM, shape: Shape) -> Iterator:
    """llama.cpp's model, from a file that exists as long as the model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, model, shape)
        llama_cpp.llama_log_set(log, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        theirs = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not theirs:
            raise RuntimeError(f"llama.cpp {llama_cpp.__version__} does not load the GGUF file; its log says why")
        try:
            yield theirs
        finally:
            llama_cpp.llama_model_free(theirs)


def shape_checks(theirs, model: LlamaForCausalLM) -> list[dict]:
    """Checks that llama.cpp runs the same model."""
    config = model.config

    def read(key: str) -> int:
        text = ctypes.create_string_buffer(32)
        llama_cpp.llama_model_meta_val_str(theirs, f"llama.attention.{key}".encode(), text, len(text))
        return int(text.value)

    found = {
        "layers": (llama_cpp.llama_model_n_layer(theirs), config.num_hidden_layers),
        "heads": (llama_cpp.llama_model_n_head(theirs), config.num_attention_heads),
        "KV heads": (llama_cpp.llama_model_n_head_kv(theirs), config.num_key_value_heads),
        "head_dim of keys": (read("key_length"), config.head_dim),
        "head_dim of values": (read("value_length"), config.head_dim),
        "weights": (llama_cpp.llama_model_n_params(theirs), sum(p.numel() for p in model.parameters())),
    }
    return [is_true("llama.cpp", f"{what}: {a} are {b}", a == b) for what, (a, b) in found.items()]


# ---- the cache of llama.cpp ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheType:
    """How llama.cpp stores K and V. Without flash attention V is transposed, and cannot be quantized."""

    ggml: str
    bits: int
    flash: bool = True

    @property
    def number(self) -> int:
        return int(gguf.GGMLQuantizationType[self.ggml])


TYPES = {
    "f16": CacheType("F16", 16),
    "f16-no-flash": CacheType("F16", 16, flash=False),
    "q8_0": CacheType("Q8_0", 8),
    "q4_0": CacheType("Q4_0", 4),
}


def row_bytes(kind: str, shape: Shape) -> int:
    """Bytes of a token's K, or V, in one layer."""
    block, size = gguf.GGML_QUANT_SIZES[TYPES[kind].number]
    return shape.kv_heads * shape.head_dim // block * size


def state_bytes(kind: str, shape: Shape, length: int) -> int:
    """Bytes of `saved_state` without its head: two integers, the cells, and each layer's K and V with a header."""
    return 12 + 12 * length + 2 * shape.layers * (12 + length * row_bytes(kind, shape))


def saved_state(head: np.ndarray, kind: str, shape: Shape, length: int, roll: int = 0) -> np.ndarray:
    """Our random K and V as llama.cpp saves a sequence, after the `head` that it writes; uint8. For `roll` see `step`.

    It holds the number of tokens; for each token its position, the number of its sequences and the sequence; whether
    V is transposed, and the number of layers; then keys of all layers and values of all layers, each `[length,
    kv_heads * head_dim]` in `kind` after a header. Source: `llama_kv_cache::state_write` of llama.cpp.
    """
    stored = TYPES[kind]
    width = shape.kv_heads * shape.head_dim
    row = [stored.number, row_bytes(kind, shape), 0]
    headers = [row, row if stored.flash else [stored.number, row_bytes(kind, shape) // width, width]]
    rotated = stored.bits < 16 and shape.head_dim % ROTATION == 0
    sides = ([], [])
    for layer_idx in range(shape.layers):
        key, value = (x[0].float() for x in random_states(shape, length, layer_idx))
        key = torch.from_numpy(interleaved(key.roll(roll, dims=1).transpose(1, 2).numpy())).transpose(1, 2)
        for side, header, x, block in zip(sides, headers, (key, value), (rotation_block(shape.head_dim), ROTATION)):
            x = rotate(x.unflatten(-1, (-1, block))).flatten(-2) if rotated else x
            data = gguf.quantize(x.transpose(0, 1).reshape(length, width).contiguous().numpy(), stored.number)
            transposed = side is sides[1] and not stored.flash
            side += [np.array(header, np.uint32), data.T if transposed else data]
    positions = np.arange(length)
    parts = [
        head,
        np.array([length], np.uint32),
        np.stack([positions, np.ones(length), np.zeros(length)], axis=1).astype(np.int32),
        np.array([not stored.flash, shape.layers], np.uint32),
        *sides[0],
        *sides[1],
    ]
    return np.concatenate([np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts])


class LlamaCppCache:
    """A context of llama.cpp with a KV cache of one type and a given number of tokens."""

    def __init__(self, theirs, kind: str, room: int):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = room
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if TYPES[kind].flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.type_k = params.type_v = TYPES[kind].number
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(theirs))
        self._context = llama_cpp.llama_init_from_model(theirs, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp {llama_cpp.__version__} makes no context with a {kind} cache")
        # The state of an empty cache is the head, and after it the number of tokens.
        self.head = self.state()[:-4]

    def restore(self, state: np.ndarray) -> None:
        """Take the tokens of a `saved_state`."""
        taken = llama_cpp.llama_state_seq_set_data(self._context, _pointer(state), state.nbytes, 0)
        if taken != state.nbytes:
            raise RuntimeError(f"llama.cpp took {taken} of {state.nbytes} bytes of state: is its layout another one?")

    def state(self) -> np.ndarray:
        found = np.empty(llama_cpp.llama_state_seq_get_size(self._context, 0), np.uint8)
        llama_cpp.llama_state_seq_get_data(self._context, _pointer(found), found.nbytes, 0)
        return found

    def step(self, token: int) -> tuple[int, np.ndarray]:
        """Like `step.step` for one sequence: the next token and the logits `[vocab_size]`."""
        batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(token), 1)
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}, expected 0")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, -1), (self._vocab_size,))
        return int(logits.argmax()), logits

    def first_logits(self, shape: Shape, n: int) -> torch.Tensor:
        """Like `step.first_logits`, `[n, 1, vocab_size]`."""
        return torch.stack([torch.tensor(self.step(token.item())[1])[None] for token in tokens(shape, n)])

    def close(self) -> None:
        llama_cpp.llama_free(self._context)


def _pointer(x: np.ndarray):
    return x.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
