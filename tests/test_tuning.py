"""`tune`: the knapsack against all combinations, the search on the bundled model and on broken ones, going on after
an interruption, the verdict, and the command."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from pathlib import Path
from types import SimpleNamespace

import broken_models
import matplotlib.image
import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from hf_kvquant import KVQuantConfig, QuantSpec
from hf_kvquant.cli import app
from hf_kvquant.cli.tune import CONFIG, PLOT, said
from hf_kvquant.measure import sides as module
from hf_kvquant.measure import tuning
from hf_kvquant.measure.caches import Preset
from hf_kvquant.measure.guard import Limits, check
from hf_kvquant.measure.knapsack import Knapsack
from hf_kvquant.measure.sides import losses, total_bits
from hf_kvquant.measure.store import RESULT
from hf_kvquant.measure.text import bundled_model, windows
from hf_kvquant.measure.tuning import Tuner, judge

CONTEXT, BITS = 40, 5.0
INT4 = KVQuantConfig.preset("int4")
# A smaller search, for speed.
FEW = {"format": ("int8", "int4", "int3", "dense"), "grid": ("token", "channel"), "group_size": (None, 16),
       "block_length": (None, 128), "rotate": (False, True)}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def few():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHOICES", FEW)
        yield


@pytest.fixture(scope="module")
def documents() -> torch.Tensor:
    """Two to choose by, and three to judge by."""
    return windows(AutoTokenizer.from_pretrained(bundled_model()), 5, 160)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tuned")


def tuner(documents: torch.Tensor, folder: Path, model=None, bits: float = BITS, **options) -> Tuner:
    model = model or broken_models.healthy()
    return Tuner(model, documents[:2], documents[2:], bits, CONTEXT, INT4, folder, progress=False, **options)


@pytest.fixture(scope="module")
def finished(documents, folder) -> tuple[Tuner, dict]:
    search = tuner(documents, folder)
    return search, search.run()


class TestKnapsack:
    def test_against_all_combinations(self):
        source = random.Random(0)
        for _ in range(30):
            costs = {i: {c: source.random() for c in range(source.randint(1, 4))} for i in range(source.randint(1, 4))}
            weights = {i: {c: source.choice([33, 34, 36, 40, 66, 128]) for c in costs[i]} for i in costs}
            found = Knapsack(costs, weights)
            smallest, largest = (sum(f(w.values()) for w in weights.values()) for f in (min, max))
            assert found.smallest == smallest
            for limit in (smallest, (smallest + largest) / 2, largest):
                chosen = found.choose(limit)
                assert sum(weights[i][c] for i, c in chosen.items()) <= limit
                all_others = itertools.product(*costs.values())
                least = min(sum(costs[i][c] for i, c in enumerate(each)) for each in all_others
                            if sum(weights[i][c] for i, c in enumerate(each)) <= limit)  # fmt: skip
                assert sum(costs[i][c] for i, c in chosen.items()) == pytest.approx(least)
            with pytest.raises(ValueError, match=f"expected at least {smallest}"):
                found.choose(smallest - 1)

    def test_costs_below_zero_and_infinite_ones(self):
        costs = {"a": {0: float("inf"), 1: 1.0}, "b": {0: -1.0, 1: -2.0}}
        found = Knapsack(costs, {key: {0: 1, 1: 2} for key in costs})
        assert found.choose(3) == {"a": 1, "b": 0}
        assert found.choose(4) == {"a": 1, "b": 1}
        with pytest.raises(ValueError, match="limit: 2"):
            found.choose(2)

    def test_many_totals_are_rounded_up(self):
        """Never more than the limit, whatever the unit."""
        source = random.Random(1)
        weights = {i: {c: source.randint(10**6, 10**7) for c in range(3)} for i in range(5)}
        costs = {i: {c: 1 / weights[i][c] for c in range(3)} for i in weights}
        for limit in (3 * 10**7, 4 * 10**7, 10**8):
            assert sum(weights[i][c] for i, c in Knapsack(costs, weights).choose(limit).items()) <= limit


class TestTuner:
    def test_the_result_is_within_the_budget_and_best_of_all_measured(self, documents, finished):
        search, result = finished
        config = KVQuantConfig.from_dict(result["config"])
        assert total_bits(config, search.shapes) == pytest.approx(result["chosen_bits"])
        assert result["chosen_bits"] <= BITS
        assert (config.sink_length, config.recent_length) == (INT4.sink_length, INT4.recent_length)
        kl = losses(search.model, documents[:2], {"it": config}, CONTEXT, {}, progress=False)["it"]["kl"]["mean"]
        assert kl == pytest.approx(min(result["rounds"]), rel=1e-6)
        within = [point["kl"] for point in result["curve"] if point["bits"] <= BITS]
        assert kl <= min(within + [each["kl"] for each in result["uniform"]])
        assert result["rounds"] == sorted(result["rounds"], reverse=True)

    def test_losses_alone_are_those_of_one_side(self, documents, finished):
        search, result = finished
        alone = {(each["layer"], each["side"], each["spec"]): each for each in result["alone"]}
        entry = alone[1, "values", "int4:token:16"]
        dense, spec = QuantSpec("dense"), QuantSpec("int4", group_size=16)
        config = KVQuantConfig.from_dict(
            {"keys": dense, "values": dense, "layers": {1: {"values": spec}}, "sink_length": 4, "recent_length": 32}
        )
        kl = losses(search.model, documents[:2], {"it": config}, CONTEXT, {}, progress=False)["it"]["kl"]["mean"]
        assert entry["kl"] == pytest.approx(kl, rel=1e-6)
        assert entry["bits"] == 5

    def test_the_curve_falls(self, finished):
        curve = finished[1]["curve"]
        assert [point["bits"] for point in curve] == sorted(point["bits"] for point in curve)
        estimates = [point["estimate"] for point in curve]
        assert estimates == sorted(estimates, reverse=True)
        assert curve[0]["bits"] == finished[1]["smallest"] == 4.25
        assert curve[-1]["kl"] < curve[0]["kl"] / 5

    def test_uniform_configs_are_uniform_and_within_the_budget(self, finished):
        found = finished[1]["uniform"]
        assert {"int4", "int4-small"} < {each["name"] for each in found}
        for each in found:
            config = KVQuantConfig.from_dict(each["config"])
            assert config.layers == () and each["bits"] == config.bits_per_element(64) <= BITS
        assert [each["kl"] for each in found] == sorted(each["kl"] for each in found)

    def test_the_verdict_is_over_held_out_documents(self, documents, finished):
        search, result = finished
        configs = {"tuned": KVQuantConfig.from_dict(result["config"]),
                   "uniform": KVQuantConfig.from_dict(result["uniform"][0]["config"])}  # fmt: skip
        kl = {name: [losses(search.model, ids, {"it": config}, CONTEXT, {}, progress=False)["it"]["kl"]["mean"]
                     for ids in documents[2:].split(1)] for name, config in configs.items()}  # fmt: skip
        assert result["verdict"]["margin"] == pytest.approx(1 - sum(kl["tuned"]) / sum(kl["uniform"]), rel=1e-3)
        difference = statistics.fmean(a - b for a, b in zip(kl["tuned"], kl["uniform"]))
        assert result["verdict"]["difference"]["mean"] == pytest.approx(difference, rel=1e-3)
        found = result["held_out"]["caches"]["tuned"]["kl"]["mean"]
        assert found == pytest.approx(statistics.fmean(kl["tuned"]), rel=1e-4)

    def test_a_killed_run_goes_on(self, documents, finished, folder, tmp_path, monkeypatch):
        """And a finished one measures nothing again."""
        rows, left = Preset.rows, [10]

        def counted(self, *arguments):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return rows(self, *arguments)

        monkeypatch.setattr(Preset, "rows", counted)
        with pytest.raises(KeyboardInterrupt):
            _ = tuner(documents, tmp_path).losses_alone
        left[0] = 1000
        alone = tuner(documents, tmp_path).losses_alone
        # Two documents of each; dense sides are not measured.
        assert 1000 - left[0] == 2 * sum(len(costs) - 1 for costs in alone.values()) - 10
        assert alone == finished[0].losses_alone
        left[0] = 0
        assert tuner(documents, folder).run() == finished[1]

    def test_another_budget_repeats_no_choice_alone(self, documents, finished, folder, monkeypatch):
        rows, seen = Preset.rows, []

        def noted(self, *arguments):
            seen.append(self.name)
            return rows(self, *arguments)

        monkeypatch.setattr(Preset, "rows", noted)
        result = tuner(documents, folder, bits=8.5, rounds=0).run()
        assert result["chosen_bits"] <= 8.5 and min(result["rounds"]) < min(finished[1]["rounds"])
        assert not [name for name in seen if name.startswith("0-")]

    def test_other_documents_in_the_same_folder_are_refused(self, documents, finished, folder):
        with pytest.raises(ValueError, match="documents_sha256"):
            tuner(documents.flip(0), folder).run()

    def test_formats_of_fewer_bits_take_part_in_small_budgets(self, documents, finished, tmp_path, monkeypatch):
        """Beside 4 bits and more, so a side that bears little may keep them."""

        def formats(search: Tuner) -> set[str]:
            return {spec.format for specs in search.choices.values() for spec in specs}

        usual = {"int8", "int4", "dense"}
        assert formats(finished[0]) == usual
        for options in ({"bits": 4.9}, {"narrow": True}):
            assert formats(tuner(documents, tmp_path, **options)) == {*usual, "int3"}, options
        assert formats(tuner(documents, tmp_path, bits=4.5, narrow=False)) == usual
        monkeypatch.setattr(tuning, "_NARROW_BELOW", 0.0)
        assert formats(tuner(documents, tmp_path, bits=4.3)) == usual
        assert formats(tuner(documents, tmp_path, bits=4.2)) == {*usual, "int3"}

    def test_too_few_bits_name_the_smallest(self, documents, tmp_path):
        with pytest.raises(ValueError, match=r"bits: 3.2 is not allowed; expected at least 3.25, the fewest in which"):
            tuner(documents, tmp_path, bits=3.2)
        with pytest.raises(ValueError, match="bits: nan is not allowed"):
            tuner(documents, tmp_path, bits=float("nan"))

    def test_the_smallest_budget_is_possible(self, documents, finished, folder):
        result = tuner(documents, folder, bits=4.25, rounds=1, narrow=False).run()
        assert result["chosen_bits"] == 4.25

    def test_a_base_with_overrides_is_refused(self, documents, tmp_path):
        base = KVQuantConfig.from_dict({**INT4.to_dict(), "layers": {1: {"keys": {"format": "int8"}}}})
        with pytest.raises(ValueError, match=r"base: overrides of the layers \[1\]"):
            Tuner(broken_models.healthy(), documents, documents, 5, CONTEXT, base, tmp_path)

    @pytest.mark.parametrize(("name", "layer"), [("with_value_channel", 3), ("with_key_bias", 2)])
    def test_a_broken_model_is_repaired(self, documents, tmp_path, name, layer):
        model = getattr(broken_models, name)(layer)
        base = KVQuantConfig.preset("int4-small")
        assert not check(model, documents[2:], base, CONTEXT, progress=False)["passed"]
        search = Tuner(model, documents[:2], documents[2:], 6.0, CONTEXT, base, tmp_path, rounds=1, progress=False)
        config = KVQuantConfig.from_dict(search.run()["config"])
        found = check(model, documents[2:], config, CONTEXT, Limits(kl=0.02), progress=False)
        assert found["passed"] and found["bits"] <= 6

    def test_the_estimate_counts_every_measurement(self, documents, finished, folder, monkeypatch):
        """It is the time of a document through a cache, times the measurements of a run that goes to the end."""
        clock = iter((0.0, 2.0))
        monkeypatch.setattr(tuning, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        search = tuner(documents, folder, rounds=1)
        monkeypatch.setattr(search, "_scored", lambda *_: {})
        measured = sum(len(list(stage.glob("documents/*/*.npz"))) for stage in folder.iterdir()
                       if stage.name == "alone" or "5-bits" in stage.name)  # fmt: skip
        assert 0.6 * measured < search.seconds() < 1.6 * measured


class TestJudge:
    def test_a_difference_must_be_certain(self):
        assert judge([1.0, 1.1, 0.9], [2.0, 2.1, 1.9]) == {
            "margin": pytest.approx(0.5), "difference": {"mean": pytest.approx(-1), "se": pytest.approx(0, abs=1e-9)},
            "beats": True,
        }  # fmt: skip
        assert not judge([1.0, 3.0, 1.0], [2.0, 2.0, 2.0])["beats"]
        assert not judge([2.0, 2.0], [1.0, 1.0])["beats"]
        assert not judge([2.0, 2.0], [2.0, 2.0])["beats"]
        assert not judge([1.0], [2.0])["beats"]

    def test_in_words(self):
        result = {"uniform": [{"name": "int4"}]}
        better = said(result | {"verdict": judge([0.0010, 0.0012], [0.0020, 0.0021])})
        assert "it beats the best uniform config within the budget, int4: KL divergence 46% lower" in better
        unclear = said(result | {"verdict": judge([0.0010, 0.0020], [0.0020, 0.0021])})
        assert "is not certain to beat" in unclear and "27% lower" in unclear and "less than two standard" in unclear
        worse = said(result | {"verdict": judge([0.0030, 0.0032], [0.0020, 0.0021])})
        assert "does not beat" in worse and "51% higher" in worse


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["tune", *map(str, arguments)], env={"COLUMNS": "140", "NO_COLOR": "1"})
    assert result.exit_code == code, result.output
    return " ".join(result.output.replace("│", " ").split())


SMALL = "--documents", 2, "--window", 96, "--rounds", 1


class TestCommand:
    def test_config_plot_and_verdict(self, tmp_path):
        printed = call("stdlib-nano", *SMALL, "--bits", 5, "--out", tmp_path)
        result = json.loads((tmp_path / RESULT).read_text(encoding="utf-8"))
        assert said(result) in printed
        assert f"--model hf-kvquant --model_args pretrained={bundled_model()},kv_config={tmp_path / CONFIG}" in printed
        assert "8 sides" in printed and "seconds here" in printed
        config = KVQuantConfig.from_yaml(tmp_path / CONFIG)
        assert config == KVQuantConfig.from_dict(result["config"])
        assert config.for_layer(2)[0].code in printed
        image = matplotlib.image.imread(tmp_path / PLOT)
        assert image.shape[1] > 1000 and image[..., :3].std() > 0.05
        assert result["model"] == "stdlib-nano"

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (["--bits", "2"], "bits: 2.0 is not allowed; expected at least"),
            (["--bits", "5", "--base", "none"], "--base: base: 'none' is neither a preset nor a file"),
            (["--bits", "5", "--text", "no.txt"], "text: 'no.txt' cannot be read"),
            (["--bits", "5", "--context", "96"], "context: 96 leaves no token to score"),
        ],
        ids=lambda x: " ".join(x) if isinstance(x, list) else "",
    )
    def test_wrong_use_is_one_clear_line(self, tmp_path, arguments, match):
        printed = call("stdlib-nano", *SMALL, *arguments, "--out", tmp_path / "out", code=2)
        assert match in printed and "Traceback" not in printed
        assert not (tmp_path / "out" / CONFIG).exists()
