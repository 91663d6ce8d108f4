"""Everything about the CUDA backend that only a GPU can tell, in one command of less than eight minutes.

    python eval/gpu_suite.py --out DIR

In this order: the machine; correctness of every specialisation against the reference, bytes and attention; decode
attention of int8, fp8 and int4 against torch's SDPA and, where it is installed, FlashInfer (`pip install
flashinfer-python`); writing tokens and prompts; a whole decode step and a whole prefill of a model of Llama-3-8B's
shape with random weights; tokens per second as the batch grows in equal cache memory. Every candidate is checked
before it is timed; one that fails has no figures, and the command ends with 1. What does not fit into the memory or
the time is listed with the reason. DIR/gpu_suite.json holds everything.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import _bench
import _gpu_operator
import _gpu_step
import torch
from _gpu import Deadline, Gpu, Report

RESULT = "gpu_suite.json"


@dataclass(frozen=True)
class Plan:
    """What is measured. `max_bytes` bounds the memory of one point, `cache_bytes` the caches compared at equal memory;
    `seconds` the whole suite, `seconds_per_point` the rounds of one group of timings."""

    presets: tuple[str, ...] = ("int8", "fp8", "int4")
    contexts: tuple[int, ...] = (1024, 4096, 16384, 32768, 65536, 131072)
    batches: tuple[int, ...] = (1, 8, 32)
    q_per_kv: tuple[int, ...] = (1, 8, 4)
    kv_heads: int = 8
    head_dim: int = 128
    other_head_dims: tuple[int, ...] = (64, 80, 96, 112, 192, 256)
    prompts: tuple[int, ...] = (4096, 16384)
    step_contexts: tuple[int, ...] = (1024, 4096, 16384, 32768)
    layers: int = 32
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    vocabulary: int = 128256
    memory_context: int = 8192
    max_bytes: int = 64 << 30
    cache_bytes: int = 16 << 30
    seconds: float = 460.0
    seconds_per_point: float = 1.5


def sections(machine, plan: Plan) -> dict[str, tuple[float, Callable]]:
    """By name: the share of the time after which a section takes up nothing more, and the section."""
    found = {
        "correctness": (0.35, _gpu_operator.correctness),
        "attention": (0.6, _gpu_operator.attention),
        "append": (0.65, _gpu_operator.append),
        "prefill": (0.7, _gpu_operator.prefill),
    }
    models = []

    def with_model(section: Callable) -> Callable:
        def run(machine, plan, report, deadline):
            if not models:
                models.append(_gpu_step.build_model(machine, plan))
            section(machine, plan, report, deadline, models[0])

        return run

    found["step"] = (0.85, with_model(_gpu_step.step))
    found["prefill_step"] = (0.9, with_model(_gpu_step.prefill_step))
    found["throughput"] = (1.0, with_model(_gpu_step.throughput))
    return found


def run(machine, plan: Plan, names: list[str] | None = None) -> dict:
    """All sections, or those that are named; a dict for the result file."""
    began, report, seconds = time.perf_counter(), Report(), {}
    whole = sections(machine, plan)
    for name in names or whole:
        share, section = whole[name]
        start = time.perf_counter()
        section(machine, plan, report, Deadline(share * plan.seconds - (start - began)))
        machine.synchronize()
        gc.collect()
        seconds[name] = time.perf_counter() - start
    return {
        "gpu": machine.facts(),
        "plan": asdict(plan),
        "backend": machine.backend,
        "rows": report.rows,
        "goals": goals(report.rows),
        "checks": report.checks,
        "skipped": report.skipped,
        "seconds": {**seconds, "all": time.perf_counter() - began},
    }


def goals(rows: dict[str, list[dict]]) -> list[dict]:
    """The project's goals for an H200, against the worst row that each is about; no row: no verdict."""
    found = []

    def goal(what: str, limit: float, values: list[float], at_least: bool = False) -> None:
        if values := [value for value in values if value is not None]:
            worst = min(values) if at_least else max(values)
            met = worst >= limit if at_least else worst <= limit
            found.append({"goal": what, "limit": limit, "worst": worst, "met": met})

    long = [
        row
        for row in rows.get("attention", [])
        if row["context"] >= 32768 and row["batch"] <= 8 and row["q_per_kv"] == 4 and row["kind"] == "ours"
    ]
    for name, time_limit, share in (("int8", 0.54, 0.85), ("fp8", 0.54, 0.85), ("int4", 0.31, 0.75)):
        mine = [row for row in long if row["name"] == name]
        goal(f"{name}: time over the best BF16 kernel", time_limit, [row["time_over_best_bf16"] for row in mine])
        goal(f"{name}: share of copy bandwidth", share, [row["share_of_copy_bandwidth"] for row in mine], True)
        captured = f"{name}-static, captured"
        steps = [row for row in rows.get("step", []) if row["name"] == captured and row["context"] >= 4096]
        goal(f"{name}: decode step faster than dynamic", 1.0, [row["faster_than_dynamic"] for row in steps], True)
        prompts = [row for row in rows.get("prefill_step", []) if row["name"] == name and row["length"] >= 4096]
        goal(f"{name}: prefill overhead", 0.02, [row["overhead"] for row in prompts])
    return found


