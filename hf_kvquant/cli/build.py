"""`hf-kvquant build`: compile the CUDA kernels ahead of time, so that the first token does not wait for them.

The compiled kernels are kept where the backend looks for them. No GPU is needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..backends import disk_cache, nvrtc
from ..backends.arguments import DTYPES
from ..backends.specialisation import Specialisation, for_source, specialisation
from ..config import KVQuantConfig
from ..quantization import QuantSpec

_DTYPES = {str(dtype).removeprefix("torch."): number for dtype, number in DTYPES.items() if number}


@dataclass(frozen=True)
class Unit:
    """One source file to compile, for one architecture and specialisation."""

    arch: str
    source: str
    kind: Specialisation


def build(
    configs: Annotated[
        list[str] | None, typer.Argument(help="Presets or YAML files.", show_default="every preset")
    ] = None,
    archs: Annotated[
        list[str] | None, typer.Option("--arch", help="Such as sm_90; repeat for more.", show_default="the GPUs here")
    ] = None,
    head_dims: Annotated[list[int] | None, typer.Option("--head-dim", help="Repeat for more.")] = None,
    dtypes: Annotated[list[str] | None, typer.Option("--dtype", help="Dtype of the model; repeat for more.")] = None,
    page_sizes: Annotated[
        list[int] | None,
        typer.Option("--page-size", min=64, help="Also for continuous batching with such pages; repeat for more."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Parallel compilations.", show_default="cores")] = None,
) -> None:
    """Compile the CUDA kernels ahead of time (default: head_dim 64 and 128, bfloat16)."""
    if reason := nvrtc.missing():
        raise typer.BadParameter(reason)
    units = [
        Unit(arch, source, one)
        for arch in _archs(archs)
        for kind in kinds(
            configs or KVQuantConfig.preset_names(), head_dims or [64, 128], dtypes or ["bfloat16"], page_sizes or []
        )
        for source in nvrtc.SOURCES
        for one in for_source(source, kind)
    ]
    console = Console()
    done: dict[Unit, nvrtc.Compiled] = {}
    failed: list[str] = []
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=console, transient=True) as progress,
        ThreadPoolExecutor(jobs or os.cpu_count()) as pool,
    ):
        task = progress.add_task("Compiling", total=len(units))
        futures = {pool.submit(nvrtc.compiled, unit.source, unit.kind, unit.arch): unit for unit in units}
        for future in as_completed(futures):
            unit = futures[future]
            try:
                done[unit] = future.result()
            except nvrtc.CompileError as error:
                failed.append(str(error))
            progress.update(task, advance=1, description=f"{unit.arch} {unit.kind}")
    _show([(unit, done[unit]) for unit in units if unit in done], console)
    fresh = sum(not found.cached for found in done.values())
    console.print(
        f"{fresh} compiled, {len(done) - fresh} found in {disk_cache.folder()}.", soft_wrap=True, highlight=False
    )
    for message in failed:
        console.print(f"[red]failed[/]: {message}", soft_wrap=True, highlight=False)
    if failed:
        raise typer.Exit(1)


def kinds(configs: list[str], head_dims: list[int], dtypes: list[str], page_sizes: list[int]) -> list[Specialisation]:
    """The different specialisations that these configs need, their layers' overrides included, without pages and with
    pages of these sizes.

    Raises:
        typer.BadParameter: a config, head_dim or dtype is unknown.
    """
    found: dict[Specialisation, None] = {}
    for dtype in dtypes:
        if dtype not in _DTYPES:
            raise typer.BadParameter(f"--dtype: {dtype!r} is not supported; expected one of {list(_DTYPES)}")
        for head_dim in head_dims:
            for name in configs:
                try:
                    for keys, values in _sides(KVQuantConfig.load(name)):
                        sides = keys.resolve(head_dim), values.resolve(head_dim)
                        for size in (0, *page_sizes):
                            found[specialisation(_DTYPES[dtype], *sides, head_dim, head_dim, page_length=size)] = None
                except ValueError as error:
                    raise typer.BadParameter(f"{name}: {error}") from error
    return list(found)


def _sides(config: KVQuantConfig) -> Iterator[tuple[QuantSpec, QuantSpec]]:
    yield config.keys, config.values
    for layer_idx, _ in config.layers:
        yield config.for_layer(layer_idx)


def _archs(named: list[str] | None) -> list[str]:
    if named:
        for arch in named:
            if arch not in nvrtc.architectures():
                known = f"NVRTC {nvrtc.version_name()} knows {', '.join(nvrtc.architectures())}"
                raise typer.BadParameter(f"--arch: {arch!r} is not supported; {known}")
        return list(dict.fromkeys(named))
    if not torch.cuda.is_available():
        raise typer.BadParameter("--arch: there is no GPU here to compile for; name one, such as --arch sm_90")
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    try:
        return [nvrtc.architecture(*capability) for capability in sorted(capabilities)]
    except RuntimeError as error:
        raise typer.BadParameter(f"--arch: {error}") from error


def _show(results: list[tuple[Unit, nvrtc.Compiled]], console: Console) -> None:
    """Print a table for each specialisation, below its name: as a column, the name would not fit into 80 columns."""
    for kind in dict.fromkeys(unit.kind for unit, _ in results):
        console.print(str(kind), highlight=False)
        console.print(_table([result for result in results if result[0].kind == kind]))


def _table(results: list[tuple[Unit, nvrtc.Compiled]]) -> Table:
    table = Table(box=box.SIMPLE)
    for column in ("arch", "kernel"):
        table.add_column(column, no_wrap=True)
    for column in ("registers", "spills", "shared", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for unit, found in results:
        # The kernels of one file are compiled together, so only the first row has this cell.
        seconds = "cached" if found.cached else f"{found.seconds:.2f}"
        for kernel, usage in sorted(found.usage.items()):
            numbers = (usage.registers, usage.spills, usage.shared)
            table.add_row(unit.arch, kernel.removesuffix("_kernel"), *map(str, numbers), seconds)
            seconds = ""
    return table
