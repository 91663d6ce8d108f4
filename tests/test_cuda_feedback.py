"""Error feedback in the CUDA append: the reference's bytes, in the emulator of the sources and by the PTX machine, and
what the compiler makes of it for every architecture."""

from __future__ import annotations

import dataclasses
import functools
import shutil

import emulator
import ptx_machine
import ptxas
import pytest
import stored
import test_pages
import torch
from stored import left_padding
from test_cuda_append import DTYPES, extreme, same_bytes
from test_cuda_compile import BUDGET, SAME_PTX, SHARED_BYTES, STACK_BYTES

from hf_kvquant import KVQuantConfig, QuantSpec, quantize, reference
from hf_kvquant.backends import cuda, nvrtc
from hf_kvquant.backends.specialisation import feedback_bytes, specialisation
from hf_kvquant.cli import build
from hf_kvquant.measure.families import PRESETS

# Registers of a thread: five blocks on an SM, and three of long blocks and wide heads, which have memory for fewer.
FOR_FIVE_BLOCKS, FOR_FEW_BLOCKS = BUDGET["quantize_append_kernel"][128], 168

needs_compiler = pytest.mark.skipif(ptxas.missing() is not None, reason=f"{ptxas.missing()}")

# Keys and values: format and block length; head_dim, dtype, and which sides have feedback. Every format, block length,
# head_dim and dtype, the largest blocks that shared memory holds, and sides without feedback.
CASES = [
    ("int4-64", "int4-64", 128, "bf16", "kv"),
    ("int8-64", "int4-64", 64, "fp16", "k"),
    ("fp8-64", "int8-128", 128, "fp16", "kv"),
    ("int4-128", "fp8-16", 64, "fp32", "v"),
    ("int8-16", "fp8-32", 96, "bf16", "kv"),
    ("int4-64", "int8-32", 80, "fp32", "kv"),
    ("int4-256", "int8-256", 64, "bf16", "kv"),
    ("fp8-256", "int4-16", 80, "fp16", "k"),
    ("int8-64", "fp8-64", 256, "bf16", "kv"),
    ("int4-32", "int8-16", 512, "bf16", "kv"),
    ("int4-64", "token", 128, "bf16", "k"),
    ("dense", "int4-64", 112, "fp16", "v"),
    ("int3-64", "int2-32", 64, "bf16", "kv"),
]


def name_of(case) -> str:
    return "-".join(map(str, case))


def spec(name: str) -> QuantSpec:
    if name in ("dense", "token"):
        return QuantSpec("dense") if name == "dense" else QuantSpec("int4", rotate=True)
    form, _, length = name.partition("-")
    return QuantSpec(form, "channel", block_length=int(length))


