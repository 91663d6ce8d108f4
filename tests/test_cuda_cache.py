"""Compiling CUDA kernels with NVRTC, which needs no GPU, and keeping them on disk.

The kernels here are stand-ins in a temporary folder, so that a test can break or change them.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3Config
from typer.testing import CliRunner

from hf_kvquant import KVQuantConfig, QuantizedCache, QuantSpec, ops
from hf_kvquant.backends import cuda, disk_cache, nvrtc
from hf_kvquant.backends.arguments import DTYPES
from hf_kvquant.backends.specialisation import for_source, specialisation, value_shares
from hf_kvquant.cli import app, build

needs_nvrtc = pytest.mark.skipif(nvrtc.missing() is not None, reason=f"{nvrtc.missing()}")

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
HEADER = "#pragma once\nconstexpr float kFactor = 2.0f;\n"
KERNEL = """
#include "kvquant/factor.h"
#include "cuda/twice.h"
extern "C" __global__ void __launch_bounds__(KVQUANT_THREADS) decode_attention_kernel(float* x) {
  __shared__ float s[KVQUANT_HEAD_DIM];
  s[threadIdx.x % KVQUANT_HEAD_DIM] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = twice(kFactor * s[0]);
}
extern "C" __global__ void merge_splits_kernel(float* x) { x[0] = KVQUANT_K_FORMAT; }
extern "C" { __constant__ int decode_attention_kernel_launch[2] = {KVQUANT_THREADS, KVQUANT_HEAD_DIM}; }
"""
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) decode_attention_kernel(float* x) {
  float a[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) a[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) x[(63 - i) * 1024 + threadIdx.x] = a[i] * a[63 - i] + a[(i * 7) % 64];
}
"""


def some_kind(k="int8", head_dim=64):
    k = QuantSpec(k).resolve(head_dim)
    return specialisation(2, k, QuantSpec("fp8").resolve(head_dim), head_dim, head_dim)


