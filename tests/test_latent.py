"""Decode over latents as stored equals the model's own attention over de-quantized, expanded ones."""

import importlib
import inspect
from pathlib import Path

import families
import pytest
import torch
import transformers
from levels import LEVELS
from stored import make_states

import hf_kvquant
from hf_kvquant import KVQuantConfig, host, latent, reference, route
from hf_kvquant.backends import cpu
from hf_kvquant.quantization import QuantSpec

PRESETS = ("int8", "int8-plain", "fp8", "int4", "int4-small")
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}
CACHE = host.CACHE
SIZES = {"kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64, "q_lora_rank": 32}


def build(dtype=torch.float32, **options):
    model = families.build("deepseek_v3", dtype=dtype, **options)
    model.config._experts_implementation = "eager"  # the others refuse float64
    return model


def mla_modules() -> dict[str, type]:
    """Every class of the installed transformers that expands latents."""
    found = {}
    for folder in sorted(transformers.models.__path__):
        for path in sorted(Path(folder).glob("*/modeling_*.py")):
            if f"def {latent.EXPANSION}(" in path.read_text():
                module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
                for name, value in vars(module).items():
                    if inspect.isclass(value) and latent.EXPANSION in vars(value):
                        found[name] = value
    return found


MODULES = mla_modules()


class Sizes(torch.nn.Module):
    """The attributes that an expansion reads, with random weights in float64."""

    def __init__(self, heads: int):
        super().__init__()
        for name, size in SIZES.items():
            setattr(self, name, size)
        self.num_heads = heads
        self.kv_b_proj = torch.nn.Linear(32, heads * 96, bias=False, dtype=torch.float64)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("preset", ["int8", "int8-plain", "int4-small"])
def test_absorbed_attention_equals_every_class_s_own_expansion(name, preset):
    torch.manual_seed(0)
    module = Sizes(heads=4)
    kv_config = KVQuantConfig.preset(preset)
    latents, rotary = torch.randn(2, 1, 131, 32).double(), torch.randn(2, 1, 131, 32).double()
    k_spec, v_spec = (spec.resolve(32) for spec in kv_config.for_layer(0))
    states = make_states(latents, k_spec, recent_length=2), make_states(rotary, v_spec, recent_length=2)

    def expand(a, b):
        return MODULES[name].expand_kv(module, a, b)

    assert latent._cannot_absorb(module, latents, rotary, *expand(latents, rotary)) is None
    stored = latent.LatentStates(*states, expand, 4, 64)
    query = torch.randn(2, 4, 3, 64).double()
    with torch.no_grad():
        ours = latent.attend(module, query, stored, None, None, scaling=0.2)
        for i, position in enumerate(range(128, 131)):
            key, value = (x[:, :, : position + 1] for x in stored.dequantize(position))
            theirs = torch.nn.functional.scaled_dot_product_attention(query[:, :, i, None], key, value, scale=0.2)
            assert 0 < (ours[:, :, i, None] - theirs).abs().max() < 1e-9


def decode(model, kv_config, takes_states: bool, attn_mask=None, lengths=(1,) * 6):
    cache = hf_kvquant.QuantizedCache(config=model.config, kv_config=kv_config, attention_mask=attn_mask)
    ids, new = families.prompt(2, 70), families.prompt(2, sum(lengths), seed=3)
    logits, at = [], 0
    with torch.no_grad(), hf_kvquant.attention(model):
        model(ids, attention_mask=None if attn_mask is None else attn_mask[:, :70], **{CACHE: cache})
        if not takes_states:
            for layer in cache.layers:
                layer.takes_states = False
        for n in lengths:
            mask = None if attn_mask is None else attn_mask[:, : 70 + at + n]
            logits.append(model(new[:, at : at + n], attention_mask=mask, **{CACHE: cache}).logits)
            at += n
    return torch.cat(logits, 1), cache


# transformers' eager attention has its softmax in float32, whose range a float64 mask exceeds.
@pytest.mark.parametrize(
    ("attn", "dtype"), [("sdpa", torch.float64), ("sdpa", torch.float32), ("eager", torch.float32)]
)
@pytest.mark.parametrize("kv_config", [*PRESETS, "windows"])
def test_fused_equals_dequantized(kv_config, dtype, attn):
    if kv_config == "windows":
        kv_config = KVQuantConfig.preset("int4-small").to_dict() | {"sink_length": 3, "recent_length": 9}
        kv_config = KVQuantConfig.from_dict(kv_config)
    model = build(dtype, attn=attn)
    mask = torch.ones(2, 76, dtype=torch.long)
    mask[0, :5] = 0
    ours, cache = decode(model, kv_config, True, mask)
    theirs, expanded = decode(model, kv_config, False, mask)
    assert cache.routes["decode_fused"] == 12 and cache.routes["decode_dequantized"] == 0
    assert expanded.routes["decode_fused"] == 0 and expanded.routes["decode_dequantized"] == 12
    assert (ours - theirs).abs().max() < LIMITS[dtype]


def test_the_patch_is_undone():
    model = build()
    modules = [module for module in model.modules() if hasattr(module, latent.EXPANSION)]
    assert modules

    def fails():
        with hf_kvquant.attention(model):
            with hf_kvquant.attention(model):
                pass
            assert all(latent.EXPANSION in vars(module) for module in modules)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not any(latent.EXPANSION in vars(module) for module in modules)
    assert not latent._entered


class Wrapped(torch.nn.Linear):
    """A projection whose weight is not all of it, as LoRA's and quantized ones."""


def test_a_projection_that_cannot_be_absorbed_is_expanded_and_said(monkeypatch):
    monkeypatch.setattr(route, "_said", set())
    model = build()
    for module in model.modules():
        if hasattr(module, latent.EXPANSION):
            module.kv_b_proj.__class__ = Wrapped
    with pytest.warns(UserWarning, match="Latents are de-quantized and expanded at every step, because of a Wrapped"):
        _, cache = decode(model, "int8-plain", True)
    assert cache.routes["decode_fused"] == 0 and cache.routes["decode_dequantized"] == 12


def test_an_expansion_that_does_something_else_is_not_absorbed(monkeypatch):
    monkeypatch.setattr(route, "_said", set())
    model = build()
    owner = type(next(module for module in model.modules() if hasattr(module, latent.EXPANSION)))
    original = owner.expand_kv
    monkeypatch.setattr(owner, "expand_kv", lambda self, a, b: tuple(x * 2 for x in original(self, a, b)))
    with pytest.warns(UserWarning, match="are not kv_b_proj's product"):
        _, cache = decode(model, "int8-plain", True)
    assert cache.routes["decode_fused"] == 0


@pytest.mark.parametrize("fmt", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize(("head_dim", "length"), [(64, 63), (128, 130), (512, 1000)])
def test_values_on_the_channel_grid(isa, fmt, head_dim, length):
    """Latents on the channel grid are values too."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, length, head_dim)
    states = make_states(x, QuantSpec(fmt, "channel").resolve(head_dim))
    query = torch.randn(1, 16, 2, head_dim)
    ours, ours_lse = cpu.decode_attention(query, states, states, scaling=head_dim**-0.5, isa=isa)
    expected, lse = reference.decode_attention(query, states, states, scaling=head_dim**-0.5)
    assert (ours - expected).abs().max() < 1e-4 and (ours_lse - lse).abs().max() < 1e-4
