"""A safetensors file, opened once: its metadata and its tensors.

The safetensors package opens a file by its name, once for the header and again for the tensors, so that a file that
is replaced meanwhile gives a mixture of two. Here one descriptor serves both. Anything but a regular file is refused,
because opening it might wait, and no number in the header is trusted. The layout
(https://github.com/huggingface/safetensors#format):

    8 bytes   length of the header, little-endian
    header    JSON: {"__metadata__": {name: text}, tensor: {"dtype": .., "shape": [..], "data_offsets": [begin, end]}}
    tensors   their bytes, without gaps
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
from pathlib import Path

import torch

from .message import told

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
# The limit of the safetensors package.
_MAX_HEADER_BYTES = 100_000_000
_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a fifo", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip


def kind(status: os.stat_result) -> str | None:
    """The kind of a path that is not a regular file, in words; None for a regular file."""
    return None if stat.S_ISREG(status.st_mode) else _KINDS.get(stat.S_IFMT(status.st_mode), "not a regular file")


def read(path: str | Path, mapped: bool) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """The metadata and the tensors of a file.

    Args:
        mapped: tensors are views of a memory map whose pages are copied when they are written to, and reading them
            ends the process if the file has become shorter; False reads the whole file into memory.

    Raises:
        ValueError: `path` is no path, or the file cannot be read, or is not a complete safetensors file.
    """
    check_path(path)
    content = _content(path, mapped)
    try:
        return _parse(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: is not a complete safetensors file; it was cut short or is something else ({error})"
        ) from None


def check_path(path: object) -> None:
    """Raise `ValueError` if this cannot name a file."""
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"path: a {type(path).__name__} is not allowed; expected a file's name")


def _content(path: str | Path, mapped: bool) -> mmap.mmap | bytearray:
    try:
        # Opening a fifo waits for a writer, and opening a device may do anything.
        found = kind(os.stat(path))
        if found is None:
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
                status = os.fstat(file.fileno())
                found = kind(status)
                if found is None:
                    if mapped and status.st_size:
                        return mmap.mmap(file.fileno(), status.st_size, access=mmap.ACCESS_COPY)
                    return bytearray(file.read())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    raise ValueError(f"{path}: cannot be read (it is {found}; expected a regular file)")


def _parse(content: mmap.mmap | bytearray) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    length = int.from_bytes(content[:8], "little")
    start = 8 + length
    if len(content) < 8 or length > _MAX_HEADER_BYTES or start > len(content):
        raise ValueError(f"{len(content)} bytes are too few for a header of {length}")
    header = json.loads(content[8:start])
    if not isinstance(header, dict):
        raise ValueError("the header is not a mapping")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("the metadata is not a mapping of strings")
    tensors, end = {}, start
    for name, (begin, stop, dtype, shape) in sorted(
        ((name, _checked(name, entry)) for name, entry in header.items()), key=lambda entry: entry[1][:2]
    ):
        if start + begin != end or start + stop > len(content):
            raise ValueError(f"tensor {told(name)} claims bytes {begin} to {stop} of {len(content) - start}")
        tensors[name] = _tensor(content, end, dtype, shape)
        end = start + stop
    if end != len(content):
        raise ValueError(f"{len(content) - end} bytes do not belong to any tensor")
    return metadata, tensors


def _checked(name: str, entry: object) -> tuple[int, int, torch.dtype, list[int]]:
    """The begin and end of a tensor's bytes, its dtype and its shape, after checking that they fit together."""
    if isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}:
        dtype, shape, offsets = DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
        numbers = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 and len(shape) <= 8
        if dtype is not None and numbers and all(type(x) is int and 0 <= x < 1 << 48 for x in [*shape, *offsets]):
            begin, end = offsets
            if end - begin == math.prod(shape) * dtype.itemsize:
                return begin, end, dtype, shape
    raise ValueError(f"the entry of tensor {told(name)} is not allowed")


def _tensor(content: mmap.mmap | bytearray, offset: int, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    count = math.prod(shape)
    try:
        if not count:
            return torch.empty(shape, dtype=dtype)
        tensor = torch.frombuffer(content, dtype=dtype, count=count, offset=offset).reshape(shape)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    if tensor.data_ptr() % dtype.itemsize:
        raise ValueError(f"a tensor of {dtype} is not aligned")
    # Reading any other byte as a bool is undefined behaviour.
    if dtype == torch.bool and tensor.view(torch.uint8).max() > 1:
        raise ValueError("a bool tensor holds bytes other than 0 and 1")
    return tensor
