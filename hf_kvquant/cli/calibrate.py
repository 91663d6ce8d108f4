"""`hf-kvquant calibrate MODEL`: measure the factors of error feedback on a text, and write their file.

A config names it as `error_feedback`; then complete blocks of the channel grid are encoded with less loss.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from tqdm import tqdm

from ..calibration import calibrate as measure
from ..host import context_length
from .evaluate import model_name, read_documents
from .models import Device, Dtype, ModelArgument, file_option, load_model

_LONGEST_WINDOW = 512


def calibrate(
    model: ModelArgument,
    out: Annotated[Path, file_option("The file to write.")],
    text: Annotated[
        Path | None,
        typer.Option(
            help="A text file, like the texts in use.",
            show_default="source of Python's standard library, other files than `check` and `tune` take",
        ),
    ] = None,
    documents: Annotated[int, typer.Option(min=1, help="Pieces of the text.")] = 8,
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a piece.", show_default="512, or the model's context")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="auto: the checkpoint's.")] = Dtype.float32,
    device: Annotated[Device, typer.Option(help="auto: a GPU if there is one.")] = Device.auto,
) -> None:
    """Measure the factors of error feedback of a model, for the field `error_feedback` of a config."""
    lm, tokenizer = load_model(model, dtype.value, device.value)
    window = window or min(_LONGEST_WINDOW, context_length(lm.config) or _LONGEST_WINDOW)
    name = model_name(model)
    try:
        ids, source = read_documents(tokenizer, text, documents, window, held_out=False)
        feedback = measure(lm, tqdm(ids, desc="pieces", leave=False))
        facts = {"model": name, "text": source, "tokens": str(ids.numel())}
        replace(feedback, facts=facts).save(out)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    Console().print(
        f"Factors of {len(feedback.layers)} layers, {feedback.nbytes / 1e6:.3g} MB: {out}, for `error_feedback:` in a "
        "config with keys or values on the channel grid.", soft_wrap=True, highlight=False,
    )  # fmt: skip
