"""Loads a script of eval/, which is no package, as a module."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

EVAL = Path(__file__).parent.parent / "eval"


def script(name: str) -> ModuleType:
    """A new module of `eval/<name>.py`, for instance "compare" or "tasks/recall"."""
    file = EVAL / f"{name}.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
