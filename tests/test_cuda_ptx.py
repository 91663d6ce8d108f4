"""What NVRTC makes of kernels/cuda, executed by the PTX machine (ptx_machine.py), equals the reference.

The second proof beside the emulator of the sources, and the only one that sees inline assembly, compile options and
the layout of structs; each is broken once here, and found.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from itertools import product

import numpy as np
import ptx_instructions
import ptx_machine
import ptx_text
import ptxas
import pytest
import test_cuda_attention
import test_cuda_pages
import test_emulator
import test_pages
import torch
from ptx_machine import Device
from ptx_memory import Fault
from test_cpu_backend import left_padding
from test_cuda_append import extreme, same_bytes

from hf_kvquant import KVQuantConfig, QuantSpec, reference
from hf_kvquant.backends import cuda, nvrtc
from hf_kvquant.measure.families import PRESETS

HALF, BFLOAT = torch.float16, torch.bfloat16

pytestmark = pytest.mark.skipif(ptxas.missing() is not None, reason=f"{ptxas.missing()}")


def problem(store, config, *, head_dim=64, dtype=BFLOAT, kv_len=150, batch=1, q_per_kv=4, q_len=1, padding=None):
    """A query, and states of a config, or a preset's name, as its cache stores them, for two KV heads."""
    config = KVQuantConfig.preset(config) if isinstance(config, str) else config
    key, value = (torch.randn(2, batch, 2, kv_len, head_dim) + torch.randn(head_dim)).to(dtype)
    window = dict(recent_length=config.recent_length, sink_length=config.sink_length, padding=padding)
    append = reference.quantize_append
    states = store(key, value, config.keys, config.values, append=append, backend="cuda", **window)
    return torch.randn(batch, 2 * q_per_kv, q_len, head_dim).to(dtype), *states


def check(problem, *rest, device=None, **settings):
    return test_cuda_attention.check(*problem, *rest, device=device or Device(), **settings)


def latents(store, preset, *, rank=512, kv_len=71, num_heads=16, q_len=1):
    """Queries of latents and of rotary keys, and both states as the preset's cache stores them."""
    config = KVQuantConfig.preset(preset)
    keys, values = ((torch.randn(1, 1, kv_len, d) + torch.randn(d)).to(BFLOAT) for d in (rank, 64))
    specs = config.keys, config.keys if config.rotary_keys == "keys" else config.values
    window = dict(recent_length=config.recent_length, sink_length=config.sink_length)
    states = store(keys, values, *specs, append=reference.quantize_append, backend="cuda", **window)
    return *(torch.randn(1, num_heads, q_len, d).to(BFLOAT) for d in (rank, 64)), *states


def check_latents(problem, **how):
    test_cuda_attention.check_latents(*problem, device=Device(), **how)


