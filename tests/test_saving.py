"""A cache on disk: the same to the byte, smaller than a dense one, and never half a file or another model's."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import families
import processes
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import hf_kvquant
from hf_kvquant import KVQuantConfig, LayerOverride, QuantizedCache, QuantSpec, saving
from hf_kvquant.layers import QuantizedLayer

DENSE = QuantSpec("dense")
CONFIGS = {name: KVQuantConfig.preset(name) for name in KVQuantConfig.preset_names()} | {
    "windows": KVQuantConfig(
        QuantSpec("int8", "channel", block_length=16), QuantSpec("int4", group_size=16, rotate=True), sink_length=5,
        recent_length=37,
    ),
    "dense-keys": KVQuantConfig(DENSE, QuantSpec("int8"), sink_length=2, recent_length=8),
    "value-blocks": KVQuantConfig(QuantSpec("int8"), QuantSpec("int4", "channel", block_length=32), sink_length=2),
    "few-bits": KVQuantConfig(QuantSpec("int3", "channel"), QuantSpec("int2", rotate=True), recent_length=8),
    "one-dense-layer": KVQuantConfig(QuantSpec("int8"), QuantSpec("int8"), layers={1: LayerOverride(DENSE, DENSE)}),
}  # fmt: skip
every_config = pytest.mark.parametrize("kv_config", CONFIGS.values(), ids=CONFIGS.keys())
# Two families have transformers' sliding layers, one convolution states, one linear states in quantized layers, and
# two read de-quantized copies.
HYBRIDS = ["gemma2", "gpt_oss", "lfm2", "falcon_h1", "gptj", "deepseek_v3"]
LFM2 = families.Family(
    "Lfm2Config", "Lfm2ForCausalLM",
    {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "conv_L_cache": 3}, num_full=1,
    without=("head_dim",),
)  # fmt: skip


@functools.lru_cache(maxsize=None)
def build(name: str = "llama", seed: int = 0):
    if name == "lfm2":
        families.ALL.setdefault(name, LFM2)
    return families.build(name, attn="eager" if name in ("gemma2", "gpt_oss", "gptj") else "sdpa", seed=seed)


def generate(model, ids: torch.Tensor, n: int = 12, **kwargs):
    options = {"do_sample": False, "max_new_tokens": n, "return_dict_in_generate": True}
    with torch.no_grad():
        return model.generate(ids, **(options | kwargs))


def filled(model, kv_config, length: int = 150, n: int = 12, **kwargs):
    """A cache after a prompt and some decoding, and the tokens so far."""
    out = generate(
        model, families.prompt(2, length), n, cache_implementation="kvquant", cache_config=kv_config, **kwargs
    )
    return out.past_key_values, out.sequences


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "prompt.safetensors"


@pytest.fixture
def file(path) -> Path:
    """A file of the model's cache."""
    filled(build(), "int4")[0].save(path, build())
    return path


def tensors_of(layer) -> dict[str, object]:
    """The tensors of a layer, with the storage of its sides cut to the part in use."""
    return layer.state() if isinstance(layer, QuantizedLayer) else vars(layer)


