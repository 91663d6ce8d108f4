"""Layers in the main memory: the results are those of layers on the device, two layers at most are on it, and nobody
reads a copy before it is there.

Without a GPU `Machine` stands in for one. Its copies are poison until a stream or the CPU has waited for them.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace

import families
import pytest
import torch
from test_cache import CONFIGS, HEAD_DIM, feed, states

import hf_kvquant
from hf_kvquant import KVQuantConfig, LayerOverride, QuantizedCache, QuantSpec, host, layers, offloading, ops
from hf_kvquant.layers import QuantizedLayer

DEVICE = torch.device("cpu")
NO_DEVICE = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Stream:
    """A stream on which copies take until somebody waits."""

    def __init__(self, machine: Machine, name: str):
        self.machine, self.name, self.pending = machine, name, []

    def wait_stream(self, other: Stream) -> None:
        self.machine.events.append(f"{self.name} waits for {other.name}")
        if (self.name, other.name) not in self.machine.deaf:
            other.finish()

    def finish(self) -> None:
        for target, source in self.pending:
            target.copy_(source)
        self.pending.clear()

    def __enter__(self) -> None:
        self.machine.stream = self

    def __exit__(self, *error: object) -> None:
        self.machine.stream = self.machine.compute


class Machine:
    """A device with streams, whose memory is separate from the main memory."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.deaf: set = set()
        self.compute, self.copies = Stream(self, "compute"), Stream(self, "copies")
        self.stream = self.compute
        # Copies in the main memory, and tensors on the device with their layers.
        self.at_home: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
        self.on_device: list[tuple[weakref.ref, int]] = []
        # The layer whose update runs, and the one whose tensors are moved.
        self.working = self.moving = 0

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        self.on_device.append((weakref.ref(tensor), self.moving))
        new = self._copy(tensor)
        self.at_home[id(new)] = new
        return new

    def to_device(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        assert device == DEVICE
        new = self._copy(tensor)
        self.on_device.append((weakref.ref(new), self.moving))
        if self.stream is self.compute:
            self.compute.finish()
        return new

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        new = torch.empty_like(tensor)
        new.view(torch.uint8).fill_(0xFF)
        self.stream.pending.append((new, tensor))
        return new

    def layers_on_device(self) -> set[int]:
        self.on_device = [(ref, layer_idx) for ref, layer_idx in self.on_device if ref() is not None]
        return {layer_idx for _, layer_idx in self.on_device}

    def synchronize(self, device: torch.device) -> None:
        self.events.append("the CPU waits")
        self.compute.finish()
        self.copies.finish()


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(layers, "to_host", machine.to_host)
    monkeypatch.setattr(layers, "to_device", machine.to_device)
    monkeypatch.setattr(offloading, "_copy_stream", lambda device: machine.copies)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: machine.compute)
    monkeypatch.setattr(torch.accelerator, "synchronize", machine.synchronize)
    monkeypatch.setattr(offloading, "check_device", lambda device: None)
    monkeypatch.setattr(hf_kvquant.cache, "check_device", lambda device: None)
    update, transform = QuantizedCache.update, QuantizedLayer._transform

    def noted(self, key_states, value_states, layer_idx, *args, **kwargs):
        machine.working = layer_idx
        machine.events.append(f"layer {layer_idx}")
        return update(self, key_states, value_states, layer_idx, *args, **kwargs)

    def noted_transform(self, *args):
        machine.moving = self.layer_idx
        transform(self, *args)

    monkeypatch.setattr(QuantizedCache, "update", noted)
    monkeypatch.setattr(QuantizedLayer, "_transform", noted_transform)
    return machine


def offloaded(kv_config: KVQuantConfig) -> KVQuantConfig:
    return replace(kv_config, offload=True)


def new_cache(kv_config: KVQuantConfig, num_layers: int = 3, **kwargs) -> QuantizedCache:
    config = families.config("llama", num_hidden_layers=num_layers, head_dim=HEAD_DIM)
    return QuantizedCache(config, kv_config, **kwargs)


def fill(cache: QuantizedCache, start: int, end: int, chunks: list[int]) -> list:
    """Give every layer other tokens `start` to `end`, all layers in turn; returns what the last query would read."""
    tokens = [tuple(x[:, :, start:end] for x in states(end, seed=i)) for i in range(len(cache.layers))]
    at = 0
    for n in chunks:
        read = []
        for i, (key, value) in enumerate(tokens):
            out = feed(cache, key[:, :, at : at + n], value[:, :, at : at + n], layer_idx=i)
            read += [x.read(1) if isinstance(x, hf_kvquant.QuantizedStates) else x for x in out]
        at += n
    assert at == end - start
    return read


