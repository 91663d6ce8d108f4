"""Every specialisation compiles, without spills and within a register budget.

The test compiles all presets and head_dims, and formats that no preset has; tests/ptxas.py says how. Attention is
compiled for blocks of 8 rows in BF16 at all head_dims, and of 16 rows in FP16 at COMMON ones and where registers are
scarcest. `make whole` does this for six architectures; for other head_dims than the COMMON ones it leaves out those
that differ little from another one. That takes twenty minutes of a processor, so `make test` compiles the presets at
head_dim USUAL for one architecture of each of three generations, and the others for one of them: see `architectures`.
No GPU is needed.
"""

from __future__ import annotations

import shutil
import subprocess
from itertools import product

import ptxas
import pytest
import torch
from whole import WHOLE

from hf_kvquant import KVQuantConfig, QuantSpec
from hf_kvquant.backends import disk_cache, nvrtc
from hf_kvquant.backends.arguments import DTYPES, FORMATS
from hf_kvquant.backends.specialisation import RotaryKeys, Specialisation, specialisation
from hf_kvquant.measure.families import PRESETS
from hf_kvquant.measure.gpu import forecast, machine_code

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
COMMON = (64, 128)
USUAL = 128
LIKE_SM_80 = ("sm_86", "sm_89")
# The architectures, in groups that share their PTX: NVRTC's optimizer does the same for all architectures before
# sm_100, and the same for all from sm_100 on; there is code of its own for fp8 from sm_89 on, also in the append of
# other formats, and from sm_90 on kernels wait for the ones before them.
SAME_PTX = (("sm_80", "sm_86"), ("sm_89",), ("sm_90",), ("sm_100", "sm_120"))
ARCHS = [arch for group in SAME_PTX for arch in group]
# The code for architectures of one generation differs least: ptxas allocates the same registers, or nearly so.
GENERATIONS = (("sm_80", "sm_86", "sm_89"), ("sm_90",), ("sm_100", "sm_120"))

# The most registers of a thread, by kernel and largest head_dim. They bound the blocks on an SM: 65536 registers are 5
# blocks of 128 threads at 96, 3 at 168, 2 at 255. Raise a limit only if a measurement on a GPU shows that it pays.
BUDGET = {
    "decode_attention_kernel": {128: 168, 192: 255, 256: 255, 512: 255},
    "merge_splits_kernel": {128: 64, 192: 96, 256: 96, 512: 128},
    "quantize_append_kernel": {128: 96, 192: 96, 256: 96, 512: 96},
}
# The most bytes of a thread's stack: sm_80 uses a few, which are not spills.
STACK_BYTES = 16
# The most bytes of shared memory of a block, static and dynamic: the limit of the smallest GPUs. Of presets two blocks
# fit these GPUs, which take 1 KB for each.
SHARED_BYTES, OF_TWO_BLOCKS = 99 << 10, 49 << 10

# The most instructions of a warp for 16 columns of a plain tile, at head_dim 128 on sm_90 (eval/cuda_model.py), for
# presets, and for both sides on the channel grid, without the end of a block. They are of the lock's NVRTC; others may
# take a few more.
COUNTED = 13, 0
INSTRUCTIONS = {
    "int8": 248, "fp8": 251, "int4": 187, "int3": 243, "int2": 179,
    "int8-channel-values": 225, "int4-channel-values": 186,
}  # fmt: skip
# Models in float32: two terms of queries and of weights, codes without their offset, and sums of each tile apart.
INSTRUCTIONS_IN_FLOAT32 = {"int8": 343, "fp8": 318, "int4": 269}
# With pages: a tile asks whether its page is another one, and where its scales are.
INSTRUCTIONS_OF_PAGES = {"int8": 262, "fp8": 262, "int4": 196, "int8-channel-values": 238, "int4-channel-values": 193}

pytestmark = pytest.mark.skipif(ptxas.missing() is not None, reason=f"{ptxas.missing()}")


def kind_of(
    k: QuantSpec,
    v: QuantSpec,
    head_dim: int,
    v_head_dim: int,
    dtype: str = "bfloat16",
    rows: int = 8,
    pages: int = 0,
    rotary: RotaryKeys | None = None,
) -> Specialisation:
    number = next(number for known, number in DTYPES.items() if str(known) == f"torch.{dtype}")
    specs = k.resolve(head_dim), v.resolve(v_head_dim)
    return specialisation(number, *specs, head_dim, v_head_dim, rows, pages, rotary)


def of_latents(spec: QuantSpec, rotary: QuantSpec, dtype: str = "bfloat16") -> Specialisation:
    """Attention over latents of 512 elements and rotary keys of 64."""
    return kind_of(spec, spec, 512, 512, dtype, 16, rotary=RotaryKeys(rotary.resolve(64), 64))


