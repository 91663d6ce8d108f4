"""Documents of the local lm-eval tasks: recall exercises made from a fixed seed, and held-out Python source.

    lm_eval ... --include_path eval/tasks --tasks kvquant_recall,kvquant_stdlib
    python eval/tasks/recall.py lookup 8 --count 2        # look at some

The YAML files beside this one name `exercises` and `source_files` as their data sets, so nothing is downloaded and
nothing is stored: the same exercises come out under every Python version (a test holds their hash). Every answer is in
the prompt word for word, far enough back that only the cache knows it:

    lookup      a dict literal of `size` random keys, then one of them is asked for
    choice      the same, as a choice among four of the dict's values
    needle      one dict entry among `size` lines of a list, at 10, 50 and 90 % of the way, then its key is asked for
    copy        a list of `size` lines, then its beginning once more, up to the middle of a line, to be finished
    induction   `size` values, then their beginning once more; the next one has to follow

The forms are those that the bundled model was trained on (`eval/train_model.py`); any model that knows Python has seen
their like.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence

import datasets

from hf_kvquant.measure.text import held_out_files

COUNT = 100
DEPTHS = (10, 50, 90)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def exercises(kind: str, size: int, count: int = COUNT, **metadata) -> dict[str, datasets.Dataset]:
    """The data set of a recall task: `count` documents with `prompt` and `answer`.

    `metadata` is what lm-eval passes to every data set.

    Raises:
        ValueError: the kind is unknown, or the size is too small for it.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is not allowed; expected one of {list(KINDS)}")
    if size < 4:
        raise ValueError(f"size: {size} is not allowed; expected 4 or more")
    documents = [KINDS[kind](_Random(f"{kind} {size} {i}"), size, i) for i in range(count)]
    return {"test": datasets.Dataset.from_list(documents)}


def source_files(count: int, **metadata) -> dict[str, datasets.Dataset]:
    """The data set of `kvquant_stdlib`: `count` files of the running interpreter's standard library, which the bundled
    model was not trained on (strictly so under the Python version of its training).

    Raises:
        ValueError: there are fewer.
    """
    texts = {name: path.read_text(encoding="utf-8") for name, path in held_out_files().items()}
    documents = [{"file": name, "text": text} for name, text in texts.items() if text.strip()]
    if len(documents) < count:
        raise ValueError(f"count: the standard library here has {len(documents)} held-out files, not {count}")
    return {"test": datasets.Dataset.from_list(documents[:count])}


class _Random:
    """Random choices that are the same under every Python version; `random` guarantees that only for `random()`."""

    def __init__(self, seed: str):
        self._random = random.Random(seed).random

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def word(self) -> str:
        return "".join(_LETTERS[self.below(26)] for _ in range(3 + self.below(4)))

    def words(self, count: int) -> list[str]:
        """`count` different words."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.word()] = None
        return list(found)

    def number(self) -> str:
        return str(1000 + self.below(9000))

    def lines(self, count: int) -> list[tuple[str, str]]:
        return list(zip(self.words(count), self.words(count)))


def _lookup(rng: _Random, size: int, i: int) -> dict:
    table = {word: rng.number() for word in rng.words(size)}
    asked = list(table)[rng.below(size)]
    entries = "".join(f"    '{key}': {value},\n" for key, value in table.items())
    return {"prompt": f"d = {{\n{entries}}}\nassert d['{asked}'] ==", "answer": f" {table[asked]}"}


def _choice(rng: _Random, size: int, i: int) -> dict:
    document = _lookup(rng, size, i)
    values = {line.split(": ")[1].rstrip(",") for line in document["prompt"].splitlines() if ": " in line}
    # Sorted, because a set has no fixed order.
    others = sorted(values - {document["answer"].strip()})
    choices = [f" {others.pop(rng.below(len(others)))}" for _ in range(3)]
    place = rng.below(4)
    choices.insert(place, document.pop("answer"))
    return document | {"choices": choices, "answer": place}


def _needle(rng: _Random, size: int, i: int) -> dict:
    lines = [f"    '{first} {second}',\n" for first, second in rng.lines(size)]
    key, value, depth = rng.word(), rng.number(), DEPTHS[i % len(DEPTHS)]
    lines.insert(size * depth // 100, f"    '{key}': {value},\n")
    return {
        "prompt": f"first = [\n{''.join(lines)}]\nassert first['{key}'] ==",
        "answer": f" {value}",
        "depth": depth,
    }


def _copy(rng: _Random, size: int, i: int) -> dict:
    lines = rng.lines(size)
    at = 1 + rng.below(size - 1)
    whole = [f"\n    '{first} {second}'," for first, second in lines]
    first, second = lines[at]
    prompt = f"first = [{''.join(whole)}\n]\nsecond = [{''.join(whole[:at])}\n    '{first}"
    return {"prompt": prompt, "answer": f" {second}',"}


def _induction(rng: _Random, size: int, i: int) -> dict:
    period = [rng.number() if rng.below(2) else f"'{rng.word()}'" for _ in range(size)]
    at = 1 + rng.below(size - 1)
    prompt = f"pattern = [{', '.join(period + period[:at])},"
    return {"prompt": prompt, "answer": f" {period[at]},"}


KINDS: dict[str, Callable[[_Random, int, int], dict]] = {
    "lookup": _lookup,
    "choice": _choice,
    "needle": _needle,
    "copy": _copy,
    "induction": _induction,
}


def answer_likelihood(doc: dict, results: Sequence[tuple[float, bool]]) -> dict:
    """Whether the whole answer is the greedy text, and its negative log-likelihood."""
    loglikelihood, is_greedy = results[0]
    return {"acc": float(is_greedy), "nats": -loglikelihood}


def by_depth(doc: dict, results: Sequence[str]) -> dict:
    """The score of a needle's answer, right or not, over all documents and over those of its depth."""
    right = float(results[0] == doc["answer"])
    return {"exact_match": right} | {f"at_{depth}": (right, depth == doc["depth"]) for depth in DEPTHS}


def share_of_depth(items: Sequence[tuple[float, bool]]) -> float:
    """The mean over the documents that count."""
    counted = [right for right, counts in items if counts]
    return sum(counted) / len(counted) if counted else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("size", type=int)
    parser.add_argument("--count", type=int, default=1)
    args = parser.parse_args()
    for document in exercises(args.kind, args.size, args.count)["test"]:
        print(document["prompt"], {name: value for name, value in document.items() if name != "prompt"}, sep="\n")


if __name__ == "__main__":
    main()
