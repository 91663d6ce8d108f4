"""A table of arguments outside of the contract. Each is refused with one error that names the argument, its value and
what is expected, before anything has changed.

Fields of configs one by one are in test_config.py, files of saved caches in test_saving.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import families
import pytest
import torch

import hf_kvquant
from hf_kvquant import KVQuantConfig, LayerOverride, QuantizedCache, QuantSpec, ops, quantize
from hf_kvquant.host import CACHE
from hf_kvquant.route import learn_route
from hf_kvquant.states import Stored

INT8 = QuantSpec("int8")
CONFIG = families.config("llama")


@functools.lru_cache(maxsize=None)
def model():
    return families.build("llama")


def states(batch: int = 2, heads: int = 2, n: int = 5, head_dim: int = 64, dtype: torch.dtype = torch.float32):
    return torch.ones(batch, heads, n, head_dim, dtype=dtype)


def new(kv_config="int8", **kwargs) -> QuantizedCache:
    return QuantizedCache(CONFIG, kv_config, **kwargs)


def filled(kv_config="int8", n: int = 5, batch: int = 2) -> QuantizedCache:
    cache = new(kv_config)
    for layer_idx in (0, 1):
        learn_route(*cache.update(states(batch, n=n), states(batch, n=n), layer_idx))
    return cache


def first(key: torch.Tensor, value: torch.Tensor | None = None, **kwargs) -> Callable:
    return lambda: new(**kwargs).update(key, key if value is None else value, 0)


def later(key: torch.Tensor, value: torch.Tensor | None = None) -> Callable:
    return lambda: filled().update(key, key if value is None else value, 0)


def attend(query: torch.Tensor | None = None, mask: torch.Tensor | None = None, change=None, s_aux=None) -> Callable:
    def call():
        keys, values = filled().update(states(n=2), states(n=2), 0)
        query_ = torch.ones(2, 4, 2, 64) if query is None else query
        keys, values = (keys, values) if change is None else change(keys, values)
        return ops.decode_attention(query_, keys, values, mask, s_aux, scaling=0.1)

    return call


def generate(**kwargs) -> Callable:
    return lambda: model().generate(families.prompt(1, 9), max_new_tokens=2, do_sample=False, **kwargs)


def from_yaml(text: str) -> Callable:
    def call(folder):
        (folder / "mine.yaml").write_text(text)
        return KVQuantConfig.from_yaml(folder / "mine.yaml")

    return call


def other_heads(keys, values):
    return keys, hf_kvquant.QuantizedStates(
        INT8.resolve(64), Stored(values.data[:, :1], values.scale[:, :1]), None, 7, 0, 64, torch.float32
    )


TABLE = {
    # --- configs
    "preset": (lambda: new("int5"), r"kv_config: 'int5' is neither a preset nor a file; the presets are"),
    "kv_config type": (lambda: new(8), r"kv_config: 8 is not allowed; expected a KVQuantConfig, a preset's name"),
    "kv_config None": (lambda: new(None), r"kv_config: None is not allowed"),
    "format": (lambda: QuantSpec("int5"), r"format: 'int5' is not allowed; expected one of"),
    "group_size": (lambda: QuantSpec("int8", group_size=20), r"group_size: 20 is not allowed; expected"),
    "sink_length": (lambda: KVQuantConfig(INT8, INT8, sink_length=-1), r"sink_length: -1 is not allowed; expected"),
    "backend": (lambda: KVQuantConfig(INT8, INT8, backend="tpu"), r"backend: 'tpu' is not allowed; expected one of"),
    "a layer that is not there": (
        lambda: new(KVQuantConfig(INT8, INT8, layers={7: LayerOverride(INT8)})),
        r"layers\.7: the model has no such full-attention layer; expected one of \[0, 1\]",
    ),
    "YAML with a key twice": (
        from_yaml("keys: {format: int8}\nvalues: {format: int8}\nkeys: {format: int4}\n"),
        r"mine\.yaml: is not valid YAML \('keys' is given twice; expected each key once",
    ),
    "YAML with a nested key twice": (
        from_yaml("keys: {format: int8, format: int4}\nvalues: {format: int8}\n"),
        r"'format' is given twice",
    ),
    "YAML with a layer twice": (
        from_yaml("keys: {format: int8}\nvalues: {format: int8}\nlayers: {1: {keys: {format: int4}}, 1: {}}\n"),
        r"'1' is given twice; expected each key once",
    ),
    "YAML with a list as key": (
        from_yaml("keys: {format: int8}\nvalues: {format: int8}\n? [a, b]\n: 1\n"),
        r"(?s)is not valid YAML .*unhashable key",
    ),
    "quantize to dense": (
        lambda: quantize(states(), QuantSpec("dense")),
        r"format: 'dense' is not a quantized format",
    ),
    "a format as spec": (lambda: quantize(states(), "int8"), r"spec: 'int8' is not allowed; expected a QuantSpec"),
    # --- making a cache
    "a model as config": (
        lambda: QuantizedCache(model(), "int8"),
        r"config: a LlamaForCausalLM is not allowed; expected",
    ),
    "a dict as config": (
        lambda: QuantizedCache({}, "int8"),
        r"config: a dict is not allowed; expected a model's config",
    ),
    "max_length below 0": (lambda: new(max_length=-1), r"max_length: -1 is not allowed; expected a number of tokens"),
    "max_length float": (
        lambda: new(max_length=1e3),
        r"max_length: 1000\.0 is not allowed; expected a number of tokens",
    ),
    "max_length of reserve": (
        lambda: filled().reserve(-1),
        r"max_length: -1 is not allowed; expected a number of tokens",
    ),
    "max_length of load": (
        lambda: QuantizedCache.load("any", CONFIG, max_length="9"),
        r"max_length: '9' is not allowed; expected a number of tokens",
    ),
    "no layer to quantize": (
        lambda: QuantizedCache(families.config("mistral", sliding_window=8), "int8"),
        r"mistral: none of the 2 layers",
    ),
    # --- states
    "states of 3 dimensions": (
        first(states()[0]),
        r"key_states: shape \(2, 5, 64\) is not allowed; expected \[batch, num_kv_heads, n, head_dim\]",
    ),
    "integer states": (
        first(states(dtype=torch.int32)),
        r"key_states: torch\.int32 cannot be cached; expected one of",
    ),
    "complex states": (first(states(dtype=torch.complex64)), r"key_states: torch\.complex64 cannot be cached"),
    "states without elements": (
        first(states().to("meta")),
        r"key_states: device meta has no elements to quantize; expected another device",
    ),
    "values of another dtype": (
        first(states(), states().half()),
        r"value_states: .* of torch\.float16 does not fit layer 0; expected .*float32",
    ),
    "values of another batch": (
        first(states(), states(batch=3)),
        r"value_states: batch and num_kv_heads \(3, 2\) do not fit .* expected \(2, 2\)",
    ),
    "values of other heads": (
        first(states(), states(heads=1)),
        r"value_states: batch and num_kv_heads \(2, 1\) do not fit",
    ),
    "values of another length": (
        first(states(), states(n=4)),
        r"value_states: 4 tokens do not fit the keys; expected 5",
    ),
    "head_dim not a multiple of 8": (first(states(head_dim=44)), r"layer 0: keys\.head_dim: 44 .* multiple of 8"),
    "head_dim beyond the kernels": (
        first(states(head_dim=528)),
        r"head_dim: 528 is not allowed; expected .* up to 512",
    ),
    "head_dim and group_size": (
        first(states(head_dim=48), kv_config=KVQuantConfig(INT8, QuantSpec("int4", group_size=32))),
        r"layer 0: values\.group_size: 32 does not divide head_dim 48; expected a divisor",
    ),
    "later states of another batch": (
        later(states(batch=1)),
        r"key_states: \(1, 2, 5, 64\) .* does not fit layer 0; expected",
    ),
    "later states of other heads": (later(states(heads=4)), r"key_states: \(2, 4, 5, 64\) .* does not fit layer 0"),
    "later states of another head_dim": (
        later(states(head_dim=32)),
        r"key_states: \(2, 2, 5, 32\) .* does not fit layer 0",
    ),
    "later states of another dtype": (
        later(states().double()),
        r"key_states: .*float64 does not fit layer 0; expected .*32",
    ),
    "later states on another device": (
        later(states().to("meta")),
        r"key_states: device meta does not fit layer 0; expected cpu",
    ),
    "later values of another length": (
        later(states(), states(n=6)),
        r"value_states: 6 tokens do not fit the keys; expected 5",
    ),
    # --- masks
    "padding of 4 dimensions": (
        lambda: new(attention_mask=torch.ones(2, 1, 5, 5)),
        r"attention_mask: shape \(2, 1, 5, 5\) is not allowed; expected",
    ),
    "additive padding": (
        lambda: new(attention_mask=torch.tensor([[0.0, -1e9]])),
        r"attention_mask: negative numbers are not allowed; expected 0",
    ),
    "padding that is no tensor": (
        lambda: new(attention_mask=[[0, 1]]),
        r"attention_mask: a list is not allowed; expected a tensor",
    ),
    "padding of another batch": (
        lambda: filled().set_padding(torch.ones(3, 9)),
        r"attention_mask: batch 3 does not fit the cache's 2",
    ),
    "mask of 3 dimensions": (
        attend(mask=torch.ones(2, 2, 7).bool()),
        r"mask: shape \(2, 2, 7\) does not fit; expected",
    ),
    "mask of another length": (attend(mask=torch.ones(2, 1, 2, 8).bool()), r"mask: shape \(2, 1, 2, 8\) does not fit"),
    "complete mask of integers": (
        attend(mask=torch.ones(2, 1, 2, 7, dtype=torch.long)),
        r"mask: dtype torch\.int64 is not allowed in a 4-D mask; expected",
    ),
    # --- attention
    "query of another dtype": (
        attend(torch.ones(2, 4, 2, 64).half()),
        r"query dtype: torch\.float16 .* expected torch\.float32",
    ),
    "query of another head_dim": (attend(torch.ones(2, 4, 2, 32)), r"query head_dim: 32 does not fit .* expected 64"),
    "query of another batch": (
        attend(torch.ones(1, 4, 2, 64)),
        r"query batch: 1 does not fit the cached keys; expected 2",
    ),
    "query heads": (attend(torch.ones(2, 3, 2, 64)), r"num_heads: 3 .* expected a multiple of num_kv_heads 2"),
    "more queries than columns": (attend(torch.ones(2, 4, 8, 64)), r"q_len: 8 .* expected 1 to 7"),
    "values of other heads in attention": (
        attend(change=other_heads),
        r"values batch, heads: \[2, 1\] .* expected \[2, 2\]",
    ),
    "s_aux": (attend(s_aux=torch.ones(3)), r"s_aux: shape \(3,\) is not allowed; expected \(4,\)"),
    # --- operations
    "crop by a float": (lambda: filled().crop(-1.5), r"tokens_to_remove: -1\.5 is not allowed; expected an integer"),
    "crop by a text": (lambda: filled().crop("3"), r"tokens_to_remove: '3' is not allowed; expected an integer"),
    "beam out of range": (
        lambda: filled().reorder_cache(torch.tensor([0, 2])),
        r"beam_idx: does not fit the cache's batch 2",
    ),
    "beam of floats": (
        lambda: filled().reorder_cache(torch.tensor([0.0])),
        r"beam_idx: does not fit the cache's batch 2",
    ),
    "no repeats": (lambda: filled().batch_repeat_interleave(0), r"repeats: selects rows of shape \(0,\); expected"),
    "repeats below 0": (lambda: filled().batch_repeat_interleave(-1), r"repeats: does not fit the cache's batch 2"),
    "row out of range": (
        lambda: filled().batch_select_indices(torch.tensor([5])),
        r"indices: does not fit the cache's batch 2",
    ),
    "rows of two dimensions": (
        lambda: filled().batch_select_indices(torch.tensor([[0], [1]])),
        r"indices: selects rows of shape \(2, 1\); expected",
    ),
    # --- files
    "save to a model": (lambda: filled().save(model()), r"path: a LlamaForCausalLM is not allowed; expected a file's"),
    "load from a model": (lambda: QuantizedCache.load(model(), "a"), r"path: a LlamaForCausalLM is not allowed"),
    # --- generate
    "generate without cache": (
        generate(cache_implementation="kvquant-int8", use_cache=False),
        r"cache_implementation: 'kvquant-int8' needs use_cache",
    ),
    "generate without config": (
        generate(cache_implementation="kvquant"),
        r"cache_config: missing; cache_implementation='kvquant'",
    ),
    "generate with a preset and a config": (
        generate(cache_implementation="kvquant-int8", cache_config={"keys": {}}),
        r"cache_config: {'keys': {}} is not allowed with the preset 'kvquant-int8'; expected cache_implementation='kv",
    ),
    "generate with a config and no name": (
        generate(cache_config={"keys": {"format": "int8"}, "values": {"format": "int8"}}),
        r"cache_implementation: None does not read cache_config={'keys': .*; expected 'kvquant'",
    ),
    "generate with a config and another's name": (
        generate(cache_implementation="dynamic", cache_config=KVQuantConfig(INT8, INT8)),
        r"cache_implementation: 'dynamic' does not read cache_config=KVQuantConfig.*; expected 'kvquant'",
    ),
    "generate with a file that is not there": (
        generate(cache_implementation="kvquant", cache_config="no.yaml"),
        r"cache_config: 'no\.yaml' is neither a preset nor a file",
    ),
    "generate with nothing but dense layers": (
        generate(
            cache_implementation="kvquant", cache_config={"keys": {"format": "dense"}, "values": {"format": "dense"}}
        ),
        r"format: 'dense' is not allowed for keys and values of all 2 layers; expected a quantized format",
    ),
    "generate with a dense cache of ours": (
        lambda: generate(**{CACHE: new({"keys": {"format": "dense"}, "values": {"format": "dense"}})})(),
        r"format: 'dense' is not allowed for keys and values of all 2 layers",
    ),
    "generate without new tokens": (
        lambda: generate(**{CACHE: filled(n=9, batch=1)})(),
        r"input_ids: 9 tokens are not allowed with a cache of 9; expected the cached tokens and new ones",
    ),
    "generate with a shorter text": (
        lambda: generate(**{CACHE: filled(n=11, batch=1)})(),
        r"input_ids: 9 tokens are not allowed with a cache of 11; expected",
    ),
    "generate with a name as cache": (
        generate(**{CACHE: "kvquant-int8"}),
        rf"{CACHE}: 'kvquant-int8' is not allowed; expected a QuantizedCache, or the name as cache_implementation",
    ),
    "generate with a class as cache": (generate(**{CACHE: QuantizedCache}), rf"{CACHE}: <class .* is not allowed"),
    "generate with a config as cache": (
        generate(past_key_values=KVQuantConfig(INT8, INT8)),
        r"past_key_values: KVQuantConfig\(.* is not allowed; expected a QuantizedCache",
    ),
    "generate with fewer cached layers": (
        lambda: generate(**{CACHE: QuantizedCache(families.config("llama", num_hidden_layers=1), "int8")})(),
        r"layer_idx: 1 is not in this cache of 1 layers; expected the model whose config",
    ),
    "generate with an unknown field": (
        generate(cache_implementation="kvquant", cache_config={"keys": {"format": "int8"}, "bits": 4}),
        r"bits: unknown field; expected one of",
    ),
    "generate with a cache of another batch": (
        lambda: generate(past_key_values=filled())(),
        # The error depends on the version, because some versions make a mask first.
        r"attention_mask: batch 1 does not fit the cache's 2|key_states: \(1, 2, 4, 64\) .* does not fit layer 0",
    ),
    # --- scoring
    "context_lengths": (
        lambda: hf_kvquant.score(model(), families.prompt(1, 9), 10, "int8"),
        r"context_lengths: 10 is not allowed; expected 1 to 9",
    ),
    "context_lengths of other rows": (
        lambda: hf_kvquant.score(model(), families.prompt(1, 9), [3, 4], "int8"),
        r"context_lengths: \[3, 4\] is not allowed; expected an integer, or one for each of 1 rows",
    ),
    "context_lengths as text": (
        lambda: hf_kvquant.score(model(), families.prompt(1, 9), "4", "int8"),
        r"context_lengths: '4' is not allowed; expected an integer",
    ),
    "scoring one row": (
        lambda: hf_kvquant.score(model(), families.prompt(1, 9)[0], 4, "int8"),
        r"input_ids: \(9,\) is not allowed; expected a tensor \[batch, length\]",
    ),
    "scoring a list": (
        lambda: hf_kvquant.score_tokens(model(), [[3, 4]], 1, "int8"),
        r"input_ids: \[\[3, 4\]\] is not allowed; expected a tensor",
    ),
    "scoring nothing": (
        lambda: hf_kvquant.score(model(), families.prompt(1, 9)[:, :0], 1, "int8"),
        r"input_ids: \(1, 0\) is not allowed; expected .* with a token at least",
    ),
    "scoring with a config": (
        lambda: hf_kvquant.score(CONFIG, families.prompt(1, 9), 4, "int8"),
        r"model: a LlamaConfig is not allowed; expected a model",
    ),
    "scoring with a shorter mask": (
        lambda: hf_kvquant.score(model(), families.prompt(1, 9), 4, "int8", torch.ones(1, 8)),
        r"attention_mask: shape \(1, 8\) is not allowed; expected \(1, 9\), as input_ids",
    ),
    # --- attention and calibration
    "attention of a config": (
        lambda: hf_kvquant.attention(CONFIG).__enter__(),
        r"model: a LlamaConfig is not allowed; expected a model",
    ),
    "calibration on a text": (
        lambda: hf_kvquant.calibrate(model(), "text"),
        r"token_ids: a piece that is 't' is not allowed; expected tokens \[length\]",
    ),
    "calibration on one row": (
        lambda: hf_kvquant.calibrate(model(), families.prompt(1, 9)[0]),
        r"token_ids: a piece that is \(\) of torch\.int64 is not allowed; expected tokens",
    ),
    "calibration on nothing": (
        lambda: hf_kvquant.calibrate(model(), families.prompt(1, 9)[:, :0]),
        r"token_ids: a piece that is \(0,\) of torch\.int64 is not allowed; expected tokens",
    ),
}


@dataclass(frozen=True)
class Row:
    call: Callable
    message: str


@pytest.mark.parametrize("row", [Row(*row) for row in TABLE.values()], ids=TABLE.keys())
def test_refused_with_one_clear_error(row, tmp_path):
    takes_folder = row.call.__code__.co_argcount == 1
    with torch.no_grad(), pytest.raises(ValueError, match=row.message) as raised:
        row.call(tmp_path) if takes_folder else row.call()
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    "name",
    [name for name in TABLE if name.startswith(("later", "crop", "beam", "repeats", "row", "generate with a cache"))],
)
def test_a_refused_operation_changes_nothing(name, monkeypatch):
    """The cache can be used after it refused."""
    caches, make = [], filled

    def remembered():
        caches.append(make())
        return caches[-1]

    call = TABLE[name][0]
    monkeypatch.setitem(globals(), "filled", remembered)
    with pytest.raises(ValueError):
        call()
    monkeypatch.undo()
    fresh = filled()
    for cache in (caches[0], fresh):
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.update(states(n=3), states(n=3), 0)
    for a, b in zip(caches[0].layers, fresh.layers):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
