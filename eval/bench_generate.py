"""Time a whole decode step through a model, with every KV cache that a user of transformers could choose.

    python eval/bench_generate.py --lengths 128,1024,8192 --new 16 --out results.json
    python eval/bench_generate.py --compile --lengths 128,1024,8192,32768 --presets int8,int4 --out results.json

The model is a Llama of the given shape with random weights. Its residual stream, MLP and vocabulary are small on
purpose (`--hidden`): the step is about the cache, and in a real model the rest of it takes longer. A step is one
forward pass for one token and the argmax of its logits. Candidates, all in one run:

    dynamic, static       transformers' DynamicCache (the baseline, in --dtype and in float32) and StaticCache
    hf-quanto-int4, ..    transformers' QuantizedCache with each of its backends, at their default options
    int8, int4, ..        ours, every preset

With `--compile` the rivals are transformers' DynamicCache and StaticCache, ours are the growing and the static cache,
and steps of static caches are also compiled (torch.compile, fullgraph, by inductor).

Every cache is given the same random K and V in one update, as a prefill would. Then everything is checked: ours
against the de-quantized route through the model's own attention, in float32 and in --dtype; every cache against
float32 DynamicCache (loosely, for caches are lossy); that this comparison would notice a wrong cache; and that
`memory_report()` counts the tensors that are there. If one check fails nothing is timed. Then all take steps in turn,
A B C A B C .., so each finds its data in memory, not in the processor's caches.

Process memory is measured before that, in a process of its own for every cache. A candidate that cannot run is listed
with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import _bench
import torch
import transformers
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import hf_kvquant
from hf_kvquant import KVQuantConfig, ops
from hf_kvquant.cache import QuantizedCache
from hf_kvquant.host import CACHE

CHECK_STEPS = 2
# All limits are of relative errors of the logits of the first steps. Against float32 DynamicCache, by bits of a code:
# a share of the error that a cache with wrong keys has in the same run (1.1 to 1.4), which is at least `CONTROL`.
# Loose, because random weights amplify: measured shares are at most 0.36, 0.10 and 0.02.
NEAR_DENSE = {4: 0.5, 8: 0.2, 16: 0.05, 32: 1e-4}
CONTROL = 0.8
# Ours against the same bytes through de-quantized states and the model's own attention. In float32 tight: what is left
# is a code of a new token that rounds the other way (measured at most 3e-4). In --dtype: so many times the error that
# rounding gives DynamicCache itself in the same run (measured at most 1.5 times).
SAME_BYTES = 1e-3
SAME_BYTES_ROUNDING = 3.0
BASELINE = "dynamic"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


# ---- candidates ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """`build(config, max_length)` makes an empty cache; `kind` is "baseline", "rival" or "ours"; `compiled`: its steps
    are."""

    name: str
    kind: str
    build: Callable[[LlamaConfig, int], Cache]
    dtype: torch.dtype
    bits: int
    compiled: bool = False


def candidates(args: argparse.Namespace) -> list[Candidate]:
    dtype = DTYPES[args.dtype]

    def hf(backend: str, **options) -> Callable:
        return lambda config, _: transformers.QuantizedCache(backend, config, **options)

    def ours(kv_config: KVQuantConfig) -> Callable:
        return lambda config, max_length: QuantizedCache(config, kv_config, max_length=max_length)

    bits = dtype.itemsize * 8
    found = [
        Candidate(BASELINE, "baseline", lambda config, _: DynamicCache(config=config), dtype, bits),
        Candidate("dynamic-float32", "baseline", lambda config, _: DynamicCache(config=config), torch.float32, 32),
        Candidate("static", "rival", lambda config, n: StaticCache(config=config, max_cache_len=n), dtype, bits),
    ]
    if not args.compile:
        found += [
            Candidate("hf-quanto-int4", "rival", hf("quanto", nbits=4), dtype, 4),
            Candidate("hf-hqq-int4", "rival", hf("hqq", nbits=4), dtype, 4),
            Candidate("hf-hqq-int8", "rival", hf("hqq", nbits=8), dtype, 8),
            Candidate("hf-fp8", "rival", hf("fp8"), dtype, 8),
        ]
    for name, kv_config in args.configs.items():
        bits = min(_bits(spec.format) for spec in (kv_config.keys, kv_config.values))
        found.append(Candidate(name, "ours", ours(kv_config), dtype, bits))
        if args.compile:
            found.append(Candidate(f"{name}-static", "ours", ours(replace(kv_config, static=True)), dtype, bits))
    if args.compile:
        fixed = [c for c in found if c.name.endswith("static")]
        found += [replace(c, name=f"{c.name}-compiled", compiled=True) for c in fixed]
    return found


def _bits(format: str) -> int:
    return hf_kvquant.FORMATS[format].bits if format in hf_kvquant.FORMATS else 16


def model_config(args: argparse.Namespace, length: int) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        hidden_size=args.hidden,
        intermediate_size=args.hidden,
        vocab_size=256,
        max_position_embeddings=length + args.new + CHECK_STEPS,
        # Every projection keeps the size of its input, so that attention has its say in the logits.
        initializer_range=args.hidden**-0.5,
        attn_implementation="sdpa",
    )


def build_model(config: LlamaConfig, args: argparse.Namespace, dtype: torch.dtype) -> LlamaForCausalLM:
    """Random weights that `--dtype` can hold, stored as `dtype`; the same for every candidate."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        # Parameters only: the frequencies of the position embedding stay float32, as in a loaded model.
        parameter.data = parameter.data.to(DTYPES[args.dtype]).to(dtype)
    model.compiled_forward = torch.compile(model.forward, fullgraph=True, dynamic=False)
    return model


