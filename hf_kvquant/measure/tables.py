"""Tables of a comparison, with one definition of columns for terminal, Markdown and HTML; and tables of any rows."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

BLIND = "does not see the cache"
_MOST_DIGITS = 5

# The header of each column, and its meaning.
COLUMNS = {
    "cache": "the cache; bold names in reports are this package's presets",
    "bytes": "bytes per cached element while the text is decoded, keys and values together, with scales and exact "
    "tokens (in 16 bits; the reference weighs what it does in the dtype it runs in)",
    "bytes, long": "the same after 8192 tokens, where exact tokens weigh little",
    "perplexity": "of the scored tokens (the model's own, as a check)",
    "change %": "of the perplexity against the dense cache, ± one standard error",
    "KL": "mean KL divergence of the next token's distribution from the dense cache's, in 0.001 nats, ± one standard "
    "error",
    "KL 99 %": "its 99th percentile over tokens, in 0.001 nats",
    "top-1 %": "how often the most likely token is the dense cache's",
    "1 - TV %": "1 - total variation distance from the dense cache's distribution",
    "same tokens": "greedy tokens before the text first differs from the dense cache's, median over prompts",
    "seconds": "of scoring, not a cache's speed: other packages' caches can only be driven token by token",
}


def columns(result: Mapping) -> dict[str, str]:
    """Headers and meanings of the columns that `result` fills."""
    greedy = result["plan"]["settings"]["greedy_tokens"]
    found = {name: text for name, text in COLUMNS.items() if greedy or name != "same tokens"}
    return {f"{name} (of {greedy})" if name == "same tokens" else name: text for name, text in found.items()}


def rows(result: Mapping) -> dict[str, list[str]]:
    """The cells of each cache, under `columns`."""
    return {name: _cells(name, cache, result["cache_read_share"]) for name, cache in result["caches"].items()}


def _cells(name: str, cache: Mapping, share: float) -> list[str]:
    weight, same = cache["bytes_per_element"], cache["same_tokens"]
    if name == "dense":
        compared = ["–"] * 5
    elif share == 0:
        compared = [BLIND, *["–"] * 4]
    else:
        compared = [
            with_error(cache["perplexity_change"], 100, "+"),
            with_error(cache["kl"], 1000),
            three_digits(1000 * cache["kl"]["p99"]),
            f"{100 * cache['agreement']['mean']:.2f}",
            f"{100 * cache['overlap']['mean']:.2f}",
        ]
    tokens = [] if same is None else ["–" if name == "dense" else f"{same['median']:g}"]
    head = [name, f"{weight['here']:.3f}", f"{weight['long']:.3f}", f"{cache['perplexity']['mean']:.2f}"]
    return [*head, *compared, *tokens, f"{cache['seconds']:.1f}"]


def three_digits(x: float) -> str:
    """`x` with three significant digits and no exponent; at most six decimals."""
    if not math.isfinite(x):
        return str(x)
    exponent = int(f"{x:e}".partition("e")[2])
    return f"{x:.{min(max(0, 2 - exponent), 6)}f}"


def with_error(x: Mapping, factor: float = 1, sign: str = "") -> str:
    """Mean and standard error, with as many digits as the error allows."""
    mean, error = factor * x["mean"], x["se"]
    if not error or not math.isfinite(error):
        return f"{mean:{sign}.3g}"
    error *= factor
    first, _, exponent = f"{error:e}".partition("e")
    # The error gets one digit, or two if it begins with 1.
    digits = max(0, -int(exponent) + (first[0] == "1"))
    if digits > _MOST_DIGITS:
        smallest = 10**-_MOST_DIGITS
        return f"{mean:{sign}.{_MOST_DIGITS}f}" if abs(mean) >= smallest else f"below {smallest:.{_MOST_DIGITS}f}"
    # Adding 0 turns -0 into +0.
    return f"{round(mean, digits) + 0.0:{sign}.{digits}f} ± {error:.{digits}f}"


def notes(result: Mapping) -> list[str]:
    """Sentences about what was scored."""
    plan, settings = result["plan"], result["plan"]["settings"]
    documents, length = plan["documents"], plan["document_length"]
    first = settings["context"] + 1 if settings["first_scored"] is None else settings["first_scored"]
    share = result["cache_read_share"]
    seen = "none read the cache: " + BLIND if share == 0 else f"{share:.1%} of their logits read the cache"
    found = [
        f"{plan['model']} ({plan['parameters']:,} parameters, {plan['dtype']}) on {plan['text']}: {documents} pieces "
        f"of {length} tokens, the first {settings['context']} prefilled; {documents * (length - first):,} tokens "
        f"scored, {seen}.",
        "Standard errors are those of a mean over pieces of text.",
    ]
    return found + [f"{name} was left out: {reason}" for name, reason in result["skipped"].items()]


def rich_table(result: Mapping) -> Table:
    """For the terminal."""
    return new_table(f"{result['plan']['model']}: what each cache costs", columns(result), rows(result).values())


def new_table(title: str, columns: Iterable[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> Table:
    """A table of any cells for the terminal; the columns `left` are aligned to the left, all others to the right."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for i, header in enumerate(columns):
        table.add_column(header, justify="left" if i in left else "right", no_wrap=i == 0)
    for cells in rows:
        table.add_row(*cells)
    return table


