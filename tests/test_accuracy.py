"""The published accuracy: its README matches the JSON, and the JSON meets the expectations; and its script."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from scripts import script

from hf_kvquant import KVQuantConfig
from hf_kvquant.cli.models import load_model
from hf_kvquant.measure import BLIND, PEERS
from hf_kvquant.measure.text import BUNDLED
from hf_kvquant.saving import weights_sum

# The most KL divergence, in nats, of formats that must be near-lossless. At zero, the cache would not have been read.
MOST_KL = 0.002


compare = script("compare")
RESULTS = {result["plan"]["model"]: result for result in compare.published()}
README = compare.README.read_text(encoding="utf-8")


class TestPublished:
    def test_the_readme_says_what_the_results_say(self):
        assert compare.with_tables(README, list(RESULTS.values())) == README, "python eval/compare.py --readme"

    def test_the_bundled_model_is_published_as_it_is_shipped(self):
        model, _ = load_model(BUNDLED, "float32", "cpu")
        assert RESULTS[BUNDLED]["plan"]["weights"] == weights_sum(model), "its weights changed: run eval/compare.py"

    @pytest.mark.parametrize("name", RESULTS)
    def test_every_cache_is_there_and_was_read(self, name):
        result = RESULTS[name]
        assert set(result["caches"]) | set(result["skipped"]) == {
            "dense", "fp16", *KVQuantConfig.preset_names(), *PEERS
        }  # fmt: skip
        assert result["skipped"] == {}
        assert result["cache_read_share"] == 1.0
        assert len({cache["tokens"] for cache in result["caches"].values()}) == 1

    @pytest.mark.parametrize("name", RESULTS)
    def test_presets_are_those_that_are_shipped(self, name):
        for preset in KVQuantConfig.preset_names():
            measured = KVQuantConfig.from_dict(RESULTS[name]["caches"][preset]["settings"])
            # None of these models has latent attention, where alone this field acts.
            assert replace(measured, rotary_keys="values") == replace(
                KVQuantConfig.preset(preset), rotary_keys="values"
            )

    @pytest.mark.parametrize("cache", ["int8", "int8-plain", "fp8"])
    @pytest.mark.parametrize("name", RESULTS)
    def test_eight_bits_lose_next_to_nothing_but_something(self, name, cache):
        assert 0 < RESULTS[name]["caches"][cache]["kl"]["mean"] <= MOST_KL
        assert RESULTS[name]["caches"]["fp16"]["kl"]["mean"] < RESULTS[name]["caches"][cache]["kl"]["mean"]

    @pytest.mark.parametrize("name", RESULTS)
    def test_an_unexpected_order_is_told_in_the_readme(self, name):
        for exception in compare.exceptions(RESULTS[name]):
            assert re.search(rf"On [^.]*\b{name},[^.]*{exception}", README)

    @pytest.mark.parametrize("name", RESULTS)
    def test_caches_that_were_measured_later_are_told_with_the_machine(self, name):
        for entry in RESULTS[name]["added"]:
            assert entry.keys() == {"caches", "machine", "versions"}
            assert {*entry["caches"]} <= RESULTS[name]["caches"].keys()

    @pytest.mark.parametrize("name", RESULTS)
    def test_small_and_without_paths(self, name):
        file = compare.RESULTS / f"{name}.json"
        assert file.stat().st_size < 100_000
        assert "/" not in RESULTS[name]["plan"]["text"]


class TestExceptions:
    def result(self, **kl: float) -> dict:
        return {"caches": {name.replace("_", "-"): {"kl": {"mean": mean}} for name, mean in kl.items()}}

    def test_the_order_as_expected(self):
        assert compare.exceptions(self.result(int8=1, fp8=2, int4=3, quanto_int2=4)) == []

    def test_a_pair_that_is_not(self):
        assert compare.exceptions(self.result(int8=1, fp8=3, int4=2, quanto_int2=4)) == ["int4 loses less than fp8"]

    def test_without_a_peer(self):
        assert compare.exceptions(self.result(int8=3, fp8=2, int4=4)) == ["fp8 loses less than int8"]


ARGUMENTS = ["--presets", "int8", "--documents", "2", "--window", "64", "--context", "32"]


def write_run(folder: Path, result: dict) -> None:
    """`result` as a finished run has it."""
    caches = {
        name: cache | {"same_tokens": cache["same_tokens"] and cache["same_tokens"] | {"each": []}}
        for name, cache in result["caches"].items()
    }
    (folder / "result.json").write_text(json.dumps(result | {"caches": caches}), encoding="utf-8")


class TestScripts:
    def test_compare_publishes_and_writes_the_readme(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(compare, "RESULTS", tmp_path / "accuracy")
        monkeypatch.setattr(compare, "README", tmp_path / "README.md")
        compare.README.write_text(f"before\n{compare.BEGIN}\nold\n{compare.END}\nafter\n", encoding="utf-8")
        compare.main([*ARGUMENTS, "--greedy-tokens", "4", "--out", str(tmp_path / "run")])
        readme = compare.README.read_text(encoding="utf-8")
        published = json.loads((tmp_path / "accuracy" / f"{BUNDLED}.json").read_text(encoding="utf-8"))
        measured = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
        kl = measured["caches"]["int8"]["kl"]["mean"]
        assert published["caches"]["int8"]["kl"]["mean"] == pytest.approx(kl, rel=1e-5) != 0
        assert "old" not in readme and "| **int8** |" in readme and readme.endswith("\nafter\n")
        compare.main(["--readme"])
        assert compare.README.read_text(encoding="utf-8") == readme

    def test_caches_are_added_to_what_is_published(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(compare, "README", tmp_path / "README.md")
        compare.README.write_text(README, encoding="utf-8")
        few = ["--greedy-tokens", "4", "--to", str(tmp_path)]
        compare.main([*ARGUMENTS, *few])
        file = tmp_path / f"{BUNDLED}.json"
        first = json.loads(file.read_text(encoding="utf-8"))
        compare.main(["--add", *ARGUMENTS, "--presets", "int8,int4-small", *few])
        both = json.loads(file.read_text(encoding="utf-8"))
        assert list(both["caches"]) == list(both["plan"]["caches"]) == ["dense", "int8", "int4-small"]
        assert both["caches"]["int8"] == first["caches"]["int8"]
        assert [added["caches"] for added in both["added"]] == [["int4-small"]]
        with pytest.raises(ValueError, match="settings: .*expected"):
            compare.main(["--add", *ARGUMENTS, "--greedy-tokens", "5", "--to", str(tmp_path)])

    def test_a_finished_run_is_added(self, tmp_path, monkeypatch):
        """What is published stays, and peers stay behind presets."""
        monkeypatch.setattr(compare, "README", tmp_path / "README.md")
        compare.README.write_text(README, encoding="utf-8")
        result, new = RESULTS[BUNDLED], "int4-small"
        caches, plan = result["caches"], result["plan"]
        file = tmp_path / f"{BUNDLED}.json"
        others = {name: cache for name, cache in caches.items() if name != new}
        file.write_text(json.dumps(result | {"caches": others}), encoding="utf-8")
        write_run(tmp_path, result | {"plan": plan | {"caches": dict.fromkeys(caches, "of the run")}})
        compare.main(["--from", str(tmp_path), "--to", str(tmp_path), "--add"])
        both = json.loads(file.read_text(encoding="utf-8"))
        are_peers = [cache["kind"] == "peer" for cache in both["caches"].values()]
        assert are_peers == sorted(are_peers) and True in are_peers
        assert both["caches"] == caches and both["added"][-1]["caches"] == [new]
        assert both["plan"]["caches"] == plan["caches"] | {new: "of the run"}
        assert list(both["plan"]["caches"]) == list(both["caches"])

    @pytest.mark.parametrize("field", ["weights", "dtype", "documents_sha256", "settings"])
    def test_another_measurement_is_not_added(self, tmp_path, field):
        result = RESULTS[BUNDLED]
        write_run(tmp_path, result | {"plan": result["plan"] | {field: "another"}})
        (tmp_path / f"{BUNDLED}.json").write_text(json.dumps(result), encoding="utf-8")
        with pytest.raises(ValueError, match=f"^{field}: another is not allowed; expected"):
            compare.publish(tmp_path, tmp_path, add=True)

    def test_compare_refuses_what_it_does_not_know(self, capsys):
        with pytest.raises(SystemExit):
            compare.main(["--readme", "--window", "5"])
        assert "--window: unknown beside --from and --readme" in capsys.readouterr().err

    def test_markers_that_are_missing(self):
        with pytest.raises(ValueError, match="README.md: expected the lines"):
            compare.with_tables("no markers", list(RESULTS.values()))

    @pytest.mark.parametrize("option", ["variants", "sides"])
    def test_variants_are_compared(self, tmp_path, monkeypatch, option):
        """All of them are valid configs, and the comparison gets them by their names."""
        called = []
        monkeypatch.setattr(compare, "app", lambda arguments: called.append(arguments))
        monkeypatch.setattr(compare, "publish", lambda *_: None)
        monkeypatch.setattr(compare, "README", tmp_path / "README.md")
        compare.README.write_text(README, encoding="utf-8")
        compare.main([f"--{option}", "--documents", "2"])
        names = called[0][called[0].index("--presets") + 1].split(",")
        configs = getattr(compare, option)()
        assert [Path(name).stem for name in names] == list(configs)
        presets = {KVQuantConfig.preset(name) for name in KVQuantConfig.preset_names()}
        assert (presets < set(configs.values())) == (option == "variants")

    @pytest.mark.parametrize(("options", "share"), [([], "100.0%"), (["--one-pass"], "none read the cache")])
    def test_perplexity_as_decode_reads_it_and_in_one_pass(self, tmp_path, capsys, monkeypatch, options, share):
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as done:
            compare.app(["eval", *ARGUMENTS, *options, "--out", str(tmp_path)])
        assert done.value.code == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert share in printed
        assert printed.count(BLIND) == (2 if options else 0)

    def test_help_explains_the_numbers(self, capsys, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["compare"])
        with pytest.raises(SystemExit):
            compare.main(["--help"])
        printed = capsys.readouterr().out
        assert "KL divergence" in printed and "standard error" in printed
