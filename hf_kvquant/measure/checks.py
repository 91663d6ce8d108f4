"""Checks, which come before times: a benchmark lists them, and shows and saves nothing if one failed."""

from __future__ import annotations

import torch

from .tables import print_table


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    """`|x - reference| / |reference|` in Euclidean norms, in float64; NaN and infinity give infinity."""
    x, reference = x.double(), reference.double()
    error = ((x - reference).norm() / reference.norm()).item()
    return error if error == error else float("inf")


def at_most(name: str, what: str, value: float, limit: float) -> dict:
    """One entry of a list of checks."""
    return {"name": name, "check": what, "value": value, "limit": limit, "passed": bool(value <= limit)}


def is_true(name: str, what: str, passed: bool) -> dict:
    return {"name": name, "check": what, "passed": bool(passed)}


def all_passed(checks: list[dict]) -> bool:
    return all(check["passed"] for check in checks)


def refused(checks: list[dict]) -> bool:
    """Whether a check failed. If so, this prints which, and nothing may be timed, printed or saved."""
    failed = [check for check in checks if not check["passed"]]
    if failed:
        print_table(
            f"REFUSED: {len(failed)} of {len(checks)} checks failed, so there are no figures",
            ["name", "check", "value", "limit"],
            [[c["name"], c["check"], _short(c.get("value")), _short(c.get("limit"))] for c in failed],
        )
    return bool(failed)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
