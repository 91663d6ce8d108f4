"""Files and states from strangers: a changed file with valid checksums is refused with one ValueError, or gives a
cache that could have been saved.

`make sanitize` runs this file under the address sanitizer, where reading one byte too many ends the process.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import struct
from pathlib import Path

import families
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stored import replaced

from hf_kvquant import KVQuantConfig, QuantizedCache, QuantSpec, ops, saving
from hf_kvquant.layers import QuantizedLayer
from hf_kvquant.states import Stored

# The number of files per kind of cache; there are a thousand in all.
FILES = 150
LENGTH, ROWS = 83, 2
WINDOWS = KVQuantConfig(
    QuantSpec("int8", "channel", block_length=16), QuantSpec("int4", group_size=16, rotate=True), sink_length=5,
    recent_length=37,
)  # fmt: skip
# With a window whose first tokens are retired; and as many tokens more than the others have.
NARROW, MORE = dataclasses.replace(WINDOWS, sliding=24), 144
LFM2 = families.Family(
    "Lfm2Config", "Lfm2ForCausalLM",
    {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "conv_L_cache": 3},
    without=("head_dim",),
)  # fmt: skip
# Each has the family, the cache's config, and the length of a static cache. There are transformers' sliding layers,
# short and full, also static; convolution states; and linear states within quantized layers and beside them.
CACHES = {
    "int4": ("llama", "int4", None),
    "windows": ("llama", WINDOWS, None),
    "int8-static": ("llama", "int8-static", 120),
    "sliding": ("gemma2", "fp8", None),
    "window": ("mistral_window", NARROW, None),
    "window-static": ("mistral_window", dataclasses.replace(NARROW, static=True), LENGTH + MORE + 30),
    "sliding-static": ("gemma2", "int4-static", 120),
    "conv": ("lfm2", "int8-plain", None),
    "linear": ("falcon_h1", "int4-small", None),
}


@functools.lru_cache(maxsize=None)
def model_config(name: str):
    families.ALL.setdefault("lfm2", LFM2)
    return families.config(name, **families.small(name))


def filled(kind: str) -> QuantizedCache:
    name, kv_config, max_length = CACHES[kind]
    padding = torch.ones(ROWS, LENGTH)
    padding[0, :9] = 0
    cache = QuantizedCache(model_config(name), kv_config, max_length=max_length, attention_mask=padding)
    for layer_idx, layer in enumerate(cache.layers):
        if hasattr(layer, "conv_states"):
            layer.update_conv_state(torch.randn(ROWS, 32, 4))
            layer.update_recurrent_state(torch.randn(ROWS, 4, 16, 8))
        if hasattr(layer, "keys"):
            for n in (LENGTH - 2 + (MORE if kind.startswith("window-") or kind == "window" else 0), 1, 1):
                cache.update(*torch.randn(2, ROWS, 2, n, 16), layer_idx)
    return cache


def states_of(cache: QuantizedCache) -> list[dict]:
    return [layer.state() if isinstance(layer, QuantizedLayer) else vars(layer) for layer in cache.layers]


def use(cache: QuantizedCache) -> None:
    """Do everything that reads or writes the loaded cache, on the compiled backend."""
    for layer_idx, layer in enumerate(cache.layers):
        if isinstance(layer, QuantizedLayer):
            layer.takes_states = True
            states = cache.update(*torch.randn(2, ROWS, 2, 3, 16).to(layer.dtype), layer_idx)
            if not isinstance(states[0], torch.Tensor):
                out, _ = ops.decode_attention(torch.randn(ROWS, 4, 3, 16).to(layer.dtype), *states, scaling=0.25)
                assert out.shape == (ROWS, 4, 3, 16)
            is_sliding = layer.sliding_window is not None
            assert layer.keys.shape == (ROWS, 2, layer.sliding_window - 1 if is_sliding else LENGTH + 3, 16)
            if is_sliding:
                layer.crop(-50)
            else:
                QuantizedLayer.crop(layer, -70)
            layer._select(lambda x: x.flip(0))
        elif hasattr(layer, "sliding_window") or hasattr(layer, "max_cache_len"):
            keys, values = (torch.randn(ROWS, 2, 1, x.shape[-1]) for x in (layer.keys, layer.values))
            cache.update(keys, values, layer_idx)


# --- what a file holds, changed at random


class Crafted:
    """A file's metadata and tensors, and random changes of them."""

    def __init__(self, path: Path, seed: int):
        with safe_open(path, "pt") as opened:
            [(self.key, header)] = opened.metadata().items()
        self.header, self.tensors, self.random = json.loads(header), load_file(path), random.Random(seed)

    def write(self, path: Path) -> None:
        """Write the file with the checksums of its changed content."""
        self.header.pop("header_sha256", None)
        self.header["tensors_sha256"] = saving._tensors_sum(self.tensors.items())
        self.header["header_sha256"] = saving._header_sum(self.header, self.tensors.items())
        save_file(self.tensors, path, {self.key: json.dumps(self.header)})

    def change(self) -> str:
        """Change something, and return a description of it."""
        choices = [self.change_value] * 4 + [self.change_tensor] * 4 + [self.change_names]
        return self.random.choice(choices)()

    def places(self) -> list[tuple[list | dict, object]]:
        """Every place of a value in the metadata: its container, and its key or index."""
        found, pending = [], [self.header["state"], self.header["description"]]
        while pending:
            each = pending.pop()
            inner = each.items() if isinstance(each, dict) else enumerate(each) if isinstance(each, list) else ()
            for where, value in inner:
                found.append((each, where))
                pending.append(value)
        return found + [(self.header, name) for name in self.header if name.endswith("version")]

    def change_value(self) -> str:
        parent, where = self.random.choice(self.places())
        old = parent[where]
        number = old if type(old) is int else 3
        values = [
            None, True, False, 0, 1, -1, number + 1, number - 1, number + 64, -number, 10**9, 1 << 62, 1 << 70, 0.5,
            math.nan, "", "x", "int8", "bfloat16", "__class__", [], {}, [[]], {"tensor": "x"}, {"dtype": "float16"},
            {"dtype": "int64"}, {"dtype": "nn"}, {"list": []}, {"dict": [["a", 1]]}, {"device": "cuda:7"},
            {"tensor": self.random.choice(sorted(self.tensors))}, {"tuple": [1, 2]}, [1, 2, 3],
            json.loads(json.dumps(self.random.choice(self.places())[0])),
            functools.reduce(lambda x, _: [x], range(400), 1),
        ]  # fmt: skip
        if self.random.random() < 0.15:
            if isinstance(parent, list):
                parent.insert(where, parent[where]) if self.random.random() < 0.5 else parent.pop(where)
            else:
                value = parent.pop(where)
                if self.random.random() < 0.5:
                    parent[f"{where}x"] = value
            return f"{where}: {str(old)[:80]} inserted, renamed or removed"
        parent[where] = self.random.choice(values)
        return f"{where}: {str(old)[:80]} -> {str(parent[where])[:80]}"

    def change_tensor(self) -> str:
        name = self.random.choice(sorted(self.tensors))
        tensor = self.tensors[name]
        dim = self.random.randrange(max(tensor.ndim, 1))
        raw = tensor.reshape(-1).clone().view(torch.uint8)

        def at_random(x: torch.Tensor) -> torch.Tensor:
            generator = torch.Generator().manual_seed(self.random.randrange(1 << 30))
            noise = torch.randint(0, 256, raw.shape, dtype=torch.uint8, generator=generator)
            return noise.view(x.dtype).reshape(x.shape)

        def one_number(x: torch.Tensor) -> torch.Tensor:
            x = x.reshape(-1).clone()
            if x.numel():
                x[self.random.randrange(x.numel())] = self.random.choice([-2, -1, 0, 1, 3, 81, 82, 83, 127])
            return x.reshape(tensor.shape)

        changes = [
            lambda x: x.narrow(dim, 0, max(x.shape[dim] - 1, 0)) if x.ndim else x[None],
            lambda x: torch.cat([x, x.narrow(dim, 0, min(1, x.shape[dim]))], dim) if x.ndim else x[None, None],
            lambda x: x.narrow(dim, 0, 0) if x.ndim else x.reshape(1, 1),
            lambda x: x.transpose(dim, -1) if x.ndim else x,
            lambda x: x.flatten(), lambda x: x[None], lambda x: x.unsqueeze(-1),
            lambda x: x.to(self.random.choice([torch.float16, torch.float64, torch.int64, torch.bool])),
            lambda x: raw, at_random, at_random, one_number, one_number, one_number,
        ]  # fmt: skip
        self.tensors[name] = new = self.random.choice(changes)(tensor).contiguous()
        return f"{name}: {tuple(tensor.shape)} of {tensor.dtype} -> {tuple(new.shape)} of {new.dtype}"

    def change_names(self) -> str:
        a, b = self.random.sample(sorted(self.tensors), 2)
        change = self.random.randrange(4)
        if change == 0:
            self.tensors["x"] = self.tensors.pop(a)
        elif change == 1:
            self.tensors["x"] = self.tensors[a].clone()
        elif change == 2:
            self.tensors[a], self.tensors[b] = self.tensors[b], self.tensors[a]
        else:
            del self.tensors[a]
        return f"{a}, {b}: renamed, doubled, exchanged or removed"


