"""`KVQuantConfig`: presets, round trips, and one clear error for each mistake."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import time
from pathlib import Path

import pytest
import yaml

from hf_kvquant import KVQuantConfig, LayerOverride, QuantSpec

INT8, INT4 = QuantSpec("int8"), QuantSpec("int4", group_size=32, rotate=True)
CHANNEL = QuantSpec("int4", "channel", block_length=128)
PRESETS = ["fp8", "int2", "int3", "int4", "int4-small", "int8", "int8-plain"]
CONFIGS = {
    "plain": KVQuantConfig(INT8, INT8),
    "everything": KVQuantConfig(
        CHANNEL,
        INT4,
        sink_length=4,
        recent_length=32,
        backend="reference",
        static=True,
        rotary_keys="keys",
        sliding=128,
        layers={3: LayerOverride(keys=INT8), 0: LayerOverride(QuantSpec("dense"), QuantSpec("dense"))},
    ),
    "windows": KVQuantConfig(
        INT8,
        INT8,
        sink_length=4,
        window_length=4096,
        layers={1: LayerOverride(window_length=64), 0: LayerOverride(window_length="all")},
    ),
    "dense keys": KVQuantConfig(QuantSpec("dense"), INT4, recent_length=1),
    **{name: KVQuantConfig.preset(name) for name in PRESETS},
}
by_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


class TestPresets:
    def test_names(self):
        assert KVQuantConfig.preset_names() == PRESETS
        assert KVQuantConfig.names() == [*PRESETS, *(f"{name}-static" for name in PRESETS)]

    def test_they_are_the_files_of_the_repository(self):
        """The presets behind the short names are the very files in configs/, nothing else."""
        folder = Path(__file__).parent.parent / "configs"
        assert sorted(file.stem for file in folder.glob("*.yaml")) == PRESETS
        for file in folder.glob("*.yaml"):
            assert KVQuantConfig.preset(file.stem) == KVQuantConfig.from_yaml(file)

    @pytest.mark.parametrize(
        ("name", "format", "k_grid", "rotate", "has_window"),
        [
            ("int8", "int8", "channel", False, None),
            ("int8-plain", "int8", "token", False, False),
            ("fp8", "fp8", "token", False, False),
            ("int4", "int4", "channel", True, None),
            ("int4-small", "int4", "token", True, False),
            ("int3", "int3", "channel", True, True),
            ("int2", "int2", "channel", True, True),
        ],
    )
    def test_what_they_promise(self, name, format, k_grid, rotate, has_window):
        config = KVQuantConfig.preset(name)
        assert config.keys.format == config.values.format == format
        assert (config.keys.grid, config.values.grid) == (k_grid, "token")
        assert config.values.rotate == rotate
        assert has_window is None or (config.sink_length > 0 or config.recent_length > 0) == has_window
        assert (config.backend, config.layers) == ("auto", ())

    def test_plain_means_whole_heads(self):
        assert KVQuantConfig.preset("int8-plain") == KVQuantConfig(INT8, INT8)

    @pytest.mark.parametrize(
        ("name", "share"),
        [("int8-plain", 0.51), ("int8", 0.54), ("int4", 0.29), ("int4-small", 0.27), ("int3", 0.21), ("int2", 0.15)],
    )
    def test_bits_per_element(self, name, share):
        """The advertised share of BF16 that the presets take, at head_dim 128 and without windows."""
        assert KVQuantConfig.preset(name).bits_per_element(128) <= share * 16

    def test_bits_are_the_mean_of_both_sides(self):
        assert KVQuantConfig(CHANNEL, INT8).bits_per_element(128) == (4.25 + 8.125) / 2

    def test_a_dense_side_counts_16_bits(self):
        assert KVQuantConfig(QuantSpec("dense"), INT8).bits_per_element(128) == (16 + 8.125) / 2

    def test_an_unknown_preset(self):
        with pytest.raises(ValueError) as error:
            KVQuantConfig.preset("int5")
        assert all(word in str(error.value) for word in ["preset", "'int5'", *PRESETS])


class TestRoundTrips:
    @by_config
    def test_dict(self, config):
        assert KVQuantConfig.from_dict(config.to_dict()) == config

    @by_config
    def test_json(self, config):
        """transformers saves a generation config as JSON, which makes the layers' indices strings."""
        assert KVQuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    @by_config
    def test_yaml(self, config, tmp_path):
        config.to_yaml(tmp_path / "a.yaml")
        assert KVQuantConfig.from_yaml(tmp_path / "a.yaml") == config
        assert KVQuantConfig.from_yaml(str(tmp_path / "a.yaml")) == config

    @by_config
    def test_copies(self, config):
        for twin in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
            assert twin == config
            assert hash(twin) == hash(config)

    def test_to_dict_is_plain_data(self):
        assert CONFIGS["everything"].to_dict() == {
            "keys": {"format": "int4", "grid": "channel", "block_length": 128},
            "values": {"format": "int4", "group_size": 32, "rotate": True},
            "sink_length": 4,
            "recent_length": 32,
            "window_length": "all",
            "backend": "reference",
            "static": True,
            "offload": False,
            "rotary_keys": "keys",
            "sliding": 128,
            "error_feedback": None,
            "layers": {
                0: {"keys": {"format": "dense"}, "values": {"format": "dense"}},
                3: {"keys": {"format": "int8"}},
            },
        }
        assert CONFIGS["windows"].to_dict()["window_length"] == 4096
        assert CONFIGS["windows"].to_dict()["layers"] == {0: {"window_length": "all"}, 1: {"window_length": 64}}

    def test_from_dict_leaves_its_argument_alone(self):
        data = CONFIGS["everything"].to_dict()
        before = copy.deepcopy(data)
        KVQuantConfig.from_dict(data)
        assert data == before

    def test_defaults(self):
        config = KVQuantConfig.from_dict({"keys": {"format": "int8"}, "values": {"format": "int8"}})
        assert config == KVQuantConfig(
            INT8, INT8, sink_length=0, recent_length=0, window_length="all", backend="auto", static=False, layers=()
        )

    def test_a_yaml_file_by_hand(self, tmp_path):
        file = tmp_path / "mine.yaml"
        file.write_text(
            "keys: {format: int4, grid: channel}\nvalues: {format: int8, group_size: 16}\n"
            "layers:\n  1:\n    values: {format: dense}\n"
        )
        assert KVQuantConfig.from_yaml(file) == KVQuantConfig(
            QuantSpec("int4", "channel"),
            QuantSpec("int8", group_size=16),
            layers={1: LayerOverride(values=QuantSpec("dense"))},
        )


