"""Error feedback: what its factors save of the cost that they are made for, the moments that they are made of, their
file, and that every kind of layer encodes with them and loses less by it."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from unittest.mock import Mock

import broken_models
import pytest
import torch
import yaml
from commands import call
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, LlamaConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import hf_kvquant
from hf_kvquant import (
    Feedback,
    KVQuantConfig,
    QuantizedCache,
    QuantSpec,
    calibrate,
    quantize,
    score,
    score_by_decoding,
    tensors_file,
)
from hf_kvquant.batching import refuse_unserved
from hf_kvquant.feedback import FORMAT, VERSION, factors_of
from hf_kvquant.measure import Preset, Settings, compare
from hf_kvquant.measure.text import bundled_model, windows

CHANNEL = QuantSpec("int4", "channel", block_length=32)
HEADS, DIM, LAYERS = 2, 32, 2
MODEL = LlamaConfig(
    hidden_size=128, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=HEADS,
    head_dim=DIM, vocab_size=64,
)  # fmt: skip


def some_factors(seed: int) -> torch.Tensor:
    return torch.randn(HEADS, DIM, DIM, generator=torch.Generator().manual_seed(seed)).tril(-1) * 0.3


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Factors for the layers of `MODEL`."""
    path = tmp_path_factory.mktemp("feedback") / "some.feedback"
    Feedback({i: (some_factors(2 * i), some_factors(2 * i + 1)) for i in range(LAYERS)}).save(path)
    return path


def config_of(file: Path | None, **fields) -> KVQuantConfig:
    fields = {"sink_length": 2, "recent_length": 8} | fields
    return KVQuantConfig(CHANNEL, CHANNEL, error_feedback=None if file is None else str(file), **fields)


def states(n: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, HEADS, 1000, DIM, generator=generator)[:, :, :n] for _ in range(2)]


def filled(config: KVQuantConfig, n: int = 150, **options) -> QuantizedCache:
    """A cache with a prompt and single tokens behind it."""
    cache = QuantizedCache(MODEL, config, **options)
    for i in range(LAYERS):
        both = states(n, i)
        cache.update(*(x[:, :, :100] for x in both), i)
        for t in range(100, n):
            cache.update(*(x[:, :, t : t + 1] for x in both), i)
    return cache


def bodies(cache: QuantizedCache) -> list[torch.Tensor]:
    """The de-quantized complete blocks of all layers."""
    return [view.body(torch.float32)[:, :, :128] for layer in cache.layers for view in layer._views()]


class TestFactors:
    def test_they_save_most_of_the_cost_that_they_are_made_for(self):
        """Of channels that mostly matter by a few sums of theirs."""
        few = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(1))
        cost = few @ few.mT + 0.01 * torch.eye(16)
        x = torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(0))

        def lost(factors: torch.Tensor | None, cost: torch.Tensor) -> float:
            error = x - quantize(x, CHANNEL, None, factors).dequantize()
            return torch.einsum("bhti,hij,bhtj->", error, cost, error).item()

        assert lost(factors_of(cost), cost) < 0.35 * lost(None, cost)
        # Paid for by errors that cost nothing.
        identity = torch.eye(16).expand(2, 16, 16)
        assert lost(factors_of(cost), identity) > lost(None, identity)

    def test_two_channels_by_hand(self):
        """The first one makes up for the second one's error e by H01 / H00 e, with the damping on H's diagonal."""
        found = factors_of(torch.tensor([[[4.0, 1.5], [1.5, 2.0]]]))
        torch.testing.assert_close(found, torch.tensor([[[0.0, 0.0], [-1.5 / (4.0 + 0.01 * 3.0), 0.0]]]))

    @pytest.mark.parametrize("cost", [torch.zeros(1, 8, 8), torch.diag(torch.arange(8.0))[None]], ids=["none", "own"])
    def test_costs_without_correlations_have_none(self, cost):
        assert torch.equal(factors_of(cost), torch.zeros(1, 8, 8))


