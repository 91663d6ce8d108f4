"""Other people's schemes: their rules against figures by hand, as candidates with our exact tokens; and the table."""

from __future__ import annotations

import math

import broken_models
import pytest
import torch
from scripts import script

from hf_kvquant import KVQuantConfig, QuantSpec, quantize
from hf_kvquant.measure import Preset, Settings, compare
from hf_kvquant.measure.schemes import SCHEMES, Scheme, affine, gaussian, gaussian_levels, signed_peak, symmetric
from hf_kvquant.measure.tables import put_between
from hf_kvquant.saving import weights_sum

schemes = script("schemes")
RESULTS = schemes.published()


def states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) * torch.linspace(0.1, 3, shape[-1])


class TestRules:
    def test_affine_per_channel_is_our_channel_grid(self):
        """The same formula, so the same states for blocks of 64."""
        x = states(1, 2, 150, 32)
        ours = quantize(x, QuantSpec("int4", "channel", block_length=64)).dequantize()
        torch.testing.assert_close(affine(4, 64, per_channel=True).stored(x), ours, atol=1e-6, rtol=1e-6)

    def test_affine_of_a_token(self):
        x = torch.tensor([[0.0, 1.0, 2.0, 3.0, 10.0, 10.0, 13.0, 16.0]])
        torch.testing.assert_close(affine(2, 4).stored(x), torch.tensor([[0.0, 1, 2, 3, 10, 10, 14, 16]]))
        assert affine(2, 32).bits(128) == 3 and affine(4, None).bits(128) == 4.25

    def test_symmetric_is_our_token_grid(self):
        x = states(1, 2, 150, 32)
        ours = quantize(x, QuantSpec("int8", group_size=32)).dequantize()
        torch.testing.assert_close(symmetric(8, 32).stored(x), ours, atol=1e-4, rtol=1e-3)
        assert symmetric(8, 8).bits(128) == 10 and symmetric(8, 32).bits(64) == 8.5

    def test_signed_peak(self):
        """ggml's q4_0: d = -8 / -8 = 1, codes 0..15 less 8, halves rounded up; +7.6 is cut off at 7."""
        x = torch.zeros(1, 32)
        x[0, :5] = torch.tensor([-8.0, 7.6, 2.5, -2.5, 0.4])
        assert signed_peak(4).stored(x)[0, :6].tolist() == [-8, 7, 3, -2, 0, 0]
        # A positive peak turns the sign of the scale.
        assert signed_peak(4).stored(-x)[0, :6].tolist() == [8, -7, -3, 2, 0, 0]
        assert signed_peak(5).stored(x)[0, :3].tolist() == [-8, 7.5, 2.5]
        assert signed_peak(5).bits(128) == 5.5

    def test_gaussian_levels_are_those_of_max(self):
        """The optimum quantizers of a normal variable: J. Max, Quantizing for minimum distortion, 1960, table I."""
        assert gaussian_levels(1) == pytest.approx([-0.7979, 0.7979], abs=1e-4)
        assert gaussian_levels(2)[2:] == pytest.approx([0.4528, 1.510], abs=1e-3)
        assert gaussian_levels(3)[4:] == pytest.approx([0.2451, 0.7560, 1.344, 2.152], abs=1e-3)
        assert gaussian_levels(4)[8:] == pytest.approx(
            [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], abs=2e-3
        )

    def test_gaussian_error_is_that_of_max(self):
        """Of 2 bits: 0.1175 of the variance; a rotated vector of any distribution is about normal."""
        x = states(1, 1, 2000, 128)
        error = (x - gaussian(2).stored(x)).square().sum() / x.square().sum()
        assert error == pytest.approx(0.1175, rel=0.05)

    @pytest.mark.parametrize("name", SCHEMES)
    def test_zeros_short_groups_and_shapes(self, name):
        for rule in SCHEMES[name]:
            assert rule.stored(torch.zeros(1, 1, 5, 48)).abs().max() == 0
            x = torch.randn(1, 2, 37, 48)
            assert rule.stored(x).shape == x.shape and rule.stored(x).isfinite().all()