class TestAttention:
    @pytest.mark.parametrize("preset", PRESETS)
    @pytest.mark.parametrize(("head_dim", "dtype"), [(64, BFLOAT), (128, HALF)], ids=["64-bf16", "128-fp16"])
    def test_presets(self, store, preset, head_dim, dtype):
        sizes = dict(head_dim=head_dim, dtype=dtype)
        check(problem(store, preset, kv_len=600, **sizes))
        check(problem(store, preset, kv_len=71, q_len=3, q_per_kv=3, **sizes))

    @pytest.mark.parametrize(("k_block", "v_block"), [(64, 64), (128, 16), (16, 64)])
    def test_values_on_the_channel_grid(self, store, k_block, v_block):
        int8, int4 = (QuantSpec(f, "channel", block_length=n) for f, n in (("int8", k_block), ("int4", v_block)))
        check(problem(store, KVQuantConfig(int8, int4), kv_len=300))
        sizes = dict(kv_len=150, q_len=5, dtype=HALF)
        check(problem(store, KVQuantConfig(int8, int4, sink_length=4, recent_length=32), **sizes))

    @pytest.mark.parametrize(("k", "v"), [("int3", "int2"), ("int2", "int3")])
    def test_few_bits(self, store, k, v):
        config = KVQuantConfig(QuantSpec(k, "channel"), QuantSpec(v, rotate=True), sink_length=4, recent_length=32)
        check(problem(store, config, head_dim=128, kv_len=300, q_len=2))

    @pytest.mark.parametrize(
        ("preset", "head_dim"), [("int4", 80), ("int8", 96), ("int4", 112), ("fp8", 192), ("int8", 256)]
    )
    def test_head_dims(self, store, preset, head_dim):
        check(problem(store, preset, head_dim=head_dim, kv_len=300))

    @pytest.mark.parametrize("preset", PRESETS)
    def test_latents_and_rotary_keys(self, store, preset):
        check_latents(latents(store, preset))

    def test_latents_of_128_heads(self, store):
        """Eight blocks of 16 rows each."""
        check_latents(latents(store, "int8", num_heads=128))

    def test_latents_under_a_mask_for_each_head(self, store):
        """As the scores of rotary keys that the kernel does not read are given to it."""
        query, latents, _ = problem(store, "int8", head_dim=512, kv_len=71, q_per_kv=16)
        check((query, latents, latents), torch.randn(1, 32, 1, 71))

    @pytest.mark.parametrize("preset", ["int4", "fp8"])
    def test_on_sm_80(self, store, preset):
        check(problem(store, preset, kv_len=300), device=Device("sm_80"))

    @pytest.mark.parametrize("preset", ["int8", "int4"])
    def test_masks(self, store, preset):
        padding = left_padding(170, 70, 3)
        check(problem(store, preset, batch=2, kv_len=170, padding=padding), ~padding)
        hidden = torch.rand(1, 1, 5, 170) < 0.4
        check(problem(store, preset, q_len=5, kv_len=170), ~hidden)
        bias = torch.randn(1, 1, 5, 170).bfloat16().masked_fill(hidden, torch.finfo(BFLOAT).min)
        check(problem(store, preset, q_len=5, kv_len=170), bias, torch.linspace(-3, 6, 8))
        check(problem(store, preset, kv_len=170), softcap=2.5)

    @pytest.mark.parametrize("preset", ["int8", "int4"])
    @pytest.mark.parametrize(("q_per_kv", "q_len"), [(1, 1), (1, 16), (2, 32)])
    def test_many_query_rows(self, store, preset, q_per_kv, q_len):
        check(problem(store, preset, q_per_kv=q_per_kv, q_len=q_len))

    @pytest.mark.parametrize("preset", PRESETS)
    def test_sums_that_are_cut_off(self, store, preset):
        """Tensor cores do not round sums of products; the limits of the error are the same."""
        check(problem(store, preset, kv_len=300), device=Device(truncates=True))


