"""Time the operator alone: decode attention over a quantized cache, and writing tokens into it.

    python eval/bench_decode.py --lengths 1024,8192,16384,65536 --mha-lengths 16384 --out results.json

Candidates are every preset and every format on the plain token and channel grids. The baseline is torch's SDPA over a
contiguous BF16 or FP32 cache with the query heads of a KV head packed, as in transformers' `pack_gqa`. Another one is
SDPA with `enable_gqa=True` (slower on a CPU), which transformers calls when there is no mask.

First everything is checked (see `measure.operator`); if one check fails, nothing is timed. Then all candidates are
timed in interleaved rounds, each next to a plain read of the same number of bytes.

As if the processor had nothing newer than AVX2 (the result's `machine.torch` has these limits), which the README shows
in tables of their own:

    KVQUANT_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
        python eval/bench_decode.py --presets int8,int8-plain,fp8,int4,int4-small --prompt 0 --threads 2 \\
        --rounds 31 --seconds 30 --out eval/results/bench_decode_avx2.json
    python eval/bench_decode.py --readme
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_kvquant import KVQuantConfig
from hf_kvquant.measure import operator
from hf_kvquant.measure.benchmark import DTYPES, Benchmark, add_attention, choose, integers, new_parser, summary_line
from hf_kvquant.measure.caches import grids
from hf_kvquant.measure.checks import all_passed, at_most, relative_error
from hf_kvquant.measure.clock import PlainRead, summary, time_interleaved
from hf_kvquant.measure.facts import read_json
from hf_kvquant.measure.tables import markdown, print_table, put_between

BASELINE_TOLERANCE = {"sdpa-bfloat16": 0.01, "sdpa-bfloat16-gqa": 0.01, "sdpa-float32": 1e-5}
BASELINE = "sdpa-bfloat16"
FOLDER = Path(__file__).resolve().parent / "results"
# With AVX2 only, on an Intel and on an AMD processor.
RESULTS = [FOLDER / f"bench_decode_avx2{name}.json" for name in ("", "_zen4", "_zen4_1thread")]
README = FOLDER / "README.md"
BEGIN, END = "<!-- avx2: written by eval/bench_decode.py -->", "<!-- avx2: end -->"
# The number of tokens appended one by one in a sample, so that it completes a block of keys.
APPEND_RUN = 64


def parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_attention(parser)
    parser.add_argument("--lengths", type=integers, default="1024,8192,16384,65536",
                        help="cached tokens, the newest included")  # fmt: skip
    parser.add_argument("--mha-lengths", type=integers, default="", help="the same with as many KV heads as heads")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--prompt", type=int, default=2048, help="tokens of a prompt that is quantized at once; 0: skip"
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=60, help="stop a group of timings after so long")
    parser.add_argument("--warm", action="store_true", help="no flush before a call: at short length, its overhead")
    parser.add_argument("--readme", action="store_true", help="only write AVX2's tables in eval/results/README.md")
    args = parser.parse_args(argv)
    if min(args.lengths + args.mha_lengths, default=0) < 2:
        parser.error("--lengths: every length must be at least 2")
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}")
    choose(parser, args, grids())
    return args


def inputs(args: argparse.Namespace, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A query `[batch, heads, 1, head_dim]`, and K and V of `length` tokens."""
    dtype = DTYPES[args.dtype]
    key, value = operator.random_states(args.batch, args.kv_heads, length, args.head_dim, dtype, seed=length)
    return operator.random_query(args.batch, args.heads, 1, args.head_dim, dtype, seed=length + 1), key, value


