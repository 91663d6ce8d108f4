"""Random sequences of all operations of a cache, checked against a list of tokens.

The oracle keeps the tokens of every row and follows the rules of the design only: which columns the next query reads
exactly, and that a block or a token is quantized once, when it is complete. After every step the cache must hold the
same bytes, and its next query must read the same keys and values.

    python tests/test_stateful.py --minutes 30            # a soak with seeds of its own, printed as they start
    python tests/test_stateful.py --minutes 1 --seed 17   # again from a seed that failed
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import random
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import families
import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hf_kvquant import KVQuantConfig, QuantizedCache, QuantizedStates, QuantSpec, ops, quantize, static
from hf_kvquant.changes import FORWARD
from hf_kvquant.ops import MAX_Q_LEN
from hf_kvquant.route import learn_route
from hf_kvquant.sliding import SlidingQuantizedLayer
from hf_kvquant.storage import ROLLBACK

STEPS_IN_CI = 10_000
HEADS, HEAD_DIM = 1, 16
LONGEST, LONGEST_SLIDING = 260, 700
MODEL = families.config("llama", num_hidden_layers=1, head_dim=HEAD_DIM)
# A model with one sliding layer, for the configs that end with SLIDING.
SLIDING, WINDOW = "-sliding", 9
SLIDING_MODEL = families.config("mistral", num_hidden_layers=1, head_dim=HEAD_DIM, sliding_window=WINDOW)
# Latent attention, for the configs that end with LATENT: rotary keys, in the place of values, are narrower.
LATENT, ROPE_DIM = "-latent", 8
INT8, INT4 = QuantSpec("int8"), QuantSpec("int4", rotate=True)
BLOCKS8, BLOCKS4 = QuantSpec("int8", "channel", block_length=16), QuantSpec("int4", "channel", block_length=32)
BLOCKS3 = QuantSpec("int3", "channel", block_length=16)
CONFIGS = {name: KVQuantConfig.preset(name) for name in KVQuantConfig.preset_names()} | {
    "small-blocks": KVQuantConfig(BLOCKS8, INT4, sink_length=3, recent_length=9),
    "window-longer-than-block": KVQuantConfig(BLOCKS4, INT8, sink_length=2, recent_length=40),
    "fp8-blocks": KVQuantConfig(QuantSpec("fp8", "channel", block_length=16), QuantSpec("fp8")),
    "token-window": KVQuantConfig(INT4, INT8, sink_length=5, recent_length=20),
    "dense-keys": KVQuantConfig(QuantSpec("dense"), INT4, sink_length=2, recent_length=5),
    "dense-values": KVQuantConfig(BLOCKS8, QuantSpec("dense"), sink_length=1),
    "by-definition": KVQuantConfig(BLOCKS8, INT4, sink_length=3, recent_length=9, backend="reference"),
    "value-blocks": KVQuantConfig(BLOCKS8, BLOCKS4, sink_length=2, recent_length=5),
    "few-bits": KVQuantConfig(BLOCKS3, QuantSpec("int2", rotate=True), sink_length=2, recent_length=5),
}
CONFIGS |= {
    f"{name}-static": dataclasses.replace(CONFIGS[name], static=True)
    for name in ("int4", "int8-plain", "small-blocks", "token-window", "dense-keys", "by-definition", "value-blocks",
                 "few-bits")
}  # fmt: skip
CONFIGS |= {
    f"{name}{SLIDING}": dataclasses.replace(CONFIGS[name], sliding=WINDOW)
    for name in ("int4", "int8-plain", "small-blocks", "window-longer-than-block", "token-window", "dense-keys",
                 "dense-values", "by-definition", "value-blocks", "few-bits")
}  # fmt: skip
CONFIGS |= {
    f"{name}-static{SLIDING}": dataclasses.replace(CONFIGS[f"{name}{SLIDING}"], static=True)
    for name in ("int4", "int8-plain", "small-blocks", "window-longer-than-block", "dense-keys", "by-definition",
                 "value-blocks")
}  # fmt: skip
CONFIGS |= {f"{name}{LATENT}": CONFIGS[name] for name in ("int8", "int4-small", "small-blocks", "token-window-static")}
# The max_length of static caches; no sequence here needs more.
ROOM = 960
# The number of different keys and values of a token: ordinary vectors, vectors with outliers, and zeros.
VOCAB = 48
_generator = torch.Generator().manual_seed(5)
VECTORS = torch.randn(VOCAB, 2, HEADS, HEAD_DIM, generator=_generator)
VECTORS[::7, :, :, 3] *= 30
VECTORS[::11] = 0

# Columns of a sliding layer that does not record its past: the window, what a crop may bring back into it, and what
# comes between two moves, in whole blocks.
BOUND = WINDOW + ROLLBACK + ROLLBACK + 63

steps = 0


class Side:
    """Keys or values by the rules; tensors are `[batch, HEADS, columns, head_dim]`."""

    def __init__(self, spec: QuantSpec, recent_length: int, batch: int, head_dim: int):
        self.spec, self.recent_length = spec.resolve(head_dim), recent_length
        self.tokens = torch.zeros(batch, HEADS, 0, head_dim)
        # The window's copy of each column: the token, or its de-quantized value if a long crop lost it.
        self.window = self.tokens
        self.window_start = 0
        # The bytes of the quantized columns, and their de-quantized elements.
        self.stored: dict[str, torch.Tensor] = {}
        self.elements = self.tokens

    @property
    def length(self) -> int:
        return self.tokens.shape[2]

    @property
    def has_window(self) -> bool:
        return not self.spec.is_dense and (self.spec.is_channel or self.recent_length > 0)

    def dense_from(self, position: int) -> int:
        if self.spec.is_dense:
            return 0
        if not self.has_window:
            return self.length
        start = position - self.recent_length + 1
        if self.spec.is_channel:
            start = min(start, position // self.spec.block_length * self.spec.block_length)
        return max(0, start)

    def append(self, new: torch.Tensor, padding: torch.Tensor) -> None:
        self.tokens, self.window = (torch.cat([x, new], 2) for x in (self.tokens, self.window))
        self.make_way(self.length)
        start, end = self.elements.shape[2], self.whole(self.length)
        if not self.spec.is_dense and start < end:
            made = quantize(self.window[:, :, start:end], self.spec, padding[:, start:end])
            self.elements = torch.cat([self.elements, made.dequantize()], 2)
            for name in ("data", "scale", "zero_point"):
                part = getattr(made, name)
                if part is not None:
                    self.stored[name] = torch.cat([self.stored[name], part], 2) if name in self.stored else part

    def whole(self, length: int) -> int:
        """The number of columns that belong to complete blocks."""
        return length // self.spec.block_length * self.spec.block_length if self.spec.is_channel else length

    def make_way(self, end: int) -> None:
        """Drop the columns that the window no longer keeps when the length is `end`."""
        kept = max(self.recent_length, self.spec.block_length or 0) + ROLLBACK
        self.window_start = max(self.window_start, end - kept)

    def crop(self, length: int, first: int = 0) -> bool:
        """Crop to `length`; returns whether exact copies were lost of columns from `first` on."""
        before = self.elements
        self.tokens, self.window = self.tokens[:, :, :length], self.window[:, :, :length].clone()
        self.elements = self.elements[:, :, : self.whole(length)]
        rows = self.whole(length) // (self.spec.block_length or 1)
        for name, part in self.stored.items():
            self.stored[name] = part[:, :, : self.whole(length) if name == "data" else rows]
        needed, self.window_start = self.dense_from(length), min(self.window_start, length)
        if not self.has_window or max(needed, first) >= self.window_start:
            return False
        self.window[:, :, needed : self.window_start] = before[:, :, needed : self.window_start]
        self.window_start = needed
        return True

    def select(self, rows: torch.Tensor) -> None:
        self.tokens, self.window, self.elements = (x[rows] for x in (self.tokens, self.window, self.elements))
        self.stored = {name: part[rows] for name, part in self.stored.items()}

    def read(self, position: int, is_sink: torch.Tensor) -> torch.Tensor:
        """The elements that the query at `position` reads."""
        if self.spec.is_dense:
            return self.tokens
        near = torch.arange(self.length) >= self.dense_from(position)
        body = torch.nn.functional.pad(self.elements, (0, 0, 0, self.length - self.elements.shape[2]))
        return torch.where(is_sink[:, None, :, None], self.tokens, torch.where(near[:, None], self.window, body))


class CacheMachine(RuleBasedStateMachine):
    def start(self, batch: int) -> None:
        """Empty the oracle."""
        config = self.cache.kv_config
        self.batch, self.length, self.furthest = batch, 0, 0
        self.padding = torch.zeros(batch, 0, dtype=torch.bool)
        specs = zip((config.keys, config.values), self.head_dims)
        self.sides = [Side(spec, config.recent_length, batch, head_dim) for spec, head_dim in specs]

    @initialize(
        name=st.sampled_from(sorted(CONFIGS)),
        batch=st.integers(1, 3),
        max_length=st.sampled_from([None, None, 40, 200]),
        prompt=st.integers(0, 300),
    )
    def create(self, name, batch, max_length, prompt):
        self.folder = tempfile.TemporaryDirectory()
        self.is_static, self.is_sliding = CONFIGS[name].static, name.endswith(SLIDING)
        self.head_dims = HEAD_DIM, ROPE_DIM if name.endswith(LATENT) else HEAD_DIM
        self.model = SLIDING_MODEL if self.is_sliding else MODEL
        self.cache = QuantizedCache(self.model, CONFIGS[name], max_length=ROOM if self.is_static else max_length)
        assert isinstance(self.cache.layers[0], SlidingQuantizedLayer) == self.is_sliding
        self.routes = {
            "prefill_dense": 0,
            "decode_fused": 0,
            "decode_dequantized": 0,
            "window_lost": 0,
            "nonfinite": 0,
        }
        self.longest = LONGEST_SLIDING if self.is_sliding else LONGEST
        self.start(batch)
        if self.is_sliding and prompt:
            # Otherwise few sequences would fill the window.
            self.append(prompt, prompt, True)

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()

    # --- tokens

    def states(self, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(VOCAB, (self.batch, n), generator=torch.Generator().manual_seed(seed))
        vectors = VECTORS[tokens].unbind(2)
        return tuple(x[..., :dim].transpose(1, 2).contiguous() for x, dim in zip(vectors, self.head_dims))

    def is_padding(self, length: int) -> torch.Tensor:
        known = self.padding[:, :length]
        return torch.nn.functional.pad(known, (0, length - known.shape[1]))

    def is_sink(self) -> torch.Tensor:
        is_token = ~self.is_padding(self.length)
        return is_token & (is_token.long().cumsum(1) <= self.cache.kv_config.sink_length)

    def reads(self, position: int) -> list[torch.Tensor]:
        """What the queries from `position` on may see."""
        reads = [side.read(position, self.is_sink()) for side in self.sides]
        return [x[:, :, max(position - WINDOW + 1, 0) :] for x in reads] if self.is_sliding else reads

    # Twice, because without tokens there is little to compare.
    @precondition(lambda self: self.length < self.longest)
    @rule(seed=st.integers(0, 2**16), n=st.sampled_from([1, 1, 2, 7, 16, 32]), traced=st.booleans())
    def decode(self, n, seed, traced):
        self.append(n, seed, True, traced)

    @precondition(lambda self: self.length < self.longest)
    @rule(
        n=st.one_of(st.just(1), st.integers(1, MAX_Q_LEN), st.integers(MAX_Q_LEN + 1, 110)),
        seed=st.integers(0, 2**16), takes_states=st.booleans(), traced=st.booleans(),
    )  # fmt: skip
    def append(self, n, seed, takes_states, traced=False):
        start, new = self.length, self.states(n, seed)
        past = self.reads(start) if start else None
        # This acts like a compiled step of a static cache: only the device knows the length.
        with mock.patch.object(static, "is_traced", return_value=traced):
            returned = self.cache.update(*new, 0)
        if takes_states:
            learn_route(*returned)
        self.length += n
        self.furthest = max(self.furthest, self.length)
        for side, x in zip(self.sides, new):
            side.append(x, self.is_padding(self.length))
        fused = [isinstance(x, QuantizedStates) for x in returned]
        if start == 0:
            expected = new
            self.routes["prefill_dense"] += 1
        elif n <= MAX_Q_LEN:
            assert fused == [bool(self.cache.layers[0].takes_states)] * 2
            self.routes["decode_dequantized"] += not fused[0]
            expected = self.reads(start)
            returned = [x.read(n) if f else x for x, f in zip(returned, fused)]
        else:
            expected = [torch.cat(pair, 2) for pair in zip(past, new)]
            self.routes["decode_dequantized"] += 1
        if self.is_static:
            # They cover all tokens that may come; the unused part is zero.
            whole = [x.shape[2] == ROOM for x in returned]
            assert not any(x[:, :, self.length :].any() for x, is_whole in zip(returned, whole) if is_whole)
            returned = [x[:, :, : self.length] if is_whole else x for x, is_whole in zip(returned, whole)]
            if self.is_sliding:
                returned = [x[:, :, -right.shape[2] :] for x, right in zip(returned, expected)]
        for got, right in zip(returned, expected):
            assert_equal(got, right, "returned")

    @rule(n=st.one_of(st.integers(1, ROLLBACK), st.integers(1, LONGEST)))
    def crop(self, n):
        try:
            self.cache.crop(-n)
        except RuntimeError:
            # What the window has left is retired, but never what a crop of this length needs.
            assert self.is_sliding and self.length - n < self.furthest - ROLLBACK
            return
        if self.length:
            self.length = max(0, self.length - n)
            first = self.cache.layers[0].dropped if self.is_sliding else 0
            lost = [side.crop(self.length, first) for side in self.sides]
            self.routes["window_lost"] += any(lost)

    @rule(starts=st.booleans())
    def record_past(self, starts):
        """Assisted decoding asks for it; nothing is retired until the next crop."""
        if starts:
            self.cache.activate_past_recording()
        elif self.is_sliding:
            layer = self.cache.layers[0]
            layer.record_past = False
            if layer.length > BOUND and not self.is_static:
                # The crop with which the host ends recording does this.
                layer._retire(layer.length)

    @precondition(lambda self: self.length > 60)
    @rule(batch=st.integers(1, 3))
    def reset(self, batch):
        self.cache.reset()
        self.start(batch)

    @rule(data=st.data())
    def set_padding(self, data):
        """Left padding of a new prompt, or padding between the turns of a batch."""
        lengths = data.draw(st.lists(st.integers(0, 40), min_size=self.batch, max_size=self.batch))
        mask = torch.ones(self.batch, self.length + 45, dtype=torch.long)
        for row, n in enumerate(lengths):
            mask[row, self.length : self.length + n] = 0
        self.cache.set_padding(mask)
        self.padding = torch.cat([self.is_padding(self.length), mask[:, self.length :] == 0], 1)

    # --- rows

    def select(self, rows: torch.Tensor) -> None:
        self.batch = len(rows)
        self.padding = self.padding[rows]
        for side in self.sides:
            side.select(rows)

    @precondition(lambda self: self.cache.layers[0].is_initialized)
    @rule(data=st.data())
    def reorder(self, data):
        rows = torch.tensor(
            data.draw(st.lists(st.integers(0, self.batch - 1), min_size=self.batch, max_size=self.batch))
        )
        self.cache.reorder_cache(rows)
        self.select(rows)

    @precondition(lambda self: self.cache.layers[0].is_initialized and self.batch <= 2)
    @rule(repeats=st.integers(1, 2))
    def repeat(self, repeats):
        self.cache.batch_repeat_interleave(repeats)
        self.select(torch.arange(self.batch).repeat_interleave(repeats))

    @precondition(lambda self: self.cache.layers[0].is_initialized)
    @rule(data=st.data())
    def select_rows(self, data):
        rows = torch.tensor(data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=3)))
        self.cache.batch_select_indices(rows)
        self.select(rows)

    # --- storage

    @rule(more=st.integers(0, 60))
    def reserve(self, more):
        self.cache.reserve(self.length + more)

    @rule()
    def offload(self):
        self.cache.layers[0].offload()
        self.cache.layers[0].prefetch()

    @precondition(lambda self: self.length)
    @rule(max_length=st.sampled_from([None, None, 250]))
    def save_and_load(self, max_length):
        path = Path(self.folder.name) / "cache.safetensors"
        with mock.patch("os.fsync"):
            self.cache.save(path)
        before = path.read_bytes()
        max_length = ROOM if self.is_static else max_length
        self.cache, old = QuantizedCache.load(path, self.model, max_length=max_length), self.cache
        # Later changes of the copy must not reach the file, which is mapped.
        self.saved = (path, before)
        assert old.routes == self.cache.routes

    @precondition(lambda self: hasattr(self, "saved"))
    @rule()
    def the_file_is_unchanged(self):
        path, before = self.saved
        assert path.read_bytes() == before

    @rule(n=st.integers(1, 40), seed=st.integers(0, 2**16))
    def deepcopy(self, n, seed):
        """Go on with the copy; changes of the original must not reach it."""
        original, self.cache = self.cache, copy.deepcopy(self.cache)
        original.update(*self.states(n, seed), 0)
        original.crop(-(n // 2))

    # --- faults

    @precondition(lambda self: self.cache.layers[0].is_initialized and self.length < self.longest)
    @rule(
        n=st.integers(1, ROLLBACK),
        seed=st.integers(0, 2**16),
        written=st.booleans(),
        kind=st.sampled_from([MemoryError, KeyboardInterrupt]),
    )
    def interrupted_append(self, n, seed, written, kind):
        real = ops.quantize_append

        def interrupted(*args, **kwargs):
            if written:
                real(*args, **kwargs)
            raise kind

        states = self.states(n, seed)
        with mock.patch.object(ops, "quantize_append", interrupted), pytest.raises(kind):
            self.cache.update(*states, 0)
        with pytest.raises(ValueError, match="interrupted"):
            self.cache.update(*states, 0)
        self.cache.crop(0)
        self.furthest = max(self.furthest, self.length + n)
        for side in self.sides:
            # The tokens are forgotten, but may have been written over the oldest ones of the window.
            side.make_way(self.length + n)

    @rule(n=st.integers(1, ROLLBACK), seed=st.integers(0, 2**16))
    def interrupted_forward(self, n, seed):
        before = self.length
        self.cache.begin(FORWARD)
        if before and before + n <= self.longest:
            self.append(n, seed, False)
            self.length = before
            # A crop of up to `ROLLBACK` tokens leaves the cache as if they had never come.
            assert [side.crop(before) for side in self.sides] == [False, False]
            with pytest.raises(ValueError, match="middle of a forward call"):
                self.cache.begin(FORWARD)
            self.cache.crop(0)
        # A call that stored nothing leaves nothing to take back.
        self.cache.begin(FORWARD)
        self.cache.end()

    # --- after every step

    @invariant()
    def holds_what_the_rules_say(self):
        global steps
        steps += 1
        layer = self.cache.layers[0]
        assert layer.tokens == self.cache.get_seq_length() == self.length
        assert {**self.cache.routes} == self.routes
        if not self.length:
            return
        layer_sides, reads = (layer._keys, layer._values), self.reads(self.length)
        first = layer.dropped if self.is_sliding else 0
        for name, side, own, read in zip(("keys", "values"), self.sides, layer_sides, reads):
            for part, right in ({"data": side.tokens} if side.spec.is_dense else side.stored).items():
                right = right[:, :, first if part == "data" else first // (side.spec.block_length or 1) :]
                assert_equal(getattr(own, part)[:, :, : right.shape[2]], right, f"{name}.{part}")
            assert_equal(getattr(layer, name), read, name)
        if self.is_sliding and (self.is_static or not layer.record_past):
            assert layer.length <= BOUND
            assert not self.is_static or layer._keys.capacity <= BOUND


def assert_equal(got: torch.Tensor, right: torch.Tensor, what: str) -> None:
    # Equal values, not bits: a stored -0 may be read as 0.
    assert got.shape == right.shape, (what, got.shape, right.shape)
    if not torch.equal(got, right):
        columns = (got != right).any(-1).any(1).nonzero().tolist()
        raise AssertionError(f"{what} differ in [row, column] {columns[:10]} of {tuple(got.shape)}")


QUIET = {
    "deadline": None,
    "database": None,
    "stateful_step_count": 60,
    "suppress_health_check": list(HealthCheck),
    "print_blob": False,
    "report_multiple_bugs": False,
}


def run(seed: int, examples: int, phases: tuple[Phase, ...] = (Phase.generate,)) -> None:
    """Run `examples` sequences of 60 steps from a seed; Phase.shrink makes a failure shorter, which takes minutes."""
    machine = hypothesis.seed(seed)(type("SeededCacheMachine", (CacheMachine,), {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_state_machine_as_test(machine, settings=settings(**QUIET, max_examples=examples, phases=phases))


def test_ten_thousand_steps():
    global steps
    steps = 0
    run(seed=20_24, examples=STEPS_IN_CI // 60 + 80)
    assert steps >= STEPS_IN_CI


def soak() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None, help="start with this seed (default: a random one)")
    given = parser.parse_args()
    seed = random.randrange(2**32) if given.seed is None else given.seed
    until = time.monotonic() + given.minutes * 60
    while time.monotonic() < until:
        print(f"seed {seed}, {steps} steps so far", flush=True)
        run(seed, examples=100, phases=(Phase.generate, Phase.shrink))
        seed = (seed + 1) % 2**32
    print(f"{steps} steps, no difference")


if __name__ == "__main__":
    soak()
