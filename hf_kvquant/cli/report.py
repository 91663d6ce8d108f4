"""`hf-kvquant report RESULTS...`: comparisons as one HTML page that opens from disk, the plots as PNG beside it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..measure import is_lm_eval, is_result, read_tasks
from ..measure import report as pages
from ..measure.facts import read_json
from ..measure.store import RESULT
from .models import folder_option


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of `hf-kvquant eval`, their result.json files, or lm-eval result files.", show_default=False
        ),
    ],
    out: Annotated[Path, folder_option("Folder for index.html and the plots.")] = Path("kvquant-report"),
) -> None:
    """Write a page of comparisons: tables, accuracy against bytes, loss along the text, error by layer."""
    if find_spec("matplotlib") is None:
        raise typer.BadParameter("the plots need matplotlib, which is not installed (pip install matplotlib)")
    comparisons, tasks = [], []
    for path in results:
        file = path / RESULT if path.is_dir() else path
        try:
            data = read_json(file)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="RESULTS") from error
        if is_result(data):
            comparisons.append(data)
        elif is_lm_eval(data):
            tasks += read_tasks(data)
        else:
            raise typer.BadParameter(
                f"{str(file)!r} is neither a result of `hf-kvquant eval` nor of lm-eval", param_hint="RESULTS"
            )
    page = pages.write(comparisons, tasks, out)
    typer.echo(f"Page: {page}")