def random_states(args: argparse.Namespace, length: int, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V `[batch, kv_heads, length, head_dim]` of a layer, the same for every candidate."""
    generator = torch.Generator().manual_seed(layer_idx)
    shape = (args.batch, args.kv_heads, length, args.head_dim)
    key, value = (torch.randn(shape, generator=generator).to(DTYPES[args.dtype]) for _ in range(2))
    return key, value


def fill(cache: Cache, args: argparse.Namespace, length: int, dtype: torch.dtype, roll: int = 0) -> None:
    """Give `cache` all tokens in one update per layer; `roll` shifts the keys against the values."""
    for layer_idx in range(args.layers):
        key, value = random_states(args, length, layer_idx)
        cache.update(key.to(dtype).roll(roll, dims=2), value.to(dtype), layer_idx)
    if isinstance(cache, QuantizedCache):
        for layer in cache.quantized_layers:
            # Else learned in prefill, which is not run here: Llama's attention takes what the cache returns.
            layer.takes_states = True


@torch.no_grad()
def step(forward: Callable, cache: Cache, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The next tokens `[batch]` and the logits `[batch, vocab_size]`; as timed."""
    logits = forward(input_ids=token, **{CACHE: cache}).logits[:, -1]
    return logits.argmax(-1), logits


def switched(model: LlamaForCausalLM, cache: Cache):
    """The context in which the model's attention understands the cache; transformers' caches need none."""
    return hf_kvquant.attention(model) if isinstance(cache, QuantizedCache) else contextlib.nullcontext()


def tokens(args: argparse.Namespace, n: int) -> torch.Tensor:
    """The same tokens `[n, batch, 1]` for every candidate, whatever it predicts."""
    return torch.randint(256, (n, args.batch, 1), generator=torch.Generator().manual_seed(1))


def first_logits(args, model: LlamaForCausalLM, cache: Cache, compiled: bool = False) -> torch.Tensor:
    """Logits `[CHECK_STEPS, batch, vocab_size]` of the first steps, float32."""
    forward = model.compiled_forward if compiled else model
    with switched(model, cache):
        return torch.stack([step(forward, cache, token)[1].float() for token in tokens(args, CHECK_STEPS)])


# ---- memory --------------------------------------------------------------------------------------------------------


def tensor_bytes(cache: Cache) -> int:
    """Bytes of every distinct storage that is reachable from the cache: codes, scales, windows, spare room."""
    storages, seen, stack = {}, set(), [cache]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, (type, str, int, float, torch.dtype, torch.device)):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            if hasattr(item, "__tensor_flatten__"):
                # A subclass (quanto's) that is made of other tensors.
                stack.extend(getattr(item, name) for name in item.__tensor_flatten__()[0])
            elif item.numel():
                storage = item.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif isinstance(item, object) and hasattr(item, "__dict__") and not callable(item):
            stack.extend(vars(item).values())
    return sum(storages.values())


def process_memory(args: argparse.Namespace, length: int, name: str) -> dict:
    """Run in a process of its own: what a cache adds to resident memory, and the peak of two decode steps."""
    if args.threads:
        torch.set_num_threads(args.threads)
    candidate = next(c for c in candidates(args) if c.name == name)
    config = model_config(args, length)
    model = build_model(config, args, candidate.dtype)
    # A short cache first: what is loaded at first use is no part of a cache.
    small = candidate.build(config, 64 + CHECK_STEPS)
    fill(small, args, 64, candidate.dtype)
    first_logits(args, model, small)
    del small
    before = _resident()
    cache = candidate.build(config, length + args.new + CHECK_STEPS)
    fill(cache, args, length, candidate.dtype)
    filled = _resident()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    first_logits(args, model, cache)
    return {"cache_mb": (filled - before) / 1e6, "step_peak_mb": (_resident("VmHWM") - before) / 1e6}


