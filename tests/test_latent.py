"""Decode over latents as stored equals the model's own attention over de-quantized, expanded ones."""

import importlib
import inspect
from pathlib import Path

import families
import pytest
import torch
import transformers
from stored import make_states

import hf_kvquant
from hf_kvquant import KVQuantConfig, host, latent, route
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

    assert latent._not_foldable(module, latents) is None
    assert latent._not_absorbed(module, latents, rotary, *expand(latents, rotary)) is None
    stored = latent.LatentStates(*states, expand, 4, 64)
    query = torch.randn(2, 4, 3, 64).double()
    with torch.no_grad():
        ours = latent.attend(module, query, stored, None, None, scaling=0.2)
        for i, position in enumerate(range(128, 131)):
            key, value = expand(*(x.dequantize(position)[:, :, : position + 1] for x in states))
            theirs = torch.nn.functional.scaled_dot_product_attention(query[:, :, i, None], key, value, scale=0.2)
            assert 0 < (ours[:, :, i, None] - theirs).abs().max() < 1e-9


@pytest.mark.parametrize(("backend", "most"), [("cpu", "up to 512"), ("cuda", "up to 256, or 512")])
def test_ranks_that_kernels_take(backend, most, monkeypatch):
    monkeypatch.setattr(latent.ops, "choose_backend", lambda *_: backend)

    def obstacle(rank):
        return latent._obstacle_of_backend("auto", "cuda", torch.bfloat16, rank)

    assert [obstacle(rank) for rank in (32, 256, 512)] == [None] * 3
    for rank in (520, 576):
        assert f"latents of {rank} elements" in obstacle(rank) and f"a multiple of 16 {most})" in obstacle(rank)
    assert (obstacle(320) is None) is (backend == "cpu")


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


def decode_dense(model, n=6):
    ids, new = families.prompt(2, 70), families.prompt(2, n, seed=3)
    with torch.no_grad():
        return model(torch.cat([ids, new], 1)).logits[:, 70:]


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


class Adapted(torch.nn.Module):
    """A projection beside which another one is added, as LoRA does."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.base, self.more = base, torch.nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.more(x)


class Quantized(torch.nn.Linear):
    """A projection whose weight is not in the dtype that it computes in."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = torch.nn.Parameter((base.weight.data * 100).round().char(), requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) / 100)


def with_bias(base: torch.nn.Linear) -> torch.nn.Linear:
    base.bias = torch.nn.Parameter(torch.ones(base.out_features))
    return base


def hooked(base: torch.nn.Linear) -> torch.nn.Linear:
    base.register_forward_hook(lambda module, args, output: output * 2)
    return base


def offloaded(base: torch.nn.Linear) -> torch.nn.Linear:
    forward = base.forward
    base.forward = lambda x: forward(x) * 2
    return base


UNFOLDABLE = {
    "adapted": (Adapted, "a Adapted as kv_b_proj"),
    "quantized": (Quantized, "a Quantized as kv_b_proj"),
    "with_bias": (with_bias, "a Linear with a bias as kv_b_proj"),
    "hooked": (hooked, "hooks on kv_b_proj"),
    "offloaded": (offloaded, "hooks on kv_b_proj"),
}
every_unfoldable = pytest.mark.parametrize("name", UNFOLDABLE)


def change_projections(model, change) -> None:
    for module in model.modules():
        if hasattr(module, latent.EXPANSION):
            module.kv_b_proj = change(module.kv_b_proj)


@every_unfoldable
def test_a_projection_that_cannot_be_folded_is_expanded_and_said_once(name, monkeypatch):
    monkeypatch.setattr(route, "_said", set())
    change, reason = UNFOLDABLE[name]
    model = build()
    change_projections(model, change)
    with pytest.warns(UserWarning, match="de-quantized copies of the KV cache") as said:
        ours, cache = decode(model, "int8-plain", True)
    messages = [str(w.message) for w in said if "de-quantized" in str(w.message)]
    assert len(messages) == 1 and reason in messages[0]
    assert cache.routes["decode_fused"] == 0 and cache.routes["decode_dequantized"] == 12
    dense = decode_dense(model)
    assert (ours - dense).abs().max() < 0.05 * dense.abs().max()


