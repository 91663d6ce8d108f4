"""After an error in the middle of a change, a cache is either whole or says that it is not.

The same holds for several models, caches, threads and processes at once: none can spoil what another one uses.
"""

from __future__ import annotations

import copy
import functools
import multiprocessing
import subprocess
import sys
import threading
from pathlib import Path

import families
import processes
import pytest
import torch
from transformers import LogitsProcessor

import hf_kvquant
from hf_kvquant import KVQuantConfig, QuantizedCache, layers, ops, storage
from hf_kvquant.changes import FORWARD

LAYERS = 6
PRESETS = ("int8", "int8-plain", "int4")
ERRORS = [MemoryError("no memory"), KeyboardInterrupt(), RuntimeError("something")]
every_preset = pytest.mark.parametrize("preset", PRESETS)
every_error = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)


@functools.lru_cache(maxsize=None)
def build(name: str = "llama", seed: int = 0):
    return families.build(name, attn="eager" if name == "gemma2" else "sdpa", seed=seed, num_hidden_layers=LAYERS)


def generate(model, ids: torch.Tensor, n: int = 10, **kwargs):
    with torch.no_grad():
        return model.generate(
            ids, **{"do_sample": False, "max_new_tokens": n, "return_dict_in_generate": True, **kwargs}
        )


def first_turn(model, preset: str = "int4", length: int = 70, batch: int = 1):
    """A cache and all tokens so far (one more than the cache holds)."""
    out = generate(model, families.prompt(batch, length), cache_implementation=f"kvquant-{preset}")
    return out.past_key_values, out.sequences


def second_turn(model, cache, ids: torch.Tensor) -> torch.Tensor:
    return generate(model, ids, past_key_values=cache).sequences


def is_restored(model) -> bool:
    hooks = len(model._forward_hooks) + len(model._forward_pre_hooks)
    return model.config._attn_implementation == "sdpa" and hooks == 0


class raising:
    """Within this context the forward of a submodule raises at its `at`-th call."""

    def __init__(self, part: torch.nn.Module, error: BaseException, at: int = 1):
        self.part, self.error, self.left = part, error, at

    def __enter__(self):
        self.hook = self.part.register_forward_hook(self.raise_it)

    def raise_it(self, *args):
        self.left -= 1
        if self.left == 0:
            raise self.error

    def __exit__(self, *args):
        self.hook.remove()


# --- out of memory while a cache grows


def contents(cache: QuantizedCache) -> list[torch.Tensor]:
    found = []
    for layer in cache.quantized_layers:
        found += [layer.keys, layer.values, layer.sink_positions]
    return found


def is_same(a: QuantizedCache, b: QuantizedCache) -> bool:
    return a.get_seq_length() == b.get_seq_length() and all(map(torch.equal, contents(a), contents(b)))


@pytest.mark.parametrize("preset", [*PRESETS, "windows"])
def test_every_allocation_of_growth_may_fail(preset, monkeypatch):
    """Whichever allocation fails, nothing changes, and the same append succeeds once there is memory again."""
    windows = {
        "keys": {"format": "int4", "grid": "channel"},
        "values": {"format": "int8"},
        "sink_length": 3,
        "recent_length": 9,
    }
    kv_config = windows if preset == "windows" else preset
    tokens = torch.randn(2, 2, 2, 257, 64)
    cache = QuantizedCache(families.config("llama", num_hidden_layers=1), kv_config)
    cache.update(*tokens[:, :, :, :256], 0)
    expected = copy.deepcopy(cache)
    expected.update(*tokens[:, :, :, 256:], 0)
    real, before = storage.Side._empty, copy.deepcopy(cache)
    for allowed in range(20):
        left = [allowed]

        def limited(*args, _left=left, **kwargs):
            if _left[0] == 0:
                raise torch.OutOfMemoryError("no memory")
            _left[0] -= 1
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(storage.Side, "_empty", limited)
            try:
                cache.update(*tokens[:, :, :, 256:], 0)
                break
            except torch.OutOfMemoryError:
                assert is_same(cache, before)
    assert allowed >= 3
    assert is_same(cache, expected)


