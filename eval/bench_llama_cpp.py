"""Time a decode step, and the attention in it, beside llama.cpp on its own quantized KV caches.

    pip install gguf
    CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python
    python eval/bench_llama_cpp.py --lengths 1024,8192,16384,32768 --threads 2 --out results.json

Both sides do the same work. The Llama of `measure.step` with its random weights is written as a GGUF file, and every
cache holds the same random K and V. llama.cpp gets them as a saved state, so no prefill is needed: quantized to its
format, in the order of its position embedding, and rotated as it rotates quantized states. Flash attention is on for
all its caches except one in float16, because on a CPU that may be faster without.

Before anything is timed, it checks that llama.cpp read this shape and number of weights; that its cache holds the
bytes it was given (V not transposed, as only flash attention stores it); that the logits of every cache, on either
side, are near those of float32 DynamicCache and those of a cache with wrong keys are far. Afterwards it checks that
every step added a token to llama.cpp's cache and took the fused route in ours.

*Attention* is the time of a step less that of the same step over a cache of one token, both in the same round: all
that grows with the context. The fixed cost of each side (Python and transformers' modules in ours) is in both steps.
Samples are taken in rounds, A B C A B C .., each over flushed caches, and after a pause: either side's OpenMP threads
spin for some milliseconds after their work, and would disturb the other's.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import Cache, LlamaForCausalLM

from hf_kvquant.measure import llama_cpp, step
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
from hf_kvquant.measure.caches import Dense
from hf_kvquant.measure.checks import all_passed, at_most, is_true, relative_error
from hf_kvquant.measure.clock import PlainRead, seconds_of, summary
from hf_kvquant.measure.llama_cpp import TYPES, LlamaCppCache, row_bytes, saved_state, state_bytes
from hf_kvquant.measure.tables import print_table

# A cache with wrong keys has at least this error.
CONTROL = 0.8
CHECK_STEPS = 2
BASE_LENGTH = 1
WARM_UP_ROUNDS = 2
# Long enough for libgomp's threads to fall asleep: by default they spin 300,000 times first, some milliseconds.
PAUSE_SECONDS = 0.02


@dataclass
class Contestant:
    """A filled cache and its twin of `BASE_LENGTH` tokens; of llama.cpp if `kind` says so, else of transformers."""

    name: str
    kind: str
    bits: int
    cache: LlamaCppCache | Cache
    base: LlamaCppCache | Cache
    cache_bytes: int


def room_of(args: argparse.Namespace) -> int:
    return args.rounds + WARM_UP_ROUNDS + CHECK_STEPS


def our_contestants(model: LlamaForCausalLM, args: argparse.Namespace, length: int) -> Iterator[Contestant]:
    for preset in chosen_presets(args):
        caches = [step.filled(preset, model.config, shape_of(args), n, room_of(args)) for n in (length, BASE_LENGTH)]
        report = caches[0].memory_report()
        yield Contestant(preset.name, preset.kind, preset.bits, *caches, report["total"] - report["slack"])


def their_contestants(theirs, args: argparse.Namespace, length: int, checks: list[dict]) -> Iterator[Contestant]:
    """llama.cpp's contestants; adds to `checks` that each gives back the bytes that it was given."""
    shape = shape_of(args)
    for kind in args.types:
        caches = []
        for n in (length, BASE_LENGTH):
            cache = LlamaCppCache(theirs, kind, n + room_of(args))
            state = saved_state(cache.head, kind, shape, n)
            cache.restore(state)
            size = cache.head.size + state_bytes(kind, shape, n)
            same = np.array_equal(cache.state(), state) and state.nbytes == size
            checks.append(is_true(kind, f"llama.cpp holds the bytes it was given, {n} tokens", same))
            caches.append(cache)
        nbytes = 2 * args.layers * length * row_bytes(kind, shape)
        yield Contestant(kind, "llama.cpp", TYPES[kind].bits, *caches, nbytes)


def dense_logits(args: argparse.Namespace, length: int, roll: int = 0) -> torch.Tensor:
    """First logits of float32 DynamicCache, which every cache should give."""
    shape = shape_of(args)
    model = step.build_model(shape, max(args.lengths) + room_of(args), torch.float32)
    cache = step.filled(Dense(dtype=torch.float32), model.config, shape, length, CHECK_STEPS, roll=roll)
    return step.first_logits(model, cache, shape, CHECK_STEPS)


