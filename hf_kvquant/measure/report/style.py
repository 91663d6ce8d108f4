"""The style of all plots: colours, figure sizes, and labels that do not cover each other."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One colour per cache, in the order of the table; readable on white and on black.
COLORS = ("#7c8794", "#2b7bd6", "#12a594", "#8e63d9", "#e5732f", "#d63864", "#3f9e4d", "#b98a1d", "#5d9fd8", "#b07aa1")
PEER_COLORS = ("#6f97c0", "#a68ccd", "#cf9a6b", "#c98299", "#8aa06a", "#9c8f84")


@dataclass(frozen=True)
class Theme:
    """Colours of everything except data."""

    ink: str
    muted: str
    grid: str
    paper: str


PRINT = Theme(ink="#1a1d21", muted="#5b6470", grid="#dfe3e8", paper="#ffffff")
# Unlikely colours, which `to_svg` replaces by the page's CSS variables.
PAGE = Theme(ink="#010203", muted="#010204", grid="#010205", paper="#010206")
# Widths in inches. Text has the same size in all figures, so that it stays readable on a phone.
WIDE, NARROW = 9.0, 4.3


def new_figure(theme: Theme, size: tuple[float, float]) -> Figure:
    """An empty figure on the theme's paper, laid out so that nothing is cut off."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, theme: Theme) -> None:
    """Give the axes colours, a light grid, and no box around the data."""
    axes.set_facecolor(theme.paper)
    axes.grid(color=theme.grid, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=theme.muted, labelsize=9)
    axes.minorticks_off()
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(theme.ink)
        text.set_size(10)


# Places for a label: offsets from its point (in points of print), near ones first.
_PLACES = [
    (dx * far, dy * far)
    for far in (9, 16, 24, 32)
    for dx, dy in ((1, 0), (-1, 0), (0.6, 0.8), (-0.6, 0.8), (0.6, -0.8), (-0.6, -0.8), (0, 1), (0, -1))
]


def label_points(
    axes: Axes, points: Sequence[tuple[float, float, str, str]], lines: Sequence[Sequence[tuple[float, float]]] = ()
) -> None:
    """Write each point's label `(x, y, text, color)` beside it where it covers no other label or point.

    It goes to the nearest place that covers no straight line of `lines` either, or if there is none, to the nearest
    place that does. Limits and scales of the axes must be final.
    """
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    pixels = figure.dpi / 72
    half = 5 * pixels

    def around(x: float, y: float) -> Bbox:
        return Bbox.from_bounds(x - half, y - half, 2 * half, 2 * half)

    taken = [around(*place) for place in axes.transData.transform([(x, y) for x, y, *_ in points])]
    crossed = []
    for line in lines:
        # Points on the line, evenly spaced as it is drawn.
        start, end = axes.transData.transform(line)
        crossed += [around(*(start + (end - start) * i / 12)) for i in range(13)]
    room = axes.get_window_extent(renderer)
    for x, y, text, color in points:
        written = axes.annotate(text, (x, y), xytext=(0, 0), textcoords="offset points", color=color, fontsize=9)
        size = written.get_window_extent(renderer).size
        corner = axes.transData.transform((x, y))
        for obstacles, (right, up) in itertools.product((taken + crossed, taken), _PLACES):
            # The anchor of the label is its point next to the mark.
            anchor = (0 if right > 0 else 1 if right < 0 else 0.5, 0 if up > 0 else 1 if up < 0 else 0.5)
            box = Bbox.from_bounds(*(corner + (right * pixels, up * pixels) - anchor * size), *size)
            inside = room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1
            if inside and not box.count_overlaps(obstacles):
                break
        else:
            # A covered label is better than none.
            (right, up), anchor = _PLACES[0], (0, 0.5)
        written.set_position((right, up))
        written.set(
            ha=("left", "center", "right")[int(2 * anchor[0])], va=("bottom", "center", "top")[int(2 * anchor[1])]
        )
        taken.append(box)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each line's label `(x, y, text, color)` beside its end, joined to it.

    Labels that would cover each other are moved up and down as little as possible. Limits and scales of the axes must
    be final.
    """
    figure = axes.figure
    figure.draw_without_rendering()
    high = [axes.transData.transform((x, y))[1] * 72 / figure.dpi for x, y, *_ in ends]
    for (x, y, text, color), end, place in zip(ends, high, _apart(high, _LINE_HEIGHT)):
        axes.annotate(
            text, (x, y), xytext=(20, place - end), textcoords="offset points", color=color, fontsize=9, ha="left",
            va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.8, "shrinkA": 0, "shrinkB": 4, "relpos": (0, 0.5)},
        )  # fmt: skip


_LINE_HEIGHT = 12.5


def _apart(places: Sequence[float], distance: float) -> list[float]:
    """The places nearest to the given ones (least squares) that keep their order and are at least `distance` apart."""
    order = sorted(range(len(places)), key=places.__getitem__)
    # Less the distances, the places must not decrease. Neighbours that would are moved to their mean.
    runs: list[list[float]] = []
    for i, index in enumerate(order):
        runs.append([places[index] - i * distance])
        while len(runs) > 1 and sum(runs[-2]) / len(runs[-2]) > sum(runs[-1]) / len(runs[-1]):
            runs[-2:] = [runs[-2] + runs[-1]]
    flat = [sum(run) / len(run) for run in runs for _ in run]
    found = [0.0] * len(places)
    for i, index in enumerate(order):
        found[index] = flat[i] + i * distance
    return found


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` for a page: it fills its container, and takes ink and paper from CSS variables."""
    import matplotlib

    buffer = io.StringIO()
    # Text stays text, and ids depend on the plot's name, not on chance.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    for field in ("ink", "muted", "grid", "paper"):
        svg = svg.replace(getattr(PAGE, field), f"var(--{field})")
    return svg.strip()