@every_unfoldable
def test_a_projection_that_changes_after_prefill_is_expanded_from_then_on(name, monkeypatch):
    monkeypatch.setattr(route, "_said", set())
    change, reason = UNFOLDABLE[name]
    model = build()
    cache = hf_kvquant.QuantizedCache(config=model.config, kv_config="int8-plain")
    copy = hf_kvquant.QuantizedCache(config=model.config, kv_config="int8-plain")
    ids, new = families.prompt(2, 70), families.prompt(2, 1, seed=3)
    with torch.no_grad(), hf_kvquant.attention(model):
        for either in (cache, copy):
            model(ids, **{CACHE: either})
    change_projections(model, change)
    for layer in copy.layers:
        layer.takes_states = False
    with torch.no_grad(), hf_kvquant.attention(model):
        with pytest.warns(UserWarning, match=f"because of {reason}"):
            ours = model(new, **{CACHE: cache}).logits
        assert cache.routes["decode_fused"] == 0 and cache.routes["decode_dequantized"] == 2
        assert (ours - model(new, **{CACHE: copy}).logits).abs().max() < 1e-4


def test_the_layers_of_a_cache_that_was_filled_outside_of_attention_learn_in_their_first_step():
    model = build()
    ids, new = families.prompt(2, 70), families.prompt(2, 3, seed=3)
    caches = [hf_kvquant.QuantizedCache(config=model.config, kv_config="int8-plain") for _ in range(2)]
    logits = []
    for cache, is_inside in zip(caches, (True, False)):
        with torch.no_grad():
            if not is_inside:
                model(ids, **{CACHE: cache})
            with hf_kvquant.attention(model):
                if is_inside:
                    model(ids, **{CACHE: cache})
                logits.append(torch.cat([model(new[:, i : i + 1], **{CACHE: cache}).logits for i in range(3)], 1))
    assert (caches[0].routes["decode_fused"], caches[0].routes["decode_dequantized"]) == (6, 0)
    assert (caches[1].routes["decode_fused"], caches[1].routes["decode_dequantized"]) == (4, 2)
    assert (logits[0] - logits[1]).abs().max() < 1e-4


@pytest.mark.parametrize("argument", ["softcap", "position_bias", "sinks"])
def test_arguments_that_the_absorbed_call_does_not_take(argument):
    states = latent.LatentStates(*[make_states(torch.randn(1, 1, 9, 32), QuantSpec("int8"))] * 2, None, 4, 64)
    query = torch.randn(1, 4, 1, 64)
    assert latent.obstacle_of(states, query, {}) is None
    assert argument in latent.obstacle_of(states, query, {argument: torch.ones(1)})
    assert "torch.float16" in latent.obstacle_of(states, query.half(), {})


def test_an_expansion_that_does_something_else_is_not_absorbed(monkeypatch):
    monkeypatch.setattr(route, "_said", set())
    model = build()
    owner = type(next(module for module in model.modules() if hasattr(module, latent.EXPANSION)))
    original = owner.expand_kv
    monkeypatch.setattr(owner, "expand_kv", lambda self, a, b: tuple(x * 2 for x in original(self, a, b)))
    with pytest.warns(UserWarning, match="are not kv_b_proj's product"):
        _, cache = decode(model, "int8-plain", True)
    assert cache.routes["decode_fused"] == 0


def test_rotary_keys_are_stored_as_the_config_says():
    """Like latents, by a spec of their own, or by an override of their layer."""
    model = build()
    by_keys = KVQuantConfig.preset("int4")
    assert by_keys.rotary_keys == "keys"
    own = {"values": {"format": "int8"}}
    cases = {
        "keys": (by_keys, "int4:channel:64"),
        "values": (KVQuantConfig.from_dict(by_keys.to_dict() | {"rotary_keys": "values"}), "int4:token:32:rotate"),
        "an override": (KVQuantConfig.from_dict(by_keys.to_dict() | {"layers": {0: own}}), "int8:token:32"),
    }
    for name, (config, code) in cases.items():
        cache = hf_kvquant.QuantizedCache(model.config, config)
        with hf_kvquant.attention(model), torch.no_grad():
            model(torch.arange(3, 80)[None], **{CACHE: cache})
        latents, rotary = cache.layers[0]._views()
        assert (latents.spec.code, rotary.spec.code) == ("int4:channel:64", code), name
        assert cache.kv_config.for_model(model.config) == cache.kv_config


def test_rotary_keys_of_a_model_without_latents():
    config = families.build("llama").config
    assert KVQuantConfig.preset("int8").for_model(config) == KVQuantConfig.preset("int8")
    with pytest.raises(ValueError, match="rotary_keys: 'both' is not allowed; expected 'keys' or 'values'"):
        KVQuantConfig.from_dict(KVQuantConfig.preset("int8").to_dict() | {"rotary_keys": "both"})