@pytest.mark.parametrize("operation", ["reorder_cache", "batch_repeat_interleave", "batch_select_indices"])
def test_out_of_memory_in_a_layer_of_a_batch_operation(operation, monkeypatch):
    """Some layers then have other rows than the rest, so only `reset` helps."""
    cache, ids = first_turn(build(), batch=2)
    real, calls = layers.QuantizedLayer._transform, []

    def third_fails(layer, function):
        calls.append(layer)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        real(layer, function)

    with monkeypatch.context() as patch:
        patch.setattr(layers.QuantizedLayer, "_transform", third_fails)
        with pytest.raises(torch.OutOfMemoryError):
            getattr(cache, operation)(2 if "repeat" in operation else torch.tensor([1, 0]))
    for use in (
        lambda: build()(ids[:, -1:], past_key_values=cache),
        lambda: cache.reorder_cache(torch.tensor([0, 1])),
    ):
        with (
            hf_kvquant.attention(build()),
            torch.no_grad(),
            pytest.raises(ValueError, match=rf"in the middle of a {operation}; cache\.reset\(\) empties it"),
        ):
            use()
    with pytest.raises(ValueError, match=r"cannot go back .*cache\.reset"):
        cache.crop(0)
    cache.reset()
    assert torch.equal(
        second_turn(build(), cache, ids), generate(build(), ids, cache_implementation="kvquant-int4").sequences
    )


# --- an exception in the middle of a forward call


@every_preset
@every_error
@pytest.mark.parametrize("layer_idx", [0, 2, LAYERS - 1])
def test_an_interrupted_call_is_refused_and_taken_back(preset, error, layer_idx):
    """An interrupted `generate` with a user's cache restores the model, and `crop(0)` restores the cache."""
    model = build()
    cache, ids = first_turn(model, preset)
    untouched, length = copy.deepcopy(cache), cache.get_seq_length()
    expected = second_turn(model, copy.deepcopy(cache), ids)
    with raising(model.model.layers[layer_idx], error, at=4), pytest.raises(type(error)):
        second_turn(model, cache, ids)
    assert is_restored(model)
    for use in (
        lambda: second_turn(model, cache, ids), lambda: cache.reorder_cache(torch.tensor([0])),
        lambda: second_turn(model, copy.deepcopy(cache), ids),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"middle of a forward call; cache\.crop\(0\) forgets the tokens of that"):
            use()
        assert is_restored(model)
    cache.crop(0)
    assert cache.get_seq_length() == length + 3
    cache.crop(-3)
    assert is_same(cache, untouched)
    assert torch.equal(second_turn(model, cache, ids), expected)


def test_an_interrupted_call_may_be_reset():
    model = build()
    cache, ids = first_turn(model)
    with raising(model.model.layers[3], RuntimeError()), pytest.raises(RuntimeError):
        second_turn(model, cache, ids)
    cache.reset()
    expected = generate(model, ids, cache_implementation="kvquant-int4").sequences
    assert torch.equal(second_turn(model, cache, ids), expected)


def test_an_interrupted_first_call():
    """Later layers are still empty: without a mark they would take a later token for the first one of a prompt."""
    model, ids = build(), families.prompt(1, 40)
    cache = QuantizedCache(model.config, "int4")
    with raising(model.model.layers[3], RuntimeError()), pytest.raises(RuntimeError):
        generate(model, ids, past_key_values=cache)
    with pytest.raises(ValueError, match="middle of a forward call"):
        generate(model, ids, past_key_values=cache)
    cache.crop(0)
    assert cache.get_seq_length() == 0
    expected = generate(model, ids, cache_implementation="kvquant-int4").sequences
    assert torch.equal(generate(model, ids, past_key_values=cache).sequences, expected)


