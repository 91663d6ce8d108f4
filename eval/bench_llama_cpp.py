"""Time a decode step, and the attention in it, beside llama.cpp on its own quantized KV caches.

    pip install gguf
    CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python
    python eval/bench_llama_cpp.py --lengths 1024,8192,16384,32768 --threads 2 --out results.json

Both sides do the same work. The Llama of `bench_generate` with its random weights is written as a GGUF file, and every
cache holds the same random K and V. llama.cpp gets them as a saved state, so nobody waits for a prefill: quantized to
its format, in the order of its position embedding, and rotated as it rotates what it quantizes. Flash attention is on
for all its caches but one in float16, for on a CPU that may be faster without.

Checked before anything is timed: that llama.cpp read this shape and as many weights; that its cache holds the bytes it
was given (V not transposed, as only flash attention stores it); that the logits of every cache, on either side, are
near those of float32 DynamicCache and those of a cache with wrong keys are far. Afterwards: that every step added a
token to llama.cpp's cache and took the fused route in ours.

*Attention* is what a step takes more than the same step over a cache of one token, both in the same round: all that
grows with the context. What each side needs to get going (Python and transformers' modules in ours) is in both steps.
Samples are taken in rounds, A B C A B C .., each over flushed caches, and after a pause: either side's OpenMP threads
spin for some milliseconds after their work, and would disturb the other's.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import _bench
import numpy as np
import torch
from bench_generate import (
    CHECK_STEPS,
    CONTROL,
    DTYPES,
    NEAR_DENSE,
    build_model,
    candidates,
    choose,
    fill,
    first_logits,
    model_config,
    random_states,
    step,
    switched,
    tokens,
)
from transformers import Cache, LlamaConfig, LlamaForCausalLM

from hf_kvquant.quantization import rotate, rotation_block

try:
    import gguf
    import llama_cpp
except ImportError as error:
    MISSING = str(error)
else:
    MISSING = None

INSTALL = "pip install gguf; CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python"
LOG_LEVEL_ERROR = 4  # ggml's
WEIGHTS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
BASE_LENGTH = 1
WARM_UP_ROUNDS = 2
# Enough for libgomp's threads to sleep: by default they spin 300,000 times first, some milliseconds.
PAUSE_SECONDS = 0.02
# llama.cpp rotates heads whose size is a multiple of this, and V in blocks of it.
ROTATION = 64


if not MISSING:

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _) -> None:
        """llama.cpp tells of every tensor by default. Not its package's filter, which takes warnings for errors."""
        if level == LOG_LEVEL_ERROR:
            sys.stderr.write(text.decode(errors="replace"))


# ---- the model as llama.cpp reads it -------------------------------------------------------------------------------


