"""`hf-kvquant info`: what runs on this machine, and why."""

from __future__ import annotations

import json
import platform
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from .. import ops
from ..config import KVQuantConfig
from ..measure.facts import machine, versions
from ..quantization import DENSE, FORMATS, QuantSpec

HEAD_DIM = 128


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
    issue: Annotated[bool, typer.Option("--issue", help="Print a block to quote in an issue, without paths.")] = False,
) -> None:
    """Show which backend runs here and why, the machine, versions and presets."""
    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    if issue:
        print(quoted(facts))
        return
    console = Console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for device, chosen in facts["backends"].items():
        table.add_row(f"{device} backend", f"[green]{chosen['chosen'] or 'none'}[/]  {chosen['why']}")
        for name, value in chosen.get("library", {}).items():
            table.add_row("", f"[dim]{name}: {', '.join(value) if isinstance(value, list) else value}[/]")
    for row in _machine(facts):
        table.add_row(*row)
    console.print(table)

    presets = Table(
        title=f"Presets (bits per cached element at head_dim {HEAD_DIM}, scales included)", title_justify="left"
    )
    presets.add_column("preset", style="bold", no_wrap=True)
    presets.add_column("bits", justify="right")
    for column in ("keys", "values", "read exactly"):
        presets.add_column(column, overflow="fold")
    for name, preset in facts["presets"].items():
        presets.add_row(
            name, f"{preset['bits_per_element']:g}", preset["keys"], preset["values"], preset["read_exactly"]
        )
    console.print(presets)


def collect() -> dict:
    """Everything that `info` shows, as plain data."""
    return {
        "backends": {"cpu": _cpu_backend(), "cuda": _cuda_backend()},
        "machine": machine(),
        "versions": versions(),
        "presets": {name: describe(KVQuantConfig.preset(name)) for name in KVQuantConfig.preset_names()},
    }


def quoted(facts: dict) -> str:
    """The facts that someone who reads an issue needs, as a Markdown block."""
    backends = [
        (f"{device} backend", f"{x['chosen'] or 'none'}, {x['why']}") for device, x in facts["backends"].items()
    ]
    rows = [*backends, ("system", platform.platform()), *_machine(facts)]
    return "\n".join(["```text", *(f"{name + ':':14}{value}" for name, value in rows), "```"])


def _machine(facts: dict) -> list[tuple[str, str]]:
    here = facts["machine"]
    return [
        ("processor", here["cpu"]),
        ("features", " ".join(here["cpu_features"]) or "unknown"),
        ("cores", f"{here['cores']}, torch threads {here['threads']}"),
        ("OpenMP", here["openmp"]),
        ("GPU", here["gpu"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())),
    ]


def _cpu_backend() -> dict:
    reason = ops.backend_status("cpu")
    if reason is not None:
        return {"chosen": "reference", "why": f"plain PyTorch, slow; the compiled one cannot run: {reason}"}
    from ..backends import cpu

    library = cpu.info() | {"formats": [*FORMATS, DENSE]}
    return {"chosen": "cpu", "why": f"compiled, instruction set {library['isa']}", "library": library}


def _cuda_backend() -> dict:
    from ..backends import cuda

    library = cuda.info() | {"formats": [*FORMATS, DENSE]}
    reason = ops.backend_status("cuda")
    if not torch.cuda.is_available():
        return {"chosen": None, "why": reason, "library": library}
    if reason is None:
        return {"chosen": "cuda", "why": "compiled for each GPU at first use", "library": library}
    why = f"plain PyTorch, slow; the compiled one cannot run: {reason}"
    return {"chosen": "reference", "why": why, "library": library}


def describe(config: KVQuantConfig) -> dict:
    """The fields of a config, with a description in words."""
    exactly = []
    if config.sink_length:
        exactly.append(f"first {config.sink_length}")
    if config.recent_length:
        exactly.append(f"last {config.recent_length}")
    in_blocks = [name for name in ("keys", "values") if getattr(config, name).is_channel]
    if in_blocks:
        exactly.append(f"{' and '.join(in_blocks)} of the unfinished block")
    return {
        "bits_per_element": config.bits_per_element(HEAD_DIM),
        "keys": _side(config.keys),
        "values": _side(config.values),
        "read_exactly": ", ".join(exactly) or "nothing",
        "config": config.to_dict(),
    }


def _side(spec: QuantSpec) -> str:
    if spec.is_dense:
        return spec.format
    if spec.is_channel:
        return f"{spec.format}, per channel and {spec.block_length} tokens"
    group = "head" if spec.group_size is None else f"{spec.group_size} channels"
    return f"{spec.format}, per token and {group}" + (", rotated" if spec.rotate else "")
