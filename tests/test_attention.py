"""The type of the key decides the route; a call that the operator cannot do is de-quantized and counted."""

from __future__ import annotations

import dataclasses
import re
import warnings
from types import SimpleNamespace

import families
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import hf_kvquant
from hf_kvquant import KVQuantConfig, QuantizedCache, QuantizedStates, QuantSpec, reference
from hf_kvquant.attention import attend
from hf_kvquant.route import learn_route

BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 32
KEYS, VALUES = QuantSpec("int4", "channel"), QuantSpec("int4", group_size=16, rotate=True)
SCALING = 0.21
WINDOWS = {"sink_length": 3, "recent_length": 10}


def forbidden(*args, **kwargs):
    raise AssertionError("dense attention was called")


def eager(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Complete-mask attention in the dtype of its inputs; the mask is additive and may be None."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def inputs(store, q_len: int, kv_len: int = 150, dtype=torch.float64, **options):
    """Queries, stored keys and values, and the same keys and values before they were stored."""
    key, value = (torch.randn(BATCH, KV_HEADS, kv_len, HEAD_DIM, dtype=dtype) for _ in range(2))
    query = torch.randn(BATCH, HEADS, q_len, HEAD_DIM, dtype=dtype)
    return query, *store(key, value, KEYS, VALUES, **(WINDOWS | options))


def causal(q_len: int, kv_len: int) -> torch.Tensor:
    return torch.arange(kv_len) <= torch.arange(kv_len - q_len, kv_len)[:, None]


def masks(q_len: int, kv_len: int = 150) -> dict[str, torch.Tensor | None]:
    padding = torch.ones(BATCH, kv_len, dtype=torch.long)
    padding[0, :17] = 0
    seen = causal(q_len, kv_len) & (padding != 0)[:, None, None]
    hide = torch.zeros(seen.shape, dtype=torch.float64)
    return {
        "none": None,
        "padding": padding,
        "bool": seen,
        "float": hide.masked_fill(~seen, torch.finfo(torch.float64).min),
        "infinite": hide.masked_fill(~seen, -torch.inf),
    }


every_mask = pytest.mark.parametrize("mask", ["none", "padding", "bool", "float", "infinite"])


# --- the route


def test_tensors_go_to_dense_attention():
    seen = []

    def dense(*args, **kwargs):
        seen.append((args, kwargs))
        return "output", "weights"

    args = (object(), torch.zeros(1, 1, 1, 1), torch.zeros(1), torch.ones(1), None)
    assert attend(*args, dense_attention=dense, scaling=2.0, anything=3) == ("output", "weights")
    assert seen == [(args, {"scaling": 2.0, "anything": 3})]


@pytest.mark.parametrize("q_len", [1, 3, 16])
@every_mask
def test_states_go_to_the_operator(store, q_len, mask):
    query, keys, values = inputs(store, q_len)
    mask = masks(q_len)[mask]
    options = {
        "dropout": 0.0,
        "is_causal": True,
        "output_attentions": False,
        "position_ids": torch.zeros(1),
        "labels": None,
    }
    output, weights = attend(None, query, keys, values, mask, dense_attention=forbidden, scaling=SCALING, **options)
    expected, _ = reference.decode_attention(query, keys, values, mask, scaling=SCALING)
    assert weights is None
    assert output.shape == (BATCH, q_len, HEADS, HEAD_DIM)
    assert output.is_contiguous()
    assert torch.equal(output, expected.transpose(1, 2))
    assert dict(keys.routes) == {"decode_fused": 1}


def test_scaling_softcap_and_sinks_arrive(store):
    query, keys, values = inputs(store, 2)
    s_aux = torch.randn(HEADS, dtype=torch.float64)
    given = {"scaling": None, "softcap": 5.0, "s_aux": s_aux}
    output, _ = attend(None, query, keys, values, None, dense_attention=forbidden, **given)
    expected, _ = reference.decode_attention(query, keys, values, None, s_aux, scaling=HEAD_DIM**-0.5, softcap=5.0)
    assert torch.equal(output, expected.transpose(1, 2))


def obstacles():
    config = SimpleNamespace(output_attentions=True)
    block_mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, device="cpu")
    return {
        "output_attentions": (1, {"output_attentions": True}, "output_attentions=True"),
        "config-output_attentions": (1, {"module": SimpleNamespace(config=config)}, "output_attentions=True"),
        "unknown": (1, {"alibi": torch.ones(1)}, "the attention argument 'alibi'"),
        "dropout": (1, {"dropout": 0.1}, r"dropout=0\.1"),
        "sliding_window": (1, {"sliding_window": 16}, "sliding_window=16"),
        "block-mask": (1, {"mask": block_mask}, "a mask of type BlockMask"),
        "not-causal": (2, {"is_causal": False}, "is_causal=False"),
    }


