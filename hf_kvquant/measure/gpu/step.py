"""The GPU suite's sections on whole models: a decode step, a prefill, and tokens per second at equal cache memory.

The model has the shape of Llama-3-8B and random weights. Every cache gets the same random K and V in one update, as a
prefill would; a candidate is timed only if its logits are near those of `DynamicCache`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import Cache, LlamaForCausalLM

from ...host import CACHE
from ..caches import DENSE, Candidate, Dense, Preset, dense_caches, peers
from ..checks import at_most, is_true, relative_error
from ..step import NEAR_DENSE, filled, switched
from ..weighing import tensor_bytes
from .clock import median
from .points import Deadline, Report

# A cache with wrong keys has at least this error.
CONTROL = 0.3
STEPS = 8
# A captured step runs a few times for warm-up; the first step that is checked is among this many.
CHECKED_STEPS = 4
# The room of a cache beyond the tokens that it is filled with: for warm-up, check and timing.
ROOM = 64
# The sequences of a batch that are compared with the dense cache; all of a large batch would not fit beside the model.
CHECKED_ROWS = 4


def candidates(machine, plan) -> list[Candidate]:
    """Caches to compare; a step of a static cache is replayed as a CUDA graph, theirs and ours alike."""
    dense, _, static = dense_caches(torch.bfloat16)
    configs = plan.configs(machine)
    fixed = [Preset(f"{name}-static", replace(config, static=True)) for name, config in configs.items()]
    captured = [candidate.running("captured") for candidate in (static, *fixed)]
    growing = [Preset(name, config) for name, config in configs.items()]
    return [dense, captured[0], *peers(["transformers-fp8"]), *growing, *captured[1:]]


def stepper(machine, model, candidate: Candidate, cache: Cache, batch: int) -> Callable[[], torch.Tensor]:
    """A decode step: one forward pass for one token per sequence; returns its logits `[batch, vocab_size]`."""
    token = torch.full((batch, 1), 7, device=machine.device)

    def step() -> torch.Tensor:
        return model(input_ids=token, **{CACHE: cache}).logits[:, -1]

    return machine.graphed(step) if candidate.steps == "captured" else step


def _logits(machine, model, plan, batch: int, length: int, roll: int = 0) -> torch.Tensor:
    """Logits of the dense cache's first steps for the first sequences, `[CHECKED_STEPS, CHECKED_ROWS, vocab_size]`."""
    options = {"roll": roll, "rows": CHECKED_ROWS}
    cache = filled(Dense(), model.config, plan.shape(machine, batch), length, STEPS, **options)
    step = stepper(machine, model, Dense(), cache, min(batch, CHECKED_ROWS))
    return torch.stack([step() for _ in range(CHECKED_STEPS)])


def _measure(machine, model, plan, report: Report, section: str, where: dict, candidate: Candidate, batch: int,
             length: int, limits: dict) -> float | None:  # fmt: skip
    """Seconds of a step, after its checks; None if it failed, could not run or was wrong."""
    cache: Any = None
    logits = step = None
    try:
        cache = filled(candidate, model.config, plan.shape(machine, batch), length, ROOM)
        with switched(model, cache):
            step = stepper(machine, model, candidate, cache, batch)
            # The warm-up steps before a capture.
            done = int(cache.get_seq_length()) - length
            logits = step()[:CHECKED_ROWS].clone()
            samples = machine.samples({candidate.name: step}, plan.seconds_per_point, rounds=STEPS)
        error = relative_error(logits, limits["exact"][done])
        limit = NEAR_DENSE[candidate.bits] * limits["wrong"]
        checks = [at_most(candidate.name, "logits near DynamicCache", error, limit)]
        if candidate.kind == "preset":
            only_fused = cache.routes["decode_dequantized"] == 0 and cache.routes["decode_fused"] > 0
            checks.append(is_true(candidate.name, "every step took the fused route", only_fused))
    except Exception as error:
        if candidate.kind == "preset":
            report.fault({"section": section, **where}, candidate.name, error)
        else:
            report.skip(section, {**where, "name": candidate.name}, error)
        return None
    finally:
        cache = logits = step = None
        gc.collect()
    passed = report.accept({"section": section, **where}, checks)
    return median(samples[candidate.name]) if candidate.name in passed else None


