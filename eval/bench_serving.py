"""Time continuous batching with a fixed number of bytes for the cache: dense pages, and quantized ones.

    python eval/bench_serving.py --blocks 16 --out results.json
    python eval/bench_serving.py --mix chat --rate 4 --prefix 512 --presets int8,int4 --out results.json

The model is a Llama of the given shape with random weights (see `measure.step`), or with `--window` a Mistral, whose
layers see that many tokens, so that pages are given back. `--blocks` blocks of BF16 pages are
the budget of every cache. Requests have seeded lengths (`--mix long`: prompts of 1024 to 3072 tokens and answers of 32
to 96; `chat`: 32 to 384 and 32 to 160), and arrive all at once, or `--rate` per second as a Poisson stream. With
`--prefix` all prompts begin with the same tokens, and requests share their pages where the cache can. Before anything
is timed, each cache answers short requests in float32, one by one and together; the answers must be the same.

Each cache runs in a process of its own. A row has the requests that ran at the same time (at most), tokens per second
of the whole run, for each request the time to its first token and the mean time of the others, the peak of memory that
the run adds to the process, and the tokens of prompts that were not computed, but taken over from shared pages.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys

import torch

from hf_kvquant.measure import serving, step
from hf_kvquant.measure.benchmark import Benchmark, add_model, choose, new_parser, shape_of, summary_line
from hf_kvquant.measure.checks import is_true
from hf_kvquant.measure.process_memory import in_process
from hf_kvquant.measure.serving import MIXES, Pages, Request
from hf_kvquant.measure.tables import print_table

DENSE = "dense"


def same_alone(model, args: argparse.Namespace, config) -> bool:
    """Whether a few short requests get the same answers together as one by one."""
    rng = random.Random(1)
    lengths = (3, 64, 150) if args.window is None else (3, 64, args.window + 100)
    todo = [Request([rng.randrange(1, 256) for _ in range(n)], 12) for n in lengths]
    # In one chunk each, because a chunk reads its past de-quantized, and others move its borders.
    pages = Pages(16, args.page_size, max(args.batch_tokens, sum(lengths)))
    together = [result.generated_tokens for result in serving.serve(model, config, todo, pages)]
    alone = [serving.serve(model, config, [one], pages)[0].generated_tokens for one in todo]
    return together == alone


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    add_model(parser)
    parser.add_argument("--blocks", type=int, default=16, help="the budget, in blocks of dense pages")
    parser.add_argument("--page-size", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=512, help="tokens of one forward call, at most")
    parser.add_argument("--mix", choices=MIXES, default="long")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rate", type=float, default=0.0, help="requests per second; 0: all at once")
    parser.add_argument("--prefix", type=int, default=0, help="tokens with which all prompts begin")
    parser.add_argument("--window", type=int, help="tokens that a query sees in every layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(presets="int8,int4,int4-small")
    args = parser.parse_args(argv)
    args.batch = 1
    choose(parser, args)
    benchmark = Benchmark("serving", sys.argv[1:] if argv is None else argv, args, ("rows",))
    shape = dataclasses.replace(shape_of(args), window=args.window)
    todo = serving.requests(args.mix, args.requests, args.rate, args.prefix, args.seed)
    pages = Pages(args.blocks, args.page_size, args.batch_tokens, shared=args.prefix > 0)
    longest = max(len(request.prompt) + request.answer for request in todo)
    exact = step.build_model(shape, longest, torch.float32)
    caches = {DENSE: None, **args.configs}
    what = "answers in a batch are those of each request alone"
    checks = [is_true(name, what, same_alone(exact, args, config)) for name, config in caches.items()]
    if not benchmark.add({"checks": checks}):
        return 1
    for name, config in caches.items():
        found = in_process(serving.measure, shape, longest, config, todo, pages, torch.get_num_threads())
        benchmark.add({"rows": [{"name": name, **found}]})
    return benchmark.finish(show)


def show(result: dict) -> None:
    dense = next(row for row in result["rows"] if row["name"] == DENSE)
    rows = [
        [
            r["name"], str(r["held_at_once"]), f"{r['tokens_per_s']:.1f}",
            f"{r['tokens_per_s'] / dense['tokens_per_s']:.2f}",
            *(f"{r[key][q]:.3f}" for key in ("first_token_s", "token_s") for q in ("median", "p99")),
            "-" if r["peak_mb"] is None else f"{r['peak_mb']:.0f}",
            f"{r['shared_tokens'] / r['prompt_tokens']:.0%}",
        ]
        for r in result["rows"]
    ]  # fmt: skip
    columns = ["cache", "requests at once", "tokens/s", "of dense", "first token s", "p99", "token s", "p99"]
    columns += ["peak MB", "of prompts shared"]
    print_table(f"continuous batching, mix {result['arguments']['mix']}", columns, rows)
    print(summary_line(result))


if __name__ == "__main__":
    sys.exit(main())