class TestValue:
    def test_is_hashable_and_compared_by_value(self):
        configs = [*CONFIGS.values(), *map(copy.deepcopy, CONFIGS.values())]
        assert CONFIGS["plain"] == CONFIGS["int8-plain"]
        assert len(set(configs)) == len(CONFIGS) - 1
        assert KVQuantConfig(INT8, INT8) != KVQuantConfig(INT8, INT8, sink_length=1)

    def test_is_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            CONFIGS["plain"].sink_length = 3

    def test_the_order_of_layers_does_not_matter(self):
        a, b = LayerOverride(keys=INT4), LayerOverride(values=INT4)
        assert KVQuantConfig(INT8, INT8, layers={0: a, 1: b}) == KVQuantConfig(INT8, INT8, layers=[(1, b), (0, a)])

    def test_for_layer(self):
        config = CONFIGS["everything"]
        assert config.for_layer(0) == (QuantSpec("dense"), QuantSpec("dense"))
        assert config.for_layer(1) == (CHANNEL, INT4)
        assert config.for_layer(3) == (INT8, INT4)


class TestLoad:
    def test_whatever_a_user_may_pass(self, tmp_path):
        config = CONFIGS["everything"]
        config.to_yaml(tmp_path / "a.yaml")
        for source in (config, config.to_dict(), tmp_path / "a.yaml", str(tmp_path / "a.yaml")):
            assert KVQuantConfig.load(source) == config
        assert KVQuantConfig.load("int8") == KVQuantConfig.preset("int8")

    @pytest.mark.parametrize("source", ["int5", "missing.yaml", Path("missing.yaml")], ids=repr)
    def test_neither_preset_nor_file(self, source):
        with pytest.raises(ValueError) as error:
            KVQuantConfig.load(source)
        assert all(word in str(error.value) for word in ["kv_config", repr(str(source)), *PRESETS])

    @pytest.mark.parametrize("source", [None, 8, ["int8"]], ids=repr)
    def test_something_else(self, source):
        with pytest.raises(
            ValueError, match=r"kv_config: .*expected a KVQuantConfig, a preset's name, a YAML path or a dict"
        ):
            KVQuantConfig.load(source)