class TestCalibrate:
    def test_costs_are_of_queries_and_output_projection(self):
        model, inputs = broken_models.healthy(), {}
        layer = model.model.layers[1].self_attn
        hooks = [
            layer.q_proj.register_forward_hook(lambda module, args, output: inputs.update(query=output)),
            model.model.rotary_emb.register_forward_hook(lambda module, args, output: inputs.update(rotary=output)),
        ]
        ids = windows(AutoTokenizer.from_pretrained(bundled_model()), 1, 200)[0]
        try:
            found = calibrate(model, ids).layers
        finally:
            for hook in hooks:
                hook.remove()
        assert sorted(found) == [0, 1, 2, 3]
        heads, d = model.config.num_key_value_heads, model.config.head_dim
        query = inputs["query"].unflatten(-1, (-1, d)).transpose(1, 2)
        query = apply_rotary_pos_emb(query, query, *inputs["rotary"])[0][0].unflatten(0, (heads, -1)).flatten(1, 2)
        output = layer.o_proj.weight.detach().unflatten(1, (heads, -1, d))
        for factors, cost in zip(found[1], (query.mT @ query, torch.einsum("ohgi,ohgj->hij", output, output))):
            torch.testing.assert_close(factors, factors_of(cost), rtol=1e-3, atol=1e-3)

    def test_pieces_add_up(self):
        model = AutoModelForCausalLM.from_config(MODEL).eval()
        ids = torch.randint(64, (2, 50), generator=torch.Generator().manual_seed(0))
        found, reversed_ = (calibrate(model, x).layers[0][0] for x in (ids, list(ids.flip(0))))
        torch.testing.assert_close(found, reversed_)
        assert not torch.allclose(found, calibrate(model, ids[:1]).layers[0][0], rtol=1e-2)

    def test_projections_with_other_names_and_axes(self):
        """GPT-2's `c_proj` has its axes in the other order, and a bias."""
        config = {"model_type": "gpt2", "n_embd": 64, "n_head": 2, "n_layer": 1, "vocab_size": 64, "n_positions": 64}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
        module = model.transformer.h[0].attn
        torch.nn.init.normal_(module.c_proj.bias)
        w = module.c_proj.weight.detach().unflatten(0, (2, 32))
        expected = factors_of(torch.einsum("hio,hjo->hij", w, w))
        found = calibrate(model, torch.arange(60)[None] % 64).layers[0][1]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)

    def test_errors(self):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(MODEL)).eval()
        ids = torch.arange(50)[None]
        with pytest.raises(ValueError, match="no layer was measured"):
            calibrate(model, ids[:0])
        module = model.model.layers[1].self_attn
        module.dense = torch.nn.Linear(128, 128)
        with pytest.raises(ValueError, match=r"layer 1: LlamaAttention has output projections \['o_proj', 'dense'\]"):
            calibrate(model, ids)
        del module.dense
        module.q_proj.weight.data[0, 0] = torch.inf
        with pytest.raises(ValueError, match="layer 1: its queries or output projection have a NaN"):
            calibrate(model, ids)
        model.config.kv_lora_rank = 64
        with pytest.raises(ValueError, match="kv_lora_rank: 64: latent attention"):
            calibrate(model, ids)


