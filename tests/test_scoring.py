"""Decode-faithful scoring equals real decode: every accuracy figure rests on this."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
)

from hf_kvquant import (
    KVQuantConfig,
    QuantSpec,
    cache_read_share,
    quantize,
    score,
    score_by_decoding,
    score_chunks,
    score_tokens,
    scoring,
)
from hf_kvquant.scoring import ScoredStates

LENGTH, CONTEXT = 100, 58
# Three chunks of the shortest allowed length; the last one is shorter, and not a whole number of blocks.
LONG, LONG_CONTEXT, CHUNK = 601, 200, 256
# float64: the quantized inputs of both ways agree to rounding, so codes do, and logits agree to accumulated rounding.
FLOAT64_TOLERANCE = 1e-5

SHAPE = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 97}
FAMILIES = {
    "llama-gqa": LlamaConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=64),
    "gpt2-mha": GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=97, bos_token_id=0, eos_token_id=0),
    "gemma3-hybrid": Gemma3TextConfig(
        **SHAPE | {"num_hidden_layers": 3}, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        intermediate_size=64, sliding_window=16, layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
    "gpt-oss-sinks": GptOssConfig(
        **SHAPE, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=32, num_local_experts=2,
        num_experts_per_tok=1, layer_types=["full_attention", "full_attention"],
    ),
    # Its cache holds latents since transformers 5.24, and expanded states before.
    "deepseek-latent": DeepseekV3Config(
        **SHAPE, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=32, intermediate_size=64, first_k_dense_replace=2,
    ),
}  # fmt: skip
LINEAR = Lfm2Config(
    **SHAPE, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
    layer_types=["conv", "full_attention"],
)  # fmt: skip


def spec(format, **fields):
    return QuantSpec(format, **fields)


CONFIGS = {
    "int8-token": KVQuantConfig(spec("int8"), spec("int8")),
    "fp8-token": KVQuantConfig(spec("fp8", group_size=16), spec("fp8")),
    "int4-rotated": KVQuantConfig(spec("int4", rotate=True), spec("int4", group_size=16, rotate=True)),
    "int4-channel": KVQuantConfig(spec("int4", grid="channel", block_length=16), spec("int4", rotate=True), 3, 9),
    "int8-channel": KVQuantConfig(spec("int8", grid="channel"), spec("int8"), recent_length=70),
    "fp8-channel": KVQuantConfig(spec("fp8", grid="channel", block_length=32), spec("int4"), sink_length=5),
    "channel-values": KVQuantConfig(spec("int8"), spec("int4", grid="channel", block_length=16), 3, 9),
    "few-bits": KVQuantConfig(spec("int3", grid="channel", block_length=16), spec("int2", rotate=True), 3, 9),
    "dense-values": KVQuantConfig(spec("int4", grid="channel"), spec("dense"), 2, 4),
    "dense-keys": KVQuantConfig(spec("dense"), spec("int4", rotate=True), 2, 4),
}


def tiny(family: str | object, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(1)
    if not isinstance(family, str):
        return AutoModelForCausalLM.from_config(family, dtype=dtype).eval()
    # The grouped matrix product of experts does not support float64.
    options = {"experts_implementation": "eager"} if family.startswith("gpt-oss") else {}
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=dtype, **options).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def text(padded: bool, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(2)
    ids = torch.randint(3, 97, (3, length))
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, :11] = 0
    mask[2, :50] = 0
    return (ids, mask) if padded else (ids[:1], None)


@pytest.mark.parametrize("padded", [False, True], ids=["alone", "left-padded"])
@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_score_equals_decode_in_float64(config, padded):
    model = tiny("llama-gqa", torch.float64)
    ids, mask = text(padded)
    scored = score(model, ids, CONTEXT, CONFIGS[config], attention_mask=mask)
    decoded = score_by_decoding(model, ids, CONTEXT, CONFIGS[config], attention_mask=mask)
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(scored[seen], decoded[seen], rtol=0, atol=FLOAT64_TOLERANCE)
    dense = score(model, ids, CONTEXT, "none", attention_mask=mask)
    after = torch.arange(LENGTH) >= CONTEXT
    assert (scored - dense)[:, after].abs().max() > 100 * FLOAT64_TOLERANCE, "the cache was not read"
    torch.testing.assert_close(
        scored[:, ~after][seen[:, ~after]], dense[:, ~after][seen[:, ~after]], rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "llama-gqa"])
@pytest.mark.parametrize("config", ["int4-rotated", "int4-channel"])
@torch.no_grad()
def test_score_equals_decode_for_families(family, config):
    model = tiny(family, torch.float64)
    ids, _ = text(padded=False)
    scored = score(model, ids, CONTEXT, CONFIGS[config])
    decoded = score_by_decoding(model, ids, CONTEXT, CONFIGS[config])
    torch.testing.assert_close(scored, decoded, rtol=0, atol=FLOAT64_TOLERANCE)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3-hybrid"])
@torch.no_grad()
def test_a_static_cache_scores_as_the_growing_one(family):
    model = tiny(family, torch.float64)
    ids, _ = text(padded=False)
    scored = score(model, ids, CONTEXT, "int4-static")
    assert torch.equal(scored, score(model, ids, CONTEXT, "int4"))
    decoded = score_by_decoding(model, ids, CONTEXT, "int4-static")
    torch.testing.assert_close(scored, decoded, rtol=0, atol=FLOAT64_TOLERANCE)


@torch.no_grad()
def test_chunked_decode_equals_single_steps():
    model = tiny("llama-gqa", torch.float64)
    ids, _ = text(padded=False)
    single = score_by_decoding(model, ids, CONTEXT, CONFIGS["int4-channel"])
    for chunk in (3, 16, 32):
        many = score_by_decoding(model, ids, CONTEXT, CONFIGS["int4-channel"], chunk=chunk)
        torch.testing.assert_close(many, single, rtol=0, atol=FLOAT64_TOLERANCE)


@torch.no_grad()
def test_context_lengths_per_row():
    model = tiny("llama-gqa", torch.float64)
    ids, _ = text(padded=True)
    scored = score(model, ids, [40, 64, 90], CONFIGS["int4-channel"])
    for row, context in enumerate((40, 64, 90)):
        alone = score(model, ids[row : row + 1], context, CONFIGS["int4-channel"])
        torch.testing.assert_close(scored[row : row + 1], alone, rtol=0, atol=1e-9)


@torch.no_grad()
def test_float32_agrees_up_to_flipped_codes():
    """In float32 the two ways may round an element to different codes. This may happen to few codes only, so that
    nearly all logits agree closely and the mean divergence is far below the format's own."""
    model = tiny("llama-gqa", torch.float32)
    ids, _ = text(padded=False)
    config = CONFIGS["int4-channel"]
    scored, decoded, dense = (
        score(model, ids, CONTEXT, config),
        score_by_decoding(model, ids, CONTEXT, config),
        score(model, ids, CONTEXT, "none"),
    )
    rows = slice(CONTEXT, None)
    between, lossy = (scored - decoded)[:, rows].abs().mean(), (scored - dense)[:, rows].abs().mean()
    assert between < 0.02 * lossy