# Elements that may have any value: the model computes codes, scales, exact copies and states, and counters are only
# reported. Any columns may be padding or sinks, as long as that is possible.
FREE_NUMBERS = ("faults", "routes", "takes_states", "padding", "sink_positions", "has_previous_state", "record_past")
# Only the model's code knows the shape of linear states, except for their rows, and the head_dim of transformers' own
# layers; it refuses others.
# Past the window a sliding layer keeps the same states after any number of tokens; but the layers have to agree.
FREE_LENGTHS = ("cumulative_length",)


def assert_possible(got: object, whole: object, where: str = "") -> None:
    """`got` differs from `whole` only in elements that are free."""
    name = where.rpartition(".")[2]
    if (name == "padding" and None in (got, whole)) or (name == "takes_states" and got in (None, False, True)):
        return
    assert type(got) is type(whole), where
    if isinstance(got, torch.Tensor):
        recurrent = "recurrent_states" in where
        assert recurrent or (got.dtype, got.ndim) == (whole.dtype, whole.ndim), where
        if name == "padding" or recurrent:
            assert got.shape[0] == ROWS and (got.dtype.is_floating_point or name == "padding"), where
        elif "conv_states" in where:
            assert got.shape[0] == ROWS and got.shape[-1] == whole.shape[-1], where
        elif where.count(".") == 2 and name in ("keys", "values"):
            assert got.shape[:-1] == whole.shape[:-1], where
        else:
            assert got.shape == whole.shape, where
        if name == "sink_positions":
            # Sinks that a window has left share column 0, which no query sees.
            are_left = (whole == 0).sum(1).max() > 1
            for row in got.tolist():
                left = [x for x in row if x == 0 and are_left]
                sinks = [x for x in row if x >= 0][len(left) :]
                assert row == left + sorted(set(sinks)) + [-1] * (len(row) - len(left) - len(sinks)), where
                assert all(x < LENGTH + (MORE if are_left else 0) for x in sinks), where
        if name == "faults":
            assert got[0] >= 0 and got[1] == 0, where
        if name in FREE_LENGTHS:
            assert 0 <= got <= 120, where
        if name == "_sliding_window_tensor":
            assert torch.equal(got, whole), where
    elif isinstance(got, dict):
        assert got.keys() == whole.keys(), where
        for key in got:
            if key == "dtype" and "faults" in got and not any("recent" in got[side] for side in ("keys", "values")):
                # Exact copies would show the model's dtype; codes and scales do not.
                assert got[key] in (torch.float32, torch.bfloat16, torch.float16), where
                continue
            assert_possible(got[key], whole[key], f"{where}.{key}")
    elif isinstance(got, (list, tuple)):
        assert len(got) == len(whole), where
        for i, pair in enumerate(zip(got, whole)):
            assert_possible(*pair, f"{where}.{i}")
    elif not any(free in where for free in FREE_NUMBERS):
        assert got == whole, where


