"""Time a decode step of one layer of multi-head latent attention (DeepSeek V3's shape), and the operator in it.

    python eval/bench_latent.py --lengths 1024,8192 --out results/bench_latent.json

The baselines are transformers' dense cache, whose latents are expanded to all heads at every step, and a dense cache
whose up-projections are absorbed as ours are, in torch. The step is the whole layer, with its projections.

First everything is checked: each preset against the layer's own attention over de-quantized states, the absorbed dense
step against transformers', and the operator against the reference. If one check fails, nothing is timed. All
candidates are timed in interleaved rounds.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch

from hf_kvquant.measure import latent_step, operator
from hf_kvquant.measure.benchmark import DTYPES, Benchmark, choose, integers, new_parser
from hf_kvquant.measure.checks import all_passed, at_most, is_true, relative_error
from hf_kvquant.measure.clock import PlainRead, summary, time_interleaved
from hf_kvquant.measure.tables import print_table

DENSE, ABSORBED = "dense", "dense, absorbed"
# Relative errors of steps in BF16.
TOLERANCE = 0.02


def parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(__doc__)
    shape = latent_step.LatentShape()
    parser.add_argument("--lengths", type=integers, default="1024,8192", help="cached tokens before the step")
    parser.add_argument("--heads", type=int, default=shape.heads)
    parser.add_argument("--hidden", type=int, default=shape.hidden)
    parser.add_argument("--latent", type=int, default=shape.latent)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights, queries and new states")
    parser.add_argument("--presets", help="comma separated, or YAML paths; default: all")
    parser.add_argument("--backend", default="auto", help="of presets: auto, cpu or reference")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=120, help="stop a group of timings after so long")
    args = parser.parse_args(argv)
    if min(args.lengths, default=0) < 1:
        parser.error("--lengths: every length must be at least 1")
    choose(parser, args)
    return args


def reference_attention(query: torch.Tensor, latents) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference backend, a few heads at a time, because it makes a copy of the latents for each."""
    parts = [operator.reference_attention(heads, latents, latents) for heads in query.split(8, dim=1)]
    output, logsumexp = (torch.cat(tensors, dim=1) for tensors in zip(*parts))
    return output, logsumexp


