"""The page: figures and tables put into `page.html`, with `style.css`, as one string."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from ..tables import BLIND, TASK_COLUMNS, columns, notes, rows, task_rows, three_digits
from .plots import PLOTS
from .style import NARROW, PAGE, WIDE, to_svg

TITLE = "What a quantized KV cache costs"


def render(results: Sequence[Mapping], tasks: Sequence[Mapping]) -> str:
    """The page's HTML; see `report.write`."""
    tasks = [*(task for result in results for task in result["tasks"]), *tasks]
    return _environment().get_template("page.html").render(
        title=TITLE,
        css=Markup(_file("style.css")),
        sections=[_section(i, result) for i, result in enumerate(results)],
        summary=_summary(results),
        meanings=columns(results[0]) if results else {},
        tasks=task_rows(tasks),
        task_columns=TASK_COLUMNS,
        blind=BLIND,
    )  # fmt: skip


def _section(index: int, result: Mapping) -> dict:
    plan = result["plan"]
    figures = []
    for plot in PLOTS:
        drawn = {
            name: Markup(to_svg(plot.draw(result, PAGE, width), f"{index}-{plot.name}-{name}"))
            for name, width in (("wide", WIDE), ("narrow", NARROW))
        }
        figures.append({"title": plot.title, "caption": plot.caption, **drawn})
    return {
        "id": f"model-{index}",
        "model": plan["model"],
        "notes": notes(result),
        "headers": list(columns(result)),
        "rows": [
            {"kind": result["caches"][name]["kind"], "cells": cells} for name, cells in rows(result).items()
        ],
        "figures": figures,
        "configs": {
            name: json.dumps(cache["settings"], indent=1) for name, cache in result["caches"].items()
        },
        "plan": json.dumps({k: v for k, v in plan.items() if k not in ("caches", "versions")}, indent=1),
        "versions": plan.get("versions") or {},
        "machine": result["machine"] or {},
    }  # fmt: skip


def _summary(results: Sequence[Mapping]) -> dict | None:
    """The mean KL divergence (0.001 nats) of every cache in every comparison; None for a single one."""
    if len(results) < 2:
        return None
    caches = {name: cache["kind"] for result in results for name, cache in result["caches"].items() if name != "dense"}
    body = [
        {"kind": kind, "cells": [name, *(_divergence(result, name) for result in results)]}
        for name, kind in caches.items()
    ]
    return {"headers": ["cache", *(result["plan"]["model"] for result in results)], "rows": body}


def _divergence(result: Mapping, name: str) -> str:
    if name not in result["caches"]:
        return "–"
    return BLIND if result["cache_read_share"] == 0 else three_digits(1000 * result["caches"][name]["kl"]["mean"])


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment(
        loader=FunctionLoader(_file), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")
