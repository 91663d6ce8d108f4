"""Time a whole decode step through a model, with every KV cache that a user of transformers could choose.

    python eval/bench_generate.py --lengths 128,1024,8192 --new 16 --out results.json
    python eval/bench_generate.py --compile --lengths 128,1024,8192,32768 --presets int8,int4 --out results.json

The model is a Llama of the given shape with random weights (see `measure.step`). A step is one forward pass for one
token and the argmax of its logits. Candidates, all in one run (`measure.caches`):

    dense, dense-static   transformers' DynamicCache (the baseline, in --dtype and in float32) and StaticCache
    quanto-int4, ..       transformers' QuantizedCache with each of its backends
    int8, int4, ..        ours, every preset

With `--compile` transformers' quantized caches are left out, our caches are the growing and the static one, and steps
of static caches are also compiled (torch.compile, fullgraph, by inductor).

Every cache is given the same random K and V in one update, as a prefill would. Then everything is checked: our caches
against the de-quantized route through the model's own attention, in float32 and in --dtype; every cache against
float32 DynamicCache (loosely, because caches are lossy); that this comparison would notice a wrong cache; and that
`memory_report()` counts the tensors that exist. If one check fails, nothing is timed. Then all caches take steps in
turn, A B C A B C .., so each finds its data in memory, not in the processor's caches. With `--in-a-row` a turn has
several steps, as in generation, where a short step is bound by code that the step before has just run.

Process memory is measured before that, in a process of its own for every cache. A candidate that cannot run is listed
with the reason.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import replace

import torch
from transformers import Cache

from hf_kvquant.measure import step
from hf_kvquant.measure.benchmark import (
    DTYPES,
    Benchmark,
    add_model,
    choose,
    chosen_presets,
    integers,
    new_parser,
    shape_of,
    summary_line,
)
from hf_kvquant.measure.caches import DENSE, Candidate, Preset, dense_caches, peers
from hf_kvquant.measure.checks import all_passed, at_most, is_true, relative_error
from hf_kvquant.measure.clock import summary
from hf_kvquant.measure.process_memory import measure_memory, reason
from hf_kvquant.measure.tables import print_table
from hf_kvquant.measure.weighing import tensor_bytes

CHECK_STEPS = 2
# A cache with wrong keys has at least this error: measured ones are 1.1 to 1.4.
CONTROL = 0.8
# Limits for our caches against the same bytes through de-quantized states and the model's own attention. In float32
# the limit is tight: only a code of a new token may round the other way (measured at most 3e-4). In --dtype it is a
# multiple of the error that rounding gives DynamicCache itself in the same run (measured at most 1.5 times).
SAME_BYTES = 1e-3
SAME_BYTES_ROUNDING = 3.0


def candidates(args: argparse.Namespace) -> list[Candidate]:
    found = dense_caches(DTYPES[args.dtype])
    if not args.compile:
        # Two bits are too coarse for the check of the logits.
        found += [peer for peer in peers() if peer.bits >= 4]
    for preset in chosen_presets(args):
        found.append(preset)
        if args.compile:
            found.append(Preset(f"{preset.name}-static", replace(preset.config, static=True)))
    if args.compile:
        found += [candidate.running("compiled") for candidate in found if candidate.name.endswith("-static")]
    return found


def bench_length(args: argparse.Namespace, length: int) -> dict[str, list[dict]]:
    """Checks, and if they all pass the rows of the table, at one length."""
    everyone, shape, room = candidates(args), shape_of(args), args.new + CHECK_STEPS
    plain = [c for c in everyone if c.steps == "plain"]
    memory = measure_memory(shape, plain, length, room) if args.memory else {}
    # Start without graphs, so that every static cache has one, and none from another length.
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = len(everyone) + 1
    models = {dtype: step.build_model(shape, length + room, dtype) for dtype in {torch.float32, shape.dtype}}
    config = models[shape.dtype].config

    def first_logits(candidate: Candidate, cache: Cache, dtype: torch.dtype | None = None) -> torch.Tensor:
        model = models[dtype or candidate.dtype or shape.dtype]
        forward = model.compiled_forward if candidate.steps == "compiled" else model
        return step.first_logits(model, cache, shape, CHECK_STEPS, forward)

    def filled(candidate: Candidate, **options) -> Cache:
        return step.filled(candidate, config, shape, length, room, **options)

    def route_error(candidate: Candidate, dtype: torch.dtype) -> float:
        fused, twin = (filled(candidate, dtype=dtype) for _ in range(2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin.disable_fused("the benchmark compares both routes")
        return relative_error(*(first_logits(candidate, cache, dtype) for cache in (fused, twin)))

    dense = next(c for c in everyone if c.dtype == torch.float32)
    exact = first_logits(dense, filled(dense))
    wrong = relative_error(first_logits(dense, filled(dense, roll=1)), exact)
    checks = [at_most("control", "a cache with wrong keys is far from dense", -wrong, -CONTROL)]
    skipped, caches = [], {}
    for candidate in everyone:
        name = candidate.name
        try:
            cache = filled(candidate)
            nbytes = tensor_bytes(cache)
            logits = first_logits(candidate, cache)
        except Exception as error:
            if candidate.kind != "peer":
                raise
            skipped.append({"length": length, "name": name, "reason": reason(error)})
            continue
        error = relative_error(logits, exact)
        limit = step.NEAR_DENSE[candidate.bits] * wrong
        checks.append(is_true(name, "logits are finite", logits.isfinite().all()))
        checks.append(at_most(name, "logits near float32 DynamicCache", error, limit))
        if name == DENSE:
            rounding = error
        if candidate.kind == "preset":
            counted = cache.memory_report()["total"] == tensor_bytes(cache)
            checks.append(is_true(name, "memory_report counts every tensor", counted))
            limits = {shape.dtype: max(SAME_BYTES_ROUNDING * rounding, SAME_BYTES), torch.float32: SAME_BYTES}
            for dtype, limit in limits.items() if candidate.steps == "plain" else ():
                what = f"fused against the de-quantized route, {str(dtype).removeprefix('torch.')}"
                checks.append(at_most(name, what, route_error(candidate, dtype), limit))
        caches[name] = (candidate, cache, nbytes)
    if all_passed(checks):
        graphs = torch._dynamo.utils.counters["stats"]
        before = graphs["unique_graphs"]
        samples = time_steps(args, models, caches)
        again = graphs["unique_graphs"] - before
        checks.append(at_most("compiled", "graphs that were compiled while steps were timed", again, 0))
        for name, (candidate, cache, _) in caches.items():
            if candidate.kind == "preset":
                fused = step.all_fused(cache, args.new + CHECK_STEPS)
                checks.append(is_true(name, "every step took the fused route", fused))
    checks = [{"length": length, **check} for check in checks]
    if not all_passed(checks):
        return {"checks": checks}

    times = {name: summary(s) for name, s in samples.items()}
    rows = []
    for name, (candidate, cache, nbytes) in caches.items():
        row = {
            "length": length,
            "name": name,
            "kind": candidate.kind,
            "dtype": str(candidate.dtype or shape.dtype).removeprefix("torch."),
            "ms": times[name],
            "faster_than_dense": times[DENSE]["median"] / times[name]["median"],
            "cache_bytes": nbytes,
            "share_of_dense_bytes": nbytes / caches[DENSE][2],
            "process_memory": memory.get(name, {"reason": "not asked for"}),
        }
        if candidate.kind == "preset":
            row["memory_report"] = cache.memory_report()
        rows.append(row)
    return {"checks": checks, "steps": rows, "skipped": skipped}


def time_steps(args: argparse.Namespace, models: dict, caches: dict) -> dict[str, list[float]]:
    """Seconds of `args.new` steps of every cache, which take turns."""
    runs = {}
    for name, (candidate, cache, _) in caches.items():
        model = models[candidate.dtype or DTYPES[args.dtype]]
        forward = model.compiled_forward if candidate.steps == "compiled" else model
        runs[name] = (model, forward, cache)
    fed = step.tokens(shape_of(args), CHECK_STEPS + args.new)[CHECK_STEPS:]
    return step.time_steps(runs, fed, args.in_a_row)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_model(parser)
    parser.add_argument("--lengths", "--length", type=integers, default="8192", help="cached tokens, comma separated")
    parser.add_argument("--new", type=int, default=16, help="steps that are timed, for every cache")
    parser.add_argument("--in-a-row", type=int, default=1, help="steps of a turn; of several, the first is not timed")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="static caches, in plain and in compiled steps")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure process memory")
    args = parser.parse_args(argv)
    if not 1 <= args.in_a_row <= args.new or args.new % args.in_a_row:
        parser.error(f"--in-a-row {args.in_a_row}: expected a divisor of --new {args.new}")
    choose(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    benchmark = Benchmark("generate", argv, args, ("steps", "skipped"))
    for length in args.lengths:
        if not benchmark.add(bench_length(args, length)):
            return 1
    same_bytes = {"float32": SAME_BYTES, "times rounding": SAME_BYTES_ROUNDING}
    tolerance = {"near dense, by bits": step.NEAR_DENSE, "control": CONTROL, "same bytes": same_bytes}
    return benchmark.finish(show, tolerance=tolerance)


def show(result: dict) -> None:
    a = result["arguments"]
    print(f"{summary_line(result)}; Llama with random weights; medians")
    for length in a["lengths"]:
        print_table(
            f"one decode step at {length} cached tokens",
            ["cache", "ms", "min .. max", "x dense", "cache MB", "of dense", "process MB", "peak of a step MB"],
            [
                [
                    row["name"],
                    f"{row['ms']['median']:.2f}",
                    f"{row['ms']['min']:.2f} .. {row['ms']['max']:.2f}",
                    f"{row['faster_than_dense']:.2f}",
                    f"{row['cache_bytes'] / 1e6:.2f}",
                    f"{row['share_of_dense_bytes']:.1%}",
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