def markdown_table(result: Mapping, leave_out: Sequence[str] = ()) -> str:
    """The table in Markdown, with presets in bold, and without the columns `leave_out`."""
    kept = [i for i, header in enumerate(columns(result)) if header not in leave_out]
    headers = [header for i, header in enumerate(columns(result)) if i in kept]
    found = {name: [cells[i] for i in kept] for name, cells in rows(result).items()}
    presets = [name for name in found if result["caches"][name]["kind"] == "preset"]
    return markdown(headers, ([bold(first, presets), *cells] for first, *cells in found.values()))


def bold(name: str, presets: Container[str]) -> str:
    """The name of a cache in Markdown: those of presets are bold."""
    return f"**{name}**" if name in presets else name


def markdown(head: Sequence[object], rows: Iterable[Iterable[object]], left: Container[int] = (0,)) -> str:
    """A table of any cells in Markdown; the columns `left` are aligned to the left, all others to the right."""
    rule = ["---" if i in left else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (head, rule, *rows))


def put_between(page: str, begin: str, end: str, content: str) -> str:
    """`page` with other content between its two marker lines.

    Raises:
        ValueError: the markers are missing.
    """
    if begin not in page or end not in page:
        raise ValueError(f"README.md: expected the lines {begin!r} and {end!r}, between which results stand")
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"


TASK_COLUMNS = ("model", "cache", "task", "metric", "score", "saw the cache")


def task_rows(tasks: Sequence[Mapping]) -> list[list[str]]:
    """The cells of each task score (`tasks.read_tasks`), under `TASK_COLUMNS`."""
    return [
        [task["model"], task["cache"], task["task"], task["metric"], _score(task), _seen(task["cache_read_share"])]
        for task in tasks
    ]


def _score(task: Mapping) -> str:
    return f"{task['value']:.4g}" if not task["se"] else with_error({"mean": task["value"], "se": task["se"]}, 1)


def _seen(share: float | None) -> str:
    if share is None:
        return "not said"
    return BLIND if share == 0 else f"{share:.1%}"


def task_table(tasks: Sequence[Mapping]) -> Table:
    """For the terminal."""
    return new_table("Task scores", TASK_COLUMNS, task_rows(tasks), left=(0, 1, 2, 3, 5))


def print_table(title: str, columns: Iterable[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> None:
    """Print `new_table`, wide enough if the output is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 140))
    console.print(new_table(title, columns, rows, left))