def assert_equal(a, b, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_equal(*pair, f"{where}.{i}")
    else:
        assert a == b, where


class TestRoundTrip:
    @every_config
    @pytest.mark.parametrize("length", [1, 63, 130])
    def test_every_byte(self, kv_config, length, path):
        model = build()
        cache, _ = filled(model, kv_config, length)
        cache.save(path, model)
        loaded = QuantizedCache.load(path, model)
        assert loaded.kv_config == cache.kv_config
        assert loaded.routes == cache.routes
        assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in cache.layers]
        for i, (was, now) in enumerate(zip(cache.layers, loaded.layers)):
            assert_equal(tensors_of(was), tensors_of(now), f"layer {i}")
        loaded.save(path.with_suffix(".again"), model)
        assert path.read_bytes() == path.with_suffix(".again").read_bytes()

    @every_config
    @pytest.mark.parametrize("max_length", [None, 400], ids=["mapped", "reserved"])
    def test_decoding_goes_on_token_equal(self, kv_config, max_length, path):
        model = build()
        cache, ids = filled(model, kv_config)
        cache.save(path, model)
        loaded = QuantizedCache.load(path, model, max_length=max_length)
        expected = generate(model, ids, 70, past_key_values=cache, output_logits=True)
        got = generate(model, ids, 70, past_key_values=loaded, output_logits=True)
        assert torch.equal(got.sequences, expected.sequences)
        assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))
        assert loaded.routes == cache.routes
        assert cache.routes["decode_fused"] > 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_dtypes(self, dtype, path):
        model = families.build("llama", dtype)
        cache, ids = filled(model, "int4")
        cache.save(path, model)
        loaded = QuantizedCache.load(path, model)
        assert_equal(tensors_of(cache.layers[0]), tensors_of(loaded.layers[0]))
        expected, got = (generate(model, ids, past_key_values=c).sequences for c in (cache, loaded))
        assert torch.equal(got, expected)

    @pytest.mark.parametrize("name", HYBRIDS)
    @pytest.mark.filterwarnings("ignore")
    def test_other_layers_and_other_models(self, name, path):
        model = build(name)
        cache, ids = filled(model, "int4", 70)
        cache.save(path, model)
        loaded = QuantizedCache.load(path, model)
        for was, now in zip(cache.layers, loaded.layers):
            assert_equal(tensors_of(was), tensors_of(now))
        expected, got = (generate(model, ids, 20, past_key_values=c).sequences for c in (cache, loaded))
        assert torch.equal(got, expected)

    def test_left_padding(self, path):
        model, ids = build(), families.prompt(3, 90)
        mask = torch.ones_like(ids)
        mask[0, :50] = mask[2, :3] = 0
        out = generate(model, ids * mask, attention_mask=mask, cache_implementation="kvquant-int4")
        out.past_key_values.save(path, model)
        loaded = QuantizedCache.load(path, model)
        mask = torch.nn.functional.pad(mask, (0, out.sequences.shape[1] - mask.shape[1]), value=1)
        expected, got = (
            generate(model, out.sequences, 60, attention_mask=mask, past_key_values=c).sequences
            for c in (out.past_key_values, loaded)
        )
        assert torch.equal(got, expected)
        assert loaded.layers[0].padding is not None

    def test_encoder_decoder_models(self, path):
        """The self-attention part is saved; cross-attention is computed anew from the encoder's inputs."""
        model, ids = build("t5"), families.prompt(1, 30, seed=3)
        decoder_ids = torch.cat([torch.zeros(1, 1, dtype=torch.long), families.prompt(1, 69)], 1)
        out = generate(model, ids, decoder_input_ids=decoder_ids, cache_implementation="kvquant-int8")
        cache = out.past_key_values
        cache.self_attention_cache.save(path, model)
        loaded = EncoderDecoderCache(QuantizedCache.load(path, model), DynamicCache(config=model.config))
        expected, got = (
            generate(model, ids, decoder_input_ids=out.sequences, past_key_values=c).sequences for c in (cache, loaded)
        )
        assert torch.equal(got, expected)

    def test_after_a_crop(self, path):
        """The room for exact rollbacks is saved too."""
        model = build()
        cache, _ = filled(model, "int4")
        cache.save(path, model)
        loaded = QuantizedCache.load(path, model)
        for each in (cache, loaded):
            each.crop(-64)
        assert_equal(tensors_of(cache.layers[1]), tensors_of(loaded.layers[1]))
        assert loaded.routes["window_lost"] == 0

    def test_a_prompt_for_many_continuations(self, file):
        model = build()
        prompt = QuantizedCache.load(file, model)
        ids = torch.cat([filled(model, "int4")[1], families.prompt(2, 5, seed=9)], 1)
        first = generate(model, ids, past_key_values=copy.deepcopy(prompt)).sequences
        second = generate(model, ids, past_key_values=copy.deepcopy(prompt)).sequences
        assert torch.equal(first, second)
        prompt.batch_repeat_interleave(2)
        twice = generate(model, ids.repeat_interleave(2, 0), past_key_values=prompt).sequences
        assert torch.equal(twice, first.repeat_interleave(2, 0))


