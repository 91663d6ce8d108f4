"""The sdist, and the wheel that is built from it: what they hold, and that the wheel runs alone."""

from __future__ import annotations

import email
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import mach_o
import pytest
from filelock import FileLock

import hf_kvquant
from hf_kvquant.backends import cpu

ROOT = Path(__file__).parent.parent
LOCK = ROOT / ".ci" / "constraints.txt"
# The places of files in the repository, and in the wheel: a longer path decides first.
PLACES = {
    "hf_kvquant/cli/hf_kvquant_entry/": "hf_kvquant_entry/",
    "hf_kvquant/": "hf_kvquant/",
    "configs/": "hf_kvquant/configs/",
    "kernels/": "hf_kvquant/kernels/",
}
USE = """
import hf_kvquant, sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = Path(hf_kvquant.__file__).parent
assert folder.is_relative_to(sys.prefix), folder
model = AutoModelForCausalLM.from_pretrained(folder / "models/stdlib-nano")
inputs = AutoTokenizer.from_pretrained(folder / "models/stdlib-nano")("def read_lines(path):", return_tensors="pt")
assert hf_kvquant.ops.choose_backend("auto", "cpu", model.dtype) == "cpu"
out = model.generate(
    **inputs, max_new_tokens=4, cache_implementation="kvquant-int4", return_dict_in_generate=True
)
print(hf_kvquant.__version__, hf_kvquant.host.cache_of(out).routes["decode_fused"])
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The output of a command; its errors are those of the test."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel that was built from it."""
    if not LOCK.exists():
        pytest.skip("not a checkout")
    # Compiling takes a minute: test processes share the result.
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "dist"
    pins = {"PIP_CONSTRAINT": str(LOCK), "PIP_BUILD_CONSTRAINT": str(LOCK)}
    with FileLock(f"{folder}.lock"):
        if not list(folder.glob("*.whl")):
            folder.mkdir(exist_ok=True)
            # `make test` installs a wheel that it has built in this way.
            made = list(Path(os.environ["DIST"]).glob("*.whl")) if "DIST" in os.environ else []
            kind = ["--sdist"] if made else []
            run(sys.executable, "-m", "build", *kind, "--outdir", folder, ROOT, cwd=folder, **pins)
            for wheel in made:
                shutil.copy(wheel, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.split("\0") if (ROOT / name).is_file()]


def test_the_wheel_holds_the_package_its_presets_and_kernels(wheel):
    expected = {"hf_kvquant/_kvquant_cpu.so"}
    for name in tracked():
        place = next((p for p in PLACES if name.startswith(p)), None)
        if place:
            expected.add(PLACES[place] + name.removeprefix(place))
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    assert names == expected
    assert "hf_kvquant/py.typed" in names


def test_the_sdist_holds_what_a_build_and_the_tests_need(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    left_out = re.compile(r"\.ci/|eval/results/")
    assert {name for name in tracked() if not left_out.match(name)} <= names
    assert not [name for name in names if left_out.match(name)]


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_string(archive.read(name).decode())
    assert metadata["Version"] == hf_kvquant.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_the_changes_begin_with_this_version(wheel):
    with zipfile.ZipFile(wheel) as archive:
        changes = archive.read("hf_kvquant/CHANGELOG.md").decode()
    assert re.findall(r"^## (.+)$", changes, re.MULTILINE)[0] == hf_kvquant.__version__


def runs_alone(wheel: Path, folder: Path) -> None:
    environment = folder / "environment"
    run(sys.executable, "-m", "venv", environment, cwd=folder)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    # What it needs is borrowed from here; its own files, found in other folders, would come later on the path.
    (site,) = environment.glob("lib/python*/site-packages")
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed), encoding="utf-8")
    program = environment / "bin" / "hf-kvquant"
    assert "generate" in run(program, "--help", cwd=folder)
    info = run(program, "info", cwd=folder)
    assert "int4-small" in info
    # A compiler may not know this processor's instruction sets.
    assert re.search(rf"\b{re.escape(cpu.isa())}\b", info), info
    # Three decode steps through four layers.
    assert run(python, "-c", USE, cwd=folder).split()[-2:] == [hf_kvquant.__version__, "12"]


def test_it_runs_where_nothing_else_of_ours_is(wheel, tmp_path):
    runs_alone(wheel, tmp_path)


# The first bytes of the library: ELF with its machine, or Mach-O with its processor.
MACHINES = {
    "x86_64": (b"\x7fELF", 18, (62).to_bytes(2, "little")),
    "aarch64": (b"\x7fELF", 18, (183).to_bytes(2, "little")),
    "arm64": (0xFEEDFACF.to_bytes(4, "little"), 4, 0x0100000C.to_bytes(4, "little")),
}


def loads_on_macos(data: bytes) -> None:
    """Nothing here can run it: what macOS reads before it loads a library is right."""
    library = mach_o.read(data)
    assert library.processor == mach_o.ARM64
    assert library.system == (mach_o.MACOS, 11, 0)
    assert library.needs and all(name.startswith("/usr/lib/") for name in library.needs)
    assert library.is_signed, "macOS ends processes that load unsigned code for ARM"
    source = (ROOT / "kernels" / "cpu" / "api.cc").read_text(encoding="utf-8")
    functions = set(re.findall(r"^KVQUANT_API .*?(\w+)\(", source, re.MULTILINE))
    # The linker adds symbols of its own.
    assert {name for name in library.symbols if name.startswith("kvquant")} == functions


@pytest.mark.skipif("WHEELS" not in os.environ, reason="WHEELS is not set; `make wheels` sets it")
def test_wheels_are_built_for_these_platforms(tmp_path):
    """Those for this machine run, the others hold a library for their processor."""
    wheels = sorted(Path(os.environ["WHEELS"]).glob("*.whl"))
    tags = [wheel.stem.split("-")[2:] for wheel in wheels]
    assert all(tag[:2] == ["py3", "none"] for tag in tags)
    platforms = {tag[2]: wheel for tag, wheel in zip(tags, wheels)}
    assert {name.split("_")[0] for name in platforms} == {"manylinux", "macosx"}
    assert len(platforms) == 4
    for name, wheel in platforms.items():
        machine = next(machine for machine in MACHINES if name.endswith(machine))
        magic, at, code = MACHINES[machine]
        with zipfile.ZipFile(wheel) as archive:
            library = archive.read("hf_kvquant/_kvquant_cpu.so")
        assert library.startswith(magic) and library[at:].startswith(code), name
        if name.startswith("macosx"):
            loads_on_macos(library)
        if machine == platform.machine() and name.startswith("manylinux"):
            (folder := tmp_path / name).mkdir()
            runs_alone(wheel, folder)
