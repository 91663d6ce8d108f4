"""Models with attention code of their own: what they do with cached states is recorded, and the operator computes it.

The grammar is tested on small functions, which stand for a model's code; the classes of transformers are built tiny by
`eval/model_matrix.py`, which compares every product with the model's own functions on de-quantized copies.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import families
import processes
import pytest
import torch
import torch.nn.functional as F
import transformers

from hf_kvquant import KVQuantConfig, QuantizedCache, QuantSpec, grammar, host
from hf_kvquant.attention import attend as attention_function
from hf_kvquant.host import CACHE
from hf_kvquant.integration import attention as context
from hf_kvquant.layers import QuantizedLayer
from hf_kvquant.route import Routes, switched_attention
from hf_kvquant.sliding import SlidingQuantizedLayer

# Attention code of their own, of every kind: ALiBi, biases per head, merged heads, repeated heads, casts, masks filled
# in, halves of the values, other columns behind the cached ones, sinks of each query, and masks made of values.
CLASSES = {
    "BigBirdForCausalLM", "BlipForConditionalGeneration", "BloomForCausalLM", "CpmAntForCausalLM",
    "DiffLlamaForCausalLM", "DogeForCausalLM", "FalconForCausalLM", "FSMTForConditionalGeneration", "GitForCausalLM",
    "GPTNeoForCausalLM", "GPTNeoXJapaneseForCausalLM", "Inkling2ForCausalLM", "Inkling2ForConditionalGeneration",
    "Inkling2LoopForCausalLM", "Inkling2LoopForConditionalGeneration", "JetMoeForCausalLM",
    "LEDForConditionalGeneration", "MegatronBertForCausalLM", "MptForCausalLM", "MvpForCausalLM",
    "MvpForConditionalGeneration", "RemBertForCausalLM", "RoFormerForCausalLM", "T5Gemma2ForConditionalGeneration",
    "TrOCRForCausalLM", "XGLMForCausalLM", "XLMWithLMHeadModel",
}  # fmt: skip
EVAL = Path(__file__).parent.parent / "eval"
KNOWN = sorted(name for name in CLASSES if hasattr(transformers, name))
CONFIG = KVQuantConfig(QuantSpec("int8", "channel"), QuantSpec("int4", rotate=True), sink_length=2, recent_length=8)
BATCH, HEADS, LENGTH, DIM = 2, 4, 150, 16


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    """What `eval/model_matrix.py` finds of these classes, in a process of its own."""
    out = tmp_path_factory.mktemp("matrix") / "own.json"
    done = subprocess.run(
        [sys.executable, "model_matrix.py", "--jobs", "1", "--out", str(out), "--only", *KNOWN],
        cwd=EVAL, env=processes.environment(OMP_NUM_THREADS="1"), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8"))["families"]


@pytest.mark.parametrize("name", KNOWN)
def test_a_class_of_transformers(name, measured):
    """Exact with a window over every token; each product equals the model's own; close to the dense cache."""
    found = measured[name]
    if found["status"] == "refused" and not host.VERSION.startswith(host.NEWEST):
        pytest.skip(found["reason"])
    assert found["status"] == "fused", found
    assert found["compared_calls"] > 0
    for preset, figures in found["presets"].items():
        assert not figures["routes"].get("decode_dequantized"), preset
        assert 0 < figures["fused"] <= 1e-4, preset


def test_none_is_missing():
    """On the newest release; older ones lack some."""
    if host.VERSION.startswith(host.NEWEST):
        assert set(KNOWN) == CLASSES


# --- the grammar


