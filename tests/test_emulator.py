"""The emulator: its primitives follow the PTX ISA and IEEE 754, and it finds one planted fault of each kind."""

from __future__ import annotations

import ctypes
import re
from fractions import Fraction
from pathlib import Path

import emulator
import numpy as np
import pytest
import torch

PROBES = Path(__file__).parent / "emulator" / "probes.cu"


class Probe(ctypes.Structure):
    _fields_ = [("input", ctypes.c_void_p), ("output", ctypes.c_void_p), ("variant", ctypes.c_int64)]


def launch(kernel, input, output, variant=0, *, grid=1, threads=32, shared_bytes=0, arch=800):
    probe = Probe(input.data_ptr(), output.data_ptr(), variant)
    device = emulator.Device(arch, sources=[PROBES])
    macros = {"KVQUANT_THREADS": threads, "KVQUANT_SHARED_BYTES": shared_bytes}
    device.launch({kernel: (grid,)}, macros, probe, reads=[input], writes=[output])
    return output


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("transposed", [False, True], ids=["b", "b-transposed"])
@pytest.mark.parametrize("by", ["ldmatrix", "formula"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_mma_is_a_matrix_product(dtype, by, transposed):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    stored = torch.cat([a.flatten(), (b.T if transposed else b).flatten()])
    variant = (dtype == torch.bfloat16) | (by == "formula") << 1 | transposed << 2
    c = launch("mma_kernel", stored, torch.full((16, 8), torch.nan), variant)
    torch.testing.assert_close(c, (a.double() @ b.double()).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "trans"])
def test_ldmatrix_gives_each_lane_its_row(transposed):
    tiles = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)
    r = launch("ldmatrix_kernel", tiles, torch.empty(32, 4, 2, dtype=torch.int16), int(transposed), shared_bytes=512)
    expected = (tiles.mT if transposed else tiles).reshape(4, 32, 2).transpose(0, 1)
    assert torch.equal(r, expected)


def words(n: int) -> torch.Tensor:
    """Random words, with every e4m3 byte and the edges of the 16-bit formats among them, int32 `[n, 3]`."""
    random = torch.randint(-(2**31), 2**31, (n, 3))
    random[:256, 0] = torch.arange(256) | torch.arange(256).flip(0) << 8
    edges = torch.tensor([0, 1, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0x7C00, 0x8000, 0x8001, 0xFBFF, 0xFC00, 0x7E00])
    grid = torch.cartesian_prod(edges, edges, edges)
    random[256 : 256 + len(grid)] = grid | grid.flip(1) << 16
    # Near one another, so that sums cancel and products round.
    near = random[2000:]
    near[:, :] = (near & 0x83FF83FF) | 0x38003800
    random[3000:, 1:] = torch.randn(1096, 2).mul(100).div(torch.randint(1, 10000, (1096, 2))).view(torch.int32)
    return (random & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)


