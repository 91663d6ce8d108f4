"""Measures everything about the CUDA backend that needs a GPU, in one command of less than eight minutes.

    python eval/gpu_suite.py --out DIR

In this order: the machine; correctness of every specialisation against the reference, bytes and attention; decode
attention of int8, fp8 and int4 against torch's SDPA and, where it is installed, FlashInfer (`pip install
flashinfer-python`); writing tokens and prompts; a whole decode step and a whole prefill of a model of Llama-3-8B's
shape with random weights; tokens per second as the batch grows in equal cache memory. Every candidate is checked
before it is timed; one that fails has no figures, and the command ends with 1. Points that do not fit into the memory
or the time are listed with the reason. DIR/gpu_suite.json holds everything, from the first point on.

Another process does the work, and this one watches it. If that process dies, hangs or loses the device (an address out
of range ends all its work there), this is a failed check, and a new process goes on after that point.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from hf_kvquant.measure.checks import is_true
from hf_kvquant.measure.facts import document, write_json
from hf_kvquant.measure.gpu import goals, operator, step
from hf_kvquant.measure.gpu.clock import Gpu
from hf_kvquant.measure.gpu.points import Deadline, DeviceLost, Plan, Report
from hf_kvquant.measure.step import build_model
from hf_kvquant.measure.tables import print_table

RESULT = "gpu_suite.json"
# The exit status of a process that lost the device.
LOST = 75
# A process without a new point for PATIENCE seconds hangs; the last point may take GRACE seconds more than the time.
PATIENCE, GRACE = 150.0, 15.0
MAX_PROCESSES = 12
# Sections that run only if they are named.
ONLY_NAMED = {"splits"}


def sections(machine, plan: Plan) -> dict[str, tuple[float, Callable]]:
    """The sections by name, each with the share of the time after which it begins no new point, unless it is named."""
    found = {
        "correctness": (0.35, operator.correctness),
        "attention": (0.6, operator.attention),
        "append": (0.65, operator.append),
        "prefill": (0.7, operator.prefill),
    }
    models = []

    def with_model(section: Callable) -> Callable:
        def run(machine, plan, report, deadline):
            if not models:
                models.append(build_model(plan.shape(machine), plan.longest))
            section(machine, plan, report, deadline, models[0])

        return run

    found["step"] = (0.85, with_model(step.step))
    found["prefill_step"] = (0.9, with_model(step.prefill_step))
    found["throughput"] = (1.0, with_model(step.throughput))
    found["splits"] = (1.0, operator.splits)
    return found


def run(
    machine, plan: Plan, names: list[str] | None = None, file: Path | None = None, began: float | None = None
) -> dict:
    """Run all sections, or those that are named; the result is kept in `file` from point to point.

    Args:
        file: the file in which an earlier process may have left its part.
        began: the `time.time()` at which the suite was started.

    Raises:
        DeviceLost: the rest needs another process.
    """
    began = time.time() if began is None else began
    kept = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.exists() else {}
    found = document("gpu_suite", [], {"sections": names})
    found["command"] = "python eval/gpu_suite.py" + (f" --sections {','.join(names)}" if names else "")
    found |= {"gpu": machine.facts(), "plan": asdict(plan), "backend": machine.backend, "complete": False}

    def save() -> None:
        seconds["all"] = time.time() - began
        found.update(report.state(), goals=verdicts(report.rows), seconds=seconds)
        if file is not None:
            write_json(file, found)

    seconds, report = kept.get("seconds", {}), Report(machine, save, kept)
    whole = sections(machine, plan)
    for name in names or [name for name in whole if name not in ONLY_NAMED]:
        share, section = whole[name]
        share = 1.0 if names else share
        start, before = time.time(), seconds.get(name, 0.0)
        report.rows.setdefault(name, [])
        try:
            section(machine, plan, report, Deadline(share * plan.seconds - (start - began)))
        except DeviceLost:
            raise
        except Exception as error:
            # The error came between points, so this section cannot go on.
            report.fault({"section": name}, name, error)
        gc.collect()
        seconds[name] = before + time.time() - start
    found["complete"] = True
    save()
    return found


def verdicts(rows: dict[str, list[dict]]) -> list[dict]:
    """The project's goals for an H200, compared with the worst row of each; without rows there is no verdict."""
    found = []

    def goal(what: str, limit: float, values: list[float], at_least: bool = False) -> None:
        if values := [value for value in values if value is not None]:
            worst = min(values) if at_least else max(values)
            met = worst >= limit if at_least else worst <= limit
            found.append({"goal": what, "limit": limit, "worst": worst, "met": met})

    attention = rows.get("attention", [])
    ours = [row for row in attention if row["kind"] == "ours" and row["batch"] <= 8 and row["q_per_kv"] == 4]
    for name, ratio in goals.OVER_BF16.items():
        mine = [row for row in ours if row["name"] == name and row["context"] >= goals.TIME_FROM]
        long = [row for row in mine if row["context"] >= goals.BF16_FROM]
        goal(f"{name}: time over the best BF16 kernel", ratio, [row["time_over_best_bf16"] for row in long])
        goal(f"{name}: time over what its bytes allow", 1.0, [row["time_over_limit"] for row in mine])
        captured = f"{name}-static-captured"
        steps = [row for row in rows.get("step", []) if row["name"] == captured and row["context"] >= 4096]
        goal(f"{name}: decode step faster than dense", 1.0, [row["faster_than_dense"] for row in steps], True)
        prompts = [row for row in rows.get("prefill_step", []) if row["name"] == name and row["length"] >= 4096]
        goal(f"{name}: prefill overhead", 0.02, [row["overhead"] for row in prompts])
    return found


