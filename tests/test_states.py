"""`QuantizedStates`: which columns a query reads exactly, compared with the rule written out token by token."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_kvquant import QuantizedStates, QuantSpec, quantize
from hf_kvquant.states import dense_from

INT8, INT4 = QuantSpec("int8"), QuantSpec("int4", group_size=32, rotate=True)
CHANNEL = QuantSpec("int8", "channel", block_length=16)
DENSE = QuantSpec("dense")


def reads_exactly(t: int, i: int, row: list[bool], spec: QuantSpec, sink_length: int, recent_length: int) -> bool:
    """The rule for one pair: whether the query at position i reads column t exactly. `row`: the padding."""
    if spec.is_dense:
        return True
    if not row[t] and row[:t].count(False) < sink_length:
        return True
    if i - t < recent_length:
        return True
    return spec.is_channel and t // spec.block_length == i // spec.block_length


class TestDenseFrom:
    @pytest.mark.parametrize(
        ("spec", "recent_length", "position", "column"),
        [
            (INT8, 0, 5, 6),  # nothing, not even its own token
            (INT8, 1, 5, 5),  # its own token
            (INT8, 4, 5, 2),
            (INT8, 32, 5, 0),  # not below the first column
            (CHANNEL, 0, 15, 0),  # the last query of block 0
            (CHANNEL, 0, 16, 16),  # the first one of block 1
            (CHANNEL, 4, 16, 13),  # the recent tokens reach across the border
            (CHANNEL, 4, 25, 16),  # the block reaches further back than they do
            (CHANNEL, 32, 40, 9),
        ],
        ids=lambda value: value.code if isinstance(value, QuantSpec) else str(value),
    )
    def test_by_hand(self, spec, recent_length, position, column):
        assert dense_from(position, spec, recent_length) == column

    @pytest.mark.parametrize("recent_length", [0, 1, 7, 16, 17, 100])
    @pytest.mark.parametrize("spec", [INT8, CHANNEL, QuantSpec("int4", "channel")], ids=lambda spec: spec.code)
    def test_equals_the_rule(self, spec, recent_length):
        no_padding = [False] * 200
        for i in range(200):
            first = next((t for t in range(i + 1) if reads_exactly(t, i, no_padding, spec, 0, recent_length)), i + 1)
            assert dense_from(i, spec, recent_length) == first

    @pytest.mark.parametrize("spec", [INT8, DENSE], ids=lambda spec: spec.code)
    def test_without_a_ring_nothing_comes_from_it(self, spec, outlier, store):
        x = outlier(1, 1, 5, 32)
        keys, _ = store(x, x, spec, INT8)
        assert keys.recent is None
        assert [keys.dense_from(i) for i in range(5)] == [5] * 5


class TestDequantize:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("sink_length", "recent_length"), [(0, 0), (4, 0), (0, 5), (4, 20)])
    @pytest.mark.parametrize("kv_len", [1, 3, 16, 17, 63, 130])
    @pytest.mark.parametrize("spec", [INT8, INT4, CHANNEL, DENSE], ids=lambda spec: spec.code)
    def test_equals_the_rule(self, spec, kv_len, sink_length, recent_length, dtype, outlier, store):
        x = outlier(2, 2, kv_len, 32, dtype=dtype)
        padding = torch.zeros(2, kv_len, dtype=torch.bool)
        padding[1, : kv_len // 3] = True
        keys, _ = store(x, x, spec, INT8, sink_length=sink_length, recent_length=recent_length, padding=padding)
        body = x if spec.is_dense else quantize(x, spec, padding).dequantize(dtype)
        for i in sorted({kv_len - 1, max(kv_len - 2, 0), max(kv_len - 16, 0)}):
            exact = torch.tensor(
                [
                    [reads_exactly(t, i, row, spec, sink_length, recent_length) for t in range(i + 1)]
                    for row in padding.tolist()
                ]
            )
            expected = torch.where(exact[:, None, :, None], x[:, :, : i + 1], body[:, :, : i + 1])
            actual = keys.dequantize(i)[:, :, : i + 1]
            assert actual.dtype == dtype
            assert torch.equal(actual, expected)

    @pytest.mark.parametrize("spec", [INT8, INT4, CHANNEL, DENSE], ids=lambda spec: spec.code)
    def test_columns_after_the_position_are_read_too(self, spec, outlier, store):
        """The de-quantized route passes its first query's position: later columns are read too, exact or quantized."""
        x = outlier(1, 2, 40, 32)
        keys, _ = store(x, x, spec, INT8)
        for i in (30, 33, 39):
            error = (keys.dequantize(i) - x)[:, :, i:].abs().amax()
            assert error < 0.3 * x.abs().amax()

    def test_default_position_is_the_last(self, outlier, store):
        x = outlier(1, 2, 40, 32)
        keys, _ = store(x, x, CHANNEL, INT8, recent_length=3)
        assert torch.equal(keys.dequantize(), keys.dequantize(39))
        assert not torch.equal(keys.dequantize(), keys.dequantize(31))

    def test_values_have_no_block_rule(self, outlier, store):
        x = outlier(1, 2, 40, 32)
        keys, values = store(x, x, CHANNEL, INT8, recent_length=3)
        exact_keys = (keys.dequantize() == x).all(-1).all(1)[0]
        exact_values = (values.dequantize() == x).all(-1).all(1)[0]
        assert exact_keys[32:].all()  # block 2 begins at column 32
        assert exact_values.nonzero()[:, 0].tolist() == [37, 38, 39]

    def test_an_earlier_length_reads_as_before(self, outlier, store):
        """States made at an earlier length still read the same as then."""
        x = outlier(1, 2, 70, 32)
        later, _ = store(x, x, CHANNEL, INT8, sink_length=2, recent_length=5)
        for length in (40, 48, 49, 69):
            earlier, _ = store(x[:, :, :length], x[:, :, :length], CHANNEL, INT8, sink_length=2, recent_length=5)
            shorter = dataclasses.replace(later, length=length)
            assert shorter.shape == (1, 2, length, 32)
            assert shorter.data.data_ptr() == later.data.data_ptr()
            assert torch.equal(shorter.dequantize(), earlier.dequantize())

    def test_sinks_that_have_not_come_yet(self, outlier, store):
        """A row of padding has no sink; its sinks' storage is never read."""
        x = outlier(2, 1, 5, 32)
        padding = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        keys, _ = store(x, x, INT8, INT8, sink_length=3, padding=padding)
        assert keys.sink_positions.tolist() == [[-1, -1, -1], [3, 4, -1]]
        read = keys.dequantize()
        assert read.isfinite().all()
        assert torch.equal(read[1, :, 3:], x[1, :, 3:])
        assert not torch.equal(read[0, :, :3], x[0, :, :3])


