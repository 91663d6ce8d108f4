"""The reference: attention against torch's own over de-quantized states, and appending in any chunks."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from hf_kvquant import QuantSpec, quantize, reference
from hf_kvquant import states as states_module

TOKEN = {
    "int8": QuantSpec("int8"),
    "fp8": QuantSpec("fp8"),
    "int4": QuantSpec("int4", group_size=16),
    "int4-rotate": QuantSpec("int4", group_size=32, rotate=True),
    "dense": QuantSpec("dense"),
}
CHANNEL = {
    "int8-channel": QuantSpec("int8", "channel"),
    "fp8-channel": QuantSpec("fp8", "channel", block_length=32),
    "int4-channel": QuantSpec("int4", "channel", block_length=16),
}
# Pairs of specs for keys and values: every format and grid on either side.
PAIRS = {
    "int8": (TOKEN["int8"], TOKEN["int8"]),
    "fp8": (TOKEN["fp8"], TOKEN["fp8"]),
    "int4": (TOKEN["int4"], TOKEN["int4"]),
    "int4-rotate": (TOKEN["int4-rotate"], TOKEN["int4-rotate"]),
    "int8-channel": (CHANNEL["int8-channel"], TOKEN["int8"]),
    "fp8-channel": (CHANNEL["fp8-channel"], TOKEN["fp8"]),
    "int4-channel": (CHANNEL["int4-channel"], TOKEN["int4-rotate"]),
    "channel-values": (TOKEN["int8"], CHANNEL["int4-channel"]),
    "dense-keys": (TOKEN["dense"], TOKEN["int4-rotate"]),
    "dense-values": (CHANNEL["int4-channel"], TOKEN["dense"]),
}
WINDOWS = {"no window": (0, 0), "sinks": (4, 0), "recent": (0, 7), "both": (4, 40)}
HEADS = {"MHA": (3, 3), "GQA": (6, 2), "MQA": (5, 1)}
MASKS = ["none", "padding", "bool", "bool, one head", "float, min", "float, -inf", "float16, min", "float, bias"]
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,  # the last rounding of outputs up to about 2
    "lse": 1e-5,  # relative; it is float32 for every dtype of queries
}
SCALING = 0.2

by_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
by_window = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())


def left_padding(batch: int, kv_len: int, q_len: int) -> torch.Tensor:
    """bool `[batch, kv_len]`, True for padding: row 0 has none, the last row as much as its queries allow."""
    padding = torch.zeros(batch, kv_len, dtype=torch.bool)
    padding[-1, : (kv_len - q_len) // 2] = True
    return padding


def make_mask(kind: str, padding: torch.Tensor, num_heads: int, q_len: int, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask of each kind that the operator takes; all hide padding and are causal, but the biased ones add more."""
    batch, kv_len = padding.shape
    seen = torch.arange(kv_len) <= torch.arange(kv_len - q_len, kv_len)[:, None]
    seen = seen & ~padding[:, None, None]
    if kind == "none":
        return None
    if kind == "padding":
        return (~padding).long()
    if kind == "bool, one head":
        return seen
    # Unlike usual masks, each head hides other columns, but never a query's own token.
    hidden = torch.rand(batch, num_heads, q_len, kv_len) < 0.2
    hidden &= torch.arange(kv_len) != torch.arange(kv_len - q_len, kv_len)[:, None]
    seen = seen & ~hidden
    if kind == "bool":
        return seen
    dtype = torch.float16 if kind == "float16, min" else dtype
    lowest = -math.inf if kind == "float, -inf" else torch.finfo(dtype).min
    bias = torch.zeros(batch, num_heads, q_len, kv_len, dtype=dtype)
    if kind == "float, bias":
        bias = torch.randn_like(bias)
    return bias.masked_fill(~seen, lowest)


