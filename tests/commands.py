"""Calls `hf-kvquant` within the process of a test."""

from __future__ import annotations

from typer.testing import CliRunner

from hf_kvquant.cli import app


def call(*arguments: object, code: int = 0, columns: int = 140):
    """What a command has printed, after its exit status was compared."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": str(columns), "NO_COLOR": "1"})
    assert result.exit_code == code, result.output
    return result
