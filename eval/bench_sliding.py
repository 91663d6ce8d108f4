"""Time attention in a layer with a sliding window, and weigh whole caches of models that have such layers.

    python eval/bench_sliding.py --threads 2 --out results.json

A step is the update with one token and the attention function, as a model calls them, in a layer of Mistral's shape
after `--length` tokens. Candidates are transformers' dense caches, whose sliding layer copies its window in each step,
and presets. A quantized layer moves its columns once in 64 tokens, so figures are means over a multiple of 64 steps.
Every step begins with flushed caches.

First everything is checked: our output against dense attention over the de-quantized window, and loosely against that
of the dense cache; that a window of one token more would be noticed; and that `memory_report()` counts every tensor.
If one check fails, nothing is timed.

Whole caches are weighed for the shapes of public models (`measure.sliding`), with sliding layers quantized and dense.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from hf_kvquant import QuantizedCache
from hf_kvquant.measure.benchmark import (
    DTYPES,
    Benchmark,
    add_attention,
    choose,
    chosen_presets,
    integers,
    new_parser,
    shape_of,
    summary_line,
)
from hf_kvquant.measure.caches import DENSE, Candidate, Dense, Preset
from hf_kvquant.measure.checks import all_passed, at_most, is_true, relative_error
from hf_kvquant.measure.clock import WARM_UP_ROUNDS, PlainRead, summary, time_interleaved
from hf_kvquant.measure.facts import read_json
from hf_kvquant.measure.sliding import MODELS, SlidingLayer, weigh_model
from hf_kvquant.measure.tables import markdown, print_table, put_between
from hf_kvquant.measure.weighing import tensor_bytes

# The largest relative error of an output: against dense attention over the same de-quantized window in float32, and
# against the dense cache by bits of a code.
SAME_BYTES = 1e-3
NEAR_DENSE = {4: 0.5, 8: 0.2, 16: 0.05}
RESULT = Path(__file__).parent / "results" / "bench_sliding.json"
README = RESULT.parent / "README.md"
BEGIN, END = "<!-- sliding: written by eval/bench_sliding.py -->", "<!-- sliding: end -->"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_attention(parser)
    parser.set_defaults(presets="int8,int4,fp8")
    parser.add_argument("--window", type=int, default=4096, help="of the layer that is timed")
    parser.add_argument("--length", type=int, default=16384, help="tokens before the first step")
    parser.add_argument("--rounds", type=int, default=192, help="steps that are timed, for every cache")
    parser.add_argument("--seconds", type=float, default=120, help="stop the timings after so long")
    parser.add_argument("--weigh", type=integers, default="8192,32768", help="tokens in the caches that are weighed")
    parser.add_argument("--models", default=",".join(MODELS), help="whose caches are weighed; default: all")
    parser.add_argument("--readme", action="store_true", help="only write the tables of eval/results/README.md")
    args = parser.parse_args(argv)
    args.layers = args.batch = args.hidden = 1
    args.models = [name for name in args.models.split(",") if name]
    if unknown := [name for name in args.models if name not in MODELS]:
        parser.error(f"--models: {unknown[0]!r} is unknown; expected some of {','.join(MODELS)}")
    if args.window < 2 or args.length < args.window:
        parser.error(f"--window {args.window}: expected 2 to --length {args.length}")
    choose(parser, args)
    return args


def layer(candidate: Candidate, args: argparse.Namespace, **other) -> SlidingLayer:
    """The candidate's layer; `other` are fields of its shape that differ."""
    window, room = args.window + other.pop("wider", 0), args.rounds + WARM_UP_ROUNDS + 1
    return SlidingLayer(candidate, replace(shape_of(args), **other), window, args.length, room)


def route_error(candidate: Candidate, args: argparse.Namespace) -> float:
    """The difference of the operator's output to that of attention over the de-quantized window."""
    fused, twin = (layer(candidate, args, dtype=torch.float32) for _ in range(2))
    twin.read_dequantized()
    return relative_error(*(each.step(each.mask()) for each in (fused, twin)))


