"""Measures the operator's error against float64 attention over the same de-quantized cache, beside SDPA's own error.

    python eval/bench_error.py --out results.json

A sample is a query and a cache: plain keys or keys with outlier and biased channels and values with outlier tokens,
short and long, head_dim 64 and 128, with scores whose standard deviation is from 0.1 (a flat softmax) to 10 (a peaky
one). Its error is |output - exact| / |exact| in Euclidean norms. A figure is the root mean square over samples; the
largest sample has to stay within the limit of its format, or nothing is saved. The error of quantization itself is not
included; `hf-kvquant eval` measures that.

The baseline is torch's SDPA in each dtype over the dense cache of that dtype, against float64 over the same elements:
without a quantized cache a user would have BF16 attention.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from hf_kvquant import KVQuantConfig
from hf_kvquant.measure import operator
from hf_kvquant.measure.benchmark import DTYPES, Benchmark, integers, new_parser, take_threads
from hf_kvquant.measure.checks import at_most, relative_error
from hf_kvquant.measure.tables import markdown

HEADS, KV_HEADS = 8, 2
SPREADS = (0.1, 1.0, 3.0, 10.0)
BASELINE = "SDPA, dense cache"
# The largest error of a sample by the format of keys or values, whichever is larger. Rounding the output to FP16 and
# BF16 alone gives 0.0002 and 0.0017.
LIMIT = {
    "float32": {"int8": 1e-5, "fp8": 1e-5, "int4": 1e-5, "int3": 1e-5, "int2": 4e-5},
    "float16": {"int8": 0.002, "fp8": 0.002, "int4": 0.002, "int3": 0.002, "int2": 0.002},
    "bfloat16": {"int8": 0.003, "fp8": 0.003, "int4": 0.006, "int3": 0.006, "int2": 0.006},
}


def parse(argv: list[str]) -> argparse.Namespace:
    runs = operator.cpu_levels()
    parser = new_parser(__doc__)
    parser.add_argument("--levels", default=f"{runs[0]},{runs[-1]}", help="of machine instructions; these run here: "
                        + ",".join(runs))  # fmt: skip
    parser.add_argument("--lengths", type=integers, default="129,1001,4097", help="cached tokens")
    parser.add_argument("--head-dims", type=integers, default="64,128")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    args.levels = args.levels.split(",")
    if unknown := [level for level in args.levels if level not in runs]:
        parser.error(f"--levels: {unknown[0]!r} does not run here; expected some of {','.join(runs)}")
    take_threads(args)
    args.heads, args.kv_heads, args.backend_chosen = HEADS, KV_HEADS, "cpu"
    args.configs = {name: replace(KVQuantConfig.preset(name), backend="cpu") for name in KVQuantConfig.preset_names()}
    return args


def samples(args: argparse.Namespace) -> Iterator[tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Spread of the scores, query `[1, HEADS, 1, head_dim]`, keys and values `[1, KV_HEADS, length, head_dim]`."""
    kinds = itertools.product(range(args.seeds), args.lengths, args.head_dims, (False, True))
    for i, (_, length, head_dim, outliers) in enumerate(kinds):
        generator = torch.Generator().manual_seed(i)
        key, value = (torch.randn(1, KV_HEADS, length, head_dim, generator=generator) for _ in range(2))
        if outliers:
            channels = torch.rand(2, KV_HEADS, 1, head_dim, generator=generator)
            key = key * torch.where(channels[:1] < 1 / 16, 10, 1)
            key += torch.where(channels[1:] < 1 / 8, 5, 0) * torch.randn(1, KV_HEADS, 1, head_dim, generator=generator)
            value *= torch.where(torch.rand(1, KV_HEADS, length, 1, generator=generator) < 1 / 50, 5, 1)
        query = torch.randn(1, HEADS, 1, head_dim, generator=generator)
        spread = scores(query, key).std(-1).reshape(1, HEADS, 1, 1)
        for wanted in SPREADS:
            yield wanted, query * wanted / spread, key, value


def scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """`[1, KV_HEADS, HEADS / KV_HEADS, length]`."""
    return operator.packed(query, KV_HEADS) @ key.transpose(-1, -2) * query.shape[-1] ** -0.5


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention in float64."""
    return (scores(query.double(), key.double()).softmax(-1) @ value.double()).reshape(query.shape)


def errors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, configs: dict[str, KVQuantConfig], levels: list[str]
) -> Iterator[tuple[str, str | None, float]]:
    """Name, instruction set and error of the baseline, and of every cache with every instruction set."""
    yield BASELINE, None, relative_error(operator.sdpa(query, key, value), exact(query, key, value))
    for name, config in configs.items():
        states = operator.fill(config, key, value)
        expected = exact(query, *map(operator.dequantized, states))
        for level in levels:
            yield name, level, relative_error(operator.attention_on(level, query, *states), expected)


def measure(args: argparse.Namespace, configs: dict[str, KVQuantConfig]) -> dict[tuple, list[tuple[float, float]]]:
    """Spread and error of every sample, by (name, dtype, instruction set)."""
    found: dict[tuple, list[tuple[float, float]]] = {}
    for spread, *sample in samples(args):
        for dtype in DTYPES:
            states = (x.to(DTYPES[dtype]).contiguous() for x in sample)
            for name, level, error in errors(*states, configs, args.levels):
                found.setdefault((name, dtype, level), []).append((spread, error))
    return found


def rms(numbers: list[float]) -> float:
    return math.sqrt(math.fsum(x * x for x in numbers) / len(numbers))


def row(name: str, dtype: str, level: str | None, found: list[tuple[float, float]]) -> dict:
    return {
        "name": name,
        "dtype": dtype,
        "level": level,
        "rms": rms([error for _, error in found]),
        "largest": max(error for _, error in found),
        "rms_by_spread": {str(s): rms([error for spread, error in found if spread == s]) for s in SPREADS},
        "samples": len(found),
    }


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    benchmark = Benchmark("error", argv, args, ("rows",))
    with torch.inference_mode():
        rows = [row(*key, found) for key, found in measure(args, args.configs).items()]
    checks = []
    for r in rows:
        if config := args.configs.get(r["name"]):
            r["limit"] = max(LIMIT[r["dtype"]][side.format] for side in (config.keys, config.values))
            what = f"largest error with {r['dtype']} queries, {r['level']}"
            checks.append(at_most(r["name"], what, r["largest"], r["limit"]))
    if not benchmark.add({"rows": rows, "checks": checks}):
        return 1
    return benchmark.finish(show, tolerance=LIMIT)


def show(result: dict) -> None:
    """Print the tables as Markdown."""
    levels = result["arguments"]["levels"]
    found = {(r["name"], r["dtype"], r["level"]): r for r in result["rows"]}
    count = result["rows"][0]["samples"]
    print(f"{len(result['checks'])} checks passed; {count} samples; backend {result['backend']}\n")
    head = ["cache", "queries", *levels, "largest", "limit"]
    lines = []
    for dtype in DTYPES:
        baseline = found[BASELINE, dtype, None]
        cells = [f"{baseline['rms']:#.2g}", *[""] * (len(levels) - 1), f"{baseline['largest']:#.2g}", ""]
        lines.append([BASELINE, dtype, *cells])
        for name in result["configs"]:
            ours = [found[name, dtype, level] for level in levels]
            cells = [f"{r['rms']:#.2g}" for r in ours]
            cells += [f"{max(r['largest'] for r in ours):#.2g}", f"{ours[0]['limit']:g}"]
            lines.append([name, dtype, *cells])
    print(markdown(head, lines))
    print("\nBF16 queries by the spread of the scores:\n")
    lines = [
        [", ".join(filter(None, (r["name"], r["level"]))), *(f"{x:#.2g}" for x in r["rms_by_spread"].values())]
        for r in result["rows"]
        if r["dtype"] == "bfloat16"
    ]
    print(markdown(["cache, level", *SPREADS], lines))


if __name__ == "__main__":
    sys.exit(main())
