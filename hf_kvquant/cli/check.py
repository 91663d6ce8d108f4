"""`hf-kvquant check MODEL`: is this cache safe for this model? Exit status 0 if it is, 1 if not.

It takes minutes at most: a few documents are scored decode-faithfully, and only if the cache fails, also each layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import KVQuantConfig
from ..host import context_length
from ..measure.facts import write_text
from ..measure.generation import continued
from ..measure.guard import Limits, explained
from ..measure.guard import check as measure
from ..measure.tables import new_table, three_digits, with_error
from ..quantization import QuantSpec
from .evaluate import model_name, read_documents
from .models import (
    DEFAULT_PRESET,
    ConfigOption,
    Device,
    Dtype,
    ModelArgument,
    PresetOption,
    file_option,
    load_config,
    load_model,
)

_LONGEST_WINDOW = 1024
_CONTEXT_SHARE = 1 / 4


def check(
    model: ModelArgument,
    preset: PresetOption = None,
    config: ConfigOption = None,
    text: Annotated[
        Path | None, typer.Option(help="A text file.", show_default="source of Python's standard library")
    ] = None,
    own: Annotated[
        bool,
        typer.Option("--own", help="Score what the model itself writes (sampled) after each context of the text."),
    ] = False,
    documents: Annotated[int, typer.Option(min=1, help="Pieces of the text.")] = 4,
    window: Annotated[
        int | None, typer.Option(min=4, help="Tokens of a piece.", show_default="1024, or the model's context")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a piece to prefill.", show_default="a quarter of it")
    ] = None,
    max_kl: Annotated[
        float, typer.Option(help="The most mean KL divergence (nats) from the dense cache that passes.")
    ] = Limits.kl,
    min_agreement: Annotated[
        float, typer.Option(help="The least share of equal most likely tokens that passes.")
    ] = Limits.agreement,
    write: Annotated[Path | None, file_option("Write the repaired config to this YAML file.")] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="float32: only the caches differ, not the rounding. auto: the checkpoint's.")
    ] = Dtype.float32,
    device: Annotated[Device, typer.Option(help="auto: a GPU if there is one.")] = Device.auto,
) -> None:
    """Check whether a cache is safe for a model; if not, say which layers break, and what to write instead."""
    name = str(config) if config is not None else preset or DEFAULT_PRESET
    kv_config = load_config(preset, config)
    if kv_config is None:
        raise typer.BadParameter("the dense cache needs no check", param_hint="--preset")
    try:
        limits = Limits(max_kl, min_agreement)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    lm, tokenizer = load_model(model, dtype.value, device.value)
    window = window or min(_LONGEST_WINDOW, context_length(lm.config) or _LONGEST_WINDOW)
    context = context or max(1, int(window * _CONTEXT_SHARE))
    console = Console()
    try:
        ids, source = scored_text(lm, tokenizer, text, own, documents, window, context)
        result = measure(lm, ids, kv_config, context, limits)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    show(result, tokenizer, f"{name} on {model_name(model)}", console)
    console.print(
        f"Measured on {documents} pieces of {window} tokens of {source}, the first {context} prefilled.",
        highlight=False, style="dim",
    )  # fmt: skip
    if result["repaired"] is not None and write is not None:
        repaired = KVQuantConfig.from_dict(result["repaired"]["config"])
        write_text(write, yaml.safe_dump(repaired.to_dict(), sort_keys=False))
        console.print(f"The repaired config: {write}", soft_wrap=True, highlight=False)
    elif write is not None:
        console.print(f"{write} was not written: there is nothing to repair.", soft_wrap=True, highlight=False)
    raise typer.Exit(0 if result["passed"] else 1)


def scored_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Path | None,
    own: bool,
    documents: int,
    window: int,
    context: int,
) -> tuple[torch.Tensor, str]:
    """Token ids `[documents, window]`, and where they come from; with `own` the model wrote what follows a context.

    Raises:
        ValueError: there is not enough text, or the context leaves nothing to score.
    """
    ids, source = read_documents(tokenizer, text, documents, window)
    if not own:
        return ids, source
    if context >= window:
        raise ValueError(f"context: {context} leaves no token to write; expected less than {window} (the window)")
    contexts = ids[:, :context].to(model.device)
    return continued(model, contexts, window - context, temperature=1.0), f"the model's own text after {source}"


def show(result: Mapping, tokenizer: PreTrainedTokenizerBase, title: str, console: Console) -> None:
    """Print the verdict, and if it failed the layers that break, why, and what to write instead."""
    limits = result["limits"]
    verdict = "[bold green]passed[/]" if result["passed"] else "[bold red]FAILED[/]"
    console.print(f"{title}: {verdict}", highlight=False)
    console.print(
        f"KL divergence {with_error(result['kl'])} nats (at most {limits['kl']:g}), top-1 agreement "
        f"{result['agreement']['mean']:.2%} (at least {limits['agreement']:.0%}), {result['bits']:.3f} bits/element",
        highlight=False,
    )
    worst = result["worst"]
    if worst is not None:
        console.print(
            f"Largest error: {worst['side']} of layer {worst['layer']}, {worst['error']:.1%} of their spread",
            highlight=False,
        )
    if result["passed"]:
        return
    rows = []
    for side in result["broken"]:
        rows.append((str(side["layer"]), side["side"], three_digits(side["kl"]), _code(side["instead"])))
    console.print(new_table("These break", ("layer", "side", "KL alone", "instead"), rows, left=(1, 3)))
    for side in result["broken"]:
        said = [_with_text(explained(cause), cause, tokenizer) for cause in side["causes"]]
        reasons = "; ".join(said) or "no single channel or token stands out"
        console.print(f"• {side['side']} of layer {side['layer']}: {reasons}.", highlight=False, markup=False)
    repaired = result["repaired"]
    console.print(
        f"\nWrite this into the config: KL {with_error(repaired['kl'])}, top-1 {repaired['agreement']['mean']:.2%}, "
        f"{repaired['bits']:.3f} bits/element"
        + ("." if repaired["passed"] else ", which is still outside of the limits: take a preset with more bits."),
        highlight=False,
    )
    fragment = yaml.safe_dump({"layers": repaired["config"]["layers"]}, sort_keys=False)
    console.print(fragment, highlight=False, markup=False, soft_wrap=True)


def _code(spec: Mapping) -> str:
    return QuantSpec(**spec).code


def _with_text(sentence: str, cause: Mapping, tokenizer: PreTrainedTokenizerBase) -> str:
    return f"{sentence}, {tokenizer.decode([cause['token']])!r}" if "token" in cause else sentence
