"""Time `generate` with the largest left-padded batch whose cache stays within a fixed number of bytes.

    python eval/bench_padded.py --mix chat --blocks 64 --presets int8,int4 --out results.json

The budget is that of bench_serving.py: `--blocks` blocks of 256 tokens of a dense BF16 cache. Prompts are seeded and
have the lengths of `--mix`; rows are padded to its longest prompt and get its longest answer. The model is a Llama of
the given shape with random weights (see `measure.step`).

Each cache runs in a process of its own. A row has the size of the batch, tokens per second of the whole call, the time
to the first token and that of a step. Checks: the cache stays within the budget, and ours is read as stored in every
step and counts every tensor. If one fails, nothing is shown.
"""

from __future__ import annotations

import sys

import torch

from hf_kvquant.measure import padded
from hf_kvquant.measure.benchmark import Benchmark, add_model, choose, new_parser, shape_of, summary_line
from hf_kvquant.measure.process_memory import in_process
from hf_kvquant.measure.serving import MIXES
from hf_kvquant.measure.tables import print_table

DENSE = "dense"
BLOCK = 256  # tokens


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    add_model(parser)
    parser.add_argument("--blocks", type=int, default=64, help=f"the budget, in blocks of {BLOCK} dense tokens")
    parser.add_argument("--mix", choices=MIXES, default="chat")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(presets="int8,int4,int4-small")
    args = parser.parse_args(argv)
    args.batch = 1
    choose(parser, args)
    benchmark = Benchmark("padded", sys.argv[1:] if argv is None else argv, args, ("batches",))
    shape = shape_of(args)
    budget = args.blocks * BLOCK * shape.elements_per_token * shape.dtype.itemsize
    for name, config in {DENSE: None, **args.configs}.items():
        found = in_process(padded.measure, shape, config, args.mix, budget, args.seed, torch.get_num_threads())
        checks = [check | {"name": name} for check in found.pop("checks")]
        if not benchmark.add({"checks": checks, "batches": [{"name": name, **found}]}):
            return 1
    return benchmark.finish(show, budget_bytes=budget)


def show(result: dict) -> None:
    dense = next(row for row in result["batches"] if row["name"] == DENSE)
    rows = [
        [
            row["name"], str(row["rows"]), f"{row['cache_bytes'] / result['budget_bytes']:.2f}",
            f"{row['tokens_per_s']:.1f}", f"{row['tokens_per_s'] / dense['tokens_per_s']:.2f}",
            f"{row['first_token_s']:.2f}", f"{1000 * row['step_s']:.1f}",
        ]
        for row in result["batches"]
    ]  # fmt: skip
    columns = ["cache", "rows", "of the budget", "tokens/s", "of dense", "first token s", "step ms"]
    print_table(f"a left-padded batch, mix {result['arguments']['mix']}", columns, rows)
    print(summary_line(result))


if __name__ == "__main__":
    sys.exit(main())
