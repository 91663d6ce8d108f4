"""`hf-kvquant demo`: every preset beside the dense cache, on the bundled model.

It makes two measurements. First, one long prompt is continued greedily through every cache, in the checkpoint's dtype:
this gives text and bytes, and, in further rounds in which all caches take turns, speed. Then it makes the comparison
of `hf-kvquant eval`, in float32, so that only the caches differ and not the rounding of bfloat16: on pieces of real
text, and on the text that the dense cache writes greedily after the same prompts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import ops
from ..config import KVQuantConfig
from ..host import context_length
from ..measure import Preset, Settings, compare
from ..measure.caches import DENSE
from ..measure.clock import seconds_of
from ..measure.facts import machine, versions, write_json
from ..measure.generation import NOISE_BOUND, Run, Speed, run
from ..measure.report.plots import draw_pareto
from ..measure.report.style import COLORS, PRINT, dress, new_figure
from ..measure.text import bundled_model, windows
from .models import Device, Dtype, backend_of, folder_option, load_model

# The share of a piece of text that is prefilled; the rest is scored. A greedy continuation is no longer than this.
_CONTEXT_SHARE = 1 / 2
_LONGEST_PIECE, _LONGEST_GREEDY = 1024, 256
_WARM_UP_TOKENS = 3
_ROUNDS = 5
# If the rounds take longer on a busy machine, there are fewer of them.
_ROUNDS_SECONDS = 45
_LINES, _LINES_OF_DIFFERENCE = 8, 5
# If reading the cache takes a smaller share of a step than this, speed says nothing about caches.
_OVERHEAD_SHARE = 0.2
_NOISY = "noisy"


def demo(
    model: Annotated[
        str | None, typer.Option(help="Another model: a folder or hub id.", show_default="bundled")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to write through every cache.")] = 128,
    prompt_tokens: Annotated[int, typer.Option(min=8, help="Length of the long prompt.")] = 1024,
    positions: Annotated[int, typer.Option(min=1, help="Positions to compare, at least.")] = 4088,
    dtype: Annotated[Dtype, typer.Option(help="Of the text, speed and bytes; auto: the checkpoint's.")] = Dtype.auto,
    device: Annotated[Device, typer.Option(help="auto: a GPU if it has a compiled backend.")] = Device.auto,
    out: Annotated[Path, folder_option("Folder for the plot and the figures.")] = Path("kvquant-demo"),
) -> None:
    """Compare every preset with the dense cache: text, speed, bytes and agreement."""
    start = time.perf_counter()
    console = Console()
    if device is Device.auto:
        has_gpu = torch.cuda.is_available() and ops.backend_status("cuda") is None
        device = Device.cuda if has_gpu else Device.cpu
    out.mkdir(parents=True, exist_ok=True)
    name = str(model or bundled_model())
    lm, tokenizer = load_model(name, dtype.value, device.value)
    configs = {DENSE: None, **{name: KVQuantConfig.preset(name) for name in KVQuantConfig.preset_names()}}
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
    # If fewer positions are wanted than one piece holds, the piece is shorter. Its last token is only predicted.
    scored = min(piece - context - 1, positions)
    try:
        prompt, source = windows(tokenizer, 1, prompt_tokens)
        texts, sources = windows(tokenizer, -(-positions // scored), context + scored + 1)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--positions") from error

    prompt = prompt.to(lm.device)
    rounds = _write(lm, prompt, configs, new_tokens, console)
    runs = {cache: timed[0] for cache, timed in rounds.items()}
    read_seconds = _read_seconds(runs[DENSE].memory["total"], lm.device)
    exact = lm if lm.dtype == torch.float32 else load_model(name, "float32", device.value)[0]
    presets = [Preset(cache, config) for cache, config in configs.items() if config is not None]
    settings = Settings(context, greedy_tokens=min(scored, _LONGEST_GREEDY))
    facts = {"model": name if model else Path(name).name, "text": "held-out source", "versions": versions()}
    report = Report(
        bundled=model is None,
        dtype=str(lm.dtype).removeprefix("torch."),
        device=lm.device.type,
        backend=backend_of(presets[0].config, lm),
        head_dim=getattr(lm.config, "head_dim", None) or lm.config.hidden_size // lm.config.num_attention_heads,
        prompt=prompt[0].tolist(),
        source=source[0],
        configs=configs,
        runs=runs,
        prefill={cache: Speed([run.prefill_rate for run in timed]) for cache, timed in rounds.items()},
        decode={cache: Speed([run.decode_rate for run in timed]) for cache, timed in rounds.items()},
        texts={cache: tokenizer.decode(r.tokens, skip_special_tokens=True) for cache, r in runs.items()},
        sources=sources,
        comparison=compare(exact, texts, presets, settings, facts | {"machine": machine()}, by_layer=False),
        read_seconds=read_seconds,
        seconds=time.perf_counter() - start,
    )
    show(report, tokenizer, console)
    save(report, out, console)


def _write(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    configs: dict[str, KVQuantConfig | None],
    new_tokens: int,
    console: Console,
) -> dict[str, list[Run]]:
    """Continue the prompt through every cache, in rounds; every cache gets the same number."""
    # Text goes on past its end, so that every cache writes the same number of tokens.
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    bars = TextColumn("{task.description:<56}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    rounds = {cache: [] for cache in configs}
    # Drawn seldom, because drawing slows down the timed work.
    with Progress(*bars, console=console, refresh_per_second=2, transient=True) as progress:
        writing = progress.add_task(f"Writing {new_tokens} tokens", total=_ROUNDS * len(configs))
        for config in configs.values():
            run(model, prompt, config, _WARM_UP_TOKENS, **options)
        start = time.perf_counter()
        for number in range(_ROUNDS):
            if number and time.perf_counter() - start > _ROUNDS_SECONDS:
                break
            for cache, config in configs.items():
                described = f"Round {number + 1} of {_ROUNDS}: {new_tokens} tokens through the {cache} cache"
                progress.update(writing, description=described)
                rounds[cache].append(run(model, prompt, config, new_tokens, **options))
                progress.advance(writing)
    return rounds


def _read_seconds(nbytes: int, device: torch.device) -> float:
    """The time of a plain read of `nbytes` here, the shortest of a few."""
    buffer = torch.ones(-(-nbytes // 4), device=device)
    return min(seconds_of(lambda: buffer.sum().item()) for _ in range(10))


@dataclass(frozen=True)
class Report:
    """Everything that the demo measured, by the name of the cache; the dense one is first."""

    bundled: bool
    dtype: str
    device: str
    backend: str
    head_dim: int
    prompt: list[int]
    source: str
    configs: dict[str, KVQuantConfig | None]
    runs: dict[str, Run]
    prefill: dict[str, Speed]
    decode: dict[str, Speed]
    texts: dict[str, str]
    sources: list[str]
    comparison: dict
    read_seconds: float
    seconds: float

    def same_tokens(self, cache: str) -> int:
        """The number of tokens before the long prompt's continuation first differs from the dense cache's."""
        pairs = list(zip(self.runs[cache].tokens, self.runs[DENSE].tokens))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))

    def bits(self, cache: str) -> float:
        """The bits per cached element that the cache approaches at long context."""
        config = self.configs[cache]
        if config is not None:
            return config.bits_per_element(self.head_dim)
        return 32.0 if self.dtype == "float32" else 16.0

    @property
    def read_share(self) -> float | None:
        """The time of a plain read of the dense cache as a share of a decode step through it; None if not known."""
        rate = self.decode[DENSE].median
        return None if rate is None else self.read_seconds * rate

    @property
    def scoring(self) -> dict:
        """The text on which caches were compared."""
        plan, tokens = self.comparison["plan"], self.comparison["caches"][DENSE]["tokens"]
        settings = plan["settings"]
        return {
            "sources": self.sources,
            "context": settings["context"],
            "new_tokens": tokens // plan["documents"],
            "greedy_tokens": settings["greedy_tokens"],
            "dtype": plan["dtype"],
            "positions": tokens,
        }

    def figures(self) -> dict:
        """The figures as plain data."""
        plan = self.comparison["plan"]
        return {
            "model": {
                "name": plan["model"],
                "bundled": self.bundled,
                "parameters": plan["parameters"],
                "head_dim": self.head_dim,
            },
            "writing": {
                "dtype": self.dtype,
                "device": self.device,
                "backend": self.backend,
                "source": self.source,
                "prompt_tokens": len(self.prompt),
                "new_tokens": len(self.runs[DENSE].tokens),
                "read_dense_cache_seconds": self.read_seconds,
                "read_dense_cache_share_of_step": self.read_share,
            },
            "scoring": self.scoring,
            "caches": {cache: self._cache(cache) for cache in self.runs},
            "comparison": self.comparison,
            "seconds": self.seconds,
        }

    def _cache(self, cache: str) -> dict:
        done, config, compared = self.runs[cache], self.configs[cache], self.comparison["caches"][cache]
        same, speeds = compared["same_tokens"], {"prefill": self.prefill[cache], "decode": self.decode[cache]}
        return {
            "config": None if config is None else config.to_dict(),
            "bits_at_long_context": self.bits(cache),
            "memory": done.memory,
            "ratio": done.ratio,
            "bytes_per_element": done.ratio * (4 if self.dtype == "float32" else 2),
            **{f"{name}_tokens_per_second": speed.median for name, speed in speeds.items()},
            **{f"{name}_spread": speed.spread for name, speed in speeds.items()},
            **{f"{name}_rounds": speed.rounds for name, speed in speeds.items()},
            "routes": done.routes,
            "text": self.texts[cache],
            "same_tokens": self.same_tokens(cache),
            "same_tokens_scored": {"median": same["median"], "per_prompt": same["each"]},
            "agreement": {"greedy": same["agreement"], "held_out": compared["agreement"]["mean"]},
            "kl": compared["kl"],
        }


# ---- terminal ------------------------------------------------------------------------------------------------------


def show(report: Report, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Print the texts, and the table with its notes."""
    tail = str(tokenizer.decode(report.prompt, skip_special_tokens=True)).splitlines()[-_LINES:]
    console.rule(f"The prompt: {len(report.prompt):,} tokens of {report.source}, which end with", align="left")
    console.print(_code("\n".join(tail)))
    new_tokens = len(report.runs[DENSE].tokens)
    console.rule(
        f"Its greedy continuation through the dense cache, the first lines of {new_tokens} tokens", align="left"
    )
    console.print(_code("\n".join(report.texts[DENSE].splitlines()[:_LINES])))
    same = [cache for cache in report.runs if cache != DENSE and report.same_tokens(cache) == new_tokens]
    if same:
        console.rule(f"Exactly this text, all {new_tokens} tokens: {', '.join(same)}", align="left")
    for cache in report.runs:
        if cache != DENSE and cache not in same:
            _show_difference(report, cache, tokenizer, console)
    console.print()
    console.print(_table(report, console.width))
    console.print()
    for line in _notes(report):
        console.print(f"• {line}", highlight=False)


