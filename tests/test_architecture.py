"""The shape of the project: which modules import which, what an import does, and the top level of the repository."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_kvquant

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_kvquant"

ANYTHING = None
MAY_IMPORT = {
    "host": set(),
    "lazy": set(),
    "message": set(),
    "quantization": {"message"},
    "backends": {"quantization"},
    "backends.arguments": {"quantization", "states"},
    "backends.cpu": {"backends", "backends.arguments", "states"},
    "backends.disk_cache": set(),
    "backends.specialisation": {"backends", "backends.arguments", "quantization"},
    "backends.nvrtc": {"backends", "backends.disk_cache", "backends.specialisation"},
    "backends.gpu": {"backends", "backends.nvrtc", "backends.specialisation"},
    "backends.cuda": {"backends", "quantization", "states"}
    | {f"backends.{m}" for m in ("arguments", "disk_cache", "gpu", "nvrtc", "specialisation")},
    "states": {"quantization", "route"},
    "config": {"quantization", "backends", "message"},
    "reference": {"quantization", "states"},
    "ops": {"reference", "quantization", "backends", "states"},
    "feedback": {"message", "quantization", "tensors_file"},
    "calibration": {"attention", "feedback", "integration", "message"},
    "pages": {"config", "feedback", "ops", "quantization", "states"},
    "tensors_file": {"message"},
    "expected": {"host", "message"},
    "saving": {"expected", "host", "message", "tensors_file"},
    "huge_pages": set(),
    "storage": {"expected", "quantization", "states", "huge_pages"},
    "route": set(),
    "layers": {"config", "expected", "feedback", "grammar", "host", "lazy", "states", "ops", "storage", "route"},
    "axes": set(),
    "recorded": {"axes", "route", "states"},
    "calls": {"axes", "ops", "recorded", "states"},
    "grammar": {"axes", "calls", "recorded", "route", "states"},
    "sliding": {"config", "expected", "layers", "route", "states", "storage"},
    "evicting": {"config", "layers", "route", "sliding", "states", "storage"},
    "static": {"config", "layers", "states", "ops", "storage", "route"},
    "static_sliding": {"config", "expected", "ops", "route", "sliding", "states", "static", "storage"},
    "cross_attention": {"host"},
    "hybrid": {
        "config",
        "evicting",
        "expected",
        "host",
        "layers",
        "route",
        "sliding",
        "static",
        "static_sliding",
        "storage",
    },
    "offloading": {"cross_attention", "host", "layers", "route", "static", "storage"},
    "changes": {"cross_attention", "host", "layers", "route", "static"},
    "cache": {
        "changes",
        "config",
        "cross_attention",
        "evicting",
        "expected",
        "feedback",
        "host",
        "layers",
        "message",
        "offloading",
        "states",
        "static",
        "hybrid",
        "storage",
        "route",
        "saving",
        "sliding",
        "static_sliding",
    },
    "export": {"cache", "host", "static"},
    "latent": {"backends.arguments", "backends.specialisation", "ops", "recorded", "route", "states"},
    "attention": {"axes", "calls", "host", "latent", "ops", "recorded", "route", "states"},
    "allocators": {"config", "host", "ops", "pages", "states"},
    "batching": {"allocators", "config", "feedback", "host", "ops", "route"},
    "waiting": {"allocators", "host"},
    "integration": {
        "batching",
        "cache",
        "changes",
        "attention",
        "config",
        "host",
        "latent",
        "message",
        "route",
        "saving",
        "waiting",
    },
    "scoring": ANYTHING,
    "cli": ANYTHING,
    "": ANYTHING,
}
# The instrument may take anything of the cache, and nothing of the program.
MAY_IMPORT["measure"] = {*MAY_IMPORT, "measure"} - {"cli", ""}
KNOW_TRANSFORMERS = {"host", "cache", "saving", "integration", "scoring", "measure", "cli"}
TOP_LEVEL = {"pyproject.toml", "hf_kvquant", "kernels", "tests", "eval", "configs", "README.md", "Makefile"}
# Packages that must not be imported before they are needed, because they are heavy or optional.
NOT_AT_IMPORT = [
    "lm_eval",
    "datasets",
    "matplotlib",
    "jinja2",
    "typer",
    "rich",
    "cuda",
    "flash_attn",
    "hqq",
    "optimum",
]


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.glob("**/*.py"))}


def listed(name: str) -> str:
    """The module's name in the table, or that of its package if the table lists the whole package."""
    return name if name in MAY_IMPORT else name.partition(".")[0]


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imports(file: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, with dots in full: "hf_kvquant.states", "torch"."""
    package = ["hf_kvquant", *file.relative_to(PACKAGE).parent.parts] if PACKAGE in file.parents else []
    found = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            # `from . import ops` imports a module, `from .states import QuantizedStates` a name.
            found |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            # The rest of an f-string after its first braces is not known: ".backends.{name}" means "backends".
            name = "".join(
                str(getattr(part, "value", "")) for part in getattr(node.args[0], "values", [node.args[0]])[:1]
            )
            found.add(".".join([*package[:1], name.strip(".")]) if name.startswith(".") else name)
    return found


def our_imports(file: Path) -> set[str]:
    """The modules of ours that a file imports; "" is the package itself."""
    names = {
        name.removeprefix("hf_kvquant").lstrip(".") for name in imports(file) if name.split(".")[0] == "hf_kvquant"
    }
    return {name for name in names if name in MODULES} - {""}


class TestImports:
    def test_every_module_is_in_the_table(self):
        assert {listed(name) for name in MODULES} <= set(MAY_IMPORT)

    @pytest.mark.parametrize("name", [name for name in MODULES if MAY_IMPORT.get(listed(name)) is not ANYTHING])
    def test_one_way(self, name):
        allowed = MAY_IMPORT[listed(name)]
        assert {listed(other) for other in our_imports(MODULES[name])} <= allowed
        package_itself = {"hf_kvquant"} & imports(MODULES[name]) - {"hf_kvquant." + other for other in MODULES}
        relative = any(isinstance(n, ast.ImportFrom) and n.level for n in ast.walk(parsed(MODULES[name])))
        assert not package_itself or relative, "import the module that has the name, not the package"

    def test_the_finder_finds(self):
        """The test above would pass on an empty set; these are known to be there."""
        assert our_imports(MODULES["cache"]) == {
            "changes",
            "config",
            "cross_attention",
            "evicting",
            "expected",
            "feedback",
            "host",
            "hybrid",
            "layers",
            "message",
            "offloading",
            "route",
            "saving",
            "sliding",
            "states",
            "static",
            "static_sliding",
            "storage",
        }
        assert our_imports(MODULES["backends.cpu"]) == {"backends", "backends.arguments", "states"}
        assert our_imports(MODULES["ops"]) == {"backends", "quantization", "reference", "states"}
        assert "" not in our_imports(MODULES["cache"])

    @pytest.mark.parametrize("name", MODULES)
    def test_only_the_files_at_the_hosts_border_know_transformers(self, name):
        knows = any(module.split(".")[0] == "transformers" for module in imports(MODULES[name]))
        assert not knows or listed(name) in KNOW_TRANSFORMERS

    @pytest.mark.parametrize("name", MODULES)
    def test_only_ops_names_the_operators(self, name):
        nodes = ast.walk(parsed(MODULES[name]))
        named = any(isinstance(n, ast.Attribute) and ast.unparse(n).startswith("torch.ops.kvquant") for n in nodes)
        assert named == (name == "ops")

    def test_the_cache_never_imports_what_measures_it(self):
        cache = [name for name in MODULES if name.split(".")[0] not in ("measure", "cli")]
        assert len(cache) > 30
        imported = {listed(other) for name in cache for other in our_imports(MODULES[name])}
        assert not imported & {"measure", "cli"}

    def test_scripts_import_what_measures_and_public_names_only(self):
        """And the program, which is public; and no other script."""
        scripts = sorted((ROOT / "eval").rglob("*.py"))
        assert len(scripts) > 10
        public = {f"hf_kvquant.{name}" for name in hf_kvquant.__all__} | {"hf_kvquant.cli", "hf_kvquant.cli.app"}
        for file in scripts:
            names = imports(file)
            ours = {name for name in names if name.startswith("hf_kvquant.")}
            assert not {name for name in ours if not name.startswith("hf_kvquant.measure")} - public, file.name
            assert not names & {script.stem for script in scripts}, file.name

    @pytest.mark.parametrize("folder", ["tests", "eval"])
    def test_scripts_and_tests_use_public_names(self, folder):
        for file in (ROOT / folder).glob("*.py"):
            ours = [name for name in imports(file) if name.startswith("hf_kvquant.")]
            assert not [name for name in ours if any(part.startswith("_") for part in name.split("."))], file.name

    def test_kernels_include_no_framework(self):
        files = [f for f in (ROOT / "kernels").rglob("*") if f.suffix in (".h", ".cc", ".cpp", ".cu", ".cuh")]
        assert files
        for file in files:
            included = re.findall(r"#\s*include\s*[<\"]([^>\"]+)", file.read_text(encoding="utf-8"))
            assert not [name for name in included if name.split("/")[0] in ("torch", "ATen", "c10", "Python.h")], (
                file.name
            )

    @pytest.mark.parametrize("name", MODULES)
    def test_modules_say_what_they_are(self, name):
        assert ast.get_docstring(parsed(MODULES[name])), f"{name} has no docstring"


WATCH = """
import json, sys
watched = ("socket.connect", "socket.getaddrinfo", "socket.bind", "subprocess.Popen", "os.system", "os.exec",
           "os.posix_spawn", "os.fork", "urllib.Request")
seen = []
def hook(event, arguments):
    written = event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax"
    loaded = event == "ctypes.dlopen" and "kvquant" in str(arguments[0])
    if event in watched or written or loaded:
        seen.append([event, repr(arguments)])
import torch, transformers, {host}
before = set(sys.modules)
sys.addaudithook(hook)
import hf_kvquant
print(json.dumps({{
    "seen": seen,
    "modules": sorted(set(sys.modules) - before),
    "cuda": torch.cuda.is_initialized(),
    "threads": __import__("threading").active_count(),
}}))
"""


@pytest.fixture(scope="module")
def fresh() -> dict:
    """The effects of `import hf_kvquant` in a fresh process that has imported torch and transformers before."""
    host = "transformers.cache_utils, transformers.masking_utils, transformers.generation, transformers.modeling_utils"
    code = WATCH.format(host=host)
    # This process's path, wherever the package is installed.
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    # Not in the repository's folder, where Python would import the source instead of the installed package.
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


class TestImportingIsHarmless:
    def test_nothing_is_built_downloaded_or_written(self, fresh):
        assert fresh["seen"] == []

    def test_no_device_is_asked_and_no_thread_started(self, fresh):
        assert not fresh["cuda"]
        assert fresh["threads"] == 1

    def test_nothing_heavy_is_imported(self, fresh):
        assert "hf_kvquant.ops" in fresh["modules"]
        assert not [name for name in fresh["modules"] if name.split(".")[0] in NOT_AT_IMPORT]

    def test_compiled_backends_wait_until_they_are_asked_for(self, fresh):
        assert "hf_kvquant.backends" in fresh["modules"]
        assert not [name for name in fresh["modules"] if name.startswith("hf_kvquant.backends.")]
        later = {f"hf_kvquant.{name}" for name in ("cli", "measure")}
        assert not later & set(fresh["modules"])


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.split("\0")[:-1]


class TestRepository:
    def test_the_top_level_is_fixed(self, tracked):
        names = {name.split("/")[0] for name in tracked}
        assert not {name for name in names if not name.startswith(".")} - TOP_LEVEL

    def test_no_path_of_somebodys_machine(self, tracked):
        home = re.compile(rb"(?<![\w.])/(home|root|Users|work)/\w")
        assert home.search(b"see /" + b"home/someone")
        for name in tracked:
            file = ROOT / name
            content = file.read_bytes() if file.is_file() else b""
            if b"\0" not in content[:8192]:
                found = home.search(content)
                assert not found, f"{name}: {content[found.start() : found.start() + 80]!r}"

    def test_nothing_built_is_tracked(self, tracked):
        built = re.compile(r"\.(so|o|a|dylib|pyc|whl)$|(^|/)(build|dist|__pycache__)/")
        assert not [name for name in tracked if built.search(name)]
