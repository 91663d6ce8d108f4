"""The GPU suite without a GPU: its plan, checks and result on a stand-in machine, whose kernels are the CPU backend's.

No time is asserted, and these figures mean nothing.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
from transformers import DynamicCache

from hf_kvquant import KVQuantConfig, ops
from hf_kvquant.measure.caches import grids
from hf_kvquant.measure.gpu import clock, goals, operator, points, step
from hf_kvquant.measure.step import build_model
from hf_kvquant.quantization import FORMATS

EVAL = Path(__file__).parents[1] / "eval"


class StandIn:
    """A `gpu.clock.Gpu` for the suite, on the processor; `graphed` counts captures."""

    backend = "cpu"
    device = torch.device("cpu")

    def __init__(self):
        self.captured = 0

    def facts(self):
        return {"name": "stand-in", "copy_gb_per_s": 10.0, "read_gb_per_s": 10.0}

    def samples(self, tasks, seconds, rounds=2):
        found = {name: [] for name in tasks}
        for _ in range(2):
            for name, task in tasks.items():
                start = time.perf_counter()
                task()
                found[name].append(time.perf_counter() - start)
        return found

    def graphed(self, call):
        self.captured += 1
        return call

    def free_bytes(self):
        return 8 << 30

    def synchronize(self):
        pass

    def is_alive(self):
        return True


@pytest.fixture
def suite(monkeypatch):
    """The suite with few host calls, imported as a script."""
    monkeypatch.syspath_prepend(str(EVAL))
    monkeypatch.setattr(clock, "HOST_CALLS", 2)
    return __import__("gpu_suite")


@pytest.fixture
def tiny(suite):
    return suite.Plan(
        presets=("int8", "fp8"), contexts=(130, 200), batches=(1, 2), q_per_kv=(1, 2), kv_heads=2, head_dim=32,
        other_head_dims=(48,), prompts=(70,), step_contexts=(130,), layers=2, hidden=64, intermediate=64, heads=4,
        vocabulary=64, memory_context=1000, cache_bytes=1_500_000, seconds=300.0, seconds_per_point=0.01,
    )  # fmt: skip


@pytest.fixture
def brief(tiny, monkeypatch):
    """`tiny` with a few of the cases in which formats are compared with the reference, for tests of what fails."""
    monkeypatch.setattr(operator, "CASES", operator.CASES[:2])
    return tiny


def run(suite, plan, tmp_path, *arguments: str, code: int = 0) -> dict:
    assert suite.main(["--out", str(tmp_path), *arguments], StandIn(), plan) == code
    return json.loads((tmp_path / "gpu_suite.json").read_text(encoding="utf-8"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_at_once(suite, tmp_path):
    with pytest.raises(SystemExit) as left:
        suite.main(["--out", str(tmp_path / "out")])
    assert left.value.code == "no CUDA device"
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_measures(suite, tmp_path):
    assert suite.main(["--out", str(tmp_path), "--sections", "append"]) == 0


def test_the_result(suite, tiny, tmp_path, capsys):
    result = run(suite, tiny, tmp_path)
    text = capsys.readouterr().out
    assert set(result["rows"]) == set(suite.sections(None, tiny)) - suite.ONLY_NAMED
    assert result["checks"]
    assert all(check["passed"] for check in result["checks"])
    assert f"{len(result['checks'])} of {len(result['checks'])} checks passed" in text
    assert result["backend"] == "cpu"
    assert result["plan"]["contexts"] == [130, 200]
    written = json.dumps(result)
    assert all(private not in written for private in (str(Path.home()), str(EVAL.parent), str(tmp_path)))

    rows = result["rows"]
    # Every format and grid in both dtypes with every case, presets at the other head_dim, which int3 and int2 refuse.
    variants = len(grids()) + len(FORMATS)
    assert len(rows["correctness"]) == 2 * variants + len(KVQuantConfig.preset_names()) - 2
    assert {row["head_dim"] for row in rows["correctness"]} == {32, 48}
    assert all(row["largest_error"] < 0.004 for row in rows["correctness"])

    points = {(row["batch"], row["context"], row["q_per_kv"]) for row in rows["attention"] if row["name"] == "int8"}
    assert points == {(b, c, q) for b in (1, 2) for c in (130, 200) for q in (1, 2)}
    for row in rows["attention"]:
        assert row["gb_per_s"] == pytest.approx(row["bytes_read"] / row["us"]["median"] / 1e3)
        assert row["share_of_copy_bandwidth"] == pytest.approx(row["gb_per_s"] / 10)
        assert row["kind"] == ("ours" if row["name"] in tiny.presets else "rival")
        assert ("host_us" in row) == (row["kind"] == "ours")
    here = [row for row in rows["attention"] if (row["batch"], row["context"], row["q_per_kv"]) == (1, 130, 1)]
    best = min(row["us"]["median"] for row in here if row["kind"] == "rival" and "fp8" not in row["name"])
    for row in here:
        assert row["time_over_best_bf16"] == pytest.approx(row["us"]["median"] / best)
    # Two heads, keys and values of 32 codes and one float16 scale.
    assert next(row for row in here if row["name"] == "fp8")["bytes_read"] == 2 * 2 * 130 * (32 + 2)

    assert {row["name"] for row in rows["append"]} == {"static cache", *tiny.presets}
    assert {row["name"] for row in rows["prefill"]} == {"prefill attention", "copy of K and V", *tiny.presets}
    captured = {f"{name}-static-captured" for name in tiny.presets}
    assert {row["name"] for row in rows["step"]} >= {"dense", "dense-static-captured", *tiny.presets, *captured}
    assert {row["name"] for row in rows["prefill_step"]} == {"dense", *tiny.presets}
    largest = {row["name"]: row["batch"] for row in rows["throughput"]}
    assert largest["fp8-static-captured"] > largest["dense-static-captured"]
    for row in rows["throughput"]:
        assert row["cache_gib"] * 2**30 <= tiny.cache_bytes
        assert row["batch"] <= row["largest_batch"]
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["ms"] * 1e3)

    missing = {row["name"]: row["reason"] for row in result["skipped"] if row["section"] == "attention"}
    assert {"flashinfer-bfloat16", "flashinfer-fp8"} <= set(missing) | {row["name"] for row in rows["attention"]}
    assert all(missing.values())


def failures(result: dict) -> set[tuple[str, str]]:
    return {(check["section"], check["check"]) for check in result["checks"] if not check["passed"]}


def test_wrong_attention_has_no_figures(suite, brief, tmp_path, monkeypatch, capsys):
    """If one preset is off by 1 %, its rows are gone and those of the others stay."""
    right = ops.decode_attention

    def wrong(query, keys, values, *args, **kwargs):
        output, logsumexp = right(query, keys, values, *args, **kwargs)
        return (output * 1.01 if keys.backend == "cpu" and keys.spec.format == "fp8" else output), logsumexp

    monkeypatch.setattr(ops, "decode_attention", wrong)
    result = run(suite, brief, tmp_path, "--sections", "correctness,attention", code=1)
    assert ("correctness", "attention against the reference") in failures(result)
    assert ("attention", "attention against float32") in failures(result)
    names = {row["name"] for row in result["rows"]["attention"]}
    assert "int8" in names and "fp8" not in names
    assert not [row for row in result["rows"]["correctness"] if row["preset"] in ("fp8", "fp8-channel")]
    assert "FAILED, so without figures" in capsys.readouterr().out


def test_wrong_log_sum_exp_and_nan_are_found(suite, brief, tmp_path, monkeypatch):
    right = ops.decode_attention

    def wrong(query, keys, values, *args, **kwargs):
        output, logsumexp = right(query, keys, values, *args, **kwargs)
        if keys.backend == "cpu":
            output, logsumexp = output * torch.nan, logsumexp + 0.1
        return output, logsumexp

    monkeypatch.setattr(ops, "decode_attention", wrong)
    plan = suite.Plan(**{**brief.__dict__, "batches": (1,), "contexts": (130,)})
    result = run(suite, plan, tmp_path, "--sections", "correctness,attention", code=1)
    checks = {check for _, check in failures(result)}
    assert {"attention against the reference", "log-sum-exp against the reference"} <= checks
    assert result["rows"]["correctness"] == []
    assert not {row["name"] for row in result["rows"]["attention"]} & set(brief.presets)


def test_a_result_that_changes_is_found(suite, brief, tmp_path, monkeypatch):
    right, calls = ops.decode_attention, []

    def restless(query, keys, values, *args, **kwargs):
        output, logsumexp = right(query, keys, values, *args, **kwargs)
        calls.extend([1] * (keys.backend == "cpu"))
        return output * (1 + 2.0**-7 * (len(calls) % 2)), logsumexp

    monkeypatch.setattr(ops, "decode_attention", restless)
    result = run(suite, brief, tmp_path, "--sections", "correctness", code=1)
    assert ("correctness", "a second call gives the same bits") in failures(result)


def test_wrong_bytes_have_no_figures(suite, brief, tmp_path, monkeypatch):
    right = ops.quantize_append

    def wrong(key, value, keys, values, *args, **kwargs):
        right(key, value, keys, values, *args, **kwargs)
        if keys.backend == "cpu" and keys.spec.is_channel:
            values.data[0, 0, kwargs["start"], 0] ^= 1

    monkeypatch.setattr(ops, "quantize_append", wrong)
    result = run(suite, brief, tmp_path, "--sections", "correctness,append,prefill", code=1)
    for section in ("correctness", "append", "prefill"):
        assert (section, "appended values: data has the reference's bytes") in failures(result)
        names = {row.get("name", row.get("preset")) for row in result["rows"][section]}
        assert "fp8" in names and "int8" not in names


def test_a_step_that_reads_wrong_keys_has_no_figures(suite, tiny, tmp_path, monkeypatch):
    right = ops.decode_attention

    def wrong(query, keys, values, *args, **kwargs):
        return tuple(x.flip(1) for x in right(query, keys, values, *args, **kwargs))

    monkeypatch.setattr(ops, "decode_attention", wrong)
    result = run(suite, tiny, tmp_path, "--sections", "step", code=1)
    assert ("step", "logits near DynamicCache") in failures(result)
    assert "dense" in {row["name"] for row in result["rows"]["step"]}
    assert not {row["name"] for row in result["rows"]["step"]} & set(tiny.presets)


def test_an_error_ends_its_candidate_alone(suite, brief, tmp_path, monkeypatch):
    """In every section an error of int8 is a failed check, and fp8 has its figures."""
    right, append = ops.decode_attention, ops.quantize_append

    def broken(query, keys, *args, **kwargs):
        if keys.backend == "cpu" and keys.spec.format == "int8" and not keys.spec.is_channel:
            raise RuntimeError(f"no kernel for {Path.home()}/int8")
        return right(query, keys, *args, **kwargs)

    def short(key, value, keys, *args, **kwargs):
        if keys.backend == "cpu" and keys.spec.format == "int8" and key.shape[-1] == 48:
            raise torch.OutOfMemoryError("out of memory")
        append(key, value, keys, *args, **kwargs)

    monkeypatch.setattr(ops, "decode_attention", broken)
    monkeypatch.setattr(ops, "quantize_append", short)
    plan = suite.Plan(**{**brief.__dict__, "presets": ("int8-plain", "fp8"), "contexts": (130,), "batches": (1,)})
    result = run(suite, plan, tmp_path, "--sections", "correctness,attention,step,throughput", code=1)
    assert result["complete"]
    assert {section for section, _ in failures(result)} == {"correctness", "attention", "step", "throughput"}
    assert {check for _, check in failures(result)} == {"runs: RuntimeError: no kernel for int8"}
    for section in ("attention", "step", "throughput"):
        names = {row["name"] for row in result["rows"][section]}
        assert any("fp8" in name for name in names) and not any("int8" in name for name in names)
    assert "fp8" in {row["preset"] for row in result["rows"]["correctness"]}
    assert {row["preset"] for row in result["skipped"] if "OutOfMemory" in row["reason"]} == {"int8", "int8-plain"}


WORKER = """
import os, sys
sys.path[:0] = [{eval!r}, {tests!r}]
import gpu_suite, test_gpu_suite
from hf_kvquant.measure.gpu import clock, operator
clock.HOST_CALLS = 2
point = operator._attention_point