def visible(mask: torch.Tensor | None, q_len: int, kv_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which columns each query sees, and the bias of each, from any mask, `[.., q_len, kv_len]`."""
    causal = torch.arange(kv_len) <= torch.arange(kv_len - q_len, kv_len)[:, None]
    zero = torch.zeros((), dtype=torch.float64)
    if mask is None:
        return causal, zero
    if mask.ndim == 2:
        return causal & (mask != 0)[:, None, None], zero
    if mask.dtype == torch.bool:
        return mask, zero
    seen = mask > torch.finfo(mask.dtype).min
    return seen, mask.double().masked_fill(~seen, 0)


def sdpa(query, keys, values, mask=None) -> torch.Tensor:
    """torch's attention, query by query over the keys and values that each query reads."""
    num_heads, q_len, kv_len = query.shape[1], query.shape[2], keys.length
    q_per_kv = num_heads // keys.shape[1]
    seen, bias = visible(mask, q_len, kv_len)
    additive = (bias.expand(seen.shape) if bias.ndim == 0 else bias).masked_fill(~seen, -math.inf).to(query.dtype)
    outputs = []
    for j in range(q_len):
        position = kv_len - q_len + j
        k, v = (s.dequantize(position).repeat_interleave(q_per_kv, dim=1) for s in (keys, values))
        row = additive[..., min(j, additive.shape[-2] - 1), :][..., None, :]
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(query[:, :, j : j + 1], k, v, row, scale=SCALING)
        )
    return torch.cat(outputs, dim=2)