@functools.lru_cache(maxsize=None)
def saved(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / f"{kind}.safetensors"
    filled(kind).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("crafted")


def load(path: Path, kind: str, **options) -> QuantizedCache:
    name, _, max_length = CACHES[kind]
    return QuantizedCache.load(path, model_config(name), max_length=max_length, **options)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.filterwarnings("ignore")
def test_crafted_files_are_refused_or_possible(kind, folder):
    path, crafted = saved(kind, folder), folder / "crafted.safetensors"
    whole = load(path, kind)
    refusals, accepted = [], 0
    for seed in range(FILES):
        file = Crafted(path, seed)
        what = [file.change() for _ in range(file.random.choice([1, 1, 1, 2]))]
        file.write(crafted)
        try:
            cache = load(crafted, kind, mmap=bool(seed % 2))
        except ValueError as error:
            refusals.append((seed, what, str(error)))
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}: {what} raised {error!r}") from error
        accepted += 1
        try:
            if cache.kv_config != whole.kv_config:
                # The config is another valid one whose states look the same.
                assert cache.kv_config == KVQuantConfig.from_dict(file.header["description"]["kv_config"])
            assert_possible(states_of(cache), states_of(whole))
            assert cache.routes.keys() == whole.routes.keys()
            use(cache)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {what} was accepted: {error!r}") from error
    for seed, what, message in refusals:
        # The message names the file or the argument, and does not repeat everything that a stranger wrote.
        assert str(crafted) in message or message.startswith(("max_length: ", "layers.")), (seed, what, message)
        assert len(message) < 3000, (seed, what)
    # Random codes are accepted, for instance. If no file were accepted, the original would be refused too.
    assert FILES // 50 < accepted < FILES // 2


