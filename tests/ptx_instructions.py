"""What each PTX instruction does: `compiled` turns one into a function of the threads that execute it.

Registers hold bits; `threads.read(operand, type)` gives an array with an element per thread, `threads.write(register,
array)` takes one. Floats are rounded once, half to even. Approximate instructions (ex2, lg2, rcp) are exact here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ptx_memory import Fault
from ptx_text import SIZES, Instruction

TYPES = {"pred": np.bool_, "f16": np.uint16, "f32": np.float32, "f64": np.float64, "f16x2": np.uint32}
TYPES |= {f"{kind}{8 * n}": np.dtype(f"{'i' if kind == 's' else 'u'}{n}") for kind in "bus" for n in (1, 2, 4, 8)}
TYPES = {name: np.dtype(kind) for name, kind in TYPES.items()}
COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
COMPARISONS |= {"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
COMPARISONS["na"] = lambda x, y: np.isnan(x) | np.isnan(y)  # "nan"; the others are told apart by two letters
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
WARP, BLOCK = "warp", "block"
LANES = np.arange(32)


class Unknown(NotImplementedError):
    """An instruction that the machine does not know."""


def waits_for(instruction: Instruction) -> str | None:
    """Whether all threads of a WARP, or of a BLOCK, have to execute an instruction together."""
    first = instruction.opcode[0]
    if first == "bar":
        return WARP if instruction.opcode[1] == "warp" else BLOCK
    return WARP if first in ("shfl", "vote", "ldmatrix", "movmatrix", "mma") else None


def only_copies(instruction: Instruction) -> bool:
    """Whether each bit of the result is a bit of an operand."""
    first, *_, kind = instruction.opcode
    if first == "cvt":
        return kind[0] in "us" and instruction.opcode[-2][0] in "us"
    return first in ("mov", "selp") and kind != "pred"


def compiled(instruction: Instruction) -> Callable:
    """A function that executes `instruction` for the threads it is given.

    Raises:
        Unknown: naming it.
    """
    first, kind = instruction.opcode[0], instruction.opcode[-1]
    make = _MAKERS.get(first)
    if make is None and kind in ("f16x2", "bf16x2"):
        make = _pairs
    if make is None and first in (_FLOAT if kind in ("f32", "f64") else _INTEGER):
        make = _float if kind in ("f32", "f64") else _integer
    if make is None:
        raise Unknown(instruction.text)
    return make(instruction.opcode, instruction.operands)


# -- 16-bit and 8-bit floats as bits ----------------------------------------------------------------


def half_value(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint16).view(np.float16).astype(np.float64)


def bfloat16_value(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def to_half(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Of float32."""
    bits = x.astype(np.float32).view(np.uint32)
    even = bits >> np.uint32(16) & np.uint32(1)
    rounded = (bits.astype(np.uint64) + np.uint64(0x7FFF) + even) >> np.uint64(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def _e4m3_numbers() -> np.ndarray:
    code = np.arange(127)
    exponent, mantissa = code // 8, code % 8
    return np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))


E4M3 = _e4m3_numbers()


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """Saturating at 448; half to even, which is the even code."""
    size = np.minimum(np.abs(x.astype(np.float64)), E4M3[-1])
    above = np.clip(np.searchsorted(E4M3, size), 1, 126)
    to_below, to_above = size - E4M3[above - 1], E4M3[above] - size
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    code = np.where(np.isnan(x), 127, np.where(up, above, above - 1))
    return (code | np.where(np.signbit(x), 0x80, 0)).astype(np.uint16)


def e4m3_value(code: np.ndarray) -> np.ndarray:
    size = np.append(E4M3, np.nan)[code & 0x7F]
    return np.where(code & 0x80, -size, size)