def test_scoring_needs_no_gradients():
    """It is called as in the README, outside torch.no_grad, on parameters that require gradients."""
    model = tiny("llama-gqa", torch.float32)
    assert next(model.parameters()).requires_grad
    assert not score(model, text(padded=False)[0], CONTEXT, "int8").requires_grad


def test_context_length_out_of_range_is_refused():
    model = tiny("llama-gqa", torch.float32)
    for context in (0, LENGTH + 1):
        with pytest.raises(ValueError, match=r"context_lengths: .*expected 1 to 100"):
            score(model, text(padded=False)[0], context, "int8")


@torch.no_grad()
@pytest.mark.parametrize("config", [c for c in CONFIGS if c not in ("int4-rotated", "int4-channel")])
@torch.no_grad()
def test_latents_and_rotary_keys_are_read_exactly_by_their_own_formats(config):
    model = tiny("deepseek-latent", torch.float64)
    ids, mask = text(padded=True)
    scored = score(model, ids, CONTEXT, CONFIGS[config], mask)
    decoded = score_by_decoding(model, ids, CONTEXT, CONFIGS[config], mask)
    torch.testing.assert_close(scored[mask.bool()], decoded[mask.bool()], rtol=0, atol=FLOAT64_TOLERANCE)


def test_an_expansion_that_does_something_else_is_refused(monkeypatch):
    model = tiny("deepseek-latent", torch.float32)
    owner = type(model.model.layers[0].self_attn)
    if not hasattr(owner, "expand_kv"):
        pytest.skip("this transformers caches expanded states")
    original = owner.expand_kv
    monkeypatch.setattr(owner, "expand_kv", lambda self, a, b: tuple(x * 2 for x in original(self, a, b)))
    with pytest.raises(ValueError, match="are not kv_b_proj's product .* use score_by_decoding"):
        score(model, text(padded=False)[0], CONTEXT, "int8")


