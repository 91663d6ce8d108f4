"""A cache as a file: `QuantizedCache.save` and `load`.

A cache is one safetensors file. Its tensors are the bytes as they are stored (codes, scales, exact copies), so saving
rounds nothing. Its metadata is JSON: the config of the cache, the state of the layers besides tensors, and what
identifies the model. Two SHA-256 sums, of the metadata and of the tensors, tell a damaged file from a whole one.

A file is written beside its final name, flushed to the disk, and renamed, so an old file of that name stays whole
until the new one is complete. It is read through a memory map whose pages are copied when they are written to: a cache
can be used, and even changed, while the file is neither read as a whole nor changed.

Nothing in a file is executed (no pickle), and nothing in it is trusted. Anyone can make a valid checksum, so `load`
checks every name, shape, dtype and number that matters against those of a fresh layer (`expected.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig, PreTrainedModel

from . import expected, host, tensors_file
from .message import told

try:
    import fcntl
except ImportError:
    # Windows has no such locks; there the temporary files of killed processes stay.
    fcntl = None  # type: ignore[assignment]

FORMAT_VERSION = 1
# All metadata is stored under one key, because safetensors writes several keys in no fixed order.
_KEY = "hf_kvquant_cache"
# Fields of a model's config that do not affect cached states, or whose effect `load` can make up for.
_IRRELEVANT = frozenset({
    "_name_or_path", "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label",
    "initializer_range", "label2id", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type",
    "return_dict", "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
_SAMPLES = 64
_LOCK = "lock"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in tensors_file.DTYPES.values()}
_MODEL = {"config": dict, "weights": frozenset({None, str})}
# Files of the first versions have no entry for the active adapters; only a part of a model has one that says which.
_OPTIONAL = {"adapters": frozenset({None, dict}), "shard": str}
_DESCRIPTION = {"kv_config": dict, "model": dict, "length": expected.COUNT}
_HEADER = {
    "format_version": FORMAT_VERSION, "library_version": str, "transformers_version": str,
    "description": _DESCRIPTION, "state": dict, "tensors_sha256": str,
}  # fmt: skip


def write(path: str | Path, description: dict, packed: tuple[object, dict[str, torch.Tensor]]) -> None:
    """Write a file, as a whole or not at all. A symbolic link is followed, and the file behind it is replaced.

    Args:
        description: plain data (what JSON can hold) for the reader to check before anything else.
        packed: a state, from `pack`.

    Raises:
        ValueError: `path` is no path, is a folder, is not in a folder, or exists and is not a regular file.
        OSError: the disk is full, or may not be written to.
    """
    tensors_file.check_path(path)
    path, given = Path(os.path.realpath(path)), path
    if path.is_dir() or not path.parent.is_dir():
        wanted = "a file's name" if path.is_dir() else f"a name in an existing folder, not in {str(path.parent)!r}"
        raise ValueError(f"path: {str(given)!r} is not allowed; expected {wanted}")
    try:
        old = path.stat()
    except FileNotFoundError:
        old = None
    if old is not None and tensors_file.kind(old):
        raise ValueError(f"path: {str(given)!r} is {tensors_file.kind(old)}; expected a regular file or a new name")
    state, tensors = packed
    header = {
        "format_version": FORMAT_VERSION,
        "library_version": _library_version(),
        "transformers_version": host.VERSION,
        "description": description,
        "state": state,
        "tensors_sha256": _tensors_sum(tensors.items()),
    }
    header["header_sha256"] = _header_sum(header, tensors.items())
    with whole_file(path) as temporary:
        # A file that safetensors makes is readable by its owner only; this one has the permissions of any new file.
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        try:
            save_file(tensors, temporary, {_KEY: json.dumps(header)})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error
        if old is not None:
            mode = stat.S_IMODE(old.st_mode)
            _give(temporary, old)
        os.chmod(temporary, mode)


def _give(path: Path, old: os.stat_result) -> None:
    """Set owner and group as before, as far as the system allows: only root can give files away."""
    if hasattr(os, "chown"):
        for owner in (old.st_uid, -1):
            with suppress(OSError):
                os.chown(path, owner, old.st_gid)
                return


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A name to write to. It becomes `path` when the context is left, flushed to the disk, and not after an error."""
    path = Path(path)
    with _temporary(path) as temporary:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A path for the new file until it is renamed to `path`, in a folder of its own beside it. Temporary files of
    safetensors are in that folder too. It also holds a file that is locked (flock) as long as the process lives: a
    folder whose lock is free was left by a killed process, and is removed."""
    _sweep(path)
    folder, lock = _locked_folder(path)
    try:
        yield folder / "file"
    finally:
        lock.close()
        shutil.rmtree(folder, ignore_errors=True)


def _locked_folder(path: Path) -> tuple[Path, BinaryIO]:
    while True:
        folder = Path(tempfile.mkdtemp(".tmp", f".{path.name}.", path.parent))
        # Another process may sweep the folder before it is locked.
        with suppress(FileNotFoundError):
            lock = open(folder / _LOCK, "wb")  # noqa: SIM115 (closed by the caller)
            if fcntl:
                # Without locks in this file system, nothing is swept either.
                with suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / _LOCK).exists():
                return folder, lock
            lock.close()


def _sweep(path: Path) -> None:
    """Remove the folders that killed processes have left beside `path`."""
    if fcntl is None:
        return
    name = re.compile(re.escape(f".{path.name}.") + r"[a-z0-9_]+\.tmp")
    # Folders of other users, and held locks, raise OSError.
    with suppress(OSError):
        for folder in [each for each in path.parent.iterdir() if name.fullmatch(each.name)]:
            with suppress(OSError):
                try:
                    with open(folder / _LOCK, "r+b") as lock:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        shutil.rmtree(folder, ignore_errors=True)
                except FileNotFoundError:
                    # The process was killed before it made its lock, so the folder is empty.
                    folder.rmdir()


def read(path: str | Path, mapped: bool = True) -> File:
    """Map a file into memory, or read it, and check that its metadata is whole.

    Raises:
        ValueError: the file cannot be read, is not a saved cache, was cut short or damaged, or has another format
            version.
    """
    texts, tensors = tensors_file.read(path, mapped)
    found = texts.get(_KEY)
    if found is None:
        raise ValueError(f"{path}: is a safetensors file, but not one that QuantizedCache.save has written")
    try:
        header = json.loads(found)
        version = header["format_version"]
        checksum = header.pop("header_sha256", None)
        is_whole = checksum == _header_sum(header, tensors.items())
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: is damaged: its metadata cannot be read ({error!r})") from None
    if version != FORMAT_VERSION:
        writer = told(header.get("library_version")).strip("'")
        raise ValueError(
            f"{path}: format version {told(version)}, written by hf_kvquant {writer}, cannot be read by hf_kvquant "
            f"{_library_version()}; expected {FORMAT_VERSION}"
        )
    if not is_whole:
        raise ValueError(f"{path}: is damaged: the checksum of its metadata is wrong")
    expected.check(header, lambda: _HEADER, f"{path}: the header")
    return File(path, header, tensors)


class File:
    """The content of a file; its tensors are views of the mapped file until they are written to."""

    def __init__(self, path: str | Path, header: dict, tensors: dict[str, torch.Tensor]):
        self.path, self._header, self._tensors = path, header, tensors
        self.description = header["description"]

    def verify(self) -> None:
        """Check the bytes of every tensor, which reads the whole file.

        Raises:
            ValueError: they differ from those that were written.
        """
        if self._header["tensors_sha256"] != _tensors_sum(self._tensors.items()):
            raise ValueError(f"{self.path}: is damaged: the checksum of its tensors is wrong")

    def state(self, device: torch.device | str) -> object:
        """The state that was written, with tensors and devices on `device`. Call it only once.

        Raises:
            ValueError: the state does not have the form that `pack` makes.
        """
        try:
            state = _unflatten(self._header["state"], self._tensors, torch.device(device))
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: its state cannot be read ({type(error).__name__}: {error})") from None
        if self._tensors:
            raise ValueError(f"{self.path}: its state has no place for the tensors {told(sorted(self._tensors))}")
        return state

    def check_model(self, model: torch.nn.Module | PreTrainedConfig) -> None:
        """Check that this model computed the file's cache; see `identity`.

        Raises:
            ValueError: another model did, or the file does not say.
        """
        saved, given = self.description["model"], identity(model)
        optional = {name: pattern for name, pattern in _OPTIONAL.items() if name in saved}
        expected.check(saved, lambda: _MODEL | optional, f"{self.path}: the model")
        names = saved["config"].keys() | given["config"].keys()
        if self._header["transformers_version"] != host.VERSION:
            # Another version may have other fields.
            names = saved["config"].keys() & given["config"].keys()
        for name in sorted(names):
            was, now = (fields["config"].get(name) for fields in (saved, given))
            if was != now:
                raise ValueError(
                    f"{self.path}: was computed by another model: {name} is {told(was)} in the file, "
                    f"{told(now)} in the config"
                )
        self._check_adapters(saved.get("adapters"), given["adapters"])
        was, now = (of.get("shard", "all of it") for of in (saved, given))
        if was != now and None not in (saved["weights"], given["weights"]):
            raise ValueError(
                f"{self.path}: was computed by another part of the model: {told(was)}, and this process has "
                f"{told(now)}; expected a file of its own for each process"
            )
        if given["weights"] is None or saved["weights"] == given["weights"]:
            return
        if saved["weights"] is None:
            raise ValueError(
                f"{self.path}: does not say which weights computed it; save with save(path, model=model), or load "
                "with model.config instead of the model, which compares the configs only"
            )
        raise ValueError(f"{self.path}: was computed by another model: same config, other weights")

    def _check_adapters(self, saved: dict | None, given: dict | None) -> None:
        if saved is None or given is None or saved == given:
            return
        raise ValueError(f"{self.path}: was computed with other adapters: {adapters_difference(saved, given)}")


def base_model(model: object) -> object:
    """The model inside a wrapper of peft; any other argument as it is."""
    is_wrapper = isinstance(model, torch.nn.Module) and not isinstance(model, PreTrainedModel)
    return model.get_base_model() if is_wrapper and hasattr(model, "get_base_model") else model


def identity(model: torch.nn.Module | PreTrainedConfig) -> dict:
    """The data that tells one model from another: the fields of the text config that may affect cached states and, if
    the model itself is given (or a `PeftModel` around it), a hash over its weights and the active adapters.

    The hash covers shape, dtype and 64 evenly spaced elements of every parameter: it takes milliseconds for any model,
    and differs for a fine-tuned twin. It does not notice a change of a few single elements. If several processes hold
    parts of the model (tensor parallelism), it covers the part of this one, and `shard` says which that is.

    Raises:
        ValueError: the argument is neither a model nor a config, or its weights are not in memory (offloaded to disk)
            or cannot be read.
    """
    base: Any = base_model(model)
    is_model = isinstance(base, PreTrainedModel)
    config = base.config if is_model else model
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"config: a {type(model).__name__} is not allowed; expected a model or its config")
    fields = json.loads(json.dumps(config.get_text_config(decoder=True).to_dict(), default=str))
    shard = host.shard(base) if is_model else None
    return {
        "config": {name: value for name, value in fields.items() if name not in _IRRELEVANT},
        "weights": weights_sum(model) if is_model else None,  # type: ignore[arg-type]  # so is the wrapper
        "adapters": active_adapters(model, base) if is_model else None,
        **({} if shard is None else {"shard": shard}),
    }


def active_adapters(model: Any, base: PreTrainedModel) -> dict[str, dict]:
    """The active adapters of peft in each module, with their scaling, or "merged" if they are part of its weights.

    peft is not imported: a module with adapters is recognised by its bool `disable_adapters`, which peft's all have.
    """
    found = {}
    for name, module in base.named_modules():
        if not isinstance(getattr(module, "disable_adapters", None), bool) or module.disable_adapters:
            continue
        scaling, merged = getattr(module, "scaling", {}), getattr(module, "merged_adapters", [])
        acting = {
            adapter: "merged"
            if adapter in merged
            else _plain(scaling.get(adapter) if isinstance(scaling, dict) else None)
            for adapter in merged or module.active_adapters
        }
        if acting:
            found[name] = acting
    # Prompts and prefixes are kept beside the model, not in one of its modules.
    prompts = getattr(model, "prompt_encoder", {}) if model is not base else {}
    if prompts and not getattr(model, "_adapters_disabled", False):
        found["prompt"] = dict.fromkeys(model.active_adapters)
    return found


def _plain(number: object) -> object:
    return number if number is None or isinstance(number, (bool, int, float, str)) else str(number)


def adapters_difference(saved: dict, given: dict, where: str = "the file") -> str:
    """The first module in which two results of `active_adapters` differ, in words; `where` the first one is from."""
    module = min(name for name in saved.keys() | given.keys() if saved.get(name) != given.get(name))
    was, now = (_told_adapters(adapters.get(module)) for adapters in (saved, given))
    return f"{module} has {was} in {where}, {now} in the model"


def _told_adapters(adapters: object) -> str:
    if not adapters or not isinstance(adapters, dict):
        return "none"
    return ", ".join(
        f"{name!r}"
        if factor is None
        else f"{name!r} (merged)"
        if factor == "merged"
        else f"{name!r} times {told(factor)}"
        for name, factor in adapters.items()
    )


def weights_sum(model: torch.nn.Module) -> str:
    """A hash over the weights, see `identity`; it tells a fine-tuned twin.

    Raises:
        ValueError: weights that are not in memory or cannot be read.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        try:
            _add_weights(digest, parameter)
        except _NotInMemory:
            raise ValueError(
                f"model: the weights of {name} are not in memory; give model.config instead of the model"
            ) from None
        # A tensor subclass may refuse to be read, with any error.
        except Exception as error:
            raise ValueError(
                f"model: the weights of {name}, a {type(parameter).__name__}, cannot be read "
                f"({type(error).__name__}: {str(error)[:200]}); give model.config instead of the model: "
                "save(path, model.config)"
            ) from error
    return digest.hexdigest()


