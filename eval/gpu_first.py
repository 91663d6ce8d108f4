"""The first ten minutes on a GPU: what would end everything else comes first, and what has been learned is kept.

    python eval/gpu_first.py --out DIR

In this order, each in a process of its own and for no longer than its limit: `hf-kvquant info`; the compiled kernels
(all but none are found, if a cache made with the same NVRTC was carried along: KVQUANT_CACHE_DIR); one preset under
`compute-sanitizer`, first memcheck, then racecheck; correctness, then attention at batch 1 and 8 (gpu_suite.py); one
call of `int8` and `int4` at 32k and 128k tokens under `ncu`; attention with splits of other lengths.

DIR/gpu_first.json holds the outcome of every step that has begun, and is written before and after each; DIR/STEP.log
has its output. A step whose tool is missing, or for which there is no time, is listed with the reason, and the others
go on. The command ends with 1 if one failed.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_kvquant import KVQuantConfig
from hf_kvquant.measure import operator
from hf_kvquant.measure.facts import document, without_paths, write_json
from hf_kvquant.measure.tables import print_table

RESULT = "gpu_first.json"
ROOT = Path(__file__).resolve().parents[1]
PRESETS = ("int8", "int4")
SANITIZED = "tests/test_cuda_backend.py::TestOnAGpu::test_attention[int8]"
CLI = "from hf_kvquant.cli import main; main()"
TAIL = 4000


@dataclass(frozen=True)
class Step:
    """A command and the seconds after which it is ended. `tool`: the program that it needs; `file`: where it leaves
    a result of its own, in the folder of results."""

    name: str
    seconds: float
    command: tuple[str, ...]
    tool: str | None = None
    file: str | None = None


def steps(out: Path, python: tuple[str, ...] = (sys.executable,)) -> list[Step]:
    """All steps in order; `python`: the command that runs Python scripts."""

    def suite(sections: str, seconds: float, *options: str) -> Step:
        name, whole = sections, seconds - 10
        command = (*python, str(ROOT / "eval/gpu_suite.py"), "--out", str(out / name), "--sections", sections)
        return Step(name, seconds, (*command, "--seconds", f"{whole:g}", *options), None, f"{name}/gpu_suite.json")

    def sanitized(tool: str) -> Step:
        test = (*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", SANITIZED)
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *test)
        return Step(tool, 60, command, "compute-sanitizer")

    def profiled(preset: str, context: int) -> Step:
        # The first call compiles and loads; the profiler sees the two kernels of a later one.
        kernels = ("-k", "regex:decode_attention|merge_splits", "--launch-skip", "2", "--launch-count", "2")
        options = ("--set", "full", "--clock-control", "none", "--csv", "--page", "details")
        call = (*python, str(Path(__file__)), "--call", preset, str(context))
        return Step(f"ncu-{preset}-{context}", 25, ("ncu", *kernels, *options, *call), "ncu")

    return [
        Step("environment", 30, (*python, "-c", CLI, "info", "--json")),
        Step("kernels", 60, (*python, "-c", CLI, "build", "int8", "fp8", "int4", "--head-dim", "128")),
        sanitized("memcheck"),
        sanitized("racecheck"),
        suite("correctness", 110),
        suite("attention", 90, "--batches", "1,8"),
        *(profiled(preset, context) for context in (32768, 131072) for preset in PRESETS),
        suite("splits", 90, "--batches", "1,8"),
    ]


def run(todo: list[Step], out: Path, seconds: float) -> dict:
    """Run the steps one after the other; `seconds`: for all of them."""
    began, rows = time.time(), []
    found = document("gpu_first", [], {"seconds": seconds}, steps=rows, complete=False)
    found["command"] = "python eval/gpu_first.py"
    for step in todo:
        row = {"step": step.name, "limit_s": step.seconds, "status": "running"}
        row["command"] = without_paths(" ".join(step.command))
        rows.append(row)
        write_json(out / RESULT, found)
        left = seconds - (time.time() - began)
        if step.tool is not None and shutil.which(step.tool) is None:
            row |= {"status": "skipped", "reason": f"there is no {step.tool} on the PATH"}
        elif left <= 0:
            row |= {"status": "skipped", "reason": "no time left"}
        else:
            row |= outcome(step, out, min(step.seconds, left))
        write_json(out / RESULT, found)
    found["complete"] = True
    write_json(out / RESULT, found)
    return found


def outcome(step: Step, out: Path, seconds: float) -> dict:
    """Run one step: its status, seconds, the end of its output, and what a profiler measured."""
    log, began = out / f"{step.name}.log", time.time()
    with log.open("w", encoding="utf-8") as output:
        # A group of its own, because what these commands start must end with them.
        process = subprocess.Popen(
            step.command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    row = {"seconds": time.time() - began, "output": without_paths(text[-TAIL:])}
    if step.file is not None and (out / step.file).exists():
        row["file"] = step.file
    if step.tool == "ncu":
        row["kernels"] = profile(text)
    if code is None:
        return row | {"status": "failed", "reason": f"ended after {seconds:.0f} s"}
    if step.tool == "ncu" and code == 0 and not row["kernels"]:
        return row | {"status": "failed", "reason": "the profiler saw no kernel"}
    return row | ({"status": "passed"} if code == 0 else {"status": "failed", "reason": f"ended with {code}"})


def profile(text: str) -> dict[str, dict[str, str]]:
    """The metrics of each kernel in what `ncu --csv --page details` prints between other lines."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines):
        if row.get("Metric Name"):
            metrics = found.setdefault(row["Kernel Name"], {})
            metrics[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return found


def call(preset: str, context: int, device: str = "cuda") -> None:
    """Attention of one sequence, four times: what the profiler watches."""
    on = {"dtype": torch.bfloat16, "device": torch.device(device)}
    states = operator.fill(KVQuantConfig.preset(preset), *operator.random_states(1, 8, context, 128, **on))
    query = operator.random_query(1, 32, 1, 128, **on)
    for _ in range(4):
        output = operator.attention(query, *states)[0]
    assert output.isfinite().all()


def show(result: dict) -> None:
    rows = [
        [row["step"], row["status"], f"{row.get('seconds', 0):.0f}", row.get("reason", row.get("file", ""))]
        for row in result["steps"]
    ]
    print_table("The first minutes", ["", "status", "seconds", "reason or file"], rows, (0, 1, 3))


def main(argv: list[str] | None = None, python: tuple[str, ...] = (sys.executable,)) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=600.0, help="for all steps (default: 600)")
    parser.add_argument("--steps", help=f"comma separated, of {', '.join(s.name for s in steps(Path()))}")
    parser.add_argument("--call", nargs=2, metavar=("PRESET", "CONTEXT"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.call:
        call(args.call[0], int(args.call[1]))
        return 0
    if args.out is None:
        parser.error("--out is required")
    todo = steps(args.out.resolve(), python)
    if args.steps:
        names = args.steps.split(",")
        if unknown := set(names) - {step.name for step in todo}:
            parser.error(f"--steps: {sorted(unknown)} are unknown; expected some of {[step.name for step in todo]}")
        todo = [step for step in todo if step.name in names]
    args.out.mkdir(parents=True, exist_ok=True)
    result = run(todo, args.out.resolve(), args.seconds)
    show(result)
    return 1 if any(row["status"] == "failed" for row in result["steps"]) else 0


if __name__ == "__main__":
    sys.exit(main())