@pytest.mark.parametrize("kind", CACHES)
def test_the_files_themselves(kind, folder):
    """They are accepted, are the same after a round trip, and can be used."""
    whole = load(saved(kind, folder), kind)
    whole.save(folder / "again.safetensors")
    assert (folder / "again.safetensors").read_bytes() == saved(kind, folder).read_bytes()
    use(whole)


def test_crafted_tables(folder):
    """The table of a safetensors file itself: names, dtypes, shapes and places of its tensors."""
    path, crafted = saved("int4", folder), folder / "table.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    whole, refusals = states_of(load(path, "int4")), []
    for seed in range(FILES):
        chance = random.Random(seed)
        table, body = json.loads(content[8 : 8 + length]), content[8 + length :]
        entry = table[chance.choice([name for name in table if name != "__metadata__"])]
        field = chance.choice(["dtype", "shape", "data_offsets"])
        numbers = [0, 1, 8, -1, 7, 1 << 31, 1 << 62, 1 << 70, 0.5, "4", None, True, [], len(body), len(body) + 1]
        if field == "dtype":
            entry[field] = chance.choice(["U8", "F64", "BOOL", "C64", "", None, 3, [], {}])
        elif chance.random() < 0.3:
            entry[field] = chance.choice([[], None, 3, [0], [0] * 70, {}, [1 << 40] * 4, [0, 1 << 47, 1 << 47]])
        else:
            entry[field][chance.randrange(len(entry[field]))] = chance.choice(numbers)
        text = json.dumps(table).encode()
        claimed = len(text) if chance.random() < 0.8 else chance.choice([0, len(text) - 1, 1 << 40, (1 << 64) - 1])
        crafted.write_bytes(struct.pack("<Q", claimed) + text + body)
        try:
            assert_possible(states_of(load(crafted, "int4", mmap=bool(seed % 2))), whole)
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > FILES // 2 and all(str(crafted) in message for message in refusals)