def sum_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in doubles, with a last bit of 1 where that is not exact, so that rounding again to fewer bits gives what
    one rounding of the exact sum gives (Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008)."""
    total = np.asarray(a + b)
    part = total - a
    error = (a - (total - part)) + (b - part)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    return np.where(inexact, bits + np.where((error > 0) == (total > 0), 1, -1), bits).view(np.float64)


HALVES = {"f16": (half_value, to_half), "bf16": (bfloat16_value, to_bfloat16)}


def _lower(x, bits=16):
    return x & np.uint32((1 << bits) - 1)


# -- moves and memory -------------------------------------------------------------------------------


def _mov(opcode, operands):
    to, source = operands
    kind = opcode[-1]
    if isinstance(to, tuple):
        part = 8 * SIZES[kind] // len(to)

        def unpack(threads):
            x = threads.read(source, kind)
            for i, name in enumerate(to):
                threads.write(name, (x >> x.dtype.type(part * i)).astype(f"u{part // 8}"))

        return unpack
    if isinstance(source, tuple):
        part = 8 * SIZES[kind] // len(source)
        dtype = TYPES[f"u{8 * SIZES[kind]}"]

        def pack(threads):
            parts = [threads.read(name, f"u{part}").astype(dtype) for name in source]
            threads.write(to, np.bitwise_or.reduce([x << dtype.type(part * i) for i, x in enumerate(parts)]))

        return pack
    return lambda threads: threads.write(to, threads.read(source, kind))


def _vector(operand) -> tuple[str, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def _ld(opcode, operands):
    names, dtype = _vector(operands[0]), TYPES[opcode[-1]]
    space = next(word for word in opcode if word in ("param", "shared", "global"))

    def load(threads):
        values = threads.load(space, operands[1], dtype, len(names))
        for i, name in enumerate(names):
            threads.write(name, values[:, i])

    return load


def _st(opcode, operands):
    names, kind = _vector(operands[1]), opcode[-1]
    space = next(word for word in opcode if word in ("shared", "global"))
    return lambda threads: threads.store(
        space, operands[0], np.stack([threads.read(name, kind, spread=True) for name in names], 1)
    )


def _atomic(opcode, operands):
    if opcode[-2:] not in (("add", "u64"), ("add", "u32")):
        raise Unknown(".".join(opcode))
    returns = opcode[0] == "atom"
    address, value = operands[-2:]

    def add(threads):
        old = threads.add_one_by_one(address, threads.read(value, opcode[-1], spread=True))
        if returns:
            threads.write(operands[0], old)

    return add


def _cp(opcode, operands):
    if opcode[2] == "commit_group":
        return lambda threads: threads.commit()
    if opcode[2] == "wait_group":
        return lambda threads: threads.wait(int(operands[0]))
    to, source, size, *rest = operands
    valid = rest[0] if rest else size
    return lambda threads: threads.copy(to, source, int(size), valid)


def _cvta(opcode, operands):
    if opcode[1:] != ("to", "global", "u64"):
        raise Unknown(".".join(opcode))
    return lambda threads: threads.write(operands[0], threads.read(operands[1], "u64"))


def _bar(opcode, operands):
    return lambda threads: threads.pass_barrier(opcode[1] != "warp")


def _griddepcontrol(opcode, operands):
    # When the next kernel starts does not matter, since it has to wait.
    return (lambda threads: threads.wait_for_grids()) if opcode[1] == "wait" else _nothing(opcode, operands)


def _nothing(opcode, operands):
    return lambda threads: None


# -- across the lanes of a warp ---------------------------------------------------------------------


def _shfl(opcode, operands):
    to, _, in_range = operands[0].partition("|")

    def shuffle(threads):
        x = threads.read(operands[1], "b32", spread=True).reshape(-1, 32)
        by = threads.read(operands[2], "u32", spread=True).reshape(-1, 32).astype(np.int64)
        if (by > 31).any() or not (np.asarray(threads.read(operands[3], "u32")) == 31).all():
            raise Unknown(f"{'.'.join(opcode)}: lanes {by.max()}, or part of a warp")
        source = LANES ^ by if opcode[2] == "bfly" else by
        threads.write(to, np.take_along_axis(x, source, 1).reshape(-1))
        if in_range:
            threads.write(in_range, np.ones(x.size, bool))

    return shuffle if opcode[2] in ("bfly", "idx") else _unknown(opcode)


def _vote(opcode, operands):
    def vote(threads):
        x = threads.read(operands[1], "pred", spread=True).reshape(-1, 32)
        result = {"any": lambda: x.any(1), "all": lambda: x.all(1), "ballot": lambda: _ballot(x)}[opcode[2]]()
        threads.write(operands[0], np.repeat(result, 32))

    return vote


def _ballot(x):
    return (x.astype(np.uint64) << LANES.astype(np.uint64)).sum(1).astype(np.uint32)


def _ldmatrix(opcode, operands):
    row, column = LANES // 4, 2 * (LANES % 4)
    transposed = "trans" in opcode

    def load(threads):
        if len(operands[0]) != 4:
            raise Unknown(".".join(opcode))
        # Lane 8 j + i holds row i of tile j.
        tiles = threads.load("shared", operands[1], TYPES["u16"], 8).reshape(-1, 4, 8, 8).astype(np.uint32)
        tiles = tiles.swapaxes(2, 3) if transposed else tiles
        for j, name in enumerate(operands[0]):
            low, high = tiles[:, j, row, column], tiles[:, j, row, column + 1]
            threads.write(name, (low | high << np.uint32(16)).reshape(-1))

    return load


def _movmatrix(opcode, operands):
    row, column = LANES // 4, 2 * (LANES % 4)

    def transpose(threads):
        x = threads.read(operands[1], "b32", spread=True).astype(np.uint32).reshape(-1, 32)
        matrix = np.empty((len(x), 8, 8), np.uint32)
        matrix[:, row, column], matrix[:, row, column + 1] = _lower(x), x >> np.uint32(16)
        threads.write(operands[0], (matrix[:, column, row] | matrix[:, column + 1, row] << np.uint32(16)).reshape(-1))

    return transpose if opcode[3:] == ("m8n8", "trans", "b16") else _unknown(opcode)


def _mma(opcode, operands):
    if opcode[3] == "m16n8k8" and opcode[4:] == ("row", "col", "f32", "tf32", "tf32", "f32"):
        return _mma_tf32(*operands)
    if opcode[3] != "m16n8k16" or opcode[4:6] != ("row", "col") or opcode[6] != "f32" or opcode[9] != "f32":
        raise Unknown(".".join(opcode))
    value, _ = HALVES[opcode[7]]
    g, t = LANES // 4, 2 * (LANES % 4)
    to, a_names, b_names, c_names = operands

    def multiply(threads):
        def each(name, kind):
            return threads.read(name, kind, spread=True).reshape(-1, 32)

        warps = each(a_names[0], "u32").shape[0]
        a, b, c = np.empty((warps, 16, 16)), np.empty((warps, 16, 8)), np.empty((warps, 16, 8))
        for i, name in enumerate(a_names):
            x = each(name, "u32")
            a[:, g + 8 * (i % 2), t + 8 * (i // 2)] = value(_lower(x))
            a[:, g + 8 * (i % 2), t + 8 * (i // 2) + 1] = value(x >> np.uint32(16))
        for i, name in enumerate(b_names):
            x = each(name, "u32")
            b[:, t + 8 * i, g] = value(_lower(x))
            b[:, t + 8 * i + 1, g] = value(x >> np.uint32(16))
        for i, name in enumerate(c_names):
            c[:, g + 8 * (i // 2), t + i % 2] = each(name, "f32")
        result = threads.multiply_matrices(a, b, c).astype(np.float32)
        for i, name in enumerate(to):
            threads.write(name, result[:, g + 8 * (i // 2), t + i % 2].reshape(-1))

    return multiply


def _mma_tf32(to, a_names, b_names, c_names):
    g, t = LANES // 4, LANES % 4

    def multiply(threads):
        def each(name):
            return threads.read(name, "f32", spread=True).reshape(-1, 32)

        def tf32(name):
            x = each(name)
            if (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0x1FFF)).any():
                raise Fault(f"multiplies {name}, which holds no TF32 number")
            return x

        warps = each(a_names[0]).shape[0]
        a, b, c = np.empty((warps, 16, 8)), np.empty((warps, 8, 8)), np.empty((warps, 16, 8))
        for i, name in enumerate(a_names):
            a[:, g + 8 * (i % 2), t + 4 * (i // 2)] = tf32(name)
        for i, name in enumerate(b_names):
            b[:, t + 4 * i, g] = tf32(name)
        for i, name in enumerate(c_names):
            c[:, g + 8 * (i // 2), 2 * t + i % 2] = each(name)
        result = threads.multiply_matrices(a, b, c).astype(np.float32)
        for i, name in enumerate(to):
            threads.write(name, result[:, g + 8 * (i // 2), 2 * t + i % 2].reshape(-1))

    return multiply


def exact_product(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c, summed in doubles."""
    return a @ b + c


