"""A model and text that every machine has: the bundled model, and the running interpreter's standard library.

The model was trained on most of the library's source, so it is judged by files that it has not seen. `is_held_out` is
the rule, which `eval/train_model.py` follows too (exact under the Python of the training; others move text between
files). Calibration takes the other files, so that no cache is judged by what it was calibrated on.
"""

from __future__ import annotations

import hashlib
import sysconfig
from importlib import resources
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

BUNDLED = "stdlib-nano"
# Folders that are not the library's, or not typical source: tests and tables.
SKIPPED_FOLDERS = frozenset({
    "site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__",
})  # fmt: skip
_HELD_OUT_ONE_IN = 20


def bundled_model() -> Path:
    """The folder of the small model that ships with the package."""
    return Path(str(resources.files(__package__.partition(".")[0]))) / "models" / BUNDLED


def is_held_out(name: str) -> bool:
    """Whether the bundled model was never trained on a file, named relative to the library with forward slashes. These
    are about 5 % of all files, chosen by the hash of their name."""
    return _digest(name)[0] % _HELD_OUT_ONE_IN == 0


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def held_out_files() -> dict[str, Path]:
    """Files that the bundled model has not seen, by name relative to the library, in an arbitrary but fixed order."""
    return library_files(held_out=True)


def library_files(held_out: bool) -> dict[str, Path]:
    """The library's files that are held out, or all others, by name relative to the library, in a fixed order."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(stdlib).as_posix(): path for path in stdlib.rglob("*.py")}
    # The files of `encodings` are almost copies of each other; folders such as config-3.11-x86_64 describe a machine.
    skipped = SKIPPED_FOLDERS | {"encodings"}
    chosen = [
        name
        for name in files
        if is_held_out(name) == held_out and not skipped & set(name.split("/")) and "-" not in name.partition("/")[0]
    ]
    return {name: files[name] for name in sorted(chosen, key=_digest)}


def windows(
    tokenizer: PreTrainedTokenizerBase, count: int, length: int, held_out: bool = True
) -> tuple[torch.Tensor, list[str]]:
    """`count` pieces of source, token ids `[count, length]` and the file each comes from.

    The first pieces of all files that are long enough come first, then their second pieces, and so on.

    Args:
        held_out: whether the files are held out; if not, they are all others.

    Raises:
        ValueError: this machine does not have enough text.
    """
    bos = _bos(tokenizer)
    step = length - len(bos)
    pieces: list[tuple[int, str, list[int]]] = []
    for name, path in library_files(held_out).items():
        # The first pieces of these files are the result; tokenizing the whole library takes minutes.
        if sum(i == 0 for i, _, _ in pieces) == count:
            break
        ids = tokenizer(_read(path), add_special_tokens=False, verbose=False).input_ids
        pieces += [(i, name, bos + ids[i * step : (i + 1) * step]) for i in range(len(ids) // step)]
    if len(pieces) < count:
        kind = "held-out" if held_out else "other"
        raise ValueError(
            f"the standard library's {kind} source has {len(pieces)} pieces of {length} tokens, not {count}"
        )
    # The sort is stable, so files keep their order.
    pieces = sorted(pieces, key=lambda piece: piece[0])[:count]
    return torch.tensor([ids for _, _, ids in pieces]), [name for _, name, _ in pieces]


def file_windows(tokenizer: PreTrainedTokenizerBase, file: Path, count: int, length: int) -> torch.Tensor:
    """`count` pieces of a text file, evenly spread over it, token ids `[count, length]`.

    Raises:
        ValueError: the file cannot be read as UTF-8, or holds less text.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text: {str(file)!r} cannot be read: {error}") from error
    bos = _bos(tokenizer)
    step = length - len(bos)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    pieces = len(ids) // step
    if pieces < count:
        raise ValueError(f"text: {str(file)!r} holds {pieces} pieces of {length} tokens; expected at least {count}")
    starts = [i * pieces // count * step for i in range(count)]
    return torch.tensor([bos + ids[start : start + step] for start in starts])


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