def show(result: dict) -> None:
    gpu = result["gpu"]
    print(f"{gpu['name']}: copies {gpu['copy_gb_per_s']:.0f} GB/s, reads {gpu['read_gb_per_s']:.0f} GB/s")
    columns = {
        "correctness": ["dtype", "cases", "largest_error"],
        "attention": ["us", "gb_per_s", "share_of_copy_bandwidth", "time_over_best_bf16", "host_us"],
        "append": ["us_per_token", "host_us"],
        "prefill": ["us", "share_of_prefill_attention", "over_copy"],
        "step": ["ms", "faster_than_dynamic"],
        "prefill_step": ["ms", "overhead"],
        "throughput": ["ms", "tokens_per_s", "cache_gib"],
    }
    for section, rows in result["rows"].items():
        places = (
            [key for key in ("batch", "context", "length", "q_per_kv", "head_dim") if key in rows[0]] if rows else []
        )
        table = [
            [str(row.get("name", row.get("preset"))), *(_short(row.get(c)) for c in places + columns[section])]
            for row in rows
        ]
        _bench.print_table(section, ["", *places, *columns[section]], table)
    for row in result["goals"]:
        print(f"{'met' if row['met'] else 'NOT MET'}: {row['goal']}: {row['worst']:.3g} (goal {row['limit']:g})")
    for row in result["skipped"]:
        where = ", ".join(f"{key} {value}" for key, value in row.items() if key != "reason")
        print(f"skipped: {where}: {row['reason']}")


def _short(value: object) -> str:
    if isinstance(value, dict):
        value = value["median"]
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None, machine: object | None = None, plan: Plan | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for the result")
    parser.add_argument("--sections", help=f"comma separated, of {', '.join(sections(None, Plan()))}")
    args = parser.parse_args(argv)
    names = args.sections.split(",") if args.sections else None
    if unknown := set(names or ()) - set(sections(None, Plan())):
        parser.error(f"--sections: {sorted(unknown)} are unknown; expected some of {list(sections(None, Plan()))}")
    machine = machine or Gpu()
    args.out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        result = run(machine, plan or Plan(), names)
    document = _bench.document("gpu_suite", [], {"sections": names}, **result)
    document["command"] = "python eval/gpu_suite.py" + (f" --sections {args.sections}" if names else "")
    _bench.write_json(args.out / RESULT, document)
    show(result)
    failed = [check for check in result["checks"] if not check["passed"]]
    print(f"{len(result['checks']) - len(failed)} of {len(result['checks'])} checks passed")
    for check in failed:
        where = ", ".join(f"{key} {value}" for key, value in check.items() if key not in ("passed",))
        print(f"FAILED, so without figures: {where}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