def test_a_model_that_changes_states_is_refused():
    from transformers import FalconConfig

    config = FalconConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=2, vocab_size=97)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises((ValueError, AttributeError), match="score_by_decoding"):
        score(model, text(padded=False)[0], CONTEXT, "int8")


class TestChunks:
    @pytest.mark.parametrize("padded", [False, True], ids=["alone", "left-padded"])
    @pytest.mark.parametrize("config", [*CONFIGS, "none"])
    def test_do_not_show_in_the_logits(self, config, padded):
        model = tiny("llama-gqa", torch.float64)
        ids, mask = text(padded, LONG)
        whole, parts = (
            score(model, ids, LONG_CONTEXT, CONFIGS.get(config, config), mask, chunk_length=n) for n in (1024, CHUNK)
        )
        seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        torch.testing.assert_close(parts[seen], whole[seen], rtol=0, atol=FLOAT64_TOLERANCE)

    @pytest.mark.parametrize("family", [f for f in FAMILIES if f != "llama-gqa"])
    @pytest.mark.parametrize("config", ["int4-channel", "none"])
    def test_do_not_show_in_families(self, family, config):
        model = tiny(family, torch.float64)
        ids, _ = text(False, LONG)
        whole, parts = (
            score(model, ids, LONG_CONTEXT, CONFIGS.get(config, config), chunk_length=n) for n in (1024, CHUNK)
        )
        torch.testing.assert_close(parts, whole, rtol=0, atol=FLOAT64_TOLERANCE)

    def test_a_context_that_ends_in_a_later_chunk_equals_decode(self):
        model = tiny("llama-gqa", torch.float64)
        ids, _ = text(False, 300)
        scored = score(model, ids, 270, CONFIGS["int4-channel"], chunk_length=CHUNK)
        decoded = score_by_decoding(model, ids, 270, CONFIGS["int4-channel"])
        torch.testing.assert_close(scored, decoded, rtol=0, atol=FLOAT64_TOLERANCE)

    @pytest.mark.parametrize("first_row", [0, 1, 255, 256, 400, LONG - 1])
    @pytest.mark.parametrize("family", ["llama-gqa", "gpt2-mha"])
    def test_first_row(self, family, first_row):
        model = tiny(family, torch.float64)
        ids, _ = text(False, LONG)
        whole = score(model, ids, LONG_CONTEXT, "int8")
        row = first_row
        for start, logits in score_chunks(model, ids, LONG_CONTEXT, "int8", chunk_length=CHUNK, first_row=first_row):
            assert start == row
            torch.testing.assert_close(
                logits, whole[:, start : start + logits.shape[1]], rtol=0, atol=FLOAT64_TOLERANCE
            )
            row += logits.shape[1]
        assert row == LONG

    def test_the_model_is_free_between_two(self):
        model = tiny("llama-gqa", torch.float32)
        ids, _ = text(False, LONG)
        pairs = zip(
            *(score_chunks(model, ids, LONG_CONTEXT, config, chunk_length=CHUNK) for config in ("none", "int8")),
            strict=True,
        )
        attn = model.config._attn_implementation
        for (_, dense), (_, quantized) in pairs:
            assert model.config._attn_implementation == attn
            assert dense.shape == quantized.shape

    def test_layers_that_cannot_go_on_take_the_text_as_one_piece(self):
        model = tiny(LINEAR, torch.float32)
        ids, _ = text(False, LONG)
        for config in ("none", "int8"):
            pieces = list(score_chunks(model, ids, LONG_CONTEXT, config, chunk_length=CHUNK))
            assert [(start, logits.shape[1]) for start, logits in pieces] == [(0, LONG)]

    @pytest.mark.parametrize("chunk_length", [0, -256, 100, 384])
    def test_a_length_that_cuts_blocks_is_refused(self, chunk_length):
        model = tiny("llama-gqa", torch.float32)
        with pytest.raises(ValueError, match=rf"chunk_length: {chunk_length} .*multiple of 256"):
            score(model, text(False)[0], CONTEXT, "int8", chunk_length=chunk_length)

    def test_a_value_per_token_is_refused(self):
        model = tiny("llama-gqa", torch.float32)
        ids, _ = text(False, LONG)
        positions = torch.arange(LONG)[None]
        with pytest.raises(ValueError, match=f"position_ids: .*chunk_length of at least {LONG}"):
            score(model, ids, LONG_CONTEXT, "int8", chunk_length=CHUNK, position_ids=positions)
        score(model, ids, LONG_CONTEXT, "int8", position_ids=positions)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