class TestFile:
    def test_what_is_saved_is_loaded(self, file):
        found = Feedback.load(file)
        assert torch.equal(found.layers[1][0], some_factors(2)) and list(found.layers) == [0, 1]
        assert found.nbytes == 4 * HEADS * DIM * DIM * 4

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x: {**x, "layers.0.keys": x["layers.0.keys"] * torch.nan}, "layers.0.keys: NaN or infinity"),
            (
                lambda x: {**x, "layers.0.keys": x["layers.0.keys"].mT.contiguous()},
                "layers.0.keys: factors on or above",
            ),
            (lambda x: {**x, "layers.0.keys": x["layers.0.keys"].half()}, "of torch.float16 is not allowed"),
            (lambda x: {**x, "layers.0.keys": x["layers.0.keys"][0]}, r"\(32, 32\) of torch.float32 is not allowed"),
            (lambda x: {**x, "weight": x["layers.0.keys"].clone()}, "tensor 'weight' is unknown"),
            (
                lambda x: {k: v for k, v in x.items() if k != "layers.1.keys"},
                "layers.1 has .* only; expected keys and",
            ),
        ],
        ids=["nan", "lower", "dtype", "shape", "name", "one-side"],
    )
    def test_a_file_that_is_not_allowed(self, file, tmp_path, change, message):
        path = tmp_path / "wrong.feedback"
        save_file(change(load_file(file)), path, {"format": FORMAT, "version": VERSION})
        with pytest.raises(ValueError, match=message):
            Feedback.load(path)
        with pytest.raises(ValueError, match="error_feedback: .*" + message):
            filled(config_of(path))

    def test_another_kind_of_file(self, tmp_path):
        path = tmp_path / "weights.safetensors"
        save_file({"weight": torch.zeros(2)}, path)
        with pytest.raises(ValueError, match="error_feedback: .*is not a file of error feedback .* expected a file"):
            filled(config_of(path))
        path.write_text("keys:")
        with pytest.raises(ValueError, match="error_feedback: .*is not a complete safetensors file"):
            filled(config_of(path))
        with pytest.raises(ValueError, match=r"error_feedback: .*gone.feedback: cannot be read \(No such file"):
            filled(config_of(tmp_path / "gone.feedback"))

    def test_a_file_of_another_model(self, tmp_path):
        """Of fewer or more layers, more heads, or another head_dim; the layer is named, and nothing is stored."""
        path = tmp_path / "other.feedback"
        for layers, message in (
            ({0: (some_factors(0), some_factors(1))}, "has layers .0.; expected layer 1 too"),
            (
                {i: (some_factors(0), some_factors(1)) for i in range(3)},
                r"has layers \[0, 1, 2\]; expected at most those of the model's 2 layers",
            ),
            ({i: (torch.zeros(4, DIM, DIM),) * 2 for i in range(2)}, r"layers.0.keys: \(4, 32, 32\) .*\(2, 32, 32\)"),
            ({i: (torch.zeros(2, 64, 64),) * 2 for i in range(2)}, r"layers.0.keys: \(2, 64, 64\) .*\(2, 32, 32\)"),
        ):
            Feedback({i: tuple(x.clone() for x in sides) for i, sides in layers.items()}).save(path)
            with pytest.raises(ValueError, match="error_feedback: .*" + message):
                filled(config_of(path))

    def test_more_layers_are_refused_before_a_manager_of_batches_starts(self, tmp_path):
        path = tmp_path / "other.feedback"
        Feedback({2: (some_factors(0), some_factors(1))}).save(path)
        model = AutoModelForCausalLM.from_config(MODEL)
        with pytest.raises(ValueError, match=r"error_feedback: .*has layers \[2\]; expected at most"):
            refuse_unserved(model, config_of(path), ContinuousBatchingConfig())

    def test_a_changed_file_is_read_again(self, tmp_path):
        path = tmp_path / "changing.feedback"
        Feedback({i: (some_factors(0), some_factors(1)) for i in range(LAYERS)}).save(path)
        before = bodies(filled(config_of(path)))
        Feedback({i: (some_factors(5), some_factors(6)) for i in range(LAYERS)}).save(path)
        os.utime(path, ns=(1, 1))
        assert not torch.equal(bodies(filled(config_of(path)))[0], before[0])

    def test_a_second_cache_opens_no_file(self, tmp_path, monkeypatch):
        path = tmp_path / "counted.feedback"
        Feedback({i: (some_factors(0), some_factors(1)) for i in range(LAYERS)}).save(path)
        read = Mock(wraps=tensors_file.read)
        monkeypatch.setattr(tensors_file, "read", read)
        filled(config_of(path))
        count = read.call_count
        filled(config_of(path))
        assert 0 < count == read.call_count
        Feedback({i: (some_factors(0), some_factors(1)) for i in range(LAYERS + 1)}).save(path)
        with pytest.raises(ValueError, match="error_feedback: .*expected at most those of the model's 2 layers"):
            filled(config_of(path))
        assert read.call_count == count + 1

    def test_a_file_that_cannot_be_written(self, tmp_path):
        path = tmp_path / "nowhere" / "mine.feedback"
        with pytest.raises(OSError, match=r"mine\.feedback: cannot be written"):
            Feedback({0: (some_factors(0), some_factors(1))}).save(path)
        result = call("calibrate", str(bundled_model()), "--out", str(path), code=2)
        assert "expected a file's name in an existing folder" in " ".join(result.output.replace("│", " ").split())


