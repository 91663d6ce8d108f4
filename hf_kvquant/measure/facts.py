"""The facts in a result file about how it was made (command, machine, versions), and writing such files."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..saving import whole_file

PEER_PACKAGES = ("optimum-quanto", "hqq")
# CPU features that matter to the kernels, by their names on Linux.
_CPU_FEATURES = [
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("avx_vnni", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve", "bf16"),
]
_OPENMP_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
# Limits of the instruction sets of torch's own kernels, of oneDNN and of MKL.
_TORCH_SETTINGS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def document(benchmark: str, argv: list[str], arguments: dict, **fields) -> dict:
    """A benchmark's result: how and on which machine it was made, then `fields`."""
    return {
        "benchmark": benchmark,
        "command": command(benchmark, argv),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(["numpy", *PEER_PACKAGES]),
        "arguments": arguments,
        **fields,
    }


def command(benchmark: str, argv: list[str]) -> str:
    """The command line without `--out`, and with file names in place of absolute paths."""
    kept, skip = [], False
    for word in argv:
        if not skip and word != "--out" and not word.startswith("--out="):
            kept.append(word)
        skip = word == "--out"
    return without_paths(shlex.join(["python", f"eval/bench_{benchmark}.py", *kept]))


def without_paths(text: str) -> str:
    """`text` with the folders of absolute paths left out."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s/'\",]+/)+", "", text)


def machine() -> dict:
    """The processor, its features and caches, usable cores, torch's threads and how they wait, the instruction set of
    torch's kernels, the GPU or "none", and how busy all of it was. It has no name or path of the host."""
    fields = _proc_cpuinfo()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "cpu_features": [name for name in _CPU_FEATURES if name in flags],
        "caches": [f"L{level} {kind} {size >> 10} KiB" for level, kind, size in processor_caches()],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "openmp": openmp(),
        "torch": torch_instructions(),
        "gpu": _gpu(),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else [],
    }


def openmp() -> str:
    """The environment's settings of torch's threads, and what the threads do while they wait for each other.

    If another process keeps a core busy, a thread that spins until the others are ready takes the time they need.
    """
    settings = " ".join(f"{name}={os.environ[name]}" for name in _OPENMP_SETTINGS if name in os.environ)
    if not torch.backends.openmp.is_available():
        return f"not used by this torch {settings}".strip()
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive" or os.environ.get("GOMP_SPINCOUNT") == "0":
        return f"{settings}: waiting threads sleep"
    return f"{settings or 'default settings'}: waiting threads spin (OMP_WAIT_POLICY=passive lets them sleep)"


def torch_instructions() -> str:
    """The instruction set of torch's own CPU kernels, and the environment's limits of theirs, oneDNN's and MKL's."""
    limits = (f"{name}={os.environ[name]}" for name in _TORCH_SETTINGS if name in os.environ)
    return " ".join([torch.backends.cpu.get_cpu_capability(), *limits])


def _proc_cpuinfo() -> dict[str, str]:
    """The first processor in /proc/cpuinfo; empty if there is none."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").partition("\n\n")[0].splitlines() if file.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def processor_caches() -> list[tuple[int, str, int]]:
    """Level, kind and bytes of each cache that the first core sees; empty if the system does not say."""
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        found.append((int(level), kind.lower(), int(size.rstrip("KM")) << (20 if size.endswith("M") else 10)))
    return found


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    gpu = torch.cuda.get_device_properties(0)
    return f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"


def versions(more: Iterable[str] = ()) -> dict[str, str]:
    """Versions of this package and of those that it needs, and of more packages by name."""
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


def added(before: list[dict], caches: list[str], machine: dict, versions: dict) -> list[dict]:
    """The field `added` of a result: which of its caches were measured later than the others, and where.

    Args:
        before: the field so far; caches that were measured again leave their old entries.
        caches: the names of those measured now.
    """
    others = [{**entry, "caches": [name for name in entry["caches"] if name not in caches]} for entry in before]
    entries = [*others, {"caches": caches, "machine": machine, "versions": versions}]
    return [entry for entry in entries if entry["caches"]]


def rounded(data: Any, digits: int) -> Any:
    """Plain data with every float rounded to `digits` significant digits."""
    if isinstance(data, float):
        return float(f"{data:.{digits}g}")
    if isinstance(data, dict):
        return {name: rounded(value, digits) for name, value in data.items()}
    return [rounded(value, digits) for value in data] if isinstance(data, list) else data


def read_json(file: Path) -> dict:
    """The content of a JSON file.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(file)!r} cannot be read as JSON: {error}") from error


def write_json(file: str | Path, data: dict) -> None:
    """Write the file as a whole or not at all."""
    write_text(file, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def write_text(file: str | Path, text: str) -> None:
    """Write the file as a whole or not at all."""
    with whole_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