def same_values(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Both tensors have the same bits, or NaN."""
    nan = got.isnan() & expected.isnan()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(bits(got.masked_fill(nan, 0)), bits(expected.masked_fill(nan, 0)))


def test_words_and_pairs():
    input = words(4096)
    r = launch("words_kernel", input, torch.empty(4096, 16, dtype=torch.int32), grid=32, threads=128, arch=890)
    a, b, c = (input[:, i].contiguous() for i in range(3))
    assert torch.equal(r[:, 0], (a & b) | c)
    assert torch.equal(r[:, 1], (a & b) ^ c)
    assert torch.equal(r[:, 2], (a & ~c) | (b & c))

    source = np.concatenate([a.numpy().view(np.uint8).reshape(-1, 4), b.numpy().view(np.uint8).reshape(-1, 4)], 1)
    nibbles = c.numpy().view(np.uint32)[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 15
    byte = np.take_along_axis(source, (nibbles & 7).astype(np.int64), 1)
    byte = np.where(nibbles & 8, np.where(byte >= 128, 255, 0), byte).astype(np.uint8)
    assert np.array_equal(r[:, 3].contiguous().numpy().view(np.uint8).reshape(-1, 4), byte)

    x, y, z = (w.view(torch.float16).view(-1, 2) for w in (a, b, c))
    got = [r[:, 4 + i].contiguous().view(torch.float16).view(-1, 2) for i in range(3)]
    same_values(got[0], fused(x, y, z))
    same_values(got[1], x * y)
    same_values(got[2], x - y)
    for dtype, unpacked, packed in ((torch.float16, 7, 11), (torch.bfloat16, 9, 12)):
        numbers = r[:, unpacked : unpacked + 2].contiguous().view(torch.float32)
        same_values(numbers, a.view(dtype).view(-1, 2).float())
        pairs = r[:, packed].contiguous().view(dtype).view(-1, 2)
        same_values(pairs, torch.stack([b, c], 1).view(torch.float32).to(dtype))

    small = torch.stack([b, c], 1).view(torch.float32)
    packed = r[:, 13].contiguous().view(torch.uint8).view(-1, 4)[:, :2].contiguous().view(torch.float8_e4m3fn)
    same_values(packed.float(), small.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    numbers = a.view(torch.float32)
    same_values(r[:, 14].contiguous().view(torch.float32), 1 / numbers)
    power = r[:, 15].contiguous().view(torch.float32)
    expected = numbers.double().exp2()
    expected = torch.where(expected < 2.0**-126, 0.0, expected).float()
    torch.testing.assert_close(power, expected, rtol=3e-7, atol=0, equal_nan=True)


def fused(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """x * y + z with one rounding: exact in fractions of Python's integers."""
    rounded = (x.double() * y.double() + z.double()).to(x.dtype)  # correct if nothing is finite, or the sum is zero
    numbers = torch.stack([x, y, z, rounded], -1).double().reshape(-1, 4)
    result = rounded.flatten().clone()
    for i, (a, b, c, d) in enumerate(numbers.tolist()):
        if not all(map(np.isfinite, (a, b, c, d))) or d == 0:
            continue
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        near = result[i]
        around = [
            near,
            torch.nextafter(near, near.new_tensor(torch.inf)),
            torch.nextafter(near, -near.new_tensor(torch.inf)),
        ]
        around = [v for v in around if v.isfinite()]
        # The nearest value; if two are equally near, the one whose last bit is 0.
        result[i] = min(around, key=lambda v: (abs(Fraction(v.item()) - exact), v.view(torch.int16).item() & 1))
    return result.view(x.shape)


def test_shuffles_and_votes():
    r = launch("shuffle_kernel", torch.empty(1), torch.empty(64, 5, dtype=torch.int32), threads=64)
    i = torch.arange(64)
    assert torch.equal(r[:, 0].long(), i // 32 * 32 + 7 * i % 32)
    assert torch.equal(r[:, 1].long(), i ^ 5)
    assert set(r[:, 2].tolist()) == {int(np.int32(np.uint32(sum(1 << lane for lane in range(0, 32, 3)))))}
    assert r[:, 3].tolist() == [0] * 32 + [1] * 32
    transposed = r[:, 4].contiguous().view(torch.int16).reshape(2, 8, 8)
    assert torch.equal(transposed, torch.arange(128, dtype=torch.int16).reshape(2, 8, 8).mT)


PIPELINE_FAULTS = {
    "no wait": "reads .* a cp_async that nobody waited for still copies there",
    "no commit": "reads .* a cp_async that nobody waited for still copies there",
    "one group too many": "reads .* a cp_async that nobody waited for still copies there",
    "no barrier after the wait": "reads byte .* of dynamic shared memory, which nobody wrote",
    "no barrier before the refill": "copies to byte .* no barrier since another thread's read",
    "copies left": "the thread ends with 1 cp_async copies that it did not wait for",
}


def pipeline(variant):
    tiles = torch.randint(0, 2**31 - 1, (7, 128, 4)).to(torch.int32)
    r = launch("pipeline_kernel", tiles, torch.empty(128, dtype=torch.int32), variant, threads=128, shared_bytes=6144)
    tiles[6, 50:] = 0  # not valid: filled with zeros
    return r, tiles.sum((0, 2)).roll(-32).to(torch.int32)


def test_a_pipeline_without_fault():
    r, expected = pipeline(0)
    assert torch.equal(r, expected)


@pytest.mark.parametrize("fault", PIPELINE_FAULTS)
def test_faults_of_a_pipeline(fault):
    with pytest.raises(emulator.Fault, match=PIPELINE_FAULTS[fault]) as raised:
        pipeline(list(PIPELINE_FAULTS).index(fault) + 1)
    assert "pipeline_kernel, block (0, 0, 0), thread " in str(raised.value)


# In the order of the kernel's enumeration.
FAULTS = {
    "no barrier": "reads byte .* of across, which nobody wrote",
    "warp barrier only": "reads byte .* of across: no barrier since another thread's write",
    "no warp barrier": "reads byte .* of beside, which nobody wrote",
    "two writers": r"writes byte 32 of across: no barrier since another thread's write \(thread 8\)",
    "unwritten": "reads byte 280 of across, which nobody wrote",
    "partly unwritten": "reads byte [0-9]+ of dynamic shared memory, which nobody wrote",
    "beyond a shared array": "thread 5, .* writes 4 bytes at byte 512 of across, which has 512",
    "beyond the dynamic array": "thread 5, .* writes 4 bytes at byte 512 of dynamic shared memory, which has 512",
    "misaligned in shared memory": "writes 4 bytes at byte 2 of dynamic shared memory: not aligned",
    "read beyond": "thread 3, .* reads 4 bytes at byte 512 of a tensor of 512 bytes",
    "read before": "thread 3, .* reads 4 bytes at byte -4 of a tensor of 512 bytes",
    "read null": "thread 3, .* reads 4 bytes at .nil.",
    "write to what is read": "writes 4 bytes at byte [0-9]+ of a tensor that is only read",
    "misaligned": "reads 16 bytes at byte [0-9]+ of a tensor: not aligned",
    "two blocks write": r"block \(1, 0, 0\).* writes byte .* since another thread's write .* of block 0 of the grid",
    "two threads write": r"block \(0, 0, 0\).* writes byte .* since another thread's write .* of block 0 of the grid",
    "a block reads": r"block \(1, 0, 0\).* reads byte .* since another thread's write .* of block 0 of the grid",
    "exit before a barrier": "thread 77, .* the thread ends while others wait at a block barrier",
    "another barrier": r"a block barrier while thread \d+ waits at another one, probes.cu:\d+",
    "barrier in a branch": r"waits for ever .*; thread \d+ waits at probes.cu",
    "half a warp shuffles": "ends while other lanes of its warp wait in shuffle_xor",
    "shuffle after exit": "thread 40, .* ends while other lanes of its warp wait in shuffle_xor",
    "another collective": "(shuffle_xor|warp_any) while other lanes of the warp are in (shuffle_xor|warp_any)",
    "lane out of range": "lane 31 shuffles from lane 32",
    "write after read": r"thread 6, .* byte 16 of beside: no barrier since another thread's read \(thread 5\)",
    "write after others read": r"byte 128 of across: no barrier since another thread's read \(thread 1\)",
    "relaxed and plain": r"block \(1, 0, 0\).* reads byte .* since another thread's write",
    "block read before": r"block \(1, 0, 0\).* writes byte .* since another thread's read .* of block 0 of the grid",
    "no barrier in global": r"block \(0, 0, 0\).* since another thread's (read|write) .* of block 0 of the grid",
}


def exchange(variant):
    input, output = torch.arange(128, dtype=torch.int32) * 3, torch.full((2, 128), -1, dtype=torch.int32)
    return input, launch("exchange_kernel", input, output, variant, grid=2, threads=128, shared_bytes=512)


def test_an_exchange_without_fault():
    input, output = exchange(0)
    i = torch.arange(128)
    assert torch.equal(output.long(), (1000 * (i ^ 1) + input[i ^ 33] + (i ^ 64)).expand(2, 128))


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault):
    with pytest.raises(emulator.Fault, match=FAULTS[fault]) as raised:
        exchange(list(FAULTS).index(fault) + 1)
    assert str(raised.value).startswith("exchange_kernel, block (")


def test_a_fault_names_its_line():
    with pytest.raises(emulator.Fault) as raised:
        exchange(list(FAULTS).index("beyond a shared array") + 1)
    line = int(re.search(r"probes.cu:(\d+)", str(raised.value))[1])
    assert "kSharedBeyond" in PROBES.read_text().splitlines()[line - 1]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of the process's mappings")
def test_a_launch_gives_the_stacks_of_its_threads_back():
    """A process may have 65,530 mappings, and each specialisation is a library with an emulator of its own."""

    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    stored = torch.randn(16 * 16 + 16 * 8).half()
    launch("mma_kernel", stored, torch.empty(16, 8), 0)
    before = mappings()
    launch("mma_kernel", stored, torch.empty(16, 8), 0)
    launch("shuffle_kernel", torch.empty(1), torch.empty(64, 5, dtype=torch.int32), threads=64)
    assert mappings() < before + 2 * 64


WAITS = {
    "in time": None,
    "after a load": "thread 0, probes.cu.* reads global memory before it has waited for the kernels before",
    "in a part of the threads": "thread 5, .* writes global memory before it has waited",
    "in all threads but one that ends": "thread 5, .* ends, and did not wait for the kernels before",
}


@pytest.mark.parametrize("when", WAITS)
def test_a_kernel_that_starts_early_has_to_wait(when):
    x, y = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    device, variant = emulator.Device(sources=[PROBES], starts_early=True), list(WAITS).index(when)
    arguments = dict(reads=[x], writes=[y])
    macros = {"KVQUANT_THREADS": 32, "KVQUANT_SHARED_BYTES": 0}
    probe = Probe(x.data_ptr(), y.data_ptr(), variant)
    if WAITS[when] is None:
        device.launch({"early_kernel": (1,)}, macros, probe, **arguments)
        assert torch.equal(x, y)
    else:
        with pytest.raises(emulator.Fault, match=WAITS[when]):
            device.launch({"early_kernel": (1,)}, macros, probe, **arguments)
    emulator.Device(sources=[PROBES]).launch({"early_kernel": (1,)}, macros, probe, **arguments)


def test_launches_that_cannot_be():
    device, x = emulator.Device(sources=[PROBES]), torch.zeros(128, dtype=torch.int32)
    probe = Probe(x.data_ptr(), x.data_ptr(), 0)
    small = {"KVQUANT_THREADS": 128, "KVQUANT_SHARED_BYTES": 0}
    with pytest.raises(ValueError, match="kernel: 'absent_kernel' is in 0 of the sources"):
        device.launch({"absent_kernel": (1,)}, small, probe)
    with pytest.raises(emulator.Fault, match="48 threads; expected a multiple of 32"):
        device.launch({"exchange_kernel": (1,)}, {**small, "KVQUANT_THREADS": 48}, probe)
    with pytest.raises(emulator.Fault, match="240000 bytes of dynamic shared memory"):
        device.launch({"exchange_kernel": (1,)}, {**small, "KVQUANT_SHARED_BYTES": 240000}, probe)
    with pytest.raises(ValueError, match="cannot be emulated; expected cpu"):
        device.launch({"exchange_kernel": (1,)}, small, probe, writes=[x.to("meta")])
