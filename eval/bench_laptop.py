"""Time decode steps of a whole model of about a billion parameters, and say which part is weights and which is cache.

    python eval/bench_laptop.py --threads 2 --out results.json

The model is a Llama of the shape of Llama 3.2 1B, with random weights and a smaller vocabulary. Its weights are as
they are (BF16), or quantized as transformers loads them on a CPU (`measure.weights`). A step is one forward pass for
one token and the argmax of its logits. Caches: transformers' DynamicCache and StaticCache, and ours. A step that has
one token in the cache reads little but weights; the rest of a later step is the cache's part.

Every cache is given the same random K and V in one update, as a prefill would. Then, with every kind of weights, it is
checked that the logits are near those of DynamicCache (loosely, because caches are lossy), that this comparison would
notice a wrong cache, and that `memory_report()` counts the tensors that exist. If one check fails, nothing is timed.
Then all caches take steps in turn. Weights that cannot be made are listed with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from hf_kvquant.measure import step
from hf_kvquant.measure.benchmark import (
    Benchmark,
    add_model,
    choose,
    chosen_presets,
    integers,
    new_parser,
    shape_of,
    summary_line,
)
from hf_kvquant.measure.caches import DENSE, Candidate, Dense
from hf_kvquant.measure.checks import all_passed, at_most, is_true, relative_error
from hf_kvquant.measure.clock import summary
from hf_kvquant.measure.facts import read_json
from hf_kvquant.measure.process_memory import reason
from hf_kvquant.measure.tables import bold, markdown, print_table, put_between
from hf_kvquant.measure.weighing import tensor_bytes
from hf_kvquant.measure.weights import WEIGHTS, weight_bytes, with_weights

CHECK_STEPS = 2
# A cache with wrong keys has at least this error.
CONTROL = 0.8
RESULT = Path(__file__).parent / "results" / "bench_laptop.json"
README = RESULT.parent / "README.md"
BEGIN, END = "<!-- laptop: written by eval/bench_laptop.py -->", "<!-- laptop: end -->"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_model(parser)
    parser.set_defaults(layers=16, hidden=2048, heads=32, kv_heads=8, head_dim=64, presets="int8,int4")
    parser.add_argument("--intermediate", type=int, default=8192, help="width of the MLP")
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--weights", default=",".join(WEIGHTS), help="comma separated; default: all")
    parser.add_argument("--lengths", type=integers, default="2048,8192,32768", help="cached tokens, comma separated")
    parser.add_argument("--new", type=int, default=6, help="steps that are timed, for every cache")
    parser.add_argument("--readme", action="store_true", help="only write the tables of eval/results/README.md")
    args = parser.parse_args(argv)
    args.batch, args.weights = 1, args.weights.split(",")
    if unknown := [name for name in args.weights if name not in WEIGHTS]:
        parser.error(f"--weights: {unknown[0]!r} is unknown; expected some of {','.join(WEIGHTS)}")
    choose(parser, args)
    return args


def whole_shape(args: argparse.Namespace) -> step.Shape:
    return replace(shape_of(args), intermediate=args.intermediate, vocabulary=args.vocabulary, tied=True)


def bench_weights(args: argparse.Namespace, plain: LlamaForCausalLM, weights: str) -> dict[str, list[dict]]:
    """Checks, and if they all pass the rows of the tables, of a model with these weights."""
    try:
        model = with_weights(plain, weights)
        alone = {DENSE: filled(args, model, Dense(), 1)}
        step.first_logits(model, alone[DENSE], whole_shape(args), CHECK_STEPS)
    except (ImportError, NotImplementedError, RuntimeError) as error:
        return {"skipped": [{"weights": weights, "reason": reason(error)}]}
    ms = summary(time_steps(args, model, alone)[DENSE])
    rows = {"weights": [{"weights": weights, "bytes": weight_bytes(model), "ms": ms}], "checks": [], "steps": []}
    for length in args.lengths:
        found = bench_length(args, model, length, ms["median"])
        for table, new in found.items():
            rows[table] += [{"weights": weights, "length": length, **row} for row in new]
        if not all_passed(rows["checks"]):
            break
    return rows


def bench_length(
    args: argparse.Namespace, model: LlamaForCausalLM, length: int, weights_ms: float
) -> dict[str, list[dict]]:
    """Checks, and if they all pass the rows of a step, at one length."""

    def first_logits(cache) -> torch.Tensor:
        return step.first_logits(model, cache, whole_shape(args), CHECK_STEPS)

    caches, kinds, checks = {}, {}, []
    exact = wrong = None
    for candidate in (Dense(), Dense(f"{DENSE}-static", static=True), *chosen_presets(args)):
        name = candidate.name
        cache = caches[name] = filled(args, model, candidate, length)
        kinds[name] = candidate.kind
        logits = first_logits(cache)
        checks.append(is_true(name, "logits are finite", logits.isfinite().all()))
        if exact is None:
            exact, wrong = logits, relative_error(first_logits(filled(args, model, candidate, length, roll=1)), logits)
            checks.append(at_most("control", "a cache with wrong keys is far from dense", -wrong, -CONTROL))
            continue
        error, limit = relative_error(logits, exact), step.NEAR_DENSE[candidate.bits] * wrong
        checks.append(at_most(name, "logits near DynamicCache", error, limit))
        if candidate.kind == "preset":
            counted = cache.memory_report()["total"] == tensor_bytes(cache)
            checks.append(is_true(name, "memory_report counts every tensor", counted))
    if not all_passed(checks):
        return {"checks": checks}
    # Before the steps: DynamicCache copies itself in each one.
    nbytes = {name: tensor_bytes(cache) for name, cache in caches.items()}
    times = {name: summary(samples) for name, samples in time_steps(args, model, caches).items()}
    for name, cache in caches.items():
        if kinds[name] == "preset":
            fused = step.all_fused(cache, args.new + CHECK_STEPS)
            checks.append(is_true(name, "every step took the fused route", fused))
    rows = [
        {
            "name": name,
            "kind": kinds[name],
            "ms": times[name],
            "tokens_per_s": 1e3 / times[name]["median"],
            "cache_ms": times[name]["median"] - weights_ms,
            "cache_bytes": nbytes[name],
            "share_of_dense_bytes": nbytes[name] / nbytes[DENSE],
        }
        for name in caches
    ]
    return {"checks": checks, "steps": rows}


def filled(args: argparse.Namespace, model: LlamaForCausalLM, candidate: Candidate, length: int, **options):
    return step.filled(candidate, model.config, whole_shape(args), length, args.new + CHECK_STEPS, **options)


def time_steps(args: argparse.Namespace, model: LlamaForCausalLM, caches: dict) -> dict[str, list[float]]:
    """Seconds of `args.new` steps of every cache, one step of each in turn."""
    fed = step.tokens(whole_shape(args), CHECK_STEPS + args.new)[CHECK_STEPS:]
    forward: Callable = model
    return step.time_steps({name: (model, forward, cache) for name, cache in caches.items()}, fed)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.readme:
        README.write_text(with_tables(README.read_text(encoding="utf-8"), read_json(RESULT)), encoding="utf-8")
        return 0
    benchmark = Benchmark("laptop", argv, args, ("weights", "steps", "skipped"))
    plain = step.build_model(whole_shape(args), max(args.lengths) + args.new + CHECK_STEPS)
    for weights in args.weights:
        if not benchmark.add(bench_weights(args, plain, weights)):
            return 1
    tolerance = {"near dense, by bits": step.NEAR_DENSE, "control": CONTROL}
    return benchmark.finish(show, tolerance=tolerance, parameters=plain.num_parameters())


def step_table(result: dict) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of steps: for each kind of weights the milliseconds of a step that reads little
    else, and those with every cache."""
    names = list(dict.fromkeys(row["name"] for row in result["steps"]))
    steps = {(row["weights"], row["length"], row["name"]): row for row in result["steps"]}
    rows = []
    for weights in result["weights"]:
        for length in result["arguments"]["lengths"]:
            found = (steps[weights["weights"], length, name] for name in names)
            cells = [f"{row['ms']['median']:.0f} ({row['tokens_per_s']:.1f})" for row in found]
            head = [f"{weights['weights']}, {weights['bytes'] / 1e9:.2f} GB", f"{length:,}"]
            rows.append([*head, f"{weights['ms']['median']:.0f}", *cells])
    return ["weights", "cached tokens", "1 token", *names], rows