def their_logits_of_wrong_keys(theirs, args: argparse.Namespace, length: int) -> torch.Tensor:
    kind = args.types[-1]
    cache = LlamaCppCache(theirs, kind, length + room_of(args))
    cache.restore(saved_state(cache.head, kind, shape_of(args), length, roll=1))
    logits = cache.first_logits(shape_of(args), CHECK_STEPS)
    cache.close()
    return logits


def bench_length(args: argparse.Namespace, theirs, model: LlamaForCausalLM, length: int) -> dict[str, list[dict]]:
    """Checks, and if they all pass the rows of the table, at one length."""
    checks, shape = llama_cpp.shape_checks(theirs, model), shape_of(args)
    expected = {n: dense_logits(args, n) for n in (length, BASE_LENGTH)}
    wrong = relative_error(dense_logits(args, length, roll=1), expected[length])
    their_wrong = relative_error(their_logits_of_wrong_keys(theirs, args, length), expected[length])
    what = "a cache with wrong keys is far from dense"
    checks += [at_most(name, what, -x, -CONTROL) for name, x in (("control", wrong), ("llama.cpp", their_wrong))]
    contestants = []
    try:
        contestants += their_contestants(theirs, args, length, checks)
        contestants += our_contestants(model, args, length)
        for c in contestants:
            for n, cache in ((length, c.cache), (BASE_LENGTH, c.base)):
                if c.kind == "llama.cpp":
                    logits = cache.first_logits(shape, CHECK_STEPS)
                else:
                    logits = step.first_logits(model, cache, shape, CHECK_STEPS)
                what = f"logits near float32 DynamicCache, {n} tokens"
                limit = step.NEAR_DENSE[c.bits] * wrong
                checks.append(at_most(c.name, what, relative_error(logits, expected[n]), limit))
        if all_passed(checks):
            print(f"{length} tokens: {len(checks)} checks passed, timing", file=sys.stderr, flush=True)
            roof = PlainRead(max(c.cache_bytes for c in contestants))
            samples = time_steps(model, contestants, roof, args)
            print(f"{length} tokens: timed", file=sys.stderr, flush=True)
            checks += step_checks(contestants, args, length)
    finally:
        for c in contestants:
            if c.kind == "llama.cpp":
                c.cache.close()
                c.base.close()
    checks = [{"length": length, **check} for check in checks]
    if not all_passed(checks):
        return {"checks": checks}
    plain_read = [{"length": length, **roof.facts()}]
    return {"checks": checks, "steps": rows(contestants, samples, roof, args, length), "plain_read": plain_read}