def bench_step(args: argparse.Namespace) -> dict[str, list[dict]]:
    """Checks, and if they all pass the rows of a step."""
    dense, wider = (layer(Dense(), args, dtype=torch.float32, wider=extra) for extra in (0, 1))
    expected = dense.step(dense.mask())
    noticed = relative_error(wider.step(wider.mask()), expected)
    checks = [at_most("control", "a window that is a token wider is noticed", -noticed, -3 * SAME_BYTES)]
    layers, tasks = {}, {}
    # Windows narrower than those that the presets take, too.
    ours = [Preset(p.name, replace(p.config, sliding=min(512, args.window))) for p in chosen_presets(args)]
    for candidate in (Dense(), Dense("dense-static", static=True), *ours):
        name = candidate.name
        found = layers[name] = layer(candidate, args)
        error = relative_error(found.step(found.mask()), expected)
        checks.append(at_most(name, "output near that of the float32 cache", error, NEAR_DENSE[candidate.bits]))
        if isinstance(candidate, Preset):
            counted = found.cache.memory_report()["total"] == tensor_bytes(found.cache)
            checks.append(is_true(name, "memory_report counts every tensor", counted))
            what = "fused against attention over the de-quantized window"
            checks.append(at_most(name, what, route_error(candidate, args), SAME_BYTES))
        tasks[name] = partial(found.step, found.mask())
    if not all_passed(checks):
        return {"checks": checks}
    nbytes = {name: tensor_bytes(found.cache) for name, found in layers.items()}
    samples = time_interleaved(tasks, args.rounds, args.seconds, PlainRead(max(nbytes.values())).flush)
    mean = {name: 1e3 * statistics.mean(times) for name, times in samples.items()}
    rows = []
    for name, found in layers.items():
        row = {
            "name": name,
            "ms": summary(samples[name]),
            "mean_ms": mean[name],
            "faster_than_dense": mean[DENSE] / mean[name],
            "cache_bytes": nbytes[name],
            "share_of_dense_bytes": nbytes[name] / nbytes[DENSE],
        }
        if isinstance(found.cache, QuantizedCache):
            row["memory_report"] = found.cache.memory_report()
            steps = found.cache.routes["decode_fused"]
            all_fused = steps == 1 + WARM_UP_ROUNDS + len(samples[name])
            checks.append(is_true(name, "every step took the fused route", all_fused))
        rows.append(row)
    return {"checks": checks, "steps": rows} if all_passed(checks) else {"checks": checks}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.readme:
        README.write_text(with_tables(README.read_text(encoding="utf-8"), read_json(RESULT)), encoding="utf-8")
        return 0
    benchmark = Benchmark("sliding", argv, args, ("steps", "bytes"))
    with torch.inference_mode():
        if not benchmark.add(bench_step(args)):
            return 1
        for name in args.models:
            for length in args.weigh:
                rows = weigh_model(name, chosen_presets(args), length, DTYPES[args.dtype])
                benchmark.add({"bytes": rows})
    return benchmark.finish(show, tolerance={"same bytes": SAME_BYTES, "near dense, by bits": NEAR_DENSE})


def step_table(result: dict) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of steps."""
    head = ["cache", "ms (mean)", "median", "min .. max", "x dense", "of dense bytes"]
    return head, [
        [
            row["name"],
            f"{row['mean_ms']:.2f}",
            f"{row['ms']['median']:.2f}",
            f"{row['ms']['min']:.2f} .. {row['ms']['max']:.2f}",
            f"{row['faster_than_dense']:.2f}",
            f"{row['share_of_dense_bytes']:.3f}",
        ]
        for row in result["steps"]
    ]


def bytes_table(result: dict) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of whole caches: megabytes of the dense one, and shares of it."""
    names = list(dict.fromkeys(row["name"] for row in result["bytes"]))
    found = {(row["model"], row["length"], row["name"]): row for row in result["bytes"]}

    def cell(row: dict) -> str:
        if "reason" in row:
            return "refused"
        return f"{row['cache_bytes'] / 1e6:.0f} MB" if row["name"] == DENSE else f"{row['share_of_dense_bytes']:.3f}"

    rows = [
        [model, f"{length:,}", *(cell(found[model, length, name]) for name in names)]
        for model, length in dict.fromkeys((row["model"], row["length"]) for row in result["bytes"])
    ]
    return ["model", "tokens", *names], rows


def show(result: dict) -> None:
    a = result["arguments"]
    print(summary_line(result))
    print_table(f"a step of attention, window {a['window']}, after {a['length']} tokens", *step_table(result))
    if result["bytes"]:
        print_table("whole caches, as shares of the dense one", *bytes_table(result))


def with_tables(readme: str, result: dict) -> str:
    """`readme` with both tables between its two markers.

    Raises:
        ValueError: the markers are missing.
    """
    tables = (markdown(*table(result)) for table in (step_table, bytes_table))
    return put_between(readme, BEGIN, END, "\n" + "\n\n".join(tables) + "\n")


if __name__ == "__main__":
    sys.exit(main())