def preset(name: str, head_dim: int, dtype: str = "bfloat16", rows: int = 8, pages: int = 0) -> Specialisation:
    config = KVQuantConfig.preset(name)
    return kind_of(config.keys, config.values, head_dim, head_dim, dtype, rows, pages)


def kinds() -> list[Specialisation]:
    """The specialisations of the presets, then others: dense sides, other groups and blocks, unequal head dims, values
    on the channel grid, pages."""
    dense, fp8, int4 = QuantSpec("dense"), QuantSpec("fp8"), QuantSpec("int4", group_size=32, rotate=True)
    channel = QuantSpec("int8", "channel", block_length=128)
    return [
        *(preset(*choice) for choice in product(PRESETS, HEAD_DIMS)),
        *(preset(*choice, "float16", 16) for choice in product(PRESETS, (*COMMON, max(HEAD_DIMS)))),
        kind_of(dense, fp8, 128, 128),
        kind_of(fp8, dense, 64, 64),
        kind_of(dense, dense, 256, 256, rows=16),
        kind_of(QuantSpec("int8", "channel", block_length=16), int4, 192, 128),
        kind_of(QuantSpec("fp8", "channel", block_length=256), QuantSpec("int8", group_size=16), 96, 96),
        kind_of(channel, QuantSpec("int4", "channel"), 128, 128),
        kind_of(QuantSpec("int4", "channel"), channel, 128, 128, "float16", 16),
        kind_of(QuantSpec("fp8"), QuantSpec("fp8", "channel", block_length=16), 192, 192),
        kind_of(int4, channel, 192, 192, rows=16),
        kind_of(int4, channel, 256, 256),
        kind_of(dense, channel, 256, 256),
        *(preset(name, 128, pages=256) for name in PRESETS),
        *(preset(*choice, "float16", 16, pages=192) for choice in (("int4", 64), ("int4", 128), ("int8", 256))),
        kind_of(QuantSpec("int4", "channel"), channel, 128, 128, "float16", 16, pages=128),
        kind_of(dense, fp8, 192, 192, pages=64),
        # Latents without and with rotary keys of 64 elements, and their cache.
        kind_of(channel, channel, 512, 512, rows=16),
        of_latents(channel, channel),
        of_latents(QuantSpec("int8"), QuantSpec("int8"), "float16"),
        of_latents(QuantSpec("fp8"), QuantSpec("fp8")),
        of_latents(QuantSpec("int4", "channel"), QuantSpec("int4", "channel")),
        of_latents(int4, int4, "float16"),
        of_latents(dense, dense),
        kind_of(QuantSpec("int4", "channel"), int4, 512, 64, rows=16),
        # Models in float32: every codec where registers are scarcest, and the usual heads.
        *(preset(name, 128, "float32") for name in ("int8", "fp8", "int4", "int4-small")),
        *(preset(name, 256, "float32") for name in ("int8", "int4")),
        kind_of(QuantSpec("int4", "channel"), channel, 128, 128, "float32"),
        kind_of(dense, dense, 128, 128, "float32"),
        preset("int4", 128, "float32", pages=256),
        kind_of(channel, channel, 512, 512, "float32", 16),
        *kinds_of_few_bits(),
    ]


def kinds_of_few_bits() -> list[Specialisation]:
    """The presets of 3 and 2 bits at the usual head_dim; `make whole` compiles the others of these formats."""
    found = []
    for format in ("int3", "int2"):
        keys, rotated = KVQuantConfig.preset(format).keys, KVQuantConfig.preset(format).values
        groups, channel16 = QuantSpec(format, group_size=64), QuantSpec(format, "channel", block_length=16)
        found += [kind_of(keys, rotated, 128, 128)]
        if not WHOLE:
            continue
        for head_dim in (64, 128, 192, 256):
            found += [kind_of(keys, rotated, head_dim, head_dim, "float16", 16)]
            found += [kind_of(rotated, channel16, head_dim, head_dim), kind_of(groups, groups, head_dim, head_dim)]
        found += [kind_of(keys, keys, 128, 128, "float16", 16), kind_of(keys, rotated, 256, 256)]
        found += [kind_of(keys, rotated, 128, 128, rows=rows, pages=256) for rows in (8, 16)]
        found += [kind_of(k, v, 128, 256, "float32") for k, v in ((keys, rotated), (groups, keys))]
        found += [of_latents(keys, keys), of_latents(rotated, groups), kind_of(keys, keys, 512, 512, "float32", 16)]
    return found


