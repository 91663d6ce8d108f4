"""Long sequences in turns, through layers that drop tokens, and what a crop of them has to do."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_kvquant import KVQuantConfig, QuantizedCache, attention
from hf_kvquant.host import CACHE

ROUNDING = 1e-4
# The updates of a long sequence: a prompt longer than the window, single tokens, short and long turns.
TURNS = (200, *[1] * 70, 7, 32, 33, 150, 1, 1, 20, 300, 2)


def run(model, cache, ids: torch.Tensor, turns=TURNS, mask: torch.Tensor | None = None, seen=None) -> torch.Tensor:
    """Logits of plain calls with so many tokens each; `seen` says which tokens the queries of a turn may see."""
    logits, start = [], int(cache.get_seq_length())
    with torch.no_grad(), attention(model):
        for n in turns:
            given = {}
            if mask is not None:
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start : start + n]
                given = {"attention_mask": mask[:, : start + n], "position_ids": positions}
            if seen is not None:
                given["attention_mask"] = seen(start, n, mask)
            logits.append(model(ids[:, start : start + n], **given, **{CACHE: cache}, use_cache=True).logits)
            start += n
    return torch.cat(logits, 1)


def check_crop(model, config: KVQuantConfig, ids: torch.Tensor, removed: int) -> None:
    """After a crop it is as if the tokens had never come, however they came."""
    before, after = (290, *[1] * 10), (*[1] * 5, *[13] * 5)
    fresh = QuantizedCache(model.config, config)
    run(model, fresh, ids, before)
    expected = run(model, fresh, ids, after)
    for turns in {(removed,), (1,) * removed}:
        cache = QuantizedCache(model.config, config)
        run(model, cache, ids, (*before, *turns))
        cache.crop(-removed)
        assert cache.get_seq_length() == 300
        torch.testing.assert_close(run(model, cache, ids, after), expected, rtol=0, atol=ROUNDING)
        assert cache.routes["window_lost"] == 0


def check_crop_of_too_much(model, config: KVQuantConfig, ids: torch.Tensor, layers: int) -> None:
    """It raises and changes nothing; a crop of everything begins anew. The window of layer 0 has 24 tokens."""
    cache = QuantizedCache(model.config, config)
    run(model, cache, ids, (300, 1))
    before = copy.deepcopy(cache)
    with pytest.raises(RuntimeError, match=r"crop: 250 tokens cannot be removed from layer 0, whose window of 24"):
        cache.crop(-250)
    assert cache._lengths() == before._lengths() == [301] * layers
    assert torch.equal(run(model, cache, ids, (1, 40)), run(model, before, ids, (1, 40)))
    cache.crop(-cache.get_seq_length())
    assert cache.get_seq_length() == 0
    fresh = QuantizedCache(model.config, config)
    got, expected = (run(model, each, ids, (200, *[1] * 5)) for each in (cache, fresh))
    torch.testing.assert_close(got, expected, rtol=0, atol=ROUNDING)