class TestFile:
    @pytest.mark.parametrize(
        ("preset", "share"), [("int8-plain", 0.52), ("int8", 0.55), ("int4", 0.30), ("int4-small", 0.28)]
    )
    def test_it_is_a_fraction_of_the_dense_cache(self, preset, share, path):
        config = families.config("llama", num_hidden_layers=1, head_dim=128)
        cache = QuantizedCache(config, preset)
        cache.update(*torch.randn(2, 1, 2, 8192, 128, dtype=torch.bfloat16), 0)
        cache.save(path)
        assert path.stat().st_size / cache.memory_report()["dense_equivalent"] <= share

    def test_it_is_mapped_and_never_written(self, file):
        """Loading allocates little, and writing to a loaded cache leaves the file alone."""
        before = file.read_bytes()
        cache = QuantizedCache.load(file, build())
        if sys.platform == "linux":
            maps = Path("/proc/self/maps").read_text()
            assert str(file) in maps
        cache.crop(-10)
        for layer_idx in (0, 1):
            # This fits into the mapped storage, so it is written there.
            cache.update(*torch.randn(2, 2, 2, 5, 64), layer_idx)
            assert cache.layers[layer_idx]._keys.capacity == 161
        cache.reset()
        assert file.read_bytes() == before

    def test_it_may_be_replaced_while_it_is_mapped(self, file):
        model = build()
        cache = QuantizedCache.load(file, model)
        state = copy.deepcopy(tensors_of(cache.layers[0]))
        filled(model, "int8")[0].save(file, model)
        assert_equal(tensors_of(cache.layers[0]), state)
        cache.save(file, model)
        assert_equal(tensors_of(QuantizedCache.load(file, model).layers[0]), state)

    def test_nothing_uninitialised_is_written(self, path, monkeypatch):
        """Two caches of the same content make the same file, whatever was in memory before."""
        contents = []
        for fill in (0.0, float("nan")):
            real = torch.empty
            monkeypatch.setattr(
                torch, "empty", lambda *a, _fill=fill, _real=real, **k: _poisoned(_real(*a, **k), _fill)
            )
            cache = QuantizedCache(build().config, "int4", attention_mask=torch.tensor([[0] * 60 + [1] * 10] * 2))
            monkeypatch.undo()
            cache.update(*torch.ones(2, 2, 2, 62, 64), 0)
            cache.update(*torch.ones(2, 2, 2, 62, 64), 1)
            cache.save(path)
            contents.append(path.read_bytes())
        assert contents[0] == contents[1]

    def test_permissions_are_those_of_any_new_file(self, file):
        other = file.with_name("other")
        other.write_bytes(b"")
        assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
        assert sorted(p.name for p in file.parent.iterdir()) == [other.name, file.name]

    def test_metadata_is_readable(self, file):
        with safe_open(file, "pt") as opened:
            [header] = map(json.loads, opened.metadata().values())
        description = header["description"]
        assert KVQuantConfig.from_dict(description["kv_config"]) == KVQuantConfig.preset("int4")
        assert description["length"] == 161
        assert description["model"]["config"]["model_type"] == "llama"
        assert header["format_version"] == 1


def _poisoned(tensor: torch.Tensor, fill: float) -> torch.Tensor:
    return tensor.fill_(fill if tensor.is_floating_point() else 0xA5 if fill else 0)


# --- refusals


def edit(change, file: Path, repair: bool = False) -> None:
    """Rewrite a file with other metadata and tensors, with or without the checksum that belongs to them."""
    with safe_open(file, "pt") as opened:
        [(key, header)] = opened.metadata().items()
    header, tensors = json.loads(header), load_file(file)
    change(header, tensors)
    if repair:
        del header["header_sha256"]
        header["header_sha256"] = saving._header_sum(header, tensors.items())
    save_file(tensors, file, {key: json.dumps(header)})