def factors(sides: str, head_dim: int, heads: int = 2) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Those of channels that are correlated, of the sides among "kv"."""
    one = 0.4 * torch.randn(2, heads, head_dim, head_dim).tril(-1)
    return one[0] if "k" in sides else None, one[1] if "v" in sides else None


def both(store, case, kv_len, *, device, **window):
    """The states that the backend and the reference store, and both counts of faults."""
    k, v, head_dim, dtype, sides = case
    key, value = (extreme(DTYPES[dtype], 2, 2, kv_len, head_dim) for _ in range(2))
    given, counts = factors(sides, head_dim), [torch.zeros(2, dtype=torch.int64) for _ in range(2)]
    appends = functools.partial(cuda.quantize_append, device=device), reference.quantize_append
    got, expected = (
        store(key, value, spec(k), spec(v), append=functools.partial(append, factors=given), faults=count, **window)
        for append, count in zip(appends, counts)
    )
    return got, expected, counts


def check(store, case, *args, **how):
    got, expected, counts = both(store, case, *args, **how)
    same_bytes(got, expected)
    assert torch.equal(*counts) and counts[0][1] == 0


every_case = pytest.mark.parametrize("case", CASES, ids=name_of)


class TestTheEmulator:
    @every_case
    def test_bytes_equal_the_definition(self, store, case):
        n = 270 if case[2] <= 128 else 70
        padding = left_padding(n, 0, 30)
        check(store, case, n, device=emulator.Device(), padding=padding, recent_length=8, sink_length=5)

    @pytest.mark.parametrize("case", [CASES[i] for i in (0, 2, 5, 8)], ids=name_of)
    def test_chunks(self, store, case):
        """Blocks that are completed from the ring, by one token and by many, and several at once."""
        window = dict(padding=left_padding(290, 0, 40), recent_length=8, sink_length=70, capacity=320)
        check(store, case, 300, device=emulator.Device(), chunks=(1, 62, 1, 1, 63, 127, 2, 16, 27), **window)

    def test_e4m3_with_the_instruction(self, store):
        check(store, ("fp8-32", "fp8-64", 64, "bf16", "kv"), 150, device=emulator.Device(890))

    def test_nothing_but_padding(self, store):
        check(store, CASES[0], 70, device=emulator.Device(), padding=left_padding(70, 70, 64))

    def test_factors_of_nothing_change_no_byte(self, store):
        x = extreme(torch.bfloat16, 2, 2, 130, 64)
        kv = (x, x.flip(2), spec("int4-64"), spec("int8-64"))
        append = functools.partial(cuda.quantize_append, device=emulator.Device())
        none = functools.partial(append, factors=tuple(torch.zeros(2, 2, 64, 64)))
        same_bytes(store(*kv, append=none), store(*kv, append=append))

    def test_the_length_on_the_device(self, store):
        """As in the static cache: the append completes a block, counts itself, and is refused without room."""
        x, given = torch.randn(2, 2, 90, 64).bfloat16(), factors("kv", 64)
        states = []
        for append in (functools.partial(cuda.quantize_append, device=emulator.Device()), reference.quantize_append):
            kv = (x, x.flip(2), spec("int4-64"), spec("int8-32"))
            length, appends = torch.tensor(90), torch.tensor([0, 5])
            keys, values = store(*kv, capacity=140, append=reference.quantize_append)
            pair = [dataclasses.replace(side, device_length=length) for side in (keys, values)]
            faults, new = torch.zeros(2, dtype=torch.int64), torch.randn(2, 2, 39, 64, generator=seeded()).bfloat16()
            for _ in range(2):
                append(new, new, *pair, faults, start=0, appends=appends, factors=given)
            assert length.item() == 168 and appends.tolist() == [0, 7] and faults.tolist() == [0, 39]
            states.append(pair)
        same_bytes(*states)

    def test_products_are_rounded(self):
        check_rounding(emulator.Device())

    @pytest.mark.parametrize("name", ["short blocks", "value blocks"])
    def test_pages(self, name):
        in_pages(name, emulator.Device())


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def in_pages(name, device):
    config = test_pages.CONFIGS[name]
    given = tuple(
        f if side.is_channel else None for f, side in zip(factors("kv", test_pages.DIM), (config.keys, config.values))
    )
    appends = functools.partial(cuda.paged_append, device=device), reference.paged_append
    (got, _), (expected, _), (plain, _) = (
        test_pages.filled(config, torch.bfloat16, append, [1, 70, 300], factors=fed)
        for append, fed in (*((one, given) for one in appends), (reference.paged_append, (None, None)))
    )
    assert torch.equal(got.memory, expected.memory)
    assert not torch.equal(got.memory, plain.memory)


@needs_compiler
class TestCompiled:
    @pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
    @pytest.mark.parametrize("case", [CASES[i] for i in (0, 2, 4, 12)], ids=name_of)
    def test_the_ptx_writes_the_same_bytes(self, store, case, arch):
        window = dict(padding=left_padding(150, 0, 30), recent_length=8, sink_length=5, chunks=(1, 62, 1, 70, 16))
        check(store, case, 150, device=ptx_machine.Device(arch), **window)

    def test_products_are_rounded(self):
        check_rounding(ptx_machine.Device())

    def test_the_ptx_in_pages(self):
        in_pages("value blocks", ptx_machine.Device())

    @pytest.mark.parametrize("case", [CASES[i] for i in (0, 2, 6, 7, 9, 12)], ids=name_of)
    def test_no_spills_and_within_the_budget(self, case):
        kind, head_dim = kind_of(case), case[2]
        lengths = [spec(name).block_length for name, side in zip(case, "kv") if side in case[4]]
        needed = max(feedback_bytes(length, head_dim) for length in lengths)
        registers = FOR_FEW_BLOCKS if max(lengths) > 64 or needed > 48 << 10 else FOR_FIVE_BLOCKS
        for archs in SAME_PTX:
            text = ptxas.ptx("quantize_append.cu", kind, archs[0])
            for arch in archs if case is CASES[0] else archs[:1]:
                cubin, usage = ptxas.assemble(text, arch)
                used, launch = usage["quantize_append_kernel"], nvrtc.read_launches(cubin)["quantize_append_kernel"]
                assert used.spills == 0 and used.stack <= STACK_BYTES and used.registers <= registers, (arch, used)
                assert launch.shared_bytes == needed and used.shared + needed <= SHARED_BYTES

    def test_without_feedback_no_shared_memory_is_asked_for(self):
        kind = kind_of(("int4-64", "int4-64", 128, "bf16", ""))
        assert not any("FEEDBACK" in name for name in kind)
        cubin, _ = ptxas.assemble(ptxas.ptx("quantize_append.cu", kind, "sm_80"), "sm_80")
        assert nvrtc.read_launches(cubin)["quantize_append_kernel"].shared_bytes == 0


def kind_of(case):
    k, v, head_dim, dtype, sides = case
    number = {"fp32": 0, "fp16": 1, "bf16": 2}[dtype]
    specs = (spec(name).resolve(head_dim) for name in (k, v))
    return specialisation(number, *specs, head_dim, head_dim, feedback=("k" in sides, "v" in sides))


# -- planted faults -----------------------------------------------------------------------------------

ROUND, TAKE = "round_panel(panel, counted, block);\n      block_barrier();", "sub_rn(x, mul_rn(factor[i], error[i]))"
# The text of feedback.h that is replaced, its replacement, and the message; None: a wrong result.
PLANTED = {
    "a contracted product": (TAKE, "fma_rn(-factor[i], error[i], x)", None),
    "a product in the panel that is contracted": (
        "sub_rn(y[k][j], mul_rn(factor, y[k][i]))",
        "fma_rn(-factor, y[k][i], y[k][j])",
        None,
    ),
    "another row of factors": ("factors(panel, i)[j]", "factors(panel, i ^ 1)[j]", None),
    "the factors of the next panel": ("cp_async_wait<0>();\n", "cp_async_wait<1>();\n", "way|nobody waited"),
    "no barrier before the errors": (ROUND, ROUND.replace("block_barrier();", ""), "barrier|nobody wrote|written"),
    "an error that is not finite": ("is_finite(fabsf(error)) ? error : 0.0f", "error", None),
    "a scale that padding decides": ("t < kLength && !block.is_padding(t)", "t < kLength", None),
    "the factors of another head": ("x.factors + int64_t(head)", "x.factors + int64_t(0)", None),
}


def check_rounding(device):
    """Channels 30 and 11 are what the error of channel 31 takes from them, rounded, so that nothing is left of them.
    Without the rounding of the product its remainder would be left."""
    form = QuantSpec("int4", "channel", block_length=64)
    x = torch.zeros(1, 1, 64, 32)
    x[..., 31] = 9e5 * torch.rand(64)
    error = x[..., 31] - quantize(x, form).dequantize()[..., 31]
    given = torch.zeros(1, 32, 32)
    for channel in (30, 11):
        given[0, 31, channel] = 0.7
        x[..., channel] = given[0, 31, channel] * error
    keys, values = stored.store(x, x, form, form, append=reference.quantize_append)
    faults = torch.zeros(2, dtype=torch.int64)
    cuda.quantize_append(x, x, keys, values, faults, start=0, factors=(given, given), device=device)
    for states in (keys, values):
        (scale,) = states.scale[0, 0, :1]
        assert scale[31] > 0 and not scale[:31].any()


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Replaces text in copies of the kernels, which both machines compile from then on."""

    def plant(before, after):
        shutil.copytree(emulator.KERNELS, tmp_path / "kernels")
        texts = {path: path.read_text() for path in (tmp_path / "kernels" / "cuda").iterdir()}
        assert sum(before in text for text in texts.values()) == 1, before
        for path, text in texts.items():
            path.write_text(text.replace(before, after))
        monkeypatch.setattr(emulator, "KERNELS", tmp_path / "kernels")
        include = (f"-I{tmp_path / 'kernels'}", f"-I{tmp_path / 'kernels' / 'include'}", f"-I{emulator.EMULATOR}")
        monkeypatch.setattr(emulator, "_INCLUDE", include)
        monkeypatch.setattr(nvrtc, "source_folder", lambda: tmp_path / "kernels")
        monkeypatch.setattr(ptx_machine, "module", ptx_machine.module.__wrapped__)

    return plant