class TestConfig:
    def test_a_relative_path_starts_at_the_yaml_or_at_the_working_directory(self, tmp_path, monkeypatch):
        (tmp_path / "sub").mkdir()
        file = tmp_path / "sub" / "config.yaml"
        side = {"format": "int4", "grid": "channel"}
        file.write_text(yaml.safe_dump({"keys": side, "values": side, "error_feedback": "x.feedback"}))
        config = KVQuantConfig.from_yaml(file)
        assert config.error_feedback == str(tmp_path / "sub" / "x.feedback")
        monkeypatch.chdir(tmp_path)
        assert KVQuantConfig.from_yaml("sub/config.yaml") == config
        assert KVQuantConfig.from_dict(config.to_dict()) == config
        here = KVQuantConfig.from_dict({"keys": side, "values": side, "error_feedback": "x.feedback"})
        assert here.error_feedback == str(tmp_path / "x.feedback")
        here.to_yaml(file)
        assert KVQuantConfig.from_yaml(file) == here
        assert KVQuantConfig.preset("int4").error_feedback is None

    @pytest.mark.parametrize("value", [3, "", True], ids=str)
    def test_a_value_that_is_no_path(self, value):
        with pytest.raises(ValueError, match=f"error_feedback: {value!r} is not allowed; expected the path of a file"):
            KVQuantConfig(CHANNEL, CHANNEL, error_feedback=value)

    def test_nothing_to_feed_back(self):
        token = QuantSpec("int4")
        with pytest.raises(
            ValueError, match="error_feedback: 'x' is not allowed without keys or values on the channel"
        ):
            KVQuantConfig(token, token, error_feedback="x")
        layers = {1: hf_kvquant.LayerOverride(keys=CHANNEL)}
        assert KVQuantConfig(token, token, error_feedback="x", layers=layers).has_channels

    def test_latent_attention_is_refused(self):
        model = copy.copy(MODEL)
        model.kv_lora_rank = 64
        with pytest.raises(ValueError, match="error_feedback: .* is not allowed for latent attention"):
            config_of(Path("x")).for_model(model)


class TestLayers:
    def test_blocks_have_the_bytes_of_the_definition(self, file):
        cache, plain = filled(config_of(file)), filled(config_of(None))
        for i, layer in enumerate(cache.layers):
            for x, view, factors in zip(
                states(150, i), layer._views(), (some_factors(2 * i), some_factors(2 * i + 1))
            ):
                expected = quantize(x[:, :, :128], CHANNEL, None, factors)
                assert torch.equal(view.data[:, :, :128], expected.data)
                assert torch.equal(view.scale[:, :, :4], expected.scale)
        assert not torch.equal(bodies(cache)[0], bodies(plain)[0])

    def test_static_layers_have_the_same_bytes(self, file):
        cache = filled(config_of(file, static=True), max_length=256)
        for a, b in zip(bodies(cache), bodies(filled(config_of(file)))):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
    def test_sliding_layers(self, file, static):
        model = copy.deepcopy(MODEL)
        model.layer_types, model.sliding_window = ["sliding_attention", "full_attention"], 512
        found = []
        for path in (file, None):
            cache = QuantizedCache(model, config_of(path, static=static), max_length=1000)
            for i in range(LAYERS):
                key, value = states(900, i)
                cache.update(key[:, :, :600], value[:, :, :600], i)
                for t in range(600, 900, 20):
                    cache.update(key[:, :, t : t + 20], value[:, :, t : t + 20], i)
            assert cache.layers[0].sliding_window == 512
            found.append(cache.layers[0]._next_read(cache.layers[0]._keys)[:, :, :32])
        assert not torch.equal(*found)

    def test_copies_share_the_factors(self, file):
        cache = filled(config_of(file))
        for layer, other in zip(cache.layers, copy.deepcopy(cache).layers):
            assert other.factors is layer.factors and layer.factors.keys is not None

    def test_crop_and_append_again(self, file):
        cache = filled(config_of(file))
        cache.crop(-40)
        for i in range(LAYERS):
            cache.update(*(x[:, :, 110:] for x in states(150, i)), i)
        for a, b in zip(bodies(cache), bodies(filled(config_of(file)))):
            assert torch.equal(a, b)

    def test_a_saved_cache_is_read_without_the_file(self, tmp_path):
        path = tmp_path / "gone.feedback"
        Feedback({i: (some_factors(2 * i), some_factors(2 * i + 1)) for i in range(LAYERS)}).save(path)
        whole, cache = filled(config_of(path), 200), filled(config_of(path))
        cache.save(tmp_path / "cache.kvq")
        text = path.read_bytes()
        path.unlink()
        loaded = QuantizedCache.load(tmp_path / "cache.kvq", MODEL)
        for a, b in zip(bodies(loaded), bodies(cache)):
            assert torch.equal(a, b)
        new = [x[:, :, 150:] for x in states(200, 0)]
        with pytest.raises(ValueError, match=r"error_feedback: .*gone.feedback: cannot be read"):
            loaded.update(*new, 0)
        loaded.crop(0)
        path.write_bytes(text)
        for i in range(LAYERS):
            loaded.update(*(x[:, :, 150:] for x in states(200, i)), i)
        for a, b in zip(loaded.layers, whole.layers):
            for x, y in zip(a._views(), b._views()):
                assert torch.equal(x.body(torch.float32)[:, :, :192], y.body(torch.float32)[:, :, :192])

    def test_the_report_has_the_factors(self, file):
        report, plain = filled(config_of(file)).memory_report(), filled(config_of(None)).memory_report()
        assert report.pop("factors") == 4 * HEADS * DIM * DIM * 4
        assert report == plain


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> Path:
    """What the command writes for the bundled model, on a text of its own."""
    path = tmp_path_factory.mktemp("calibrated") / "bundled.feedback"
    result = call("calibrate", str(bundled_model()), "--out", str(path), "--documents", "4", "--window", "200")
    assert "Factors of 4 layers" in result.output and str(path) in result.output
    return path