def craft(change, path: Path) -> None:
    file = Crafted(path, 0)
    change(file)
    file.write(path)


def shorter(name: str, n: int = 1):
    def change(file: Crafted) -> None:
        file.tensors[name] = file.tensors[name][..., :n].contiguous()

    return change


def put(name: str, at: tuple[int, ...], number: int):
    def change(file: Crafted) -> None:
        file.tensors[name][at] = number

    return change


def same_tensor_twice(file: Crafted) -> None:
    text = json.dumps(file.header).replace('{"tensor": "layers.1.keys.data"}', '{"tensor": "layers.0.keys.data"}')
    file.header = json.loads(text)
    del file.tensors["layers.1.keys.data"]


def other_bools(file: Crafted) -> None:
    file.tensors["layers.0.padding"].view(torch.uint8)[0, 0] = 7


def a_path_as_config(file: Crafted) -> None:
    file.header["description"]["kv_config"] = "/etc/passwd"


def unequal_rows(file: Crafted) -> None:
    """One layer as a whole belongs to another batch."""
    for name in [name for name in file.tensors if name.startswith("layers.1.") and "faults" not in name]:
        file.tensors[name] = file.tensors[name][:1].contiguous()


TABLE = {
    "short faults": (shorter("layers.0.faults"), r"layers\.0\.faults is \(1,\) of torch\.int64; expected \(2,\)"),
    "short sink_positions": (shorter("layers.0.sink_positions"), r"layers\.0\.sink_positions is \(2, 1\)"),
    "short sink": (shorter("layers.0.keys.sink"), r"layers\.0\.keys\.sink is \(2, 2, 4, 1\)"),
    "negative faults": (put("layers.0.faults", (0,), -1), r"layers\.0\.faults is"),
    "tokens that had no room": (put("layers.0.faults", (1,), 1), r"layers\.0\.faults is"),
    "a sink after the end": (put("layers.0.sink_positions", (0, 3), LENGTH), r"sink_positions is"),
    "a sink twice": (put("layers.0.sink_positions", (0, 1), 9), r"sink_positions is"),
    "a slot left out": (put("layers.0.sink_positions", (0, 1), -1), r"sink_positions is"),
    "a tensor in two places": (same_tensor_twice, r"its state cannot be read \(KeyError"),
    "bools of other bytes": (other_bools, "a bool tensor holds bytes other than 0 and 1"),
    "a path as config": (a_path_as_config, r"kv_config is '/etc/passwd'; expected dict"),
    "layers of other batches": (unequal_rows, r"has tensors of \[1, 2\] rows; expected one batch"),
}


@pytest.mark.parametrize(("change", "message"), TABLE.values(), ids=TABLE.keys())
def test_what_corrupted_memory_or_passed(change, message, folder, tmp_path):
    path = tmp_path / "crafted.safetensors"
    path.write_bytes(saved("int4", folder).read_bytes())
    craft(change, path)
    with pytest.raises(ValueError, match=message):
        load(path, "int4")


