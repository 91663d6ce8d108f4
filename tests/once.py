"""Files that compilers write, written once for all test processes of a session."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

# conftest.py names one that the processes share.
folder: Path | None = None


def once(suffix: str, command: Sequence[str], write: Callable[[Path], object]) -> Path:
    """The file that `write` writes, to the path that it is given, the first time that `command` is asked for. The
    command names everything that the file depends on and that may differ within a session."""
    file = (folder or Path(_own().name)) / f"{hashlib.sha256(repr(command).encode()).hexdigest()[:32]}{suffix}"
    if not file.exists():
        # If two processes write it at once, both succeed.
        part = file.with_name(f"{os.getpid()}-{file.name}")
        write(part)
        part.replace(file)
    return file


@lru_cache(maxsize=None)
def _own() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="kvquant-compiled-")
