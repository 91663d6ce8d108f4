"""Specialisations compile for every architecture, without spills and within a register budget.

NVRTC, which users compile with too, needs no GPU. What compiles here is chosen to take two minutes on two cores;
`make cuda` compiles every preset, head_dim, dtype and architecture.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle

import pytest

from hf_kvquant import KVQuantConfig, QuantSpec
from hf_kvquant.backends import disk_cache, nvrtc
from hf_kvquant.backends.arguments import DTYPES
from hf_kvquant.backends.specialisation import Specialisation, specialisation

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
PRESETS = KVQuantConfig.preset_names()

# Registers of a thread, at most, by kernel and largest head_dim. What an SM holds follows: 65536 registers are 3
# blocks of 128 threads at 168, 2 at 255. Raise a number only with a measurement on a GPU that says it is worth it.
BUDGET = {
    "decode_attention_kernel": {128: 168, 192: 255, 256: 255},
    "merge_splits_kernel": {128: 64, 192: 96, 256: 96},
    "quantize_append_kernel": {128: 104, 192: 104, 256: 104},
}
# Bytes of a thread's stack: a few at sm_80, which are no spills.
STACK_BYTES = 16
# Bytes of shared memory of a block, static and dynamic, on the GPUs that have least.
SHARED_BYTES = 99 << 10

everything = "KVQUANT_COMPILE_EVERYTHING" in os.environ
pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=f"{nvrtc.missing()}")


@dataclass(frozen=True)
class Unit:
    arch: str
    k: QuantSpec
    v: QuantSpec
    head_dim: int
    v_head_dim: int
    dtype: str = "bfloat16"

    @property
    def kind(self) -> Specialisation:
        dtype = next(number for dtype, number in DTYPES.items() if str(dtype) == f"torch.{self.dtype}")
        k, v = self.k.resolve(self.head_dim), self.v.resolve(self.v_head_dim)
        return specialisation(dtype, k, v, self.head_dim, self.v_head_dim)

    def __str__(self) -> str:
        return f"{self.arch} {self.kind}"


def unit(arch: str, preset: str, head_dim: int, dtype: str = "bfloat16") -> Unit:
    config = KVQuantConfig.preset(preset)
    return Unit(arch, config.keys, config.values, head_dim, head_dim, dtype)


def chosen() -> list[Unit]:
    """Every preset on every architecture at head_dim 128; every other head_dim, in turn on one of them; what no preset
    has: FP16, dense sides, other groups and blocks, two head dims."""
    dense, fp8, int4 = QuantSpec("dense"), QuantSpec("fp8"), QuantSpec("int4", group_size=32, rotate=True)
    archs, presets = cycle(("sm_80", "sm_90")), cycle(PRESETS)
    return [
        *(unit(arch, preset, 128) for arch in ARCHS for preset in PRESETS),
        *(unit(next(archs), next(presets), head_dim) for head_dim in HEAD_DIMS if head_dim != 128),
        unit("sm_80", "int8", 128, "float16"),
        unit("sm_90", "int4", 64, "float16"),
        Unit("sm_80", dense, fp8, 128, 128),
        Unit("sm_89", fp8, dense, 64, 64),
        Unit("sm_90", dense, dense, 256, 256),
        Unit("sm_80", QuantSpec("int8", "channel", block_length=16), int4, 192, 128),
        Unit("sm_90", QuantSpec("fp8", "channel", block_length=256), QuantSpec("int8", group_size=16), 96, 96),
    ]


def all_of_them() -> list[Unit]:
    formats = [unit(arch, preset, 128).kind for arch in ARCHS[:1] for preset in PRESETS]
    assert len(set(formats)) == len(PRESETS)
    return [
        *(
            unit(arch, preset, head_dim, dtype)
            for arch in ARCHS
            for preset in PRESETS
            for head_dim in HEAD_DIMS
            for dtype in ("bfloat16", "float16")
        ),
        *chosen(),
    ]


UNITS = list(dict.fromkeys(all_of_them() if everything else chosen()))


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    """Futures of every compilation that a test will ask for; they run while the tests wait for the first."""
    asked = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    units = dict.fromkeys(params["unit"] for params in asked if isinstance(params.get("unit"), Unit))
    patch = pytest.MonkeyPatch()
    patch.setenv(disk_cache.CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    yield {
        (unit, source): pool.submit(nvrtc.compiled, source, unit.kind, unit.arch)
        for unit in units
        for source in nvrtc.SOURCES
        if unit.arch in nvrtc.architectures()
    }
    pool.shutdown(cancel_futures=True)
    patch.undo()


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_no_spills_and_within_the_budget(unit, results):
    if unit.arch not in nvrtc.architectures():
        pytest.skip(f"NVRTC {nvrtc.version()} does not know {unit.arch}")
    usage = {}
    for source in nvrtc.SOURCES:
        usage |= results[unit, source].result().usage
    assert set(usage) == set(nvrtc.KERNELS) == set(BUDGET)
    largest = next(limit for limit in (128, 192, 256) if max(unit.head_dim, unit.v_head_dim) <= limit)
    for kernel, used in usage.items():
        assert used.spills == 0, (kernel, used)
        assert used.stack <= STACK_BYTES, (kernel, used)
        assert used.registers <= BUDGET[kernel][largest], (kernel, used)
        dynamic = {"decode_attention_kernel": unit.kind.attention_bytes, "merge_splits_kernel": unit.kind.merge_bytes}
        assert used.shared + dynamic.get(kernel, 0) <= SHARED_BYTES, (kernel, used)


def test_the_chosen_ones_cover_everything_once():
    """Every architecture, head_dim, preset and dtype, whatever the list above becomes."""
    units = chosen()
    assert {unit.arch for unit in units} == set(ARCHS)
    assert {unit.head_dim for unit in units} == set(HEAD_DIMS)
    assert {unit.dtype for unit in units} == {"bfloat16", "float16"}
    for arch in ARCHS:
        kinds = {unit.kind for unit in units if unit.arch == arch}
        assert {specialisation_of(preset) for preset in PRESETS} <= kinds


def specialisation_of(preset: str) -> Specialisation:
    return unit("sm_80", preset, 128).kind


def test_another_size_of_shared_memory_does_not_compile(tmp_path, monkeypatch):
    """The host's count of bytes is compiled into the kernel, which has its own."""
    monkeypatch.setenv(disk_cache.CACHE_VARIABLE, str(tmp_path))
    kind = unit("sm_90", "fp8", 64).kind
    wrong = type(kind)(kind)
    wrong["KVQUANT_ATTENTION_BYTES"] += 16
    with pytest.raises(nvrtc.CompileError, match="the host allocates another size"):
        nvrtc.compiled("decode_attention.cu", wrong, "sm_90")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_nvcc_agrees(tmp_path):
    """The sources are CUDA C++ for the offline compiler too."""
    kind = unit("sm_90", "int4", 64).kind
    folder = nvrtc.source_folder()
    for source in nvrtc.SOURCES:
        command = ["nvcc", "-std=c++17", "-arch=sm_90", "-cubin", "-Xptxas=-v", "-o", str(tmp_path / "out.cubin")]
        command += [f"-D{name}={value}" for name, value in kind.items()]
        command += [f"-I{folder}", f"-I{folder / 'include'}", str(folder / "cuda" / source)]
        command += ["--fmad=false"] * (nvrtc.SOURCES[source].get("fma") is False) + ["--expt-relaxed-constexpr"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        usage = nvrtc.read_usage(done.stderr)
        assert set(usage) == {kernel for kernel, of in nvrtc.KERNELS.items() if of == source}
        assert all(used.spills == 0 for used in usage.values()), usage


def test_the_wheel_carries_the_sources():
    """Every file that a kernel includes is where the installed package looks for it."""
    folder = nvrtc.source_folder()
    assert {file.name for file in (folder / "cuda").glob("*.cu")} == set(nvrtc.SOURCES)
    assert (folder / "include" / "kvquant" / "params.h").is_file()
