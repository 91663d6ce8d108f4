"""The CPU library, compiled for 64-bit ARM and run on an emulated processor, equals the reference.

The tests call `backends/cpu.py` with the library of `arm_library.py`, on one thread. `make arm` installs the tools.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import arm_library
import pytest
import torch
from levels import check
from stored import KEY_SPECS, extreme, left_padding, make_states, no_faults, random_states, same_bytes

from hf_kvquant import KVQuantConfig, reference
from hf_kvquant.backends import arguments, cpu
from hf_kvquant.measure.families import PRESETS

_missing = arm_library.unavailable() or cpu.unavailable()
pytestmark = pytest.mark.skipif(_missing is not None, reason=str(_missing))

every_preset = pytest.mark.parametrize("preset", PRESETS)
every_head_dim = pytest.mark.parametrize("head_dim", [64, 80, 128])
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
# `neon_i8mm` is slow here, and has a test of its own.
LEVELS = ["scalar", "neon", "neon_dot"]
# Against the portable code of this machine, whose expf differs by one unit in the last place.
SAME_LEVEL = 2e-6


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return arm_library.build(tmp_path_factory.mktemp("arm"))


@pytest.fixture(scope="module")
def library(path) -> arm_library.ArmLibrary:
    return arm_library.ArmLibrary(path)


def levels_of(library: arm_library.ArmLibrary) -> list[str]:
    """The instruction sets that run there. All builds have the same names in the same order."""
    return [name for name, i in cpu._instruction_sets()[0].items() if library.kvquant_level_runs(i)]


@pytest.fixture
def on_arm(library, monkeypatch):
    """The CPU backend calls the library for ARM, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    indices, runs = cpu._instruction_sets()[0], tuple(levels_of(library))
    monkeypatch.setattr(cpu, "_library", lambda: library)
    monkeypatch.setattr(cpu, "_instruction_sets", lambda: (indices, runs))
    cpu._index.cache_clear()
    yield
    cpu._index.cache_clear()
    torch.set_num_threads(threads)


def problem(preset, *, batch=1, num_kv_heads=2, q_per_kv=2, q_len=1, kv_len=131, head_dim=64, dtype=torch.float32,
            padding=None):  # fmt: skip
    config = KVQuantConfig.preset(preset)
    generator = torch.Generator().manual_seed(kv_len)
    sides = []
    for spec in (config.keys, config.values):
        x = random_states(generator, batch, num_kv_heads, kv_len, head_dim, dtype)
        window = dict(recent_length=config.recent_length, sink_length=config.sink_length, padding=padding)
        sides.append(make_states(x, spec, **window))
    query = torch.randn(batch, q_len, num_kv_heads * q_per_kv, head_dim, generator=generator).to(dtype)
    return query.transpose(1, 2), *sides


def test_instruction_sets(path, library):
    assert levels_of(library) == [*LEVELS, "neon_i8mm"]
    assert levels_of(arm_library.ArmLibrary(path, matrix_products=False)) == LEVELS
    assert levels_of(arm_library.ArmLibrary(path, dot_products=False)) == ["scalar", "neon"]
    assert library.kvquant_level_runs(-1) == library.kvquant_level_runs(9) == 0


def test_the_newest_instruction_set_is_the_default(on_arm):
    assert cpu.isa() == "neon_i8mm"


def test_structs_have_one_size(library):
    assert library.kvquant_attention_size() == ctypes.sizeof(arguments.Attention)
    assert library.kvquant_append_size() == ctypes.sizeof(arguments.Append)


