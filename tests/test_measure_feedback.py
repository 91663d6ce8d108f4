"""Error feedback: the shift of a later channel by hand, what it saves of the cost it was made for, the moments it is
made of, and that the model loses less by it."""

from __future__ import annotations

import broken_models
import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_kvquant import KVQuantConfig, QuantSpec, quantize
from hf_kvquant.measure import Preset, Settings, compare
from hf_kvquant.measure.feedback import Compensated, Feedback, Order, rounded, stored
from hf_kvquant.measure.text import bundled_model, windows

SPEC = QuantSpec("int4", "channel", block_length=32)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    """Keys of two heads: two blocks and a part of one."""
    return torch.randn(1, 2, 77, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def cost() -> torch.Tensor:
    """Of 16 channels that mostly matter by a few sums of theirs."""
    few = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(1))
    return few @ few.mT + 0.01 * torch.eye(16)


@pytest.fixture(scope="module")
def documents() -> torch.Tensor:
    return windows(AutoTokenizer.from_pretrained(bundled_model()), 6, 200)[0]


def lost(x: torch.Tensor, read_back: torch.Tensor, cost: torch.Tensor) -> float:
    error = x - read_back
    return torch.einsum("bhti,hij,bhtj->", error, cost, error).item()


class TestStored:
    @pytest.mark.parametrize("format", ["int4", "int3"])
    def test_without_feedback_it_is_what_the_cache_stores(self, x, format):
        spec = QuantSpec(format, "channel", block_length=32)
        torch.testing.assert_close(stored(x, spec, None), quantize(x, spec).dequantize(), rtol=0, atol=1e-6)

    def test_costs_without_correlations_change_nothing(self, x):
        order = Order.of(torch.diag_embed(torch.rand(2, 16) + 0.1))
        torch.testing.assert_close(stored(x, SPEC, order), stored(x, SPEC, None))

    def test_two_channels_by_hand(self, x):
        """The second one makes up for the first one's error e by H01 / H11 e, where H has the damping on its diagonal.
        The channel that costs more is the first."""
        pair = x[:, :1, :32, :2]
        first, second = (pair[0, 0, :, i] for i in (1, 0))
        cost = torch.tensor([[[2.0, 1.5], [1.5, 4.0]]])
        error = first - rounded(first, SPEC, 0)
        second = second + 1.5 / (2.0 + 0.01 * 3.0) * error
        expected = torch.stack([rounded(second, SPEC, 0), first - error], dim=-1)
        torch.testing.assert_close(stored(pair, SPEC, Order.of(cost))[0, 0], expected)

    def test_it_saves_most_of_what_it_was_made_for(self, x, cost):
        plain, with_feedback = stored(x, SPEC, None), stored(x, SPEC, Order.of(cost))
        assert lost(x, with_feedback, cost) < 0.3 * lost(x, plain, cost)
        # Paid for by errors that cost nothing.
        identity = torch.eye(16).expand(2, 16, 16)
        assert lost(x, with_feedback, identity) > lost(x, plain, identity)

    def test_refits_never_lose(self, x):
        channels = x[0].mT
        errors = [(rounded(channels, SPEC, n) - channels).square().sum(-1) for n in (0, 1, 2)]
        assert (errors[1] <= errors[0]).all() and (errors[2] <= errors[1]).all()
        assert errors[2].sum() < 0.95 * errors[0].sum()

    def test_a_constant_channel_is_exact(self):
        x = torch.full((1, 1, 32, 16), 1.5)
        assert torch.equal(stored(x, SPEC, None, refits=2), x)


class TestFeedback:
    def test_orders_are_of_queries_and_output_projection(self, documents):
        model, inputs = broken_models.healthy(), {}
        layer = model.model.layers[1].self_attn
        hooks = [
            layer.q_proj.register_forward_hook(lambda module, args, output: inputs.update(query=output)),
            model.model.rotary_emb.register_forward_hook(lambda module, args, output: inputs.update(rotary=output)),
        ]
        try:
            found = Feedback.of(model, documents[:1]).layers[1]
        finally:
            for hook in hooks:
                hook.remove()
        heads, d = model.config.num_key_value_heads, model.config.head_dim
        query = inputs["query"].unflatten(-1, (-1, d)).transpose(1, 2)
        query = apply_rotary_pos_emb(query, query, *inputs["rotary"])[0][0].unflatten(0, (heads, -1)).flatten(1, 2)
        output = layer.o_proj.weight.detach().unflatten(1, (heads, -1, d))
        for order, cost in zip(found, (query.mT @ query, torch.einsum("ohgi,ohgj->hij", output, output))):
            expected = Order.of(cost)
            assert torch.equal(order.order, expected.order)
            torch.testing.assert_close(order.factors, expected.factors, rtol=1e-3, atol=1e-3)

    def test_a_cache_with_feedback_loses_less(self, documents):
        model = broken_models.healthy()
        spec = QuantSpec("int4", "channel")
        config = KVQuantConfig(spec, spec)
        candidates = [Preset("plain", config), Compensated("feedback", config, Feedback.of(model, documents[3:]))]
        found = compare(model, documents[:3], candidates, Settings(40, greedy_tokens=0), {}, progress=False,
                        by_layer=False, weigh=False)["caches"]  # fmt: skip
        assert found["feedback"]["kl"]["mean"] < 0.9 * found["plain"]["kl"]["mean"]
