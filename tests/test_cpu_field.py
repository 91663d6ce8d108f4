"""eval/bench_cpu_field.py where no peer is installed: rows with reasons, checks, refused arguments."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

EVAL = Path(__file__).parents[1] / "eval"
SHAPE = ["--heads", "4", "--kv-heads", "2", "--head-dim", "32", "--lengths", "67", "--batches", "2", "--rounds", "2"]


@pytest.fixture
def field(monkeypatch):
    monkeypatch.syspath_prepend(str(EVAL))
    monkeypatch.delitem(sys.modules, "bench_cpu_field", raising=False)
    return importlib.import_module("bench_cpu_field")


def test_rows_and_reasons(field, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(
        field.KINDS, "vllm-fp8", replace(field.KINDS["vllm-fp8"], packages=("--no-index no-such-package",))
    )
    out = tmp_path / "field.json"
    arguments = [*SHAPE, "--presets", "int8,int4-small", "--peers", "vllm-fp8", "--out", str(out), "--threads", "1"]
    assert field.main([*arguments, "--environments", str(tmp_path / "environments")]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in result["field"]}
    assert set(rows) == {"sdpa-bfloat16", "int8", "int4-small", "vllm-fp8"}
    for name in ("sdpa-bfloat16", "int8", "int4-small"):
        assert rows[name]["ms"]["n"] == 2
    assert rows["int4-small"]["bits_per_element"] < rows["int8"]["bits_per_element"] < 16
    assert "ms" not in rows["vllm-fp8"]
    assert rows["vllm-fp8"]["reason"].startswith("pip install --no-index no-such-package: ERROR: No matching")
    assert "vllm-fp8" in capsys.readouterr().out
    assert all(check["passed"] for check in result["checks"])


def worker(field, monkeypatch, tmp_path, program: str):
    """A peer's process that runs `program` in place of the peer."""
    place = tmp_path / "openvino" / "bin"
    place.mkdir(parents=True)
    (place / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    (place / "python").chmod(0o755)
    (tmp_path / "openvino" / "complete").touch()
    file = tmp_path / "peer.py"
    file.write_text(program, encoding="utf-8")
    monkeypatch.setattr(field, "WORKER", file)
    return field.Worker(field.KINDS["openvino-u8"], tmp_path)


def test_a_peer_that_dies_or_refuses_says_so(field, monkeypatch, tmp_path):
    found = worker(field, monkeypatch, tmp_path, "raise SystemExit(7)")
    with pytest.raises(RuntimeError, match="ended with status 7"):
        found.ask(do="step")


def test_a_peer_that_is_not_installed_answers_with_the_reason(field, monkeypatch, tmp_path):
    source = Path(field.__file__).with_name("field_peer.py").read_text(encoding="utf-8")
    found = worker(field, monkeypatch, tmp_path, "import sys; sys.modules['openvino'] = None\n" + strip_future(source))
    shape = {"batch": 1, "heads": 4, "kv_heads": 2, "head_dim": 32, "length": 5}
    with pytest.raises(RuntimeError, match="openvino"):
        found.ask(do="prepare", peer="openvino", bits=8, threads=1, shape=shape)
    found.close()


def strip_future(source: str) -> str:
    return source.replace("from __future__ import annotations\n", "")


def test_a_wrong_peer_is_refused(field, monkeypatch, tmp_path, capsys):
    class Wrong:
        def __init__(self, *_):
            pass

        def ask(self, **request):
            return {"error": 0.5, "bits": 8.5, "version": "1", "seconds": 1.0}

        def close(self):
            pass

    monkeypatch.setattr(field, "Worker", Wrong)
    assert field.main([*SHAPE, "--presets", "int8", "--peers", "openvino-u8", "--out", str(tmp_path / "x.json")]) == 1
    assert "REFUSED" in capsys.readouterr().out
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("arguments", [["--peers", "cuda"], ["--lengths", "1"], ["--batches", "0"], ["--rounds", "0"]])
def test_refused_arguments(field, arguments, capsys):
    with pytest.raises(SystemExit):
        field.main(arguments)
    assert arguments[0] in capsys.readouterr().err
