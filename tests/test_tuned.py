"""The published results of `hf-kvquant tune`: the table matches the JSON, and the verdicts their figures."""

from __future__ import annotations

import pytest
from scripts import script

from hf_kvquant import KVQuantConfig
from hf_kvquant.measure.tables import put_between

tuned = script("tuned")
RESULTS = tuned.published()


def test_the_readme_says_what_the_results_say():
    readme = tuned.README.read_text(encoding="utf-8")
    assert put_between(readme, tuned.BEGIN, tuned.END, tuned.table(RESULTS)) == readme, "python eval/tuned.py"
    assert len(RESULTS) > 2


@pytest.mark.parametrize("result", RESULTS, ids=lambda r: f"{r['model']}-{r['bits']}-{r['base']['recent_length']}")
def test_a_result_is_within_its_budget_and_judged_by_its_figures(result):
    assert result["smallest"] <= result["chosen_bits"] <= result["bits"]
    assert all(each["bits"] <= result["bits"] for each in result["uniform"])
    KVQuantConfig.from_dict(result["config"])
    kl = {name: cache["kl"]["mean"] for name, cache in result["held_out"]["caches"].items()}
    difference = result["verdict"]["difference"]
    assert difference["mean"] == pytest.approx(kl["tuned"] - kl["uniform"], abs=1e-3 * kl["uniform"])
    assert result["verdict"]["margin"] == pytest.approx(1 - kl["tuned"] / kl["uniform"], abs=1e-3)
    assert result["verdict"]["beats"] == (difference["mean"] < -2 * difference["se"])
    assert result["held_out"]["cache_read_share"] == 1


def test_a_run_is_published(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "RESULTS", tmp_path)
    file = tuned.publish(RESULTS[0])
    assert tuned.published() == RESULTS[:1] and file.stat().st_size < 100_000


def test_a_run_with_error_feedback_is_published_without_its_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "RESULTS", tmp_path)
    base = RESULTS[0]["base"] | {"error_feedback": "/folder/model.feedback"}
    file = tuned.publish(RESULTS[0] | {"base": base})
    assert "feedback" in file.name
    assert tuned.published() == [RESULTS[0] | {"base": base | {"error_feedback": "model.feedback"}}]