def flip(at: float, file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[int(at * (len(content) - 1))] ^= 0x10
    file.write_bytes(content)


def rename(header, tensors):
    tensors["other"] = tensors.pop(next(iter(tensors)))


def other_length(header, tensors):
    header["description"]["length"] = 160


DAMAGES = {
    "empty": (lambda f: f.write_bytes(b""), "is not a complete safetensors file"),
    "a stub": (lambda f: f.write_bytes(f.read_bytes()[:5]), "is not a complete safetensors file"),
    "half the header": (lambda f: f.write_bytes(f.read_bytes()[:400]), "is not a complete safetensors file"),
    "half": (lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]), "is not a complete safetensors file"),
    "one byte short": (lambda f: f.write_bytes(f.read_bytes()[:-1]), "is not a complete safetensors file"),
    "one byte long": (lambda f: f.write_bytes(f.read_bytes() + b"\0"), "is not a complete safetensors file"),
    "text": (lambda f: f.write_text("keys:\n  format: int8\n" * 9), "is not a complete safetensors file"),
    "weights": (lambda f: save_file({"a": torch.ones(3)}, f), "not one that QuantizedCache.save has written"),
    "a bit of the last tensor": (functools.partial(flip, 1.0), "checksum of its tensors is wrong"),
    "a bit in the middle": (functools.partial(flip, 0.5), "checksum of its tensors is wrong"),
    "other metadata": (functools.partial(edit, other_length), "checksum of its metadata is wrong"),
    "another name": (functools.partial(edit, rename), "checksum of its metadata is wrong"),
    "another version": (
        functools.partial(edit, lambda header, _: header.update(format_version=2, library_version="9.9")),
        r"format version 2, written by hf_kvquant 9\.9, cannot be read .*expected 1",
    ),
    "missing": (lambda f: f.unlink(), "cannot be read .*No such file"),
    "a folder": (lambda f: (f.unlink(), f.mkdir()), "cannot be read"),
}


