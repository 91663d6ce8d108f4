"""The plots of one comparison: accuracy against bytes, along the text, and by layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from ..caches import DENSE
from .style import COLORS, PEER_COLORS, WIDE, Theme, dress, label_points, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MILLI = 1000
# The axis of added loss is linear up to this many nats.
_LINEAR = 0.02


@dataclass(frozen=True)
class Plot:
    """`draw(result, theme, width)`: a figure of that width in inches."""

    name: str
    title: str
    caption: str
    draw: Callable[[Mapping, Theme, float], Figure]


def line_styles(result: Mapping) -> dict[str, dict]:
    """Colour, marker and dashes of every cache except the reference: ours are solid, with round marks."""
    found, ours, others = {}, 0, 0
    for name, cache in result["caches"].items():
        if name == DENSE:
            continue
        if cache["kind"] == "peer":
            found[name] = {"color": PEER_COLORS[others % len(PEER_COLORS)], "marker": "s", "ls": (0, (3, 2)), "ms": 5}
            others += 1
        else:
            # The first colour, grey, is for the dense cache in 16 bits.
            color = COLORS[0] if cache["kind"] == "dense" else COLORS[1 + ours % (len(COLORS) - 1)]
            ours += cache["kind"] != "dense"
            found[name] = {"color": color, "marker": "o", "ls": "-", "ms": 6}
    return found


def pareto(result: Mapping, theme: Theme, width: float) -> Figure:
    """KL divergence over bytes per element."""
    figure = new_figure(theme, (width, 4.6))
    draw_pareto(figure.subplots(), result, theme)
    return figure


def draw_pareto(axes: Axes, result: Mapping, theme: Theme) -> None:
    """The same, as one panel of a figure."""
    caches, styles = result["caches"], line_styles(result)
    points, lines = [], []
    for name, style in styles.items():
        kl, se, weight = caches[name]["kl"]["mean"], caches[name]["kl"]["se"], caches[name]["bytes_per_element"]
        if kl <= 0:
            continue
        color = style["color"]
        axes.plot([weight["here"], weight["long"]], [_MILLI * kl] * 2, color=color, lw=1, alpha=0.6)
        axes.plot(weight["long"], _MILLI * kl, style["marker"], ms=style["ms"], color=color, mfc=theme.paper)
        error = _MILLI * min(se or 0, 0.99 * kl)
        axes.errorbar(weight["here"], _MILLI * kl, yerr=error, fmt=style["marker"], ms=style["ms"] + 1, color=color)
        points.append((weight["here"], _MILLI * kl, name, color))
        lines.append([(weight["here"], _MILLI * kl), (weight["long"], _MILLI * kl)])
    axes.set_xscale("log")
    axes.set_yscale("log")
    for line in _frontier([(x, y) for x, y, *_ in points]):
        axes.plot(*zip(*line), color=theme.muted, lw=1, ls=":", zorder=0)
        lines.append(line)
    axes.margins(x=0.16, y=0.1)
    ticks = [t for t in (0.25, 0.5, 1, 2, 4) if _inside(t, axes.get_xlim())]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.set(xlabel="bytes per cached element", ylabel="KL divergence from the dense cache (0.001 nats)")
    dress(axes, theme)
    label_points(axes, sorted(points, key=lambda point: point[1]), lines)


def _inside(x: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= x <= limits[1]


def _frontier(points: list[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The steps, as straight lines, between the points that no other point beats on both axes."""
    best = []
    for x, y in sorted(points):
        if not best or y < best[-1][1]:
            best.append((x, y))
    corners = [((x, y), (after, y), (after, below)) for (x, y), (after, below) in itertools.pairwise(best)]
    return [[start, end] for a, b, c in corners for start, end in ((a, b), (b, c))]


