"""Compiled kernels on disk, by content hash: one file each, written whole or not at all.

A file is a line with the SHA-256 of the rest, a line of JSON with facts, and the bytes. It is written beside its name
and renamed, so two processes that compile at once both succeed. A file that was cut short or damaged has a wrong
checksum: a warning is given once, and the kernel is compiled anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

CACHE_VARIABLE = "KVQUANT_CACHE_DIR"
_said: set[str] = set()


def folder() -> Path:
    """The folder of compiled kernels: KVQUANT_CACHE_DIR, or `hf_kvquant` in the system's folder for caches."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "hf_kvquant" / "cache"
    # The XDG base directory specification makes relative paths invalid here.
    named = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(named) if os.path.isabs(named) else Path.home() / ".cache") / "hf_kvquant"


def read(key: str) -> tuple[dict, bytes] | None:
    """Facts and bytes that were written under `key`; None if there are none, or (with a warning) they are damaged."""
    file = _file(key)
    try:
        checksum, _, rest = file.read_bytes().partition(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        _say(f"{file}: a compiled kernel cannot be read ({error}); it is compiled anew")
        return None
    if checksum.decode(errors="replace") != hashlib.sha256(rest).hexdigest():
        _say(f"{file}: a compiled kernel is cut short or damaged; it is compiled anew")
        return None
    facts, _, content = rest.partition(b"\n")
    return json.loads(facts), content


def write(key: str, facts: dict, content: bytes) -> None:
    """Keep `content` under `key`. If that is impossible, warn once and keep nothing."""
    file = _file(key)
    rest = json.dumps(facts).encode() + b"\n" + content
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".part")
        with os.fdopen(handle, "wb") as out:
            out.write(hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest)
        os.replace(temporary, file)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        _say(f"{file.parent}: compiled kernels cannot be kept ({error}); set {CACHE_VARIABLE} to a folder of yours")


def _file(key: str) -> Path:
    return folder() / f"{key}.cubin"


def _say(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)