@pytest.mark.parametrize("depth", [700, 800, 900, 100_000])
@pytest.mark.parametrize("where", ["table", "header", "state"])
def test_nested_without_end(where, depth, folder, tmp_path):
    path, deep = tmp_path / "crafted.safetensors", "[" * depth + "]" * depth
    file = Crafted(saved("int4", folder), 0)
    if where == "table":
        text = json.dumps({"__metadata__": {}, "x": 0}).replace("0", deep).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text)
    else:
        # With a valid checksum, if one can be made.
        if where == "state" and depth < 1000:
            file.header["state"] = {"list": functools.reduce(lambda x, _: [{"list": x}], range(depth // 2 - 20), [])}
            file.write(path)
        else:
            file.header["state"] = 0
            text = json.dumps(file.header).replace('"state": 0', f'"state": {deep}')
            save_file(file.tensors, path, {file.key: text})
    with pytest.raises(ValueError, match=str(path)):
        load(path, "int4")


def test_nested_anywhere(folder, tmp_path):
    """No message tries to repeat the nested value."""
    path = tmp_path / "crafted.safetensors"
    places = len(Crafted(saved("int4", folder), 0).places())
    for place in range(places):
        file = Crafted(saved("int4", folder), 0)
        parent, where = file.places()[place]
        parent[where] = functools.reduce(lambda x, _: [x], range(850), 1)
        file.write(path)
        with pytest.raises(ValueError, match=str(path)) as raised:
            load(path, "int4")
        assert len(str(raised.value)) < 1200, (where, raised.value)


# --- states that never were in a file


def crafted_states(states, chance: random.Random):
    """States with one field changed."""
    name = chance.choice([*Stored._fields, "sink_positions", "length", "spec", "head_dim"])
    if name == "length":
        return dataclasses.replace(states, length=chance.choice([0, -1, states.length + 500, 1 << 40]))
    if name == "spec":
        return dataclasses.replace(states, spec=chance.choice([QuantSpec("int8").resolve(16), QuantSpec("dense")]))
    if name == "head_dim":
        return dataclasses.replace(states, head_dim=chance.choice([0, 8, 32, 512, 1 << 20]))
    tensor = getattr(states, name)
    if tensor is None:
        return states
    dim = chance.randrange(tensor.ndim)
    parts = [tensor.narrow(dim, 0, n) for n in (0, 1, -(-tensor.shape[dim] // 2))]
    others = [tensor.double(), tensor.to(torch.uint8), tensor.flatten(), tensor.transpose(0, -1)]
    missing = tensor if name == "data" else None
    changed = chance.choice([*parts, *others, tensor[:1].expand_as(tensor), missing])
    if name == "sink_positions":
        return dataclasses.replace(states, sink_positions=changed)
    return replaced(states, **{name: changed})


@pytest.mark.parametrize("kind", ["int4", "windows"])
def test_crafted_states_are_refused_or_safe(kind):
    """Only the compiled backend is tested; the reference uses torch's operators, which check their arguments."""
    cache, refused = filled(kind), 0
    layer = cache.layers[0]
    layer.takes_states = True
    states = cache.update(*torch.randn(2, ROWS, 2, 1, 16), 0)
    assert ops.choose_backend("auto", "cpu", torch.float32) == "cpu"
    for seed in range(2 * FILES):
        chance = random.Random(seed)
        keys, values = (crafted_states(each, chance) if chance.random() < 0.7 else each for each in states)
        query, new = torch.randn(ROWS, 4, 1, 16), torch.randn(2, ROWS, 2, 1, 16)
        faults = chance.choice([layer.faults] * 5 + [layer.faults[:1], layer.faults.int()])
        padding = chance.choice([None] * 5 + [torch.zeros(1, LENGTH, dtype=torch.bool), torch.zeros(ROWS, LENGTH)])
        start = chance.choice([0, 80, 99, -1])
        refused += is_refused(torch.ops.kvquant.decode_attention.default, *attention_arguments(query, keys, values))
        refused += is_refused(ops.quantize_append, *new, keys, values, faults, padding, start=start)
    assert refused > FILES


def is_refused(function, *args, **kwargs) -> bool:
    try:
        function(*args, **kwargs)
    except (ValueError, IndexError):
        return True
    except RuntimeError as error:
        # A group size of 8, which only the reference takes.
        if "backend 'cpu' cannot run" not in str(error):
            raise
        return True
    return False


def attention_arguments(query, keys, values) -> tuple:
    """The arguments of the operator itself, without the checks before it."""
    return (
        query, *keys.stored, *values.stored, keys.sink_positions, None, None, None, keys.spec.code,
        values.spec.code, keys.length, keys.recent_length, 0.25, 0.0, "cpu",
    )  # fmt: skip