@pytest.mark.parametrize(("q_len", "given", "reason"), obstacles().values(), ids=obstacles().keys())
def test_obstacles_are_dequantized_counted_and_said_once(store, q_len, given, reason):
    query, keys, values = inputs(store, q_len)
    arguments = {"module": None, "mask": None} | given
    module, mask = arguments.pop("module"), arguments.pop("mask")
    seen = []

    def dense(*args, **kwargs):
        seen.append((args, kwargs))
        return "output", "weights"

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            output = attend(module, query, keys, values, mask, dense_attention=dense, **arguments)
            assert output == ("output", "weights")
    assert len(said) == 1
    assert re.search(f"de-quantized copies of the KV cache, because of {reason}", str(said[0].message))
    assert dict(keys.routes) == {"decode_dequantized": 3}
    (got_module, got_query, got_key, got_value, got_mask), kwargs = seen[0]
    assert got_module is module
    assert got_query is query
    assert got_mask is mask
    assert kwargs == arguments
    assert torch.equal(got_key, keys.dequantize(position=150 - q_len))
    assert torch.equal(got_value, values.dequantize(position=150 - q_len))


def test_queries_that_require_grad_get_one(store):
    query, keys, values = inputs(store, 1)
    query.requires_grad_()
    with pytest.warns(UserWarning, match="queries that require grad"):
        output, _ = attend(None, query, keys, values, None, dense_attention=eager, scaling=SCALING)
    output.sum().backward()
    assert query.grad.abs().sum() > 0
    with torch.no_grad():
        attend(None, query, keys, values, None, dense_attention=forbidden, scaling=SCALING)
    assert dict(keys.routes) == {"decode_dequantized": 1, "decode_fused": 1}


def test_values_that_the_model_changed_are_an_obstacle(store):
    query, keys, _ = inputs(store, 1)
    value = torch.randn(BATCH, KV_HEADS, 150, HEAD_DIM, dtype=torch.float64)
    with pytest.warns(UserWarning, match="values that are not cached as the keys are"):
        output, _ = attend(None, query, keys, value, None, dense_attention=eager, scaling=SCALING)
    assert torch.equal(output, eager(None, query, keys.dequantize(), value, None, scaling=SCALING)[0])
    assert dict(keys.routes) == {"decode_dequantized": 1}


@pytest.mark.parametrize("mask", [None, "padding"])
def test_single_queries_need_no_causality(store, mask):
    query, keys, values = inputs(store, 1)
    attend(
        None,
        query,
        keys,
        values,
        masks(1)[mask or "none"],
        dense_attention=forbidden,
        scaling=SCALING,
        is_causal=False,
    )
    assert dict(keys.routes) == {"decode_fused": 1}


# --- T5's bias


@pytest.mark.parametrize("q_len", [1, 5, 20])
@pytest.mark.parametrize("heads", [1, HEADS], ids=["bias-shared", "bias-per-head"])
@every_mask
def test_position_bias_joins_the_mask(store, q_len, heads, mask):
    """Compared with eager attention over the columns that are read; without windows all queries read the same."""
    query, keys, values = inputs(store, q_len, sink_length=0, recent_length=0, kv_len=160)
    keys = store(keys.dequantize(), values.dequantize(), VALUES, VALUES)[0]
    bias = torch.randn(1, heads, q_len, 160, dtype=torch.float64)
    given = masks(q_len, 160)
    output, _ = attend(
        None, query, keys, values, given[mask], dense_attention=forbidden, scaling=SCALING, position_bias=bias
    )
    hide = given["infinite"] if mask != "none" else masks(q_len, 160)["infinite"].masked_fill(causal(q_len, 160), 0.0)
    exact = keys.dequantize(), values.dequantize()
    expected, _ = eager(None, query, *exact, hide + bias, scaling=SCALING)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    assert dict(keys.routes) == {"decode_fused": 1}


# --- several queries


