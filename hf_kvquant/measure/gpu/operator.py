"""The GPU suite's sections on the operators: correctness of every specialisation, attention, append and prefill."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ...backends import gpu_refusal, nvrtc
from ...backends.arguments import DTYPES as CODES
from ...backends.specialisation import Specialisation, for_source, specialisation, split_length, splits_of
from ...config import KVQuantConfig
from ...quantization import FORMATS, QuantSpec
from ...states import QuantizedStates
from .. import operator
from ..caches import grids
from ..checks import at_most, is_true, relative_error
from ..clock import summary
from . import goals
from .clock import host_seconds, median
from .points import Deadline, Report

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
BASELINE_LIMIT = {"sdpa": 0.01, "flashinfer-bfloat16": 0.01, "flashinfer-fp8": 0.1}
# The memory of one point of the attention section, as a multiple of its BF16 cache.
MEMORY_FACTOR = 5.0


# ---- correctness ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call of the operator that is compared with the reference."""

    kv_len: int = 1000
    batch: int = 2
    q_per_kv: int = 4
    q_len: int = 1
    mask: str = "none"
    softcap: float = 0.0
    learned_sinks: bool = False

    def __str__(self) -> str:
        words = [f"{self.batch}x{self.q_per_kv}x{self.q_len} over {self.kv_len}"]
        words += [f"mask {self.mask}"] * (self.mask != "none") + ["softcap"] * bool(self.softcap)
        return ", ".join(words + ["learned sinks"] * self.learned_sinks)


CASES = [
    Case(),
    Case(kv_len=2, batch=1),
    Case(kv_len=130, q_len=16, q_per_kv=1),
    Case(kv_len=777, q_per_kv=8, mask="padding", softcap=20.0),
    Case(kv_len=1500, q_len=7, q_per_kv=3, mask="additive", learned_sinks=True),
]


def specialisations(plan) -> Iterator[tuple[str, KVQuantConfig, int, str, list[Case]]]:
    """Every format and grid at the plan's head_dim in both dtypes with all cases; at each of the other head dims the
    presets that take it."""
    channels = {name: QuantSpec(name, "channel") for name in FORMATS}
    values = {f"{name}-channel-values": KVQuantConfig(keys=spec, values=spec) for name, spec in channels.items()}
    for name, config in (grids() | values).items():
        for dtype in DTYPES:
            yield name, config, plan.head_dim, dtype, CASES
    for head_dim in plan.other_head_dims:
        for name in KVQuantConfig.preset_names():
            config = KVQuantConfig.preset(name)
            if not gpu_refusal(config.keys, config.values, (head_dim, head_dim)):
                yield name, config, head_dim, "bfloat16", CASES[:1]


def correctness(machine, plan, report: Report, deadline: Deadline) -> None:
    """Bytes against the reference on the CPU, attention against the reference over the same bytes."""
    work = list(specialisations(plan))
    report.attempt({"section": "correctness", "name": "compile"}, lambda: precompile(machine, work))
    report.add("correctness", [])
    for name, config, head_dim, dtype, cases in work:
        where = {"preset": name, "head_dim": head_dim, "dtype": dtype}
        config = replace(config, backend=machine.backend)
        report.each("correctness", [where], deadline, partial(_correct, machine, report, config, cases))


def _correct(machine, report: Report, config, cases: list[Case], where: dict) -> None:
    worst, passed = 0.0, 0
    for case in cases:
        here = {"section": "correctness", **where, "case": str(case)}
        try:
            checks, difference = _check(machine, where["preset"], config, where["head_dim"], where["dtype"], case)
        except Exception as error:
            report.fault(here, where["preset"], error)
            continue
        passed += bool(report.accept(here, checks))
        worst = max(worst, difference)
    if passed == len(cases):
        report.add("correctness", [{**where, "cases": passed, "largest_error": worst}])


