"""The first ten minutes on a GPU, without one: the order of the steps, their limits, and what is kept of each.

The profiler and the sanitizer are stand-ins on the PATH, which run what they are given, as the real ones do; `python`
is one, too. What it stands for gets the same arguments here: the suite on the stand-in machine of test_gpu_suite.py,
and the profiled calls.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import processes
import pytest
from scripts import EVAL
from test_gpu_suite import StandIn, failures

from hf_kvquant.measure.gpu import clock, operator

# Stands for `python`, without its imports; only `info` is the real one. The suite leaves its arguments as its result.
PYTHON = """
import json, pathlib, sys
words = sys.argv[1:]
if words[0] == "-c" and words[2] != "build":
    sys.argv[1:] = words[2:]
    exec(words[1])
elif words[0] == "-c":
    print("12 compiled, 0 found in cache.")
elif words[0].endswith("gpu_suite.py"):
    folder = pathlib.Path(words[words.index("--out") + 1])
    folder.mkdir()
    (folder / "gpu_suite.json").write_text(json.dumps(words[1:]))
else:
    print("1 passed", *words)
"""
SANITIZER = '#!/bin/sh\necho "$2"; shift 4; exec "$@"\n'
PROFILER = """#!/bin/sh
while [ "$1" != details ]; do shift; done; shift
"$@" || exit 3
cat <<END
==PROF== Disconnected from process 7
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","decode_attention_kernel","GPU Speed Of Light Throughput","Duration","us","24.3"
"0","decode_attention_kernel","Occupancy","Achieved Occupancy","%","18.7"
"1","merge_splits_kernel","GPU Speed Of Light Throughput","Duration","us","3.1"
END
"""


@pytest.fixture
def first(monkeypatch):
    """The script, imported as one."""
    monkeypatch.syspath_prepend(str(EVAL))
    return __import__("gpu_first")


@pytest.fixture
def python(tmp_path) -> tuple[str, ...]:
    file = tmp_path / "python.py"
    file.write_text(PYTHON)
    return (sys.executable, "-W", "ignore", str(file))


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    """A folder at the front of the PATH, with nothing in it yet."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", os.pathsep.join((str(folder), os.environ["PATH"])))
    return folder