@pytest.mark.any_host
@pytest.mark.parametrize("config", ["int4", "none"])
def test_memory_of_a_long_text(config):
    """No tensor is as large as the square of the length, or as length times vocabulary."""
    length, vocab, heads = 8192, 4096, 4
    shape = SHAPE | {"num_hidden_layers": 1, "vocab_size": vocab, "max_position_embeddings": length}
    model = tiny(
        LlamaConfig(**shape, num_attention_heads=heads, num_key_value_heads=2, intermediate_size=64, head_dim=16),
        torch.float32,
    )
    ids = torch.randint(3, vocab, (1, length))
    with Largest() as largest:
        log_probs, is_greedy = score_tokens(model, ids, 128, config, chunk_length=512)
    assert log_probs.shape == is_greedy.shape == (1, length - 1)
    assert largest.numel <= 2**24
    assert min(heads * length**2, vocab * length) > 1.5 * 2**24, "this text is too short to show anything"
    # The attention scores or logits of a chunk are that large.
    assert largest.numel >= 512 * length


@pytest.mark.parametrize("config", ["int4-channel", "none"])
def test_score_tokens(config):
    model = tiny("llama-gqa", torch.float64)
    ids, mask = text(True, LONG)
    config = CONFIGS.get(config, config)
    logits = score(model, ids, LONG_CONTEXT, config, mask)[:, :-1]
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    # The second length leaves a last chunk of one row, whose prediction has no token.
    for length in (LONG, 2 * CHUNK + 1):
        log_probs, is_greedy = score_tokens(
            model, ids[:, :length], LONG_CONTEXT, config, mask[:, :length], chunk_length=CHUNK
        )
        assert log_probs.dtype == torch.float32
        seen = mask[:, : length - 1].bool()
        torch.testing.assert_close(log_probs[seen], expected[:, : length - 1][seen].float(), rtol=0, atol=1e-4)
        assert (is_greedy == (logits.argmax(-1) == ids[:, 1:])[:, : length - 1])[seen].all()
        assert is_greedy.any()