def _show_difference(report: Report, cache: str, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Show the lines around the first token that differs, beside the dense cache's."""
    same = report.same_tokens(cache)
    total = len(report.runs[DENSE].tokens)
    console.rule(f"{cache} writes the same first {same} of {total} tokens, then goes on differently", align="left")
    common = tokenizer.decode(report.runs[cache].tokens[:same], skip_special_tokens=True)
    first = max(common.count("\n") - 1, 0)
    sides = Table.grid(padding=(0, 2), expand=True)
    sides.add_column(ratio=1)
    sides.add_column(ratio=1)
    sides.add_row(f"[dim]{cache}, from line {first + 1}[/]", "[dim]dense cache[/]")
    texts = [report.texts[name].splitlines()[first : first + _LINES_OF_DIFFERENCE] for name in (cache, DENSE)]
    # Long lines are cut off, because wrapped ones would not line up side by side.
    sides.add_row(*(_code("\n".join(lines), word_wrap=False) for lines in texts))
    console.print(sides)


def _code(text: str, word_wrap: bool = True) -> Syntax:
    return Syntax(text, "python", theme="ansi_dark", background_color="default", word_wrap=word_wrap)


def _table(report: Report, width: int) -> Table:
    figures = report.figures()
    table = Table(
        title="Every cache: size, speed, and how often its text is that of the dense cache",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        # Every figure must be readable on 80 columns.
        padding=(0, 1 if width >= 90 else 0),
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("\n\ncache", style="bold", no_wrap=True)
    for header in (
        "bits\nper\nelement",
        "\nsize\nin kB",
        "share\nof dense\nsize",
        "reads\nprompt,\ntok/s",
        "writes\ntext,\ntok/s",
        f"same\ntext for,\nof {figures['scoring']['greedy_tokens']}",
        "same\nchoice,\nown text",
        "same\nchoice,\nreal text",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for name, cache in figures["caches"].items():
        agreement = cache["agreement"]
        compared = [f"{cache['same_tokens_scored']['median']:g}", f"{agreement['greedy']:.2%}"]
        table.add_row(
            name,
            f"{cache['bits_at_long_context']:g}",
            f"{cache['memory']['total'] / 1e3:,.0f}",
            f"{cache['ratio']:.3f}",
            *(_rate(cache[f"{kind}_tokens_per_second"]) for kind in ("prefill", "decode")),
            *(["–"] * 3 if name == DENSE else [*compared, f"{agreement['held_out']:.2%}"]),
        )
    return table


def _rate(speed: float | None) -> str:
    return _NOISY if speed is None else f"{speed:,.0f}"


def _notes(report: Report) -> list[str]:
    """Notes on the meaning of the columns, and on the limits of the figures."""
    dense, scoring = report.runs[DENSE], report.scoring
    new_tokens = len(dense.tokens)
    fused = sum(run.routes["decode_fused"] for run in report.runs.values() if run.routes)
    copied = sum(run.routes["decode_dequantized"] for run in report.runs.values() if run.routes)
    routes = "all" if not copied else f"{fused} of {fused + copied}"
    rounds = len(report.decode[DENSE].rounds)
    notes = [
        f"Bits per element: of one cached element at long context, scales included, at head_dim {report.head_dim}. "
        f"Size: of this run ({report.dtype}, {len(report.prompt) + new_tokens - 1:,} tokens), with the tokens that "
        "are kept exact; these weigh less and less as the context grows.",
        f"Tok/s: tokens per second of one prompt, on {report.device}, {report.backend} backend; medians of {rounds} "
        f"rounds in which the caches take turns. {routes.capitalize()} decode steps of quantized caches read them as "
        "stored.",
    ]
    if report.read_share is not None:
        step, share = 1e3 / report.decode[DENSE].median, f"{report.read_share:.1%}"
        notes[-1] += f" A dense step took {step:.2f} ms, a plain read of the dense cache takes {share} of that"
        notes[-1] += ": these speeds compare overheads, not caches." if report.read_share < _OVERHEAD_SHARE else "."
    if any(speed.median is None for speed in (*report.prefill.values(), *report.decode.values())):
        notes.append(
            f"{_NOISY}: no figure, because the fastest round is more than {NOISE_BOUND:.0%} faster than the median, "
            "or because fewer than three rounds fit in the time. Another program uses this machine; "
            "OMP_WAIT_POLICY=passive in the environment helps most."
        )
    return [
        *notes,
        "Same text for: how many tokens the model writes through this cache before one differs from what it writes "
        f"through the dense cache; median of {len(scoring['sources'])} prompts, {scoring['greedy_tokens']} tokens "
        "each, in float32.",
        f"Same choice: how often the most likely next token is the one that the dense cache leads to, with "
        f"{scoring['context']} or more cached tokens before it, in float32. Own text: what the model wrote through "
        "the dense cache (a weak model repeats itself: easy to agree on). Real text: what follows in the files that "
        f"the prompts are from, {scoring['positions']:,} positions.",
    ]


# ---- files ---------------------------------------------------------------------------------------------------------


def save(report: Report, folder: Path, console: Console) -> None:
    """Write `demo.json` and, where matplotlib is installed, `demo.png`, and say where."""
    figures = folder / "demo.json"
    write_json(figures, report.figures())
    if find_spec("matplotlib") is None:
        console.print("No plot: matplotlib is not installed (pip install matplotlib).")
    else:
        plot(report.figures(), folder / "demo.png")
        console.print(f"Plot: {folder / 'demo.png'}", soft_wrap=True)
    console.print(f"Figures: {figures}", soft_wrap=True)
    console.print(f"Took {report.seconds:.0f} s.")


def plot(figures: dict, path: Path) -> None:
    """Divergence over bytes, speed, and tokens until the text differs."""
    caches, scoring, writing = figures["caches"], figures["scoring"], figures["writing"]
    rows = {cache: -i for i, cache in enumerate(caches)}
    colors = dict(zip(caches, COLORS))
    figure = new_figure(PRINT, (15, 4.6))
    pareto, speed, text = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    for axes in (speed, text):
        dress(axes, PRINT)
        axes.grid(visible=False, axis="y")
        axes.set_ylim(0.6 - len(rows), 0.6)
        axes.set_yticks(list(rows.values()), list(rows))
    rates = {cache: found["decode_tokens_per_second"] for cache, found in caches.items()}
    _bars(speed, rows, colors, rates, "{:,.0f}")
    read = writing["read_dense_cache_share_of_step"]
    small = read is not None and read < _OVERHEAD_SHARE
    speed.set(title="Speed of writing",
              xlabel="tokens per second" + ("\n(small model: overheads, not caches)" if small else ""))  # fmt: skip

    # A tick is the count of one prompt; the bar is the median.
    same = {cache: found["same_tokens_scored"] for cache, found in caches.items() if cache != DENSE}
    for cache, found in same.items():
        counts = found["per_prompt"]
        text.plot(counts, [rows[cache]] * len(counts), "|", ms=15, color=PRINT.muted, mew=1, alpha=0.6, clip_on=False)
    limit = scoring["greedy_tokens"]
    _bars(text, rows, colors, {cache: found["median"] for cache, found in same.items()}, "{:g}", beyond=limit)
    text.set_xticks([limit * i / 4 for i in range(5)])
    text.set(title=f"Tokens until the text differs (of {limit})",
             xlabel=f"median of {len(scoring['sources'])} prompts; ticks: each prompt")  # fmt: skip
    figure.suptitle(f"{figures['model']['name']}: quantized KV caches, read as stored, beside the dense one "
                    f"({writing['device']}, {writing['dtype']})")  # fmt: skip
    pareto.set_title("Loss against bytes: down and left is better (hollow: after 8192 tokens)")
    draw_pareto(pareto, figures["comparison"], PRINT)
    figure.savefig(path, dpi=110)


def _bars(axes, rows: dict, colors: dict, values: dict, form: str, beyond: float | None = None) -> None:
    """Draw a bar and its figure (right of it, or of `beyond`) for each cache, or the reason why it has none."""
    for cache, value in values.items():
        axes.barh(rows[cache], value or 0, height=0.6, color=colors[cache], alpha=0.6)
        end = beyond or value or 0
        label = _NOISY if value is None else form.format(value)
        axes.annotate(label, (end, rows[cache]), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
    # Room for the figures.
    axes.set_xlim(0, 1.18 * (beyond or max(value or 0 for value in values.values()) or 1))