def put(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def kept(out: Path) -> dict:
    return json.loads((out / "gpu_first.json").read_text(encoding="utf-8"))


def test_all_steps(first, python, tools, tmp_path, capsys, monkeypatch):
    put(tools, "compute-sanitizer", SANITIZER)
    put(tools, "ncu", PROFILER)
    monkeypatch.setenv("PYTHONPATH", processes.environment()["PYTHONPATH"])
    out = tmp_path / "out"
    assert first.main(["--out", str(out)], python) == 0, capsys.readouterr().out
    result = kept(out)
    assert result["complete"]
    steps = {row["step"]: row for row in result["steps"]}
    assert [row["status"] for row in result["steps"]] == ["passed"] * 11
    assert list(steps)[:6] == ["environment", "kernels", "memcheck", "racecheck", "correctness", "attention"]
    assert list(steps)[-1] == "splits"
    assert '"backends"' in (out / "environment.log").read_text()
    assert "racecheck\n1 passed" in steps["racecheck"]["output"]
    assert steps["ncu-int4-131072"]["kernels"] == {
        "decode_attention_kernel": {"Duration": "24.3 us", "Achieved Occupancy": "18.7 %"},
        "merge_splits_kernel": {"Duration": "3.1 us"},
    }
    for name in ("correctness", "attention", "splits"):
        assert json.loads((out / steps[name]["file"]).read_text(encoding="utf-8"))[:2] == ["--out", str(out / name)]
    assert "splits" in capsys.readouterr().out
    written = json.dumps(result)
    assert all(private not in written for private in (str(Path.home()), str(EVAL.parent), str(tmp_path)))


def test_the_suite_takes_its_steps(first, tmp_path, monkeypatch):
    suite = __import__("gpu_suite")
    monkeypatch.setattr(clock, "HOST_CALLS", 2)
    monkeypatch.setattr(operator, "CASES", operator.CASES[:1])
    plan = suite.Plan(
        presets=("fp8",), contexts=(130,), split_contexts=(300,), splits=(64, 128), q_per_kv=(1, 2), kv_heads=2,
        head_dim=32, other_head_dims=(), seconds_per_point=0.01,
    )  # fmt: skip
    for step in first.steps(tmp_path, ("python",)):
        if step.file is None:
            continue
        assert step.command[:2] == ("python", str(EVAL / "gpu_suite.py"))
        assert suite.main(list(step.command[2:]), StandIn(), plan) == 0
        part = json.loads((tmp_path / step.file).read_text(encoding="utf-8"))
        assert part["complete"] and not failures(part)
        assert list(part["rows"]) == [step.name] and part["rows"][step.name]
        assert part["plan"]["seconds"] < step.seconds
    assert step.name == "splits" and part["plan"]["batches"] == [1, 8]
    rows = part["rows"]["splits"]
    # 256 columns are the backend's own, and the first of 64 to be measured.
    assert {(row["batch"], row["columns"], row["is_ours"]) for row in rows} == {
        (batch, columns, columns == 256) for batch in (1, 8) for columns in (64, 128, 256)
    }


def test_the_profiled_calls(first, tmp_path, monkeypatch):
    call, called = first.call, []

    def short(preset, context):
        called.append((preset, context))
        call(preset, 100, device="cpu")

    monkeypatch.setattr(first, "call", short)
    for step in first.steps(tmp_path, ("python",)):
        if step.tool == "ncu":
            script = step.command.index("python") + 1
            assert Path(step.command[script]).samefile(first.__file__)
            assert first.main(list(step.command[script + 1 :])) == 0
    assert called == [("int8", 32768), ("int4", 32768), ("int8", 131072), ("int4", 131072)]


def test_what_is_missing_is_said_and_the_others_go_on(first, python, tools, tmp_path, capsys):
    """There is no profiler; the sanitizer finds a fault."""
    put(tools, "compute-sanitizer", "#!/bin/sh\necho Invalid read; exit 9\n")
    arguments = ["--out", str(tmp_path), "--steps", "kernels,memcheck,ncu-int8-32768"]
    assert first.main(arguments, python) == 1
    kernels, memcheck, profile = kept(tmp_path)["steps"]
    assert kernels["status"] == "passed" and "12 compiled" in kernels["output"]
    assert (memcheck["status"], memcheck["reason"]) == ("failed", "ended with 9")
    assert memcheck["output"] == "Invalid read\n"
    assert (profile["status"], profile["reason"]) == ("skipped", "there is no ncu on the PATH")
    assert "there is no ncu on the PATH" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        first.main(["--out", str(tmp_path), "--steps", "speed"], python)
    assert "--steps: ['speed'] are unknown" in capsys.readouterr().err


def test_a_profiler_that_saw_nothing_has_failed(first, python, tools, tmp_path):
    put(tools, "ncu", "#!/bin/sh\necho '==ERROR== no permission'\n")
    assert first.main(["--out", str(tmp_path), "--steps", "ncu-int8-32768"], python) == 1
    assert kept(tmp_path)["steps"][0]["reason"] == "the profiler saw no kernel"


def test_a_step_ends_at_its_limit_with_all_that_it_started(first, tmp_path):
    """The result before it is there meanwhile, and tells which step runs."""
    seen = tmp_path / "seen.json"
    hangs = f"cp {tmp_path}/gpu_first.json {seen}; sleep 60 & echo $! > {tmp_path}/child; wait"
    steps = [
        first.Step("hangs", 3, ("sh", "-c", hangs)),
        first.Step("short", 30, ("sh", "-c", "echo fine")),
    ]
    began = time.time()
    result = first.run(steps, tmp_path, 60)
    assert time.time() - began < 30
    assert [(row["status"], row.get("reason")) for row in result["steps"]] == [
        ("failed", "ended after 3 s"), ("passed", None),
    ]  # fmt: skip
    assert [row["status"] for row in json.loads(seen.read_text())["steps"]] == ["running"]
    child = int((tmp_path / "child").read_text())
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "Z (zombie)" in status.read_text()
    late = first.run(steps, tmp_path, 0)
    assert [row["reason"] for row in late["steps"]] == ["no time left"] * 2
