"""head_dim 8 and its multiples: transformers' own test models have such heads. No kernel takes them, so the reference
runs, which `auto` says once."""

from __future__ import annotations

import warnings

import families
import pytest
import torch
import transformers

from hf_kvquant import QuantizedCache, QuantSpec, ops, quantize
from hf_kvquant.host import CACHE
from hf_kvquant.integration import attention
from hf_kvquant.measure.families import PRESETS

HEAD_DIMS = [8, 24, 40]
every_head_dim = pytest.mark.parametrize("head_dim", HEAD_DIMS)


@pytest.fixture(autouse=True)
def chosen_anew():
    """A choice is made, and said, once per process."""
    ops.choose_backend.cache_clear()
    ops._implementation.cache_clear()
    yield
    ops.choose_backend.cache_clear()
    ops._implementation.cache_clear()


@pytest.mark.parametrize(
    ("head_dim", "expected"),
    [
        (8, "40 51 62 73"),
        (24, "c0 d1 e2 f3 04 15 26 37 48 59 6a 7b"),
        (40, "00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff 40 51 62 73"),
    ],
)
def test_int4_bytes(head_dim, expected):
    """Codes c % 16 in a block whose channels have these numbers as values; every channel's scale is one."""
    block = torch.zeros(1, 1, 16, head_dim)
    block[:, :, 1] = 15.0
    block[:, :, 2] = torch.arange(head_dim) % 16
    data = quantize(block, QuantSpec("int4", "channel", block_length=16)).data
    assert bytes(data[0, 0, 2].tolist()).hex(" ") == expected


def tiny(head_dim: int):
    """A Llama whose attention has these heads."""
    return families.build("llama", head_dim=head_dim)


def generate(model, n: int = 6, **kwargs):
    options = {"do_sample": False, "max_new_tokens": n, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        out = model.generate(families.prompt(2, 70), **options, **kwargs)
    return torch.stack(out.logits), out[CACHE]


@every_head_dim
@pytest.mark.parametrize("preset", PRESETS)
def test_generate(preset, head_dim):
    """Every step is fused, and equals the model's own attention over de-quantized states."""
    model = tiny(head_dim)
    match = f"head_dim or group_size of {head_dim} on 'cpu' run on the slow backend 'reference'"
    with pytest.warns(RuntimeWarning, match=match) as said:
        logits, cache = generate(model, cache_implementation=f"kvquant-{preset}")
    assert len([w for w in said if "slow backend" in str(w.message)]) == 1
    assert cache.routes["decode_fused"] == 2 * 5
    assert cache.routes["decode_dequantized"] == 0
    dequantized = QuantizedCache(model.config, preset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dequantized.disable_fused("it is compared")
    expected, _ = generate(model, **{CACHE: dequantized})
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)


@every_head_dim
def test_equals_the_dense_cache_where_everything_is_exact(head_dim):
    model = tiny(head_dim)
    everything = {"keys": {"format": "int4", "grid": "channel"}, "values": {"format": "int8"}, "recent_length": 128}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits, _ = generate(model, cache_implementation="kvquant", cache_config=everything)
    torch.testing.assert_close(logits, generate(model)[0], rtol=0, atol=1e-4)


def test_keys_and_values_of_different_heads(outlier, store):
    """One side with small heads is enough."""
    spec = QuantSpec("int8").resolve
    with pytest.warns(RuntimeWarning, match="states with a head_dim or group_size of 24 on 'cpu'"):
        keys, values = store(outlier(1, 2, 40, 32), outlier(1, 2, 40, 24), spec(32), spec(24), backend="auto")
    output, _ = ops.decode_attention(torch.randn(1, 2, 1, 32), keys, values, scaling=0.2)
    assert output.shape == (1, 2, 1, 24)


def test_small_groups_of_a_large_head(outlier, store):
    spec = QuantSpec("int8", group_size=24)
    with pytest.warns(RuntimeWarning, match="states with a head_dim or group_size of 24 on 'cpu'"):
        keys, values = store(outlier(1, 2, 40, 48), outlier(1, 2, 40, 48), spec, spec, backend="auto")
    ops.decode_attention(torch.randn(1, 2, 1, 48), keys, values, scaling=0.2)


def test_a_backend_that_is_asked_for_refuses():
    model = tiny(8)
    config = {"keys": {"format": "int8"}, "values": {"format": "int8"}, "backend": "cpu"}
    if ops.backend_status("cpu") is not None:
        pytest.skip("the CPU backend cannot run")
    match = "states with a head_dim or group_size of 8 need backend 'reference'; 'cpu' takes multiples of 16"
    with pytest.raises(RuntimeError, match=match):
        generate(model, cache_implementation="kvquant", cache_config=config)


def test_a_test_model_of_transformers():
    """Four heads of eight, as in the tests of transformers' models."""
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 99, (2, 7))
    cache = QuantizedCache(model.config, "int8")
    with torch.no_grad(), attention(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = [model(x, **{CACHE: cache}).logits for x in (ids[:, :5], ids[:, 5:6], ids[:, 6:])]
        expected = model(ids).logits
    assert cache.routes["decode_fused"] == 4
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=0, atol=1e-3)
