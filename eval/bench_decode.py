"""Time the operator alone: decode attention over a quantized cache, and writing tokens into it.

    python eval/bench_decode.py --lengths 1024,8192,16384,65536 --mha-lengths 16384 --out results.json

Candidates are every preset and every format on the plain token and channel grids. The baseline is torch's SDPA over a
contiguous BF16 or FP32 cache with the query heads of a KV head packed, as transformers' `pack_gqa` does it; beside it
stands SDPA with `enable_gqa=True` (slower on a CPU), which is what transformers calls when there is no mask.

First everything is checked: the bytes that were written against the reference backend's, the attention against the
reference backend over the same bytes, and the reference itself against SDPA over the de-quantized states. If one check
fails nothing is timed. Then all are timed in interleaved rounds, each next to a plain read of as many bytes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import _bench
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig

from hf_kvquant import FORMATS, KVQuantConfig, QuantizedStates, QuantSpec, ops
from hf_kvquant.cache import QuantizedCache

# Largest relative error of the output against the float32 reference over the same bytes. BF16 attention itself, which
# rounds its probabilities and its output to 8 bits, has about 0.003.
TOLERANCE = {"dense": 0.004, "int8": 0.004, "fp8": 0.004, "int4": 0.004}
LOGSUMEXP_TOLERANCE = 0.01
BASELINE_TOLERANCE = {"sdpa-bfloat16": 0.01, "sdpa-bfloat16-gqa": 0.01, "sdpa-float32": 1e-5}
REFERENCE_TOLERANCE = 1e-5
BASELINE = "sdpa-bfloat16"
# Tokens appended one by one in a sample, so that a block of keys is completed within it.
APPEND_RUN = 64
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def variants() -> dict[str, KVQuantConfig]:
    """Every preset, and every format on either grid of keys that is not a preset already; no windows."""
    found = {name: KVQuantConfig.preset(name) for name in KVQuantConfig.preset_names()}
    for format in FORMATS:
        values = QuantSpec(format)
        for grid in ("token", "channel"):
            config = KVQuantConfig(keys=values if grid == "token" else QuantSpec(format, grid), values=values)
            if config not in found.values():
                found[f"{format}-{grid}"] = config
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,8192,16384,65536", help="cached tokens, the newest included")
    parser.add_argument("--mha-lengths", default="", help="the same with as many KV heads as heads")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of queries and of what is appended")
    parser.add_argument("--presets", help=f"comma separated, or YAML paths; default all: {','.join(variants())}")
    parser.add_argument("--backend", default="auto", help="auto, cpu or reference")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument(
        "--prompt", type=int, default=2048, help="tokens of a prompt that is quantized at once; 0: skip"
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=60, help="stop a group of timings after so long")
    parser.add_argument("--warm", action="store_true", help="no flush before a call: at short length, its overhead")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args(argv)
    args.lengths, args.mha_lengths = (
        [int(length) for length in lengths.split(",") if length] for lengths in (args.lengths, args.mha_lengths)
    )
    if min(args.lengths + args.mha_lengths, default=0) < 2:
        parser.error("--lengths: every length must be at least 2")
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}")
    known = variants()
    try:
        names = args.presets.split(",") if args.presets else known
        configs = {Path(name).stem: known.get(name) or KVQuantConfig.load(name) for name in names}
        args.configs = {name: replace(config, backend=args.backend) for name, config in configs.items()}
        args.backend_chosen = ops.choose_backend(args.backend, "cpu", DTYPES[args.dtype])
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


# ---- inputs --------------------------------------------------------------------------------------------------------


def random_states(args: argparse.Namespace, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A query `[batch, heads, 1, head_dim]`, and K and V of `length` tokens; keys have biased and outlier channels."""
    generator = torch.Generator().manual_seed(length)
    size = (args.batch, args.kv_heads, length, args.head_dim)
    query = torch.randn(args.batch, args.heads, 1, args.head_dim, generator=generator)
    key = torch.randn(size, generator=generator) + torch.randn(args.head_dim, generator=generator)
    key[..., :: args.head_dim // 4] *= 4
    value = torch.randn(size, generator=generator)
    return tuple(x.to(DTYPES[args.dtype]) for x in (query, key, value))


def fill(
    config: KVQuantConfig, key: torch.Tensor, value: torch.Tensor, one_by_one: int, room: int
) -> tuple[QuantizedStates, QuantizedStates]:
    """States of a cache that was given all tokens but the last `one_by_one` at once, and has room for `room` more."""
    _, heads, length, head_dim = key.shape
    model = LlamaConfig(num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=heads, head_dim=head_dim)
    cache = QuantizedCache(model, config, max_length=length + room)
    prompt = length - one_by_one
    cache.update(key[:, :, :prompt], value[:, :, :prompt], 0)
    # There is no model whose attention could tell.
    cache.quantized_layers[0].takes_states = True
    for t in range(prompt, length):
        states = cache.update(key[:, :, t : t + 1], value[:, :, t : t + 1], 0)
    return states


def bytes_read(states: QuantizedStates) -> int:
    """Bytes that one query must read: codes and scales of the body, and the exact tokens instead of it at the end."""
    batch, heads, length, head_dim = states.shape
    body = min(states.dense_from(length - 1), length)
    scale_rows = -(-body // states.spec.block_length) if states.spec.is_channel else body
    scales = sum(t.shape[-1] * t.element_size() for t in (states.scale, states.zero_point) if t is not None)
    column = states.data.shape[-1] * states.data.element_size()
    sinks = 0 if states.sink is None else states.sink.nbytes
    return (
        batch * heads * (body * column + scale_rows * scales + (length - body) * head_dim * states.dtype.itemsize)
        + sinks
    )


def packed(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """`[batch, heads, 1, head_dim]` as `[batch, kv_heads, heads / kv_heads, head_dim]`."""
    return query.reshape(query.shape[0], kv_heads, -1, query.shape[-1])


# ---- checks --------------------------------------------------------------------------------------------------------


def check_bytes(
    name: str, stored: tuple[QuantizedStates, QuantizedStates], expected: tuple[QuantizedStates, QuantizedStates]
) -> list[dict]:
    """That every byte which a query may read is the reference's."""
    checks = []
    for side, ours, theirs in zip(("keys", "values"), stored, expected):
        spec, length = ours.spec, ours.length
        rows = length // spec.block_length if spec.is_channel else length
        columns = rows * spec.block_length if spec.is_channel else length
        parts = [("data", slice(columns)), ("scale", slice(rows)), ("zero_point", slice(rows))]
        if ours.recent is not None:
            ring = ours.recent.shape[2]
            parts.append(("recent", torch.arange(max(0, length - ring), length) % ring))
        parts.append(("sink", slice(min(length, ours.sink.shape[2] if ours.sink is not None else 0))))
        for part, index in parts:
            a, b = getattr(ours, part), getattr(theirs, part)
            if a is not None:
                equal = torch.equal(a[:, :, index], b[:, :, index])
                checks.append(_bench.is_true(name, f"appended {side}: {part} has the reference's bytes", equal))
    return checks


def reference_attention(
    query: torch.Tensor, keys: QuantizedStates, values: QuantizedStates
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference backend in float32 over the stored bytes; one KV head at a time, for it makes large copies."""

    def head(states: QuantizedStates, i: int) -> QuantizedStates:
        stored = states.stored.transformed(lambda x: x[:, i : i + 1])
        return replace(states, stored=stored, dtype=torch.float32, backend="reference")

    q_per_kv = query.shape[1] // keys.shape[1]
    parts = [
        ops.decode_attention(
            query[:, i * q_per_kv : (i + 1) * q_per_kv].float(),
            head(keys, i),
            head(values, i),
            scaling=_scaling(query),
        )
        for i in range(keys.shape[1])
    ]
    return torch.cat([output for output, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)


def check_attention(name: str, query: torch.Tensor, keys: QuantizedStates, values: QuantizedStates) -> list[dict]:
    """That the operator agrees with the reference, and the reference with SDPA over the de-quantized states."""
    output, logsumexp = ops.decode_attention(query, keys, values, scaling=_scaling(query))
    expected, expected_lse = reference_attention(query, keys, values)
    k, v = (replace(states, dtype=torch.float32).dequantize() for states in (keys, values))
    sdpa = scaled_dot_product_attention(packed(query.float(), k.shape[1]), k, v).reshape_as(expected)
    scores = packed(query.float(), k.shape[1]) @ k.transpose(-1, -2) * _scaling(query)
    lse = scores.logsumexp(-1).reshape_as(expected_lse)
    limit = max(TOLERANCE[spec.format] for spec in (keys.spec, values.spec))
    lse_error = (logsumexp - expected_lse).abs().max().nan_to_num(torch.inf).item()
    return [
        _bench.at_most(name, "attention against the reference", _bench.relative_error(output, expected), limit),
        _bench.at_most(name, "log-sum-exp against the reference", lse_error, LOGSUMEXP_TOLERANCE),
        _bench.at_most(name, "reference against SDPA", _bench.relative_error(expected, sdpa), REFERENCE_TOLERANCE),
        _bench.at_most(
            name, "reference against log-sum-exp", _bench.relative_error(expected_lse, lse), REFERENCE_TOLERANCE
        ),
    ]


def _scaling(query: torch.Tensor) -> float:
    return query.shape[-1] ** -0.5


# ---- one length ----------------------------------------------------------------------------------------------------


def baselines(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> dict[str, tuple[Callable, int]]:
    """SDPA over dense caches: the call, and the bytes of its cache."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (x.to(dtype).contiguous() for x in (query, key, value))
        name = f"sdpa-{str(dtype).removeprefix('torch.')}"

        def attend(q=q, k=k, v=v):
            return scaled_dot_product_attention(packed(q, k.shape[1]), k, v).reshape_as(q)

        found[name] = attend, k.nbytes + v.nbytes
        if dtype == torch.bfloat16 and q.shape[1] != k.shape[1]:
            gqa = lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v, enable_gqa=True)  # noqa: E731
            found[f"{name}-gqa"] = gqa, k.nbytes + v.nbytes
    return found


def bench_length(args: argparse.Namespace, length: int) -> dict[str, list[dict]]:
    """Checks, and if they all pass the rows of decode attention, of appending and of the plain read, at one length."""
    query, key, value = random_states(args, length)
    dense = baselines(query, key, value)
    exact = scaled_dot_product_attention(packed(query.float(), args.kv_heads), key.float(), value.float())
    checks = [
        _bench.at_most(
            name,
            "SDPA against float32",
            _bench.relative_error(call(), exact.reshape_as(query)),
            BASELINE_TOLERANCE[name],
        )
        for name, (call, _) in dense.items()
    ]
    room = 2 * max(_append_run(config) for config in args.configs.values())
    stored = {}
    for name, config in args.configs.items():
        stored[name] = fill(config, key, value, min(_append_run(config) + 1, length - 1), room)
        expected = fill(replace(config, backend="reference"), key, value, 1, 0)
        checks += check_bytes(name, stored[name], expected)
        del expected
        checks += check_attention(name, query, *stored[name])
    checks = [{"length": length, **check} for check in checks]
    if not all(check["passed"] for check in checks):
        return {"checks": checks}

    tasks = {name: call for name, (call, _) in dense.items()}
    nbytes = {name: n for name, (_, n) in dense.items()}
    for name, (keys, values) in stored.items():
        tasks[name] = lambda k=keys, v=values: ops.decode_attention(query, k, v, scaling=_scaling(query))
        nbytes[name] = bytes_read(keys) + bytes_read(values)
    roof = _bench.PlainRead(max(nbytes.values()))
    reads = {f"read {n}": roof.reader(n) for n in sorted(set(nbytes.values()))}
    samples = _bench.time_interleaved(tasks | reads, args.rounds, args.seconds, _before(args, roof))
    times = {name: _bench.summary(s) for name, s in samples.items()}
    decode = []
    for name in tasks:
        ms, read_ms = times[name], times[f"read {nbytes[name]}"]
        decode.append(
            {
                "length": length,
                "name": name,
                "kind": "baseline" if name in dense else "operator",
                "ms": ms,
                "faster_than_sdpa_bfloat16": times[BASELINE]["median"] / ms["median"],
                "bytes_read": nbytes[name],
                "gb_per_s": nbytes[name] / ms["median"] / 1e6,
                "plain_read_ms": read_ms,
                "plain_read_gb_per_s": nbytes[name] / read_ms["median"] / 1e6,
                "share_of_plain_read": read_ms["median"] / ms["median"],
            }
        )
    append = bench_append(args, stored, key, value, roof)
    plain_read = [{"length": length, **roof.facts()}]
    return {"checks": checks, "decode": decode, "append": append, "plain_read": plain_read}


def _before(args: argparse.Namespace, roof: _bench.PlainRead) -> Callable[[], object]:
    return (lambda: None) if args.warm else roof.flush


def _append_run(config: KVQuantConfig) -> int:
    return max(config.keys.block_length or 0, APPEND_RUN)


def bench_append(args, stored: dict, key: torch.Tensor, value: torch.Tensor, roof: _bench.PlainRead) -> list[dict]:
    """Microseconds per token when tokens come one by one; overwrites the end of what is stored."""
    faults = torch.zeros(2, dtype=torch.int64)
    first_k, first_v = key[:, :, :1].contiguous(), value[:, :, :1].contiguous()

    def concatenate():
        torch.cat([key, first_k], dim=2), torch.cat([value, first_v], dim=2)

    def append(keys, values, run):
        # From the next border of a block, so that one is completed in every run.
        start = -(-keys.length // run) * run
        for t in range(start, start + run):
            ops.quantize_append(first_k, first_v, keys, values, faults, start=t)

    tasks, tokens = {"torch.cat": concatenate}, {"torch.cat": 1}
    for name, (keys, values) in stored.items():
        tokens[name] = _append_run(args.configs[name])
        tasks[name] = lambda k=keys, v=values, run=tokens[name]: append(k, v, run)
    samples = _bench.time_interleaved(tasks, args.rounds, args.seconds, _before(args, roof))
    return [
        {"length": key.shape[2], "name": name, "us_per_token": _bench.summary(samples[name], 1e-6 * tokens[name])}
        for name in tasks
    ]


def bench_prompt(args: argparse.Namespace) -> dict[str, list[dict]]:
    """Checks, and the time to quantize a whole prompt at once, next to the causal attention of its prefill."""
    query, key, value = random_states(args, args.prompt)
    query = query.expand(-1, -1, args.prompt, -1).contiguous()
    faults = torch.zeros(2, dtype=torch.int64)
    tasks = {
        "prefill attention": lambda: scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),
        "copy of K and V": lambda: (key.clone(), value.clone()),
    }
    checks = []
    for name, config in args.configs.items():
        # Filled with other tokens, so that what is checked was written by the call that is timed.
        keys, values = fill(config, value, key, 1, 0)
        ops.quantize_append(key, value, keys, values, faults, start=0)
        expected = fill(replace(config, backend="reference"), key, value, 1, 0)
        checks += check_bytes(name, (keys, values), expected)
        tasks[name] = lambda k=keys, v=values: ops.quantize_append(key, value, k, v, faults, start=0)
    checks = [{"length": args.prompt, **check} for check in checks]
    if not all(check["passed"] for check in checks):
        return {"checks": checks}
    samples = _bench.time_interleaved(tasks, args.rounds, args.seconds, before=lambda: None)
    times = {name: _bench.summary(s) for name, s in samples.items()}
    attention = times["prefill attention"]["median"]
    prompt = [
        {"length": args.prompt, "name": name, "ms": ms, "share_of_prefill_attention": ms["median"] / attention}
        for name, ms in times.items()
    ]
    return {"checks": checks, "prompt": prompt}


# ---- the whole -----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    began = time.perf_counter()
    rows = {"checks": [], "decode": [], "append": [], "prompt": [], "plain_read": []}
    mha = argparse.Namespace(**vars(args) | {"kv_heads": args.heads})
    parts = [(args, partial(bench_length, args, length)) for length in args.lengths]
    parts += [(mha, partial(bench_length, mha, length)) for length in args.mha_lengths]
    if args.prompt:
        parts.append((args, partial(bench_prompt, args)))
    for setting, part in parts:
        with torch.inference_mode():
            for name, new in part().items():
                rows[name] += [{"kv_heads": setting.kv_heads, **row} for row in new]
        if _bench.refused(rows["checks"]):
            return 1
    result = _bench.document(
        "decode",
        argv,
        {k: v for k, v in vars(args).items() if k not in ("configs", "out", "backend_chosen", "presets")},
        backend=args.backend_chosen,
        configs={name: config.to_dict() for name, config in args.configs.items()},
        tolerance={"attention": TOLERANCE, "log-sum-exp": LOGSUMEXP_TOLERANCE, "reference": REFERENCE_TOLERANCE},
        **rows,
        seconds=time.perf_counter() - began,
    )
    show(result)
    if args.out:
        _bench.write_json(args.out, result)
    return 0


def show(result: dict) -> None:
    a = result["arguments"]
    shape = f"batch {a['batch']}, {a['heads']} heads, {a['kv_heads']} KV heads, head_dim {a['head_dim']}, {a['dtype']}"
    where = f"{result['machine']['threads']} threads, backend {result['backend']}"
    state = "caches warm" if a["warm"] else "caches flushed"
    print(f"{len(result['checks'])} checks passed; {shape}; {where}; medians, {state}")
    for roof in result["plain_read"]:
        if not roof["memory_bound"]:
            print(
                f"WARNING at {roof['length']}: the plain read is no roof, at {roof['in_cache_gb_per_s']:.1f} GB/s in "
                f"the caches and {roof['gb_per_s']:.1f} in memory (busy machine?). Do not use the shares of it."
            )
    for kv_heads, length in dict.fromkeys((row["kv_heads"], row["length"]) for row in result["decode"]):
        rows = [row for row in result["decode"] if (row["kv_heads"], row["length"]) == (kv_heads, length)]
        _bench.print_table(
            f"decode attention, one query over {length} tokens of {kv_heads} KV heads",
            ["cache", "ms", "min .. max", "x SDPA BF16", "MB read", "GB/s", "plain read GB/s", "share"],
            [
                [
                    row["name"],
                    f"{row['ms']['median']:.3f}",
                    f"{row['ms']['min']:.3f} .. {row['ms']['max']:.3f}",
                    f"{row['faster_than_sdpa_bfloat16']:.2f}",
                    f"{row['bytes_read'] / 1e6:.2f}",
                    f"{row['gb_per_s']:.1f}",
                    f"{row['plain_read_gb_per_s']:.1f}",
                    f"{row['share_of_plain_read']:.0%}",
                ]
                for row in rows
            ],
        )
    appends = [row for row in result["append"] if row["kv_heads"] == a["kv_heads"]]
    _bench.print_table(
        "appending one token, microseconds (mean over a block of tokens)",
        ["cache", *(f"at {length}" for length in a["lengths"])],
        [
            [name, *(f"{row['us_per_token']['median']:.1f}" for row in appends if row["name"] == name)]
            for name in dict.fromkeys(row["name"] for row in appends)
        ],
    )
    if result["prompt"]:
        _bench.print_table(
            f"quantizing a prompt of {a['prompt']} tokens",
            ["", "ms", "share of its prefill attention"],
            [
                [row["name"], f"{row['ms']['median']:.2f}", f"{row['share_of_prefill_attention']:.1%}"]
                for row in result["prompt"]
            ],
        )


if __name__ == "__main__":
    sys.exit(main())