class _NotInMemory(Exception):
    """A tensor on the device "meta"."""


def _add_weights(digest: Any, weights: torch.Tensor) -> None:
    if weights.is_meta:
        raise _NotInMemory
    if is_traceable_wrapper_subclass(weights):
        # Read the inner tensors, because the wrapper may refuse to be read itself.
        names, _ = weights.__tensor_flatten__()
        digest.update(f"{type(weights).__name__} {tuple(weights.shape)} {weights.dtype}".encode())
        for inner in (getattr(weights, name) for name in names):
            if isinstance(inner, torch.Tensor):
                _add_weights(digest, inner)
        return
    elements = weights.detach().reshape(-1)
    # An odd step, so that the samples are not all in one column of a matrix.
    step = len(elements) // _SAMPLES | 1
    sample = elements[::step].contiguous().cpu().view(torch.uint8)
    digest.update(f"{tuple(weights.shape)} {weights.dtype}".encode())
    digest.update(sample.numpy())


def pack(state: object) -> tuple[object, dict[str, torch.Tensor]]:
    """A state as plain data, and its tensors by name, for `write`.

    Args:
        state: dicts, lists, tuples, tensors, dtypes, devices and plain values, nested.

    Raises:
        ValueError: something in `state` is of another type.
    """
    tensors: dict[str, torch.Tensor] = {}
    return _flatten(state, "", tensors), tensors


