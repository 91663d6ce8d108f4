"""`hf-kvquant eval`: the accuracy that each cache costs, on one model and one text.

Without any option it takes the bundled model and source text that it was not trained on. `comparison` measures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from ..config import KVQuantConfig
from ..measure import Settings, compare, notes, peers, presets, read_tasks, rich_table, task_table
from ..measure.facts import PEER_PACKAGES, machine, read_json, versions, write_json
from ..measure.store import RESULT
from ..measure.tables import columns
from ..measure.text import BUNDLED, file_windows, windows
from .info import HEAD_DIM
from .models import Device, Dtype, folder_option, load_model

STANDARD_LIBRARY = "held-out source of Python's standard library"


def evaluate(
    model: Annotated[str, typer.Option(help=f"A folder or hub id, or {BUNDLED}, which is bundled.")] = BUNDLED,
    preset_names: Annotated[
        str | None,
        typer.Option(
            "--presets",
            help="Comma separated: presets, YAML files, fp16 (the dense cache in 16 bits).",
            show_default="fp16 and every preset",
        ),
    ] = None,
    with_peers: Annotated[
        bool, typer.Option("--peers", help="Also transformers' own quantized caches, token by token (slow).")
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="A text file.", show_default="source of Python's standard library")
    ] = None,
    documents: Annotated[int, typer.Option(min=1, help="Pieces of the text.")] = 16,
    window: Annotated[int, typer.Option(min=3, help="Tokens of a piece.")] = 512,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a piece to prefill; the others decode.")] = 128,
    greedy_tokens: Annotated[int, typer.Option(min=0, help="Length of the greedy texts that are compared.")] = 64,
    one_pass: Annotated[
        bool,
        typer.Option(
            "--one-pass",
            help="Prefill whole pieces, the usual way to measure perplexity: no logit reads the cache, so every "
            "format looks perfect, and the table says so.",
        ),
    ] = False,
    dtype: Annotated[
        Dtype, typer.Option(help="float32: only the caches differ, not the rounding. auto: the checkpoint's.")
    ] = Dtype.float32,
    device: Annotated[Device, typer.Option(help="auto: a GPU if there is one.")] = Device.auto,
    task_results: Annotated[
        list[Path] | None, typer.Option(help="lm-eval result files, to stand in the result too.")
    ] = None,
    out: Annotated[Path, folder_option("Folder for the result; a killed run goes on in it.")] = Path("kvquant-eval"),
) -> None:
    """Compare caches with the dense one: perplexity, KL divergence, agreement, text, bytes."""
    console = Console()
    settings = Settings(context=context, greedy_tokens=greedy_tokens)
    if one_pass:
        settings = Settings(context=window, first_scored=1, greedy_tokens=0)
    try:
        methods = [
            *presets(default_presets() if preset_names is None else preset_names.split(",")),
            *(peers() if with_peers else []),
        ]
        tasks = [score for file in task_results or [] for score in read_tasks(read_json(file))]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    lm, tokenizer = load_model(model, dtype.value, device.value)
    try:
        ids, source = read_documents(tokenizer, text, documents, window)
        facts = {"model": model_name(model), "text": source, "versions": versions(PEER_PACKAGES), "machine": machine()}
        result = compare(lm, ids, methods, settings, facts, folder=out)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if tasks:
        result["tasks"] = tasks
        write_json(out / RESULT, result)
    show(result, console)
    console.print(f"Result: {out / RESULT}. A page of it: hf-kvquant report {out}", soft_wrap=True)


def default_presets() -> list[str]:
    """The dense cache in 16 bits and every preset, by falling bytes."""
    names = KVQuantConfig.preset_names()
    return ["fp16", *sorted(names, key=lambda name: -KVQuantConfig.preset(name).bits_per_element(HEAD_DIM))]


def read_documents(
    tokenizer: PreTrainedTokenizerBase, text: Path | None, documents: int, window: int, held_out: bool = True
) -> tuple[torch.Tensor, str]:
    """Token ids `[documents, window]`, and the name of their text.

    Args:
        text: a file; None for source of the standard library, held out or not.

    Raises:
        ValueError: there is not enough text.
    """
    if text is None:
        name = STANDARD_LIBRARY if held_out else STANDARD_LIBRARY.removeprefix("held-out ")
        return windows(tokenizer, documents, window, held_out)[0], name
    return file_windows(tokenizer, text, documents, window), text.name


def model_name(model: str) -> str:
    """The name of a model in results: a folder's own name, or the hub id."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def show(result: dict, console: Console) -> None:
    """Print the table with its notes."""
    console.print(rich_table(result))
    for name, meaning in columns(result).items():
        if name != "cache":
            console.print(f"[bold]{name}[/]: {meaning}.", highlight=False)
    console.print()
    for note in notes(result):
        console.print(f"• {note}", highlight=False)
    if result["tasks"]:
        console.print(task_table(result["tasks"]))
