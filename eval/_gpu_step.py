"""The GPU suite's sections on whole models: a decode step, a prefill, and tokens per second at equal cache memory.

The model has the shape of Llama-3-8B and random weights. Every cache gets the same random K and V in one update, as a
prefill would; a candidate is timed only if its logits are near those of `DynamicCache`.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import _bench
import torch
import transformers
from _gpu import Deadline, Report
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import hf_kvquant
from hf_kvquant import KVQuantConfig
from hf_kvquant.cache import QuantizedCache
from hf_kvquant.host import CACHE

# Largest relative error of the logits, as a share of the error that a cache with wrong keys has in the same run.
NEAR_DENSE = {4: 0.5, 8: 0.2, 16: 0.05}
CONTROL = 0.3
BASELINE = "dynamic"
STEPS = 8
# A step that is captured is run a few times before; the first that is checked is one of so many.
CHECKED_STEPS = 4
# Of a cache, beyond the tokens that it is filled with: warm-up, check, timing.
ROOM = 64
# Sequences of a batch that are compared with `DynamicCache`: all of a large one would not fit beside the model.
CHECKED_ROWS = 4


@dataclass(frozen=True)
class Candidate:
    """`build(config, max_length)` makes an empty cache; `captured`: its step is replayed as a CUDA graph."""

    name: str
    kind: str
    build: Callable[[LlamaConfig, int], Cache]
    bits: int
    captured: bool = False


def candidates(machine, plan) -> list[Candidate]:
    """Caches to compare; a step of a static cache is replayed as a CUDA graph, theirs and ours alike."""

    def ours(name: str, fixed: bool) -> Candidate:
        kv_config = replace(KVQuantConfig.preset(name), backend=machine.backend, static=fixed)
        build = lambda config, n: QuantizedCache(config, kv_config, max_length=n)  # noqa: E731
        bits = min(hf_kvquant.FORMATS[spec.format].bits for spec in (kv_config.keys, kv_config.values))
        return Candidate(f"{name}-static, captured" if fixed else name, "ours", build, bits, captured=fixed)

    def static(config: LlamaConfig, n: int) -> Cache:
        return StaticCache(config=config, max_cache_len=n)

    return [
        Candidate(BASELINE, "baseline", lambda config, n: DynamicCache(config=config), 16),
        Candidate("static, captured", "rival", static, 16, captured=True),
        Candidate("transformers fp8", "rival", lambda config, n: transformers.QuantizedCache("fp8", config), 8),
        *(ours(name, fixed) for fixed in (False, True) for name in plan.presets),
    ]


def build_model(machine, plan) -> LlamaForCausalLM:
    """Random BF16 weights, made on the device."""
    config = LlamaConfig(
        num_hidden_layers=plan.layers,
        hidden_size=plan.hidden,
        intermediate_size=plan.intermediate,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.kv_heads,
        head_dim=plan.head_dim,
        vocab_size=plan.vocabulary,
        max_position_embeddings=max(*plan.step_contexts, *plan.prompts, plan.memory_context) + 64,
        # Every projection keeps the size of its input, so that attention has its say in the logits.
        initializer_range=plan.hidden**-0.5,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(machine.device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def fill(machine, cache: Cache, plan, batch: int, length: int, roll: int = 0, rows: int | None = None) -> None:
    """Give `cache` random tokens in one update per layer; `roll` shifts the keys against the values; `rows`: of the
    batch, only so many sequences."""
    generator = torch.Generator(machine.device)
    size = (batch, plan.kv_heads, length, plan.head_dim)
    for layer_idx in range(plan.layers):
        generator.manual_seed(layer_idx)
        key, value = (
            torch.randn(size, generator=generator, device=machine.device, dtype=torch.bfloat16) for _ in range(2)
        )
        cache.update(key[:rows].roll(roll, dims=2), value[:rows], layer_idx)
    if isinstance(cache, QuantizedCache):
        for layer in cache.quantized_layers:
            # Else learned in prefill, which is not run here: Llama's attention takes what the cache returns.
            layer.takes_states = True


def switched(model: LlamaForCausalLM, cache: Cache):
    """The context in which the model's attention understands the cache; transformers' caches need none."""
    return hf_kvquant.attention(model) if isinstance(cache, QuantizedCache) else contextlib.nullcontext()


def stepper(machine, model, candidate: Candidate, cache: Cache, batch: int) -> Callable[[], torch.Tensor]:
    """A decode step: one forward pass for one token per sequence; returns its logits `[batch, vocab_size]`."""
    token = torch.full((batch, 1), 7, device=machine.device)

    def step() -> torch.Tensor:
        return model(input_ids=token, **{CACHE: cache}).logits[:, -1]

    return machine.graphed(step) if candidate.captured else step


def _logits(machine, model, candidate: Candidate, plan, batch: int, length: int, roll: int = 0) -> torch.Tensor:
    """Of the first steps of the first sequences, `[CHECKED_STEPS, CHECKED_ROWS, vocab_size]`."""
    cache = candidate.build(model.config, length + STEPS)
    fill(machine, cache, plan, batch, length, roll, CHECKED_ROWS)
    step = stepper(machine, model, candidate, cache, min(batch, CHECKED_ROWS))
    return torch.stack([step() for _ in range(CHECKED_STEPS)])


def _measure(machine, model, plan, report: Report, section: str, where: dict, candidate: Candidate, batch: int,
             length: int, limits: dict) -> float | None:  # fmt: skip
    """Seconds of a step, checked before; None if it failed, could not run or was wrong."""
    cache = logits = step = None
    try:
        cache = candidate.build(model.config, length + ROOM)
        fill(machine, cache, plan, batch, length)
        with switched(model, cache):
            step = stepper(machine, model, candidate, cache, batch)
            # Those that warmed up before a capture.
            done = int(cache.get_seq_length()) - length
            logits = step()[:CHECKED_ROWS].clone()
            samples = machine.samples({candidate.name: step}, plan.seconds_per_point, rounds=STEPS)
        error = _bench.relative_error(logits, limits["exact"][done])
        limit = NEAR_DENSE[candidate.bits] * limits["wrong"]
        checks = [_bench.at_most(candidate.name, "logits near DynamicCache", error, limit)]
        if candidate.kind == "ours":
            only_fused = cache.routes["decode_dequantized"] == 0 and cache.routes["decode_fused"] > 0
            checks.append(_bench.is_true(candidate.name, "every step took the fused route", only_fused))
    except Exception as error:
        if candidate.kind == "ours":
            report.fault({"section": section, **where}, candidate.name, error)
        else:
            report.skip(section, {**where, "name": candidate.name}, error)
        return None
    finally:
        cache = logits = step = None
        gc.collect()
    passed = report.accept({"section": section, **where}, checks)
    return _bench.summary(samples[candidate.name], 1.0)["median"] if candidate.name in passed else None


def _limits(machine, model, plan, report: Report, where: dict, batch: int, length: int) -> dict | None:
    """Logits with the dense cache, and how far those of a cache with wrong keys are from them."""
    dense = candidates(machine, plan)[0]
    exact = _logits(machine, model, dense, plan, batch, length)
    wrong = _bench.relative_error(_logits(machine, model, dense, plan, batch, length, roll=1), exact)
    control = _bench.at_most("control", "a cache with wrong keys is far from dense", -wrong, -CONTROL)
    return {"exact": exact, "wrong": wrong} if report.accept(where, [control]) else None


@torch.no_grad()
def step(machine, plan, report: Report, deadline: Deadline, model: LlamaForCausalLM) -> None:
    """Milliseconds of a whole decode step at batch 1, by context."""
    for length in plan.step_contexts:
        where = {"context": length, "batch": 1}
        if deadline.left() < 0:
            report.skip("step", where, "no time left")
            continue
        report.attempt(
            {"section": "step", **where}, lambda where=where: _step_point(machine, model, plan, report, where)
        )


def _step_point(machine, model, plan, report: Report, where: dict) -> None:
    length, base = where["context"], None
    limits = _limits(machine, model, plan, report, {"section": "step", **where}, 1, length)
    if limits is None:
        return
    # Each is added at once: what comes after it may end the process.
    for candidate in candidates(machine, plan):
        t = _measure(machine, model, plan, report, "step", where, candidate, 1, length, limits)
        if t is None:
            continue
        base = t if candidate.name == BASELINE else base
        row = {**where, "name": candidate.name, "ms": t * 1e3}
        report.add("step", [row | {"faster_than_dynamic": None if base is None else base / t}])


@torch.no_grad()
def prefill_step(machine, plan, report: Report, deadline: Deadline, model: LlamaForCausalLM) -> None:
    """Milliseconds of a whole prefill: what quantizing the prompt adds to it."""
    for length in plan.prompts:
        where = {"length": length}
        if deadline.left() < 0:
            report.skip("prefill_step", where, "no time left")
            continue
        report.attempt(
            {"section": "prefill_step", **where},
            lambda where=where: _prefill_point(machine, model, plan, report, where),
        )


def _prefill_point(machine, model, plan, report: Report, where: dict) -> None:
    length = where["length"]
    ids = torch.randint(plan.vocabulary, (1, length), device=machine.device)
    calls, checks, exact = {}, [], None
    for candidate in candidates(machine, plan):
        if candidate.kind == "rival" or candidate.captured:
            continue

        def forward(candidate=candidate, ids=ids, length=length):
            cache = candidate.build(model.config, length + 64)
            with switched(model, cache):
                return model(input_ids=ids, **{CACHE: cache}, logits_to_keep=1).logits[:, -1]

        try:
            logits = forward()
        except Exception as error:
            if candidate.name == BASELINE:
                raise
            report.fault({"section": "prefill_step", **where}, candidate.name, error)
            continue
        exact = logits if exact is None else exact
        error = _bench.relative_error(logits, exact)
        checks.append(_bench.at_most(candidate.name, "prefill is exact", error, 0.01))
        calls[candidate.name] = forward
    passed = report.accept({"section": "prefill_step", **where}, checks)
    calls = {name: call for name, call in calls.items() if name in passed}
    samples = machine.samples(calls, plan.seconds_per_point)
    times = {name: _bench.summary(samples[name], 1.0)["median"] for name in calls}
    for name, seconds in times.items():
        row = {**where, "name": name, "ms": seconds * 1e3, "overhead": seconds / times[BASELINE] - 1}
        report.add("prefill_step", [row])


@torch.no_grad()
def throughput(machine, plan, report: Report, deadline: Deadline, model: LlamaForCausalLM) -> None:
    """Tokens per second as the batch grows, each cache up to the batch whose cache fits into the same memory."""
    length = plan.memory_context
    for candidate in candidates(machine, plan):
        if not candidate.captured and candidate.name != BASELINE:
            continue
        try:
            per_sequence = cache_bytes(machine, model, candidate, plan, length)
        except Exception as error:
            if candidate.kind == "rival":
                report.skip("throughput", {"name": candidate.name}, error)
            else:
                report.fault({"section": "throughput"}, candidate.name, error)
            continue
        largest = plan.cache_bytes // per_sequence
        for batch in batches_up_to(largest):
            where = {"context": length, "batch": batch, "largest_batch": largest}
            if deadline.left() < 0:
                report.skip("throughput", {**where, "name": candidate.name}, "no time left")
                break
            point = {"section": "throughput", **where, "name": candidate.name}
            report.attempt(
                point,
                lambda where=where, candidate=candidate, per_sequence=per_sequence: _throughput_point(
                    machine, model, plan, report, where, candidate, per_sequence
                ),
            )


def _throughput_point(machine, model, plan, report: Report, where: dict, candidate: Candidate, per_sequence: int):
    batch, length = where["batch"], where["context"]
    limits = _limits(machine, model, plan, report, {"section": "throughput", **where}, batch, length)
    if limits is None:
        return
    t = _measure(machine, model, plan, report, "throughput", where, candidate, batch, length, limits)
    if t is not None:
        row = {**where, "name": candidate.name, "ms": t * 1e3, "tokens_per_s": batch / t}
        report.add("throughput", [row | {"cache_gib": batch * per_sequence / 2**30}])


def batches_up_to(largest: int) -> list[int]:
    """Powers of four, and the largest."""
    found = [b for b in (1, 4, 16, 64) if b < largest]
    return [*found, largest] if largest else []


def cache_bytes(machine, model, candidate: Candidate, plan, length: int) -> int:
    """Bytes that a cache of one sequence takes."""
    from bench_generate import tensor_bytes

    cache = candidate.build(model.config, length + ROOM)
    fill(machine, cache, plan, 1, length)
    return tensor_bytes(cache)