@every_dtype
@every_head_dim
@every_preset
@pytest.mark.parametrize("level", [*LEVELS, "neon_i8mm"])
def test_bytes_equal_the_definition(level, preset, head_dim, dtype, on_arm):
    config = KVQuantConfig.preset(preset)
    padding = left_padding(150, 0, 30)
    x = extreme(dtype, head_dim)
    window = dict(recent_length=config.recent_length, sink_length=config.sink_length, slack=155)
    specs = (config.keys, config.values)
    expected, states = ([make_states(x[:, :, :0], spec, **window) for spec in specs] for _ in range(2))
    count, expected_count, start = no_faults(), no_faults(), 0
    for n in (63, 1, 1, 62, 3, 20):
        new = x[:, :, start : start + n]
        reference.quantize_append(new, new.flip(-1), *expected, expected_count, padding, start=start)
        cpu.quantize_append(new, new.flip(-1), *states, count, padding, start=start, isa=level)
        start += n
    assert start == x.shape[2]
    for written, wanted in zip(states, expected):
        same_bytes(written, wanted)
    assert torch.equal(count, expected_count) and count[0] > 0


@every_dtype
@every_head_dim
@every_preset
def test_attention(preset, head_dim, dtype, on_arm):
    for q_len, kv_len in ((1, 131), (3, 65), (3, 3), (1, 1)):
        check(*problem(preset, head_dim=head_dim, dtype=dtype, q_len=q_len, kv_len=kv_len), levels=LEVELS)


@pytest.mark.parametrize("spec", ["int8", "int8-channel", "int4-rotated", "int4-channel"])
def test_the_largest_sums(spec, on_arm):
    """As in test_cpu_backend.py, where sums of the largest codes and weights must not overflow."""
    sign = torch.ones(1, 1, 64, 1)
    sign[:, :, ::3] = -1
    x = (sign * torch.ones(512)).to(torch.bfloat16)
    states = make_states(x, KEY_SPECS[spec])
    for query in (x[:, :, :1], x[:, :, 1:2]):
        check(query.contiguous(), states, states, levels=[*LEVELS, "neon_i8mm"])


@every_head_dim
@pytest.mark.parametrize("preset", [name for name in PRESETS if "int" in name])
def test_products_of_matrices_equal_dot_products(preset, head_dim, library, on_arm):
    """Bit for bit, for one to four query rows."""
    for q_per_kv, dtype in ((1, torch.bfloat16), (2, torch.float16), (4, torch.bfloat16)):
        arguments = problem(preset, num_kv_heads=1, q_per_kv=q_per_kv, head_dim=head_dim, dtype=dtype)
        output, lse = cpu.decode_attention(*arguments, scaling=0.125, isa="neon_dot")
        before = library.products
        same_output, same_lse = cpu.decode_attention(*arguments, scaling=0.125, isa="neon_i8mm")
        assert library.products - before >= 131 * head_dim * q_per_kv // 16  # 32 products of one byte of a weight
        assert torch.equal(output, same_output) and torch.equal(lse, same_lse)
        check(*arguments, levels=["neon_i8mm"])


@every_preset
def test_masks_softcap_and_learned_sinks(preset, on_arm):
    padding = left_padding(150, 0, 70)
    arguments = problem(preset, batch=2, q_len=3, kv_len=150, padding=padding)
    check(*arguments, (~padding).long(), levels=LEVELS)
    mask = torch.randn(2, 4, 3, 150, generator=torch.Generator().manual_seed(1))
    mask[..., ::7] = torch.finfo(torch.float32).min
    s_aux = torch.linspace(-3, 9, 4)
    check(*arguments, mask, s_aux, softcap=20.0, levels=LEVELS)
    check(*arguments, mask > 0, levels=LEVELS)


@every_preset
def test_several_splits_as_on_this_machine(preset, library, monkeypatch):
    query, keys, values = problem(preset, kv_len=1301, q_per_kv=3)
    here, here_lse = cpu.decode_attention(query, keys, values, scaling=0.125, isa="scalar")
    monkeypatch.setattr(cpu, "_library", lambda: library)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    output, lse = cpu.decode_attention(query, keys, values, scaling=0.125, isa="scalar")
    assert (output - here).abs().max() <= SAME_LEVEL * here.abs().max()
    torch.testing.assert_close(lse, here_lse, rtol=SAME_LEVEL, atol=SAME_LEVEL)


def test_memory_of_nobody_is_an_error(library):
    with pytest.raises(RuntimeError, match=r"UNMAPPED.* address 0x[0-9a-f]{1,3}$"):
        library.kvquant_decode_attention(0x10)