@pytest.mark.parametrize("fault", PLANTED)
@pytest.mark.parametrize(
    ("device", "faults"),
    [(emulator.Device, emulator.Fault), pytest.param(ptx_machine.Device, ptx_machine.Fault, marks=needs_compiler)],
    ids=["emulator", "ptx"],
)
def test_planted_faults_are_found(store, planted, fault, device, faults):
    *change, said = PLANTED[fault]
    planted(*change)

    def checks():
        check_rounding(device())
        check(store, ("int4-64", "int8-32", 64, "bf16", "kv"), 80, device=device(), padding=left_padding(80, 0, 30))

    with pytest.raises(faults if said else AssertionError, match=said):
        checks()


# -- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "head_dim", "largest"), [(256, 128, 128), (128, 192, 64), (128, 256, 64), (64, 512, 32)]
)
def test_a_block_that_does_not_fit_is_refused(length, head_dim, largest):
    case = ("int4-16", f"int4-{length}", head_dim, "bf16", "kv")
    message = f"values block_length: {length} with error feedback at head_dim {head_dim} .* expected at most {largest}"
    with pytest.raises(ValueError, match=message):
        kind_of(case)
    kind_of((case[0], f"int4-{largest}", *case[2:]))
    kind_of((*case[:4], "k"))


def test_factors_that_are_not_aligned_are_refused(store):
    x = torch.randn(1, 2, 64, 64).bfloat16()
    keys, values = store(x, x, spec("int4-64"), spec("int4-64"), append=reference.quantize_append)
    given = torch.zeros(2 * 64 * 64 + 1)[1:].view(2, 64, 64)
    faults = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="value factors: address .* expected a multiple of 16 bytes"):
        cuda.quantize_append(x, x, keys, values, faults, start=0, factors=(None, given), device=emulator.Device())