def assert_equal(found: list, expected: list) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert torch.equal(one, other)


def pair(kv_config: KVQuantConfig, **kwargs) -> tuple[QuantizedCache, QuantizedCache]:
    """A cache with and one without offloading, with the same 100 tokens."""
    found, expected = new_cache(offloaded(kv_config), **kwargs), new_cache(kv_config, **kwargs)
    assert_equal(fill(found, 0, 100, [90, 1, 9]), fill(expected, 0, 100, [90, 1, 9]))
    return found, expected


def assert_goes_on(found: QuantizedCache, expected: QuantizedCache) -> None:
    """Both caches hold the same tokens, and read the same for more of them."""
    assert found.get_seq_length() == expected.get_seq_length()
    length, chunks = expected.get_seq_length(), [1, 40, 1]
    batch = expected.layers[0].sink_positions.shape[0]
    for n in chunks:
        for i in range(len(expected.layers)):
            key, value = states(length + n, batch=batch, seed=7 + i)
            key, value = key[:, :, length:], value[:, :, length:]
            read = []
            for cache in (found, expected):
                out = feed(cache, key, value, layer_idx=i)
                read.append([x.read(1) if isinstance(x, hf_kvquant.QuantizedStates) else x for x in out])
            assert_equal(*read)
        length += n


every_config = pytest.mark.parametrize("kv_config", CONFIGS.values(), ids=CONFIGS.keys())
MODELS = {
    "llama": {"num_hidden_layers": 4},
    "gemma3_window": {},
    "gpt2": {"n_layer": 3},
    "deepseek_v3": {"num_hidden_layers": 3},
    "falcon_h1": {},
    "jamba": {},
    "bloom": {"n_layer": 4},
}