def truncating_product(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c as tensor cores were measured to sum it: exact products and c are aligned to the largest of them, with
    two bits more than a float has, and cut off; so is the sum (Fasi, Higham, Mikaitis and Pranesh, Numerical behavior
    of NVIDIA tensor cores, 2021)."""
    terms = np.concatenate([a[:, :, :, None] * b[:, None, :, :], c[:, :, None, :]], 2)
    largest = np.max(np.where(terms == 0, -1000, np.frexp(terms)[1]), 2, keepdims=True)
    unit = np.ldexp(1.0, largest - 25)
    total = (np.trunc(terms / unit) * unit).sum(2)
    rounded = total.astype(np.float32)
    return np.where(np.abs(rounded) > np.abs(total), np.nextafter(rounded, np.float32(0)), rounded)


# -- integers and bits ------------------------------------------------------------------------------


def _divide(x, y):
    y = np.where(y == 0, 1, y)
    return np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y)) if x.dtype.kind == "i" else x // y


_INTEGER = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "mad": lambda x, y, z: x * y + z,
    "min": np.minimum,
    "max": np.maximum,
    "neg": lambda x: ~x + x.dtype.type(1),
    "abs": np.abs,
    "not": lambda x: ~x,
    "div": lambda x, y: _divide(x, y).astype(x.dtype),
    "rem": lambda x, y: (x - _divide(x, y) * y).astype(x.dtype),
    "popc": np.bitwise_count,
} | LOGIC


def _integer(opcode, operands):
    first, kind = opcode[0], opcode[-1]
    to, *sources = operands
    wide = f"{kind[0]}{16 * SIZES[kind]}"
    function = _INTEGER[first]
    if "wide" in opcode:

        def widened(threads):
            x, y = (threads.read(source, kind).astype(TYPES[wide]) for source in sources[:2])
            rest = [threads.read(source, wide) for source in sources[2:]]
            threads.write(to, function(x, y, *rest))

        return widened
    if "hi" in opcode:

        def high(threads):
            x, y = (threads.read(source, kind).astype(TYPES[wide]) for source in sources)
            threads.write(to, (x * y >> TYPES[wide].type(8 * SIZES[kind])).astype(TYPES[kind]))

        return high if first == "mul" and SIZES[kind] < 8 else _unknown(opcode)
    return lambda threads: threads.write(to, function(*(threads.read(source, kind) for source in sources)))


def _shift(opcode, operands):
    to, source, by = operands
    bits = 8 * SIZES[opcode[-1]]

    def shift(threads):
        x, n = threads.read(source, opcode[-1]), threads.read(by, "u32")
        # A shift by all bits or more leaves nothing but, to the right, the sign.
        beyond = n >= bits
        n = np.where(beyond, bits - 1, n).astype(x.dtype)
        if opcode[0] == "shl":
            return threads.write(to, np.where(beyond, x.dtype.type(0), x << n))
        rest = x >> n
        threads.write(to, rest if x.dtype.kind == "i" else np.where(beyond, x.dtype.type(0), rest))

    return shift


def _prmt(opcode, operands):
    def permute(threads):
        a, b, selector = (np.asarray(threads.read(x, "u32")).astype(np.uint64) for x in operands[1:])
        both, result = a | b << np.uint64(32), np.uint64(0)
        for i in range(4):
            nibble = selector >> np.uint64(4 * i) & np.uint64(15)
            byte = both >> np.uint64(8) * (nibble & np.uint64(7)) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            result = result | np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i)
        threads.write(operands[0], result.astype(np.uint32))

    return permute


def _bfi(opcode, operands):
    """Puts the lowest bits of the first operand into the second."""
    to, *sources = operands

    def insert(threads):
        bits, into, position, length = (np.asarray(threads.read(x, "u32")).astype(np.uint64) for x in sources)
        position, length = position & np.uint64(255), length & np.uint64(255)
        ones = (np.uint64(1) << np.minimum(length, np.uint64(32))) - np.uint64(1)
        mask = np.where(position < 32, ones << np.minimum(position, np.uint64(32)), np.uint64(0))
        moved = bits << np.minimum(position, np.uint64(32))
        threads.write(to, ((into & ~mask | moved & mask) & np.uint64(0xFFFFFFFF)).astype(np.uint32))

    return insert


def _lop3(opcode, operands):
    to, *sources, table = operands
    table = int(table, 0)

    def logic(threads):
        a, b, c = (threads.read(source, "u32") for source in sources)
        result = np.uint32(0)
        for i in range(8):
            if table >> i & 1:
                result = result | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        threads.write(to, result)

    return logic


def _selp(opcode, operands):
    to, yes, no, which = operands
    kind = opcode[-1]
    return lambda threads: threads.write(
        to, np.where(threads.read(which, "pred"), threads.read(yes, kind), threads.read(no, kind))
    )


def _setp(opcode, operands):
    comparison, kind = opcode[1], opcode[-1]
    combine = LOGIC.get(opcode[2])
    is_float = kind[0] == "f"
    # With NaN: false, but for "not equal" and those whose names end with u.
    unordered = is_float and len(comparison) == 3
    compare = COMPARISONS[comparison[:2]]

    def set_predicate(threads):
        x, y = threads.read(operands[1], kind), threads.read(operands[2], kind)
        result = compare(x, y)
        if is_float:
            nan = np.isnan(x) | np.isnan(y)
            result = result | nan if unordered else result & ~nan
        if combine:
            result = combine(result, threads.read(operands[3], "pred"))
        threads.write(operands[0], result)

    return set_predicate


# -- floats -----------------------------------------------------------------------------------------


def _fma(x, y, z):
    return sum_to_odd(x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)).astype(x.dtype)


def _exp2(x):
    return np.exp2(x.astype(np.float64)).astype(x.dtype)


_FLOAT = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "fma": _fma,
    "min": np.fmin,
    "max": np.fmax,
    "abs": np.abs,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "rcp": lambda x: (1 / x.astype(np.float64)).astype(x.dtype),
    "ex2": _exp2,
    "lg2": lambda x: np.log2(x.astype(np.float64)).astype(x.dtype),
}


def _float(opcode, operands):
    first, kind = opcode[0], opcode[-1]
    to, *sources = operands
    function, smallest = _FLOAT[first], np.float32(2.0**-126)
    flush, down, nan, saturate = ("ftz" in opcode), ("rm" in opcode), ("NaN" in opcode), ("sat" in opcode)
    if (kind == "f64" and first == "fma") or {"rp", "rz"} & set(opcode):
        raise Unknown(".".join(opcode))

    def flushed(x):
        return np.where(np.abs(x) < smallest, np.copysign(np.float32(0), x), x) if flush else x

    def compute(threads):
        xs = [flushed(np.asarray(threads.read(source, kind))) for source in sources]
        result = function(*xs)
        if down:  # rounded to nearest so far
            exact = sum_to_odd(xs[0].astype(np.float64) * xs[1].astype(np.float64), xs[2].astype(np.float64))
            result = np.where(result > exact, np.nextafter(result, np.float32(-np.inf)), result)
        if nan:
            result = np.where(np.isnan(xs[0]) | np.isnan(xs[1]), TYPES[kind].type(np.nan), result)
        if saturate:
            result = np.where(np.isnan(result), 0, np.clip(result, 0, 1))
        threads.write(to, flushed(result).astype(TYPES[kind]))

    return compute


def _pairs(opcode, operands):
    """Two 16-bit floats in a word."""
    value, pack = HALVES[opcode[-1][:-2]]
    function = {
        "fma": lambda x, y, z: sum_to_odd(x * y, z),
        "mul": np.multiply,
        "add": sum_to_odd,
        "sub": lambda x, y: sum_to_odd(x, -y),
        "neg": np.negative,
    }.get(opcode[0]) or _unknown(opcode)
    to, *sources = operands

    def compute(threads):
        words = [np.asarray(threads.read(source, "u32")) for source in sources]
        low = pack(function(*(value(_lower(word)) for word in words)))
        high = pack(function(*(value(word >> np.uint32(16)) for word in words)))
        threads.write(to, low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16))

    return compute


def _cvt(opcode, operands):
    to, *sources = operands
    target, source = opcode[-2:]
    if target in ("f16x2", "bf16x2") and source == "f32":
        pack = HALVES[target[:-2]][1]

        def pack_two(threads):
            high, low = (pack(np.asarray(threads.read(x, "f32"))).astype(np.uint32) for x in sources)
            threads.write(to, high << np.uint32(16) | low)

        return pack_two
    if (target, source) == ("e4m3x2", "f32"):

        def pack_bytes(threads):
            high, low = (to_e4m3(np.asarray(threads.read(x, "f32"))) for x in sources)
            threads.write(to, high << np.uint16(8) | low)

        return pack_bytes
    if (target, source) == ("f16x2", "e4m3x2"):

        def unpack_bytes(threads):
            x = np.asarray(threads.read(sources[0], "u16"))
            low, high = (to_half(e4m3_value(code)).astype(np.uint32) for code in (x & 0xFF, x >> 8))
            threads.write(to, high << np.uint32(16) | low)

        return unpack_bytes
    if source == "f16" or target == "f16":
        convert = half_value if source == "f16" else lambda x: x
        back = to_half if target == "f16" else lambda x: x.astype(TYPES[target])
        if target not in ("f16", "f32") or source not in ("f16", "f32"):
            raise Unknown(".".join(opcode))
        return lambda threads: threads.write(to, back(convert(np.asarray(threads.read(sources[0], source)))))
    from_float, to_float = source[0] == "f", target[0] == "f"
    whole = next((f for word, f in _TO_WHOLE.items() if word in opcode), None)
    if (from_float and not to_float and not whole) or {"rm", "rp", "rz"} & set(opcode):
        raise Unknown(".".join(opcode))

    def convert(threads):
        x = np.asarray(threads.read(sources[0], source))
        x = whole(x) if whole else x
        if from_float and not to_float:  # saturating; NaN gives 0
            limits = np.iinfo(TYPES[target])
            inside = np.clip(np.nan_to_num(x.astype(np.float64), nan=0.0), float(limits.min), float(limits.max))
            if SIZES[target] == 8:
                raise Unknown(".".join(opcode))
            x = inside
        elif "sat" in opcode:
            if not (from_float and to_float):
                raise Unknown(".".join(opcode))
            x = np.where(np.isnan(x), 0, np.clip(x, 0, 1))
        threads.write(to, x.astype(TYPES[target]))

    return convert


_TO_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _unknown(opcode):
    raise Unknown(".".join(opcode))


_MAKERS: dict[str, Callable] = {
    "mov": _mov,
    "ld": _ld,
    "ldu": _ld,
    "st": _st,
    "red": _atomic,
    "atom": _atomic,
    "cp": _cp,
    "cvta": _cvta,
    "bar": _bar,
    "griddepcontrol": _griddepcontrol,
    "membar": _nothing,
    "fence": _nothing,
    "shfl": _shfl,
    "vote": _vote,
    "ldmatrix": _ldmatrix,
    "movmatrix": _movmatrix,
    "mma": _mma,
    "shl": _shift,
    "shr": _shift,
    "prmt": _prmt,
    "lop3": _lop3,
    "bfi": _bfi,
    "selp": _selp,
    "setp": _setp,
    "cvt": _cvt,
}
