"""Exact attention of prompts by our own kernel, where the processor has AVX-512 BF16, against float64."""

import families
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_kvquant import ops
from hf_kvquant.backends import cpu

if cpu.unavailable() is not None or not cpu.takes_prompts():
    pytest.skip("no kernel for prompts in this instruction set", allow_module_level=True)

LENGTHS = [(1, 1), (1, 200), (5, 5), (64, 64), (65, 65), (33, 130), (100, 333), (257, 1000)]


def states(num_heads, num_kv_heads, n, kv_len, head_dim, seed=0):
    """Queries, keys and values as projections give them: heads beside each other in a token, some channels large."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for heads, length in ((num_heads, n), (num_kv_heads, kv_len), (num_kv_heads, kv_len)):
        x = torch.randn(1, length, heads, head_dim, generator=generator)
        x[..., ::7] *= 4
        made.append(x.bfloat16().transpose(1, 2))
    return made


def visible(n, kv_len, window):
    column, position = torch.arange(kv_len), torch.arange(kv_len - n, kv_len)[:, None]
    return (column <= position) & (column > position - (window or kv_len))


def expected(query, key, value, window, scaling):
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(repeats, dim=1) for x in (key, value))
    mask = visible(query.shape[2], key.shape[2], window)
    return scaled_dot_product_attention(query.double(), key, value, attn_mask=mask, scale=scaling).transpose(1, 2)


def check(query, key, value, window=None, scaling=0.1):
    output = ops.prompt_attention(query, key, value, window, scaling=scaling)
    right = expected(query, key, value, window, scaling)
    assert output.shape == right.shape and output.dtype == torch.bfloat16
    # The weights and the output are rounded to 8 bits.
    assert (output - right).abs().max() <= 2**-7 * value.abs().max()
    assert (output - right).abs().mean() <= 2**-8 * right.abs().mean()
    return output


@pytest.mark.parametrize("window", [None, 1, 40, 64, 300])
@pytest.mark.parametrize(("n", "kv_len"), LENGTHS)
def test_lengths_and_windows(n, kv_len, window):
    check(*states(8, 2, n, kv_len, 64), window)


@pytest.mark.parametrize("head_dim", [16, 32, 48, 80, 96, 112, 128, 192, 256, 512])
@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (6, 2), (7, 1), (32, 8), (100, 1)])
def test_heads(heads, head_dim):
    check(*states(*heads, 70, 150, head_dim))


def test_scores_of_any_size():
    query, key, value = states(4, 2, 80, 200, 64)
    check(query * 30, key * 30, value)
    check(query * 0, key, value)


def test_contiguous_states_and_slices_give_the_same():
    query, key, value = states(8, 2, 90, 140, 64)
    output = check(query, key, value)
    assert torch.equal(output, check(*(x.contiguous() for x in (query, key, value))))
    wide = torch.cat([torch.full_like(key, torch.nan), key], dim=3)[..., 64:]
    assert torch.equal(output, check(query, wide, value))


def test_a_row_depends_on_nothing_but_itself():
    query, key, value = states(8, 2, 90, 240, 64)
    whole = check(query, key, value)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(whole, check(query, key, value))
    finally:
        torch.set_num_threads(threads)
    for begin in (1, 50, 89):
        assert torch.equal(whole[:, begin:], check(query[:, :, begin:], key, value))
    assert torch.equal(whole[:, :70], check(query[:, :, :70], key[:, :, :220], value[:, :, :220]))


def test_columns_that_are_hidden_from_all_are_not_read():
    query, key, value = states(8, 2, 20, 400, 64)
    right = check(query, key, value, 50)
    for x in (key, value):
        x[:, :, :300] = torch.nan
    # 300 is not the beginning of a tile: NaN are in the same tile as columns that are seen, in the first 20 of them.
    for x in (key, value):
        x[:, :, 256:] = states(8, 2, 20, 400, 64)[1 if x is key else 2][:, :, 256:]
    assert torch.equal(right, ops.prompt_attention(query, key, value, 50, scaling=0.1))


def test_what_the_kernel_does_not_take():
    query, key, value = states(8, 2, 20, 40, 64)
    for given, match in (
        ((query.float(), key, value), "query: .* of torch.float32"),
        ((query, key[:, :, 1:], value[:, :, 1:, ::2]), "value: "),
        ((torch.cat([query, query]), key, value), "query: "),
        ((query[:, :7], key, value), "whole groups of query heads"),
        ((query[..., :24], key[..., :24], value[..., :24]), "a multiple of 16"),
        ((query, key[:, :, :10], value[:, :, :10]), "no more tokens than keys"),
    ):
        with pytest.raises(ValueError, match=match):
            ops.prompt_attention(*given, scaling=1.0)


def test_which_queries_are_taken():
    query = states(8, 2, 20, 40, 64)[0]
    assert ops.takes_prompts(query, "auto") and ops.takes_prompts(query, "cpu")
    assert not ops.takes_prompts(query, "reference")
    for other in (query.float(), query.half(), query[..., :24], query.to("meta")):
        assert not ops.takes_prompts(other, "auto")


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prompts_of_a_batch(family, monkeypatch):
    """All prompts of a BF16 model, and the chunks behind them, take the kernel, with the window of the layer."""
    pytest.importorskip("test_batching", exc_type=ImportError)
    from test_batching import generate, random_prompts

    sizes = {"sliding_window": 600} if family == "mistral" else {}
    model = families.build(family, max_position_embeddings=1024, **sizes).bfloat16()
    calls, run = [], ops.prompt_attention

    def noted(query, key, value, window=None, *, scaling):
        calls.append((query.shape[2], key.shape[2], window))
        output = run(query, key, value, window, scaling=scaling)
        right = expected(query, key, value, window, scaling)
        assert (output - right).abs().max() <= 2**-7 * value.abs().max()
        return output

    monkeypatch.setattr(ops, "prompt_attention", noted)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    results = generate(model, "int8", random_prompts(2, [700, 20]), new=4, max_batch_tokens=512)
    assert [len(result.generated_tokens) for result in results.values()] == [4, 4]
    window = sizes.get("sliding_window")
    # Which of the two comes first is the manager's choice.
    (first,) = {n for n, kv_len, _ in calls if n == kv_len > 20}
    assert {*calls} == {(first, first, window), (700 - first, 700, window), (20, 20, window)}


def test_eager_attention_stays_the_models_own(monkeypatch):
    pytest.importorskip("test_batching", exc_type=ImportError)
    from test_batching import generate, random_prompts

    monkeypatch.setattr(ops, "prompt_attention", None)
    model = families.build("llama", attn="eager").bfloat16()
    generate(model, "int8", random_prompts(2, [70]), new=4)
