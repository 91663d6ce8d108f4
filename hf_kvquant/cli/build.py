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

from ..backends import disk_cache, gpu_refusal, nvrtc
from ..backends.arguments import DTYPES
from ..backends.specialisation import ROWS, RotaryKeys, Specialisation, for_source, specialisation
from ..config import KVQuantConfig
from ..quantization import QuantSpec

_DTYPES = {str(dtype).removeprefix("torch."): number for dtype, number in DTYPES.items()}


@dataclass(frozen=True)
class Unit:
    """One source file to compile, for one architecture and specialisation."""

    arch: str
    source: str
    kind: Specialisation


def build(
    configs: Annotated[
        list[str] | None,
        typer.Argument(help="Presets or YAML files.", show_default="every preset that takes these head_dims"),
    ] = None,
    archs: Annotated[
        list[str] | None, typer.Option("--arch", help="Such as sm_90; repeat for more.", show_default="the GPUs here")
    ] = None,
    head_dims: Annotated[list[int] | None, typer.Option("--head-dim", help="Repeat for more.")] = None,
    latents: Annotated[
        list[str] | None,
        typer.Option("--latents", help="Of latent attention, such as 512/64: elements of latents and of rotary keys."),
    ] = None,
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
    sizes = [_sizes_of_latents(one) for one in latents or []]
    head_dims = head_dims or ([] if sizes else [64, 128])
    configs = configs or presets_for(head_dims, sizes)
    needed = kinds(configs, head_dims, dtypes or ["bfloat16"], page_sizes or [], sizes)
    units = [Unit(arch, source, one) for arch in _archs(archs) for source, one in needed]
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


def presets_for(head_dims: list[int], latents: list[tuple[int, int]]) -> list[str]:
    """The presets whose formats the kernels take at all of these sizes."""
    found, sizes = [], {*head_dims, *(size for pair in latents for size in pair)}
    for name in KVQuantConfig.preset_names():
        config = KVQuantConfig.preset(name)
        if not any(gpu_refusal(config.keys, config.values, (size, size)) for size in sizes):
            found.append(name)
    return found


def kinds(
    configs: list[str],
    head_dims: list[int],
    dtypes: list[str],
    page_sizes: list[int],
    latents: list[tuple[int, int]],
) -> list[tuple[str, Specialisation]]:
    """The source files and specialisations that these configs need, their layers' overrides included: without pages,
    with pages of these sizes, and for latents and rotary keys of these sizes.

    Raises:
        typer.BadParameter: a config, head_dim or dtype is unknown.
    """
    found: dict[tuple[str, Specialisation], None] = {}
    for dtype in dtypes:
        if dtype not in _DTYPES:
            raise typer.BadParameter(f"--dtype: {dtype!r} is not supported; expected one of {list(_DTYPES)}")
        for name in configs:
            try:
                config = KVQuantConfig.load(name)
                of_config = [
                    *(
                        one
                        for head_dim in head_dims
                        for one in _of_heads(config, _DTYPES[dtype], head_dim, page_sizes)
                    ),
                    *(one for sizes in latents for one in _of_latents(config, _DTYPES[dtype], *sizes)),
                ]
            except ValueError as error:
                raise typer.BadParameter(f"{name}: {error}") from error
            found |= dict.fromkeys((source, one) for source, kind in of_config for one in for_source(source, kind))
    return list(found)


def _of_heads(
    config: KVQuantConfig, dtype: int, head_dim: int, page_sizes: list[int]
) -> Iterator[tuple[str, Specialisation]]:
    for keys, values in _sides(config):
        sides = keys.resolve(head_dim), values.resolve(head_dim)
        for size in (0, *page_sizes):
            kind = specialisation(dtype, *sides, head_dim, head_dim, page_length=size)
            yield "decode_attention.cu", kind
            if config.error_feedback is not None:
                feedback = keys.is_channel, values.is_channel
                kind = specialisation(dtype, *sides, head_dim, head_dim, page_length=size, feedback=feedback)
            yield "quantize_append.cu", kind


def _of_latents(config: KVQuantConfig, dtype: int, rank: int, rotary_dim: int) -> Iterator[tuple[str, Specialisation]]:
    """Latents are stored beside rotary keys, and read as keys and as values."""
    for keys, values in _sides(config.for_latents()):
        latents, rotary = keys.resolve(rank), RotaryKeys(values.resolve(rotary_dim), rotary_dim)
        yield "quantize_append.cu", specialisation(dtype, latents, rotary.spec, rank, rotary_dim)
        second = rotary if rotary.go_with(dtype, latents) else None
        yield "decode_attention.cu", specialisation(dtype, latents, latents, rank, rank, ROWS[-1], rotary=second)


def _sizes_of_latents(text: str) -> tuple[int, int]:
    rank, _, rotary_dim = text.partition("/")
    if not (rank.isdecimal() and rotary_dim.isdecimal()):
        raise typer.BadParameter(f"--latents: {text!r} is not allowed; expected two numbers such as 512/64")
    return int(rank), int(rotary_dim)


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
