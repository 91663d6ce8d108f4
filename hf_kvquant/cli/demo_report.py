"""What the demo shows and saves: the texts, one table, a plot and a JSON file, all from one `Report`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ..config import KVQuantConfig
from ..report.style import COLORS, PRINT, dress, new_figure
from ..scoring import DENSE
from .info import machine, versions
from .running import NOISE_BOUND, Run, Speed

_LINES = 8
_LINES_OF_DIFFERENCE = 5
# Where reading the cache takes less of a step than this, speed says nothing about caches.
_OVERHEAD_SHARE = 0.2
_NOISY = "noisy"


@dataclass(frozen=True)
class Report:
    """Everything that the demo measured; per cache, by name, the dense one first."""

    model: str
    bundled: bool
    parameters: int
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
    scored: object
    agreement: dict[str, object]
    read_seconds: float
    seconds: float

    def same_tokens(self, cache: str) -> int:
        """How many tokens of the long prompt's continuation are the dense cache's, before the first differs."""
        pairs = list(zip(self.runs[cache].tokens, self.runs[DENSE].tokens))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))

    def bits(self, cache: str) -> float:
        """Bits per cached number that the cache tends to at long context."""
        config = self.configs[cache]
        if config is not None:
            return config.bits_per_element(self.head_dim)
        return 32.0 if self.dtype == "float32" else 16.0

    def bytes_per_element(self, cache: str) -> float:
        """What one cached number weighs here, all parts of the cache included."""
        return self.runs[cache].ratio * (4 if self.dtype == "float32" else 2)

    @property
    def read_share(self) -> float | None:
        """How long a plain read of the dense cache takes, as a share of a decode step through it; None: not known."""
        rate = self.decode[DENSE].median
        return None if rate is None else self.read_seconds * rate

    def figures(self) -> dict:
        """As plain data."""
        return {
            "model": {
                "name": Path(self.model).name if self.bundled else self.model,
                "bundled": self.bundled,
                "parameters": self.parameters,
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
            "scoring": asdict(self.scored) | {"dtype": "float32", "positions": self.scored.positions},
            "caches": {cache: self._cache(cache) for cache in self.runs},
            "machine": machine(),
            "versions": versions(),
            "seconds": self.seconds,
        }

    def _cache(self, cache: str) -> dict:
        run, config, agreement = self.runs[cache], self.configs[cache], self.agreement[cache]
        return {
            "config": None if config is None else config.to_dict(),
            "bits_at_long_context": self.bits(cache),
            "memory": run.memory,
            "ratio": run.ratio,
            "bytes_per_element": self.bytes_per_element(cache),
            **{
                f"{name}_{key}": value
                for name, speed in (("prefill", self.prefill[cache]), ("decode", self.decode[cache]))
                for key, value in (
                    ("tokens_per_second", speed.median),
                    ("spread", speed.spread),
                    ("rounds", speed.rounds),
                )
            },
            "routes": run.routes,
            "text": self.texts[cache],
            "same_tokens": self.same_tokens(cache),
            "same_tokens_scored": {"median": median(agreement.same_tokens), "per_prompt": agreement.same_tokens},
            "agreement": {"greedy": agreement.greedy, "held_out": agreement.held_out},
        }


# ---- terminal ------------------------------------------------------------------------------------------------------


def show(report: Report, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Print the texts, the table and what it means."""
    tail = tokenizer.decode(report.prompt, skip_special_tokens=True).splitlines()[-_LINES:]
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
    """The lines around the first token that differs, beside the dense cache's."""
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
    # Long lines are cut off: wrapped ones would not stand side by side.
    sides.add_row(*(_code("\n".join(lines), word_wrap=False) for lines in texts))
    console.print(sides)


def _code(text: str, word_wrap: bool = True) -> Syntax:
    return Syntax(text, "python", theme="ansi_dark", background_color="default", word_wrap=word_wrap)


def _table(report: Report, width: int) -> Table:
    scored = report.scored
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
        "bits\nper\nnumber",
        "\nsize\nin kB",
        "share\nof dense\nsize",
        "reads\nprompt,\ntok/s",
        "writes\ntext,\ntok/s",
        f"same\ntext for,\nof {scored.new_tokens}",
        "same\nchoice,\nown text",
        "same\nchoice,\nreal text",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for cache, run in report.runs.items():
        agreement = report.agreement[cache]
        table.add_row(
            "dense" if cache == DENSE else cache,
            f"{report.bits(cache):g}",
            f"{run.memory['total'] / 1e3:,.0f}",
            f"{run.ratio:.3f}",
            _rate(report.prefill[cache]),
            _rate(report.decode[cache]),
            "–" if cache == DENSE else f"{median(agreement.same_tokens):g}",
            "–" if cache == DENSE else f"{agreement.greedy:.2%}",
            "–" if cache == DENSE else f"{agreement.held_out:.2%}",
        )
    return table


def _rate(speed: Speed) -> str:
    return _NOISY if speed.median is None else f"{speed.median:,.0f}"