def dies(machine, plan, report, facts, where):
    if where == dict(batch=1, context=200):
        os._exit(5)
    point(machine, plan, report, facts, where)

operator._attention_point = dies
plan = gpu_suite.Plan(presets=("fp8",), contexts=(130, 200), batches=(1, 2), q_per_kv=(1,), kv_heads=2, head_dim=32,
                      seconds_per_point=0.01)
sys.exit(gpu_suite.main(sys.argv[1:], test_gpu_suite.StandIn(), plan))
"""


def test_a_process_that_ends_is_followed_by_another(suite, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", processes.environment()["PYTHONPATH"])
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(eval=str(EVAL), tests=str(Path(__file__).parent)))
    command = [sys.executable, "-W", "ignore", str(script), "--out", str(tmp_path), "--sections", "attention"]
    result = suite.watch([*command, "--began", str(time.time())], tmp_path / suite.RESULT, 300.0)
    assert result["complete"]
    points = {(row["batch"], row["context"]) for row in result["rows"]["attention"] if row["name"] == "fp8"}
    assert points == {(1, 130), (2, 130), (2, 200)}
    failed = [(c["batch"], c["context"], c["check"]) for c in result["checks"] if not c["passed"]]
    assert failed == [(1, 200, "the process ended with 5")]
    assert suite.verdict(result) == 1
    assert "FAILED, so without figures: section attention, batch 1, context 200" in capsys.readouterr().out


def test_a_process_that_lost_the_device_ends(suite, tiny, tmp_path, monkeypatch):
    """It ends with the results so far, and the next process leaves out the point at which that happened."""
    machine, calls = StandIn(), []

    def lost(*_):
        calls.append(1)
        raise RuntimeError("an illegal memory access was encountered")

    point = operator._attention_point
    monkeypatch.setattr(operator, "_attention_point", lost)
    machine.is_alive = lambda: False
    arguments = ["--out", str(tmp_path), "--sections", "attention", "--began", str(time.time())]
    assert suite.main(arguments, machine, tiny) == suite.LOST
    assert len(calls) == 1
    left = json.loads((tmp_path / suite.RESULT).read_text(encoding="utf-8"))
    assert not left["complete"]
    assert failures(left) == {("attention", "runs: RuntimeError: an illegal memory access was encountered")}
    monkeypatch.setattr(operator, "_attention_point", point)
    assert suite.main(arguments, StandIn(), tiny) == 0
    result = json.loads((tmp_path / suite.RESULT).read_text(encoding="utf-8"))
    assert result["complete"]
    assert failures(result) == failures(left)
    points = {(row["batch"], row["context"]) for row in result["rows"]["attention"]}
    assert points == {(1, 200), (2, 130), (2, 200)}


def test_a_process_that_hangs_is_ended(suite, tmp_path, monkeypatch):
    """One process does nothing new, another one goes on when the time is over; existing results are kept."""
    monkeypatch.setattr(suite, "PATIENCE", 4.0)
    monkeypatch.setattr(suite, "GRACE", 1.0)
    file = tmp_path / suite.RESULT
    document = {"checks": [], "points": [{"section": "attention"}], "complete": False}
    beside = tmp_path / "beside"
    beside.write_text(json.dumps(document))
    # Written as a whole or not at all, as in the suite.
    script = f"import os, shutil, time; made = {str(file) + '.part'!r}\n"
    script += f"def save(): shutil.copyfile({str(beside)!r}, made); os.replace(made, {str(file)!r})\n"
    for loop, seconds, why in (
        ("save(); time.sleep(60)", 60.0, "nothing new for 4 s"),
        ("while True: save(); time.sleep(0.3)", 5.0, "no time left"),
    ):
        began = time.time()
        file.unlink(missing_ok=True)
        result = suite.watch([sys.executable, "-c", script + loop], file, seconds)
        assert time.time() - began < 40
        assert not result["complete"]
        assert result["checks"][0]["check"] == f"the process was ended: {why}"
    assert suite.watch([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "none.json", 5.0) is None
    assert suite.verdict(None) == 1


def test_large_batches_are_compared_with_a_dense_cache_of_a_few(suite, tiny, monkeypatch):
    """A dense cache of the batch that only int4 has room for would not fit beside the model."""
    monkeypatch.setattr(step, "CHECKED_ROWS", 2)
    machine, report = StandIn(), points.Report()
    model, seen, update = build_model(tiny.shape(machine), tiny.longest), [], DynamicCache.update

    def note(cache, key_states, *args, **options):
        seen.append((type(cache), key_states.shape[0]))
        return update(cache, key_states, *args, **options)

    monkeypatch.setattr(DynamicCache, "update", note)
    candidate = next(c for c in step.candidates(machine, tiny) if c.name == "fp8-static-captured")
    where = {"batch": 5, "context": 130}
    with torch.no_grad():
        step._throughput_point(machine, model, tiny, report, where, candidate, 1000)
    assert {batch for cache, batch in seen if cache is DynamicCache} == {2}
    assert [row["batch"] for row in report.rows["throughput"]] == [5]
    assert all(check["passed"] for check in report.checks)


def test_what_does_not_fit_is_skipped_with_the_reason(suite, tiny, tmp_path):
    plan = suite.Plan(**{**tiny.__dict__, "max_bytes": 400_000})
    result = run(suite, plan, tmp_path, "--sections", "attention")
    reasons = [row["reason"] for row in result["skipped"] if "name" not in row]
    assert reasons
    assert all("GiB of" in reason for reason in reasons)
    late = suite.Plan(**{**tiny.__dict__, "seconds": 0.0})
    result = run(suite, late, tmp_path, "--sections", "correctness,attention,prefill,step,throughput")
    assert {row["section"] for row in result["skipped"] if row["reason"] == "no time left"} >= {
        "correctness", "attention", "prefill", "step", "throughput",
    }  # fmt: skip
    assert not any(result["rows"].values())


def test_goals_are_judged_by_their_worst_row(suite):
    def row(name, context, ratio, over, batch=1, q_per_kv=4):
        where = {"batch": batch, "context": context, "q_per_kv": q_per_kv, "kind": "ours", "name": name}
        return {**where, "time_over_best_bf16": ratio, "time_over_limit": over}

    rows = [row("int8", 65536, 0.5, 0.9), row("int8", 131072, 0.6, 0.95, batch=8), row("int8", 1024, 2.0, 3.0)]
    rows += [row("int8", 4096, 2.0, 0.97)]  # too short for the first goal
    rows += [row("int4", 65536, 0.3, 1.1), row("int4", 65536, 9.0, 9.0, q_per_kv=8)]
    verdicts = {goal["goal"]: (goal["worst"], goal["met"]) for goal in suite.verdicts({"attention": rows})}
    assert verdicts == {
        "int8: time over the best BF16 kernel": (0.6, False),
        "int8: time over what its bytes allow": (0.97, True),
        "int4: time over the best BF16 kernel": (0.3, True),
        "int4: time over what its bytes allow": (1.1, False),
    }


def test_a_time_limit_is_that_of_the_bytes_and_an_overhead():
    """At 1000 GB/s, 85 MB take 85 us; a goal of 85 percent allows 100 and the overhead."""
    assert goals.time_limit("int8", 85e6, 1000.0) == pytest.approx(100 + goals.OVERHEAD_US)
    assert goals.time_limit("int4", 0, 1000.0) == goals.OVERHEAD_US


def test_static_caches_are_captured(suite, tiny, tmp_path):
    machine = StandIn()
    assert suite.main(["--out", str(tmp_path), "--sections", "step"], machine, tiny) == 0
    candidates = step.candidates(machine, tiny)
    assert machine.captured == sum(c.steps == "captured" for c in candidates) == 1 + len(tiny.presets)


def test_an_unknown_section_is_named(suite, tmp_path, capsys):
    with pytest.raises(SystemExit):
        suite.main(["--out", str(tmp_path), "--sections", "speed"], StandIn())
    assert "--sections: ['speed'] are unknown" in capsys.readouterr().err