def architectures(number: int, kind: Specialisation) -> list[str]:
    """Those that the kind of this number in `kinds` is compiled for. The next kind has the next one, so that each
    format, head_dim, dtype and number of rows meets every generation. A preset may have none: for other head_dims than
    USUAL there are as many presets as generations."""
    head_dim = max(kind["KVQUANT_HEAD_DIM"], kind["KVQUANT_V_HEAD_DIM"])
    if WHOLE:
        return ARCHS if head_dim in COMMON else [arch for arch in ARCHS if arch not in LIKE_SM_80]
    is_preset = number < len(PRESETS) * len(HEAD_DIMS)
    if is_preset and head_dim == USUAL:
        return [archs[number % len(archs)] for archs in GENERATIONS]
    if is_preset and head_dim < max(HEAD_DIMS):
        preset, at = divmod(number, len(HEAD_DIMS))
        turn = (preset + at) % len(PRESETS)
        return [archs[number % len(archs)] for archs in GENERATIONS[turn : turn + 1]]
    # Those of head_dim 256 are few, and follow each other in steps of three.
    shift = number // 6 if head_dim >= max(HEAD_DIMS) else 1
    return [ARCHS[(number + shift) % 6]]


def same_ptx(source: str, kind: Specialisation) -> tuple[tuple[str, ...], ...]:
    if source == "decode_attention.cu" and FORMATS["fp8"] not in (kind["KVQUANT_K_FORMAT"], kind["KVQUANT_V_FORMAT"]):
        first, second, *others = SAME_PTX
        return (first + second, *others)
    return SAME_PTX


@pytest.mark.parametrize(
    ("number", "kind"), [(n, kind) for n, kind in enumerate(kinds()) if architectures(n, kind)], ids=str
)
@pytest.mark.parametrize("source", nvrtc.SOURCES)
def test_no_spills_and_within_the_budget(source, number, kind):
    head_dim = max(kind["KVQUANT_HEAD_DIM"], kind["KVQUANT_V_HEAD_DIM"])
    largest = next(limit for limit in (128, 192, 256, 512) if head_dim <= limit)
    two_blocks = largest == 128 and number < len(PRESETS) * (len(HEAD_DIMS) + len(COMMON) + 1)
    chosen = architectures(number, kind)
    budget = {kernel: limits[largest] for kernel, limits in BUDGET.items()}
    few_bits = not {kind["KVQUANT_K_FORMAT"], kind["KVQUANT_V_FORMAT"]}.isdisjoint((FORMATS["int3"], FORMATS["int2"]))
    takes_more = bool(kind["KVQUANT_V_GRID"]) + (kind["KVQUANT_ROWS"] == 16) + few_bits
    if takes_more > 1 or kind["KVQUANT_DTYPE"] == DTYPES[torch.float32]:
        budget["decode_attention_kernel"] = 255
    for group in same_ptx(source, kind):
        archs = [arch for arch in group if arch in chosen]
        text = ptxas.ptx(source, kind, group[0]) if archs else ""
        for arch in archs:
            cubin, usage = ptxas.assemble(text, arch)
            needed = nvrtc.read_launches(cubin)
            assert set(usage) == set(needed) == {kernel for kernel, of in nvrtc.KERNELS.items() if of == source}
            for kernel, used in usage.items():
                assert used.spills == 0, (arch, kernel, used)
                assert used.stack <= STACK_BYTES, (arch, kernel, used)
                assert used.registers <= budget[kernel], (arch, kernel, used)
                shared = used.shared + needed[kernel].shared_bytes
                assert shared <= (OF_TWO_BLOCKS if two_blocks else SHARED_BYTES), (arch, kernel, shared)


@pytest.mark.skipif(machine_code.missing() is not None, reason=f"{machine_code.missing()}")
@pytest.mark.parametrize(
    ("name", "pages"), [*product(INSTRUCTIONS, [0]), *product(INSTRUCTIONS_OF_PAGES, [256])], ids=str
)
def test_instructions_of_a_plain_tile(name, pages):
    """A branch for each score, or a question about the mask in each tile, would not be within the limit."""
    format, _, on_channel_grid = name.partition("-")
    both = QuantSpec(format, "channel")
    config = KVQuantConfig(keys=both, values=both) if on_channel_grid else KVQuantConfig.preset(name)
    assert instructions(config, pages=pages) <= (INSTRUCTIONS_OF_PAGES if pages else INSTRUCTIONS)[name]


@pytest.mark.skipif(machine_code.missing() is not None, reason=f"{machine_code.missing()}")
@pytest.mark.parametrize("name", INSTRUCTIONS_IN_FLOAT32)
def test_instructions_of_a_plain_tile_in_float32(name):
    assert instructions(KVQuantConfig.preset(name), "float32") <= INSTRUCTIONS_IN_FLOAT32[name]