def changed(**changes) -> dict:
    """A good config as a dict, with changes; None removes."""
    data = {"keys": {"format": "int8"}, "values": {"format": "int8"}, **changes}
    return {name: value for name, value in data.items() if value is not None}


def layer(index: object, override: object) -> dict:
    return changed(layers={index: override})


BAD = {
    "unknown field": (changed(key={}), ["key: unknown field", "keys", "values", "sink_length"]),
    "unknown field of a side": (
        changed(keys={"format": "int8", "bits": 8}),
        ["keys.bits: unknown field", "group_size"],
    ),
    "no keys": (changed(keys=None), ["keys: missing", "format"]),
    "no values": (changed(values=None), ["values: missing", "format"]),
    "no format": (changed(values={"grid": "token"}), ["values.format: missing", "'int4', 'int3', 'int2', 'dense'"]),
    "side is a word": (changed(keys="int8"), ["keys: 'int8' is not allowed", "mapping", "format"]),
    "unknown format": (
        changed(keys={"format": "int5"}),
        ["keys.format: 'int5'", "int8", "fp8", "int4", "int3", "int2", "dense"],
    ),
    "format is a number": (changed(keys={"format": 8}), ["keys.format: 8 is not allowed"]),
    "format is a list": (changed(keys={"format": ["int8"]}), ["keys.format: ['int8'] is not allowed", "int8", "fp8"]),
    "format is a mapping": (changed(values={"format": {"int8": 1}}), ["values.format: {'int8': 1} is not allowed"]),
    "grid is a list": (changed(keys={"format": "int8", "grid": ["token"]}), ["keys.grid: ['token'] is not allowed"]),
    "backend is a list": (changed(backend=["cpu"]), ["backend: ['cpu'] is not allowed", "auto"]),
    "layer with thousands of digits": (layer("9" * 5000, {}), ["is not a layer index", "integer from 0"]),
    "unknown grid": (changed(keys={"format": "int8", "grid": "tensor"}), ["keys.grid: 'tensor'", "token", "channel"]),
    "group size": (changed(keys={"format": "int8", "group_size": 20}), ["keys.group_size: 20", "multiple of 8"]),
    "group size is a word": (
        changed(values={"format": "int8", "group_size": "64"}),
        ["values.group_size: '64'", "integer"],
    ),
    "block length": (
        changed(keys={"format": "int8", "grid": "channel", "block_length": 63}),
        ["keys.block_length: 63", "64"],
    ),
    "rotate is a word": (
        changed(values={"format": "int4", "rotate": "yes"}),
        ["values.rotate: 'yes'", "true or false"],
    ),
    "rotated channels": (
        changed(keys={"format": "int4", "grid": "channel", "rotate": True}),
        ["keys.rotate: True", "false"],
    ),
    "sink length below 0": (changed(sink_length=-1), ["sink_length: -1", "integer from 0 to 1024"]),
    "sink length too large": (changed(sink_length=1025), ["sink_length: 1025", "integer from 0 to 1024"]),
    "sink length is true": (changed(sink_length=True), ["sink_length: True", "integer from 0 to 1024"]),
    "recent length too large": (changed(recent_length=4097), ["recent_length: 4097", "integer from 0 to 4096"]),
    "recent length is no integer": (changed(recent_length=2.5), ["recent_length: 2.5", "integer from 0 to 4096"]),
    "recent length is a word": (changed(recent_length="many"), ["recent_length: 'many'", "integer from 0 to 4096"]),
    "backend": (changed(backend="gpu"), ["backend: 'gpu'", "auto", "reference", "cpu", "cuda"]),
    "backend is a number": (changed(backend=3), ["backend: 3", "auto"]),
    "layers is a list": (changed(layers=[1]), ["layers: [1]", "mapping"]),
    "layers is false": (changed(layers=False), ["layers: False", "mapping"]),
    "layers of many kinds": (changed(layers={"first": {}, 1: {}}), ["layers: 'first'", "integer from 0"]),
    "layer below 0": (layer(-1, {"keys": {"format": "int4"}}), ["layers: -1", "integer from 0"]),
    "layer is a word": (layer("first", {"keys": {"format": "int4"}}), ["layers: 'first'", "integer from 0"]),
    "layer is no integer": (layer(1.5, {"keys": {"format": "int4"}}), ["layers: 1.5", "integer from 0"]),
    "layer is true": (layer(True, {"keys": {"format": "int4"}}), ["layers: True", "integer from 0"]),
    "override is a word": (layer(1, "dense"), ["layers.1: 'dense'", "mapping", "keys", "values"]),
    "unknown field of an override": (layer(1, {"sink_length": 4}), ["layers.1.sink_length: unknown field", "keys"]),
    "no format in an override": (layer(1, {"keys": {"grid": "token"}}), ["layers.1.keys.format: missing"]),
    "bad format in an override": (
        layer(7, {"values": {"format": "int1"}}),
        ["layers.7.values.format: 'int1'", "int4"],
    ),
    "rotated channels of values in an override": (
        layer(2, {"values": {"format": "int4", "grid": "channel", "rotate": True}}),
        ["layers.2.values.rotate: True", "false"],
    ),
    "the same layer twice": (
        changed(layers={1: {"keys": {"format": "int4"}}, "1": {"keys": {"format": "int8"}}}),
        ["layers: 1 is given twice", "each layer once"],
    ),
}


