"""A step that repeats the calls of the step before it skips the checks, and nothing else: see `cpu._Again`."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from stored import (
    KEY_SPECS,
    VALUE_SPECS,
    left_padding,
    make_states,
    no_faults,
    problem,
    random_states,
    replaced,
    store,
)
from test_ops import Watch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_kvquant import ops, reference
from hf_kvquant.backends import arguments, cpu
from hf_kvquant.quantization import NO_FACTORS, Factors

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


def attend(query, keys, values, mask=None, s_aux=None, scaling=0.1, softcap=0.0):
    return ops.decode_attention(query, keys, values, mask, s_aux, scaling=scaling, softcap=softcap)


def anew(query, keys, values, *args, **kwargs):
    """The same call, of which nothing is remembered."""
    keys, values = (replace(states, stored=states.stored._replace()) for states in (keys, values))
    assert keys.stored.attend_again is None
    return attend(query, keys, values, *args, **kwargs)


@contextmanager
def packed_calls(name: str = "attention") -> Iterator[list]:
    """The calls that were checked and packed, of attention or "append"."""
    calls = []
    packed = getattr(arguments, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, name, lambda *args: calls.append(args) or packed(*args))
        yield calls


def checked(*call, **options) -> bool:
    """Whether the call was checked and packed, with the results of one of which nothing is remembered."""
    with packed_calls() as calls:
        found = attend(*call, **options)
    torch.testing.assert_close(found, anew(*call, **options), rtol=0, atol=0)
    return bool(calls)


def twice(*call):
    """The call, after it was made for the first time and once more: only then is it remembered."""
    for _ in range(2):
        attend(*call)
    return call


@pytest.fixture
def first():
    """A call, after it was made."""
    call = problem("int4-channel", "int4-rotated", dtype=torch.bfloat16, kv_len=150, recent_length=4, sink_length=2)
    query, keys, values = call
    return twice(query, *with_length(140, keys, values))


def with_length(length, *states):
    return [replace(side, length=length) for side in states]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("k", "v"), [("int8-channel", "int8"), ("dense", "fp8"), ("int4-rotated", "int3-rotated")])
def test_other_queries_and_more_columns(k, v, dtype):
    query, *states = problem(k, v, dtype=dtype, batch=2, q_len=2, kv_len=150, recent_length=4, sink_length=2)
    twice(query, *with_length(100, *states))
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
    twice(query, *states)
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
    """Only the prompt and the first step of each layer are checked."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, vocab_size=99, **sizes)).to(torch.bfloat16)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with packed_calls() as calls, packed_calls("append") as appends:
        model.generate(torch.randint(99, (2, 70)), cache_implementation="kvquant-int4", **options)
    assert (len(calls), len(appends)) == (3, 6)


def test_whoever_watches_operators_sees_it(first):
    with Watch() as watch:
        attend(*first)
    assert watch.seen == ["kvquant::decode_attention"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attend(*first)
    assert any(event.name == "kvquant::decode_attention" for event in profile.events())


def test_copies_remember_nothing(first):
    stored = first[1].stored
    assert stored.attend_again is not None
    file = io.BytesIO()
    torch.save(stored, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.copy(stored), copy.deepcopy(stored), stored.transformed(torch.clone), loaded):
        assert other.attend_again is other.append_again is other.layout is None and other.sinks[0] is None
        assert torch.equal(other.data, stored.data)


def test_latents_do_not_refer_to_themselves():
    latents = random_states(torch.Generator().manual_seed(0), 1, 1, 70, 64, torch.bfloat16)
    query, states = latents[:, :, :1].repeat(1, 4, 1, 1), make_states(latents, KEY_SPECS["int8"])
    twice(query, states, states)
    assert states.stored.attend_again is None
    for _ in range(2):
        ops.quantize_append(latents[:, :, :1], latents[:, :, :1], states, states, no_faults(), start=70)
    assert states.stored.append_again is None


def test_a_status_is_raised(first, monkeypatch):
    monkeypatch.setattr(first[1].stored.attend_again, "_function", lambda *_: 2)
    with pytest.raises(MemoryError, match="out of memory"):
        attend(*first)


def appended(call: dict) -> bool:
    """Whether the append was checked and packed; it writes what an append writes of which nothing is remembered."""
    expected = copy.deepcopy(call)
    assert expected["keys"].stored.append_again is None
    ops.quantize_append(**expected)
    with packed_calls("append") as calls:
        ops.quantize_append(**call)
    for x, y in zip(written(call), written(expected)):
        assert torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
    return bool(calls)


def written(call: dict) -> list[torch.Tensor]:
    """The tensors that an append writes to."""
    keys, values = call["keys"], call["values"]
    tensors = (*keys.stored, *values.stored, keys.sink_positions, keys.device_length, call["faults"], call["appends"])
    return [tensor for tensor in tensors if tensor is not None]


def an_append(k="int4-channel", v="int4-rotated", dtype=torch.bfloat16, n=1) -> dict:
    """The arguments of an append, after it was made."""
    past, key, value = (torch.randn(2, length + 1, 2, 64).to(dtype).transpose(1, 2) for length in (149, n, n))
    key, value = key[:, :, :n], value[:, :, :n]
    options = dict(sink_length=2, recent_length=4, capacity=220, backend="auto")
    keys, values = store(past, past, KEY_SPECS[k], VALUE_SPECS[v], append=reference.quantize_append, **options)
    call = dict(key=key, value=value, keys=keys, values=values, faults=no_faults(), padding=None, start=150,
                appends=None, factors=NO_FACTORS)  # fmt: skip
    for _ in range(2):
        ops.quantize_append(**call)
    return call


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("k", "v"), [("int8-channel", "int8"), ("dense", "fp8"), ("int4-rotated", "int3-channel")])
def test_other_tokens_at_other_columns(k, v, dtype):
    call = an_append(k, v, dtype, n=2)
    pair = {name: call[name] for name in ("key", "value")}
    # 190 to 192 complete a block.
    for start in range(152, 200, 2):
        new = {name: torch.empty_strided(x.shape, x.stride(), dtype=dtype).normal_() for name, x in pair.items()}
        assert not appended(call | new | {"start": start})