def precompile(machine, work) -> None:
    """Compile all kernels at once, on all cores: one after the other they would take longer than everything else."""
    if machine.backend != "cuda":
        return
    arch = nvrtc.architecture(*torch.cuda.get_device_capability(machine.device))
    kinds = {
        specialisation(CODES[DTYPES[dtype]], config.keys.resolve(d), config.values.resolve(d), d, d)
        for _, config, d, dtype, _ in work
    }

    def compile_one(job: tuple[str, Specialisation]) -> None:
        # A kernel that does not compile raises again where it is used.
        with contextlib.suppress(nvrtc.CompileError):
            nvrtc.compiled(*job, arch)

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, [(s, k) for kind in kinds for s in nvrtc.SOURCES for k in for_source(s, kind)]))


def _check(machine, name: str, config, head_dim: int, dtype: str, case: Case) -> tuple[list[dict], float]:
    on = {"dtype": DTYPES[dtype], "device": machine.device}
    key, value = operator.random_states(case.batch, 2, case.kv_len, head_dim, **on)
    query = operator.random_query(case.batch, 2 * case.q_per_kv, min(case.q_len, case.kv_len), head_dim, **on)
    states = operator.fill(config, key, value, min(3, case.kv_len - 1))
    checks = _check_bytes(name, states, config, key, value)
    attend = partial(operator.attention, mask=_mask(case, query), s_aux=_sinks(case, query), softcap=case.softcap)
    output = attend(query, *states)
    exact = attend(query.float(), *(replace(s, dtype=torch.float32, backend="reference") for s in states))
    same = torch.equal(output[0], attend(query, *states)[0])
    checks += operator.check_output(name, output, exact)
    checks.append(is_true(name, "a second call gives the same bits", same))
    return checks, relative_error(output[0], exact[0])


def _check_bytes(
    name: str, states: Sequence[QuantizedStates], config, key: torch.Tensor, value: torch.Tensor
) -> list[dict]:
    expected = operator.reference_fill(config, key, value)
    return operator.check_bytes(name, (states[0].to("cpu"), states[1].to("cpu")), expected)