class TestDecodeTail:
    def test_is_a_shorter_context(self):
        model = tiny("llama-gqa", torch.float64)
        ids, _ = text(padded=False)
        tail = score(model, ids, CONTEXT, CONFIGS["int4-channel"], decode_tail=3)
        torch.testing.assert_close(tail, score(model, ids, CONTEXT - 3, CONFIGS["int4-channel"]), rtol=0, atol=0)
        decoded = score_by_decoding(model, ids, CONTEXT - 3, CONFIGS["int4-channel"])
        torch.testing.assert_close(tail, decoded, rtol=0, atol=FLOAT64_TOLERANCE)

    def test_one_column_is_prefilled_at_least(self):
        model = tiny("llama-gqa", torch.float64)
        ids, _ = text(padded=True)
        tail = score(model, ids, [5, 40, 90], CONFIGS["int4-channel"], decode_tail=60)
        torch.testing.assert_close(
            tail, score(model, ids, [1, 1, 30], CONFIGS["int4-channel"]), rtol=0, atol=FLOAT64_TOLERANCE
        )

    def test_the_share_says_so(self):
        # One answer token after a context of ten is predicted by prefill, or from the cache with a tail of one.
        assert cache_read_share([10], [10], [11]) == 0.0
        assert cache_read_share([10], [10], [11], decode_tail=1) == 1.0
        assert cache_read_share([10, 10], [10, 10], [14, 14], decode_tail=0) == 0.75
        assert cache_read_share([1], [1], [2], decode_tail=5) == 0.0

    def test_negative_is_refused(self):
        with pytest.raises(ValueError, match="decode_tail: -1 .*expected 0 or more"):
            score(tiny("llama-gqa", torch.float32), text(False)[0], CONTEXT, "int8", decode_tail=-1)


def test_padding_on_the_right_needs_no_mask():
    """In a batch of rows of different lengths, as lm-eval makes them, a row has the same logits as alone."""
    model = tiny("llama-gqa", torch.float64)
    ids, _ = text(padded=True)
    for config in CONFIGS.values():
        together = score(model, ids, [30, 50, 20], config)
        for row, (context, length) in enumerate(((30, LENGTH), (50, 71), (20, 21))):
            alone = score(model, ids[row : row + 1, :length], context, config)
            torch.testing.assert_close(together[row : row + 1, :length], alone, rtol=0, atol=FLOAT64_TOLERANCE)


def test_a_broken_cache_shows_where_it_is_read_and_only_there():
    """Stored keys twice as large as they are: `cache_read_share` counts the rows whose logits change."""
    model = tiny("llama-gqa", torch.float64)
    ids, _ = text(padded=True)
    contexts = [40, 64, 98]
    config = KVQuantConfig(spec("int8"), spec("fp8"))
    whole = score(model, ids, contexts, config)
    quantizers = (lambda x, *rest: quantize(2 * x, *rest), quantize)
    changed = (score(model, ids, contexts, config, quantizers=lambda _: quantizers) != whole).any(-1)
    # The last row predicts a token beyond the text.
    share = changed[:, :-1].float().mean().item()
    assert share == pytest.approx(cache_read_share(contexts, [1] * 3, [LENGTH] * 3))
    assert changed[:, -1].all()
    assert not any(changed[row, :context].any() for row, context in enumerate(contexts))


def test_cache_read_share():
    # Row c is the first to read the cache; it predicts token c + 1. Prefill predicts token c itself.
    assert cache_read_share([10], [10], [11]) == 0.0
    assert cache_read_share([10], [10], [12]) == 0.5
    assert cache_read_share([10, 10], [11, 10], [21, 11]) == 10 / 11
    assert cache_read_share([10], [12], [20]) == 1.0