class TestBundledModel:
    def test_a_cache_with_feedback_loses_less(self, tmp_path):
        model, file = broken_models.healthy(), tmp_path / "long.feedback"
        pieces = windows(AutoTokenizer.from_pretrained(bundled_model()), 9, 512)[0]
        calibrate(model, pieces[3:]).save(file)
        spec, exact = QuantSpec("int4", "channel"), {"sink_length": 4, "recent_length": 32}
        configs = {"plain": KVQuantConfig(spec, spec, **exact)}
        configs["feedback"] = KVQuantConfig(spec, spec, error_feedback=str(file), **exact)
        found = compare(
            model, pieces[:3], [Preset(*item) for item in configs.items()], Settings(128, greedy_tokens=0), {},
            progress=False, by_layer=False, weigh=False,
        )["caches"]  # fmt: skip
        assert found["feedback"]["kl"]["mean"] < 0.9 * found["plain"]["kl"]["mean"]

    def test_scoring_in_one_pass_is_decode(self, calibrated):
        model = broken_models.healthy().double()
        ids = windows(AutoTokenizer.from_pretrained(bundled_model()), 1, 150)[0]
        config = config_of(calibrated)
        one_pass, decoded = score(model, ids, 60, config), score_by_decoding(model, ids, 60, config)
        torch.testing.assert_close(one_pass, decoded, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(one_pass, score(model, ids, 60, config_of(None)), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
    def test_generate(self, calibrated, static):
        model = broken_models.healthy()
        ids = windows(AutoTokenizer.from_pretrained(bundled_model()), 1, 100)[0]
        config = config_of(calibrated, static=static)
        result = model.generate(
            ids, max_new_tokens=40, do_sample=False, cache_implementation="kvquant", cache_config=config.to_dict(),
            return_dict_in_generate=True,
        )  # fmt: skip
        layer = result.past_key_values.layers[0]
        factors = Feedback.load(calibrated).layers[0]
        assert all(torch.equal(a, b) for a, b in zip(layer.factors, factors))
        assert result.past_key_values.routes["decode_fused"] > 0

    def test_the_files_facts(self, calibrated):
        facts = Feedback.load(calibrated).facts
        assert (facts["format"], facts["version"], facts["tokens"]) == (FORMAT, VERSION, "800")
        assert facts["model"] and facts["text"]

    def test_a_command_that_fails(self, tmp_path):
        text = tmp_path / "short.txt"
        text.write_text("short")
        out = str(tmp_path / "x")
        result = call("calibrate", str(bundled_model()), "--text", str(text), "--out", out, code=2)
        assert "holds 0 pieces" in result.output.replace("\n", " ")