@pytest.fixture
def kernels(tmp_path, monkeypatch) -> Path:
    """A folder of stand-in kernels, and an empty cache."""
    folder = tmp_path / "kernels"
    (folder / "cuda").mkdir(parents=True)
    (folder / "include" / "kvquant").mkdir(parents=True)
    (folder / "include" / "kvquant" / "factor.h").write_text(HEADER)
    (folder / "cuda" / "twice.h").write_text("__device__ float twice(float x) { return x + x; }\n")
    (folder / "cuda" / "decode_attention.cu").write_text(KERNEL)
    monkeypatch.setenv(disk_cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(nvrtc, "source_folder", lambda: folder)
    monkeypatch.setattr(disk_cache, "_said", set())
    nvrtc._sources_hash.cache_clear()
    yield folder
    nvrtc._sources_hash.cache_clear()


def compiled(kind=None, arch="sm_90") -> nvrtc.Compiled:
    return nvrtc.compiled("decode_attention.cu", kind or some_kind(), arch)


def kept() -> list[Path]:
    return sorted(disk_cache.folder().iterdir()) if disk_cache.folder().exists() else []


@needs_nvrtc
class TestCompiling:
    def test_code_and_usage(self, kernels):
        found = compiled()
        assert found.cubin[:4] == b"\x7fELF"
        assert not found.cached
        usage = found.usage
        assert set(usage) == {"decode_attention_kernel", "merge_splits_kernel"}
        assert usage["decode_attention_kernel"].shared == 64 * 4
        assert usage["merge_splits_kernel"].shared == 0
        assert all(0 < u.registers <= 255 and u.spills == u.stack == 0 for u in usage.values())
        assert found.launches == {"decode_attention_kernel": nvrtc.Launch(threads=128, shared_bytes=64)}

    def test_spills_are_counted(self, kernels):
        (kernels / "cuda" / "decode_attention.cu").write_text(SPILLING)
        usage = compiled().usage["decode_attention_kernel"]
        assert usage.spills > 0
        assert usage.registers <= 32

    def test_an_error_names_the_specialisation_and_shows_the_log(self, kernels):
        (kernels / "cuda" / "twice.h").write_text("__device__ float twice(float x) { return y; }\n")
        with pytest.raises(nvrtc.CompileError) as error:
            compiled()
        text = str(error.value)
        assert "bfloat16, head_dim 64, keys int8 token 64, values fp8 token 64" in text
        assert "sm_90" in text
        assert 'identifier "y" is undefined' in text
        assert not kept()

    def test_headers_of_the_current_folder_are_not_taken(self, kernels, tmp_path, monkeypatch):
        (tmp_path / "here" / "cuda").mkdir(parents=True)
        (kernels / "cuda" / "twice.h").rename(tmp_path / "here" / "cuda" / "twice.h")
        monkeypatch.chdir(tmp_path / "here")
        with pytest.raises(nvrtc.CompileError, match=r"twice\.h"):
            compiled()

    def test_architectures(self):
        assert {"sm_80", "sm_86", "sm_89", "sm_90"} <= set(nvrtc.architectures())
        assert nvrtc.architecture(9, 0) == "sm_90"
        assert nvrtc.architecture(8, 6) == "sm_86"
        assert nvrtc.architecture(8, 8) in ("sm_86", "sm_88")
        with pytest.raises(RuntimeError, match=r"compute capability 7\.5 is not supported"):
            nvrtc.architecture(7, 5)


@needs_nvrtc
class TestKept:
    def test_the_second_time_it_is_read(self, kernels):
        first, second = compiled(), compiled()
        assert (first.cached, second.cached) == (False, True)
        assert (first.cubin, first.usage, first.launches) == (second.cubin, second.usage, second.launches)
        assert len(kept()) == 1

    def test_whatever_it_depends_on_makes_another_file(self, kernels, monkeypatch):
        compiled()
        assert not compiled(some_kind("int4")).cached
        assert not compiled(arch="sm_80").cached
        header = kernels / "include" / "kvquant" / "factor.h"
        header.write_text(HEADER.replace("2.0f", "3.0f"))
        nvrtc._sources_hash.cache_clear()
        assert not compiled().cached
        monkeypatch.setitem(nvrtc.SOURCES, "decode_attention.cu", {"fma": False})
        assert not compiled().cached
        monkeypatch.setattr(nvrtc, "version", lambda: (99, 0))
        assert not compiled().cached
        assert len(kept()) == 6
        assert compiled().cached

    @pytest.mark.parametrize("damage", ["cut short", "empty", "one bit of the code", "one bit of the facts"])
    def test_a_damaged_file_is_compiled_anew_and_said_once(self, kernels, damage):
        first = compiled()
        (file,) = kept()
        content = bytearray(file.read_bytes())
        if damage == "cut short":
            content = content[: len(content) // 2]
        elif damage == "empty":
            content = b""
        else:
            content[-1000 if "code" in damage else content.index(b"registers") + 13] ^= 1
        file.write_bytes(content)
        with pytest.warns(RuntimeWarning, match="cut short or damaged; it is compiled anew"):
            again = compiled()
        assert not again.cached
        assert again.cubin == first.cubin
        assert compiled().cached
        file.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not compiled().cached

    def test_where_nothing_can_be_kept_it_still_compiles(self, kernels, tmp_path, monkeypatch):
        (tmp_path / "a file").write_text("")
        monkeypatch.setenv(disk_cache.CACHE_VARIABLE, str(tmp_path / "a file" / "cache"))
        with pytest.warns(RuntimeWarning, match="cannot be kept"):
            compiled()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not compiled().cached

    def test_until_a_file_is_whole_the_old_one_is_read(self, kernels, monkeypatch):
        disk_cache.write("key", {"n": 1}, b"old")
        rename, seen = os.replace, []

        def watched(*names):
            seen.append(disk_cache.read("key"))
            rename(*names)

        monkeypatch.setattr(os, "replace", watched)
        disk_cache.write("key", {"n": 2}, b"new")
        assert seen == [({"n": 1}, b"old")]
        assert disk_cache.read("key") == ({"n": 2}, b"new")

    def test_a_failed_write_leaves_nothing(self, kernels, monkeypatch):
        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.warns(RuntimeWarning, match="No space left"):
            compiled()
        assert not kept()

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_processes_that_compile_at_once_agree(self, kernels):
        """Three processes wait for each other; then each compiles and reads the same kernels."""
        fork = multiprocessing.get_context("fork")
        barrier, results = fork.Barrier(3), fork.Queue()

        def work():
            warnings.simplefilter("error")
            found = []
            for head_dim in HEAD_DIMS:
                barrier.wait(60)
                found.append(compiled(some_kind(head_dim=head_dim)))
                found.append(compiled(some_kind(head_dim=head_dim)))
            results.put([(f.cached, f.cubin) for f in found])

        processes = [fork.Process(target=work) for _ in range(3)]
        for process in processes:
            process.start()
        every = [results.get(timeout=100) for _ in processes]
        for process in processes:
            process.join(60)
        codes = [[code for _, code in result] for result in every]
        assert codes == codes[:1] * 3
        assert len(set(codes[0])) == len(HEAD_DIMS)
        assert all(cached for result in every for cached, _ in result[1::2])
        # They ran at the same time: more than one process compiled a kernel.
        assert sum(not cached for result in every for cached, _ in result) > len(HEAD_DIMS)
        assert len(kept()) == len(HEAD_DIMS)
        assert all(file.suffix == ".cubin" for file in kept())


APPEND = 'extern "C" __global__ void quantize_append_kernel(float* x) { x[0] = x[1] * x[2] + KVQUANT_DTYPE; }\n'


def run_build(*arguments: str, code: int = 0, columns: int = 200) -> str:
    result = CliRunner().invoke(app, ["build", *arguments], env={"COLUMNS": str(columns), "NO_COLOR": "1"})
    assert result.exit_code == code, result.output
    return result.output


@needs_nvrtc
class TestBuild:
    @pytest.fixture(autouse=True)
    def append(self, kernels):
        (kernels / "cuda" / "quantize_append.cu").write_text(APPEND)

    def test_presets_are_compiled_once(self):
        text = run_build("int8", "fp8", "--arch", "sm_90", "--arch", "sm_80", "--head-dim", "96")
        # Two presets, two architectures, two source files; attention for blocks of 8 rows and of 16.
        assert "12 compiled, 0 found" in text
        assert len(kept()) == 12
        for row in ("sm_80", "sm_90"):
            for kernel, n in (("decode_attention", 4), ("merge_splits", 4), ("quantize_append", 2)):
                assert len(re.findall(rf"{row} .* {kernel} ", text)) == n
        assert "bfloat16, head_dim 96, keys int8 channel 64, values int8 token 96" in text
        again = run_build("int8", "fp8", "--arch", "sm_90", "--head-dim", "96")
        assert "0 compiled, 6 found" in again
        assert "cached" in again
        specs = [s.resolve(96) for s in KVQuantConfig.preset("int8").for_layer(0)]
        assert compiled(specialisation(2, *specs, 96, 96)).cached

    def test_pages_are_compiled_too(self):
        text = run_build("int8", "--arch", "sm_90", "--head-dim", "64", "--page-size", "128")
        assert "6 compiled" in text
        specs = [s.resolve(64) for s in KVQuantConfig.preset("int8").for_layer(0)]
        kind = specialisation(2, *specs, 64, 64, page_length=128)
        assert str(kind) in text and str(kind).endswith("8 rows, pages of 128")
        assert compiled(kind).cached

    @pytest.mark.parametrize("preset", ["int8", "fp8", "other grids"])
    def test_latents_are_compiled_too(self, preset, monkeypatch, tmp_path):
        """The kinds that a step over latents and rotary keys asks for, and no others."""
        if preset == "other grids":
            config = KVQuantConfig.from_dict(KVQuantConfig.preset("int8").to_dict() | {"rotary_keys": "values"})
            preset = str(tmp_path / "mine.yaml")
            config.to_yaml(preset)
        text = run_build(preset, "--arch", "sm_90", "--latents", "64/32")
        compiled_kernels = len(kept())
        model = DeepseekV3Config(num_hidden_layers=1, kv_lora_rank=64, qk_rope_head_dim=32)
        cache = QuantizedCache(model, preset, max_length=80)
        asked = []

        class Device:
            @staticmethod
            def launch(kernels, kind, *_, **__):
                asked.extend((kernel, kind) for kernel in kernels)

        class Backend:
            reads_rotary_keys = staticmethod(cuda.reads_rotary_keys)
            decode_attention, quantize_append = (
                staticmethod(functools.partial(call, device=Device))
                for call in (cuda.decode_attention, cuda.quantize_append)
            )

        monkeypatch.setattr(ops, "_implementation", lambda *_: Backend)
        latents, rotary = torch.randn(1, 1, 71, 64).bfloat16(), torch.randn(1, 1, 71, 32).bfloat16()
        cache.update(latents[:, :, :70], rotary[:, :, :70], 0)
        cache.enable_fused()
        states = cache.update(latents[:, :, 70:], rotary[:, :, 70:], 0)
        query = torch.randn(1, 16, 1, 96).bfloat16()
        ops.latent_attention(query[..., :64], query[..., 64:], *states, scaling=0.1)
        assert {kernel for kernel, _ in asked} == set(nvrtc.KERNELS)
        for kernel, kind in asked:
            assert nvrtc.compiled(nvrtc.KERNELS[kernel], kind, "sm_90").cached
        assert len(kept()) == compiled_kernels and f"{compiled_kernels} compiled" in text

    def test_it_fits_80_columns(self):
        arguments = ("int8", "int4-small", "--arch", "sm_120", "--head-dim", "128")
        text = run_build(*arguments, columns=80)
        # The last line holds the path of a folder and is not wrapped, so that it can be copied.
        tables, _, _ = text.partition("6 compiled")
        assert max(map(len, tables.splitlines())) <= 80
        # Nothing is cut short or left out: a wider terminal shows the same words.
        again = run_build(*arguments, columns=80).partition("0 compiled")[0]
        wide = run_build(*arguments, columns=200).partition("0 compiled")[0]
        assert re.sub("[\\s─]+", " ", again) == re.sub("[\\s─]+", " ", wide)
        assert "…" not in tables
        assert len(re.findall("sm_120 .*decode_attention", tables)) == 4

    def test_layers_that_differ_are_compiled_too(self, tmp_path):
        config = {"keys": {"format": "int8"}, "values": {"format": "int8"}, "layers": {3: {"keys": {"format": "fp8"}}}}
        KVQuantConfig.from_dict(config).to_yaml(tmp_path / "mine.yaml")
        text = run_build(str(tmp_path / "mine.yaml"), "--arch", "sm_90", "--head-dim", "64", "--dtype", "float16")
        assert "6 compiled" in text
        assert "float16, head_dim 64, keys fp8 token 64, values int8 token 64" in text

    def test_a_kernel_that_does_not_compile_is_shown_and_the_others_are_kept(self, kernels):
        (kernels / "cuda" / "quantize_append.cu").write_text("#if KVQUANT_K_FORMAT == 1\nbroken\n#endif\n" + APPEND)
        text = run_build("int8-plain", "fp8", "--arch", "sm_90", "--head-dim", "64", code=1)
        assert "5 compiled" in text
        assert "failed: quantize_append.cu for sm_90 (bfloat16, head_dim 64, keys fp8 token 64" in text
        assert "broken" in text

    def test_without_names_it_takes_the_presets_that_fit(self):
        assert build.presets_for([64, 128], [(512, 64)]) == KVQuantConfig.preset_names()
        assert set(KVQuantConfig.preset_names()) - set(build.presets_for([128, 96], [])) == {"int3", "int2"}
        assert build.presets_for([], [(512, 32)]) == build.presets_for([96], [])
        text = run_build("--arch", "sm_90", "--head-dim", "96")
        assert "keys int8 channel 64, " in text and "int3" not in text and "int2" not in text

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (["int8"], "--arch: there is no GPU"),
            (["--arch", "sm_70"], r"--arch: 'sm_70' is not supported; NVRTC \d+\.\d+ knows sm_80"),
            (["int9", "--arch", "sm_90"], "int9"),
            (["--head-dim", "56", "--arch", "sm_90"], "head_dim: 56 is not supported by the CUDA kernels"),
            (["--head-dim", "272", "--arch", "sm_90"], "head_dim: 272 is not supported by the CUDA kernels"),
            (["--dtype", "float64", "--arch", "sm_90"], "--dtype: 'float64' is not supported"),
            (["--latents", "512", "--arch", "sm_90"], "--latents: '512' is not allowed; expected two numbers"),
            (["--latents", "520/64", "--arch", "sm_90"], "head_dim: 520 is not supported by the CUDA kernels"),
        ],
    )
    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_wrong_use_is_one_clear_line(self, arguments, match):
        text = run_build(*arguments, code=2)
        assert re.search(match, " ".join(text.replace("│", " ").split()))
        assert not kept()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert "pip install cuda-core 'cuda-bindings==13.*' 'nvidia-cuda-nvrtc==13.*'" in nvrtc.missing()
    assert "pip install cuda-core" in " ".join(run_build("--arch", "sm_90", code=2).replace("│", " ").split())
    assert "pip install cuda-core" in cuda.info()["compiler"]
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "'cuda-bindings==12.*' 'nvidia-cuda-nvrtc-cu12'" in nvrtc.missing()