def eager(query, keys, values, mask=None, s_aux=None, softcap=0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, in float64: output and log-sum-exp."""
    num_heads, q_len, kv_len = query.shape[1], query.shape[2], keys.length
    seen, bias = (x.expand(query.shape[0], num_heads, q_len, kv_len) for x in visible(mask, q_len, kv_len))
    q_per_kv = num_heads // keys.shape[1]
    output = torch.zeros(*query.shape[:3], values.shape[-1], dtype=torch.float64)
    lse = torch.full(query.shape[:3], -math.inf, dtype=torch.float64)
    for j in range(q_len):
        k, v = (s.dequantize(kv_len - q_len + j).double() for s in (keys, values))
        for b in range(query.shape[0]):
            for h in range(num_heads):
                columns = seen[b, h, j]
                scores = (k[b, h // q_per_kv, columns] @ query[b, h, j].double()) * SCALING
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = (scores + bias[b, h, j, columns]).exp()
                total = weights.sum() + (0 if s_aux is None else s_aux[h].double().exp())
                lse[b, h, j] = total.log()
                if columns.any():
                    output[b, h, j] = (weights / total) @ v[b, h // q_per_kv, columns]
    return output, lse


@pytest.fixture
def setting(outlier, store):
    """Makes queries, and states of keys and values in poisoned storage, of a given size."""

    def make(
        pair, window=(0, 0), *, kv_len=130, q_len=1, heads=(6, 2), batch=2, head_dim=32, dtype=torch.float64,
        padding=None, v_head_dim=None,
    ):  # fmt: skip
        num_heads, num_kv_heads = heads
        key = outlier(batch, num_kv_heads, kv_len, head_dim, dtype=dtype)
        value = torch.randn(batch, num_kv_heads, kv_len, v_head_dim or head_dim).to(dtype)
        query = (0.5 * torch.randn(batch, num_heads, q_len, head_dim)).to(dtype)
        sink_length, recent_length = window
        states = store(
            key, value, *pair, sink_length=sink_length, recent_length=recent_length, padding=padding,
            append=reference.quantize_append,
        )  # fmt: skip
        return query, *states

    return make


def assert_equals_sdpa(query, keys, values, mask=None):
    output, lse = reference.decode_attention(query, keys, values, mask, scaling=SCALING)
    assert output.dtype == query.dtype
    assert lse.dtype == torch.float32
    tolerance = TOLERANCE[query.dtype]
    torch.testing.assert_close(output, sdpa(query, keys, values, mask), rtol=tolerance, atol=tolerance)
    _, expected = eager(query, keys, values, mask)
    torch.testing.assert_close(lse.double(), expected, rtol=TOLERANCE["lse"], atol=TOLERANCE["lse"])


class TestEqualsSDPA:
    @by_window
    @by_pair
    def test_formats_and_windows(self, pair, window, setting):
        assert_equals_sdpa(*setting(pair, window, q_len=3))

    @pytest.mark.parametrize("kv_len", [1, 2, 16, 63, 64, 65, 130])
    @by_pair
    def test_lengths(self, pair, kv_len, setting):
        assert_equals_sdpa(*setting(pair, (2, 5), kv_len=kv_len))

    @pytest.mark.parametrize("name", ["int4-channel", "int4-rotate"])
    def test_long(self, name, setting):
        assert_equals_sdpa(*setting(PAIRS[name], (4, 32), kv_len=1000, q_len=2, batch=1))

    @pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
    @pytest.mark.parametrize("name", ["int8-channel", "int4-rotate"])
    def test_heads(self, name, heads, setting):
        assert_equals_sdpa(*setting(PAIRS[name], (2, 5), heads=heads, q_len=2))

    @pytest.mark.parametrize("q_len", range(1, 17))
    @pytest.mark.parametrize("name", ["int4-channel", "int8"])
    def test_q_len(self, name, q_len, setting):
        """33 columns end one beyond a block border of 16, so that the queries lie in up to three blocks."""
        assert_equals_sdpa(*setting(PAIRS[name], (1, 3), kv_len=33, q_len=q_len))

    @pytest.mark.parametrize("kind", MASKS)
    @pytest.mark.parametrize("q_len", [1, 5])
    @pytest.mark.parametrize("name", ["int8", "int4-channel", "dense-keys"])
    def test_masks(self, name, q_len, kind, setting):
        padding = left_padding(2, 65, q_len)
        query, keys, values = setting(PAIRS[name], (3, 4), kv_len=65, q_len=q_len, padding=padding)
        mask = make_mask(kind, padding, query.shape[1], q_len, query.dtype)
        assert_equals_sdpa(query, keys, values, mask)

    @pytest.mark.parametrize("name", ["int8", "int8-channel", "int4-rotate", "dense-values"])
    def test_a_complete_mask_may_show_later_columns(self, name, setting):
        """Columns after the query, as bidirectional masks show them, are read too, whether there is a ring or not."""
        query, keys, values = setting(PAIRS[name], kv_len=40, q_len=4)
        assert_equals_sdpa(query, keys, values, torch.ones(1, 1, 4, 40, dtype=torch.bool))

    def test_one_mask_row_for_all_queries(self, setting):
        query, keys, values = setting(PAIRS["int8"], kv_len=40, q_len=4)
        mask = torch.rand(2, 1, 1, 40) < 0.5
        assert_equals_sdpa(query, keys, values, mask)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @by_pair
    def test_dtypes(self, pair, dtype, setting):
        query, keys, values = setting(pair, (4, 7), q_len=2, dtype=dtype)
        output, lse = reference.decode_attention(query, keys, values, scaling=SCALING)
        # States keep their dtype; the computation is in float32.
        assert (output.dtype, lse.dtype) == (dtype, torch.float32)
        wide = [dataclasses.replace(s, dtype=torch.float32) for s in (keys, values)]
        expected, _ = eager(query, *wide)
        torch.testing.assert_close(output.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])

    @pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 112, 128, 192, 256])
    @pytest.mark.parametrize("name", ["int4-rotate-16", "int4-channel"])
    def test_head_dims(self, name, head_dim, setting):
        rotated = QuantSpec("int4", group_size=16, rotate=True)
        pair = (rotated, rotated) if name == "int4-rotate-16" else PAIRS[name]
        pair = (pair[0], rotated)
        assert_equals_sdpa(*setting(pair, (2, 5), kv_len=33, head_dim=head_dim, heads=(2, 1)))

    def test_values_of_another_head_dim(self, setting):
        query, keys, values = setting(PAIRS["int4-channel"], (2, 5), head_dim=96, v_head_dim=64, q_len=2)
        output, _ = reference.decode_attention(query, keys, values, scaling=SCALING)
        assert output.shape == (2, 6, 2, 64)
        assert_equals_sdpa(query, keys, values)


class TestScores:
    """Features that torch's attention has no argument for, compared with the formula written out."""

    @pytest.mark.parametrize("kind", MASKS)
    @pytest.mark.parametrize("softcap", [0.0, 5.0])
    @pytest.mark.parametrize("sinks", [False, True], ids=["no s_aux", "s_aux"])
    def test_softcap_and_learned_sinks(self, sinks, softcap, kind, setting):
        padding = left_padding(2, 65, 3)
        query, keys, values = setting(PAIRS["int4-channel"], (2, 3), kv_len=65, q_len=3, padding=padding)
        mask = make_mask(kind, padding, 6, 3, query.dtype)
        s_aux = 3 * torch.randn(6) if sinks else None
        output, lse = reference.decode_attention(query, keys, values, mask, s_aux, scaling=SCALING, softcap=softcap)
        expected, expected_lse = eager(query, keys, values, mask, s_aux, softcap)
        torch.testing.assert_close(output, expected, rtol=TOLERANCE[torch.float64], atol=TOLERANCE[torch.float64])
        torch.testing.assert_close(lse.double(), expected_lse, rtol=TOLERANCE["lse"], atol=TOLERANCE["lse"])

    def test_softcap_comes_before_the_mask_and_s_aux(self, setting):
        """A bias or a learned sink is not capped: with a cap of 1e-3 all scores are equal except for the bias."""
        query, keys, values = setting(PAIRS["int8"], kv_len=4, batch=1, heads=(1, 1))
        bias = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
        _, lse = reference.decode_attention(
            query, keys, values, bias.view(1, 1, 1, 4), torch.tensor([4.0]), scaling=SCALING, softcap=1e-3
        )
        assert abs(lse.item() - torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]).logsumexp(0).item()) < 2e-3

    def test_s_aux_counts_once(self, setting):
        """exp(lse) grows by exp(s_aux), and outputs shrink by the same share, for each of many queries."""
        query, keys, values = setting(PAIRS["int8"], q_len=16)
        s_aux = torch.full((6,), 2.0, dtype=torch.float64)
        plain, lse = reference.decode_attention(query, keys, values, scaling=SCALING)
        sunk, sunk_lse = reference.decode_attention(query, keys, values, None, s_aux, scaling=SCALING)
        lse = lse.double()
        expected = torch.logaddexp(lse, s_aux[:, None].expand_as(lse))
        torch.testing.assert_close(sunk_lse.double(), expected, rtol=TOLERANCE["lse"], atol=TOLERANCE["lse"])
        share = (lse - expected).exp()[..., None]
        torch.testing.assert_close(sunk, plain * share, rtol=TOLERANCE["lse"], atol=TOLERANCE["lse"])

    @pytest.mark.parametrize("kind", ["padding", "bool", "min", "-inf"])
    @by_pair
    def test_a_row_that_sees_nothing(self, pair, kind, setting):
        query, keys, values = setting(pair, (2, 3), kv_len=20, q_len=2)
        mask = torch.ones(2, 20, dtype=torch.long)
        mask[1] = 0
        if kind != "padding":
            mask = mask[:, None, None].expand(2, 1, 2, 20) != 0
            if kind != "bool":
                lowest = torch.finfo(query.dtype).min if kind == "min" else -math.inf
                mask = torch.zeros((), dtype=query.dtype).where(mask, lowest)
        output, lse = reference.decode_attention(query, keys, values, mask, scaling=SCALING)
        assert torch.equal(output[1], torch.zeros_like(output[1]))
        assert (lse[1] == -math.inf).all()
        assert output[0].abs().amax(-1).min() > 0
        assert lse[0].isfinite().all()

    def test_a_row_that_sees_only_the_learned_sink(self, setting):
        query, keys, values = setting(PAIRS["int8"], kv_len=20)
        mask = torch.zeros(2, 20, dtype=torch.long)
        s_aux = torch.randn(6)
        output, lse = reference.decode_attention(query, keys, values, mask, s_aux, scaling=SCALING)
        assert torch.equal(output, torch.zeros_like(output))
        torch.testing.assert_close(lse[..., 0], s_aux.expand(2, 6), rtol=TOLERANCE["lse"], atol=TOLERANCE["lse"])

    def test_large_scores_do_not_overflow(self, setting):
        query, keys, values = setting(PAIRS["int8"], kv_len=20, dtype=torch.float32)
        output, lse = reference.decode_attention(1e4 * query, keys, values, scaling=SCALING)
        assert output.isfinite().all()
        assert lse.isfinite().all()
        assert lse.max() > 1e3