SIDES = "keys: {format: int8}\nvalues: {format: int8}\n"
# Nine aliases of nine aliases .. of nine words.
ALIASES = "".join(f"  {i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
HOSTILE = {
    "deep": ("[" * 3000, "is not valid YAML .*more than 16 levels"),
    "deep mappings": (f"{SIDES}layers: {'{1: ' * 3000}", "is not valid YAML .*more than 16 levels"),
    "a deep block": ("".join(f"{' ' * i}- \n" for i in range(150)), "is not valid YAML .*more than 16 levels"),
    "aliases that multiply": (f"{SIDES}layers:\n  0: &a0 [x, x, x, x]\n{ALIASES}", "more than 10000 nodes"),
    "an alias of itself": (f"{SIDES}layers: &a {{0: *a}}", "more than 10000 nodes, or a node with an alias of itself"),
    "20,000 layers": (
        f"{SIDES}layers: {{{', '.join(f'{i}: {{keys: {{format: int4}}}}' for i in range(20_000))}}}",
        "is longer than 32768 bytes; expected a config",
    ),
    "as many nodes as fit": (f"[{'a,' * 16_000}]", "more than 10000 nodes"),
    "1 and 0x1": (f"{SIDES}layers: {{1: {{}}, 0x1: {{}}}}", "'0x1' is given twice; expected each key once"),
    "1 and true": (f"{SIDES}layers: {{1: {{}}, true: {{}}}}", "'true' is given twice"),
    "1 and '1'": (f"{SIDES}layers: {{1: {{}}, '1': {{}}}}", "layers: 1 is given twice; expected each layer once"),
    "a date that is none": (f"{SIDES}sink_length: 2001-99-99", "is not valid YAML .*month"),
}


class TestClearErrors:
    @pytest.mark.parametrize(("text", "message"), HOSTILE.values(), ids=HOSTILE.keys())
    def test_files_that_are_meant_to_break_it(self, text, message, tmp_path):
        file = tmp_path / "bad.yaml"
        file.write_text(text)
        start = time.process_time()
        with pytest.raises(ValueError, match=f"(?s){file}: .*{message}") as raised:
            KVQuantConfig.from_yaml(file)
        assert len(str(raised.value)) < 1000
        # Far from what expanding it would take.
        assert time.process_time() - start < 20

    def test_aliases_are_allowed(self, tmp_path):
        file = tmp_path / "good.yaml"
        file.write_text(f"{SIDES}layers: {{0: &first {{keys: {{format: int4}}}}, 1: *first}}")
        override = LayerOverride(keys=QuantSpec("int4"))
        assert KVQuantConfig.from_yaml(file).layers == ((0, override), (1, override))

    def test_a_config_with_other_specs_for_every_layer(self, tmp_path):
        """The file for the largest models is within the limits."""
        override = LayerOverride(CHANNEL, INT4)
        config = KVQuantConfig(INT8, INT8, layers=dict.fromkeys(range(160), override))
        config.to_yaml(tmp_path / "large.yaml")
        assert KVQuantConfig.from_yaml(tmp_path / "large.yaml") == config

    @pytest.mark.parametrize(("data", "words"), BAD.values(), ids=BAD.keys())
    def test_from_dict(self, data, words):
        with pytest.raises(ValueError) as error:
            KVQuantConfig.from_dict(data)
        assert all(word in str(error.value) for word in words), str(error.value)

    @pytest.mark.parametrize(("data", "words"), BAD.values(), ids=BAD.keys())
    def test_from_yaml_names_the_file_too(self, data, words, tmp_path):
        file = tmp_path / "bad.yaml"
        file.write_text(yaml.safe_dump(data))
        with pytest.raises(ValueError) as error:
            KVQuantConfig.from_yaml(file)
        assert str(error.value).startswith(f"{file}: ")
        assert all(word in str(error.value) for word in words), str(error.value)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("keys: [unclosed", ["is not valid YAML", "line 1"]),
            ("- keys\n- values\n", ["['keys', 'values'] is not allowed", "mapping", "keys", "sink_length"]),
            ("", ["None is not allowed", "mapping", "keys"]),
            ("int8\n", ["'int8' is not allowed", "mapping", "keys"]),
            ("keys: !!python/object:os.system {}\n", ["is not valid YAML"]),
        ],
        ids=["unclosed", "a list", "empty", "a word", "code"],
    )
    def test_files_that_hold_something_else(self, text, words, tmp_path):
        file = tmp_path / "bad.yaml"
        file.write_text(text)
        with pytest.raises(ValueError) as error:
            KVQuantConfig.from_yaml(file)
        assert all(word in str(error.value) for word in [str(file), *words]), str(error.value)

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(ValueError, match=r"missing\.yaml: cannot be read"):
            KVQuantConfig.from_yaml(tmp_path / "missing.yaml")

    def test_a_directory(self, tmp_path):
        with pytest.raises(ValueError, match=rf"{tmp_path}: cannot be read"):
            KVQuantConfig.from_yaml(tmp_path)

    def test_bytes_that_are_no_text(self, tmp_path):
        (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00keys")
        with pytest.raises(ValueError, match=r"bad\.yaml: cannot be read"):
            KVQuantConfig.from_yaml(tmp_path / "bad.yaml")

    def test_an_unreadable_file(self, tmp_path, monkeypatch):
        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        CONFIGS["plain"].to_yaml(tmp_path / "secret.yaml")
        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(ValueError, match=r"secret\.yaml: cannot be read .*Permission denied"):
            KVQuantConfig.from_yaml(tmp_path / "secret.yaml")

    def test_sides_that_are_no_specs(self):
        with pytest.raises(ValueError, match="keys: 'int8' is not allowed; expected a QuantSpec"):
            KVQuantConfig("int8", INT8)
        with pytest.raises(ValueError, match="values: None is not allowed; expected a QuantSpec"):
            KVQuantConfig(INT8, None)

    def test_an_override_that_is_a_dict(self):
        with pytest.raises(ValueError, match=r"layers\.1: \{'keys'.*expected a LayerOverride"):
            KVQuantConfig(INT8, INT8, layers={1: {"keys": {"format": "int4"}}})