class TestFolder:
    @pytest.fixture(autouse=True)
    def nowhere(self, monkeypatch):
        for name in (disk_cache.CACHE_VARIABLE, "XDG_CACHE_HOME", "LOCALAPPDATA"):
            monkeypatch.delenv(name, raising=False)

    def test_named(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert disk_cache.folder() == tmp_path / "xdg" / "hf_kvquant"
        monkeypatch.setenv(disk_cache.CACHE_VARIABLE, str(tmp_path / "mine"))
        assert disk_cache.folder() == tmp_path / "mine"

    @pytest.mark.parametrize("xdg", ["", "relative/path"])
    def test_by_the_systems_rules(self, monkeypatch, xdg):
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
        monkeypatch.setattr(sys, "platform", "linux")
        assert disk_cache.folder() == Path.home() / ".cache" / "hf_kvquant"

    def test_on_windows(self, monkeypatch, tmp_path):
        monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
        monkeypatch.setattr(sys, "platform", "win32")
        assert disk_cache.folder() == tmp_path / "hf_kvquant" / "cache"


class TestSpecialisation:
    def test_equal_arguments_give_the_same_object(self):
        assert some_kind() is some_kind()
        assert some_kind("int4") != some_kind()
        assert hash(some_kind("int4")) != hash(some_kind())

    def test_every_field_of_a_side_is_in_it(self):
        channel = QuantSpec("int4", "channel", block_length=128)
        rotated = QuantSpec("int8", group_size=32, rotate=True)
        kind = specialisation(1, channel, rotated, 192, 128)
        assert kind == {
            "KVQUANT_DTYPE": 1, "KVQUANT_HEAD_DIM": 192, "KVQUANT_V_HEAD_DIM": 128,
            "KVQUANT_K_FORMAT": 2, "KVQUANT_K_GRID": 1, "KVQUANT_K_GROUP": 128, "KVQUANT_K_ROTATE": 0,
            "KVQUANT_V_FORMAT": 0, "KVQUANT_V_GRID": 0, "KVQUANT_V_GROUP": 32, "KVQUANT_V_ROTATE": 1,
            "KVQUANT_SPLIT": 16384, "KVQUANT_UNIT": 256, "KVQUANT_BLOCKS": 256, "KVQUANT_THREADS": 128,
            "KVQUANT_ROWS": 8,
        }  # fmt: skip
        assert str(kind) == "float16, head_dim 192/128, keys int4 channel 128, values int8 token 32 rotated, 8 rows"
        many = specialisation(1, channel, rotated, 192, 128, 16)
        assert for_source("decode_attention.cu", kind) == [kind, many] and many["KVQUANT_ROWS"] == 16
        assert for_source("quantize_append.cu", kind) == [kind]
        # 16 rows of wide heads with values on the channel grid would spill.
        for head_dim, taken in ((192, [8, 16]), (256, [8])):
            wide = specialisation(1, rotated, channel, 64, head_dim)
            assert [each["KVQUANT_ROWS"] for each in for_source("decode_attention.cu", wide)] == taken
        dense = specialisation(1, QuantSpec("dense"), QuantSpec("dense"), 64, 64)
        assert str(dense) == "float16, head_dim 64, keys dense, values dense, 8 rows"

    def test_an_unsupported_head_dim_is_named(self):
        assert some_kind(head_dim=48)
        for head_dim in (264, 272, 320, 528):
            with pytest.raises(ValueError, match=rf"head_dim: {head_dim} is not .*a multiple of 16 up to 256, or 512"):
                some_kind(head_dim=head_dim)
        channel = QuantSpec("int8", "channel").resolve(256)
        with pytest.raises(ValueError, match=r"values head_dim: 256 on the channel grid .* 512; expected at most 192"):
            specialisation(2, QuantSpec("dense"), channel, 512, 256)

    @pytest.mark.parametrize("format", ["int3", "int2"])
    def test_few_bits_need_whole_words(self, format):
        keys, values = QuantSpec(format, "channel"), QuantSpec(format, rotate=True)
        assert specialisation(2, keys, values.resolve(64), 192, 64)
        for head_dims, refused in (((96, 64), "96 .* for keys"), ((64, 80), "80 .* for values")):
            with pytest.raises(ValueError, match=rf"head_dim: {refused} of {format}; expected a multiple of 64"):
                specialisation(2, keys, values.resolve(head_dims[1]), *head_dims)
        grouped = QuantSpec(format, group_size=32)
        with pytest.raises(ValueError, match=f"group_size: 32 .* for values of {format}; expected a multiple of 64"):
            specialisation(2, keys, grouped, 128, 128)

    def test_float32_has_8_rows(self):
        kind = specialisation(DTYPES[torch.float32], QuantSpec("dense"), QuantSpec("dense"), 64, 64)
        assert [each["KVQUANT_ROWS"] for each in for_source("decode_attention.cu", kind)] == [8]

    def test_wide_heads_have_16_rows_and_shares(self):
        kind = some_kind(head_dim=512)
        assert [each["KVQUANT_ROWS"] for each in for_source("decode_attention.cu", kind)] == [16]
        shares = {dtype: [value_shares(DTYPES[dtype], d) for d in (192, 256, 512)] for dtype in DTYPES}
        assert shares == {torch.float16: [1, 1, 4], torch.bfloat16: [1, 1, 4], torch.float32: [1, 4, 8]}
