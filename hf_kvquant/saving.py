"""A cache as a file: `QuantizedCache.save` and `load`.

One safetensors file. Its tensors are the bytes as they are stored (codes, scales, exact copies), so nothing is rounded
on the way; its metadata is JSON: the config of the cache, what the layers know besides tensors, and what identifies
the model. Two SHA-256 sums, one of the metadata and one of the tensors, tell a damaged file from a whole one.

A file is written beside its final name, flushed to the disk, and renamed: what stood there before is whole until the
new file is. It is read through a memory map whose pages are copied when they are written to, so that a cache can be
used, and even changed, without the file being read as a whole or changed.

Nothing in a file is executed (no pickle).
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from importlib import metadata
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel

FORMAT_VERSION = 1
# All metadata stands under one key, because safetensors writes several in no fixed order.
_KEY = "hf_kvquant_cache"
# Of these fields of a model's config the cached states do not depend, or not in a way that a load could not mend.
_IRRELEVANT = frozenset({
    "_name_or_path", "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label",
    "initializer_range", "label2id", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type",
    "return_dict", "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
_SAMPLES = 64


def write(path: str | Path, description: dict, state: object) -> None:
    """Write a file, as a whole or not at all.

    Args:
        description: plain data (what JSON can hold) for the reader to check before anything else.
        state: dicts, lists, tuples, tensors, dtypes, devices and plain values, nested.

    Raises:
        ValueError: something in `state` is of another type, or `path` is a folder or in none.
        OSError: the disk is full, or may not be written to.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        expected = "a file's name" if path.is_dir() else f"a name in an existing folder, not in {str(path.parent)!r}"
        raise ValueError(f"path: {str(path)!r} is not allowed; expected {expected}")
    tensors: dict[str, torch.Tensor] = {}
    header = {
        "format_version": FORMAT_VERSION,
        "library_version": _library_version(),
        "transformers_version": transformers.__version__,
        "description": description,
        "state": _flatten(state, "", tensors),
        "tensors_sha256": _tensors_sum(tensors.items()),
    }
    header["header_sha256"] = _header_sum(header, tensors.items())
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        # What safetensors makes only its owner can read; this has the permissions of any new file.
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        try:
            save_file(tensors, temporary, {_KEY: json.dumps(header)})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error
        os.chmod(temporary, mode)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | Path) -> File:
    """Map a file into memory, and check that its metadata is whole.

    Raises:
        ValueError: the file cannot be read, is no cache, was cut short or damaged, or has another format version.
    """
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    except SafetensorError as error:
        raise ValueError(
            f"{path}: is no whole safetensors file; it was cut short or is something else ({error})"
        ) from None
    found = (file.metadata() or {}).get(_KEY)
    if found is None:
        raise ValueError(f"{path}: is a safetensors file, but not one that QuantizedCache.save has written")
    try:
        header = json.loads(found)
        version = header["format_version"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: is damaged: its metadata cannot be read ({error!r})") from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {version!r}, written by hf_kvquant {header.get('library_version')}, cannot be "
            f"read by hf_kvquant {_library_version()}; expected {FORMAT_VERSION}"
        )
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    if header.pop("header_sha256", None) != _header_sum(header, tensors.items()):
        raise ValueError(f"{path}: is damaged: the checksum of its metadata is wrong")
    return File(path, header, tensors)


class File:
    """What `read` found; tensors are views of the mapped file until they are written to."""

    def __init__(self, path: str | Path, header: dict, tensors: dict[str, torch.Tensor]):
        self.path, self._header, self._tensors = path, header, tensors
        self.description = header["description"]

    def verify(self) -> None:
        """Read every tensor's bytes.

        Raises:
            ValueError: they are not those that were written.
        """
        if self._header["tensors_sha256"] != _tensors_sum(self._tensors.items()):
            raise ValueError(f"{self.path}: is damaged: the checksum of its tensors is wrong")

    def state(self, device: torch.device | str) -> object:
        """The `state` that was written, with tensors and devices on `device`."""
        return _unflatten(self._header["state"], self._tensors, torch.device(device))

    def check_model(self, model: PreTrainedModel | PreTrainedConfig) -> None:
        """Whether the file's cache was computed by this model; see `identity`.

        Raises:
            ValueError: it was not, or the file does not know.
        """
        saved, given = self.description["model"], identity(model)
        names = saved["config"].keys() | given["config"].keys()
        if self._header["transformers_version"] != transformers.__version__:
            # Another version may know other fields.
            names = saved["config"].keys() & given["config"].keys()
        for name in sorted(names):
            was, now = (fields["config"].get(name) for fields in (saved, given))
            if was != now:
                raise ValueError(
                    f"{self.path}: was computed by another model: {name} is {was!r} in the file, {now!r} in the config"
                )
        if given["weights"] is None or saved["weights"] == given["weights"]:
            return
        if saved["weights"] is None:
            raise ValueError(
                f"{self.path}: does not say which weights computed it; save with save(path, model=model), or load "
                "with model.config instead of the model, which compares the configs only"
            )
        raise ValueError(f"{self.path}: was computed by another model: same config, other weights")


def identity(model: PreTrainedModel | PreTrainedConfig) -> dict:
    """What tells one model from another: the fields of its text config that cached states may depend on, and, given
    the model itself, a hash over its weights.

    The hash is over shape, dtype and 64 numbers, evenly spaced, of every parameter: milliseconds for any model, and
    different for a fine-tuned twin. It does not see a change of a few single numbers, nor activity of adapters.

    Raises:
        ValueError: neither a model nor a config, or weights that are not in memory (offloaded to disk).
    """
    config = model.config if isinstance(model, PreTrainedModel) else model
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"config: a {type(model).__name__} is not allowed; expected a model or its config")
    fields = json.loads(json.dumps(config.get_text_config(decoder=True).to_dict(), default=str))
    relevant = {name: value for name, value in fields.items() if name not in _IRRELEVANT}
    weights = _weights_sum(model) if isinstance(model, PreTrainedModel) else None
    return {"config": relevant, "weights": weights}


def _weights_sum(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"model: the weights of {name} are not in memory; give model.config instead of the model")
        numbers = parameter.detach().reshape(-1)
        # Odd, so that it does not walk along one column of a matrix.
        step = len(numbers) // _SAMPLES | 1
        sample = numbers[::step].contiguous().cpu().view(torch.uint8)
        digest.update(f"{tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.numpy())
    return digest.hexdigest()


def _flatten(value: object, name: str, tensors: dict[str, torch.Tensor]) -> object:
    """`value` as plain data; its tensors go to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        # safetensors refuses to write the same memory twice.
        is_shared = tensor.data_ptr() in {other.data_ptr() for other in tensors.values()}
        tensors[name] = tensor.clone() if is_shared else tensor
        return {"tensor": name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype):
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
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return tensors[content].to(device)
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "device":
        return device
    if kind == "dict":
        return {key: _unflatten(x, tensors, device) for key, x in content}
    items = [_unflatten(x, tensors, device) for x in content]
    return tuple(items) if kind == "tuple" else items


def _tensors_sum(tensors) -> str:
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors, key=lambda named: named[0]):
        # Flat, because a view as bytes needs a dimension.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _header_sum(header: dict, tensors) -> str:
    table = sorted((name, str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors)
    # Through JSON and back, as the reader gets it.
    plain = json.loads(json.dumps([header, table]))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        # Windows opens no folders.
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