def test_attention_asks_scored_states_what_it_asks_cached_ones():
    """The error about a model that cannot be scored names the way that works; a position bias joins the mask."""
    exact, query = torch.randn(1, 2, 40, 16), torch.randn(1, 4, 9, 16)
    states = ScoredStates(exact, (), QuantSpec("dense"), mock.Mock(sliding_window=None, window_length=None))
    with pytest.warns(UserWarning, match="dropout"), pytest.raises(ValueError, match="use score_by_decoding"):
        scoring._attend(None, query, states, states, None, dense_attention=None, dropout=0.1)
    bias = torch.randn(1, 4, 9, 40)
    seen = torch.arange(40) <= torch.arange(31, 40)[:, None]
    everything = torch.ones(1, 1, 9, 40, dtype=torch.bool)
    with mock.patch.object(ScoredStates, "read_exactly", return_value=everything):
        output, _ = scoring._attend(None, query, states, states, None, dense_attention=None, position_bias=bias)
    mask = torch.where(seen, bias, -torch.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(query, exact, exact, mask, enable_gqa=True)
    torch.testing.assert_close(output, expected.transpose(1, 2), rtol=0, atol=1e-5)


class TestStraightThrough:
    """Gradients of the values that `score` gives, with quantization as the addition of a constant."""

    @staticmethod
    def summed(model, ids, mask, config, chunk_length=1024, **options) -> torch.Tensor:
        """The sum of the log-probabilities of the tokens that were predicted from the cache."""
        logits = score(model, ids, CONTEXT, config, mask, chunk_length=chunk_length, **options)[:, CONTEXT:-1]
        return logits.log_softmax(-1).gather(-1, ids[:, CONTEXT + 1 :, None]).sum()

    @pytest.mark.parametrize("config", CONFIGS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_the_values_are_those_without(self, config, dtype):
        model = tiny("llama-gqa", dtype)
        ids, mask = text(True, LONG)
        for chunk_length in (1024, CHUNK):
            given = (model, ids, LONG_CONTEXT, CONFIGS[config], mask)
            with_gradients = score(*given, chunk_length=chunk_length, straight_through=True)
            assert with_gradients.requires_grad
            assert torch.equal(with_gradients, score(*given, chunk_length=chunk_length))

    @pytest.mark.parametrize(
        ("family", "config", "length"),
        [
            *(("llama-gqa", config, LENGTH) for config in CONFIGS),
            *((family, "int4-channel", LENGTH) for family in FAMILIES if family != "llama-gqa"),
            ("llama-gqa", "int4-channel", LONG),
        ],
    )
    def test_gradients_are_finite_differences(self, family, config, length, monkeypatch):
        """Of the function in which the error of quantization stays what it was at the first evaluation."""
        model = tiny(family, torch.float64)
        # The models' own norms compute in float32, which is too coarse for differences.
        for name, module in list(model.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                model.set_submodule(name, torch.nn.RMSNorm(module.weight.shape, eps=1e-6, dtype=torch.float64))
        ids, mask = text(family == "llama-gqa", length)
        arguments = (model, ids, mask, CONFIGS[config], CHUNK)
        self.summed(*arguments, straight_through=True).backward()
        monkeypatch.setattr(scoring, "_StraightThrough", frozen := FrozenErrors())
        self.summed(*arguments)
        assert frozen.errors
        parameters = list(model.parameters())
        for _ in range(3):
            directions, values = [torch.randn_like(p) for p in parameters], []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    torch._foreach_add_(parameters, directions, alpha=step)
                    frozen.again()
                    values.append(self.summed(*arguments))
                    torch._foreach_sub_(parameters, directions, alpha=step)
            along = sum((p.grad * d).sum().item() for p, d in zip(parameters, directions))
            assert along == pytest.approx((values[0] - values[1]).item() / 2e-6, rel=1e-4)

    def test_gradients_of_score_tokens(self):
        model, (ids, mask) = tiny("llama-gqa", torch.float32), text(True, LONG)
        arguments = (model, ids, LONG_CONTEXT, CONFIGS["int4-channel"], mask)
        log_probs, _ = score_tokens(*arguments, chunk_length=CHUNK, straight_through=True)
        log_probs.square().mean().backward()
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        logits = score(*arguments, chunk_length=CHUNK, straight_through=True)[:, :-1]
        logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).square().mean().backward()
        torch.testing.assert_close(found, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-5)

    def test_they_are_not_those_of_the_dense_cache(self):
        model, (ids, _) = tiny("llama-gqa", torch.float64), text(False)
        gradients = []
        for config in (CONFIGS["int4-rotated"], "none"):
            model.zero_grad()
            self.summed(model, ids, None, config, straight_through=True).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert (gradients[0] - gradients[1]).norm() > 0.01 * gradients[1].norm()
        assert torch.cosine_similarity(*gradients, dim=0) > 0.5

    def test_of_a_model_with_gradient_checkpointing(self):
        """Which transformers does without a cache; trainers switch it on."""
        model, (ids, _) = tiny("llama-gqa", torch.float32).train(), text(False)
        expected = self.summed(model, ids, None, "int8", straight_through=True)
        model.gradient_checkpointing_enable()
        found = self.summed(model, ids, None, "int8", straight_through=True)
        found.backward()
        assert torch.equal(found, expected)
        assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0
        assert model.is_gradient_checkpointing

    @pytest.mark.filterwarnings("ignore")
    def test_layers_without_a_cache_are_noticed(self, monkeypatch):
        model, (ids, _) = tiny("llama-gqa", torch.float32).train(), text(False)
        model.gradient_checkpointing_enable()
        monkeypatch.setattr(scoring, "keeps_caches", lambda model: nullcontext())
        with pytest.raises(ValueError, match="tokens, expected 100: the model called some without"):
            score(model, ids, CONTEXT, "int8", straight_through=True)

    def test_of_an_adapter(self):
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
        model, (ids, _) = peft.get_peft_model(tiny("llama-gqa", torch.float32), lora), text(False)
        found = self.summed(model, ids, None, "int8", straight_through=True)
        found.backward()
        assert torch.equal(found, self.summed(model.get_base_model(), ids, None, "int8"))
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert all((grad is not None and bool(grad.any())) == ("lora" in name) for name, grad in gradients.items())

    @pytest.mark.any_host
    @pytest.mark.parametrize("config", ["int4", "none"])
    def test_memory(self, config):
        """No tensor is as large as the square of the length or as length times vocabulary, and beside the cache the
        graph keeps few of them: less than one chunk's attention scores."""
        length, vocab, heads = 4096, 2048, 4
        shape = SHAPE | {"num_hidden_layers": 1, "vocab_size": vocab, "max_position_embeddings": length}
        model = tiny(
            LlamaConfig(**shape, num_attention_heads=heads, num_key_value_heads=2, intermediate_size=64, head_dim=16),
            torch.float32,
        )
        kept = []
        with Largest() as largest:
            with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
                log_probs, _ = score_tokens(
                    model, torch.randint(3, vocab, (1, length)), 128, config, chunk_length=256, straight_through=True
                )
            log_probs.sum().backward()
        assert largest.numel <= 2**22 < min(heads * length**2, vocab * length) / 1.5
        assert sum(kept) < heads * 256 * length / 2


class FrozenErrors:
    """In place of `_StraightThrough`: the first evaluation records the errors of quantization, later ones add them."""

    def __init__(self):
        self.errors, self.next = [], None

    def apply(self, exact: torch.Tensor, dequantized: torch.Tensor) -> torch.Tensor:
        if self.next is None:
            self.errors.append(dequantized - exact)
            return dequantized
        return exact + next(self.next)

    def again(self) -> None:
        self.next = iter(self.errors)
