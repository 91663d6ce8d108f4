"""One self-contained HTML page (and PNG plots) of comparisons, for `hf-kvquant report`.

    from hf_kvquant.measure.report import write

    write([result], tasks=[], folder=Path("kvquant-report"))   # result: what `measure.compare` gives

The page needs no network and no script, opens from disk, and follows the reader's light or dark theme. Plots are drawn
once, by matplotlib, and are part of the page as SVG in the page's own colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .page import render
from .plots import PLOTS
from .style import PRINT, WIDE

PAGE = "index.html"


def write(results: Sequence[Mapping], tasks: Sequence[Mapping], folder: Path) -> Path:
    """Write the page and, beside it, each plot as `<model>-<plot>.png`; returns the page's path.

    Args:
        results: of `measure.compare`, in the order to show them.
        tasks: scores, as `measure.read_tasks` gives them.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / PAGE
    page.write_text(render(results, tasks), encoding="utf-8")
    for result in results:
        name = result["plan"]["model"].replace("/", "--")
        for plot in PLOTS:
            plot.draw(result, PRINT, WIDE).savefig(folder / f"{name}-{plot.name}.png", dpi=140)
    return page