def test_kinds_say_that_they_have_feedback():
    assert "keys int4 channel 64 feedback, values int8 channel 32, " in str(
        kind_of(("int4-64", "int8-32", 64, "bf16", "k"))
    )


def test_presets_have_blocks_that_fit():
    for name in KVQuantConfig.preset_names():
        config = KVQuantConfig.preset(name)
        for head_dim in (64, *([96] if name in PRESETS else []), 128, 192, 256):
            sides = [side.resolve(head_dim) for side in (config.keys, config.values)]
            specialisation(2, *sides, head_dim, head_dim, feedback=tuple(side.is_channel for side in sides))


def test_kernels_are_built_ahead_of_time(tmp_path):
    """The append of a config with error feedback, and attention as without it."""
    path = tmp_path / "mine.yaml"
    plain = "{keys: {format: int4, grid: channel}, values: {format: int4, rotate: true}"
    path.write_text(plain + ", error_feedback: some.feedback}")
    built = build.kinds([str(path)], [64], ["bfloat16"], [128], [])
    path.write_text(plain + "}")
    without = build.kinds([str(path)], [64], ["bfloat16"], [128], [])
    assert len(built) == len(without)
    for (source, kind), (_, other) in zip(built, without):
        added = {"KVQUANT_K_FEEDBACK": 1} if source == "quantize_append.cu" else {}
        assert kind == {**other, **added}