def _limits(machine, model, plan, report: Report, where: dict, batch: int, length: int) -> dict | None:
    """Logits with the dense cache, and the distance of those of a cache with wrong keys."""
    exact = _logits(machine, model, plan, batch, length)
    wrong = relative_error(_logits(machine, model, plan, batch, length, roll=1), exact)
    control = at_most("control", "a cache with wrong keys is far from dense", -wrong, -CONTROL)
    return {"exact": exact, "wrong": wrong} if report.accept(where, [control]) else None


@torch.no_grad()
def step(machine, plan, report: Report, deadline: Deadline, model: LlamaForCausalLM) -> None:
    """Milliseconds of a whole decode step at batch 1, by context."""
    places = [{"context": length, "batch": 1} for length in plan.step_contexts]
    report.each("step", places, deadline, partial(_step_point, machine, model, plan, report))


def _step_point(machine, model, plan, report: Report, where: dict) -> None:
    length, base = where["context"], None
    limits = _limits(machine, model, plan, report, {"section": "step", **where}, 1, length)
    if limits is None:
        return
    # Each result is added at once, because the next one may end the process.
    for candidate in candidates(machine, plan):
        t = _measure(machine, model, plan, report, "step", where, candidate, 1, length, limits)
        if t is None:
            continue
        base = t if candidate.name == DENSE else base
        row = {**where, "name": candidate.name, "ms": t * 1e3}
        report.add("step", [row | {"faster_than_dense": None if base is None else base / t}])


@torch.no_grad()
def prefill_step(machine, plan, report: Report, deadline: Deadline, model: LlamaForCausalLM) -> None:
    """Milliseconds of a whole prefill, which show what quantizing the prompt adds to it."""
    places = [{"length": length} for length in plan.prompts]
    report.each("prefill_step", places, deadline, partial(_prefill_point, machine, model, plan, report))


def _prefill_point(machine, model, plan, report: Report, where: dict) -> None:
    length = where["length"]
    ids = torch.randint(plan.vocabulary, (1, length), device=machine.device)
    calls, checks, exact = {}, [], None
    for candidate in candidates(machine, plan):
        if candidate.kind == "peer" or candidate.steps == "captured":
            continue

        def forward(candidate=candidate, ids=ids, length=length):
            cache = candidate.build(model.config, length + 64)
            with switched(model, cache):
                return model(input_ids=ids, **{CACHE: cache}, logits_to_keep=1).logits[:, -1]

        try:
            logits = forward()
        except Exception as error:
            if candidate.name == DENSE:
                raise
            report.fault({"section": "prefill_step", **where}, candidate.name, error)
            continue
        exact = logits if exact is None else exact
        checks.append(at_most(candidate.name, "prefill is exact", relative_error(logits, exact), 0.01))
        calls[candidate.name] = forward
    passed = report.accept({"section": "prefill_step", **where}, checks)
    calls = {name: call for name, call in calls.items() if name in passed}
    samples = machine.samples(calls, plan.seconds_per_point)
    times = {name: median(samples[name]) for name in calls}
    for name, seconds in times.items():
        row = {**where, "name": name, "ms": seconds * 1e3, "overhead": seconds / times[DENSE] - 1}
        report.add("prefill_step", [row])


@torch.no_grad()
def throughput(machine, plan, report: Report, deadline: Deadline, model: LlamaForCausalLM) -> None:
    """Tokens per second as the batch grows, each cache up to the batch whose cache fits into the same memory."""
    length = plan.memory_context
    for candidate in candidates(machine, plan):
        if candidate.steps != "captured" and candidate.name != DENSE:
            continue
        try:
            per_sequence = tensor_bytes(filled(candidate, model.config, plan.shape(machine), length, ROOM))
        except Exception as error:
            if candidate.kind == "preset":
                report.fault({"section": "throughput"}, candidate.name, error)
            else:
                report.skip("throughput", {"name": candidate.name}, error)
            continue
        largest = plan.cache_bytes // per_sequence
        work = partial(_throughput_point, machine, model, plan, report, candidate=candidate, per_sequence=per_sequence)
        for batch in batches_up_to(largest):
            where = {"context": length, "batch": batch, "largest_batch": largest, "name": candidate.name}
            report.each("throughput", [where], deadline, work)


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
    """Powers of four up to `largest`, and `largest` itself."""
    found = [b for b in (1, 4, 16, 64) if b < largest]
    return [*found, largest] if largest else []
