"""`hf-kvquant generate MODEL PROMPT`: text through a quantized cache, with its speed and its bytes.

The text goes to standard output, everything else to standard error.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import TextStreamer

from ..config import KVQuantConfig
from ..host import context_length
from ..measure.generation import Run, run
from ..scoring import DENSE
from .models import DEFAULT_PRESET, ConfigOption, Device, Dtype, ModelArgument, backend_of, load_config, load_model

# The first calls load libraries and fill torch's caches, which the figures should not include.
_WARM_UP_PROMPT, _WARM_UP_TOKENS = 16, 3


def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.", show_default=False)] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(KVQuantConfig.preset_names())}, or {DENSE} for the dense cache. [default: int4]"
        ),
    ] = None,
    config: ConfigOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="Sample at this temperature.", show_default="greedy")
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the most likely token (the default).")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of sampling.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="auto: the checkpoint's own.")] = Dtype.auto,
    device: Annotated[Device, typer.Option(help="auto: a GPU if there is one.")] = Device.auto,
) -> None:
    """Continue a prompt, and print the speed and the bytes of the cache."""
    kv_config = load_config(preset, config)
    if greedy and temperature is not None:
        raise typer.BadParameter("give either --greedy or a temperature, not both", param_hint="--temperature")
    if temperature is not None and not 0 < temperature < math.inf:
        raise typer.BadParameter(
            f"{temperature} is not allowed; expected a number above 0", param_hint="--temperature"
        )
    text = _prompt(prompt, prompt_file)
    lm, tokenizer = load_model(model, dtype.value, device.value)
    backend = backend_of(kv_config, lm)
    input_ids = tokenizer(text, return_tensors="pt").input_ids.to(lm.device)
    if input_ids.shape[1] == 0:
        raise typer.BadParameter("holds no token", param_hint="PROMPT")
    notes = Console(stderr=True)
    longest = context_length(lm.config)
    if longest is not None and input_ids.shape[1] + max_new_tokens > longest:
        notes.print(
            f"Note: {input_ids.shape[1]} tokens of prompt and {max_new_tokens} new ones are more than the {longest} "
            "that the model was made for."
        )
    options: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        options = {"do_sample": True, "temperature": temperature}
    try:
        run(lm, input_ids[:, :_WARM_UP_PROMPT], kv_config, _WARM_UP_TOKENS, do_sample=False)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--preset / --config") from error
    torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    done = run(lm, input_ids, kv_config, max_new_tokens, on_tokens=streamer.put, **options)
    streamer.end()
    cache = DENSE if kv_config is None else (str(config) if config is not None else preset or DEFAULT_PRESET)
    notes.print()
    notes.print(_figures(done, cache, backend, lm.dtype))


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give a prompt, or --prompt-file, and not both", param_hint="PROMPT")
    if file is None:
        return prompt
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{str(file)!r} cannot be read: {error}", param_hint="--prompt-file") from error


def _figures(done: Run, cache: str, backend: str | None, dtype: torch.dtype) -> Table:
    memory = done.memory
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("cache", cache if backend is None else f"{cache}, read by the {backend} backend")
    table.add_row("prefill", f"{done.prompt_length} tokens, {done.prefill_rate:,.1f} tokens/s")
    rate = "" if done.decode_rate is None else f", {done.decode_rate:,.1f} tokens/s after the first"
    table.add_row("decode", f"{len(done.tokens)} tokens{rate}")
    dense = f"{memory['dense_equivalent']:,} in {str(dtype).removeprefix('torch.')}"
    table.add_row("cache bytes", f"{memory['total']:,}, {done.ratio:.3f} of a dense cache ({dense})")
    if done.routes is not None:
        parts = ", ".join(f"{name} {memory[name]:,}" for name in ("codes", "scales", "dense", "slack"))
        table.add_row("", f"[dim]{parts}[/]")
        table.add_row("routes", ", ".join(f"{name} {count}" for name, count in done.routes.items()))
    return table