class TestRefusals:
    @pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
    def test_damaged_files(self, damage, message, file):
        damage(file)
        with pytest.raises(ValueError, match=f"{file}: .*{message}"):
            QuantizedCache.load(file, build())

    def test_every_bit_counts(self, file):
        """A flipped bit anywhere is noticed, by safetensors or by a checksum."""
        content = file.read_bytes()
        for at in torch.linspace(0, 1, 60).tolist():
            flip(at, file)
            with pytest.raises(ValueError, match=str(file)):
                QuantizedCache.load(file, build())
            file.write_bytes(content)

    def test_verify_may_be_left_out(self, file):
        """Without verification only the metadata is checked."""
        flip(1.0, file)
        QuantizedCache.load(file, build(), verify=False)
        edit(other_length, file)
        with pytest.raises(ValueError, match="checksum of its metadata"):
            QuantizedCache.load(file, build(), verify=False)

    def test_another_architecture(self, file):
        with pytest.raises(
            ValueError, match=f"{file}: was computed by another model: .* in the file, .* in the config"
        ):
            QuantizedCache.load(file, build("qwen2"))
        config = families.config("llama", rope_parameters={"rope_type": "default", "rope_theta": 77.0})
        with pytest.raises(ValueError, match=r"rope_parameters is .*10000.* in the file, .*77.* in the config"):
            QuantizedCache.load(file, config)

    def test_a_fine_tuned_twin(self, file):
        twin = copy.deepcopy(build())
        assert QuantizedCache.load(file, twin).get_seq_length() == 161
        with torch.no_grad():
            twin.model.layers[1].self_attn.v_proj.weight.mul_(1.001)
        with pytest.raises(ValueError, match="same config, other weights"):
            QuantizedCache.load(file, twin)
        # Without the model itself, weights are not compared.
        assert QuantizedCache.load(file, twin.config).get_seq_length() == 161

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
    def test_another_dtype(self, dtype, file):
        with pytest.raises(ValueError, match="other weights"):
            QuantizedCache.load(file, families.build("llama", dtype))

    def test_each_parameter_counts(self):
        model = copy.deepcopy(build())
        before = saving.identity(model)["weights"]
        for name, parameter in model.named_parameters():
            saved = parameter.detach().clone()
            with torch.no_grad():
                parameter.mul_(1.01)
            assert saving.identity(model)["weights"] != before, name
            parameter.data.copy_(saved)
        assert saving.identity(model)["weights"] == before

    def test_what_does_not_matter(self, file):
        """A model's name, a special token, or being in use makes no difference."""
        config = families.config("llama", eos_token_id=5, use_cache=False, _name_or_path="elsewhere")
        assert QuantizedCache.load(file, config).get_seq_length() == 161
        with hf_kvquant.attention(build()):
            assert QuantizedCache.load(file, build()).get_seq_length() == 161

    def test_a_file_that_does_not_know_its_weights(self, path):
        filled(build(), "int4")[0].save(path)
        assert QuantizedCache.load(path, build().config).get_seq_length() == 161
        with pytest.raises(ValueError, match="does not say which weights computed it; save with save"):
            QuantizedCache.load(path, build())

    def test_the_fields_of_another_transformers(self, file):
        """Fields that only one version has make no difference, if the versions differ."""

        def older(header, tensors):
            header["transformers_version"] = "5.0"
            header["description"]["model"]["config"]["forgotten"] = 1

        edit(older, file, repair=True)
        assert QuantizedCache.load(file, build()).get_seq_length() == 161

    def test_layers_of_another_transformers(self, path, monkeypatch):
        model = build("gemma2")
        filled(model, "int4", 20)[0].save(path, model)
        real = DynamicSlidingWindowLayer.__init__

        def newer(self, *args, **kwargs):
            real(self, *args, **kwargs)
            self.invented_later = None

        monkeypatch.setattr(DynamicSlidingWindowLayer, "__init__", newer)
        with pytest.raises(ValueError, match=r"lacks \['invented_later'\] of a DynamicSlidingWindowLayer"):
            QuantizedCache.load(path, model)

    def test_what_cannot_be_saved(self, path):
        model = build("gemma2")
        cache, _ = filled(model, "int4", 20)
        cache.layers[0].hook = print
        with pytest.raises(ValueError, match=r"layers.0.hook: a builtin_function_or_method cannot be saved"):
            cache.save(path, model)
        assert not path.exists()

    def test_saving_refuses(self, path):
        model = build()
        cache = QuantizedCache(model.config, "int4")
        with pytest.raises(ValueError, match="is empty; expected at least one token"):
            cache.save(path, model)
        cache, _ = filled(model, "int4")
        with pytest.raises(ValueError, match="model: its config is not the cache's"):
            cache.save(path, build("qwen2"))
        with pytest.raises(ValueError, match="config: a str is not allowed; expected a model or its config"):
            cache.save(path, "llama")
        with pytest.raises(ValueError, match=r"path: .* expected a file's name"):
            cache.save(path.parent, model)
        with pytest.raises(ValueError, match=r"path: .*expected a name in an existing folder"):
            cache.save(path.parent / "no" / "where", model)
        cache.begin("reorder_cache")
        with pytest.raises(ValueError, match="middle of a reorder_cache"):
            cache.save(path, model)
        assert list(path.parent.iterdir()) == []

    def test_weights_that_are_not_in_memory(self, file):
        with torch.device("meta"):
            model = type(build())(build().config)
        with pytest.raises(ValueError, match=r"weights of model\.embed_tokens\.weight are not in memory"):
            QuantizedCache.load(file, model)

    def test_a_config_that_is_none(self, file):
        with pytest.raises(ValueError, match="config: a dict is not allowed; expected a model or its config"):
            QuantizedCache.load(file, {})


# --- what the weights are made of, and what adapters add to them


