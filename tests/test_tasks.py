"""The local lm-eval tasks: equal everywhere, answerable from the prompt alone, and solved in their easiest form."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from scripts import script
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")

from lm_eval.tasks import TaskManager

from hf_kvquant.measure.text import held_out_files

TASKS = Path(__file__).parent.parent / "eval" / "tasks"
MODEL = str(files("hf_kvquant") / "models" / "stdlib-nano")


@pytest.fixture(scope="module")
def recall():
    return script("tasks/recall")


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=str(TASKS), include_defaults=False)


def names() -> list[str]:
    texts = [file.read_text() for file in sorted(TASKS.glob("*.yaml"))]
    return [match[1] for text in texts if (match := re.search(r"^task: (\S+)$", text, re.MULTILINE))]


class TestFiles:
    def test_every_task_is_named_by_its_file(self):
        named = {f"kvquant_{file.stem}" for file in TASKS.glob("*.yaml") if not file.stem.startswith("_")}
        assert named == set(names())
        assert len(named) == 14

    @pytest.mark.parametrize("name", names())
    def test_lm_eval_loads_it(self, manager, name):
        task = manager.load([name])["tasks"][name]
        document = next(iter(task.eval_docs))
        assert len(task.eval_docs) == (20 if name == "kvquant_stdlib" else 100)
        assert task.doc_to_target(document) not in ("", None)

    def test_all_but_perplexity_are_recall(self, manager):
        assert set(manager.load(["kvquant_recall"])["tasks"]) == set(names()) - {"kvquant_stdlib"}


class TestExercises:
    def test_the_same_under_every_python(self, recall):
        everything = [dict(d) for kind in recall.KINDS for d in recall.exercises(kind, 12)["test"]]
        text = json.dumps(everything, sort_keys=True)
        assert (
            hashlib.sha256(text.encode()).hexdigest()
            == "1689bfa16739d1961899e0594c87223c06590d9eb79a8afe67f9dee8a5547ed4"
        )

    @pytest.mark.parametrize("size", [4, 24, 64])
    @pytest.mark.parametrize("kind", ["lookup", "choice", "needle", "copy", "induction"])
    def test_the_answer_stands_in_the_prompt_once_before(self, recall, kind, size):
        documents = list(recall.exercises(kind, size)["test"])
        assert len({document["prompt"] for document in documents}) == len(documents) == 100
        for document in documents:
            answer = document["choices"][document["answer"]] if kind == "choice" else document["answer"]
            assert answer.strip() in document["prompt"]

    def test_lookup(self, recall):
        for document in recall.exercises("lookup", 24)["test"]:
            scope: dict = {}
            exec(document["prompt"] + document["answer"], scope)
            assert len(scope["d"]) == 24

    def test_choice(self, recall):
        places = []
        for document in recall.exercises("choice", 24)["test"]:
            assert len(set(document["choices"])) == 4
            assert all(choice in document["prompt"] for choice in document["choices"])
            exec(document["prompt"] + document["choices"][document["answer"]])
            places.append(document["answer"])
        assert set(places) == {0, 1, 2, 3}

    def test_needle(self, recall):
        documents = list(recall.exercises("needle", 40)["test"])
        assert {document["depth"] for document in documents} == {10, 50, 90}
        for document in documents:
            lines = document["prompt"].splitlines()[1:]
            (place,) = [i for i, line in enumerate(lines) if line.endswith(f":{document['answer']},")]
            assert place == 40 * document["depth"] // 100
            assert f"first[{lines[place].split(':')[0].strip()}]" in document["prompt"]

    def test_copy(self, recall):
        for document in recall.exercises("copy", 16)["test"]:
            first, second = (
                (document["prompt"] + document["answer"]).removeprefix("first = [").split("\n]\nsecond = [")
            )
            assert first.startswith(second)

    def test_induction(self, recall):
        for document in recall.exercises("induction", 16)["test"]:
            values = (document["prompt"] + document["answer"]).removeprefix("pattern = [").rstrip(",").split(", ")
            assert 16 < len(values) <= 32
            assert values[16:] == values[: len(values) - 16]

    @pytest.mark.parametrize(
        ("arguments", "message"), [(("riddle", 8), "kind: 'riddle' .*lookup"), (("copy", 3), "size: 3 .*4 or more")]
    )
    def test_refused(self, recall, arguments, message):
        with pytest.raises(ValueError, match=message):
            recall.exercises(*arguments)

    def test_the_script_shows_some(self, recall, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["recall.py", "lookup", "8", "--count", "2"])
        recall.main()
        assert capsys.readouterr().out.count("assert d[") == 2


class TestSourceFiles:
    def test_are_held_out(self, recall):
        documents = list(recall.source_files(20)["test"])
        files = held_out_files()
        assert len(documents) == 20
        for document in documents:
            assert document["text"] == files[document["file"]].read_text(encoding="utf-8")

    def test_too_many_are_refused(self, recall):
        with pytest.raises(ValueError, match="count: .*not 10000"):
            recall.source_files(10000)


def test_depths_are_counted_apart(recall):
    results = [
        recall.by_depth({"answer": " 1", "depth": d}, [answer]) for d, answer in ((10, " 1"), (10, " 2"), (90, " 1"))
    ]
    assert [r["exact_match"] for r in results] == [1.0, 0.0, 1.0]
    assert recall.share_of_depth([r["at_10"] for r in results]) == 0.5
    assert recall.share_of_depth([r["at_90"] for r in results]) == 1.0


@pytest.fixture(scope="module")
def bundled():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), AutoTokenizer.from_pretrained(MODEL)


@pytest.mark.parametrize(
    ("kind", "size", "at_least"), [("lookup", 8, 0.7), ("needle", 16, 0.9), ("copy", 8, 0.85), ("induction", 4, 0.85)]
)
@torch.no_grad()
def test_the_bundled_model_solves_the_easy_end(recall, bundled, kind, size, at_least):
    """The model answers greedily, without any cache; a task that it cannot solve would say nothing about formats."""
    model, tokenizer = bundled
    right = 0
    documents = recall.exercises(kind, size, 40)["test"]
    for document in documents:
        prompt, whole = (tokenizer(text).input_ids for text in (document["prompt"], "".join(
            document[part] for part in ("prompt", "answer"))))  # fmt: skip
        assert whole[: len(prompt)] == prompt, "the answer begins with a token of its own"
        best = model(torch.tensor([whole]), use_cache=False).logits[0].argmax(-1)
        right += best[len(prompt) - 1 : -1].tolist() == whole[len(prompt) :]
    assert right / len(documents) >= at_least


def test_the_yaml_files_say_where_their_documents_are_from():
    for file in TASKS.glob("*.yaml"):
        text = re.sub(r"!function \S+", "function", file.read_text())
        settings = yaml.safe_load(text)
        assert "include" in settings or settings["custom_dataset"] == "function", file.name