class TestSixteenQueries:
    @by_window
    @by_pair
    def test_equal_sixteen_steps(self, pair, window, setting):
        """The rule belongs to the query: one call over 16 equals 16 calls over ever longer states."""
        padding = left_padding(2, 75, 16)
        query, keys, values = setting(pair, window, kv_len=75, q_len=16, padding=padding)
        mask = (~padding).long()
        output, lse = reference.decode_attention(query, keys, values, mask, scaling=SCALING)
        for j in range(16):
            length = 60 + j
            earlier = [dataclasses.replace(states, length=length) for states in (keys, values)]
            step = reference.decode_attention(query[:, :, j : j + 1], *earlier, mask[:, :length], scaling=SCALING)
            tolerance = TOLERANCE[torch.float64]
            torch.testing.assert_close(step[0], output[:, :, j : j + 1], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(step[1], lse[:, :, j : j + 1], rtol=TOLERANCE["lse"], atol=0)

    @by_pair
    def test_equal_sixteen_steps_that_append(self, pair, outlier, store, setting):
        """The same with states that have not seen the later tokens at all."""
        query, _, _ = setting(pair, kv_len=75, q_len=16)
        key, value = outlier(2, 2, 75, 32, dtype=torch.float64), torch.randn(2, 2, 75, 32, dtype=torch.float64)
        whole = store(key, value, *pair, sink_length=3, recent_length=5)
        output, _ = reference.decode_attention(query, *whole, scaling=SCALING)
        for j in range(16):
            seen = slice(0, 60 + j)
            states = store(key[:, :, seen], value[:, :, seen], *pair, sink_length=3, recent_length=5)
            step, _ = reference.decode_attention(query[:, :, j : j + 1], *states, scaling=SCALING)
            tolerance = TOLERANCE[torch.float64]
            torch.testing.assert_close(step, output[:, :, j : j + 1], rtol=tolerance, atol=tolerance)


class TestPoison:
    """Storage that was never written, or that no query reads, is NaN here; results stay finite and the same."""

    @by_window
    @by_pair
    def test_what_no_query_reads(self, pair, window, setting):
        query, keys, values = setting(pair, window, kv_len=130, q_len=3)
        expected, lse = reference.decode_attention(query, keys, values, scaling=SCALING)
        assert expected.isfinite().all()
        assert lse.isfinite().all()
        first_position = 127
        for states in (keys, values):
            spec = states.spec
            if states.recent is not None:
                live = torch.arange(states.dense_from(first_position), 130) % states.recent.shape[2]
                dead = [slot for slot in range(states.recent.shape[2]) if slot not in live.tolist()]
                assert dead
                states.recent[:, :, dead] = math.nan
            if not spec.is_dense:
                # Columns that every one of the three queries reads exactly.
                exact = list(range(states.dense_from(129), 130)) + list(range(window[0]))
                if not spec.is_channel:
                    states.scale[:, :, exact] = math.nan
                states.data[:, :, exact] = 0xFF
        output, _ = reference.decode_attention(query, keys, values, scaling=SCALING)
        assert torch.equal(output, expected)

    @by_pair
    def test_hidden_columns_may_hold_nan(self, pair, setting):
        """Hidden columns are skipped before arithmetic: NaN in them reaches no output."""
        query, keys, values = setting(pair, kv_len=80, q_len=2)
        mask = torch.ones(2, 80, dtype=torch.long)
        mask[1, :16] = 0
        expected, _ = reference.decode_attention(query, keys, values, mask, scaling=SCALING)
        for states in (keys, values):
            if states.spec.is_dense:
                states.data[1, :, :16] = math.nan
            elif states.spec.is_channel:
                states.data[1, :, :16] = 0xFF
                if states.spec.block_length == 16:
                    states.scale[1, :, 0] = math.nan
            else:
                states.scale[1, :, :16] = math.nan
        output, _ = reference.decode_attention(query, keys, values, mask, scaling=SCALING)
        assert torch.equal(output, expected)

    def test_a_visible_nan_is_seen(self, outlier, store):
        """A bad token on the token grid reaches the queries that see it, and no others."""
        key, value = outlier(2, 1, 20, 32), torch.randn(2, 1, 20, 32)
        key[1, 0, 3, 5] = math.nan
        states = store(key, value, *PAIRS["int8"])
        output, _ = reference.decode_attention(torch.randn(2, 2, 1, 32), *states, scaling=SCALING)
        assert output[1].isnan().all()
        assert output[0].isfinite().all()


def tensors_of(states) -> dict[str, torch.Tensor]:
    names = ("data", "scale", "zero_point", "recent")
    return {name: getattr(states, name) for name in names if getattr(states, name) is not None}


def same_storage(a, b) -> bool:
    """Every byte equal, unwritten ones included."""
    a, b = tensors_of(a), tensors_of(b)
    assert a.keys() == b.keys()
    return all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


def random_chunks(length: int) -> list[int]:
    chunks = []
    while length:
        chunks.append(min(length, int(torch.randint(1, 40, ()))))
        length -= chunks[-1]
    return chunks


class TestAppend:
    @pytest.mark.parametrize(("recent_length", "capacity"), [(0, 200), (7, 151)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @by_pair
    def test_chunks_do_not_matter(self, pair, dtype, recent_length, capacity, outlier, store):
        """One by one = at once = any chunks: every byte of body and ring, across block borders, with padding."""
        key, value = outlier(2, 2, 151, 32, dtype=dtype), outlier(2, 2, 151, 32, dtype=dtype)
        padding = torch.zeros(2, 40, dtype=torch.bool)  # shorter than the states: later columns are tokens
        padding[1, :33] = True
        padded = torch.nn.functional.pad(padding, (0, 111))
        options = {"recent_length": recent_length, "capacity": capacity, "padding": padded}
        options["append"] = reference.quantize_append
        whole = store(key, value, *pair, **options)
        for chunks in (
            [1] * 151,
            random_chunks(151),
            random_chunks(151),
            [64, 64, 23],
            [63, 1, 1, 86],
            [140] + [1] * 11,
        ):
            parts = store(key, value, *pair, chunks=chunks, **options)
            assert all(map(same_storage, whole, parts)), chunks

    @by_pair
    def test_bytes_are_those_of_quantize(self, pair, outlier, store):
        key, value = outlier(2, 2, 151, 32), outlier(2, 2, 151, 32)
        padding = torch.zeros(2, 151, dtype=torch.bool)
        padding[1, :33] = True
        states = store(key, value, *pair, padding=padding, chunks=random_chunks(151), append=reference.quantize_append)
        for x, side in zip((key, value), states):
            if side.spec.is_dense:
                assert torch.equal(side.data[:, :, :151], x)
                continue
            expected = quantize(x, side.spec, padding)
            rows = 151 // side.spec.block_length if side.spec.is_channel else 151
            columns = rows * side.spec.block_length if side.spec.is_channel else 151
            assert torch.equal(side.data[:, :, :columns], expected.data[:, :, :columns])
            assert torch.equal(side.scale[:, :, :rows], expected.scale[:, :, :rows])
            if side.zero_point is not None:
                assert torch.equal(side.zero_point[:, :, :rows], expected.zero_point[:, :, :rows])
            # Nothing was written beyond these columns: the poison is still there.
            assert (side.data[:, :, columns:] == 0xFF).all()
            assert side.scale[:, :, rows:].isnan().all()

    def test_the_ring_holds_the_last_tokens(self, outlier, store):
        key, value = outlier(1, 1, 200, 32), outlier(1, 1, 200, 32)
        keys, values = store(key, value, *PAIRS["int4-channel"], recent_length=20, chunks=random_chunks(200))
        assert (
            keys.recent.shape[2] == values.recent.shape[2] == 84
        )  # the longer of block and window, and 64 for rollback
        for x, states in ((key, keys), (value, values)):
            columns = torch.arange(200 - 84, 200)
            assert torch.equal(states.recent[:, :, columns % 84], x[:, :, columns])

    def test_a_short_padding_mask(self, outlier, store):
        """Columns beyond the padding mask are tokens."""
        key = outlier(1, 1, 100, 32)
        short, whole = torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, 100, dtype=torch.bool)
        whole[:, :5] = True
        appended = []
        for padding in (short, whole):
            keys, values = store(key, key, *PAIRS["int8-channel"])
            keys.data.fill_(0)
            reference.quantize_append(key, key, keys, values, torch.zeros(2, dtype=torch.int64), padding, start=0)
            appended.append(keys)
        assert same_storage(*appended)
        assert not torch.equal(appended[0].scale[:, :, :1], quantize(key, keys.spec).scale[:, :, :1])

    def test_a_cuda_graph_cannot_ask_for_the_length(self, outlier, store, monkeypatch):
        x = outlier(1, 1, 40, 32)
        states = [
            dataclasses.replace(s, device_length=torch.tensor(30))
            for s in store(x, x, *PAIRS["int8"], append=reference.quantize_append)
        ]
        monkeypatch.setattr(states_module, "is_captured", lambda: True)
        with pytest.raises(RuntimeError, match="length of a static cache, which a CUDA graph cannot"):
            reference.decode_attention(torch.randn(1, 1, 1, 32), *states, scaling=0.2)
        with pytest.raises(RuntimeError, match="length of a static cache, which a CUDA graph cannot"):
            reference.quantize_append(x[:, :, :1], x[:, :, :1], *states, torch.zeros(2, dtype=torch.int64), start=0)

    @by_pair
    def test_nonfinite_is_counted(self, pair, outlier, store):
        """Token vectors of each head and side with a NaN or infinity are counted, not the elements in them."""
        key, value = outlier(2, 2, 40, 32), outlier(2, 2, 40, 32)
        key[0, 0, 3, :5] = math.nan
        key[1, :, 20, 0] = math.inf
        value[0, 1, 39, 7] = -math.inf
        for chunks in ([40], [1] * 40):
            faults = torch.tensor([5, 0])
            store(key, value, *pair, chunks=chunks, faults=faults, append=reference.quantize_append)
            assert faults.tolist() == [5 + 1 + 2 + 1, 0]

    def test_finite_numbers_are_not_counted(self, outlier, store):
        faults = torch.zeros(2, dtype=torch.int64)
        x = outlier(1, 1, 40, 32)
        store(x, x, *PAIRS["int8"], faults=faults, append=reference.quantize_append)
        assert not faults.any()