@pytest.mark.parametrize("q_len", [16, 17, 25, 32])
@every_mask
def test_many_queries_equal_single_steps(store, q_len, mask):
    """The queries may cross the border of a block."""
    query, keys, values = inputs(store, q_len, kv_len=140)
    given = masks(q_len, 140)[mask]
    output, _ = attend(None, query, keys, values, given, dense_attention=forbidden, scaling=SCALING)
    for j in range(q_len):
        length = 140 - q_len + j + 1
        row = given
        if given is not None:
            row = given[:, :length] if given.ndim == 2 else given[:, :, j : j + 1, :length]
        single = (
            query[:, :, j : j + 1],
            dataclasses.replace(keys, length=length),
            dataclasses.replace(values, length=length),
        )
        step, _ = attend(None, *single, row, dense_attention=forbidden, scaling=SCALING)
        torch.testing.assert_close(output[:, j : j + 1], step, rtol=0, atol=1e-12)


@pytest.mark.parametrize("q_len", [2, 20, 32])
def test_a_mask_may_look_ahead(store, q_len):
    """In prefix or image attention a query reads later columns exactly, and the others as it would alone."""
    query, keys, values = inputs(store, q_len)
    mask = torch.rand(BATCH, 1, q_len, 150) < 0.7
    mask[..., -q_len:] = True
    output, _ = attend(None, query, keys, values, mask, dense_attention=forbidden, scaling=SCALING)
    for j in range(q_len):
        read = [states.dequantize(150 - q_len + j) for states in (keys, values)]
        bias = torch.zeros(mask[:, :, j : j + 1].shape, dtype=torch.float64).masked_fill(
            ~mask[:, :, j : j + 1], -torch.inf
        )
        expected, _ = eager(None, query[:, :, j : j + 1], *read, bias, scaling=SCALING)
        torch.testing.assert_close(output[:, j : j + 1], expected, rtol=0, atol=1e-12)
    assert dict(keys.routes) == {"decode_fused": 1}


@pytest.mark.parametrize("preset", ["int4", "int8", "int8-plain", "int4-small", "fp8"])
@pytest.mark.parametrize("start", [57, 64, 120])
def test_a_verify_of_sixteen_equals_sixteen_steps(preset, start):
    """Speculative decoding: tokens may be appended and read at once or one by one, also across a block's border."""
    config = families.config("llama", num_hidden_layers=1)
    key, value = torch.randn(2, BATCH, KV_HEADS, start + 16, 64, dtype=torch.float64).unbind()
    query = torch.randn(BATCH, HEADS, 16, 64, dtype=torch.float64)

    def run(lengths):
        cache, outputs, at = QuantizedCache(config, preset), [], start
        learn_route(*cache.update(key[:, :, :start], value[:, :, :start], 0))
        for n in lengths:
            new = slice(at, at + n)
            states = cache.update(key[:, :, new], value[:, :, new], 0)
            part = query[:, :, at - start : at - start + n]
            outputs.append(attend(None, part, *states, None, dense_attention=forbidden, scaling=SCALING)[0])
            at += n
        return torch.cat(outputs, 1)

    torch.testing.assert_close(run([16]), run([1] * 16), rtol=0, atol=1e-12)
    torch.testing.assert_close(run([5, 11]), run([1] * 16), rtol=0, atol=1e-12)


# --- how a layer learns its route


@pytest.mark.parametrize(
    ("change", "takes"),
    [
        (lambda key, value: (key, value), True),
        (lambda key, value: (key.clone(), value), None),
        (lambda key, value: (key, value.clone()), None),
        (lambda key, value: (key[:, :, :], value), None),
        (lambda key, value: (key.transpose(2, 3), value), None),
        (lambda key, value: (key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)), None),
        (lambda key, value: (torch.zeros(1), torch.zeros(1)), None),
        (lambda key, value: (value.transpose(1, 2), (key, value))[1], None),
        (lambda key, value: (torch.cat([key, key]), (key, value))[1], None),
        (lambda key, value: (key.shape, value.dtype, value.to("cpu"), (key, value))[3], True),
    ],
    ids=[
        "same",
        "key-copied",
        "value-copied",
        "sliced",
        "transposed",
        "repeated",
        "foreign",
        "value-used",
        "key-used",
        "asked",
    ],
)
def test_a_layer_learns_its_route(change, takes):
    cache = QuantizedCache(families.config("llama"), "int8")
    attend(
        None, torch.zeros(1, 4, 9, 64), *change(*cache.update(torch.randn(1, 2, 9, 64), torch.randn(1, 2, 9, 64), 0)),
        None, dense_attention=lambda *args, **kwargs: (None, None),
    )  # fmt: skip
    assert cache.layers[0].takes_states is takes
    assert cache.layers[1].takes_states is None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        step = cache.update(torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64), 0)
    assert isinstance(step[0], QuantizedStates) is bool(takes)
    assert len(said) == (0 if takes else 1)