def _mask(case: Case, query: torch.Tensor) -> torch.Tensor | None:
    batch, _, q_len, _ = query.shape
    if case.mask == "padding":
        first = torch.arange(batch, device=query.device) * (case.kv_len // 3)
        return torch.arange(case.kv_len, device=query.device) >= first[:, None]
    if case.mask == "additive":
        generator = torch.Generator(query.device).manual_seed(2)
        mask = torch.randn(1, 1, q_len, case.kv_len, generator=generator, device=query.device, dtype=query.dtype)
        return mask.masked_fill(mask < -1, torch.finfo(mask.dtype).min)
    return None


def _sinks(case: Case, query: torch.Tensor) -> torch.Tensor | None:
    return torch.linspace(-2, 6, query.shape[1], device=query.device) if case.learned_sinks else None


# ---- attention -----------------------------------------------------------------------------------------------------


def attention(machine, plan, report: Report, deadline: Deadline) -> None:
    """Decode attention of one query per sequence: ours, torch's SDPA, FlashInfer."""
    facts = machine.facts()
    for batch in plan.batches:
        for context in plan.contexts:
            where = {"batch": batch, "context": context}
            dense_bytes = 4 * batch * plan.kv_heads * context * plan.head_dim
            room = min(plan.max_bytes, 0.8 * machine.free_bytes())
            if dense_bytes * MEMORY_FACTOR > room:
                needs = f"needs {dense_bytes * MEMORY_FACTOR / 2**30:.0f} GiB of {room / 2**30:.0f}"
                report.skip("attention", where, needs)
            else:
                report.each("attention", [where], deadline, partial(_attention_point, machine, plan, report, facts))


def _attention_point(machine, plan, report: Report, facts: dict, where: dict) -> None:
    batch, context = where["batch"], where["context"]
    on = {"dtype": torch.bfloat16, "device": machine.device}
    key, value = operator.random_states(batch, plan.kv_heads, context, plan.head_dim, **on)
    stored = {name: operator.fill(config, key, value) for name, config in plan.configs(machine).items()}
    for q_per_kv in plan.q_per_kv:
        here = {**where, "q_per_kv": q_per_kv}
        query = operator.random_query(batch, plan.kv_heads * q_per_kv, 1, plan.head_dim, **on)
        calls, nbytes = {}, {}
        for name, call in dense_calls(query, key, value).items():
            calls[name], nbytes[name] = call, key.nbytes + value.nbytes
        for name, make in flashinfer_calls(query, key, value).items():
            try:
                calls[name] = make()
                nbytes[name] = (key.nbytes + value.nbytes) // (2 if "fp8" in name else 1)
            except Exception as error:
                report.skip("attention", {**here, "name": name}, error)
        for name, (keys, values) in stored.items():
            calls[name] = lambda q=query, k=keys, v=values: operator.attention(q, k, v)[0]
            nbytes[name] = operator.bytes_read(keys) + operator.bytes_read(values)
        checks = []
        for name in list(calls):
            try:
                checks.append(_check_call(name, calls[name], query, key, value, stored))
            except Exception as error:
                del calls[name]
                if name in stored:
                    report.fault({"section": "attention", **here}, name, error)
                else:
                    report.skip("attention", {**here, "name": name}, error)
        passed = report.accept({"section": "attention", **here}, checks)
        calls = {name: call for name, call in calls.items() if name in passed}
        samples = machine.samples(calls, plan.seconds_per_point)
        best = min((median(samples[n]) for n in calls if n not in stored and "fp8" not in n), default=None)
        rows = []
        for name in calls:
            seconds = median(samples[name])
            row = {**here, "name": name, "kind": "ours" if name in stored else "rival", "bytes_read": nbytes[name]}
            row |= {"us": summary(samples[name], 1e-6), "gb_per_s": nbytes[name] / seconds / 1e9}
            row |= {"share_of_copy_bandwidth": row["gb_per_s"] / facts["copy_gb_per_s"]}
            row |= {"time_over_best_bf16": None if best is None else seconds / best}
            if name in goals.SHARE_OF_COPY:
                limit = goals.time_limit(name, nbytes[name], facts["copy_gb_per_s"])
                row["time_over_limit"] = seconds * 1e6 / limit
            if name in stored:
                row["host_us"] = host_seconds(machine, calls[name]) * 1e6
            rows.append(row)
        report.add("attention", rows)


def splits(machine, plan, report: Report, deadline: Deadline) -> None:
    """Attention with splits of other lengths than the backend's: what it would gain or lose."""
    report.attempt({"section": "splits", "name": "compile"}, partial(_precompile_splits, machine, plan))
    report.add("splits", [])
    places = [{"batch": batch, "context": context} for context in plan.split_contexts for batch in plan.batches]
    for where in places:
        needs = MEMORY_FACTOR * 2 * where["batch"] * plan.kv_heads * where["context"] * plan.head_dim
        room = min(plan.max_bytes, 0.8 * machine.free_bytes())
        if needs > room:
            report.skip("splits", where, f"needs {needs / 2**30:.0f} GiB of {room / 2**30:.0f}")
        else:
            report.each("splits", [where], deadline, partial(_splits_point, machine, plan, report))


def _precompile_splits(machine, plan) -> None:
    configs = plan.configs(machine)
    for columns in plan.splits:
        with splits_of(columns):
            precompile(machine, [(name, config, plan.head_dim, "bfloat16", []) for name, config in configs.items()])


def _splits_point(machine, plan, report: Report, where: dict) -> None:
    on = {"dtype": torch.bfloat16, "device": machine.device}
    key, value = operator.random_states(where["batch"], plan.kv_heads, where["context"], plan.head_dim, **on)
    stored = {name: operator.fill(config, key, value) for name, config in plan.configs(machine).items()}
    query = operator.random_query(where["batch"], plan.kv_heads * plan.q_per_kv[-1], 1, plan.head_dim, **on)
    calls = {name: partial(operator.attention, query, *states) for name, states in stored.items()}
    expected = {name: call()[0] for name, call in calls.items()}
    ours = split_length(where["context"], plan.kv_heads)
    for columns in sorted({*plan.splits, ours}):
        here = {**where, "columns": columns, "is_ours": columns == ours}
        with splits_of(columns) if columns in plan.splits else contextlib.nullcontext():
            outputs = {name: call()[0] for name, call in calls.items()}
            checks = [
                at_most(name, "near the default split", relative_error(outputs[name], expected[name]), 0.01)
                for name in calls
            ]
            passed = report.accept({"section": "splits", **here}, checks)
            samples = machine.samples({name: calls[name] for name in passed}, plan.seconds_per_point / 3)
        report.add("splits", [{**here, "name": name, "us": summary(samples[name], 1e-6)} for name in samples])


def dense_calls(query, key, value) -> dict[str, Callable[[], torch.Tensor]]:
    """SDPA over dense caches with the query heads of a KV head packed, with every kernel that torch has for it."""

    def call(dtype: torch.dtype, backend: SDPBackend | None) -> Callable[[], torch.Tensor]:
        states = [x.to(dtype) for x in (query, key, value)]

        def attend():
            with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
                return operator.sdpa(*states)

        return attend

    return {
        "sdpa-flash-bfloat16": call(torch.bfloat16, SDPBackend.FLASH_ATTENTION),
        "sdpa-flash-float16": call(torch.float16, SDPBackend.FLASH_ATTENTION),
        "sdpa-cudnn-bfloat16": call(torch.bfloat16, SDPBackend.CUDNN_ATTENTION),
        "sdpa-bfloat16": call(torch.bfloat16, None),
    }


def flashinfer_calls(query, key, value, page_size: int = 16) -> dict[str, Callable[[], Callable]]:
    """FlashInfer's decode over a paged cache, in BF16 and FP8: functions that make the call, or raise the reason."""
    batch, kv_heads, length, head_dim = key.shape

    def make(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        import flashinfer

        pages = -(-length // page_size)

        def paged(x: torch.Tensor) -> torch.Tensor:
            x = torch.nn.functional.pad(x, (0, 0, 0, pages * page_size - length))
            return x.view(batch, kv_heads, pages, page_size, head_dim).transpose(1, 2).flatten(0, 1).to(dtype)

        cache = paged(key), paged(value)
        first = torch.arange(batch + 1, dtype=torch.int32, device=key.device) * pages
        every = torch.arange(batch * pages, dtype=torch.int32, device=key.device)
        last = torch.full((batch,), length - (pages - 1) * page_size, dtype=torch.int32, device=key.device)
        workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=key.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(
            first, every, last, query.shape[1], kv_heads, head_dim, page_size,
            q_data_type=query.dtype, kv_data_type=dtype,
        )  # fmt: skip
        rows = query[:, :, 0].contiguous()
        return lambda: wrapper.run(rows, cache)[:, :, None]

    return {
        "flashinfer-bfloat16": lambda: make(torch.bfloat16),
        "flashinfer-fp8": lambda: make(torch.float8_e4m3fn),
    }


def _check_call(name: str, call: Callable, query, key, value, stored: dict) -> dict:
    """Compare the output with float32 on the first and the last KV head; all heads would not fit into memory."""
    output = call()
    q_per_kv = query.shape[1] // key.shape[1]
    worst = 0.0
    for row, head in {(0, 0), (key.shape[0] - 1, key.shape[1] - 1)}:
        rows, heads = slice(row, row + 1), slice(head, head + 1)
        queries = slice(head * q_per_kv, (head + 1) * q_per_kv)
        q = query[rows, queries].float()
        if name in stored:
            exact, _ = operator.reference_attention(q, *(operator.part(s, rows, heads) for s in stored[name]))
        else:
            exact = operator.sdpa(q, key[rows, heads].float(), value[rows, heads].float())
        worst = max(worst, relative_error(output[rows, queries].float(), exact))
    limit = operator.TOLERANCE if name in stored else BASELINE_LIMIT.get(name, BASELINE_LIMIT["sdpa"])
    return at_most(name, "attention against float32", worst, limit)


# ---- append and prefill --------------------------------------------------------------------------------------------


def append(machine, plan, report: Report, deadline: Deadline) -> None:
    """Writing one token (a run that completes a block, in a CUDA graph), compared with a copy into a static cache."""
    places = [{"batch": batch, "context": plan.contexts[0]} for batch in plan.batches]
    report.each("append", places, deadline, partial(_append_point, machine, plan, report))


def _append_point(machine, plan, report: Report, where: dict) -> None:
    on = {"dtype": torch.bfloat16, "device": machine.device}
    key, value = operator.random_states(where["batch"], plan.kv_heads, plan.contexts[0] + 64, plan.head_dim, **on)
    start = plan.contexts[0] // 64 * 64
    run = range(start, start + 64)
    tokens = [(key[:, :, t : t + 1].clone(), value[:, :, t : t + 1].clone()) for t in run]
    places = [torch.tensor([t], device=machine.device) for t in run]
    static = [torch.empty_like(key), torch.empty_like(value)]

    def copy(tokens=tokens, static=static, places=places):
        for place, pair in zip(places, tokens):
            for side, x in zip(static, pair):
                side.index_copy_(2, place, x)

    calls, checks = {"static cache": copy}, [is_true("static cache", "nothing to check", True)]
    one = slice(0, 1), slice(0, 1)
    for name, config in plan.configs(machine).items():
        states = operator.fill(config, key[:, :, :start], value[:, :, :start], room=128)
        calls[name] = operator.append(tokens, states, start)
        faults = calls[name]()
        ours = tuple(operator.part(side, *one, length=run.stop) for side in states)
        checks += _check_bytes(name, ours, config, *(x[one][:, :, : run.stop] for x in (key, value)))
        checks.append(is_true(name, "no faults", not faults.any().item()))
    passed = report.accept({"section": "append", **where}, checks)
    graphs = {name: machine.graphed(call) for name, call in calls.items() if name in passed}
    samples = machine.samples(graphs, plan.seconds_per_point)
    for name in graphs:
        host = host_seconds(machine, lambda call=calls[name]: call()) * 1e6 / 64
        us = summary(samples[name], 64e-6)
        report.add("append", [{**where, "name": name, "us_per_token": us, "host_us": host}])


def prefill(machine, plan, report: Report, deadline: Deadline) -> None:
    """Quantizing a prompt, compared with the attention of its prefill and with a copy of its K and V."""
    places = [{"length": length} for length in plan.prompts]
    report.each("prefill", places, deadline, partial(_prefill_point, machine, plan, report))


def _prefill_point(machine, plan, report: Report, where: dict) -> None:
    length, on = where["length"], {"dtype": torch.bfloat16, "device": machine.device}
    key, value = operator.random_states(1, plan.kv_heads, length, plan.head_dim, **on)
    query = operator.random_query(1, plan.kv_heads * plan.q_per_kv[-1], length, plan.head_dim, **on)
    calls = {
        "prefill attention": lambda: scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),
        "copy of K and V": lambda: (key.clone(), value.clone()),
    }
    checks = [is_true(name, "nothing to check", True) for name in calls]
    one = slice(None), slice(0, 1)
    for name, config in plan.configs(machine).items():
        # Filled with other tokens, so that the checked bytes were written by the timed call.
        states = operator.fill(config, value, key)
        calls[name] = operator.append([(key, value)], states, 0)
        calls[name]()
        ours = tuple(operator.part(side, *one) for side in states)
        checks += _check_bytes(name, ours, config, key[one], value[one])
    passed = report.accept({"section": "prefill", **where}, checks)
    calls = {name: call for name, call in calls.items() if name in passed}
    samples = machine.samples(calls, plan.seconds_per_point)
    times = {name: median(samples[name]) for name in calls}
    for name, seconds in times.items():
        row = {**where, "name": name, "us": summary(samples[name], 1e-6)}
        row["share_of_prefill_attention"] = seconds / times["prefill attention"]
        row["over_copy"] = seconds / times["copy of K and V"]
        report.add("prefill", [row])