def interleaved(x: np.ndarray) -> np.ndarray:
    """Rows `[.., head_dim, n]` in the order of GGUF's Llama: the two channels that turn together are neighbours."""
    *_, head_dim, n = x.shape
    return x.reshape(-1, 2, head_dim // 2, n).swapaxes(1, 2).reshape(x.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, args: argparse.Namespace) -> None:
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
        kind = gguf.GGMLQuantizationType["F32" if weight.ndim == 1 else WEIGHTS[args.dtype]]
        stored = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(stored, gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextlib.contextmanager
def loaded(model: LlamaForCausalLM, args: argparse.Namespace) -> Iterator:
    """llama.cpp's model, from a file that lives as long."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, model, args)
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
    """That llama.cpp runs the model that we do."""
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
    return [_bench.is_true("llama.cpp", f"{what}: {a} are {b}", a == b) for what, (a, b) in found.items()]


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


def row_bytes(kind: str, args: argparse.Namespace) -> int:
    """Bytes of a token's K, or V, in one layer."""
    block, size = gguf.GGML_QUANT_SIZES[TYPES[kind].number]
    return args.kv_heads * args.head_dim // block * size


def state_bytes(kind: str, args: argparse.Namespace, length: int) -> int:
    """Bytes of `saved_state` without its head: two numbers, the cells, and each layer's K and V with a header."""
    return 12 + 12 * length + 2 * args.layers * (12 + length * row_bytes(kind, args))


def saved_state(head: np.ndarray, kind: str, args: argparse.Namespace, length: int, roll: int = 0) -> np.ndarray:
    """Our random K and V as llama.cpp saves a sequence, after the `head` that it writes; uint8. `roll` as in `fill`.

    The number of tokens; of each its position, the number of its sequences and the one; whether V is transposed, and
    the number of layers; then keys of all layers and values of all layers, each `[length, kv_heads * head_dim]` in
    `kind` behind a header. Source: `llama_kv_cache::state_write` of llama.cpp.
    """
    stored = TYPES[kind]
    width = args.kv_heads * args.head_dim
    row = [stored.number, row_bytes(kind, args), 0]
    headers = [row, row if stored.flash else [stored.number, row_bytes(kind, args) // width, width]]
    rotated = stored.bits < 16 and args.head_dim % ROTATION == 0
    sides = ([], [])
    for layer_idx in range(args.layers):
        key, value = (x[0].float() for x in random_states(args, length, layer_idx))
        key = torch.from_numpy(interleaved(key.roll(roll, dims=1).transpose(1, 2).numpy())).transpose(1, 2)
        for side, header, x, block in zip(sides, headers, (key, value), (rotation_block(args.head_dim), ROTATION)):
            x = rotate(x.unflatten(-1, (-1, block))).flatten(-2) if rotated else x
            data = gguf.quantize(x.transpose(0, 1).reshape(length, width).contiguous().numpy(), stored.number)
            transposed = side is sides[1] and not stored.flash
            side += [np.array(header, np.uint32), data.T if transposed else data]
    positions = np.arange(length)
    parts = [
        head,
        np.array([length], np.uint32),
        np.stack([positions, np.ones(length), np.zeros(length)], axis=1).astype(np.int32),
        np.array([not stored.flash, args.layers], np.uint32),
        *sides[0],
        *sides[1],
    ]
    return np.concatenate([np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts])


class LlamaCppCache:
    """A context of llama.cpp with a KV cache of one type, and room for the steps of the benchmark."""

    def __init__(self, theirs, kind: str, args: argparse.Namespace, length: int):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = length + CHECK_STEPS + args.new
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if TYPES[kind].flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.type_k = params.type_v = TYPES[kind].number
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(theirs))
        self._context = llama_cpp.llama_init_from_model(theirs, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp {llama_cpp.__version__} makes no context with a {kind} cache")
        # The state of an empty cache: what stands before the number of tokens, and that number.
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
        """As `bench_generate.step`, of one sequence: the next token and the logits `[vocab_size]`."""
        batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(token), 1)
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}, expected 0")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, -1), (self._vocab_size,))
        return logits.argmax(), logits

    def first_logits(self, args: argparse.Namespace) -> torch.Tensor:
        """As `bench_generate.first_logits`, `[CHECK_STEPS, 1, vocab_size]`."""
        return torch.stack([torch.tensor(self.step(token.item())[1])[None] for token in tokens(args, CHECK_STEPS)])

    def close(self) -> None:
        llama_cpp.llama_free(self._context)


def _pointer(x: np.ndarray):
    return x.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


# ---- one length ----------------------------------------------------------------------------------------------------


@dataclass
class Contestant:
    """A filled cache and its twin of `BASE_LENGTH` tokens; of llama.cpp if `kind` says so, else of transformers."""

    name: str
    kind: str
    bits: int
    cache: LlamaCppCache | Cache
    base: LlamaCppCache | Cache
    cache_bytes: int


def our_contestants(model: LlamaForCausalLM, args: argparse.Namespace, length: int) -> Iterator[Contestant]:
    for candidate in candidates(args):
        if candidate.kind == "ours":
            caches = []
            for n in (length, BASE_LENGTH):
                caches.append(candidate.build(model.config, n + args.new + CHECK_STEPS))
                fill(caches[-1], args, n, candidate.dtype)
            report = caches[0].memory_report()
            yield Contestant(candidate.name, "ours", candidate.bits, *caches, report["total"] - report["slack"])


def their_contestants(theirs, args: argparse.Namespace, length: int, checks: list[dict]) -> Iterator[Contestant]:
    """Adds to `checks` that llama.cpp gives back the bytes that it was given."""
    for kind in args.types:
        caches = []
        for n in (length, BASE_LENGTH):
            cache = LlamaCppCache(theirs, kind, args, n)
            state = saved_state(cache.head, kind, args, n)
            cache.restore(state)
            same = np.array_equal(cache.state(), state) and state.nbytes == cache.head.size + state_bytes(
                kind, args, n
            )
            checks.append(_bench.is_true(kind, f"llama.cpp holds the bytes it was given, {n} tokens", same))
            caches.append(cache)
        nbytes = 2 * args.layers * length * row_bytes(kind, args)
        yield Contestant(kind, "llama.cpp", TYPES[kind].bits, *caches, nbytes)


def dense_logits(config: LlamaConfig, args: argparse.Namespace, length: int, roll: int = 0) -> torch.Tensor:
    """First logits of float32 DynamicCache; what every cache should give."""
    dense = next(c for c in candidates(args) if c.name == "dynamic-float32")
    cache = dense.build(config, length)
    fill(cache, args, length, dense.dtype, roll)
    return first_logits(args, build_model(config, args, dense.dtype), cache)


def their_logits_of_wrong_keys(theirs, args: argparse.Namespace, length: int) -> torch.Tensor:
    kind = args.types[-1]
    cache = LlamaCppCache(theirs, kind, args, length)
    cache.restore(saved_state(cache.head, kind, args, length, roll=1))
    logits = cache.first_logits(args)
    cache.close()
    return logits


def bench_length(args: argparse.Namespace, theirs, model: LlamaForCausalLM, length: int) -> dict[str, list[dict]]:
    """Checks, and if they all pass the rows of the table, at one length."""
    checks = shape_checks(theirs, model)
    expected = {n: dense_logits(model.config, args, n) for n in (length, BASE_LENGTH)}
    wrong = _bench.relative_error(dense_logits(model.config, args, length, roll=1), expected[length])
    their_wrong = _bench.relative_error(their_logits_of_wrong_keys(theirs, args, length), expected[length])
    what = "a cache with wrong keys is far from dense"
    checks += [
        _bench.at_most(name, what, -x, -CONTROL) for name, x in (("control", wrong), ("llama.cpp", their_wrong))
    ]
    contestants = []
    try:
        contestants += their_contestants(theirs, args, length, checks)
        contestants += our_contestants(model, args, length)
        for c in contestants:
            for n, cache in ((length, c.cache), (BASE_LENGTH, c.base)):
                logits = cache.first_logits(args) if c.kind == "llama.cpp" else first_logits(args, model, cache)
                error = _bench.relative_error(logits, expected[n])
                what = f"logits near float32 DynamicCache, {n} tokens"
                checks.append(_bench.at_most(c.name, what, error, NEAR_DENSE[c.bits] * wrong))
        if all(check["passed"] for check in checks):
            print(f"{length} tokens: {len(checks)} checks passed, timing", file=sys.stderr, flush=True)
            roof = _bench.PlainRead(max(c.cache_bytes for c in contestants))
            samples = time_steps(model, contestants, roof, args)
            print(f"{length} tokens: timed", file=sys.stderr, flush=True)
            checks += step_checks(contestants, args, length)
    finally:
        for c in contestants:
            if c.kind == "llama.cpp":
                c.cache.close()
                c.base.close()
    checks = [{"length": length, **check} for check in checks]
    if not all(check["passed"] for check in checks):
        return {"checks": checks}
    plain_read = [{"length": length, **roof.facts()}]
    return {"checks": checks, "steps": rows(contestants, samples, roof, args, length), "plain_read": plain_read}


def time_steps(
    model: LlamaForCausalLM, contestants: list[Contestant], roof: _bench.PlainRead, args: argparse.Namespace
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of a step over the cache and of one over its twin with one token, by rounds."""

    def seconds(c: Contestant, cache: LlamaCppCache | Cache, token: torch.Tensor) -> float:
        theirs = c.kind == "llama.cpp"
        number = token.item()
        roof.flush()
        time.sleep(PAUSE_SECONDS)
        with contextlib.nullcontext() if theirs else switched(model, cache):
            start = time.perf_counter()
            if theirs:
                cache.step(number)
            else:
                step(model, cache, token)
            return time.perf_counter() - start

    samples = {c.name: [] for c in contestants}
    for i, token in enumerate(tokens(args, CHECK_STEPS + args.new)[CHECK_STEPS:]):
        for c in contestants:
            pair = seconds(c, c.cache, token), seconds(c, c.base, token)
            if i >= WARM_UP_ROUNDS:
                samples[c.name].append(pair)
    return samples


def step_checks(contestants: list[Contestant], args: argparse.Namespace, length: int) -> list[dict]:
    """That every step did what it was to do."""
    done = CHECK_STEPS + args.new
    checks = []
    for c in contestants:
        for n, cache in ((length, c.cache), (BASE_LENGTH, c.base)):
            if c.kind == "llama.cpp":
                passed = cache.state().size == cache.head.size + state_bytes(c.name, args, n + done)
                what = "every step added a token to every layer"
            else:
                expected = {"decode_fused": args.layers * done, "decode_dequantized": 0}
                passed = {route: cache.routes[route] for route in expected} == expected
                what = "every step took the fused route"
            checks.append(_bench.is_true(c.name, f"{what}, {n} tokens", passed))
    return checks


def rows(
    contestants: list[Contestant], samples: dict, roof: _bench.PlainRead, args: argparse.Namespace, length: int
) -> list[dict]:
    numbers = 2 * args.layers * length * args.kv_heads * args.head_dim
    found = {}
    for c in contestants:
        attention = _bench.summary([with_cache - without for with_cache, without in samples[c.name]])
        gb_per_s = c.cache_bytes / attention["median"] / 1e6
        found[c.name] = {
            "length": length,
            "name": c.name,
            "kind": c.kind,
            "bits_per_number": c.cache_bytes * 8 / numbers,
            "cache_bytes": c.cache_bytes,
            "step_ms": _bench.summary([with_cache for with_cache, _ in samples[c.name]]),
            "base_ms": _bench.summary([without for _, without in samples[c.name]]),
            "attention_ms": attention,
            "attention_gb_per_s": gb_per_s,
            "share_of_plain_read": gb_per_s * 1e9 / roof.bytes_per_s,
        }
    peers = {c.bits: found[c.name] for c in contestants if c.kind == "llama.cpp"}
    for c in contestants:
        if c.kind == "ours" and c.bits in peers:
            row, peer = found[c.name], peers[c.bits]
            row["peer"] = peer["name"]
            for part in ("attention", "step"):
                row[f"{part}_faster_than_peer"] = peer[f"{part}_ms"]["median"] / row[f"{part}_ms"]["median"]
    return list(found.values())


# ---- the whole -----------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,8192,16384,32768", help="cached tokens, comma separated")
    parser.add_argument("--rounds", type=int, default=15, help="steps that are timed, for every cache")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128, help="width of the residual stream and of the MLP")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights, on both sides")
    parser.add_argument("--types", default=",".join(TYPES), help="llama.cpp's caches, comma separated")
    parser.add_argument("--presets", help="ours, comma separated, or YAML paths; default: all presets")
    parser.add_argument("--backend", default="auto", help="of ours: auto, cpu or reference")
    parser.add_argument("--threads", type=int, help="of both sides; default: torch's")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args(argv)
    if MISSING:
        parser.error(f"{MISSING}; to install: {INSTALL}")
    args.lengths = [int(length) for length in args.lengths.split(",")]
    args.types = args.types.split(",")
    if not set(args.types) <= set(TYPES):
        parser.error(f"--types {','.join(args.types)}: expected some of {','.join(TYPES)}")
    if min(args.lengths) <= BASE_LENGTH:
        parser.error(f"--lengths: every length must be more than {BASE_LENGTH}")
    if args.head_dim % 32 or args.hidden % 32:
        parser.error(f"--head-dim {args.head_dim}, --hidden {args.hidden}: llama.cpp needs multiples of 32")
    # What `bench_generate` is told: the steps to come, one sequence, caches that grow.
    args.new, args.batch, args.compile = args.rounds + WARM_UP_ROUNDS, 1, False
    choose(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    began = time.perf_counter()
    found = {"checks": [], "steps": [], "plain_read": []}
    model = build_model(model_config(args, max(args.lengths)), args, DTYPES[args.dtype])
    with loaded(model, args) as theirs:
        for length in args.lengths:
            for name, new in bench_length(args, theirs, model, length).items():
                found[name] += new
            if _bench.refused(found["checks"]):
                return 1
    result = _bench.document(
        "llama_cpp",
        argv,
        {
            k: v
            for k, v in vars(args).items()
            if k not in ("configs", "out", "backend_chosen", "presets", "new", "compile")
        },
        backend=args.backend_chosen,
        llama_cpp={
            "llama-cpp-python": llama_cpp.__version__,
            "features": llama_cpp.llama_print_system_info().decode().strip(" |"),
        },
        configs={name: config.to_dict() for name, config in args.configs.items()},
        tolerance={"near dense, by bits": NEAR_DENSE, "control": CONTROL},
        **found,
        seconds=time.perf_counter() - began,
    )
    show(result)
    if args.out:
        _bench.write_json(args.out, result)
    return 0


def show(result: dict) -> None:
    a = result["arguments"]
    shape = f"{a['layers']} layers, hidden {a['hidden']}, {a['heads']} heads, {a['kv_heads']} KV heads"
    shape += f", head_dim {a['head_dim']}, {a['dtype']}"
    where = f"{result['machine']['threads']} threads, backend {result['backend']}"
    where += f", llama-cpp-python {result['llama_cpp']['llama-cpp-python']}"
    print(f"{len(result['checks'])} checks passed; Llama with random weights, {shape}; {where}; medians")
    for length in a["lengths"]:
        _bench.print_table(
            f"one decode step at {length} cached tokens",
            ["cache", "bits", "step ms", "at 1 token", "attention ms", "min .. max", "share of read", "x peer's"],
            [
                [
                    f"{row['kind']} {row['name']}",
                    f"{row['bits_per_number']:.2f}",
                    f"{row['step_ms']['median']:.2f}",
                    f"{row['base_ms']['median']:.2f}",
                    f"{row['attention_ms']['median']:.2f}",
                    f"{row['attention_ms']['min']:.2f} .. {row['attention_ms']['max']:.2f}",
                    f"{row['share_of_plain_read']:.0%}",
                    f"{row['attention_faster_than_peer']:.2f} ({row['peer']})" if "peer" in row else "-",
                ]
                for row in result["steps"]
                if row["length"] == length
            ],
        )


if __name__ == "__main__":
    sys.exit(main())
