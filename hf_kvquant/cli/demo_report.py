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
from ..report.style import COLORS, PRINT, new_figure
from ..scoring import DENSE
from .info import machine, versions
from .running import Run

_LINES = 8
_LINES_OF_DIFFERENCE = 5
# Where reading the cache takes less of a step than this, speed says nothing about caches.
_OVERHEAD_SHARE = 0.2
# Behind labels of the plot.
_WHITE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.8}


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
    def read_share(self) -> float:
        """What a plain read of the dense cache takes, as a share of a decode step through it."""
        return self.read_seconds * self.runs[DENSE].decode_rate

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
            "prefill_tokens_per_second": run.prefill_rate,
            "decode_tokens_per_second": run.decode_rate,
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
        console.rule(f"The same {new_tokens} tokens: {', '.join(same)}", align="left")
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
    console.rule(f"{cache}: the same {same} tokens, then", align="left")
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
        title="KV caches, and how far each agrees with the dense one",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        # Every figure must be readable on 80 columns.
        padding=(0, 1 if width >= 90 else 0),
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("\ncache", style="bold", no_wrap=True)
    headers = "\nbits", "cache\nkB", "of\ndense", "prefill\ntok/s", "decode\ntok/s", "same\ntokens"
    for header in (*headers, f"median\nof {len(scored.sources)}", "agree,\ngreedy", "agree,\nheld-out"):
        table.add_column(header, justify="right", no_wrap=True)
    for cache, run in report.runs.items():
        agreement = report.agreement[cache]
        here, others = f"{report.same_tokens(cache)}", f"{median(agreement.same_tokens):g}"
        table.add_row(
            "dense" if cache == DENSE else cache,
            f"{report.bits(cache):g}",
            f"{run.memory['total'] / 1e3:,.0f}",
            f"{run.ratio:.3f}",
            f"{run.prefill_rate:,.0f}",
            f"{run.decode_rate:,.0f}",
            "–" if cache == DENSE else here,
            "–" if cache == DENSE else others,
            "–" if cache == DENSE else f"{agreement.greedy:.2%}",
            "–" if cache == DENSE else f"{agreement.held_out:.2%}",
        )
    return table


def _notes(report: Report) -> list[str]:
    """What the columns mean, and what the figures do not say."""
    dense, scored = report.runs[DENSE], report.scored
    new_tokens = len(dense.tokens)
    step = dense.decode_seconds / (new_tokens - 1)
    fused = sum(run.routes["decode_fused"] for run in report.runs.values() if run.routes)
    copied = sum(run.routes["decode_dequantized"] for run in report.runs.values() if run.routes)
    speeds = (
        f"A dense step took {step * 1e3:.2f} ms; a plain read of the dense cache takes {report.read_share:.1%} of that"
    )
    speeds += ": these speeds compare overheads, not caches." if report.read_share < _OVERHEAD_SHARE else "."
    routes = "all" if not copied else f"{fused} of {fused + copied}"
    return [
        "bits: of one cached number at long context, scales included. cache kB, of dense: of this run "
        f"({report.dtype}, {len(report.prompt) + new_tokens - 1:,} tokens), with the tokens that are kept exact; "
        "these weigh less and less as the context grows.",
        f"tok/s: tokens per second of one prompt, on {report.device}, {report.backend} backend; {routes} decode steps "
        f"of quantized caches read them as stored. {speeds}",
        "same tokens: how many greedy tokens equal the dense cache's before the first differs, of the "
        f"{new_tokens} above, in {report.dtype}; median of {len(scored.sources)}: the same over "
        f"{len(scored.sources)} prompts, of {scored.new_tokens} tokens in float32.",
        f"agree: the most likely token is the dense cache's, over {scored.positions:,} positions in float32, each "
        f"with {scored.context} or more cached tokens before it; on the dense cache's greedy text (which repeats "
        "itself if the model is weak, and is easy to agree on), and on the real text that follows the same prompts.",
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
    """Agreement over bytes per number; tokens until the text differs; speed."""
    caches, scoring, writing = figures["caches"], figures["scoring"], figures["writing"]
    quantized = [cache for cache in caches if cache != DENSE]
    colors = dict(zip(caches, COLORS))
    figure = new_figure(PRINT, (13.5, 4.8))
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.35, 1, 1))

    for cache in quantized:
        x, agreement = caches[cache]["bytes_per_element"], caches[cache]["agreement"]
        for name, marker, face in (("greedy", "o", colors[cache]), ("held_out", "s", "none")):
            left.plot(x, 100 * agreement[name], marker, ms=8, color=colors[cache], mfc=face)
        left.plot([x, x], [100 * agreement["greedy"], 100 * agreement["held_out"]], color=colors[cache], lw=1)
        left.annotate(cache, (x, 100 * agreement["held_out"]), xytext=(0, -8), textcoords="offset points", ha="center",
                      va="top", fontsize=9, color=colors[cache], bbox=_WHITE)  # fmt: skip
    left.axhline(100, color="0.45", lw=0.8, ls=":")
    left.plot([], [], "o", color="0.3", label="on the dense cache's greedy text")
    left.plot([], [], "s", color="0.3", mfc="none", label="on held-out text")
    left.margins(x=0.18, y=0.2)
    left.set(xlabel=f"bytes per cached number in this run (dense: {caches[DENSE]['bytes_per_element']:g})",
             ylabel="top-1 agreement with the dense cache (%)",
             title=f"Agreement over {scoring['positions']:,} positions (float32)")  # fmt: skip
    left.legend(fontsize=8, loc="lower right")
    left.grid(alpha=0.3)

    names = range(len(quantized))
    same = [caches[cache]["same_tokens_scored"] for cache in quantized]
    bars = middle.bar(names, [s["median"] for s in same], color=[colors[c] for c in quantized], alpha=0.6)
    for i, s in enumerate(same):
        middle.plot([i] * len(s["per_prompt"]), s["per_prompt"], "_", ms=14, color="0.2", mew=0.8)
    middle.bar_label(bars, [f"{s['median']:g}" for s in same], fontsize=9, padding=3, bbox=_WHITE)
    middle.set_xticks(names, quantized, rotation=30, ha="right")
    middle.margins(y=0.12)
    middle.set(ylabel=f"tokens (of {scoring['new_tokens']})",
               title=f"Greedy tokens before text first differs\n"
                     f"(bars: median of {len(scoring['sources'])} prompts, lines: each)")  # fmt: skip

    rates = [caches[cache]["decode_tokens_per_second"] for cache in caches]
    bars = right.bar(range(len(caches)), rates, color=[colors[c] for c in caches], alpha=0.6)
    right.bar_label(bars, [f"{rate:.0f}" for rate in rates], fontsize=9)
    right.set_xticks(range(len(caches)), ["dense" if c == DENSE else c for c in caches], rotation=30, ha="right")
    right.margins(y=0.12)
    title = f"Decode speed ({writing['device']}, {writing['backend']} backend, {writing['dtype']})"
    if writing["read_dense_cache_share_of_step"] < _OVERHEAD_SHARE:
        title += "\nsmall model: overheads, not caches"
    right.set(ylabel="tokens per second", title=title)
    figure.suptitle(f"{figures['model']['name']}: a KV cache quantized and read as stored, against the dense one")
    figure.savefig(path, dpi=110)