def instructions(config: KVQuantConfig, dtype: str = "bfloat16", pages: int = 0) -> float:
    """The instructions of a warp for 16 columns of a plain tile, head_dim 128, on sm_90."""
    if nvrtc.version() != COUNTED:
        pytest.skip(f"the limits are those of NVRTC {'{}.{}'.format(*COUNTED)}, not of {nvrtc.version_name()}")
    kind = kind_of(config.keys, config.values, 128, 128, dtype, pages=pages)
    text = ptxas.ptx("decode_attention.cu", kind, "sm_90")
    code = machine_code.disassembled(ptxas.assemble(text, "sm_90")[0], "decode_attention_kernel")
    loop = machine_code.paths(code, forecast.TILE, forecast.is_product).loop
    columns = forecast.tile_columns(loop, config.keys.row_bytes(128) + config.values.row_bytes(128))
    assert columns in (16, 32)
    return len(loop) * 16 / columns


class TestTheShortWay:
    """The shortcut above gives the same machine code as NVRTC gives users."""

    def test_every_architecture_is_in_one_group(self):
        assert ARCHS == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
        assert set(ARCHS) <= set(nvrtc.architectures())

    def test_every_choice_meets_every_generation(self):
        """Those formats that `make test` compiles once meet one architecture."""
        assert [arch for archs in GENERATIONS for arch in archs] == ARCHS
        rare = {(f"KVQUANT_{side}_FORMAT", FORMATS[format]) for side in "KV" for format in ("int3", "int2")}
        met: dict[tuple[str, int], set[str]] = {}
        for number, kind in enumerate(kinds()):
            for macro in ("KVQUANT_K_FORMAT", "KVQUANT_V_FORMAT", "KVQUANT_HEAD_DIM", "KVQUANT_DTYPE", "KVQUANT_ROWS"):
                met.setdefault((macro, kind[macro]), set()).update(architectures(number, kind))
        missed = {choice: archs for choice, archs in met.items() if any(archs.isdisjoint(g) for g in GENERATIONS)}
        assert set(missed) <= rare and all(missed.values())

    @pytest.mark.parametrize("source", nvrtc.SOURCES)
    def test_a_group_shares_its_ptx(self, source):
        """The test uses fp8, whose conversions are instructions on some architectures only."""
        kind = preset("fp8", 128)
        for first, *others in same_ptx(source, kind):
            text = ptxas.ptx(source, kind, first)
            for arch in others:
                theirs = ptxas.ptx(source, kind, arch)
                assert theirs.replace(f".target {arch}", f".target {first}") == text, (first, arch)

    @pytest.mark.parametrize("arch", ["sm_90", "sm_120"])
    @pytest.mark.parametrize("source", nvrtc.SOURCES)
    def test_the_same_machine_code(self, source, arch, tmp_path, monkeypatch):
        monkeypatch.setenv(disk_cache.CACHE_VARIABLE, str(tmp_path))
        kind = preset("int8", 80, "float16")
        first = next(archs[0] for archs in same_ptx(source, kind) if arch in archs)
        ours, usage = ptxas.assemble(ptxas.ptx(source, kind, first), arch)
        theirs = nvrtc.compiled(source, kind, arch)
        assert usage == theirs.usage
        # This one names the program that wrote the file.
        ours, theirs = ({**ptxas.sections(cubin), ".note.nv.tkinfo": b""} for cubin in (ours, theirs.cubin))
        assert sum(name.startswith(".text.") for name in ours) == len(usage)
        assert ours == theirs


def launches(kind: Specialisation) -> dict[str, nvrtc.Launch]:
    cubin, _ = ptxas.assemble(ptxas.ptx("decode_attention.cu", kind, "sm_80"), "sm_80")
    return nvrtc.read_launches(cubin)


def test_how_attention_is_launched():
    """The bytes follow from the layout in pass.h, counted by hand: tiles, queries, scales, plain tiles."""
    tiles = 2 * 4 * (32 * 80 + 32 * 80)  # stages, warps, rows of 64 bytes and a chunk
    scales = 4 * 4 * 32 * 2  # and the states, which need less
    plain = 4 * 16384 // 4 // 512 * 4  # warps, words of 512 columns
    for rows in (8, 16):
        queries = rows * (64 * 2 + 4 * 2)
        found = launches(preset("int8-plain", 64, rows=rows))
        assert found["decode_attention_kernel"] == nvrtc.Launch(128, tiles + queries + scales + plain)
    assert found["merge_splits_kernel"] == nvrtc.Launch(256, 8 * (2 * 128 + 1) * 4)


def test_a_large_tile_gets_fewer_threads():
    """Smaller GPUs have 99 KB of shared memory per block."""
    dense = QuantSpec("dense")
    found = launches(kind_of(dense, dense, 256, 256, rows=16))
    assert found["decode_attention_kernel"].threads == 64
    assert found["decode_attention_kernel"].shared_bytes <= SHARED_BYTES


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_nvcc_agrees(tmp_path):
    """The sources are CUDA C++ for the offline compiler too."""
    kind = preset("int4", 64)
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
