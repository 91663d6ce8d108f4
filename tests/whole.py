"""WHOLE: tests take whole products of their parameters, as `make whole` does, not a part that shows the same."""

from __future__ import annotations

import os

WHOLE = "WHOLE" in os.environ