def _flatten(value: object, name: str, tensors: dict[str, torch.Tensor]) -> object:
    """`value` as plain data; its tensors go to `tensors`."""
    if isinstance(value, torch.Tensor) and value.dtype in _DTYPES.values():
        tensor = value.detach().cpu().contiguous()
        # safetensors refuses to write the same memory twice.
        is_shared = tensor.data_ptr() in {other.data_ptr() for other in tensors.values()}
        tensors[name] = tensor.clone() if is_shared else tensor
        return {"tensor": name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype) and value in _DTYPES.values():
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_flatten(x, f"{name}.{i}", tensors) for i, x in enumerate(value)]}
    if isinstance(value, dict):
        prefix = f"{name}." if name else ""
        return {"dict": [[key, _flatten(x, f"{prefix}{key}", tensors)] for key, x in value.items()]}
    raise ValueError(f"{name}: a {type(value).__name__} cannot be saved; expected tensors and plain values")


def _unflatten(value: object, tensors: dict[str, torch.Tensor], device: torch.device) -> object:
    """The inverse of `_flatten`; removes each tensor from `tensors`, so that none is used twice."""
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return tensors.pop(content).to(device)
    if kind == "dtype":
        return _DTYPES[content]
    if kind == "device":
        return device
    if kind == "dict":
        if not all(type(key) in (int, str) for key, _ in content):
            raise ValueError("a key is neither an integer nor a string")
        return {key: _unflatten(x, tensors, device) for key, x in content}
    return {"list": list, "tuple": tuple}[kind](_unflatten(x, tensors, device) for x in content)


def _tensors_sum(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors, key=lambda named: named[0]):
        # Flat, because a tensor without dimensions has no view as bytes.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # arrays are buffers
    return digest.hexdigest()


def _header_sum(header: dict, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    table = sorted((name, str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors)
    # Through JSON and back, because the reader computes the sum from parsed JSON.
    plain = json.loads(json.dumps([header, table]))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if path.is_dir() and os.name == "nt":
        # Windows cannot open folders.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _library_version() -> str:
    try:
        return metadata.version("hf_kvquant")
    except metadata.PackageNotFoundError:
        return "of a source folder"
