"""A step that repeats the call of the step before it skips the checks, and nothing else: see `cpu._Again`."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from stored import KEY_SPECS, VALUE_SPECS, make_states, problem, random_states, replaced
from test_ops import Watch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_kvquant import ops
from hf_kvquant.backends import arguments, cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


def attend(query, keys, values, mask=None, s_aux=None, scaling=0.1, softcap=0.0):
    return ops.decode_attention(query, keys, values, mask, s_aux, scaling=scaling, softcap=softcap)


def anew(query, keys, values, *args, **kwargs):
    """The same call, of which nothing is remembered."""
    keys, values = (replace(states, stored=states.stored._replace()) for states in (keys, values))
    assert keys.stored.again is None
    return attend(query, keys, values, *args, **kwargs)


@contextmanager
def packed_calls() -> Iterator[list]:
    """The calls that were checked and packed."""
    calls = []
    packed = arguments.attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "attention", lambda *args: calls.append(args) or packed(*args))
        yield calls


def checked(*call, **options) -> bool:
    """Whether the call was checked and packed, with the results of one of which nothing is remembered."""
    with packed_calls() as calls:
        found = attend(*call, **options)
    torch.testing.assert_close(found, anew(*call, **options), rtol=0, atol=0)
    return bool(calls)


@pytest.fixture
def first():
    """A call, after it was made once."""
    call = problem("int4-channel", "int4-rotated", dtype=torch.bfloat16, kv_len=150, recent_length=4, sink_length=2)
    query, keys, values = call
    keys, values = (replace(states, length=140) for states in (keys, values))
    attend(query, keys, values)
    return query, keys, values


def with_length(length, *states):
    return [replace(side, length=length) for side in states]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("k", "v"), [("int8-channel", "int8"), ("dense", "fp8"), ("int4-rotated", "int3-rotated")])
def test_other_queries_and_more_columns(k, v, dtype):
    query, *states = problem(k, v, dtype=dtype, batch=2, q_len=2, kv_len=150, recent_length=4, sink_length=2)
    assert checked(query, *with_length(100, *states))
    for length in (101, 150, 2):
        assert not checked(torch.randn_like(query), *with_length(length, *states), scaling=0.1)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: ((q[:, :2], k, v), {}),
        lambda q, k, v: ((q.repeat(1, 1, 2, 1), k, v), {}),
        lambda q, k, v: ((torch.stack([q, q], -1)[..., 0], k, v), {}),
        lambda q, k, v: ((torch.cat([q, q], 2)[:, :, :1], k, v), {}),
        lambda q, k, v: ((q, k, replaced(v, data=v.data.clone())), {}),
        lambda q, k, v: ((q, replace(k, sink_positions=k.sink_positions + 1), v), {}),
        lambda q, k, v: ((q, replace(k, recent_length=9), v), {}),
        lambda q, k, v: ((q, replace(k, device_length=torch.tensor(70)), v), {}),
        lambda q, k, v: ((q, k, v, torch.arange(140)[None] % 3 > 0), {}),
        lambda q, k, v: ((q, k, v, None, torch.zeros(4)), {}),
        lambda q, k, v: ((q, k, v), {"scaling": 0.2}),
        lambda q, k, v: ((q, k, v), {"softcap": 5.0}),
    ],
    ids=["heads", "queries", "copied queries", "strides", "values", "sinks", "window", "length on device",
         "mask", "learned sink", "scaling", "softcap"],
)  # fmt: skip
def test_another_call_is_checked(change, first):
    call, options = change(*first)
    assert checked(*call, **options)
    attend(*first)
    assert not checked(*first)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: (q, *with_length(k.capacity + 1, k, v)), ValueError, "keys: the stored tensors do not fit"),
        (lambda q, k, v: (q, k, *with_length(139, v)), ValueError, "values length: 139"),
        (lambda q, k, v: (q, *with_length(0, k, v)), ValueError, "q_len: 1"),
        (lambda q, k, v: (q, replace(k, sink_positions=None), v), ValueError, "sink_positions: None is not allowed"),
        (lambda q, k, v: (q.half(), k, v), ValueError, "query dtype: torch.float16"),
        (lambda q, k, v: (q, replace(k, dtype=torch.float16), v), ValueError, "query dtype: torch.bfloat16"),
        (lambda q, k, v: (q, replace(k, head_dim=32), v), ValueError, "query head_dim: 64"),
        (lambda q, k, v: (q, k, replace(v, head_dim=32)), ValueError, "values: the stored tensors do not fit"),
        (lambda q, k, v: (q, replace(k, spec=KEY_SPECS["int8"]), v), ValueError, "keys: the stored tensors do not"),
        (lambda q, k, v: (q, k, replace(v, spec=VALUE_SPECS["int8"])), ValueError, "values: the stored tensors do"),
        (lambda q, k, v: (q, replace(k, backend="cuda"), v), RuntimeError, "backend 'cuda' cannot run"),
    ],
    ids=["room", "values' length", "no columns", "no sinks", "dtype", "keys' dtype", "head_dim", "values' head_dim",
         "keys' spec", "values' spec", "backend"],
)  # fmt: skip
def test_a_call_that_does_not_fit_is_refused(change, error, message, first):
    with pytest.raises(error, match=message):
        attend(*change(*first))
    assert not checked(*first)


def test_a_length_on_the_device_is_read_each_time():
    query, keys, values = problem("int8", "int8", kv_len=150)
    length = torch.tensor(100)
    states = [replace(side, device_length=length) for side in (keys, values)]
    assert checked(query, *states)
    length.fill_(120)
    assert not checked(query, *states)
    length.fill_(0)
    with pytest.raises(ValueError, match="length: 0 is not allowed; expected 1 or more"):
        attend(query, *states)


def test_queries_that_are_copied_are_copied_each_time(first):
    query, *states = first
    for _ in range(2):
        assert checked(torch.stack([query, query], -1)[..., 0], *states)


def test_other_threads_are_used(first):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert checked(*first)
    finally:
        torch.set_num_threads(threads)


def test_queries_of_another_device(first):
    query, *states = first
    with pytest.raises(RuntimeError, match="on device meta"):
        attend(query.to("meta"), *states)


def test_storage_that_moves_is_found(first):
    """`torch.multiprocessing` moves the memory of tensors that it sends, and frees where they were."""
    _, keys, values = first
    tensors = (*keys.stored, *values.stored, keys.sink_positions)
    moved = [tensor for tensor in tensors if tensor is not None]
    assert len(moved) == 10
    for tensor in moved:
        before = tensor.data_ptr()
        tensor.share_memory_()
        assert tensor.data_ptr() != before
        assert checked(*first)
        assert not checked(*first)


def test_steps_of_generate_repeat():
    """Only the first step of each layer is checked."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, vocab_size=99, **sizes)).to(torch.bfloat16)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with packed_calls() as calls:
        model.generate(torch.randint(99, (2, 70)), cache_implementation="kvquant-int4", **options)
    assert len(calls) == 3


def test_whoever_watches_operators_sees_it(first):
    with Watch() as watch:
        attend(*first)
    assert watch.seen == ["kvquant::decode_attention"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attend(*first)
    assert any(event.name == "kvquant::decode_attention" for event in profile.events())


def test_copies_remember_nothing(first):
    stored = first[1].stored
    assert stored.again is not None
    file = io.BytesIO()
    torch.save(stored, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.copy(stored), copy.deepcopy(stored), stored.transformed(torch.clone), loaded):
        assert other.again is other.layout is None and other.sinks[0] is None
        assert torch.equal(other.data, stored.data)


def test_latents_do_not_refer_to_themselves():
    latents = random_states(torch.Generator().manual_seed(0), 1, 1, 70, 64, torch.bfloat16)
    query, states = latents[:, :, :1].repeat(1, 4, 1, 1), make_states(latents, KEY_SPECS["int8"])
    attend(query, states, states)
    assert states.stored.again is None


def test_a_status_is_raised(first, monkeypatch):
    monkeypatch.setattr(first[1].stored.again, "_function", lambda *_: 2)
    with pytest.raises(MemoryError, match="out of memory"):
        attend(*first)