def bytes_table(result: dict) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of caches: megabytes, and shares of the dense one."""
    first = result["weights"][0]["weights"]
    found = {(row["length"], row["name"]): row for row in result["steps"] if row["weights"] == first}
    names = list(dict.fromkeys(name for _, name in found))

    def cell(row: dict) -> str:
        return f"{row['cache_bytes'] / 1e6:.0f} ({row['share_of_dense_bytes']:.3f})"

    lengths = result["arguments"]["lengths"]
    rows = [[f"{length:,}", *(cell(found[length, name]) for name in names)] for length in lengths]
    return ["cached tokens", *names], rows


def show(result: dict) -> None:
    print(f"{summary_line(result)}; {result['parameters'] / 1e9:.2f} billion random parameters; medians")
    print_table("milliseconds of a decode step (tokens per second)", *step_table(result))
    print_table("megabytes of the cache (share of DynamicCache's)", *bytes_table(result))
    for row in result["skipped"]:
        print(f"skipped {row['weights']}: {row['reason']}")


def with_tables(readme: str, result: dict) -> str:
    """`readme` with both tables between its two markers.

    Raises:
        ValueError: the markers are missing.
    """
    tables = []
    for head, rows in (step_table(result), bytes_table(result)):
        tables.append(markdown([bold(name, result["configs"]) for name in head], rows))
    return put_between(readme, BEGIN, END, "\n" + "\n\n".join(tables) + "\n")


if __name__ == "__main__":
    sys.exit(main())