class Bench:
    """One layer in the middle of a forward call, and what a step of it gives to a model: `LENGTH + q_len` columns.
    A sliding layer has stored others before them."""

    def __init__(
        self, q_len: int = 1, heads: int = HEADS, dtype=torch.float32, batch: int = BATCH, config=CONFIG, sliding=False
    ):
        self.routes = Routes()
        self.layer = QuantizedLayer(config, 0, self.routes)
        if sliding:
            self.layer = SlidingQuantizedLayer(config, 0, self.routes, None, LENGTH + 1)
        self.q_len, self.heads, self.dtype, self.batch = q_len, heads, dtype, batch
        self.routes.in_call = True
        self.states(3 * LENGTH if sliding else LENGTH)
        with switched_attention():
            self.keys, self.values = self.states(q_len)
        self.step = self.routes.steps[0]
        self.query = torch.randn(batch, heads, q_len, DIM, dtype=dtype)

    def states(self, n: int):
        return self.layer.update(*(torch.randn(self.batch, self.heads, n, DIM, dtype=self.dtype) for _ in range(2)))

    @property
    def copies(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model's own code would read."""
        return tuple(x.read(self.q_len) for x in (self.step.keys, self.step.values))

    def close(self) -> None:
        """The call ends, and the model drops its states."""
        del self.keys, self.values
        for step in self.routes.steps:
            step.close()


@pytest.fixture(params=[False, True], ids=["full", "sliding"])
def bench(request) -> Bench:
    return Bench(sliding=request.param)


ALIBI = torch.linspace(-3, 0, LENGTH + 1).expand(1, HEADS, 1, -1) * torch.arange(1, HEADS + 1).view(1, -1, 1, 1)
LOWEST = torch.finfo(torch.float32).min
HIDDEN = torch.arange(LENGTH + 1) < 20


def by_matmul(q, k, v):
    return F.softmax(q @ k.transpose(-1, -2) / math.sqrt(DIM), dim=-1) @ v


def with_biases(q, k, v):
    scores = torch.matmul(q, k.mT) * DIM**-0.5 + ALIBI
    scores = scores * 0.5 + torch.where(HIDDEN, LOWEST, 0.0)
    return torch.matmul(nn_dropout(scores.float().softmax(-1, dtype=torch.float32).to(v.dtype)), v)


def nn_dropout(x):
    return torch.nn.Dropout(0.1).eval()(x)


def merged_heads(q, k, v):
    """BLOOM."""
    batch, heads, q_len, dim = q.shape
    q, k, v = (x.reshape(batch * heads, -1, dim) for x in (q, k, v))
    alibi = ALIBI.expand(batch, -1, -1, -1).reshape(batch * heads, 1, -1)
    scores = alibi.baddbmm(batch1=q, batch2=k.transpose(1, 2), beta=0.5, alpha=0.25)
    assert scores.size() == (batch * heads, q_len, k.shape[1])
    weights = F.softmax(scores.view(batch, heads, q_len, -1), dim=-1).view(batch * heads, q_len, -1)
    return torch.bmm(weights, v).view(batch, heads, q_len, dim).permute(0, 2, 1, 3).flatten(2)


def filled_in(q, k, v):
    """XLM, XGLM, GPT-Neo."""
    scores = torch.matmul(q / 4, k.transpose(2, 3))
    hidden = HIDDEN.view(1, 1, 1, -1).expand_as(scores)
    scores.masked_fill_(hidden, LOWEST)
    scores = torch.max(scores, torch.full((), LOWEST))
    scores = torch.where(~hidden, scores, torch.tensor(-torch.inf))
    return torch.matmul(F.softmax(scores, dim=-1).type_as(scores), v)


def rows_that_see_nothing(q, k, v):
    """XLM, of rows that it gives up: all columns have the same weight."""
    first = torch.zeros(1, HEADS, 1, 1, dtype=torch.bool)
    first[:, 0] = True
    scores = (q @ k.mT).masked_fill(HIDDEN, LOWEST).masked_fill(first, LOWEST)
    return F.softmax(scores, -1) @ v + F.softmax(q @ k.mT + torch.where(first, LOWEST, 0.0), -1) @ v


def filled_with_infinity(q, k, v):
    """CPM-Ant."""
    scores = (q @ k.mT + ALIBI).masked_fill(HIDDEN, torch.scalar_tensor(-torch.inf))
    weights = torch.masked_fill(F.softmax(scores, -1), HIDDEN, torch.scalar_tensor(0))
    return weights @ v


def in_place(q, k, v):
    """Falcon."""
    scores = (q @ k.transpose(-1, -2)).view(*q.shape[:3], -1)
    logits = scores + ALIBI
    logits *= 0.3
    logits /= 2.0
    return torch.softmax(logits, -1) @ v


def by_letters(q, k, v):
    """ProphetNet."""
    scores = torch.einsum("bntc,bncs->bnts", q, k.transpose(2, 3))
    return torch.einsum("bnts,bnsc->bntc", F.softmax(scores, -1), v)


def by_other_letters(q, k, v):
    weights = F.softmax(torch.einsum("bhqd, bhkd -> bhqk", (q, k)), -1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def by_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=ALIBI, scale=0.3)


def by_sdpa_with_a_bool_mask(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~HIDDEN[None])


def in_float32(q, k, v):
    """GPT-Neo."""
    return (torch.matmul(q.float(), k.to(torch.float32).transpose(-1, -2)).softmax(-1)).to(v.dtype) @ v


def repeated(q, k, v):
    """JetMoE: more query heads, in the order of repetitions."""
    q, k, v = torch.cat([q, q.flip(1)], 1), k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
    return by_matmul(q, k, v)


def interleaved(q, k, v):
    """`repeat_kv`."""
    batch, heads, columns, dim = k.shape
    q = torch.cat([q, q.flip(-1)], 1)
    k = k[:, :, None, :, :].expand(batch, heads, 2, columns, dim).reshape(batch, heads * 2, columns, dim)
    v = torch.repeat_interleave(v, 2, dim=1)
    return by_matmul(q, k, v)


def grouped(q, k, v):
    """Query heads in a dimension of their own, which keys and values broadcast against."""
    q = torch.stack([q, -q], 2)
    return by_matmul(q, k.unsqueeze(2), v[:, :, None])


def grouped_sdpa(q, k, v):
    return F.scaled_dot_product_attention(torch.cat([q, -q], 1), k, v, enable_gqa=True)


def columns_first(q, k, v):
    k, v = (x.permute(0, 2, 1, 3).contiguous() for x in (k, v))
    return by_matmul(q, k.permute(0, 2, 1, 3), v.transpose(1, 2))


OWN_CODE = (
    by_matmul, with_biases, merged_heads, filled_in, filled_with_infinity, in_place, by_letters, by_other_letters,
    by_sdpa, by_sdpa_with_a_bool_mask, in_float32, repeated, interleaved, grouped, grouped_sdpa, columns_first,
)  # fmt: skip


@pytest.mark.parametrize("attend", OWN_CODE)
def test_own_code_is_one_call_of_the_operator(attend, bench):
    expected = attend(bench.query, *bench.copies)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = attend(bench.query, bench.keys, bench.values)
    assert type(got) is torch.Tensor
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    bench.close()
    assert bench.routes == {"prefill_dense": 1, "decode_fused": 1}


def test_rows_that_see_nothing(bench):
    expected = rows_that_see_nothing(bench.query, *bench.copies)
    got = rows_that_see_nothing(bench.query, bench.keys, bench.values)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert bench.routes["decode_fused"] == 2


@pytest.mark.parametrize("attend", [by_matmul, merged_heads, grouped_sdpa, repeated], ids=lambda f: f.__name__)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_sizes_of_one(attend, heads, batch):
    if attend is merged_heads and heads != HEADS:
        pytest.skip("its ALiBi has four heads")
    bench = Bench(heads=heads, batch=batch)
    expected = attend(bench.query, *bench.copies)
    torch.testing.assert_close(attend(bench.query, bench.keys, bench.values), expected, rtol=0, atol=1e-4)
    assert bench.routes["decode_fused"] == 1
    assert bench.routes["decode_dequantized"] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("attend", [by_matmul, in_float32, by_sdpa_with_a_bool_mask])
def test_dtypes(attend, dtype):
    if attend is in_float32 and dtype == torch.float64:
        pytest.skip("it would lose digits")
    bench = Bench(dtype=dtype)
    got, expected = attend(bench.query, bench.keys, bench.values), attend(bench.query, *bench.copies)
    assert got.dtype == dtype
    assert bench.routes["decode_fused"] == 1
    torch.testing.assert_close(got, expected, rtol=0, atol=0.03 if dtype.itemsize == 2 else 1e-6)


def test_autocast():
    """Queries may come in float32, keys are cached in autocast's dtype."""
    with torch.autocast("cpu", torch.bfloat16):
        bench = Bench()
        got = by_matmul(bench.query, bench.keys, bench.values)
        expected = by_matmul(bench.query, *bench.copies)
    assert got.dtype == expected.dtype == torch.bfloat16
    assert bench.routes["decode_fused"] == 1
    torch.testing.assert_close(got, expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_several_queries_see_what_their_mask_shows(causal, sliding):
    """Without a mask they see all columns, which the operator, causal without one, has to be told."""
    config = KVQuantConfig(QuantSpec("int8"), QuantSpec("int4"))
    bench = Bench(q_len=5, dtype=torch.float64, config=config, sliding=sliding)
    mask = torch.arange(LENGTH + 5) <= LENGTH + torch.arange(5)[:, None]

    def attend(q, k, v):
        scores = q @ k.mT
        return F.softmax(scores.masked_fill(~mask, -torch.inf) if causal else scores, -1) @ v

    torch.testing.assert_close(
        attend(bench.query, bench.keys, bench.values), attend(bench.query, *bench.copies), rtol=0, atol=1e-9
    )
    assert bench.routes["decode_fused"] == 1


def a_mask_of_values(q, k, v):
    """Doge: a bias that is made of the values, in a linear layer with an output per head."""
    weight = torch.linspace(-1, 1, HEADS * HEADS * DIM).view(HEADS, HEADS * DIM)
    bias = torch.linspace(-2, 2, HEADS)
    found = F.linear(v.transpose(1, 2).reshape(v.shape[0], v.shape[-2], -1), weight, bias)
    return F.softmax(q @ k.mT + found.transpose(1, 2)[:, :, None], -1) @ v


def test_a_mask_of_values_is_made_slice_by_slice(bench, monkeypatch):
    """It is said once, and no copy of all values is made."""
    monkeypatch.setattr(grammar, "_SLICE", 256)
    bench.states(700)
    expected_of = []
    for q_len in (1, 4):
        with switched_attention():
            bench.keys, bench.values = bench.states(q_len)
        bench.step, bench.q_len = bench.routes.steps[-1], q_len
        bench.query = torch.randn(BATCH, HEADS, q_len, DIM)
        expected = a_mask_of_values(bench.query, *bench.copies)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            got = a_mask_of_values(bench.query, bench.keys, bench.values)
        expected_of += [str(w.message) for w in said]
        torch.testing.assert_close(got[:, :, 0], expected[:, :, 0], rtol=0, atol=1e-4)
    assert len(expected_of) == 1
    assert "slice by slice" in expected_of[0]
    assert bench.routes["decode_fused"] == 2
    assert bench.routes["decode_dequantized"] == 1, "the long update"


# --- states that the model lays out, and then hands to an attention function


def eager(module, query, key, value, mask, *, scaling, position_bias=None, s_aux=None, sinks=None, **kwargs):
    """A model's own attention, with `repeat_kv`."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * scaling
    if position_bias is not None:
        scores = scores + position_bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    columns = scores.shape[-1]
    if s_aux is not None:
        sinks = s_aux[None, :, None, None].expand(*scores.shape[:3], 1)
    if sinks is not None:
        scores = torch.cat([scores, sinks], -1)
    return (scores.softmax(-1)[..., :columns] @ value).transpose(1, 2), None


def as_it_is(k, v):
    return k, v


def repeated_heads(k, v):
    """JetMoE."""
    return k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)


def first_half(k, v):
    """DiffLlama."""
    return k, torch.chunk(v, 2, dim=1)[0].repeat(1, 2, 1, 1)


def second_half(k, v):
    return k, v.chunk(2, 1)[1].repeat(1, 2, 1, 1)


MORE = 7
BEHIND = torch.randn(2, BATCH, HEADS, MORE, DIM, generator=torch.Generator().manual_seed(0))


def with_columns_behind(k, v):
    """T5Gemma 2."""
    return torch.cat([k, BEHIND[0]], dim=2), torch.cat([v, BEHIND[1]], dim=2)


OPTIONS = {
    "plain": lambda n, columns: {},
    "bool mask": lambda n, columns: {"mask": torch.rand(BATCH, 1, 1, columns) < 0.7},
    "additive mask": lambda n, columns: {"mask": torch.randn(BATCH, 1, 1, columns)},
    "mask per head": lambda n, columns: {"mask": torch.randn(1, n, 1, columns)},
    "position_bias": lambda n, columns: {"position_bias": torch.randn(1, n, 1, columns)},
    "s_aux": lambda n, columns: {"s_aux": torch.randn(n)},
    "softmax scale": lambda n, columns: {"scaling": 0.7},
}


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(
    "lay_out", [as_it_is, repeated_heads, first_half, second_half, with_columns_behind], ids=lambda f: f.__name__
)
def test_an_attention_function_of_laid_out_states(lay_out, options, groups, bench):
    key, value = lay_out(bench.keys, bench.values)
    heads = groups * key.shape[1]
    query = torch.randn(BATCH, heads, 1, DIM)
    given = {"scaling": 0.25, "mask": None} | options(heads, key.shape[2])
    if "position_bias" in given and lay_out is with_columns_behind:
        pytest.skip("its mask has to show what is behind")
    if "position_bias" in given and lay_out is not as_it_is and bench.layer.is_sliding:
        pytest.skip("the bias would have to be laid out before it is widened")
    mask = given.pop("mask")
    expected, _ = eager(None, query, *lay_out(*bench.copies), mask, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, weights = attention_function(None, query, key, value, mask, dense_attention=eager, **given)
    assert weights is None
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert (bench.routes["decode_fused"], bench.routes["decode_dequantized"]) == (1, 0)
    # Only what was handed on as it is tells that the model's attention takes quantized states.
    assert (bench.layer.takes_states is True) == (lay_out is as_it_is)


def test_rows_without_cached_columns_see_those_behind(bench):
    key, value = with_columns_behind(bench.keys, bench.values)
    mask = torch.ones(BATCH, 1, 1, key.shape[2], dtype=torch.bool)
    mask[0, ..., : LENGTH + 1] = False
    mask[1, ..., LENGTH + 1 :] = False
    got, _ = attention_function(None, bench.query, key, value, mask, dense_attention=eager, scaling=0.25)
    expected, _ = eager(None, bench.query, *with_columns_behind(*bench.copies), mask, scaling=0.25)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(BATCH, HEADS, 1, 1), (1, HEADS, 1, 1)], ids=["per row", "one row"])
def test_sinks_of_each_query(shape, bench):
    """Inkling 2: a column of weight without a value, per query."""
    sinks = torch.randn(shape)
    got, _ = attention_function(
        None, bench.query, bench.keys, bench.values, None, dense_attention=eager, scaling=0.25, sinks=sinks
    )
    expected, _ = eager(None, bench.query, *bench.copies, None, scaling=0.25, sinks=sinks.expand(BATCH, -1, -1, -1))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert bench.routes["decode_fused"] == 1


@pytest.mark.parametrize(
    ("lay_out", "given", "reason"),
    [
        (repeated_heads, {"sinks": torch.randn(1, 2 * HEADS, 1, 1)}, "the attention argument 'sinks'"),
        (as_it_is, {"sinks": torch.randn(HEADS)}, r"sinks of shape \(4,\)"),
        (repeated_heads, {"dropout": 0.5}, "dropout=0.5"),
        (repeated_heads, {"nonsense": 1}, "the attention argument 'nonsense'"),
        (repeated_heads, {"output_attentions": True}, "output_attentions=True"),
    ],
    ids=["sinks laid out", "sinks per head", "dropout", "unknown", "weights"],
)
def test_what_the_operator_cannot_do_for_laid_out_states(lay_out, given, reason, bench):
    def dense(module, query, key, value, mask, **kwargs):
        return eager(module, query, key, value, mask, scaling=kwargs["scaling"])

    key, value = lay_out(bench.keys, bench.values)
    query = torch.randn(BATCH, key.shape[1], 1, DIM)
    with pytest.warns(UserWarning, match=f"de-quantized copies of the KV cache, because of {reason}"):
        got, _ = attention_function(None, query, key, value, None, dense_attention=dense, scaling=0.25, **given)
    torch.testing.assert_close(got, eager(None, query, *lay_out(*bench.copies), None, scaling=0.25)[0])
    assert (bench.routes["decode_fused"], bench.routes["decode_dequantized"]) == (0, 1)


def test_columns_behind_need_a_mask_for_several_queries():
    bench = Bench(q_len=3)
    key, value = with_columns_behind(bench.keys, bench.values)
    with pytest.warns(UserWarning, match="without a mask for both"):
        attention_function(None, bench.query, key, value, None, dense_attention=eager, scaling=0.25)
    assert (bench.routes["decode_fused"], bench.routes["decode_dequantized"]) == (0, 1)


# --- everything else is computed, with the right numbers, counted once and said once


def the_weights(q, k, v):
    return F.softmax(q @ k.mT, -1)


def printed(q, k, v):
    return torch.tensor(len(repr(q @ k.mT)))


def another_power(q, k, v):
    return F.softmax((q @ k.mT) ** 3, -1) @ v


def shifted(q, k, v):
    scores = q @ k.mT
    return F.softmax(scores - scores.amax(-1, keepdim=True), -1) @ v


def over_queries(q, k, v):
    return F.softmax(q @ k.mT, -2) @ v


def weak_mask(q, k, v):
    return F.softmax((q @ k.mT).masked_fill(HIDDEN, -5.0), -1) @ v


def other_values(q, k, v):
    return F.softmax(q @ k.mT, -1) @ (v + 1)


def keys_as_values(q, k, v):
    return F.softmax(q @ k.mT, -1) @ k


def fewer_columns(q, k, v):
    return F.softmax(q @ k[:, :, 1:].mT, -1) @ v[:, :, 1:]


def fewer_heads(q, k, v):
    return by_matmul(q[:, :1], k[:, :1], v[:, :1])


def a_split_axis(q, k, v):
    q, k, v = (x.reshape(BATCH, HEADS, -1, DIM // 2) for x in (q, k, v))
    return by_matmul(q, k, v)


def a_negative_scale(q, k, v):
    return F.softmax(q @ k.mT * -1.0, -1) @ v


def causal_from_the_first_column(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def dropout_that_is_on(q, k, v):
    torch.manual_seed(3)
    return F.dropout(F.softmax(q @ k.mT, -1), 0.5, training=True) @ v


def written_through_a_view(q, k, v):
    scores = q @ k.mT
    view = scores.view(BATCH * HEADS, 1, -1)
    view *= 2
    return F.softmax(scores, -1) @ v


def written_by_index(q, k, v):
    scores = q @ k.mT
    scaled = scores * 2
    scores[..., :10] = -torch.inf
    return F.softmax(scores, -1) @ v + F.softmax(scaled, -1) @ v


def an_output_argument(q, k, v):
    scores = q @ k.mT
    return torch.exp(scores, out=torch.empty(scores.shape))


def by_numpy(q, k, v):
    return torch.from_numpy((q @ k.mT).numpy() * 1.5)


def queries_with_grad(q, k, v):
    q = q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(by_matmul(q, k, v).square().sum(), q)
    return grad


def many_numbers_of_each_token(q, k, v):
    """MLA: a projection back to all heads."""
    weight = torch.linspace(-1, 1, 64 * HEADS * DIM).view(64, HEADS * DIM)
    return F.linear(v.transpose(1, 2).flatten(2), weight)


def other_heads_for_values(q, k, v):
    q, k, v = torch.cat([q, q], 1), k.repeat(1, 2, 1, 1), v.repeat_interleave(2, dim=1)
    return by_matmul(q, k, v)


UNKNOWN = (
    the_weights, printed, another_power, shifted, over_queries, weak_mask, other_values, keys_as_values, fewer_columns,
    fewer_heads, a_split_axis, a_negative_scale, causal_from_the_first_column, dropout_that_is_on,
    written_through_a_view, written_by_index, an_output_argument, by_numpy, queries_with_grad, other_heads_for_values,
    many_numbers_of_each_token,
)  # fmt: skip


@pytest.mark.parametrize("attend", UNKNOWN)
def test_other_code_reads_dequantized_copies(attend, bench):
    expected = attend(bench.query, *bench.copies)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = attend(bench.query, bench.keys, bench.values)
        bench.close()
        again = Bench()
        attend(again.query, again.keys, again.values)
        again.close()
    # Some give a recorded tensor back, which says its numbers when it is asked.
    torch.testing.assert_close(torch.as_tensor(got) + 0, expected, rtol=1e-5, atol=1e-5)
    assert bench.routes == {"prefill_dense": 1, "decode_dequantized": 1}
    (told,) = [str(w.message) for w in said]
    assert told.startswith("Attention reads de-quantized copies of the KV cache, because of ")


def test_weights_that_are_kept_are_computed_before_the_cache_changes(bench):
    keys, values = bench.copies
    expected = the_weights(bench.query, keys, values)
    kept = the_weights(bench.query, bench.keys, bench.values)
    output = kept @ bench.values
    bench.close()
    assert (bench.routes["decode_fused"], bench.routes["decode_dequantized"]) == (1, 1)
    bench.states(40)
    torch.testing.assert_close(kept + 0, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(output, expected @ values, rtol=0, atol=1e-4)


def test_a_copy_lives_no_longer_than_what_was_made_of_it(bench):
    """The copies of all layers together would be as large as a dense cache."""
    other = bench.keys + 1
    copy = weakref.ref(bench.keys.node.numbers)
    assert copy() is not None
    bench.close()
    assert copy() is None
    assert other.shape == (BATCH, HEADS, LENGTH + 1, DIM)


def test_in_inference_mode():
    with torch.inference_mode():
        bench = Bench()
        got = merged_heads(bench.query, bench.keys, bench.values)
        torch.testing.assert_close(got, merged_heads(bench.query, *bench.copies), rtol=0, atol=1e-4)
        weights = the_weights(bench.query, bench.keys, bench.values)
        torch.testing.assert_close(weights + 0, the_weights(bench.query, *bench.copies), rtol=0, atol=1e-5)
    assert (bench.routes["decode_fused"], bench.routes["decode_dequantized"]) == (1, 1)


def test_weights_of_an_interrupted_call_have_no_numbers(bench):
    kept = the_weights(bench.query, bench.keys, bench.values)
    bench.step.abandon()
    with pytest.raises(RuntimeError, match="a forward call that was interrupted"):
        kept + 0


def test_a_recorded_tensor_says_what_it_is_without_its_numbers(bench):
    scores = bench.query @ bench.keys.mT
    assert scores.shape == (BATCH, HEADS, 1, LENGTH + 1)
    assert (scores.dtype, scores.device.type, scores.ndim, scores.dim()) == (torch.float32, "cpu", 4, 4)
    assert (scores.size(-1), scores.numel(), len(scores)) == (LENGTH + 1, BATCH * HEADS * (LENGTH + 1), BATCH)
    assert scores.is_floating_point()
    assert not scores.requires_grad
    assert bench.routes["decode_dequantized"] == 0


def test_errors_are_those_of_torch(bench):
    with pytest.raises(TypeError, match="softmax"):
        F.softmax(bench.query @ bench.keys.mT, nonsense=3)
    with pytest.raises(IndexError, match="Dimension out of range"):
        bench.keys.transpose(1, 7)


# --- whole models


def bloom():
    return families.build("bloom", attn="eager")


def calls(model, cache, *chunks: torch.Tensor, **kwargs):
    with torch.no_grad(), context(model):
        return [model(chunk, **{CACHE: cache}, **kwargs).logits for chunk in chunks]


def test_a_long_turn_reads_a_copy():
    model, ids = bloom(), families.prompt(1, 130)
    cache = QuantizedCache(model.config, "int8")
    calls(model, cache, ids[:, :60], ids[:, 60:120], ids[:, 120:121])
    assert {r: n for r, n in cache.routes.items() if n} == {
        "prefill_dense": 2, "decode_dequantized": 2, "decode_fused": 2
    }  # fmt: skip


def test_states_of_an_interrupted_call():
    """Whoever has kept them gets an error, and the cache goes on."""
    model, ids, kept = bloom(), families.prompt(1, 62), []
    cache = QuantizedCache(model.config, "int8")
    calls(model, cache, ids[:, :60])

    def fails(module, args, output):
        kept.append(output[1])
        raise KeyboardInterrupt

    hook = model.transformer.h[1].self_attention.register_forward_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        calls(model, cache, ids[:, 60:61])
    hook.remove()
    cache.crop(0)
    with pytest.raises(RuntimeError, match="a forward call that was interrupted"):
        kept[0].sum()
    got = calls(model, cache, ids[:, 60:61], ids[:, 61:])
    other = QuantizedCache(model.config, "int8")
    expected = calls(model, other, ids[:, :60], ids[:, 60:61], ids[:, 61:])
    torch.testing.assert_close(got, expected[1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("wanted", ["argument", "config"])
def test_attention_weights_of_a_user(wanted):
    """They are those of the de-quantized route, which is counted and said."""
    model, ids = bloom(), families.prompt(1, 71)
    if wanted == "config":
        model.config.output_attentions = True
    caches = [QuantizedCache(model.config, "int8") for _ in range(2)]
    kwargs = {"output_attentions": True} if wanted == "argument" else {}
    with torch.no_grad(), context(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        caches[1].disable_fused("it is compared")
        out = [[model(x, **{CACHE: cache}, **kwargs) for x in (ids[:, :70], ids[:, 70:])] for cache in caches]
    for ours, expected in zip(*(step[1].attentions for step in out), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert (caches[0].routes["decode_dequantized"], caches[0].routes["decode_fused"]) == (2, 0)


def test_without_attention_of_ours_it_is_said():
    """Outside of `attention(model)` nothing is recorded."""
    model, ids = bloom(), families.prompt(1, 71)
    cache = QuantizedCache(model.config, "int8")
    with torch.no_grad():
        model(ids[:, :70], **{CACHE: cache})
        with pytest.warns(UserWarning, match="outside of hf_kvquant.attention"):
            model(ids[:, 70:], **{CACHE: cache})
    assert cache.routes["decode_dequantized"] == 2


def test_compiled_steps_read_copies():
    model, ids = families.build("falcon"), families.prompt(1, 40)
    cache = QuantizedCache(model.config, "int8-static", max_length=64)
    torch._dynamo.reset()
    forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad(), context(model):
        model(ids[:, :30], **{CACHE: cache})
        for at in range(30, 33):
            forward(ids[:, at : at + 1], **{CACHE: cache})
        model(ids[:, 33:34], **{CACHE: cache})
    torch._dynamo.reset()
    assert (cache.routes["decode_dequantized"], cache.routes["decode_fused"]) == (6, 2)