def test_dense_attention_gets_plain_tensors():
    """The tag on the states of the first update does not reach dense attention."""
    cache = QuantizedCache(families.config("llama"), "int8")
    key, value = torch.randn(1, 2, 9, 64), torch.randn(1, 2, 9, 64)
    seen = []

    def dense(module, query, k, v, mask):
        seen.extend((k, v))
        return None, None

    attend(None, torch.zeros(1, 4, 9, 64), *cache.update(key, value, 0), None, dense_attention=dense)
    assert [type(tensor) for tensor in seen] == [torch.Tensor, torch.Tensor]
    assert seen[0] is key
    assert seen[1] is value


def test_layers_are_not_mixed_up():
    """The key of one layer and the value of another are not the states of either."""
    cache = QuantizedCache(families.config("llama"), "int8")
    new = torch.randn(1, 2, 9, 64)
    first, second = cache.update(new, new, 0), cache.update(new, new, 1)
    learn_route(first[0], second[1])
    assert [layer.takes_states for layer in cache.layers] == [None, None]


def test_a_switched_off_layer_stays_off():
    cache = QuantizedCache(families.config("llama"), "int8")
    new = torch.randn(1, 2, 9, 64)
    with pytest.warns(UserWarning, match="because I say so"):
        cache.disable_fused("because I say so")
    learn_route(*cache.update(new, new, 0))
    assert type(cache.update(new[:, :, :1], new[:, :, :1], 0)[0]) is torch.Tensor


# --- states in other hands


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        lambda q, k, v: torch.matmul(q, k),
        lambda q, k, v: torch.cat([k, k]),
        lambda q, k, v: k[:, :, None],
    ],
    ids=["sdpa", "matmul", "cat", "index"],
)
def test_foreign_functions_raise(store, function):
    with pytest.raises(TypeError, match=r"quantized states of a KV cache.*hf_kvquant\.attention\(model\)"):
        function(*inputs(store, 1))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_model_outside_the_context_raises(attn):
    model = families.build("llama", attn=attn)
    cache = QuantizedCache(model.config, "int8")
    ids = families.prompt(1, 20)
    with torch.no_grad():
        with hf_kvquant.attention(model):
            model(ids, past_key_values=cache)
        with pytest.raises(TypeError, match=r"hf_kvquant\.attention\(model\)"):
            model(ids[:, :1], past_key_values=cache)


def test_states_have_what_a_host_asks_for(store):
    _, keys, _ = inputs(store, 1)
    assert keys.shape == (BATCH, KV_HEADS, 150, HEAD_DIM)
    assert keys.shape[-2] == keys.size(-2) == 150
    assert (keys.ndim, keys.dtype, keys.device.type) == (4, torch.float64, "cpu")
    assert keys.to("cpu") is keys
    assert keys.to(torch.float64) is keys
    assert not hasattr(keys, "transpose")
    assert keys.to("meta").data.device.type == "meta"
    with pytest.raises(ValueError, match="dtype: quantized states of torch.float64 cannot become torch.float32"):
        keys.to(torch.float32)


def test_both_sides_may_differ():
    """Dense keys beside quantized values, and the other way around, go through the operator too."""
    dense = QuantSpec("dense")
    for keys, values in ((dense, VALUES), (KEYS, dense)):
        cache = QuantizedCache(families.config("llama"), KVQuantConfig(keys, values))
        key, value = torch.randn(2, 1, 2, 71, 64).unbind()
        learn_route(*cache.update(key[:, :, :70], value[:, :, :70], 0))
        states = cache.update(key[:, :, 70:], value[:, :, 70:], 0)
        query = torch.randn(1, 4, 1, 64)
        output, _ = attend(None, query, *states, None, dense_attention=forbidden, scaling=SCALING)
        expected, _ = eager(None, query, *(s.dequantize() for s in states), None, scaling=SCALING)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)
