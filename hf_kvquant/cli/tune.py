"""`hf-kvquant tune MODEL --bits N`: the config that loses least on this model and text within N bits per element.

Half of the text's pieces choose, the other half judges. `measure.tuning` says how. `--lm-eval TASK` scores a task of
lm-eval through the dense cache, the best uniform config and the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from ..config import KVQuantConfig
from ..host import context_length
from ..measure.caches import DENSE
from ..measure.facts import machine, versions, write_json, write_text
from ..measure.report.plots import tuned
from ..measure.report.style import PRINT, WIDE
from ..measure.store import RESULT
from ..measure.tables import COLUMNS, new_table, notes, rich_table, task_table, three_digits
from ..measure.tuning import TUNED, UNIFORM, Tuner
from .evaluate import model_name, read_documents
from .models import Device, Dtype, ModelArgument, folder_option, load_model, source_of

CONFIG, PLOT = "config.yaml", "pareto.png"
_LONGEST_WINDOW = 512


def tune(
    model: ModelArgument,
    bits: Annotated[
        float, typer.Option(help="The most stored bits per element, exact tokens left out.", show_default=False)
    ],
    text: Annotated[
        Path | None, typer.Option(help="A text file.", show_default="source of Python's standard library")
    ] = None,
    base: Annotated[
        str, typer.Option(help="The preset or YAML file whose exact tokens and other fields the result has.")
    ] = "int4",
    documents: Annotated[
        int, typer.Option(min=2, help="Pieces of the text to choose by, and as many again to judge by.")
    ] = 6,
    window: Annotated[
        int | None, typer.Option(min=4, help="Tokens of a piece.", show_default="512, or the model's context")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a piece to prefill.", show_default="a quarter of it")
    ] = None,
    rounds: Annotated[int, typer.Option(min=0, help="The most rounds of changes inside of the whole cache.")] = 2,
    narrow: Annotated[
        bool | None,
        typer.Option(help="Try int3 and int2, on a GPU where its kernels take them.", show_default="below 5 bits"),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="float32: only the caches differ, not the rounding. auto: the checkpoint's.")
    ] = Dtype.float32,
    device: Annotated[Device, typer.Option(help="auto: a GPU if there is one.")] = Device.auto,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--lm-eval", metavar="TASK", help="Also score this task of lm-eval; it may be given again."),
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option("--lm-eval-path", help="A folder with tasks of your own.")
    ] = None,
    task_limit: Annotated[
        int | None, typer.Option("--lm-eval-limit", min=1, help="At most this many documents of each task.")
    ] = None,
    out: Annotated[
        Path, folder_option("Folder for the config and all measurements. A run that was killed goes on in it.")
    ] = Path("kvquant-tune"),
) -> None:
    """Find the config that loses least on a model within a number of bits, and write it as YAML."""
    console = Console()
    try:
        start = KVQuantConfig.load(base, "base")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--base") from error
    manager = _known_tasks(tasks, task_folder) if tasks else None
    lm, tokenizer = load_model(model, dtype.value, device.value)
    window = window or min(_LONGEST_WINDOW, context_length(lm.config) or _LONGEST_WINDOW)
    context = context or max(1, window // 4)
    name = model_name(model)
    try:
        ids, source = read_documents(tokenizer, text, 2 * documents, window)
        facts = {"model": name, "text": source, "versions": versions()}
        tuner = Tuner(lm, ids[:documents], ids[documents:], bits, context, start, out, facts, rounds, narrow=narrow)
        console.print(f"{len(tuner.choices)} sides, {sum(map(len, tuner.choices.values()))} choices in all; about "
                      f"{_duration(tuner.seconds())} here.", highlight=False)  # fmt: skip
        result = tuner.run()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    config = KVQuantConfig.from_dict(result["config"])
    if tasks:
        from ..measure.lm_eval import task_scores

        uniform = KVQuantConfig.from_dict(result["uniform"][0]["config"])
        caches = {DENSE: None, UNIFORM: uniform, TUNED: config}
        scores = task_scores(lm, tokenizer, caches, tasks, manager, task_limit)
        result["tasks"] = [score | {"model": name} for score in scores]
    write_json(out / RESULT, result | {"machine": machine()})
    head = (f"# Tuned for {name} on {source}: {result['chosen_bits']:.4g} bits per element, KL divergence "
            f"{three_digits(1000 * min(result['rounds']))} thousandths of a nat.\n")  # fmt: skip
    write_text(out / CONFIG, head + yaml.safe_dump(config.to_dict(), sort_keys=False))
    show(result, console)
    scoring = f"--model hf-kvquant --model_args pretrained={source_of(model)},kv_config={out / CONFIG}"
    console.print(
        f"Config: {out / CONFIG}, for cache_config= and for hf-kvquant lm-eval {scoring}",
        soft_wrap=True,
        highlight=False,
    )
    if find_spec("matplotlib") is None:
        console.print("The plot needs matplotlib, which is not installed (pip install matplotlib).")
    else:
        tuned(result, PRINT, WIDE).savefig(out / PLOT, dpi=150)
        console.print(f"Plot: {out / PLOT}", soft_wrap=True, highlight=False)


def show(result: Mapping, console: Console) -> None:
    """Print the curve, the uniform configs, the result by layer, and the verdict on held-out text."""

    def milli(kl: float) -> str:
        return three_digits(1000 * kl)

    # Several numbers of bits may have the same best choices.
    curve = list(dict.fromkeys(
        (f"{point['bits']:.3f}", milli(point["kl"]), milli(point["estimate"])) for point in result["curve"]
    ))  # fmt: skip
    console.print(new_table("KL divergence (0.001 nats) over stored bits per element",
                            ("bits", "measured", "if losses added up"), curve, left=()))  # fmt: skip
    uniform = [(each["name"], f"{each['bits']:.3f}", milli(each["kl"])) for each in result["uniform"]]
    console.print(new_table("The same in all layers, within the budget", ("config", "bits", "KL"), uniform))
    config = KVQuantConfig.from_dict(result["config"])
    layers = sorted({entry["layer"] for entry in result["alone"]})
    rows = [(str(layer_idx), *(spec.code for spec in config.for_layer(layer_idx))) for layer_idx in layers]
    console.print(new_table(f"Chosen: {result['chosen_bits']:.3f} bits, KL {milli(min(result['rounds']))}",
                            ("layer", "keys", "values"), rows, left=(0, 1, 2)))  # fmt: skip
    console.print(rich_table(result["held_out"]))
    for name in ("KL", "KL 99 %", "top-1 %", "1 - TV %"):
        console.print(f"[bold]{name}[/]: {COLUMNS[name]}.", highlight=False)
    for note in notes(result["held_out"]):
        console.print(f"• {note}", highlight=False)
    if "tasks" in result:
        console.print(task_table(result["tasks"]))
    console.print(f"\n[bold]{said(result)}[/]", highlight=False)


def _known_tasks(tasks: list[str], folder: Path | None) -> Any:
    """lm-eval's tasks, if all of these are among them: found out before the search, which takes long."""
    if find_spec("lm_eval") is None:
        raise typer.BadParameter("lm-eval is not installed (pip install 'lm-eval>=0.4.13')", param_hint="--lm-eval")
    from ..measure.lm_eval import known_tasks

    try:
        return known_tasks(tasks, folder)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--lm-eval") from error


def said(result: Mapping) -> str:
    """The verdict in one sentence."""
    verdict, best = result["verdict"], result["uniform"][0]
    difference = verdict["difference"]
    share = f"{abs(verdict['margin']):.0%} {'lower' if verdict['margin'] >= 0 else 'higher'}"
    figures = (f"KL divergence {share}, difference {1000 * difference['mean']:+.3g} ± {1000 * difference['se']:.2g} "
               "thousandths of a nat")  # fmt: skip
    beats, more = "does not beat", ""
    if verdict["beats"]:
        beats = "beats"
    elif difference["mean"] < 0:
        beats, more = "is not certain to beat", ", less than two standard errors"
    return f"On held-out text it {beats} the best uniform config within the budget, {best['name']}: {figures}{more}."


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"
