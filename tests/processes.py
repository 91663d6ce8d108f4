"""The environment of Python processes that tests start."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Python imports the `sitecustomize` of the first folder on its path at its start.
_LIGHT = ROOT / "tests" / "light"


def environment(*shown: str, **variables: str) -> dict[str, str]:
    """That of a process that finds the installed package, not the source folder, and starts in two thirds of the time:
    without the packages that transformers imports only because they are installed, such as hqq, which imports torch's
    compiler; but `shown` ones are there. `variables` are set, too."""
    folders = [_LIGHT, *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "SHOWN": ",".join(shown), **variables}