@torch.no_grad()
def test_an_interrupted_plain_call():
    model, ids = build(), families.prompt(1, 60)
    cache = QuantizedCache(model.config, "int4")
    with hf_kvquant.attention(model):
        model(ids[:, :50], past_key_values=cache)
        with raising(model.model.layers[2], KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            model(ids[:, 50:51], past_key_values=cache)
        with pytest.raises(ValueError, match="middle of a forward call"):
            model(ids[:, 50:51], past_key_values=cache)
        cache.crop(0)
        fresh = QuantizedCache(model.config, "int4")
        model(ids[:, :50], past_key_values=fresh)
        got, expected = (model(ids[:, 50:51], past_key_values=c).logits for c in (cache, fresh))
    assert torch.equal(got, expected)
    assert is_restored(model)


@torch.no_grad()
def test_a_call_outside_of_the_context():
    """Attention cannot read the states, but the first layer has stored the token: the lengths differ."""
    model, ids = build(), families.prompt(1, 60)
    cache = QuantizedCache(model.config, "int4")
    with hf_kvquant.attention(model):
        model(ids[:, :50], past_key_values=cache)
    with pytest.raises((TypeError, AttributeError), match="hf_kvquant.attention"):
        model(ids[:, 50:51], past_key_values=cache)
    with hf_kvquant.attention(model):
        with pytest.raises(
            ValueError, match=r"layers of the quantized cache disagree: .*\{0: 1, 1: 0, .* cache\.crop\(0\)"
        ):
            model(ids[:, 50:51], past_key_values=cache)
        cache.crop(0)
        assert cache.get_seq_length() == 50
        model(ids[:, 50:51], past_key_values=cache)
    assert [layer.length for layer in cache.layers] == [51] * LAYERS


@pytest.mark.parametrize(("length", "can_go_back"), [(10, True), (70, False)], ids=["below", "beyond"])
def test_sliding_layers_go_back_below_their_window(length, can_go_back):
    """Beyond the window the layers have lost the states that they would need."""
    model, ids = build("gemma2"), families.prompt(1, length)
    cache = generate(model, ids, 3, cache_implementation="kvquant-int4").past_key_values
    more = families.prompt(1, length + 3)
    with raising(model.model.layers[3], RuntimeError()), pytest.raises(RuntimeError):
        generate(model, more, past_key_values=cache)
    with pytest.raises(ValueError, match="middle of a forward call"):
        generate(model, more, past_key_values=cache)
    if can_go_back:
        cache.crop(0)
        assert cache._lengths() == [length + 2] * LAYERS
        return
    with pytest.raises(ValueError, match=r"cannot go back .*cache\.reset\(\)"):
        cache.crop(0)
    cache.reset()
    expected = generate(model, more, cache_implementation="kvquant-int4").sequences
    assert torch.equal(generate(model, more, past_key_values=cache).sequences, expected)


def test_a_crop_that_a_layer_refuses_changes_nothing():
    """transformers' sliding layers refuse to go back; the quantized layers must not go back without them."""
    model = build("gemma2")
    out = generate(model, families.prompt(1, 70), cache_implementation="kvquant-int4")
    cache = out.past_key_values
    untouched = copy.deepcopy(cache)
    with pytest.raises(RuntimeError, match="does not track past"):
        cache.crop(-3)
    assert cache._lengths() == untouched._lengths()
    assert torch.equal(*(second_turn(model, c, out.sequences) for c in (cache, untouched)))


@every_preset
@pytest.mark.parametrize("n", [1, 64, 120])
@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
def test_an_interruption_while_a_layer_stores(preset, n, written, monkeypatch):
    """Up to 64 tokens can be taken back; with more, exact copies may be lost, and a warning says so."""
    tokens = torch.randn(2, 1, 2, 100 + n, 64)
    cache = QuantizedCache(families.config("llama", num_hidden_layers=1), preset)
    cache.update(*tokens[:, :, :, :100], 0)
    untouched, real = copy.deepcopy(cache), ops.quantize_append

    def interrupted(*args, **kwargs):
        if written:
            real(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ops, "quantize_append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.update(*tokens[:, :, :, 100:], 0)
    with pytest.raises(
        ValueError, match=r"layer 0 was interrupted while it stored tokens; cache\.crop\(0\) goes back"
    ):
        cache.update(*tokens[:, :, :, 100:], 0)
    if n > 64 and preset != "int8-plain":
        with pytest.raises(ValueError, match=r"layer 0 .* may have lost exact copies; cache\.reset\(\)"):
            cache.crop(0)
        cache.reset()
        cache.update(*tokens[:, :, :, :100], 0)
    else:
        cache.crop(0)
    assert is_same(cache, untouched)
    for each in (cache, untouched):
        each.update(*tokens[:, :, :, 100:], 0)
    assert is_same(cache, untouched)


def test_an_interrupted_first_append(monkeypatch):
    cache = QuantizedCache(families.config("llama", num_hidden_layers=1), "int4")
    tokens = torch.randn(2, 1, 2, 300, 64)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "quantize_append", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache.update(*tokens, 0)
    cache.crop(0)
    fresh = QuantizedCache(families.config("llama", num_hidden_layers=1), "int4")
    for each in (cache, fresh):
        each.update(*tokens, 0)
    assert is_same(cache, fresh)


# --- an exception between forward calls


class Failing(LogitsProcessor):
    """Raises at its `at`-th call, and does nothing before."""

    def __init__(self, error: BaseException, at: int):
        self.error, self.left = error, at

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return scores


@every_preset
@every_error
def test_an_exception_in_a_logits_processor(preset, error):
    """No layer is ahead of another, so the cache goes on with the tokens that it holds."""
    model = build()
    cache, ids = first_turn(model, preset)
    expected = second_turn(model, copy.deepcopy(cache), ids)
    with pytest.raises(type(error)):
        generate(model, ids, past_key_values=cache, logits_processor=[Failing(error, at=4)])
    assert is_restored(model)
    held = cache.get_seq_length()
    assert held == ids.shape[1] + 3
    got = generate(model, expected[:, : held + 1], expected.shape[1] - held - 1, past_key_values=cache).sequences
    assert torch.equal(got, expected)


# --- several at once


def test_two_models_and_two_caches_interleaved():
    """Alternating steps of two models, both inside their contexts, equal one model after the other."""
    models = [build(seed=0), build(seed=1)]
    ids = [families.prompt(1, 60, seed=3), families.prompt(1, 60, seed=4)]

    def step(i: int, cache: QuantizedCache, at: int) -> torch.Tensor:
        new = ids[i][:, :50] if at == 50 else ids[i][:, at - 1 : at]
        return models[i](new, past_key_values=cache).logits[:, -1]

    with torch.no_grad():
        alone = []
        for i in (0, 1):
            cache = QuantizedCache(models[i].config, PRESETS[i])
            with hf_kvquant.attention(models[i]):
                alone.append([step(i, cache, at) for at in range(50, 60)])
        caches = [QuantizedCache(models[i].config, PRESETS[i]) for i in (0, 1)]
        twin = QuantizedCache(models[0].config, PRESETS[0])
        with hf_kvquant.attention(models[0]), hf_kvquant.attention(models[1]):
            for k, at in enumerate(range(50, 60)):
                for i in (0, 1):
                    assert torch.equal(step(i, caches[i], at), alone[i][k])
                assert torch.equal(step(0, twin, at), alone[0][k])
    assert all(map(is_restored, models))


def test_threads_with_their_own_caches():
    """Two models run in two threads each; one thread fails all the time, which does not affect the others."""
    models = [build(seed=0), build(seed=1)]
    prompts = [families.prompt(1, 50, seed=seed) for seed in range(4)]
    expected = [generate(models[i % 2], prompts[i], cache_implementation="kvquant-int4").sequences for i in range(4)]
    wrong, done = [], []

    def work(i: int) -> None:
        for _ in range(3):
            if i == 3:
                try:
                    failing = [Failing(RuntimeError("mine"), at=3)]
                    generate(models[1], prompts[3], cache_implementation="kvquant-int8", logits_processor=failing)
                except RuntimeError as error:
                    if str(error) != "mine":
                        wrong.append(error)
            got = generate(models[i % 2], prompts[i], cache_implementation="kvquant-int4").sequences
            if not torch.equal(got, expected[i]):
                wrong.append(i)
        done.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2, 3]
    assert wrong == []
    assert all(map(is_restored, models))


_PROCESSES = """
import os, sys
sys.path.insert(0, os.getcwd())
import families, hf_kvquant, torch
from hf_kvquant import QuantizedCache

class Continuations(torch.utils.data.Dataset):
    # A worker loads the prompt's cache and its own model; it shares nothing with the process that started it.
    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 2

    def __getitem__(self, index):
        model = families.build("llama")
        return decode(model, QuantizedCache.load(self.path, model))

def decode(model, cache):
    ids = families.prompt(1, 60)
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=cache)[0]

def main():
    torch.set_num_threads(2)
    model, path = families.build("llama"), sys.argv[1]
    cache = QuantizedCache(model.config, "int4")
    with torch.no_grad(), hf_kvquant.attention(model):
        model(families.prompt(1, 60)[:, :59], past_key_values=cache)
    cache.save(path, model)
    # The library's threads exist before the fork.
    expected = decode(model, QuantizedCache.load(path, model))
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        same = torch.equal(decode(model, cache), expected)
        os._exit(0 if same else 3)
    assert os.waitpid(child, 0)[1] == 0, "the forked child decodes something else"
    assert torch.equal(decode(model, cache), expected)
    loader = torch.utils.data.DataLoader(
        Continuations(path), batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    assert all(torch.equal(tokens, expected) for tokens in loader)

if __name__ == "__main__":
    main()
"""


@pytest.mark.any_host
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_forked_child_and_a_spawned_worker(tmp_path):
    script = tmp_path / "processes.py"
    script.write_text(_PROCESSES)
    # Not in the repository's folder, where Python would import the source instead of the installed package.
    command, folder = [sys.executable, str(script), str(tmp_path / "prompt")], Path(__file__).parent
    done = subprocess.run(
        command, cwd=folder, env=processes.environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_no_two_caches_share_what_changes():
    """No mutable default, counter or storage is shared by caches of one config."""
    kv_config = KVQuantConfig.preset("int4")
    a, b = (QuantizedCache(build().config, kv_config) for _ in range(2))
    for layer_idx in range(LAYERS):
        a.update(*torch.randn(2, 1, 2, 70, 64), layer_idx)
    a.begin(FORWARD)
    assert b.get_seq_length() == 0
    assert not any(b.routes.values())
    b.begin(FORWARD)
    assert b.kv_config is a.kv_config