def on_device(call, length):
    length = torch.tensor(length)
    return {name: replace(call[name], device_length=length) for name in ("keys", "values")}


@pytest.mark.parametrize(
    "change",
    [
        lambda c: {name: c[name].repeat(1, 1, 2, 1) for name in ("key", "value")},
        lambda c: {"key": c["key"].as_strided((2, 2, 2, 64), c["key"].stride())},
        lambda c: {"key": torch.stack([c["key"], c["key"]], -1)[..., 0]},
        lambda c: {"value": torch.cat([c["value"], c["value"]], 2)[:, :, :1]},
        lambda c: {"values": replaced(c["values"], data=c["values"].data.clone())},
        lambda c: {x: replace(c[x], sink_positions=c["keys"].sink_positions.clone()) for x in ("keys", "values")},
        lambda c: {"faults": no_faults()},
        lambda c: {"padding": left_padding(150, 3, 0)},
        lambda c: {"factors": Factors(torch.eye(64).repeat(2, 1, 1), None)},
        lambda c: on_device(c, 160),
        lambda c: on_device(c, 160) | {"appends": torch.zeros(2, dtype=torch.int64)},
    ],
    ids=["tokens", "keys' tokens", "copied keys", "strides", "values", "sinks", "faults", "padding", "factors",
         "length on device", "appends"],
)  # fmt: skip
def test_another_append_is_checked(change):
    call = an_append()
    assert appended(call | change(call))
    ops.quantize_append(**call)
    assert not appended(call)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: {"start": c["keys"].capacity}, ValueError, "key: shape .* does not fit; storage has room"),
        (lambda c: {"start": -1}, ValueError, "at column -1 does not fit"),
        (lambda c: {"key": c["key"].half()}, ValueError, "keys: dtype torch.bfloat16 does not fit"),
        (lambda c: {"value": c["value"].half()}, ValueError, "value: dtype torch.float16 does not fit"),
        (lambda c: {"value": c["value"][..., :32]}, ValueError, "value: shape .* does not fit"),
        (lambda c: {"key": c["key"].to("meta")}, RuntimeError, "on device meta"),
        (lambda c: {"value": c["value"].to("meta")}, ValueError, "value: device meta does not fit"),
        (lambda c: {"keys": replace(c["keys"], spec=KEY_SPECS["int8"])}, ValueError, "keys: the stored tensors do"),
        (lambda c: {"values": replace(c["values"], spec=KEY_SPECS["int8"])}, ValueError, "values: the stored tens"),
        (lambda c: {"keys": replace(c["keys"], head_dim=32)}, ValueError, "key: shape .* does not fit"),
        (lambda c: {"values": replace(c["values"], head_dim=32)}, ValueError, "value: shape .* does not fit"),
        (lambda c: {"keys": replace(c["keys"], backend="cuda")}, RuntimeError, "backend 'cuda' cannot run"),
    ],
    ids=["room", "column", "dtype", "values' dtype", "values' head_dim", "device", "values' device", "keys' spec",
         "values' spec", "keys' head_dim", "head_dim of values", "backend"],
)  # fmt: skip
def test_an_append_that_does_not_fit_is_refused(change, error, message):
    call = an_append()
    before = copy.deepcopy(call["keys"].stored)
    with pytest.raises(error, match=message):
        ops.quantize_append(**call | change(call))
    assert torch.equal(before.data, call["keys"].data)
    assert not appended(call)


