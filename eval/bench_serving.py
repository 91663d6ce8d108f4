"""Time continuous batching with a fixed number of bytes for the cache: dense pages, and quantized ones.

    python eval/bench_serving.py --blocks 16 --out results.json
    python eval/bench_serving.py --mix chat --rate 4 --presets int8,int4 --out results.json

The model is a Llama of the given shape with random weights (see `measure.step`). `--blocks` blocks of BF16 pages are
the budget of every cache. Requests have seeded lengths (`--mix long`: prompts of 1024 to 3072 tokens and answers of 32
to 96; `chat`: 32 to 384 and 32 to 160), and arrive all at once, or `--rate` per second as a Poisson stream. Before
anything is timed, each cache answers short requests in float32, one by one and together; the answers must be the same.

A row has the requests that ran at the same time (at most), tokens per second of the whole run, and for each request
the time to its first token and the mean time of the others.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import replace
from statistics import median

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from hf_kvquant.measure import step
from hf_kvquant.measure.benchmark import Benchmark, add_model, choose, new_parser, shape_of, summary_line
from hf_kvquant.measure.checks import is_true
from hf_kvquant.measure.tables import print_table

MIXES = {"long": ((1024, 3072), (32, 96)), "chat": ((32, 384), (32, 160))}
DENSE = "dense"


def requests(args: argparse.Namespace) -> list[tuple[list[int], int, float]]:
    """Prompt, number of new tokens and second of arrival of each request, the same for every cache."""
    rng, arrival, found = random.Random(args.seed), 0.0, []
    for _ in range(args.requests):
        prompt, answer = (rng.randint(*span) for span in MIXES[args.mix])
        found.append(([rng.randrange(1, 256) for _ in range(prompt)], answer, arrival))
        arrival += rng.expovariate(args.rate) if args.rate else 0.0
    return found


def serve(model, args: argparse.Namespace, config, todo: list, blocks: int) -> list:
    """The results of the requests, in their order."""
    asked = {} if config is None else {"cache_implementation": "kvquant", "cache_config": config}
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1, **asked)
    options = ContinuousBatchingConfig(
        page_size=args.page_size, num_blocks=blocks, max_batch_tokens=args.batch_tokens, allow_block_sharing=False,
        auto_switch_to_flash=False,
    )  # fmt: skip
    results = {}
    with model.continuous_batching_context_manager(generation, continuous_batching_config=options) as manager:
        began = time.perf_counter()
        for i, (prompt, answer, arrival) in enumerate(todo):
            time.sleep(max(0.0, began + arrival - time.perf_counter()))
            manager.add_request(prompt, request_id=str(i), max_new_tokens=answer, record_timestamps=True)
        while len(results) < len(todo):
            result = manager.get_result(timeout=1)
            if result is not None:
                results[result.request_id] = result
            elif not manager.is_running():
                raise RuntimeError("the manager stopped before all requests were done")
    failed = [result.error for result in results.values() if result.error]
    if failed:
        raise RuntimeError(failed[0])
    return [results[str(i)] for i in range(len(todo))]


def same_alone(model, args: argparse.Namespace, config) -> bool:
    """Whether a few short requests get the same answers together as one by one."""
    rng = random.Random(1)
    todo = [([rng.randrange(1, 256) for _ in range(n)], 12, 0.0) for n in (3, 64, 150)]
    together = [result.generated_tokens for result in serve(model, args, config, todo, 16)]
    alone = [serve(model, args, config, [one], 16)[0].generated_tokens for one in todo]
    return together == alone


def row(name: str, results: list) -> dict:
    """The figures of one run."""
    begin, end = min(r.created_time for r in results), max(r.lifespan[1] for r in results)
    events = sorted((t, change) for r in results for t, change in zip(r.lifespan, (1, -1)))
    held, most = 0, 0
    for _, change in events:
        held += change
        most = max(most, held)
    first = sorted(r.timestamps[0] - r.created_time for r in results)
    others = sorted(
        (r.timestamps[-1] - r.timestamps[0]) / (len(r.timestamps) - 1) for r in results if len(r.timestamps) > 1
    )
    new = sum(len(r.generated_tokens) for r in results)
    return {
        "name": name,
        "held_at_once": most,
        "seconds": end - begin,
        "new_tokens": new,
        "tokens_per_s": new / (end - begin),
        "first_token_s": {"median": median(first), "p99": quantile(first, 0.99)},
        "token_s": {"median": median(others), "p99": quantile(others, 0.99)},
    }


def quantile(ordered: list[float], share: float) -> float:
    """The value that `share` of the ordered values do not exceed."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    add_model(parser)
    parser.add_argument("--blocks", type=int, default=16, help="the budget, in blocks of dense pages")
    parser.add_argument("--page-size", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=512, help="tokens of one forward call, at most")
    parser.add_argument("--mix", choices=MIXES, default="long")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rate", type=float, default=0.0, help="requests per second; 0: all at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(presets="int8,int4,int4-small")
    args = parser.parse_args(argv)
    args.batch = 1
    choose(parser, args)
    benchmark = Benchmark("serving", sys.argv[1:] if argv is None else argv, args, ("rows",))
    shape, todo = shape_of(args), requests(args)
    longest = max(len(prompt) + answer for prompt, answer, _ in todo)
    exact = step.build_model(shape, longest, torch.float32)
    model = step.build_model(shape, longest)
    caches = {DENSE: None, **{name: replace(config, backend=args.backend) for name, config in args.configs.items()}}
    what = "answers in a batch are those of each request alone"
    checks = [is_true(name, what, same_alone(exact, args, config)) for name, config in caches.items()]
    if not benchmark.add({"checks": checks}):
        return 1
    for name, config in caches.items():
        benchmark.add({"rows": [row(name, serve(model, args, config, todo, args.blocks))]})
    return benchmark.finish(show)


def show(result: dict) -> None:
    dense = next(row for row in result["rows"] if row["name"] == DENSE)
    rows = [
        [
            r["name"], str(r["held_at_once"]), f"{r['tokens_per_s']:.1f}",
            f"{r['tokens_per_s'] / dense['tokens_per_s']:.2f}",
            *(f"{r[key][q]:.3f}" for key in ("first_token_s", "token_s") for q in ("median", "p99")),
        ]
        for r in result["rows"]
    ]  # fmt: skip
    columns = ["cache", "requests at once", "tokens/s", "of dense", "first token s", "p99", "token s", "p99"]
    print_table(f"continuous batching, mix {result['arguments']['mix']}", columns, rows)
    print(summary_line(result))


if __name__ == "__main__":
    sys.exit(main())