def bench_length(
    args: argparse.Namespace, model, shape: latent_step.LatentShape, length: int
) -> dict[str, list[dict]]:
    """Checks, and if they all pass the rows of steps and of the operator, at one length."""
    latents, rotary = latent_step.random_latents(shape, length)
    hidden = torch.randn(1, 1, shape.hidden, generator=torch.Generator().manual_seed(1)).to(shape.dtype)
    room = args.rounds + 8
    caches = {
        DENSE: latent_step.dense_cache(model, latents, rotary),
        ABSORBED: latent_step.Preallocated(latents, rotary, room),
    }
    for name, config in args.configs.items():
        caches[name] = latent_step.quantized_cache(model, config, latents, rotary, room)
    steps = latent_step.tasks(model, caches, hidden)

    expected = steps[DENSE]()
    checks = [at_most(ABSORBED, "step against transformers'", relative_error(steps[ABSORBED](), expected), TOLERANCE)]
    query = operator.random_query(1, shape.heads, 1, shape.latent, shape.dtype)
    stored = {}
    for name, config in args.configs.items():
        dequantized = latent_step.quantized_cache(model, config, latents, rotary, room)
        dequantized.disable_fused("the benchmark compares it")
        error = relative_error(steps[name](), latent_step.step(model, dequantized, hidden))
        checks.append(at_most(name, "step against de-quantized states", error, TOLERANCE))
        routes = caches[name].routes
        fused = routes["decode_fused"] == 1 and routes["decode_dequantized"] == 0
        checks.append(is_true(name, "the step took the fused route", fused))
        stored[name] = operator.fill(config, latents, latents)[0]
        found = operator.attention(query, stored[name], stored[name])
        checks += operator.check_output(name, found, reference_attention(query, stored[name]))
    if not all_passed(checks):
        return {"checks": [{"length": length, **check} for check in checks]}

    times = {name: summary(s) for name, s in time_interleaved(steps, args.rounds, args.seconds).items()}
    rows = [
        {
            "length": length, "name": name, "ms": times[name],
            "faster_than_dense": times[DENSE]["median"] / times[name]["median"],
            "faster_than_absorbed": times[ABSORBED]["median"] / times[name]["median"],
        }
        for name in steps
    ]  # fmt: skip
    calls = {name: partial(operator.attention, query, states, states) for name, states in stored.items()}
    calls = {ABSORBED: partial(operator.sdpa, query, latents, latents)} | calls
    nbytes = {name: operator.bytes_read(states) for name, states in stored.items()} | {ABSORBED: latents.nbytes}
    roof = PlainRead(max(nbytes.values()))
    reads = {f"read {n}": roof.reader(n) for n in sorted(set(nbytes.values()))}
    times = {
        name: summary(s) for name, s in time_interleaved(calls | reads, args.rounds, args.seconds, roof.flush).items()
    }
    products = 2 * shape.heads * length * shape.latent
    alone = [
        {
            "length": length, "name": name, "ms": times[name], "bytes_read": nbytes[name],
            "plain_read_ms": times[f"read {nbytes[name]}"],
            "share_of_plain_read": times[f"read {nbytes[name]}"]["median"] / times[name]["median"],
            "multiplications_per_byte": products / nbytes[name],
            "billion_multiplications_per_s": products / times[name]["median"] / 1e6,
        }
        for name in calls
    ]  # fmt: skip
    return {
        "checks": [{"length": length, **check} for check in checks],
        "step": rows,
        "operator": alone,
        "plain_read": [{"length": length, **roof.facts()}],
    }


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    benchmark = Benchmark("latent", argv, args, ("step", "operator", "plain_read"))
    shape = latent_step.LatentShape(heads=args.heads, hidden=args.hidden, latent=args.latent, dtype=DTYPES[args.dtype])
    model = latent_step.build(shape)
    for length in args.lengths:
        with torch.inference_mode():
            rows = bench_length(args, model, shape, length)
        if not benchmark.add(rows):
            return 1
    return benchmark.finish(show, tolerance={"step": TOLERANCE, "attention": operator.TOLERANCE})


def show(result: dict) -> None:
    a = result["arguments"]
    print(
        f"{len(result['checks'])} checks passed; {a['heads']} heads over latents of {a['latent']}, "
        f"hidden {a['hidden']}, {a['dtype']}; {result['machine']['threads']} threads, backend {result['backend']}; "
        "medians"
    )
    for length in a["lengths"]:
        print_table(
            f"a decode step of one layer after {length} tokens",
            ["cache", "ms", "min .. max", "x dense", "x absorbed"],
            [
                [
                    row["name"],
                    f"{row['ms']['median']:.1f}",
                    f"{row['ms']['min']:.1f} .. {row['ms']['max']:.1f}",
                    f"{row['faster_than_dense']:.1f}",
                    f"{row['faster_than_absorbed']:.2f}",
                ]
                for row in result["step"]
                if row["length"] == length
            ],
        )
        print_table(
            f"the operator alone over {length} latents, caches flushed",
            ["cache", "ms", "MB read", "share of plain read", "10^9 multiplications/s", "multiplications/byte"],
            [
                [
                    row["name"],
                    f"{row['ms']['median']:.2f}",
                    f"{row['bytes_read'] / 1e6:.2f}",
                    f"{row['share_of_plain_read']:.0%}",
                    f"{row['billion_multiplications_per_s']:.0f}",
                    f"{row['multiplications_per_byte']:.0f}",
                ]
                for row in result["operator"]
                if row["length"] == length
            ],
        )


if __name__ == "__main__":
    sys.exit(main())