def _resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory, after what was freed has gone back to the system."""
    if field == "VmRSS":
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def measure_memory(args: argparse.Namespace, length: int, names: list[str]) -> dict[str, dict]:
    """`process_memory` of each candidate named, or why there is none.

    The processes fork from a fresh server that has run nothing; a fork of this one would inherit dead OpenMP threads.
    """
    if not sys.platform.startswith("linux"):
        return {name: {"reason": f"not measured on {sys.platform}"} for name in names}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_kvquant", "transformers.models.llama.modeling_llama"])
    found = {}
    for name in names:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                found[name] = pool.submit(process_memory, args, length, name).result()
            except Exception as error:
                found[name] = {"reason": reason(error)}
    return found


def reason(error: Exception) -> str:
    return _bench.without_paths(f"{type(error).__name__}: {error}")


# ---- one length ----------------------------------------------------------------------------------------------------


def bench_length(args: argparse.Namespace, length: int) -> dict[str, list[dict]]:
    """Checks, and if they all pass the rows of the table, at one length."""
    everyone = candidates(args)
    memory = measure_memory(args, length, [c.name for c in everyone if not c.compiled]) if args.memory else {}
    # One graph for every static cache, none of them for another length.
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = len(everyone) + 1
    config = model_config(args, length)
    max_length = length + args.new + CHECK_STEPS
    models = {dtype: build_model(config, args, dtype) for dtype in {torch.float32, DTYPES[args.dtype]}}

    def filled(candidate: Candidate, roll: int = 0) -> Cache:
        cache = candidate.build(config, max_length)
        fill(cache, args, length, candidate.dtype, roll)
        return cache

    def route_error(candidate: Candidate, dtype: torch.dtype) -> float:
        fused, twin = (filled(replace(candidate, dtype=dtype)) for _ in range(2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin.disable_fused("the benchmark compares both routes")
        return _bench.relative_error(first_logits(args, models[dtype], fused), first_logits(args, models[dtype], twin))

    dense = next(c for c in everyone if c.dtype == torch.float32 and c.kind == "baseline")
    exact = first_logits(args, models[torch.float32], filled(dense))
    wrong = _bench.relative_error(first_logits(args, models[torch.float32], filled(dense, roll=1)), exact)
    control = _bench.at_most("control", "a cache with wrong keys is far from dense", -wrong, -CONTROL)
    checks, skipped, caches = [control], [], {}
    for candidate in everyone:
        model = models[candidate.dtype]
        try:
            cache = filled(candidate)
            nbytes = tensor_bytes(cache)
            logits = first_logits(args, model, cache, candidate.compiled)
        except Exception as error:
            if candidate.kind != "rival":
                raise
            skipped.append({"length": length, "name": candidate.name, "reason": reason(error)})
            continue
        checks.append(_bench.is_true(candidate.name, "logits are finite", logits.isfinite().all()))
        error = _bench.relative_error(logits, exact)
        limit = NEAR_DENSE[candidate.bits] * wrong
        checks.append(_bench.at_most(candidate.name, "logits near float32 DynamicCache", error, limit))
        if candidate.name == BASELINE:
            rounding = error
        if candidate.kind == "ours":
            counted = cache.memory_report()["total"] == tensor_bytes(cache)
            checks.append(_bench.is_true(candidate.name, "memory_report counts every tensor", counted))
            limits = {candidate.dtype: max(SAME_BYTES_ROUNDING * rounding, SAME_BYTES), torch.float32: SAME_BYTES}
            for dtype, limit in () if candidate.compiled else limits.items():
                error = route_error(candidate, dtype)
                what = f"fused against the de-quantized route, {str(dtype).removeprefix('torch.')}"
                checks.append(_bench.at_most(candidate.name, what, error, limit))
        caches[candidate.name] = (candidate, cache, nbytes)
    if all(check["passed"] for check in checks):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        samples = time_steps(args, models, caches)
        again = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
        checks.append(_bench.at_most("compiled", "graphs that were compiled while steps were timed", again, 0))
        for name, (candidate, cache, _) in caches.items():
            if candidate.kind == "ours":
                expected = {"decode_fused": args.layers * (args.new + CHECK_STEPS), "decode_dequantized": 0}
                taken = {route: cache.routes[route] for route in expected}
                checks.append(_bench.is_true(name, "every step took the fused route", taken == expected))
    checks = [{"length": length, **check} for check in checks]
    if not all(check["passed"] for check in checks):
        return {"checks": checks}

    times = {name: _bench.summary(s) for name, s in samples.items()}
    nbytes_dense = caches[BASELINE][2]
    rows = []
    for name, (candidate, cache, nbytes) in caches.items():
        row = {
            "length": length,
            "name": name,
            "kind": candidate.kind,
            "dtype": str(candidate.dtype).removeprefix("torch."),
            "ms": times[name],
            "faster_than_dynamic": times[BASELINE]["median"] / times[name]["median"],
            "cache_bytes": nbytes,
            "share_of_dynamic_bytes": nbytes / nbytes_dense,
            "process_memory": memory.get(name, {"reason": "not asked for"}),
        }
        if candidate.kind == "ours":
            row["memory_report"] = cache.memory_report()
        rows.append(row)
    return {"checks": checks, "steps": rows, "skipped": skipped}


def time_steps(args: argparse.Namespace, models: dict, caches: dict) -> dict[str, list[float]]:
    """Seconds of `args.new` steps of every cache, one step of each in turn."""
    samples = {name: [] for name in caches}
    for token in tokens(args, CHECK_STEPS + args.new)[CHECK_STEPS:]:
        for name, (candidate, cache, _) in caches.items():
            model = models[candidate.dtype]
            forward = model.compiled_forward if candidate.compiled else model
            with switched(model, cache):
                start = time.perf_counter()
                step(forward, cache, token)
                samples[name].append(time.perf_counter() - start)
    return samples


# ---- the whole -----------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", "--length", default="8192", help="cached tokens, comma separated")
    parser.add_argument("--new", type=int, default=16, help="steps that are timed, for every cache")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="static caches, in plain and in compiled steps")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128, help="width of the residual stream and of the MLP")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--presets", help="comma separated, or YAML paths; default: all presets")
    parser.add_argument("--backend", default="auto", help="of ours: auto, cpu or reference")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure process memory")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args(argv)
    args.lengths = [int(length) for length in args.lengths.split(",")]
    choose(parser, args)
    return args


def choose(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Add to `args` the configs and the backend that it names, and take as many threads."""
    try:
        names = args.presets.split(",") if args.presets else KVQuantConfig.preset_names()
        configs = {Path(name).stem: KVQuantConfig.load(name) for name in names}
        args.configs = {name: replace(config, backend=args.backend) for name, config in configs.items()}
        args.backend_chosen = ops.choose_backend(args.backend, "cpu", DTYPES[args.dtype])
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    began = time.perf_counter()
    rows = {"checks": [], "steps": [], "skipped": []}
    for length in args.lengths:
        for name, new in bench_length(args, length).items():
            rows[name] += new
        if _bench.refused(rows["checks"]):
            return 1
    result = _bench.document(
        "generate",
        argv,
        {k: v for k, v in vars(args).items() if k not in ("configs", "out", "backend_chosen", "presets")},
        backend=args.backend_chosen,
        configs={name: config.to_dict() for name, config in args.configs.items()},
        tolerance={
            "near dense, by bits": NEAR_DENSE,
            "control": CONTROL,
            "same bytes": {"float32": SAME_BYTES, "times rounding": SAME_BYTES_ROUNDING},
        },
        **rows,
        seconds=time.perf_counter() - began,
    )
    show(result)
    if args.out:
        _bench.write_json(args.out, result)
    return 0