class Holder(torch.Tensor):
    """Weights that can be taken apart and detached, and nothing else."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Holder(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return type(args[0])(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{function} of a Holder")


class Closed(Holder):
    """Weights that cannot even be taken apart."""

    def __tensor_flatten__(self):
        raise NotImplementedError("closed")


def with_weights(kind: type, scale: float):
    model = copy.deepcopy(build())
    weights = kind(torch.arange(128 * 128, dtype=torch.int8).reshape(128, 128), torch.tensor([scale]))
    model.model.layers[1].self_attn.v_proj._parameters["weight"] = torch.nn.Parameter(weights, requires_grad=False)
    return model


class TestWeights:
    def test_what_a_tensor_subclass_holds(self, path):
        cache = filled(build(), "int4")[0]
        cache.save(path, with_weights(Holder, 1.0))
        assert QuantizedCache.load(path, with_weights(Holder, 1.0)).get_seq_length() == 161
        for other in (with_weights(Holder, 1.5), build()):
            with pytest.raises(ValueError, match="same config, other weights"):
                QuantizedCache.load(path, other)

    def test_weights_that_cannot_be_read(self, path):
        model, cache = with_weights(Closed, 1.0), filled(build(), "int4")[0]
        with pytest.raises(
            ValueError,
            match=r"weights of model\.layers\.1\.self_attn\.v_proj\.weight, a Closed, cannot be read .*closed.*"
            r"save\(path, model\.config\)",
        ):
            cache.save(path, model)
        cache.save(path, model.config)
        assert QuantizedCache.load(path, model.config).get_seq_length() == 161

    @pytest.mark.filterwarnings("ignore")
    def test_torchao(self, path):
        torchao = pytest.importorskip("torchao.quantization")
        models = [copy.deepcopy(build()) for _ in range(2)]
        with torch.no_grad():
            models[1].model.layers[1].self_attn.v_proj.weight.mul_(1.5)
        for model in models:
            torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        filled(build(), "int4")[0].save(path, models[0])
        assert QuantizedCache.load(path, models[0]).get_seq_length() == 161
        with pytest.raises(ValueError, match="same config, other weights"):
            QuantizedCache.load(path, models[1])


class TestAdapters:
    @pytest.fixture
    def model(self):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(copy.deepcopy(build()), config, adapter_name="first").eval()
        model.add_adapter("second", config)
        return model

    @pytest.fixture
    def file(self, model, path):
        filled(model.get_base_model(), "int4")[0].save(path, model)
        return path

    def test_the_same_ones(self, model, file):
        for each in (model, model.get_base_model(), model.get_base_model().config):
            assert QuantizedCache.load(file, each).get_seq_length() == 161
        assert QuantizedCache.load(file, model).layers[0].device == model.device

    def test_another_one(self, model, file):
        model.set_adapter("second")
        with pytest.raises(
            ValueError,
            match=r"other adapters: model\.\S+ has 'first' times 2.0 in the file, 'second' times 2.0 in the",
        ):
            QuantizedCache.load(file, model)
        model.base_model.set_adapter(["first", "second"])
        with pytest.raises(
            ValueError, match="has 'first' times 2.0 in the file, 'first' times 2.0, 'second' times 2.0"
        ):
            QuantizedCache.load(file, model)

    def test_none(self, model, file):
        with (
            model.disable_adapter(),
            pytest.raises(ValueError, match="has 'first' times 2.0 in the file, none in the"),
        ):
            QuantizedCache.load(file, model)
        with pytest.raises(ValueError, match="has 'first' times 2.0 in the file, none in the model"):
            QuantizedCache.load(file, build())
        assert QuantizedCache.load(file, model).get_seq_length() == 161

    def test_saved_without(self, model, path):
        with model.disable_adapter():
            filled(model.get_base_model(), "int4")[0].save(path, model)
        with pytest.raises(ValueError, match="has none in the file, 'first' times 2.0 in the model"):
            QuantizedCache.load(path, model)

    def test_another_scaling(self, model, file):
        model.get_base_model().model.layers[1].self_attn.v_proj.scale_layer(0.5)
        with pytest.raises(
            ValueError, match=r"layers\.1\.self_attn\.v_proj has 'first' times 2.0 in the file, 'first' times 1.0 in"
        ):
            QuantizedCache.load(file, model)

    def test_merged(self, model, file):
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"has 'first' times 2.0 in the file, 'first' \(merged\) in the model"):
            QuantizedCache.load(file, model)

    def test_other_weights_of_the_same_adapter(self, model, file):
        with torch.no_grad():
            model.get_base_model().model.layers[1].self_attn.v_proj.lora_A["first"].weight.mul_(1.5)
        with pytest.raises(ValueError, match="same config, other weights"):
            QuantizedCache.load(file, model)

    def test_modules_that_an_adapter_replaces(self, path):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        model = peft.get_peft_model(copy.deepcopy(build()), config, adapter_name="first").eval()
        assert saving.identity(model)["adapters"]["lm_head"] == {"first": None}

    def test_prompts_beside_the_model(self, path):
        peft = pytest.importorskip("peft")
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = peft.get_peft_model(copy.deepcopy(build()), config).eval()
        filled(model.get_base_model(), "int4")[0].save(path, model)
        assert QuantizedCache.load(path, model).get_seq_length() == 161
        with model.disable_adapter(), pytest.raises(ValueError, match="prompt has 'default' in the file, none in the"):
            QuantizedCache.load(path, model)

    def test_a_file_that_does_not_know_of_adapters(self, model, file):
        """Files of the first versions have no entry for adapters."""
        edit(lambda header, _: header["description"]["model"].pop("adapters"), file, repair=True)
        with model.disable_adapter():
            assert QuantizedCache.load(file, model).get_seq_length() == 161


# --- paths, and files that change while they are read


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs the paths of a Unix")
class TestPaths:
    @pytest.fixture
    def cache(self):
        return filled(build(), "int8")[0]

    def make(self, kind: str, path: Path) -> None:
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(str(path))
        else:
            try:
                # The device number of /dev/null.
                os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
            except PermissionError:
                pytest.skip("only root makes devices")

    @pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
    def test_what_is_no_file(self, kind, cache, monkeypatch, tmp_path):
        # The path of a socket must be short.
        monkeypatch.chdir(tmp_path)
        path = Path(kind)
        self.make(kind, path)
        before = path.stat()
        with pytest.raises(ValueError, match=f"path: '{kind}' is a {kind}; expected a regular file or a new name"):
            cache.save(path)
        with pytest.raises(ValueError, match=rf"{kind}: cannot be read \(it is a {kind}; expected a regular file\)"):
            QuantizedCache.load(path, build())
        assert path.stat() == before
        assert [p.name for p in tmp_path.iterdir()] == [kind]

    def test_a_symbolic_link_is_followed(self, cache, path):
        link = path.with_name("link")
        link.symlink_to(path.name)
        for _ in ("new", "replaced"):
            cache.save(link)
            assert link.is_symlink() and path.is_file() and not path.is_symlink()
            assert QuantizedCache.load(link, build().config).get_seq_length() == 161
        assert sorted(p.name for p in path.parent.iterdir()) == ["link", path.name]

    def test_permissions_and_owner_are_kept(self, cache, path):
        path.write_bytes(b"")
        path.chmod(0o640)
        if os.geteuid() == 0:
            os.chown(path, 1234, 5678)
        before = path.stat()
        cache.save(path)
        after = path.stat()
        assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)

    def test_an_owner_that_cannot_be_given(self, cache, path, monkeypatch):
        def refuse(*args):
            raise PermissionError(1, "Operation not permitted")

        path.write_bytes(b"")
        path.chmod(0o604)
        monkeypatch.setattr(os, "chown", refuse)
        cache.save(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_a_file_that_is_cut_short_after_it_was_read(file):
    cache = QuantizedCache.load(file, build(), mmap=False)
    before = copy.deepcopy([tensors_of(layer) for layer in cache.layers])
    os.truncate(file, 100)
    assert_equal([tensors_of(layer) for layer in cache.layers], before)
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        QuantizedCache.load(file, build(), mmap=False)


_REPLACES = """
import os, shutil, sys
one, other, path = sys.argv[1:]
print(flush=True)
while os.getppid() != 1:
    for each in (one, other):
        shutil.copyfile(each, path + ".new")
        os.replace(path + ".new", path)