def test_padding_and_faults_are_read_and_written_each_time():
    call = an_append() | {"padding": left_padding(220, 3, 0), "start": 151}
    ops.quantize_append(**call)
    call["padding"][1] = True
    call["key"][0, 0, 0, 5] = torch.nan
    # The last token completes a block, whose scales padding does not influence.
    for start in range(152, 193):
        assert not appended(call | {"start": start})
    assert call["faults"][0] == 41


def test_appends_by_a_length_on_the_device():
    call = an_append()
    # The length replaces the column.
    call |= on_device(call, 160) | {"appends": torch.zeros(2, dtype=torch.int64), "start": 10**6}
    for i in range(3):
        assert appended(call) == (i == 0)
        assert call["keys"].device_length == 161 + i
        assert call["appends"][1] == 1 + i
    other = call | {"appends": torch.zeros(2, dtype=torch.int64)}
    assert appended(other) and not appended(other)
    call |= other
    call["keys"].device_length.fill_(-1)
    with pytest.raises(ValueError, match="length: -1 is not allowed; expected 0 or more"):
        ops.quantize_append(**call)
    # Without room for the token.
    call["keys"].device_length.fill_(call["keys"].capacity)
    assert not appended(call)
    assert call["faults"].tolist() == [0, 1]


def test_storage_that_moves_is_found_by_appends():
    call = an_append() | {"padding": left_padding(220, 3, 0), "factors": Factors(torch.eye(64).repeat(2, 1, 1), None)}
    ops.quantize_append(**call)
    moved = [*call["keys"].stored, *call["values"].stored, call["keys"].sink_positions, call["faults"],
             call["padding"], call["factors"].keys]  # fmt: skip
    moved = [tensor for tensor in moved if tensor is not None]
    assert len(moved) == 13
    for tensor in moved:
        tensor.share_memory_()
        assert appended(call)
        assert not appended(call)


@pytest.mark.parametrize("name", ["key", "value", "padding"])
def test_appends_of_copies_are_not_repeated(name):
    call = an_append() | {"padding": left_padding(220, 3, 0)}
    call[name] = torch.stack([call[name], call[name]], -1)[..., 0]
    for _ in range(3):
        assert appended(call)


def test_a_first_call_is_not_remembered():
    """Compiled steps make the storage anew for each call."""
    call = an_append()
    keys, values = (replace(call[name], stored=call[name].stored._replace()) for name in ("keys", "values"))
    ops.quantize_append(**call | {"keys": keys, "values": values})
    assert keys.stored.append_again is None
    query, keys, values = problem()
    attend(query, keys, values)
    assert keys.stored.attend_again is None


def test_a_call_with_an_instruction_set_is_not_remembered():
    call = an_append()
    call |= {name: replace(call[name], stored=call[name].stored._replace()) for name in ("keys", "values")}
    query, keys, values = problem()
    for _ in range(2):
        cpu.quantize_append(**call, isa=cpu.isa())
        cpu.decode_attention(query, keys, values, scaling=0.1, isa=cpu.isa())
    assert call["keys"].stored.append_again is keys.stored.attend_again is None


def test_blocks_without_exact_copies_begin_at_their_start():
    call = an_append()
    keys, values = (replaced(call[name], recent=None) for name in ("keys", "values"))
    call |= {"keys": keys, "values": values, "start": 192}
    for _ in range(3):
        assert appended(call)
    with pytest.raises(ValueError, match="recent: None is not allowed when a block is continued at column 193"):
        ops.quantize_append(**call | {"start": 193})


def test_other_threads_append():
    call, threads = an_append(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert appended(call)
    finally:
        torch.set_num_threads(threads)


def test_whoever_watches_operators_sees_appends():
    call = an_append()
    with Watch() as watch:
        ops.quantize_append(**call)
    assert watch.seen == ["kvquant::quantize_append"]


def test_a_status_of_an_append_is_raised(monkeypatch):
    call = an_append()
    monkeypatch.setattr(call["keys"].stored.append_again, "_function", lambda *_: 2)
    with pytest.raises(MemoryError, match="out of memory"):
        ops.quantize_append(**call)