def show(result: dict) -> None:
    gpu = result["gpu"]
    print(f"{gpu['name']}: copies {gpu['copy_gb_per_s']:.0f} GB/s, reads {gpu['read_gb_per_s']:.0f} GB/s")
    columns = {
        "correctness": ["dtype", "cases", "largest_error"],
        "attention": [
            "us",
            "gb_per_s",
            "share_of_copy_bandwidth",
            "time_over_best_bf16",
            "time_over_limit",
            "host_us",
        ],
        "append": ["us_per_token", "host_us"],
        "prefill": ["us", "share_of_prefill_attention", "over_copy"],
        "step": ["ms", "faster_than_dense"],
        "prefill_step": ["ms", "overhead"],
        "throughput": ["ms", "tokens_per_s", "cache_gib"],
        "splits": ["columns", "us"],
    }
    for section, rows in result["rows"].items():
        places = (
            [key for key in ("batch", "context", "length", "q_per_kv", "head_dim") if key in rows[0]] if rows else []
        )
        table = [
            [str(row.get("name", row.get("preset"))), *(_short(row.get(c)) for c in places + columns[section])]
            for row in rows
        ]
        print_table(section, ["", *places, *columns[section]], table)
    for row in result["goals"]:
        print(f"{'met' if row['met'] else 'NOT MET'}: {row['goal']}: {row['worst']:.3g} (goal {row['limit']:g})")
    for row in result["skipped"]:
        where = ", ".join(f"{key} {value}" for key, value in row.items() if key != "reason")
        print(f"skipped: {where}: {row['reason']}")


def _short(value: object) -> str:
    if isinstance(value, dict):
        value = value["median"]
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def watch(command: list[str], file: Path, seconds: float) -> dict | None:
    """The result of processes that do the work together; None if there is none.

    Args:
        command: the command of a process that keeps its result in `file`, and goes on from there.
        seconds: the time after which no process is started; a running one is ended a little later.
    """
    end = time.time() + seconds
    for _ in range(MAX_PROCESSES):
        points = len(_read(file).get("points", []))
        why = _watch_one(command, file, end + GRACE)
        found = _read(file)
        if found.get("complete"):
            return found
        if not found:
            return None
        last = found["points"][-1] if found["points"] else {"section": "start"}
        check = is_true(last.get("name", last.get("preset", last["section"])), f"the process {why}", False)
        found["checks"].append({**last, **check})
        write_json(file, found)
        if time.time() > end or len(found["points"]) == points:
            break
    return _read(file)


def _watch_one(command: list[str], file: Path, end: float) -> str:
    """Run one process; returns how it ended."""
    process, seen, since = subprocess.Popen(command), None, time.time()
    while process.poll() is None:
        time.sleep(0.2)
        now, changed = time.time(), file.stat().st_mtime_ns if file.exists() else None
        if changed != seen:
            seen, since = changed, now
        if now > end or now - since > PATIENCE:
            process.kill()
            process.wait()
            return "was ended: no time left" if now > end else f"was ended: nothing new for {PATIENCE:.0f} s"
    return "lost the device" if process.returncode == LOST else f"ended with {process.returncode}"


def _read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def main(argv: list[str] | None = None, machine: object | None = None, plan: Plan | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for the result")
    parser.add_argument("--sections", help=f"comma separated, of {', '.join(sections(None, Plan()))}")
    parser.add_argument("--seconds", type=float, help=f"for all sections (default: {Plan.seconds:g})")
    parser.add_argument("--batches", help=f"comma separated (default: {','.join(map(str, Plan.batches))})")
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)  # of a process that is watched
    args = parser.parse_args(argv)
    names = args.sections.split(",") if args.sections else None
    if unknown := set(names or ()) - set(sections(None, Plan())):
        parser.error(f"--sections: {sorted(unknown)} are unknown; expected some of {list(sections(None, Plan()))}")
    if machine is None and not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    args.out.mkdir(parents=True, exist_ok=True)
    file, plan = args.out / RESULT, plan or Plan()
    options = []
    if args.seconds is not None:
        plan, options = replace(plan, seconds=args.seconds), ["--seconds", str(args.seconds)]
    if args.batches:
        plan = replace(plan, batches=tuple(map(int, args.batches.split(","))))
        options += ["--batches", args.batches]
    options += ["--sections", args.sections] if names else []
    if machine is None and args.began is None:
        file.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--out", str(args.out), "--began", str(time.time())]
        return verdict(watch(command + options, file, plan.seconds))
    if args.began is None:
        file.unlink(missing_ok=True)
    try:
        with torch.no_grad():
            result = run(machine or Gpu(), plan, names, file, args.began)
    except DeviceLost:
        return LOST
    return verdict(result) if args.began is None else 0


def verdict(result: dict | None) -> int:
    """Show a result; returns the exit status."""
    if result is None:
        print("there is no result: the first process ended before its first point", file=sys.stderr)
        return 1
    show(result)
    failed = [check for check in result["checks"] if not check["passed"]]
    print(f"{len(result['checks']) - len(failed)} of {len(result['checks'])} checks passed")
    for check in failed:
        where = ", ".join(f"{key} {value}" for key, value in check.items() if key not in ("passed",))
        print(f"FAILED, so without figures: {where}")
    if not result["complete"]:
        print("NOT COMPLETE: what is shown is all that was measured")
    return 1 if failed or not result["complete"] else 0


if __name__ == "__main__":
    sys.exit(main())