class TestHost:
    """The attributes and methods that transformers and accelerate use on states that pass through a model."""

    @pytest.fixture
    def states(self, outlier, store) -> QuantizedStates:
        x = outlier(2, 3, 40, 32, dtype=torch.bfloat16)
        return store(x, x, CHANNEL, INT8, sink_length=2)[0]

    def test_looks_like_a_tensor(self, states):
        assert states.shape == states.size() == (2, 3, 40, 32)
        assert (states.size(1), states.size(-2), states.ndim) == (3, 40, 4)
        assert (states.dtype, states.device) == (torch.bfloat16, torch.device("cpu"))

    def test_is_frozen(self, states):
        for name in ("data", "length", "spec", "new_name"):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(states, name, None)

    def test_is_compared_and_hashed_by_identity(self, states):
        assert states != dataclasses.replace(states)
        assert len({states, states, dataclasses.replace(states)}) == 2

    @pytest.mark.parametrize(
        "arguments", [("cpu",), (torch.device("cpu"),), (torch.bfloat16,), ("cpu", torch.bfloat16)]
    )
    def test_to_where_it_is(self, states, arguments):
        assert states.to(*arguments) is states

    def test_to_another_device_moves_every_tensor(self, states):
        moved = states.to("meta", non_blocking=True)
        values = (*moved.stored, *vars(moved).values())
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        assert len(tensors) == 6
        assert all(t.device.type == "meta" for t in tensors)
        assert (moved.device.type, moved.shape, moved.routes) == ("meta", states.shape, states.routes)
        assert states.device.type == "cpu"

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_to_another_dtype_is_refused(self, states, dtype):
        with pytest.raises(ValueError, match=rf"dtype: .*torch.bfloat16 cannot become {dtype}; dequantize"):
            states.to(dtype)
        with pytest.raises(ValueError, match="dtype"):
            states.to("cpu", dtype=dtype)

    @pytest.mark.parametrize(
        "call",
        [
            lambda states, q: torch.matmul(q, states),
            lambda states, q: torch.nn.functional.scaled_dot_product_attention(q, states, states),
            lambda states, q: torch.cat([states, states], dim=2),
            lambda states, q: torch.add(q, states),
        ],
        ids=["matmul", "scaled_dot_product_attention", "cat", "add"],
    )
    def test_torch_functions_say_what_to_do(self, states, call):
        with pytest.raises(TypeError, match=r"was called on the quantized states.*hf_kvquant\.attention\(model\)"):
            call(states, torch.randn(2, 3, 1, 32))

    def test_the_error_names_the_function(self, states):
        with pytest.raises(TypeError, match=r"^matmul was called"):
            torch.matmul(torch.randn(2, 3, 1, 32), states)


class TestSlices:
    @pytest.mark.parametrize("on_device", [False, True], ids=["length-known", "length-on-device"])
    @pytest.mark.parametrize("spec", [INT8, INT4, CHANNEL, DENSE], ids=lambda spec: spec.code)
    def test_slices_make_the_whole(self, spec, on_device, outlier, store):
        x = outlier(2, 2, 700, 32)
        padding = torch.zeros(2, 700, dtype=torch.bool)
        padding[1, :5] = True
        states, _ = store(x, x, spec, INT8, sink_length=3, recent_length=8, padding=padding)
        if on_device:
            states = dataclasses.replace(states, device_length=torch.tensor(650))
        for position in (699, 640):
            slices = [states.dequantize(position, slice(start, start + 256)) for start in range(0, 700, 256)]
            assert torch.equal(torch.cat(slices, dim=2), states.dequantize(position))