def _notes(report: Report) -> list[str]:
    """What the columns mean, and what the figures do not say."""
    dense, scored = report.runs[DENSE], report.scored
    new_tokens = len(dense.tokens)
    fused = sum(run.routes["decode_fused"] for run in report.runs.values() if run.routes)
    copied = sum(run.routes["decode_dequantized"] for run in report.runs.values() if run.routes)
    routes = "all" if not copied else f"{fused} of {fused + copied}"
    rounds = len(report.decode[DENSE].rounds)
    notes = [
        "Bits per number: of one cached number at long context, scales included. Size: of this run "
        f"({report.dtype}, {len(report.prompt) + new_tokens - 1:,} tokens), with the tokens that are kept exact; "
        "these weigh less and less as the context grows.",
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
        f"through the dense cache; median of {len(scored.sources)} prompts, {scored.new_tokens} tokens each, in "
        "float32.",
        f"Same choice: at how many of {scored.positions:,} positions the most likely next token is the one that the "
        f"dense cache leads to, with {scored.context} or more cached tokens before it, in float32. Own text: what the "
        "model wrote through the dense cache (a weak model repeats itself: easy to agree on). Real text: what "
        "follows in the files that the prompts are from.",
    ]


# ---- files ---------------------------------------------------------------------------------------------------------


def save(report: Report, folder: Path, console: Console) -> None:
    """Write `demo.json` and, where matplotlib is installed, `demo.png`, and say where."""
    figures = folder / "demo.json"
    figures.write_text(json.dumps(report.figures(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if find_spec("matplotlib") is None:
        console.print("No plot: matplotlib is not installed (pip install matplotlib).")
    else:
        plot(report.figures(), folder / "demo.png")
        console.print(f"Plot: {folder / 'demo.png'}", soft_wrap=True)
    console.print(f"Figures: {figures}", soft_wrap=True)
    console.print(f"Took {report.seconds:.0f} s.")


def plot(figures: dict, path: Path) -> None:
    """Size, speed, tokens until the text differs, and agreement: a row per cache, the same in each panel."""
    caches, scoring, writing = figures["caches"], figures["scoring"], figures["writing"]
    rows = {cache: -i for i, cache in enumerate(caches)}
    colors = dict(zip(caches, COLORS))
    quantized = [cache for cache in caches if cache != DENSE]
    figure = new_figure(PRINT, (13.5, 4.2))
    panels = figure.subplots(1, 4, sharey=True)
    for axes in panels:
        dress(axes, PRINT)
        axes.grid(visible=False, axis="y")
    size, speed, text, choice = panels
    size.set_yticks(list(rows.values()), ["dense" if cache == DENSE else cache for cache in rows])
    size.tick_params(axis="y", labelsize=11)
    size.set_ylim(0.6 - len(rows), 0.6)

    _bars(size, rows, colors, {c: caches[c]["ratio"] for c in caches}, "{:.2f}")
    size.set(title="Size of the cache", xlabel="share of the dense cache's bytes in this run")
    rates = {c: caches[c]["decode_tokens_per_second"] for c in caches}
    _bars(speed, rows, colors, rates, "{:,.0f}")
    read = writing["read_dense_cache_share_of_step"]
    small = read is not None and read < _OVERHEAD_SHARE
    speed.set(title="Speed of writing",
              xlabel="tokens per second" + ("\n(small model: overheads, not caches)" if small else ""))  # fmt: skip

    # One prompt's count is a tick; the bar is their median.
    for cache in quantized:
        counts = caches[cache]["same_tokens_scored"]["per_prompt"]
        text.plot(counts, [rows[cache]] * len(counts), "|", ms=15, color=PRINT.muted, mew=1, alpha=0.6, clip_on=False)
    _bars(text, rows, colors, {c: caches[c]["same_tokens_scored"]["median"] for c in quantized}, "{:g}",
          beyond=scoring["new_tokens"])  # fmt: skip
    text.set_xticks([scoring["new_tokens"] * i / 4 for i in range(5)])
    text.set(title=f"Tokens until the text differs (of {scoring['new_tokens']})",
             xlabel=f"median of {len(scoring['sources'])} prompts; ticks: each prompt")  # fmt: skip

    # The two marks of a cache stand one above the other, so that equal ones do not cover each other.
    for kind, up, style, label in (
        ("greedy", 0.14, {"marker": "o"}, "own text"),
        ("held_out", -0.14, {"marker": "s", "mfc": PRINT.paper}, "real text"),
    ):
        for cache in quantized:
            share = 100 * caches[cache]["agreement"][kind]
            choice.plot(share, rows[cache] + up, color=colors[cache], ms=7, clip_on=False, zorder=3, **style)
        choice.plot([], [], ls="none", color=PRINT.muted, label=label, **style)
    lowest = min(100 * share for c in quantized for share in caches[c]["agreement"].values())
    # 100 % is the end of the axis, whatever the others are.
    choice.set_xlim(lowest - max(100 - lowest, 0.1) * 0.08, 100)
    choice.set(title="Same choice of the next token", xlabel=f"% of {scoring['positions']:,} positions (float32)")
    choice.legend(fontsize=9, loc="upper left", frameon=False, ncols=2, handletextpad=0, borderaxespad=0.2)
    figure.suptitle(f"{figures['model']['name']}: quantized KV caches, read as stored, beside the dense one "
                    f"({writing['device']}, {writing['dtype']})")  # fmt: skip
    figure.savefig(path, dpi=110)


def _bars(axes, rows: dict, colors: dict, values: dict, form: str, beyond: float | None = None) -> None:
    """A bar and its figure for each cache, or why there is none. Figures stand beyond the bars, or beyond `beyond`."""
    for cache, value in values.items():
        axes.barh(rows[cache], value or 0, height=0.6, color=colors[cache], alpha=0.6)
        end = beyond or value or 0
        label = _NOISY if value is None else form.format(value)
        axes.annotate(label, (end, rows[cache]), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
    # Room for the figures.
    axes.set_xlim(0, 1.18 * (beyond or max(value or 0 for value in values.values()) or 1))
