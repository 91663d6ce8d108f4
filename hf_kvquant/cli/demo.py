"""`hf-kvquant demo`: every preset beside the dense cache, on the bundled model.

Two measurements. One long prompt is continued greedily through every cache, in the checkpoint's dtype: text, bytes,
and speed, for which it is continued again in rounds, where every cache has its turn. Then agreement, in float32, so
that only the cache differs and not the rounding of bfloat16: the dense cache continues several prompts greedily, and
every cache says its most likely token at every position of that text, and of the real text that follows the same
prompts (`hf_kvquant.score`, which reads the cache as decode does).

Feeding the dense cache's greedy text also tells where free-running text would first differ: at the first position
whose most likely token is another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel

from .. import ops
from ..config import KVQuantConfig
from ..host import context_length
from ..scoring import DENSE, score
from . import demo_report
from .models import Device, Dtype, backend_of, bundled_model, load_config, load_model
from .running import Run, Speed, run
from .source_text import windows

# Of a scored piece of text, this share is prefilled and the rest decoded.
_CONTEXT_SHARE = 2 / 3
_LONGEST_PIECE = 768
_WARM_UP_TOKENS = 3
_ROUNDS = 5
# A machine so busy that the rounds take longer gets fewer.
_ROUNDS_SECONDS = 45


@dataclass(frozen=True)
class Agreement:
    """How often a cache's most likely token is the dense cache's.

    Args:
        greedy, held_out: share of positions, on the dense cache's greedy text and on real text.
        same_tokens: per prompt, how many tokens of its greedy text are the dense cache's before the first differs.
    """

    greedy: float
    held_out: float
    same_tokens: list[int]


@dataclass(frozen=True)
class Scored:
    """On what text `Agreement` was measured."""

    sources: list[str]
    context: int
    new_tokens: int

    @property
    def positions(self) -> int:
        return len(self.sources) * self.new_tokens


def demo(
    model: Annotated[
        str | None, typer.Option(help="Another model: a folder or hub id.", show_default="bundled")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to write through every cache.")] = 128,
    prompt_tokens: Annotated[int, typer.Option(min=8, help="Length of the long prompt.")] = 1024,
    positions: Annotated[int, typer.Option(min=1, help="Positions to compare, at least.")] = 4096,
    dtype: Annotated[Dtype, typer.Option(help="Of the text, speed and bytes; auto: the checkpoint's.")] = Dtype.auto,
    device: Annotated[Device, typer.Option(help="auto: a GPU if it has a compiled backend.")] = Device.auto,
    out: Annotated[Path, typer.Option(help="Folder for the plot and the figures.")] = Path("kvquant-demo"),
) -> None:
    """Compare every preset with the dense cache: text, speed, bytes and agreement."""
    start = time.perf_counter()
    console = Console()
    if device is Device.auto:
        has_gpu = torch.cuda.is_available() and ops.backend_status("cuda") is None
        device = Device.cuda if has_gpu else Device.cpu
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{str(out)!r} cannot be a folder: {error}", param_hint="--out") from error
    name = str(model or bundled_model())
    lm, tokenizer = load_model(name, dtype.value, device.value)
    configs = {name: load_config(name, None) for name in (DENSE, *KVQuantConfig.preset_names())}
    longest = context_length(lm.config)
    if longest is not None and prompt_tokens > longest - new_tokens:
        if longest <= new_tokens:
            raise typer.BadParameter(
                f"{new_tokens} do not fit in the model's {longest} tokens", param_hint="--new-tokens"
            )
        fits = longest - new_tokens
        console.print(
            f"The model was made for {longest} tokens: the prompt has {fits} tokens instead of {prompt_tokens}."
        )
        prompt_tokens = fits
    piece = min(_LONGEST_PIECE, longest or _LONGEST_PIECE)
    context = round(piece * _CONTEXT_SHARE)
    # Fewer positions than one piece holds: a shorter piece.
    scored_length = min(piece - context, positions)
    rows = -(-positions // scored_length)
    try:
        (prompt, source), (texts, sources) = (
            windows(tokenizer, 1, prompt_tokens),
            windows(tokenizer, rows, context + scored_length),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--positions") from error
    scored = Scored(sources, context, scored_length)

    bars = TextColumn("{task.description:<56}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # Seldom drawn: drawing takes time from what is timed.
    with Progress(*bars, console=console, refresh_per_second=2, transient=True) as progress:
        prompt = prompt.to(lm.device)
        rounds = _write(lm, prompt, configs, new_tokens, progress)
        runs = {cache: timed[0] for cache, timed in rounds.items()}
        read_seconds = _read_seconds(runs[DENSE].memory["total"], lm.device)
        exact = lm if lm.dtype == torch.float32 else load_model(name, "float32", device.value)[0]
        measured = _agreement(exact, texts.to(lm.device), scored, configs, progress)

    report = demo_report.Report(
        model=name,
        bundled=model is None,
        parameters=lm.num_parameters(),
        dtype=str(lm.dtype).removeprefix("torch."),
        device=lm.device.type,
        backend=backend_of(KVQuantConfig.preset(KVQuantConfig.preset_names()[0]), lm),
        head_dim=getattr(lm.config, "head_dim", None) or lm.config.hidden_size // lm.config.num_attention_heads,
        prompt=prompt[0].tolist(),
        source=source[0],
        configs=configs,
        runs=runs,
        prefill={cache: Speed([run.prefill_rate for run in timed]) for cache, timed in rounds.items()},
        decode={cache: Speed([run.decode_rate for run in timed]) for cache, timed in rounds.items()},
        texts={cache: tokenizer.decode(r.tokens, skip_special_tokens=True) for cache, r in runs.items()},
        scored=scored,
        agreement=measured,
        read_seconds=read_seconds,
        seconds=time.perf_counter() - start,
    )
    demo_report.show(report, tokenizer, console)
    demo_report.save(report, out, console)


def _named(cache: str) -> str:
    return "the dense cache" if cache == DENSE else f"the {cache} cache"


def _write(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    configs: dict[str, KVQuantConfig | None],
    new_tokens: int,
    progress: Progress,
) -> dict[str, list[Run]]:
    """Continue the prompt through every cache, in rounds; as many for each."""
    # Text goes on past its end, so that every cache writes as many tokens.
    options = {"do_sample": False, "eos_token_id": None}
    writing = progress.add_task(f"Writing {new_tokens} tokens", total=_ROUNDS * len(configs))
    for config in configs.values():
        run(model, prompt, config, _WARM_UP_TOKENS, **options)
    start = time.perf_counter()
    rounds = {cache: [] for cache in configs}
    for number in range(_ROUNDS):
        if number and time.perf_counter() - start > _ROUNDS_SECONDS:
            break
        for cache, config in configs.items():
            described = f"Round {number + 1} of {_ROUNDS}: {new_tokens} tokens through {_named(cache)}"
            progress.update(writing, description=described)
            rounds[cache].append(run(model, prompt, config, new_tokens, **options))
            progress.advance(writing)
    progress.update(writing, completed=_ROUNDS * len(configs))
    return rounds


def _agreement(
    model: PreTrainedModel,
    texts: torch.Tensor,
    scored: Scored,
    configs: dict[str, KVQuantConfig | None],
    progress: Progress,
) -> dict[str, Agreement]:
    """Compare every cache with the dense one on `texts` `[prompts, context + new_tokens]`, and on greedy text."""
    continuing = progress.add_task(f"Continuing {len(texts)} prompts greedily", total=scored.new_tokens + 1)
    greedy = model.generate(
        texts[:, : scored.context],
        attention_mask=torch.ones_like(texts[:, : scored.context]),
        max_new_tokens=scored.new_tokens,
        do_sample=False,
        eos_token_id=None,
        stopping_criteria=[_every_step(lambda: progress.advance(continuing))],
    )
    progress.update(continuing, completed=scored.new_tokens + 1)
    scoring = progress.add_task("Scoring", total=2 * len(configs) * len(texts))
    result, reference = {}, {}
    for cache, config in configs.items():
        progress.update(scoring, description=f"Scoring {scored.positions} positions twice, {_named(cache)}")
        same = {}
        for name, ids in (("greedy", greedy), ("held_out", texts)):
            best = _most_likely(model, ids, scored.context, config, lambda: progress.advance(scoring))
            same[name] = best == reference.setdefault(name, best)
        result[cache] = Agreement(
            greedy=same["greedy"].float().mean().item(),
            held_out=same["held_out"].float().mean().item(),
            # The first new token comes from prefill, and the last row speaks of a token that is not written any more.
            same_tokens=(1 + same["greedy"][:, :-1].long().cumprod(-1).sum(-1)).tolist(),
        )
    return result


def _every_step(call: Callable[[], None]) -> Callable:
    """A stopping criterion of `generate` that never stops, and calls."""

    def criterion(input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        call()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    return criterion


@torch.inference_mode()
def _most_likely(model, ids: torch.Tensor, context: int, config: KVQuantConfig | None, advance) -> torch.Tensor:
    """The most likely token after each column from `context` on (all read the cache), `[rows, length - context]`."""
    best = []
    # One row at a time: fastest on a processor, whose caches then hold the attention scores.
    for row in ids.split(1):
        best.append(score(model, row, context, DENSE if config is None else config)[:, context:].argmax(-1))
        advance()
    return torch.cat(best)


def _read_seconds(nbytes: int, device: torch.device) -> float:
    """How long a plain read of so many bytes takes here; the shortest of a few."""
    buffer = torch.ones(-(-nbytes // 4), device=device)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        buffer.sum().item()
        times.append(time.perf_counter() - start)
    return min(times)
