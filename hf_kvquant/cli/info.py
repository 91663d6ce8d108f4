"""`hf-kvquant info`: what runs on this machine, and why."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from .. import ops
from ..backends import AUTO
from ..config import KVQuantConfig
from ..quantization import QuantSpec

HEAD_DIM = 128
# Those that matter to the kernels, as Linux names them.
_CPU_FEATURES = [
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("avx_vnni", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve", "bf16"),
]
_OPENMP_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
) -> None:
    """Show which backend runs here and why, the machine, versions and presets."""
    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    console = Console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for device, chosen in facts["backends"].items():
        table.add_row(f"{device} backend", f"[green]{chosen['chosen'] or 'none'}[/]  {chosen['why']}")
        for name, value in chosen.get("library", {}).items():
            table.add_row("", f"[dim]{name}: {', '.join(value) if isinstance(value, list) else value}[/]")
    machine = facts["machine"]
    table.add_row("processor", machine["cpu"])
    table.add_row("features", " ".join(machine["cpu_features"]) or "unknown")
    table.add_row("cores", f"{machine['cores']}, torch threads {machine['torch_threads']}")
    table.add_row("OpenMP", machine["openmp"])
    table.add_row("GPU", machine["gpu"])
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    console.print(table)

    presets = Table(
        title=f"Presets (bits per cached number at head_dim {HEAD_DIM}, scales included)", title_justify="left"
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
    """All that `info` shows, as plain data."""
    return {
        "backends": {"cpu": _cpu_backend(), "cuda": _cuda_backend()},
        "machine": machine(),
        "versions": versions(),
        "presets": {name: describe(KVQuantConfig.preset(name)) for name in KVQuantConfig.preset_names()},
    }


def _cpu_backend() -> dict:
    chosen = ops.choose_backend(AUTO, "cpu", torch.float32)
    if chosen != "cpu":
        return {
            "chosen": chosen,
            "why": f"plain PyTorch, slow; the compiled one cannot run: {ops.backend_status('cpu')}",
        }
    from ..backends import cpu

    library = cpu.info()
    return {"chosen": chosen, "why": f"compiled, instruction set {library['isa']}", "library": library}


def _cuda_backend() -> dict:
    from ..backends import cuda

    library = cuda.info()
    if not torch.cuda.is_available():
        return {"chosen": None, "why": ops.backend_status("cuda"), "library": library}
    chosen = ops.choose_backend(AUTO, "cuda", torch.bfloat16)
    if chosen == "cuda":
        return {"chosen": chosen, "why": "compiled for each GPU at first use", "library": library}
    why = f"plain PyTorch, slow; the compiled one cannot run: {ops.backend_status('cuda')}"
    return {"chosen": chosen, "why": why, "library": library}


def machine() -> dict:
    """The processor, its features, cores that we may use, torch's threads and how they wait, and the GPU or "none"."""
    fields = _proc_cpuinfo()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cpu_features": [name for name in _CPU_FEATURES if name in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "openmp": openmp(),
        "gpu": _gpu(),
    }


def openmp() -> str:
    """The environment's settings of torch's threads, and what they do while they wait for each other.

    Where another process keeps a core, a thread that spins until the others are ready takes the time that they need.
    """
    settings = " ".join(f"{name}={os.environ[name]}" for name in _OPENMP_SETTINGS if name in os.environ)
    if not torch.backends.openmp.is_available():
        return f"not used by this torch {settings}".strip()
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive" or os.environ.get("GOMP_SPINCOUNT") == "0":
        return f"{settings}: waiting threads sleep"
    return f"{settings or 'default settings'}: waiting threads spin (OMP_WAIT_POLICY=passive lets them sleep)"


def _proc_cpuinfo() -> dict[str, str]:
    """The first processor in /proc/cpuinfo; empty where there is none."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").partition("\n\n")[0].splitlines() if file.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    gpu = torch.cuda.get_device_properties(0)
    return f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"


def versions(more: Iterable[str] = ()) -> dict[str, str]:
    """Of this package and what it stands on, and of other packages by name."""
    return {
        "hf_kvquant": _version("hf_kvquant", "not installed (run from its source folder)"),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        **{package: _version(package) for package in more},
    }


def _version(package: str, missing: str = "not installed") -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return missing


def describe(config: KVQuantConfig) -> dict:
    """What a config says, in words beside the fields themselves."""
    exactly = []
    if config.sink_length:
        exactly.append(f"first {config.sink_length}")
    if config.recent_length:
        exactly.append(f"last {config.recent_length}")
    if config.keys.is_channel:
        exactly.append("keys of the unfinished block")
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