def show(result: dict) -> None:
    a = result["arguments"]
    shape = (
        f"batch {a['batch']}, {a['layers']} layers, hidden {a['hidden']}, {a['heads']} heads, {a['kv_heads']} KV heads"
    )
    shape += f", head_dim {a['head_dim']}, {a['dtype']}"
    where = f"{result['machine']['threads']} threads, backend {result['backend']}"
    print(f"{len(result['checks'])} checks passed; Llama with random weights, {shape}; {where}; medians")
    for length in a["lengths"]:
        _bench.print_table(
            f"one decode step at {length} cached tokens",
            ["cache", "ms", "min .. max", "x dynamic", "cache MB", "of dynamic", "process MB", "peak of a step MB"],
            [
                [
                    row["name"],
                    f"{row['ms']['median']:.2f}",
                    f"{row['ms']['min']:.2f} .. {row['ms']['max']:.2f}",
                    f"{row['faster_than_dynamic']:.2f}",
                    f"{row['cache_bytes'] / 1e6:.2f}",
                    f"{row['share_of_dynamic_bytes']:.1%}",
                    *(_megabytes(row["process_memory"], part) for part in ("cache_mb", "step_peak_mb")),
                ]
                for row in result["steps"]
                if row["length"] == length
            ],
        )
    for row in result["skipped"]:
        print(f"skipped {row['name']} at {row['length']}: {row['reason']}")


def _megabytes(memory: dict, part: str) -> str:
    return f"{memory[part]:.1f}" if part in memory else "-"


if __name__ == "__main__":
    sys.exit(main())