def time_steps(
    model: LlamaForCausalLM, contestants: list[Contestant], roof: PlainRead, args: argparse.Namespace
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of a step over the cache and of one over its twin with one token, by rounds."""

    def seconds(c: Contestant, cache: LlamaCppCache | Cache, token: torch.Tensor) -> float:
        theirs = c.kind == "llama.cpp"
        number = token.item()
        roof.flush()
        time.sleep(PAUSE_SECONDS)
        with contextlib.nullcontext() if theirs else step.switched(model, cache):
            return seconds_of(lambda: cache.step(number) if theirs else step.step(model, cache, token))

    samples = {c.name: [] for c in contestants}
    for i, token in enumerate(step.tokens(shape_of(args), room_of(args))[CHECK_STEPS:]):
        for c in contestants:
            pair = seconds(c, c.cache, token), seconds(c, c.base, token)
            if i >= WARM_UP_ROUNDS:
                samples[c.name].append(pair)
    return samples


def step_checks(contestants: list[Contestant], args: argparse.Namespace, length: int) -> list[dict]:
    """Checks that every step added its token and took its route."""
    done = room_of(args)
    checks = []
    for c in contestants:
        for n, cache in ((length, c.cache), (BASE_LENGTH, c.base)):
            if c.kind == "llama.cpp":
                passed = cache.state().size == cache.head.size + state_bytes(c.name, shape_of(args), n + done)
                what = "every step added a token to every layer"
            else:
                passed = step.all_fused(cache, done)
                what = "every step took the fused route"
            checks.append(is_true(c.name, f"{what}, {n} tokens", passed))
    return checks


def rows(
    contestants: list[Contestant], samples: dict, roof: PlainRead, args: argparse.Namespace, length: int
) -> list[dict]:
    elements = shape_of(args).elements_per_token * length
    found = {}
    for c in contestants:
        attention = summary([with_cache - without for with_cache, without in samples[c.name]])
        gb_per_s = c.cache_bytes / attention["median"] / 1e6
        found[c.name] = {
            "length": length,
            "name": c.name,
            "kind": c.kind,
            "bits_per_number": c.cache_bytes * 8 / elements,
            "cache_bytes": c.cache_bytes,
            "step_ms": summary([with_cache for with_cache, _ in samples[c.name]]),
            "base_ms": summary([without for _, without in samples[c.name]]),
            "attention_ms": attention,
            "attention_gb_per_s": gb_per_s,
            "share_of_plain_read": gb_per_s * 1e9 / roof.bytes_per_s,
        }
    peers = {c.bits: found[c.name] for c in contestants if c.kind == "llama.cpp"}
    for c in contestants:
        if c.kind == "preset" and c.bits in peers:
            row, peer = found[c.name], peers[c.bits]
            row["peer"] = peer["name"]
            for part in ("attention", "step"):
                row[f"{part}_faster_than_peer"] = peer[f"{part}_ms"]["median"] / row[f"{part}_ms"]["median"]
    return list(found.values())


def parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_model(parser)
    parser.add_argument("--lengths", type=integers, default="1024,8192,16384,32768", help="cached tokens")
    parser.add_argument("--rounds", type=int, default=15, help="steps that are timed, for every cache")
    parser.add_argument("--types", default=",".join(TYPES), help="llama.cpp's caches, comma separated")
    args = parser.parse_args(argv)
    if llama_cpp.MISSING:
        parser.error(f"{llama_cpp.MISSING}; to install: {llama_cpp.INSTALL}")
    args.types = args.types.split(",")
    if not set(args.types) <= set(TYPES):
        parser.error(f"--types {','.join(args.types)}: expected some of {','.join(TYPES)}")
    if min(args.lengths) <= BASE_LENGTH:
        parser.error(f"--lengths: every length must be more than {BASE_LENGTH}")
    if args.head_dim % 32 or args.hidden % 32:
        parser.error(f"--head-dim {args.head_dim}, --hidden {args.hidden}: llama.cpp needs multiples of 32")
    # llama.cpp is driven one sequence at a time.
    args.batch = 1
    choose(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    benchmark = Benchmark("llama_cpp", argv, args, ("steps", "plain_read"))
    model = step.build_model(shape_of(args), max(args.lengths) + room_of(args))
    with llama_cpp.loaded(model, shape_of(args)) as theirs:
        for length in args.lengths:
            if not benchmark.add(bench_length(args, theirs, model, length)):
                return 1
    tolerance = {"near dense, by bits": step.NEAR_DENSE, "control": CONTROL}
    return benchmark.finish(show, llama_cpp=llama_cpp.facts(), tolerance=tolerance)


def show(result: dict) -> None:
    theirs = f"llama-cpp-python {result['llama_cpp']['llama-cpp-python']}"
    print(f"{summary_line(result)}; Llama with random weights; {theirs}; medians")
    for length in result["arguments"]["lengths"]:
        print_table(
            f"one decode step at {length} cached tokens",
            ["cache", "bits", "step ms", "at 1 token", "attention ms", "min .. max", "share of read", "x peer's"],
            [
                [
                    f"{row['kind']} {row['name']}",
                    f"{row['bits_per_number']:.2f}",
                    f"{row['step_ms']['median']:.2f}",
                    f"{row['base_ms']['median']:.2f}",
                    f"{row['attention_ms']['median']:.2f}",
                    f"{row['attention_ms']['min']:.2f} .. {row['attention_ms']['max']:.2f}",
                    f"{row['share_of_plain_read']:.0%}",
                    f"{row['attention_faster_than_peer']:.2f} ({row['peer']})" if "peer" in row else "-",
                ]
                for row in result["steps"]
                if row["length"] == length
            ],
        )


if __name__ == "__main__":
    sys.exit(main())