APPENDED = {
    "fp8-channel": KVQuantConfig(keys=QuantSpec("fp8", "channel"), values=QuantSpec("fp8", "channel")),
    "few-bits": KVQuantConfig(keys=QuantSpec("int3", "channel"), values=QuantSpec("int2", rotate=True)),
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", [*PRESETS, *APPENDED])
def test_appended_bytes(store, name, arch):
    config, padding = APPENDED.get(name) or KVQuantConfig.preset(name), left_padding(150, 0, 30)
    key, value = extreme(BFLOAT, 2, 2, 150, 64), extreme(BFLOAT, 2, 2, 150, 64)
    window = dict(
        recent_length=max(config.recent_length, 8), sink_length=5, padding=padding, chunks=(1, 62, 1, 70, 16)
    )
    append = functools.partial(cuda.quantize_append, device=Device(arch))
    got, expected = (
        store(key, value, config.keys, config.values, append=f, **window) for f in (append, reference.quantize_append)
    )
    same_bytes(got, expected)


@pytest.mark.parametrize("name", [*PRESETS, "value blocks", "dense keys"])
def test_attention_and_append_in_pages(name):
    """The tokens of 600 columns lie in five pages; a warp has 192 of them."""
    lengths, config, device = [1, 70, 600], test_pages.CONFIGS[name], Device()
    append = functools.partial(cuda.paged_append, device=device)
    (pool, _), (expected, _) = (test_pages.filled(config, BFLOAT, each, lengths) for each in (append, "reference"))
    assert torch.equal(pool.memory, expected.memory)
    query, states = test_cuda_pages.queries(len(lengths), 3, BFLOAT), pool.layer.states(pool.table(lengths))
    got = test_cuda_pages.paged(query, *states, scaling=0.2, device=device)
    test_cuda_pages.close(got, reference.paged_attention(query, *states, scaling=0.2))


def test_an_append_counts_itself(store):
    """The last of 8 blocks raises the length, which all have read by then."""
    _, *states = problem(store, "int4", batch=2, kv_len=100)
    length, appends, faults = torch.tensor(100), torch.tensor([0, 3]), torch.zeros(2, dtype=torch.int64)
    keys, values = (dataclasses.replace(s, device_length=length) for s in states)
    new = torch.randn(2, 2, 1, 64).bfloat16()
    cuda.quantize_append(new, new, keys, values, faults, start=0, appends=appends, device=Device())
    assert (int(length), appends.tolist(), faults.tolist()) == (101, [0, 4], [0, 0])


# -- planted faults -----------------------------------------------------------------------------------

# The file, the text that is replaced and its replacement, and the message; None: a wrong result. The emulator of the
# sources has code of its own for everything in primitives.h.
PRIMITIVES = "primitives.h"
PLANTED = {
    "operands in another order": (PRIMITIVES, '"f"(high), "f"(low)', '"f"(low), "f"(high)', None),
    "another byte selector": ("codecs.h", "prmt(word, 0, 0x4341)", "prmt(word, 0, 0x4143)", None),
    "another wait": (PRIMITIVES, '::"n"(N)', '::"n"(N + 1)', "on its way"),
    "no commit": (PRIMITIVES, 'asm volatile("cp.async.commit_group;" ::: "memory");', "", "on its way"),
    "no warp barrier": (PRIMITIVES, "{ __syncwarp(); }", "{}", "no barrier since another thread's write"),
    "no block barrier": (PRIMITIVES, "{ __syncthreads(); }", "{ __syncwarp(); }", "nobody wrote|no barrier since"),
    "rows beyond the end": (PRIMITIVES, '"r"(valid ? 16 : 0)', '"r"(16)', "outside of the tensors"),
    "an operand that nobody writes": (PRIMITIVES, '"prmt.b32 %0, %1, %2, %3;"', '""', "which nobody wrote"),
    "no wait for the kernels before": (PRIMITIVES, '"griddepcontrol.wait;"', '""', "before it has waited"),
    "a wait of some threads": (
        "decode_attention.cu",
        "  wait_for_grids();\n  const Place",
        "  if (thread_index() < 64) wait_for_grids();\n  const Place",
        "before it has waited",
    ),
    "merging before attention has ended": (
        "decode_attention.cu",
        "wait_for_grids();\n  const RowMerge",
        "\n  const RowMerge",
        "merge_splits_kernel: `ld.global.* before it has waited",
    ),
    "another matrix": (PRIMITIVES, "m8n8.x4.trans.shared.b16", "m8n8.x4.shared.b16", None),
    "a misaligned row": ("tiles.h", "copy_pieces(mine + i", "copy_pieces(mine + 8 + i", "not aligned"),
    "a field more": ("params.h", "double scaling, softcap;", "double scaling, softcap, spare;", "were given"),
    "fields in another order": ("params.h", "double scaling, softcap;", "double softcap, scaling;", None),
}
# The same, in what only pages have.
PLANTED_IN_PAGES = {
    "the next page": ("pass.h", "tile == begin || column % kPageLength == 0", "tile == begin", None),
    "a column of a page": ("pages.h", "kPaged ? column % kPageLength : column", "column", None),
    "the table of a row": ("pages.h", "batch * pages.table_stride + column", "column", None),
    "the exact copies of a row": ("pages.h", "global_load(pages.exact + batch)", "batch", None),
    "the length of a row before the wait": (
        "decode_attention.cu",
        "wait_for_grids();\n  const Place p(a);",
        "const Place p(a);\n  wait_for_grids();",
        "before it has waited",
    ),
    "the length of a row": ("columns.h", "a.pages.lengths + batch", "a.pages.lengths", None),
    "fields of a table in another order": ("params.h", "table_stride, page_length", "page_length, table_stride", None),
}
# The same, in what only rotary keys have.
PLANTED_IN_ROTARY = {
    "the next block": ("rotary.h", "is_first || column % S::kGroup == 0", "is_first", None),
    "the next tile": ("rotary.h", "next += RowTile::kTileBytes;", "", None),
    "the factors of queries": ("rotary.h", "queries.factors[Lanes::row(r)]", "1.0f", None),
    "the exact copies": (
        "rotary.h",
        "Copies::of<StoredRotary>(p.a.rotary.side",
        "Copies::of<StoredKeys>(p.a.keys",
        None,
    ),
    "the scales": ("rotary.h", "scales(p.a.rotary.side, p,", "scales(p.a.keys, p,", None),
    "another query": ("pass.h", "rotary.prepare();", "", "nobody wrote"),
    "fields in another order": (
        "params.h",
        "int64_t query_stride[3];  // of batch, head and query\n  KvquantSide side;",
        "KvquantSide side;\n  int64_t query_stride[3];",
        None,
    ),
}
# The same, in what only values of three bits have.
PLANTED_IN_HIGH_BITS = {
    "another lane": ("tiles.h", "16 * half + g / 4 * 8", "16 * half + g / 4 * 4"),
    "another shift": ("codecs.h", "word.high << 2, 0x33333333u", "word.high << 3, 0x33333333u"),
}


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Replaces text in a copy of the kernels, which is compiled from then on."""

    def plant(file, before, after):
        shutil.copytree(nvrtc.source_folder(), tmp_path / "kernels")
        path = next((tmp_path / "kernels").rglob(file))
        text = path.read_text()
        assert before in text, before
        path.write_text(text.replace(before, after))
        monkeypatch.setattr(nvrtc, "source_folder", lambda: tmp_path / "kernels")
        monkeypatch.setattr(ptx_machine, "module", ptx_machine.module.__wrapped__)

    return plant


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(store, planted, fault):
    *change, said = PLANTED[fault]
    planted(*change)
    with pytest.raises(Fault if said else AssertionError, match=said):
        check(problem(store, "int8", kv_len=300, q_len=2))


@pytest.mark.parametrize("fault", PLANTED_IN_PAGES)
def test_planted_faults_in_pages_are_found(planted, fault):
    *change, said = PLANTED_IN_PAGES[fault]
    planted(*change)
    lengths = [70, 600]
    pool, _ = test_pages.filled(test_pages.CONFIGS["int4"], BFLOAT, "reference", lengths)
    query, states = test_cuda_pages.queries(len(lengths), 3, BFLOAT), pool.layer.states(pool.table(lengths))
    expected = reference.paged_attention(query, *states, scaling=0.2)
    with pytest.raises((Fault, AssertionError), match=said):
        test_cuda_pages.close(test_cuda_pages.paged(query, *states, scaling=0.2, device=Device()), expected)


@pytest.mark.parametrize("fault", PLANTED_IN_ROTARY)
def test_planted_faults_in_rotary_keys_are_found(store, planted, fault):
    *change, said = PLANTED_IN_ROTARY[fault]
    planted(*change)
    preset = "int8-plain" if fault == "the scales" else "int8"
    with pytest.raises((Fault, AssertionError), match=said):
        check_latents(latents(store, preset, rank=128, kv_len=500, q_len=2), split=512, blocks=1)


@pytest.mark.parametrize("fault", PLANTED_IN_HIGH_BITS)
def test_planted_faults_in_high_bits_are_found(store, planted, fault):
    planted(*PLANTED_IN_HIGH_BITS[fault])
    with pytest.raises(AssertionError):
        check(problem(store, KVQuantConfig(QuantSpec("int8"), QuantSpec("int3")), head_dim=128))


@pytest.mark.parametrize(("macro", "value"), [("KVQUANT_K_ROTATE", 0), ("KVQUANT_DTYPE", 1)])
def test_a_wrong_compile_option_is_found(store, monkeypatch, macro, value):
    """The emulator does not ask nvrtc.py for its options."""
    right = nvrtc.options
    monkeypatch.setattr(nvrtc, "options", lambda source, kind, arch: right(source, {**kind, macro: value}, arch))
    monkeypatch.setattr(ptx_machine, "module", ptx_machine.module.__wrapped__)
    with pytest.raises(AssertionError):
        check(problem(store, "int4-small"))


# -- the machine itself -------------------------------------------------------------------------------


@pytest.fixture
def probes(monkeypatch):
    """Runs the probes of test_emulator.py in this machine."""

    def launch(kernel, input, output, variant=0, *, grid=1, threads=32, shared_bytes=0, arch=800):
        macros = {"KVQUANT_THREADS": threads, "KVQUANT_SHARED_BYTES": shared_bytes}
        code = _probes(tuple(macros.items()), f"sm_{arch // 10}")[kernel]
        probe = test_emulator.Probe(input.data_ptr(), output.data_ptr(), variant)
        ptx_machine.execute(code, (grid,), (probe,), reads=[input], writes=[output])
        return output

    monkeypatch.setattr(test_emulator, "launch", launch)


@functools.lru_cache(maxsize=None)
def _probes(macros, arch):
    text = test_emulator.PROBES.read_text()
    return ptx_text.parse(ptxas.ptx("quantize_append.cu", dict(macros), arch, text))


@pytest.mark.usefixtures("probes")
class TestProbes:
    @pytest.mark.parametrize(
        ("dtype", "by", "transposed"), list(product([HALF, BFLOAT], ["ldmatrix", "formula"], [False, True]))
    )
    def test_mma(self, dtype, by, transposed):
        test_emulator.test_mma_is_a_matrix_product(dtype, by, transposed)

    def test_ldmatrix(self):
        for transposed in (False, True):
            test_emulator.test_ldmatrix_gives_each_lane_its_row(transposed)

    def test_words_and_pairs(self):
        test_emulator.test_words_and_pairs()

    def test_shuffles_and_votes(self):
        test_emulator.test_shuffles_and_votes()

    def test_a_pipeline(self):
        test_emulator.test_a_pipeline_without_fault()


class Registers(dict):
    """Registers of a few threads, as instructions see them: floats and integers by name, constants as text."""

    def read(self, operand, kind, *, spread=False):
        dtype = ptx_instructions.TYPES[kind]
        return np.asarray(self[operand]).view(dtype) if operand in self else np.asarray(int(operand, 0)).astype(dtype)

    def write(self, name, x):
        self[name] = np.asarray(x)


def result(text, **registers):
    """What an instruction writes to %d, its operands being arrays by name."""
    threads = Registers({f"%{name}": np.asarray(x) for name, x in registers.items()})
    kernel = ptx_text.Kernel("one", (32, 0))
    ptx_text._parse_body(kernel, text)
    ptx_instructions.compiled(kernel.code[0])(threads)
    return threads["%d"]


U, S, F = (functools.partial(np.array, dtype=dtype) for dtype in ("u4", "i4", "f4"))
NAN, INF = np.nan, np.inf
# An instruction, its operands and its result, as the PTX ISA defines it.
INSTRUCTIONS = [
    ("add.s32 %d, %a, %b;", dict(a=U([1, 2**32 - 1]), b=U([2, 1])), S([3, 0])),
    ("mul.hi.u32 %d, %a, %b;", dict(a=U([2**31, 3]), b=U([6, 5])), U([3, 0])),
    ("mul.wide.s32 %d, %a, %b;", dict(a=S([-3]), b=S([2**30])), np.array([-3 * 2**30])),
    ("mad.lo.s32 %d, %a, %b, %c;", dict(a=S([-3]), b=S([7]), c=S([1])), S([-20])),
    ("div.s32 %d, %a, %b;", dict(a=S([-7, 7, -7]), b=S([2, -2, -2])), S([-3, -3, 3])),
    ("rem.s32 %d, %a, %b;", dict(a=S([-7, 7]), b=S([4, -4])), S([-3, 3])),
    ("shr.s32 %d, %a, %b;", dict(a=S([-8, -8, 8]), b=U([1, 40, 32])), S([-4, -1, 0])),
    ("shr.u32 %d, %a, %b;", dict(a=U([2**31, 2**31]), b=U([31, 32])), U([1, 0])),
    ("shl.b32 %d, %a, %b;", dict(a=U([1, 1]), b=U([31, 32])), U([2**31, 0])),
    ("popc.b32 %d, %a;", dict(a=U([0xF0F0, 2**32 - 1])), np.array([8, 32], "u1")),
    ("lop3.b32 %d, %a, %b, %c, 0xCA;", dict(a=U([0xFF00]), b=U([0x1234]), c=U([0x5678])), U([0x1278])),
    ("prmt.b32 %d, %a, %b, 0x8C40;", dict(a=U([0x80]), b=U([0xFE])), U([0xFFFFFE80])),
    ("bfi.b32 %d, %a, %b, 4, 3;", dict(a=U([0xFF, 0x02]), b=U([0, 0xFFFFFFFF])), U([0x70, 0xFFFFFFAF])),
    ("bfi.b32 %d, %a, %b, %c, 40;", dict(a=U([3, 3]), b=U([7, 7]), c=U([31, 32])), U([0x80000007, 7])),
    ("setp.lt.f32 %d, %a, %b;", dict(a=F([1, NAN, 2]), b=F([2, 1, 1])), np.array([True, False, False])),
    ("setp.ltu.f32 %d, %a, %b;", dict(a=F([1, NAN, 2]), b=F([2, 1, 1])), np.array([True, True, False])),
    ("setp.ne.f32 %d, %a, %b;", dict(a=F([NAN, 1]), b=F([NAN, 1])), np.array([False, False])),
    ("setp.neu.f32 %d, %a, %b;", dict(a=F([NAN, 1]), b=F([NAN, 1])), np.array([True, False])),
    ("setp.nan.f32 %d, %a, %b;", dict(a=F([NAN, 1, 1]), b=F([1, NAN, 1])), np.array([True, True, False])),
    ("setp.gt.and.s32 %d, %a, %b, %c;", dict(a=S([1, 1]), b=S([-1, -1]), c=[True, False]), np.array([True, False])),
    ("max.f32 %d, %a, %b;", dict(a=F([NAN, 1]), b=F([1, 2])), F([1, 2])),
    ("max.NaN.f32 %d, %a, %b;", dict(a=F([NAN, 1]), b=F([1, 2])), F([NAN, 2])),
    # Below the middle of c and its successor by 2^-54; rounded to a double first, it would be the middle.
    (
        "fma.rn.f32 %d, %a, %b, %c;",
        dict(a=F([2**-24 + 2**-39]), b=F([1 - 2**-15]), c=F([1 + 2**-23])),
        F([1 + 2**-23]),
    ),
    ("fma.rn.f32 %d, %a, %b, %c;", dict(a=F([1 + 2**-12]), b=F([1 + 2**-12]), c=F([-1])), F([2**-11 + 2**-24])),
    ("fma.rm.f32 %d, %a, %b, %c;", dict(a=F([-(2**-30)]), b=F([1]), c=F([1])), F([1 - 2**-24])),
    ("ex2.approx.ftz.f32 %d, %a;", dict(a=F([3, -INF, -127, NAN])), F([8, 0, 0, NAN])),
    ("add.ftz.f32 %d, %a, %b;", dict(a=F([2**-130, 1]), b=F([0, 1])), F([0, 2])),
    ("cvt.rni.s32.f32 %d, %a;", dict(a=F([2.5, -1.5, 3e9, NAN])), S([2, -2, 2**31 - 1, 0])),
    ("cvt.sat.f32.f32 %d, %a;", dict(a=F([NAN, -1, 0.5, 2])), F([0, 0, 0.5, 1])),
    ("cvt.rn.bf16x2.f32 %d, %a, %b;", dict(a=F([1, INF]), b=F([1 + 2**-8, -2])), U([0x3F803F80, 0x7F80C000])),
    ("cvt.rn.f16x2.f32 %d, %a, %b;", dict(a=F([1e6, 2**-25]), b=F([-2, 2**-24])), U([0x7C00C000, 0x00000001])),
    ("cvt.rn.f16x2.e4m3x2 %d, %a;", dict(a=np.array([0x017E, 0xFF80], "u2")), U([0x18005F00, 0x7FFF8000])),
    ("fma.rn.f16x2 %d, %a, %b, %c;", dict(a=U([0x3C003C01]), b=U([0x3C013C01]), c=U([0xBC00BC00])), U([0x14001800])),
]  # fmt: skip


@pytest.mark.parametrize("case", INSTRUCTIONS, ids=lambda case: case[0].split()[0])
def test_instructions(case):
    text, registers, expected = case
    got = result(text, **registers)
    got = got if expected.dtype == bool else got.view(expected.dtype)
    np.testing.assert_array_equal(got, expected)


def test_an_unknown_instruction_is_named():
    with pytest.raises(ptx_instructions.Unknown, match="bfind.u32 %d, %a"):
        result("bfind.u32 %d, %a;", a=U([1]))


def test_truncated_sums():
    """1 and 16 products of 2^-26: each is below the last bit that is kept, so that their sum, 2^-22, is lost."""
    a, b, c = np.full((1, 16, 16), 2.0**-13), np.full((1, 16, 8), 2.0**-13), np.ones((1, 16, 8))
    assert (ptx_instructions.truncating_product(a, b, c) == 1).all()
    assert (ptx_instructions.exact_product(a, b, c) == 1 + 2.0**-22).all()