"""


@pytest.mark.any_host
def test_a_file_that_is_replaced_while_it_is_loaded(file):
    """Each load reads one whole file."""
    one, other = file.with_name("one"), file.with_name("other")
    one.write_bytes(file.read_bytes())
    cache = QuantizedCache.load(file, build().config)
    for layer in cache.layers:
        # The tensors have the same names and shapes, and other bytes.
        layer._keys.data.bitwise_xor_(1)
    cache.save(other, build())
    caches = [[tensors_of(layer) for layer in QuantizedCache.load(each, build()).layers] for each in (one, other)]
    writer = subprocess.Popen([sys.executable, "-c", _REPLACES, str(one), str(other), str(file)], stdout=-1)
    try:
        writer.stdout.readline()
        found = set()
        for _ in range(300):
            layers = QuantizedCache.load(file, build().config, verify=False).layers
            states = [tensors_of(layer) for layer in layers]
            which = int(not torch.equal(states[0]["keys"]["data"], caches[0][0]["keys"]["data"]))
            assert_equal(states, caches[which])
            QuantizedCache.load(file, build().config)
            found.add(which)
    finally:
        writer.kill()
        writer.wait()
    assert found == {0, 1}


# --- written as a whole or not at all


@pytest.mark.parametrize("call", ["save_file", "os.chmod", "os.fsync", "os.replace"])
def test_an_exception_leaves_the_old_file(call, file, monkeypatch):
    before = file.read_bytes()
    cache, _ = filled(build(), "int8")

    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    module, _, name = call.rpartition(".")
    monkeypatch.setattr(os if module else saving, name, fails)
    with pytest.raises(OSError, match="No space left"):
        cache.save(file, build())
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


_KILLED = """
import os, shutil, signal, sys
sys.path.insert(0, os.getcwd())
import families, hf_kvquant, torch
from hf_kvquant import saving

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def half(tensors, temporary, header):
    real(tensors, temporary, header)
    os.truncate(temporary, os.path.getsize(temporary) // 2)
    die()

real = saving.save_file
cache = hf_kvquant.QuantizedCache(families.config("llama"), "int8")
for layer_idx in (0, 1):
    cache.update(*torch.randn(2, 1, 2, 500, 64), layer_idx)
for path in sys.argv[1:]:
    if os.fork() == 0:
        if path.endswith("half"):
            saving.save_file = half
        if path.endswith("replace"):
            os.replace = die
        cache.save(path)
        die()
    assert os.wait()[1] == signal.SIGKILL
"""


@pytest.mark.any_host
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_leaves_the_old_file_or_the_new_one(file):
    """The process is killed when half is written, before the rename, and after it."""
    before = file.read_bytes()
    half, replace, after = (file.with_name(name) for name in ("half", "replace", "after"))
    for path in (half, replace, after):
        path.write_bytes(before)
    # Not in the repository's folder, where Python would import the source instead of the installed package.
    command, folder = [sys.executable, "-c", _KILLED, str(half), str(replace), str(after)], Path(__file__).parent
    done = subprocess.run(command, cwd=folder, env=processes.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in (half, replace):
        assert path.read_bytes() == before
        [left] = file.parent.glob(f".{path.name}.*")
        with saving._temporary(path) as live:
            # A file of another process, which is locked while it is written.
            live.write_bytes(b"half")
            filled(build(), "int8")[0].save(path)
            assert not left.exists() and live.exists()
        assert list(file.parent.glob(f".{path.name}.*")) == []
    assert QuantizedCache.load(after, build().config).get_seq_length() == 500


def test_the_config_survives(path):
    config = dataclasses.replace(CONFIGS["one-dense-layer"], backend="reference")
    filled(build(), config)[0].save(path)
    assert QuantizedCache.load(path, build().config).kv_config == config