class TestCandidates:
    def test_a_scheme_like_ours_has_our_figures(self, monkeypatch):
        """Windows, blocks and all: int4 keys on the channel grid and int8 values, as a scheme and as a config."""
        rules = affine(4, 32, per_channel=True), symmetric(8, 64)
        monkeypatch.setitem(SCHEMES, "like-ours", rules)
        config = KVQuantConfig(QuantSpec("int4", "channel", block_length=32), QuantSpec("int8"), 4, 16)
        model, documents = broken_models.healthy(), torch.randint(4096, (1, 200))
        candidates = [Scheme("like-ours", 4, 16), Preset("ours", config)]
        found = compare(model, documents, candidates, Settings(40, greedy_tokens=0), {}, progress=False,
                        by_layer=False, weigh=False)["caches"]  # fmt: skip
        assert found["ours"]["kl"]["mean"] > 1e-5
        assert found["like-ours"]["kl"]["mean"] == pytest.approx(found["ours"]["kl"]["mean"], rel=0.03)
        assert Scheme("like-ours").bits_per_element(64) == config.bits_per_element(64)
        assert found["like-ours"]["settings"] == {
            "scheme": "like-ours", "block_length": 32, "sink_length": 4, "recent_length": 16
        }  # fmt: skip

    def test_fewer_bits_lose_more(self):
        model, documents = broken_models.healthy(), torch.randint(4096, (1, 200))
        names = ["q8_0", "turboquant-4", "turboquant-3", "turboquant-2"]
        found = compare(model, documents, [Scheme(name) for name in names], Settings(40, greedy_tokens=0), {},
                        progress=False, by_layer=False, weigh=False)["caches"]  # fmt: skip
        kl = [found[name]["kl"]["mean"] for name in names]
        assert kl == sorted(kl) and 0 < kl[0] < kl[-1] / 100


class TestPublished:
    def test_the_readme_says_what_the_results_say(self):
        readme = schemes.README.read_text(encoding="utf-8")
        assert put_between(readme, schemes.BEGIN, schemes.END, schemes.table(RESULTS)) == readme, (
            "eval/schemes.py --table"
        )

    @pytest.mark.parametrize("result", RESULTS, ids=lambda result: result["model"])
    def test_every_scheme_is_there_with_its_bits(self, result):
        names = {*SCHEMES, *KVQuantConfig.preset_names(), *schemes.ours(), *schemes.TUNED, *schemes.FEEDBACK}
        assert set(result["bits"]) == names
        for kl in result["kl"].values():
            assert set(kl) == names and all(0 < each["mean"] < math.inf for each in kl.values())
        bits = {each.name: schemes.bits_of(each, result["head_dim"]) for each in schemes.candidates(0, 0)}
        bits |= {name: bits[base] for name, base in schemes.FEEDBACK.items()}
        tuned = schemes.tuned(result["model"])
        bits |= {name: each["chosen_bits"] for name, each in tuned.items()}
        assert result["bits"] == pytest.approx(bits, rel=1e-3)
        assert all(bits[name] <= tuned[name]["bits"] for name in schemes.TUNED)

    @pytest.mark.parametrize("result", RESULTS, ids=lambda result: result["model"])
    def test_caches_that_were_measured_later_are_told_with_the_machine(self, result):
        for entry in result["added"]:
            assert entry.keys() == {"caches", "machine", "versions"}
            assert {*entry["caches"]} <= result["bits"].keys()

    @pytest.mark.parametrize("result", RESULTS, ids=lambda result: result["model"])
    def test_what_the_readme_says_of_equal_bits(self, result):
        """With the same exact tokens."""
        kl = {name: each["mean"] for name, each in result["kl"]["4 and 32"].items()}
        assert kl["int4-both-channel-32"] < kl["kivi-4"]
        assert max(kl["int4"], kl["tuned-4.5"]) < kl["quanto-4"]
        assert kl["tuned-4.5"] < 0.8 * kl["int4"]
        assert kl["int4-feedback"] < 0.7 * kl["int4"] and kl["int4-feedback"] < 0.92 * kl["kivi-4"]
        assert 2 * kl["int4"] < kl["int3-feedback"] < kl["int3-both-channel"]
        assert kl["tuned-3.3-feedback"] < min(kl["tuned-3.3"], 2.15 * kl["int4"])
        assert kl["tuned-3.375-feedback"] < 1.95 * kl["int4"]

    def test_the_bundled_model_is_the_shipped_one(self):
        (result,) = [result for result in RESULTS if result["model"] == "stdlib-nano"]
        assert result["weights"] == weights_sum(broken_models.healthy())


def test_schemes_are_added_to_what_is_published(tmp_path, monkeypatch):
    monkeypatch.setattr(schemes, "RESULTS", tmp_path)
    monkeypatch.setattr(schemes, "README", tmp_path / "README.md")
    schemes.README.write_text(f"{schemes.BEGIN}\n{schemes.END}\n", encoding="utf-8")
    monkeypatch.setattr(schemes, "ours", dict)
    found = []
    for names in (["q8_0"], ["q8_0", "kivi-4"], ["q8_0", "kivi-4"]):
        monkeypatch.setattr(schemes, "SCHEMES", names)
        schemes.main(["--documents", "1", "--window", "64", "--context", "32"])
        found += schemes.published()
    assert [[entry["caches"] for entry in result["added"]] for result in found] == [[], [["kivi-4"]], [["kivi-4"]]]
    assert found[1]["kl"]["none"]["q8_0"] == found[0]["kl"]["none"]["q8_0"]
    assert found[2] == found[1]
    assert "| kivi-4 |" in schemes.README.read_text(encoding="utf-8")