def baselines(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> dict[str, tuple[Callable, int]]:
    """SDPA over dense caches: the call, and the bytes of its cache."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        states = [x.to(dtype).contiguous() for x in (query, key, value)]
        name, nbytes = f"sdpa-{str(dtype).removeprefix('torch.')}", states[1].nbytes + states[2].nbytes
        found[name] = operator.sdpa_call(*states), nbytes
        if dtype == torch.bfloat16 and query.shape[1] != key.shape[1]:
            found[f"{name}-gqa"] = partial(scaled_dot_product_attention, *states, enable_gqa=True), nbytes
    return found


def bench_length(args: argparse.Namespace, length: int) -> dict[str, list[dict]]:
    """Checks, and if they all pass the rows of decode attention, of appending and of the plain read, at one length."""
    query, key, value = inputs(args, length)
    dense = baselines(query, key, value)
    exact = operator.sdpa(query.float(), key.float(), value.float())
    checks = [
        at_most(
            name, "SDPA against float32", relative_error(call().reshape_as(exact), exact), BASELINE_TOLERANCE[name]
        )
        for name, (call, _) in dense.items()
    ]
    room = 2 * max(_append_run(config) for config in args.configs.values())
    stored = {}
    for name, config in args.configs.items():
        stored[name] = operator.fill(config, key, value, min(_append_run(config) + 1, length - 1), room)
        checks += operator.check_bytes(name, stored[name], operator.reference_fill(config, key, value))
        checks += operator.check_attention(name, query, *stored[name])
    checks = [{"length": length, **check} for check in checks]
    if not all_passed(checks):
        return {"checks": checks}

    tasks = {name: call for name, (call, _) in dense.items()}
    nbytes = {name: n for name, (_, n) in dense.items()}
    for name, states in stored.items():
        tasks[name] = operator.attention_call(query, *states)
        nbytes[name] = sum(map(operator.bytes_read, states))
    roof = PlainRead(max(nbytes.values()))
    reads = {f"read {n}": roof.reader(n) for n in sorted(set(nbytes.values()))}
    samples = time_interleaved(tasks | reads, args.rounds, args.seconds, _before(args, roof))
    times = {name: summary(s) for name, s in samples.items()}
    decode = []
    for name in tasks:
        ms, read_ms = times[name], times[f"read {nbytes[name]}"]
        decode.append({
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
        })  # fmt: skip
    append = bench_append(args, stored, key, value, roof)
    plain_read = [{"length": length, **roof.facts()}]
    return {"checks": checks, "decode": decode, "append": append, "plain_read": plain_read}


def _before(args: argparse.Namespace, roof: PlainRead) -> Callable[[], object]:
    return (lambda: None) if args.warm else roof.flush


def _append_run(config: KVQuantConfig) -> int:
    return max(config.keys.block_length or 0, APPEND_RUN)


def bench_append(args, stored: dict, key: torch.Tensor, value: torch.Tensor, roof: PlainRead) -> list[dict]:
    """Microseconds per token when tokens come one by one; overwrites the end of what is stored."""
    first = key[:, :, :1].contiguous(), value[:, :, :1].contiguous()

    def concatenate():
        torch.cat([key, first[0]], dim=2), torch.cat([value, first[1]], dim=2)

    tasks, tokens = {"torch.cat": concatenate}, {"torch.cat": 1}
    for name, states in stored.items():
        run = tokens[name] = _append_run(args.configs[name])
        # Begin at the next border of a block, so that every run completes one.
        tasks[name] = operator.append([first] * run, states, -(-states[0].length // run) * run)
    samples = time_interleaved(tasks, args.rounds, args.seconds, _before(args, roof))
    return [
        {"length": key.shape[2], "name": name, "us_per_token": summary(samples[name], 1e-6 * tokens[name])}
        for name in tasks
    ]


def bench_prompt(args: argparse.Namespace) -> dict[str, list[dict]]:
    """Checks, and the time to quantize a whole prompt at once, next to the causal attention of its prefill."""
    query, key, value = inputs(args, args.prompt)
    query = query.expand(-1, -1, args.prompt, -1).contiguous()
    tasks = {
        "prefill attention": lambda: scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),
        "copy of K and V": lambda: (key.clone(), value.clone()),
    }
    checks = []
    for name, config in args.configs.items():
        # Filled with other tokens, so that the checked bytes were written by the timed call.
        states = operator.fill(config, value, key)
        tasks[name] = operator.append([(key, value)], states, 0)
        tasks[name]()
        checks += operator.check_bytes(name, states, operator.reference_fill(config, key, value))
    checks = [{"length": args.prompt, **check} for check in checks]
    if not all_passed(checks):
        return {"checks": checks}
    times = {name: summary(s) for name, s in time_interleaved(tasks, args.rounds, args.seconds).items()}
    attention = times["prefill attention"]["median"]
    prompt = [
        {"length": args.prompt, "name": name, "ms": ms, "share_of_prefill_attention": ms["median"] / attention}
        for name, ms in times.items()
    ]
    return {"checks": checks, "prompt": prompt}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.readme:
        README.write_text(with_tables(README.read_text(encoding="utf-8"), map(read_json, RESULTS)), encoding="utf-8")
        return 0
    benchmark = Benchmark("decode", argv, args, ("decode", "append", "prompt", "plain_read"))
    mha = argparse.Namespace(**vars(args) | {"kv_heads": args.heads})
    parts = [(args, partial(bench_length, args, length)) for length in args.lengths]
    parts += [(mha, partial(bench_length, mha, length)) for length in args.mha_lengths]
    if args.prompt:
        parts.append((args, partial(bench_prompt, args)))
    for setting, part in parts:
        with torch.inference_mode():
            rows = part()
        if not benchmark.add(rows, kv_heads=setting.kv_heads):
            return 1
    tolerance = {
        "attention": operator.TOLERANCE,
        "log-sum-exp": operator.LOGSUMEXP_TOLERANCE,
        "reference": operator.REFERENCE_TOLERANCE,
    }
    return benchmark.finish(show, tolerance=tolerance)


def with_tables(readme: str, results: Iterable[dict]) -> str:
    """`readme` with a table of each result between its two markers: times as fast as SDPA, and shares of a plain read.

    Raises:
        ValueError: the markers are missing.
    """
    return put_between(readme, BEGIN, END, "".join(map(table, results)))


def table(result: dict) -> str:
    found = {(row["length"], row["name"]): row for row in result["decode"]}
    names = list(result["configs"])
    lines = []
    for length in result["arguments"]["lengths"]:
        cells = (found[length, name] for name in names)
        shares = [f"{row['faster_than_sdpa_bfloat16']:.1f} ({row['share_of_plain_read']:.0%})" for row in cells]
        lines.append([f"{length:,}", f"{found[length, BASELINE]['ms']['median']:.2f}", *shares])
    machine = result["machine"]
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    where = f"{machine['cpu']}, {threads}, instruction set `{result['instruction_set']}`"
    if "torch" in machine:
        where += f", torch's `{machine['torch'].partition(' ')[0]}`"
    return f"\n{where}:\n\n{markdown(['cached tokens', 'SDPA ms', *names], lines)}\n"


def show(result: dict) -> None:
    a = result["arguments"]
    print(f"{summary_line(result)}; medians, caches {'warm' if a['warm'] else 'flushed'}")
    for roof in result["plain_read"]:
        if not roof["memory_bound"]:
            print(
                f"WARNING at {roof['length']}: the plain read is no roof, at {roof['in_cache_gb_per_s']:.1f} GB/s in "
                f"the caches and {roof['gb_per_s']:.1f} in memory (busy machine?). Do not use the shares of it."
            )
    for kv_heads, length in dict.fromkeys((row["kv_heads"], row["length"]) for row in result["decode"]):
        rows = [row for row in result["decode"] if (row["kv_heads"], row["length"]) == (kv_heads, length)]
        print_table(
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
    print_table(
        "appending one token, microseconds (mean over a block of tokens)",
        ["cache", *(f"at {length}" for length in a["lengths"])],
        [
            [name, *(f"{row['us_per_token']['median']:.1f}" for row in appends if row["name"] == name)]
            for name in dict.fromkeys(row["name"] for row in appends)
        ],
    )
    if result["prompt"]:
        print_table(
            f"quantizing a prompt of {a['prompt']} tokens",
            ["", "ms", "share of its prefill attention"],
            [
                [row["name"], f"{row['ms']['median']:.2f}", f"{row['share_of_prefill_attention']:.1%}"]
                for row in result["prompt"]
            ],
        )


if __name__ == "__main__":
    sys.exit(main())
