"""`KVQuantConfig`: how a cache is quantized; the validated content of a YAML file.

    KVQuantConfig.preset("int4")            # configs/int4.yaml, shipped with the package
    KVQuantConfig.from_yaml("mine.yaml")
    KVQuantConfig.from_dict({"keys": {"format": "int8"}, "values": {"format": "int8"}})

Frozen and hashable, so that a config can key a cache of compiled kernels, and plain data through `to_dict`, because
transformers saves a generation config through it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .backends import AUTO, NAMES
from .message import told
from .quantization import DENSE, FORMATS, QuantSpec

if TYPE_CHECKING:
    # Its place from Python 3.11 on.
    from importlib.resources.abc import Traversable

BACKENDS = (AUTO, *NAMES)
MAX_SINK_LENGTH = 1024
MAX_RECENT_LENGTH = 4096
# PyYAML reads a file within these limits in less than a second. A file that overrides the specs of a hundred layers
# is a quarter as long. A node counts once for every alias of it.
MAX_FILE_BYTES = 32 << 10
MAX_NODES = 10_000
MAX_DEPTH = 16
# The most digits of a layer index.
_MAX_DIGITS = 9
# Suffix of a preset's name.
STATIC = "-static"
# The `window_length` of layers that keep every token.
ALL = "all"


@dataclass(frozen=True)
class LayerOverride:
    """What replaces the config's specs and window in one layer; None keeps the config's."""

    keys: QuantSpec | None = None
    values: QuantSpec | None = None
    window_length: int | str | None = None


@dataclass(frozen=True)
class KVQuantConfig:
    """How keys and values are stored, and which tokens queries read exactly.

    Args:
        keys, values: `QuantSpec`s, chosen independently.
        sink_length: the number of unpadded tokens at the start of a row that every query reads exactly (StreamingLLM,
            https://arxiv.org/abs/2309.17453).
        recent_length: the number of latest tokens that a query reads exactly, its own included.
        window_length: the number of latest tokens that full-attention layers keep beside the sinks (StreamingLLM, see
            `evicting`); "all": they keep every token. Sliding layers have windows of their own.
        backend: "auto", or the name of the backend that must run.
        static: storage of a fixed size, so that decode steps can be compiled and captured in CUDA graphs.
        offload: layers are in the main memory, and on their device only while they work (see `offloading`).
        rotary_keys: in latent attention, whose modules cache latents as keys and rotary keys as values: the side whose
            spec the rotary keys have, "values" or "keys".
        sliding: the narrowest window, in tokens, whose sliding layers are quantized too; "dense": none of them.
        error_feedback: the path of a file that `hf-kvquant calibrate` wrote (see `feedback`), with which complete
            blocks of the channel grid are encoded with less loss; None: without. A relative path in a YAML file starts
            at its folder, elsewhere at the working directory. The file is read when the first tokens come.
        layers: a `LayerOverride` for each layer index that has one; it quantizes a sliding layer of any window.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    keys: QuantSpec
    values: QuantSpec
    sink_length: int = 0
    recent_length: int = 0
    window_length: int | str = ALL
    backend: str = AUTO
    static: bool = False
    offload: bool = False
    rotary_keys: str = "values"
    sliding: int | str = 512
    error_feedback: str | None = None
    layers: tuple[tuple[int, LayerOverride], ...] = ()

    def __post_init__(self) -> None:
        for field, limit in (("sink_length", MAX_SINK_LENGTH), ("recent_length", MAX_RECENT_LENGTH)):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
                raise ValueError(f"{field}: {told(value)} is not allowed; expected an integer from 0 to {limit}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend: {told(self.backend)} is not allowed; expected one of {list(BACKENDS)}")
        for field in ("static", "offload"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field}: {told(getattr(self, field))} is not allowed; expected true or false")
        if self.static and self.offload:
            raise ValueError(
                "offload: True is not allowed with static: true, whose compiled steps need layers at fixed addresses; "
                "expected false"
            )
        if self.rotary_keys not in ("keys", "values"):
            raise ValueError(f"rotary_keys: {told(self.rotary_keys)} is not allowed; expected 'keys' or 'values'")
        is_window = isinstance(self.sliding, int) and not isinstance(self.sliding, bool) and self.sliding >= 2
        if self.sliding != "dense" and not is_window:
            expected = "an integer from 2 on (the narrowest window) or 'dense'"
            raise ValueError(f"sliding: {told(self.sliding)} is not allowed; expected {expected}")
        _check_specs("", self.keys, self.values)
        _check_window("", self.window_length, self.static)
        layers = self.layers.items() if isinstance(self.layers, Mapping) else self.layers
        seen = set()
        for layer_idx, override in layers:
            if not isinstance(layer_idx, int) or isinstance(layer_idx, bool) or layer_idx < 0:
                raise ValueError(f"layers: {told(layer_idx)} is not a layer index; expected an integer from 0 on")
            if layer_idx in seen:
                raise ValueError(f"layers: {layer_idx} is given twice; expected each layer once")
            if not isinstance(override, LayerOverride):
                raise ValueError(f"layers.{layer_idx}: {told(override)} is not allowed; expected a LayerOverride")
            seen.add(layer_idx)
            _check_specs(f"layers.{layer_idx}.", override.keys or self.keys, override.values or self.values)
            if override.window_length is not None:
                _check_window(f"layers.{layer_idx}.", override.window_length, self.static)
        object.__setattr__(self, "layers", tuple(sorted(layers, key=lambda layer: layer[0])))
        if self.error_feedback is not None:
            self._check_feedback()
            object.__setattr__(self, "error_feedback", os.path.abspath(self.error_feedback))

    def _check_feedback(self) -> None:
        path = self.error_feedback
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise ValueError(f"error_feedback: {told(path)} is not allowed; expected the path of a file, or null")
        if not self.has_channels:
            raise ValueError(
                f"error_feedback: {told(os.fspath(path))} is not allowed without keys or values on the channel grid, "
                "which alone have error feedback; expected null"
            )

    @property
    def has_channels(self) -> bool:
        """Whether keys or values are on the channel grid in any layer."""
        specs = (self.keys, self.values, *(s for _, layer in self.layers for s in (layer.keys, layer.values)))
        return any(spec is not None and spec.is_channel for spec in specs)

    def for_layer(self, layer_idx: int) -> tuple[QuantSpec, QuantSpec]:
        """The specs of keys and of values in one layer."""
        override = dict(self.layers).get(layer_idx, LayerOverride())
        return override.keys or self.keys, override.values or self.values

    def for_model(self, model_config: Any) -> KVQuantConfig:
        """The config of a cache for this model: if it has latent attention, that `for_latents`.

        Raises:
            ValueError: the model has latent attention, and the config error feedback.
        """
        is_latent = isinstance(getattr(model_config.get_text_config(decoder=True), "kv_lora_rank", None), int)
        if is_latent and self.error_feedback is not None:
            raise ValueError(
                f"error_feedback: {self.error_feedback!r} is not allowed for latent attention, whose latents have no "
                "calibration; expected null"
            )
        return self.for_latents() if is_latent else self

    def for_latents(self) -> KVQuantConfig:
        """The config whose `keys` are the spec of latents, and whose `values` are that of rotary keys."""
        if self.rotary_keys == "values":
            return self
        layers = tuple((i, replace(layer, values=layer.values or layer.keys)) for i, layer in self.layers)
        return replace(self, values=self.keys, rotary_keys="values", layers=layers)

    def window(self, layer_idx: int) -> int | None:
        """How many of the latest tokens one layer keeps if it has full attention; None: all."""
        given = dict(self.layers).get(layer_idx, LayerOverride()).window_length
        given = self.window_length if given is None else given
        return given if isinstance(given, int) else None

    @property
    def windows(self) -> list[int]:
        """Every `window_length` that is given, for all layers or for one."""
        given = [self.window_length, *(override.window_length for _, override in self.layers)]
        return [window for window in given if isinstance(window, int)]

    def quantizes(self, layer_idx: int, sliding_window: int | None) -> bool:
        """Whether a layer with such a window, or none, is quantized."""
        if sliding_window is None or layer_idx in dict(self.layers):
            return True
        return isinstance(self.sliding, int) and sliding_window >= self.sliding

    def with_dense(self, layer_idx: int) -> KVQuantConfig:
        """The same config with one layer that is not quantized."""
        layers, dense = dict(self.layers), QuantSpec("dense")
        override = replace(layers.get(layer_idx, LayerOverride()), keys=dense, values=dense)
        return replace(self, layers=tuple((layers | {layer_idx: override}).items()))

    def bits_per_element(self, head_dim: int) -> float:
        """Stored bits per cached element without exact copies: the mean of keys and values (16 for a dense side)."""
        sides = [16.0 if s.is_dense else s.bits_per_element(head_dim) for s in (self.keys, self.values)]
        return sum(sides) / 2

    @staticmethod
    def preset_names() -> list[str]:
        """The names of the shipped presets, `configs/*.yaml`."""
        return sorted(f.name.removesuffix(".yaml") for f in _presets().iterdir() if f.name.endswith(".yaml"))

    @classmethod
    def names(cls) -> list[str]:
        """Every name that `preset` knows: each preset, without and with the suffix `STATIC`."""
        return [name + ending for ending in ("", STATIC) for name in cls.preset_names()]

    @classmethod
    def preset(cls, name: str) -> KVQuantConfig:
        """A shipped preset by name; "int8-static" is "int8" in storage of a fixed size.

        Raises:
            ValueError: no such preset.
        """
        if name not in cls.names():
            raise ValueError(f"preset: {name!r} is unknown; expected one of {cls.names()}")
        config = _read_preset(name.removesuffix(STATIC))
        return replace(config, static=True) if name.endswith(STATIC) else config

    @classmethod
    def from_yaml(cls, path: str | Path) -> KVQuantConfig:
        """Read and validate a file.

        Raises:
            ValueError: the file cannot be read or parsed, or is not a config; the message names file, field, value and
                what is allowed.
        """
        return _read_yaml(Path(path))

    @classmethod
    def from_dict(cls, data: Mapping) -> KVQuantConfig:
        """The inverse of `to_dict`; a missing field takes its default.

        Raises:
            ValueError: an unknown field, or a value that is not allowed.
        """
        data = _known_fields("", data, cls)
        for side in ("keys", "values"):
            if side not in data:
                raise ValueError(f"{side}: missing; expected a mapping with at least `format`")
            data[side] = _spec(side, data[side])
        layers = {} if data.get("layers") is None else data["layers"]
        if isinstance(layers, tuple):
            layers = dict(layers)
        if not isinstance(layers, Mapping):
            raise ValueError(
                f"layers: {told(layers)} is not allowed; expected a mapping from layer index to overrides"
            )
        # Pairs, not a dict, in which 1 and "1" would silently become one key.
        data["layers"] = tuple((_layer_idx(index), _override(index, override)) for index, override in layers.items())
        return cls(**data)

    @classmethod
    def load(cls, source: KVQuantConfig | str | Path | Mapping, name: str = "kv_config") -> KVQuantConfig:
        """A config from any form that users may pass: a config, a preset's name, a YAML path or a dict.

        Raises:
            ValueError: it is none of these, or not valid; `name` is that of the argument.
        """
        if isinstance(source, cls):
            return source
        if isinstance(source, Mapping):
            return cls.from_dict(source)
        if isinstance(source, str) and source in cls.names():
            return cls.preset(source)
        if isinstance(source, (str, Path)):
            if not Path(source).exists():
                raise ValueError(
                    f"{name}: {str(source)!r} is neither a preset nor a file; the presets are {cls.names()}"
                )
            return cls.from_yaml(source)
        raise ValueError(
            f"{name}: {told(source)} is not allowed; expected a KVQuantConfig, a preset's name, a YAML path or a dict"
        )

    def to_dict(self) -> dict:
        """Plain data (numbers, strings, dicts); fields of the specs that are at their default are left out."""

        def spec(s: QuantSpec) -> dict:
            return {f.name: getattr(s, f.name) for f in fields(s) if getattr(s, f.name) != f.default}

        def override(o: LayerOverride) -> dict:
            given = {f.name: getattr(o, f.name) for f in fields(o) if getattr(o, f.name) is not None}
            return {name: spec(value) if isinstance(value, QuantSpec) else value for name, value in given.items()}

        return {
            "keys": spec(self.keys),
            "values": spec(self.values),
            "sink_length": self.sink_length,
            "recent_length": self.recent_length,
            "window_length": self.window_length,
            "backend": self.backend,
            "static": self.static,
            "offload": self.offload,
            "rotary_keys": self.rotary_keys,
            "sliding": self.sliding,
            "error_feedback": self.error_feedback,
            "layers": {index: override(o) for index, o in self.layers},
        }

    def to_yaml(self, path: str | Path) -> None:
        """Write the file that `from_yaml` reads back as an equal config."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


def _check_specs(prefix: str, keys: QuantSpec, values: QuantSpec) -> None:
    for side, spec in (("keys", keys), ("values", values)):
        if not isinstance(spec, QuantSpec):
            raise ValueError(f"{prefix}{side}: {told(spec)} is not allowed; expected a QuantSpec")


def _check_window(prefix: str, window: int | str, static: bool) -> None:
    is_length = isinstance(window, int) and not isinstance(window, bool) and window >= 1
    if window != ALL and not is_length:
        expected = f"an integer from 1 on or {ALL!r}"
        raise ValueError(f"{prefix}window_length: {told(window)} is not allowed; expected {expected}")
    if is_length and static:
        raise ValueError(
            f"{prefix}window_length: {window} is not allowed with static: true, whose storage keeps every token; "
            f"expected {ALL!r}"
        )


def _known_fields(where: str, data: object, cls: type) -> dict:
    names = [f.name for f in fields(cls)]
    if not isinstance(data, Mapping):
        raise ValueError(
            f"{where or 'config'}: {told(data)} is not allowed; expected a mapping with fields of {names}"
        )
    for name in data:
        if name not in names:
            name = name if isinstance(name, str) and len(name) < 80 else told(name)
            raise ValueError(f"{where}{'.' if where else ''}{name}: unknown field; expected one of {names}")
    return dict(data)


def _spec(where: str, data: object) -> QuantSpec:
    if isinstance(data, QuantSpec):
        return data
    data = _known_fields(where, data, QuantSpec)
    if "format" not in data:
        raise ValueError(f"{where}.format: missing; expected one of {[*FORMATS, DENSE]}")
    try:
        return QuantSpec(**data)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None


def _layer_idx(index: object) -> object:
    """The index as an integer: transformers saves a generation config as JSON, which makes every key a string."""
    if isinstance(index, str) and index.isdecimal() and len(index) <= _MAX_DIGITS:
        return int(index)
    return index


def _override(index: object, data: object) -> LayerOverride:
    if isinstance(data, LayerOverride):
        return data
    index = _layer_idx(index)
    where = f"layers.{index if isinstance(index, int) else told(index)}"
    given = _known_fields(where, data, LayerOverride)
    specs = {side: _spec(f"{where}.{side}", given[side]) for side in ("keys", "values") if side in given}
    return LayerOverride(**given | specs)


def _presets() -> Traversable:
    folder = resources.files(__package__) / "configs"
    if not folder.is_dir():
        raise ImportError(
            "this hf_kvquant is its source folder, which has no presets and no compiled library; install it "
            "(`pip install .`) and start Python in another folder, or install it with `pip install -e .`"
        )
    return folder


@lru_cache(maxsize=None)
def _read_preset(name: str) -> KVQuantConfig:
    return _read_yaml(_presets() / f"{name}.yaml")


class _Loader(yaml.SafeLoader):
    """PyYAML with limits: it keeps the last of two equal keys in silence, and lets aliases multiply without end."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MAX_DEPTH} levels", self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_data(self) -> object:
        node = self.get_single_node()
        if node is None:
            return None
        if _count(node, {}) > MAX_NODES:
            raise yaml.constructor.ConstructorError(
                None, None, f"more than {MAX_NODES} nodes, or a node with an alias of itself", node.start_mark
            )
        return self.construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            # Keys are compared as a dict compares them: 1, 0x1 and true are the same key.
            name = None if key.tag == "tag:yaml.org,2002:merge" else self.construct_object(key, deep=True)
            if name.__hash__ and name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice; expected each key once", key.start_mark
                )
            if name.__hash__:
                seen.add(name)
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of nodes in a node, those that aliases repeat included; too many if the node contains itself."""
    if id(node) not in known:
        known[id(node)] = MAX_NODES + 1
        below = node.value if isinstance(node, yaml.CollectionNode) else []
        children = [child for pair in below for child in pair] if isinstance(node, yaml.MappingNode) else below
        known[id(node)] = 1 + sum(_count(child, known) for child in children)
    return known[id(node)]


def _read_yaml(file: Path | Traversable) -> KVQuantConfig:
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{file}: is longer than {MAX_FILE_BYTES} bytes; expected a config")
    try:
        data = yaml.load(content.decode(), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error
    # ValueError: some texts look like a date or a number, but are not valid ones.
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file}: is not valid YAML ({error})") from error
    try:
        if isinstance(data, Mapping) and isinstance(data.get("error_feedback"), str) and isinstance(file, Path):
            data = {**data, "error_feedback": str(file.absolute().parent / data["error_feedback"])}
        return KVQuantConfig.from_dict(data)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
