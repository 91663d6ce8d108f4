"""`check`: models broken on purpose are found, the layer is named with the reason, and the repair holds; the healthy
model passes. And the pieces: sides and their specs, what stands out, the model's own text."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import broken_models
import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from typer.testing import CliRunner

from hf_kvquant import KVQuantConfig, QuantSpec, quantize
from hf_kvquant.cli import app
from hf_kvquant.measure.generation import continued
from hf_kvquant.measure.guard import Limits, check, explained
from hf_kvquant.measure.layer_errors import SIDES, dense_states, layer_errors
from hf_kvquant.measure.outliers import stand_outs
from hf_kvquant.measure.sides import CHOICES, alone, bits, losses, promising, sides, specs, total_bits, with_specs
from hf_kvquant.measure.text import bundled_model, windows

CONTEXT = 64
DENSE = QuantSpec("dense")
PRESET = KVQuantConfig.preset


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled_model())


@pytest.fixture(scope="module")
def documents(tokenizer) -> torch.Tensor:
    return windows(tokenizer, 2, 256)[0]


@pytest.fixture(scope="module")
def healthy() -> LlamaForCausalLM:
    return broken_models.healthy()


def checked(model, documents, preset: str, **limits) -> dict:
    return check(model, documents, PRESET(preset), CONTEXT, Limits(**limits), progress=False)


def frequent(documents: torch.Tensor) -> int:
    return documents.flatten().bincount().argmax().item()


class TestCheck:
    @pytest.mark.parametrize("preset", KVQuantConfig.preset_names())
    def test_the_healthy_model_passes(self, healthy, documents, preset):
        result = checked(healthy, documents, preset)
        assert result["passed"] and result["broken"] == [] and result["repaired"] is None
        assert 0 < result["kl"]["mean"] < 0.05
        worst = result["worst"]
        assert worst["error"] == max(max(errors) for errors in result["layer_errors"].values())
        assert result["layer_errors"][worst["side"]][worst["layer"]] == worst["error"]

    @pytest.mark.parametrize(
        ("name", "layer", "side", "kind", "preset"),
        [
            ("with_key_bias", 2, "keys", "constant", "int4-small"),
            ("with_key_channel", 1, "keys", "channel", "int8-plain"),
            ("with_value_token", 1, "values", "token", "int8-plain"),
            ("with_value_channel", 3, "values", "channel", "int4"),
            ("with_value_channel", 0, "values", "channel", "int8-plain"),
            ("with_tiny_values", 3, "values", "tiny", "int4"),
        ],
    )
    def test_a_broken_layer_is_found_and_the_repair_holds(self, documents, name, layer, side, kind, preset):
        more = {"token": frequent(documents)} if kind == "token" else {}
        model = getattr(broken_models, name)(layer, **more)
        result = checked(model, documents, preset)
        assert not result["passed"]
        assert [(entry["layer"], entry["side"]) for entry in result["broken"]] == [(layer, side)]
        (entry,) = result["broken"]
        assert entry["causes"][0]["kind"] == kind
        assert entry["kl"] > 0.5 * result["kl"]["mean"]
        repaired = KVQuantConfig.from_dict(result["repaired"]["config"])
        assert result["repaired"]["passed"]
        assert repaired == with_specs(PRESET(preset), {(layer, side): QuantSpec(**entry["instead"])})
        assert check(model, documents, repaired, CONTEXT, progress=False)["passed"]
        assert result["repaired"]["bits"] == pytest.approx(total_bits(repaired, sides(model, repaired)))

    def test_a_constant_in_keys_does_not_break_the_channel_grid(self, documents):
        assert checked(broken_models.with_key_bias(2), documents, "int4")["passed"]

    def test_the_error_of_a_layer_is_not_hidden_by_its_constant(self, documents):
        model, configs = broken_models.with_key_bias(2), {"int8-plain": PRESET("int8-plain")}
        plain = layer_errors(model, documents, configs)["int8-plain"]["keys"][2]
        centred = layer_errors(model, documents, configs, centred=True)["int8-plain"]["keys"][2]
        assert plain < 0.02 and centred > 0.5
        x = torch.stack([dense_states(model, ids)[2, "keys"] for ids in documents.split(1)])
        stored = torch.stack([quantize(y, PRESET("int8-plain").keys).dequantize() for y in x])
        assert centred == pytest.approx(((x - stored).norm() / (x - x.mean(3, keepdim=True)).norm()).item(), rel=1e-4)

    def test_each_limit_alone_fails(self, healthy, documents):
        strict = checked(healthy, documents, "int4-small", kl=0.01)
        assert not strict["passed"]
        assert strict["repaired"]["passed"] and strict["repaired"]["kl"]["mean"] <= 0.01 < strict["kl"]["mean"]
        # The worst sides come first, and as few as needed break.
        costs = [entry["kl"] for entry in strict["broken"]]
        assert costs == sorted(costs, reverse=True) and len(costs) < 8
        strict = checked(healthy, documents, "int4-small", agreement=0.97)
        assert not strict["passed"] and strict["kl"]["mean"] < 0.05
        assert strict["repaired"]["agreement"]["mean"] > strict["agreement"]["mean"]

    def test_a_model_that_is_not_finite_is_refused(self, documents):
        model = broken_models.healthy()
        model.model.layers[1].self_attn.o_proj.weight.data[0, 0] = math.nan
        with pytest.raises(ValueError, match="model: its own logits are not finite"):
            checked(model, documents, "int4")

    def test_states_that_overflow_the_cache_are_found(self, documents):
        """FP16 has no scale for them, so the divergence is no number, which must not pass."""
        model = broken_models.with_value_channel(1, factor=1e9)
        result = checked(model, documents, "int8-plain")
        assert [(entry["layer"], entry["side"]) for entry in result["broken"]] == [(1, "values")]
        assert result["repaired"]["passed"]

    @pytest.mark.parametrize(
        ("limits", "match"),
        [
            ({"kl": 0.0}, "kl: 0.0 is not"),
            ({"kl": math.nan}, "kl: nan is not"),
            ({"agreement": 1.5}, "agreement: 1.5"),
        ],
        ids=str,
    )
    def test_limits_that_are_none(self, limits, match):
        with pytest.raises(ValueError, match=match):
            Limits(**limits)


class TestStandOuts:
    def states(self) -> torch.Tensor:
        return torch.randn(1, 2, 200, 32)

    def found(self, x: torch.Tensor) -> list[dict]:
        return stand_outs(x, torch.arange(200)[None] + 1000, reach=7.5)

    def test_nothing(self):
        assert self.found(self.states()) == []

    def test_each_kind_alone(self):
        for kind in ("constant", "channel", "token"):
            x = self.states()
            if kind == "constant":
                x[0, 1, :, 7] += 500
            elif kind == "channel":
                x[0, 1, :, 7] *= 500
            else:
                x[0, 1, 60, 7] = 500
            (entry,) = self.found(x)
            assert (entry["kind"], entry["head"], entry["channel"]) == (kind, 1, 7)
            # The median distance from the median of a Gaussian is 0.674.
            expected = 500 if kind == "channel" else 500 / 0.674
            assert entry["ratio"] == pytest.approx(expected, rel=0.3)
            assert explained(entry).endswith(f"{entry['ratio']:,.0f} times the typical spread in channel 7 of head 1"
                                             if kind == "token" else "times the typical spread")  # fmt: skip
        assert entry["position"] == 60 and entry["token"] == 1060

    def test_the_largest_comes_first(self):
        x = self.states()
        x[0, 0, :, 3] += 5000
        x[0, 1, 60, 7] = 500
        assert [entry["kind"] for entry in self.found(x)] == ["constant", "token"]

    def test_tiny(self):
        (entry,) = self.found(self.states() * 1e-7)
        assert entry["kind"] == "tiny" and "too small for scales in FP16" in explained(entry)
        # Zeros are stored as they are.
        assert self.found(torch.zeros(1, 2, 200, 32)) == []

    def test_not_finite(self):
        x = self.states()
        x[0, 1, 5, 7] = math.inf
        (entry,) = self.found(x)
        assert (entry["kind"], entry["head"], entry["position"]) == ("nonfinite", 1, 5)

    def test_constant_channels_everywhere(self):
        """No spread to compare with: the largest element is the measure, and nothing stands out."""
        assert self.found(torch.ones(1, 2, 200, 32)) == []


class TestSides:
    def test_every_field_of_a_spec_is_searched(self):
        assert set(CHOICES) == {field.name for field in fields(QuantSpec)}

    @pytest.mark.parametrize("head_dim", [24, 64, 128])
    @pytest.mark.parametrize("side", SIDES)
    def test_specs_are_all_that_a_config_takes_once(self, side, head_dim):
        found = specs(side, head_dim)
        assert found[-1] == DENSE
        resolved = [spec.resolve(head_dim) for spec in found]
        assert len(set(resolved)) == len(resolved)
        widths = [bits(spec, head_dim) for spec in found]
        assert widths == sorted(widths)
        assert any(spec.is_channel for spec in found)
        assert {spec.format for spec in found} == {"int8", "fp8", "int4", "dense"}
        more = specs(side, head_dim, narrow=True)
        assert {spec.format for spec in set(more) - set(found)} == {"int3", "int2"} and set(found) < set(more)
        for spec in found:
            KVQuantConfig(**{**dict.fromkeys(SIDES, DENSE), side: spec})

    @pytest.mark.parametrize("side", SIDES)
    def test_on_a_gpu_they_are_those_that_its_kernels_take(self, side):
        def narrow(head_dim: int, device_type: str) -> set[int | None]:
            found = specs(side, head_dim, narrow=True, device_type=device_type)
            return {spec.group_size for spec in found if spec.format in ("int3", "int2")}

        assert narrow(128, "cpu") == {None, 64, 32, 16} and narrow(128, "cuda") == {None, 64}
        assert narrow(96, "cpu") and not narrow(96, "cuda")

    def test_only_one_side_is_quantized(self, healthy, documents):
        """Alone, a side's loss does not see the others'; a dense side costs nothing."""
        config = PRESET("int4-small")
        configs = {"it": alone(config, (1, "keys")), "none": alone(config, (1, "keys"), DENSE)}
        found = losses(healthy, documents, configs, CONTEXT, {}, progress=False)
        assert found["none"]["kl"]["mean"] < 1e-9 < found["it"]["kl"]["mean"]
        one = alone(config, (1, "keys"))
        assert [one.for_layer(i) for i in (0, 1)] == [(DENSE, DENSE), (config.keys, DENSE)]
        assert one.recent_length == config.recent_length

    def test_bits_of_a_whole_cache(self, healthy):
        config = PRESET("int4")
        shapes = sides(healthy, config)
        assert shapes == {(i, side): (2, 64) for i in range(4) for side in SIDES}
        assert total_bits(config, shapes) == config.bits_per_element(64) == 4.375
        assert total_bits(with_specs(config, {(3, "keys"): DENSE}), shapes) == pytest.approx(4.375 + (16 - 4.5) / 8)

    def test_only_layers_that_the_cache_quantizes(self):
        small = MistralConfig(
            vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
        model = MistralForCausalLM(small).eval()
        assert {layer for layer, _ in sides(model, PRESET("int4"))} == {1}
        assert {layer for layer, _ in sides(model, replace(PRESET("int4"), sliding=16))} == {0, 1}

    def test_specs_that_others_beat_are_left_out(self, healthy, documents):
        shapes = sides(healthy, PRESET("int4"))
        kept = promising(healthy, documents[:1], shapes)
        states = dense_states(healthy, documents[:1])
        for side, found in kept.items():
            assert found[-1] == DENSE and 2 < len(found) < len(specs(side[1], 64)) / 2
            x = states[side]
            error = {
                s: 0.0 if s.is_dense else (x - quantize(x, s).dequantize()).norm().item() for s in specs(side[1], 64)
            }
            errors = [error[spec] for spec in found]
            assert errors == sorted(errors, reverse=True)
            for spec in set(error) - set(found):
                assert any(error[s] < error[spec] and bits(s, 64) <= bits(spec, 64) for s in found)
        assert all(len(more) >= len(kept[side]) for side, more in promising(healthy, documents, shapes, 2.0).items())


class TestOwnText:
    def test_greedy_and_sampled(self, healthy, documents):
        contexts = documents[:, :40]
        greedy = continued(healthy, contexts, 24)
        assert greedy.shape == (2, 64) and torch.equal(greedy[:, :40], contexts)
        again = healthy(greedy[:, :-1]).logits[:, 39:].argmax(-1)
        assert (again == greedy[:, 40:]).float().mean() > 0.95
        before = torch.get_rng_state()
        drawn = [continued(healthy, contexts, 24, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
        assert not torch.equal(drawn[0], greedy)


def call(*arguments: object, code: int):
    result = CliRunner().invoke(app, ["check", *map(str, arguments)], env={"COLUMNS": "140", "NO_COLOR": "1"})
    assert result.exit_code == code, result.output
    return " ".join(result.output.replace("│", " ").split()), result.output


SMALL = "--documents", 2, "--window", 256, "--context", 64


class TestCommand:
    def test_the_bundled_model_passes(self, tmp_path):
        said, _ = call("stdlib-nano", *SMALL, "--write", tmp_path / "mine.yaml", code=0)
        assert "mine.yaml was not written: there is nothing to repair" in said
        assert "int4 on stdlib-nano: passed" in said
        assert "2 pieces of 256 tokens of held-out source of Python's standard library, the first 64 prefilled" in said

    def test_its_own_text_passes(self):
        said, _ = call("stdlib-nano", *SMALL, "--own", code=0)
        assert "the model's own text after held-out source" in said

    def test_a_broken_model_fails_with_a_config_that_passes(self, tokenizer, tmp_path):
        broken_models.with_key_bias(2).save_pretrained(tmp_path / "broken")
        tokenizer.save_pretrained(tmp_path / "broken")
        mine = tmp_path / "mine.yaml"
        said, output = call(tmp_path / "broken", *SMALL, "--preset", "int8-plain", "--write", mine, code=1)
        assert "int8-plain on broken: FAILED" in said
        assert "keys of layer 2: channel 31 of head 0 has a constant of" in said
        # The fragment as printed, put into the preset, is the file.
        fragment = yaml.safe_load(output[output.index("layers:\n") :].partition("\n\n")[0])
        whole = KVQuantConfig.from_dict(PRESET("int8-plain").to_dict() | fragment)
        assert whole == KVQuantConfig.from_yaml(mine)
        said, _ = call(tmp_path / "broken", *SMALL, "--config", mine, code=0)
        assert "passed" in said

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (["--preset", "int4", "--config", "x.yaml"], "give either a preset or a config file"),
            (["--preset", "none"], "the dense cache needs no check"),
            (["--max-kl", "0"], "kl: 0.0 is not allowed"),
            (["--window", "64", "--context", "64"], "context: 64 leaves no token to score"),
            (["--window", "64", "--context", "64", "--own"], "context: 64 leaves no token to write"),
            (["--text", "no.txt"], "text: 'no.txt' cannot be read"),
        ],
        ids=lambda x: str(x[-1]) if isinstance(x, list) else "",
    )
    def test_wrong_use_is_one_clear_line(self, arguments, match):
        said, _ = call("stdlib-nano", *arguments, code=2)
        assert match in said and "Traceback" not in said