def tuned(result: Mapping, theme: Theme, width: float) -> Figure:
    """KL divergence over stored bits: what `tuning` found, and the uniform configs."""
    figure = new_figure(theme, (width, 4.6))
    axes = figure.subplots()
    curve = sorted((point["bits"], _MILLI * point["kl"]) for point in result["curve"] if 0 < point["kl"] < inf)
    axes.plot(*zip(*curve), "o-", ms=5, lw=1.4, color=COLORS[1], label="best by the losses of single sides")
    uniform = [(each["bits"], _MILLI * each["kl"]) for each in result["uniform"] if each["kl"] < inf]
    axes.plot(*zip(*uniform), "s", ms=5, color=PEER_COLORS[2], label="the same in all layers")
    axes.plot(result["chosen_bits"], _MILLI * min(result["rounds"]), "D", ms=8, color=COLORS[4], label="chosen")
    axes.set_yscale("log")
    axes.margins(x=0.1, y=0.1)
    axes.set(xlabel="stored bits per element", ylabel="KL divergence from the dense cache (0.001 nats)")
    _finish(figure, [axes], theme, width >= WIDE)
    return figure


def by_position(result: Mapping, theme: Theme, width: float) -> Figure:
    """Added loss and KL divergence along the text."""
    styles = line_styles(result)
    middles = [(start + end - 1) / 2 for start, end in result["positions"]]
    wide = width >= WIDE
    figure = new_figure(theme, (width, 4.6 if wide else 8))
    left, right = figure.subplots(1, 2) if wide else figure.subplots(2, 1)
    for name, style in styles.items():
        curves = result["caches"][name]["by_position"]
        line = {"color": style["color"], "ls": style["ls"], "lw": 1.4, "label": name}
        left.plot(middles, [_MILLI * y for y in curves["kl"]], **line)
        right.plot(middles, curves["added_loss"], **line)
    left.set_yscale("log")
    # Linear near zero, where most caches are, and logarithmic for the coarsest ones, which would not fit.
    right.set_yscale("symlog", linthresh=_LINEAR)
    right.axhline(0, color=theme.muted, lw=0.8)
    left.set(xlabel="position in the text (tokens)", ylabel="KL divergence (0.001 nats)", title="KL divergence")
    right.set(xlabel="position in the text (tokens)", ylabel="nats", title="Loss minus the dense cache's")
    _finish(figure, (left, right), theme, wide)
    return figure


def by_layer(result: Mapping, theme: Theme, width: float) -> Figure:
    """Relative errors of keys and values by layer."""
    styles = line_styles(result)
    wide = width >= WIDE
    figure = new_figure(theme, (width, 3.9 if wide else 7))
    axes = figure.subplots(1, 2, sharey=True) if wide else figure.subplots(2, 1, sharex=True)
    for name, cache in result["caches"].items():
        for side, panel in zip(("keys", "values"), axes):
            errors = enumerate(cache.get("layer_errors", {}).get(side, []))
            known = [(layer_idx, 100 * error) for layer_idx, error in errors if error]
            if known:
                panel.plot(*zip(*known), marker="o", ms=4, lw=1.4, color=styles[name]["color"], label=name)
    for panel, title in zip(axes, ("Keys", "Values")):
        panel.set_yscale("log")
        panel.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        panel.set_title(title)
        panel.xaxis.get_major_locator().set_params(integer=True)
    for panel in axes if wide else axes[1:]:
        panel.set_xlabel("layer")
    for panel in axes[:1] if wide else axes:
        panel.set_ylabel("relative error (%)")
    _finish(figure, axes, theme, wide)
    return figure


def _finish(figure: Figure, axes, theme: Theme, wide: bool) -> None:
    for panel in axes:
        dress(panel, theme)
        if panel.get_yscale() != "linear":
            panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6 if wide else 3, frameon=False, fontsize=9,
                  labelcolor=theme.ink, handlelength=2.2, columnspacing=1.2)  # fmt: skip


PLOTS = (
    Plot(
        "pareto",
        "Accuracy against bytes",
        "Down and left is better. Filled: bytes while this text is decoded; hollow: after 8192 tokens, where exact "
        "tokens weigh little (the divergence there was not measured). Bars: one standard error. Dotted: what no other "
        "cache beats in both.",
        pareto,
    ),
    Plot(
        "position",
        "Along the text",
        "Means over all pieces of text. Every token reads the cache; further on, a smaller part of the tokens that it "
        "reads is exact.",
        by_position,
    ),
    Plot(
        "layers",
        "Error by layer",
        "|x - stored x| / |x| of the presets, over keys and over values of the same text; windows of exact tokens, "
        "which hide part of it, are left out.",
        by_layer,
    ),
)