@pytest.mark.parametrize("preset", ["int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_generation_with_two_layers_on_the_device(machine, monkeypatch, name, preset):
    model = families.build(name, attn="eager" if name == "bloom" else "sdpa", **MODELS[name])
    config = replace(KVQuantConfig.preset(preset), sliding=16)
    arguments = {"max_new_tokens": 70, "return_dict_in_generate": True, "output_logits": True}
    choice = {"cache_implementation": "kvquant", "do_sample": False}
    expected = model.generate(families.prompt(), cache_config=config, **choice, **arguments)

    # Layers of latents have an operator of their own, which takes the rotary query and keys as well.
    operator = "latent_attention" if name == "deepseek_v3" else "decode_attention"
    resident, attend = [], getattr(ops, operator)

    def observed(*args, **kwargs):
        tensors = [x for side in args for x in getattr(side, "stored", [side]) if isinstance(x, torch.Tensor)]
        assert not any(machine.at_home.get(id(x)) is x for x in tensors)
        resident.append((machine.working, machine.layers_on_device()))
        return attend(*args, **kwargs)

    monkeypatch.setattr(ops, operator, observed)
    found = model.generate(families.prompt(), cache_config=offloaded(config), **choice, **arguments)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    cache = host.cache_of(found)
    assert cache.routes == host.cache_of(expected).routes and cache.routes["decode_fused"]
    assert resident
    moved = [i for i, layer in enumerate(cache.layers) if offloading.is_offloaded_kind(layer)]
    for working, on_device in resident:
        following = moved[(moved.index(working) + 1) % len(moved)]
        assert on_device <= {working, following}, (working, on_device)
        assert working in on_device


class TestOrder:
    def test_waits_and_copies(self, machine):
        cache = new_cache(offloaded(CONFIGS["int8"]), num_layers=2)
        fill(cache, 0, 10, [10])
        assert machine.events == [
            # The second layer has nothing that could come.
            "layer 0", "compute waits for copies",
            "layer 1", "compute waits for copies", "copies waits for compute",
        ]  # fmt: skip
        machine.events.clear()
        fill(cache, 10, 11, [1])
        assert machine.events == [
            f"{line}"
            for i in (0, 1)
            for line in (f"layer {i}", "compute waits for copies", "copies waits for compute")
        ]
        assert [layer.is_offloaded for layer in cache.layers] == [False, True]

    @pytest.mark.parametrize("deaf", [("compute", "copies"), ("copies", "compute")])
    def test_without_a_wait_the_stand_in_gives_other_results(self, machine, deaf):
        found, expected = pair(CONFIGS["int8"])
        machine.deaf.add(deaf)
        with pytest.raises(AssertionError):
            assert_equal(fill(found, 100, 103, [1, 1, 1]), fill(expected, 100, 103, [1, 1, 1]))

    def test_layers_in_another_order(self, machine):
        found, expected = pair(CONFIGS["int4"])
        key, value = (x[:, :, 100:] for x in states(101))
        for i in (2, 0, 1):
            read = [[x.read(1) for x in feed(cache, key, value, layer_idx=i)] for cache in (found, expected)]
            assert_equal(*read)


class TestChanges:
    """Whole changes of a cache whose layers are in the main memory."""

    @every_config
    @pytest.mark.parametrize("removed", [1, 20, 80])
    def test_crop(self, machine, kv_config, removed):
        found, expected = pair(kv_config)
        for cache in (found, expected):
            cache.crop(-removed)
        assert found.routes == expected.routes
        assert_goes_on(found, expected)

    @every_config
    def test_rows(self, machine, kv_config):
        found, expected = pair(kv_config)
        for cache in (found, expected):
            cache.reorder_cache(torch.tensor([1, 1]))
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([3, 0, 1]))
        assert found.get_seq_length() == expected.get_seq_length() == 100
        assert_goes_on(found, expected)

    @pytest.mark.parametrize("change", ["reorder", "crop", "reserve", "copy", "save"])
    def test_the_cpu_waits_before_it_reads(self, machine, tmp_path, change):
        cache, _ = pair(CONFIGS["int4"])
        assert machine.compute.pending and machine.copies.pending
        changes = {
            "reorder": lambda: cache.reorder_cache(torch.tensor([1, 0])),
            "crop": lambda: cache.crop(-80),
            "reserve": lambda: cache.reserve(1000),
            "copy": lambda: copy.deepcopy(cache),
            "save": lambda: cache.save(tmp_path / "cache.safetensors"),
        }
        changes[change]()
        assert machine.events[-1] == "the CPU waits"
        assert not machine.compute.pending and not machine.copies.pending

    def test_copies_are_independent(self, machine):
        found, expected = pair(CONFIGS["int4"])
        twin = copy.deepcopy(found)
        assert [layer.is_offloaded for layer in twin.layers] == [False, True, True]
        other = copy.deepcopy(expected)
        assert_goes_on(twin, other)
        assert_goes_on(found, expected)

    def test_room_is_made_where_the_layer_is(self, machine):
        found, _ = pair(CONFIGS["int4"])
        where = [layer.is_offloaded for layer in found.layers]
        assert where == [False, True, True]
        found.reserve(1000)
        assert [layer.is_offloaded for layer in found.layers] == where
        assert all(layer._keys.capacity >= 1000 for layer in found.layers)

    def test_reset(self, machine):
        found, expected = pair(CONFIGS["int4"])
        for cache in (found, expected):
            cache.reset()
        assert not any(layer.is_offloaded for layer in found.layers)
        assert found.memory_report()["total"] == found.memory_report()["offloaded"] == 0
        assert_equal(fill(found, 0, 50, [49, 1]), fill(expected, 0, 50, [49, 1]))

    def test_keys_and_values_are_read_on_the_device(self, machine):
        found, expected = pair(CONFIGS["int4"])
        assert found.layers[1].is_offloaded
        for name in ("keys", "values"):
            assert torch.equal(getattr(found.layers[1], name), getattr(expected.layers[1], name))
        assert found.layers[1].is_offloaded

    def test_a_dense_cache_is_taken_over(self, machine):
        config = families.config("llama", num_hidden_layers=3, head_dim=HEAD_DIM)
        dense = hf_kvquant.cache.DynamicCache(config=config)
        for i in range(3):
            dense.update(*states(60, seed=i), i)
        caches = [QuantizedCache(config, each) for each in (offloaded(CONFIGS["int4"]), CONFIGS["int4"])]
        for cache in caches:
            cache.take_over(dense)
        assert all(layer.is_offloaded for layer in caches[0].layers)
        for cache in caches:
            cache.enable_fused()
        assert_goes_on(*caches)


class TestFiles:
    def test_save_and_load(self, machine, tmp_path):
        found, expected = pair(CONFIGS["int4"])
        paths = [tmp_path / "offloaded.safetensors", tmp_path / "plain.safetensors"]
        for cache, path in zip((found, expected), paths):
            cache.save(path)
        # The file does not say where the layers were.
        assert paths[0].read_bytes() == paths[1].read_bytes()
        config = found._config
        plain = QuantizedCache.load(paths[0], config)
        assert not plain.offloading and not any(layer.is_offloaded for layer in plain.layers)
        loaded = QuantizedCache.load(paths[1], config, device="cpu", offload=True)
        assert loaded.offloading and all(layer.is_offloaded for layer in loaded.layers)
        assert_goes_on(loaded, plain)

    def test_a_cpu_is_refused(self, tmp_path):
        cache = new_cache(CONFIGS["int4"])
        fill(cache, 0, 10, [10])
        cache.save(tmp_path / "cache.safetensors")
        with pytest.raises(ValueError, match="offload: True is not allowed for a model on cpu"):
            QuantizedCache.load(tmp_path / "cache.safetensors", cache._config, offload=True)


def test_bytes_by_memory(machine):
    found, expected = pair(CONFIGS["int4"])
    report, plain = found.memory_report(), expected.memory_report()
    in_main_memory = [layer.memory_report()["total"] for layer in expected.layers[1:]]
    small = sum(t.nbytes for layer in expected.layers[1:] for t in layer._small_tensors() if t is not None)
    assert report.pop("offloaded") == sum(in_main_memory) - small
    assert report == plain and "offloaded" not in plain
    assert small < 0.01 * report["total"]


def test_a_dense_layer_is_moved_too(machine):
    dense = QuantSpec("dense")
    config = replace(CONFIGS["int8"], layers=((1, LayerOverride(dense, dense)),))
    cache = new_cache(offloaded(config))
    moves = []
    cache.layers[1].offload = lambda: moves.append("out")
    cache.layers[1].prefetch = lambda: moves.append("in")
    fill(cache, 0, 11, [10, 1])
    assert moves == ["in", "out", "in", "in", "out"]


class TestRefusals:
    def test_a_model_on_a_cpu(self):
        model = families.build("llama", **families.small("llama"))
        config = offloaded(KVQuantConfig.preset("int8"))
        with pytest.raises(ValueError, match="offload: True is not allowed for a model on cpu, .*expected false, or"):
            model.generate(families.prompt(), cache_implementation="kvquant", cache_config=config, max_new_tokens=2)

    def test_static_caches(self):
        with pytest.raises(ValueError, match="offload: True is not allowed with static: true"):
            offloaded(KVQuantConfig.preset("int8-static"))

    @pytest.mark.parametrize("value", [1, "cpu", None])
    def test_values(self, value):
        with pytest.raises(ValueError, match=f"offload: {value!r} is not allowed; expected true or false"):
            KVQuantConfig.from_dict(CONFIGS["int8"].to_dict() | {"offload": value})

    def test_compiled_and_captured_steps(self, machine, monkeypatch):
        cache = new_cache(offloaded(CONFIGS["int8"]))
        fill(cache, 0, 10, [10])
        monkeypatch.setattr(offloading, "is_traced", lambda: True)
        with pytest.raises(ValueError, match="offload: True is not allowed in steps that are compiled or captured"):
            fill(cache, 10, 11, [1])


@NO_DEVICE
@pytest.mark.parametrize("preset", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "gemma3_window", "falcon_h1"])
def test_on_a_gpu(name, preset, tmp_path):
    """The same logits as with layers on the GPU, in less of its memory."""
    many = {"num_hidden_layers": 12} if name == "llama" else {}
    model = families.build(name, dtype=torch.bfloat16, **many).cuda()
    config, ids = replace(KVQuantConfig.preset(preset), sliding=16), families.prompt(2, 300).cuda()
    arguments = {"max_new_tokens": 70, "return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    outputs, held = [], []
    for each in (config, offloaded(config)):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = model.generate(ids, cache_implementation="kvquant", cache_config=each, **arguments)
        outputs.append(torch.stack(out.logits))
        cache = host.cache_of(out)
        del out
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - before - outputs[-1].nbytes)
    assert torch.equal(*outputs)
    report = cache.memory_report()
    moved = [layer for layer in cache.quantized_layers if layer.is_offloaded]
    assert len(moved) >= len(cache.quantized_layers) - 1
    for layer in moved:
        for side in (layer._keys, layer._values):
            assert all(t.device.type == "cpu" and t.is_pinned() for t in side.stored if t is not None)
    assert 0 < report["offloaded"] < report["total"]
    if name == "llama":
        assert report["offloaded"] > 0.8 * report["total"] and held[1] < 0.5 * held[0]
    twin = copy.deepcopy(cache)
    for each in (cache, twin):
        each.crop(-100)
        each.reorder_cache(torch.tensor([1, 0]).cuda())
    cache.save(tmp_path / "cache.safetensors", model)
    loaded = QuantizedCache.load(tmp_path / "cache.safetensors", model, offload=True)
    assert all(layer.is_offloaded for layer in loaded.quantized_layers)
    logits = []
    for each in (cache, twin, loaded):
        with hf_kvquant.attention(model), torch.no_grad():
            logits.append(model(ids[:, :1], **host.cache_inputs(model, each)).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
