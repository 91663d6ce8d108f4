"""One timed generation: text, separate times of prefill and decode, bytes and routes of the cache; and the text that
the dense cache writes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation import BaseStreamer

from ..cache import QuantizedCache
from ..config import KVQuantConfig
from ..host import cache_of
from ..integration import NAME
from .weighing import held_bytes


@dataclass(frozen=True)
class Run:
    """The result of one call of `generate`.

    Args:
        tokens: the new tokens.
        prefill_seconds: the time up to the first new token.
        decode_seconds: the time of all tokens after the first.
        memory: the result of `QuantizedCache.memory_report`; for a dense cache only `dense`, `total` and
            `dense_equivalent`.
        routes: `QuantizedCache.routes`; None for a dense cache.
    """

    tokens: list[int]
    prompt_length: int
    prefill_seconds: float
    decode_seconds: float
    memory: dict[str, int]
    routes: dict[str, int] | None

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_length / self.prefill_seconds

    @property
    def decode_rate(self) -> float | None:
        """New tokens per second after the first; None if there was only one."""
        steps = len(self.tokens) - 1
        return steps / self.decode_seconds if steps else None

    @property
    def ratio(self) -> float:
        """Bytes of the cache over those of a dense one with the same tokens."""
        return self.memory["total"] / self.memory["dense_equivalent"]


# A speed is given only if the fastest round is faster than the median by at most this share.
NOISE_BOUND = 0.25
_FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one cache, over rounds in which every cache had its turn.

    If caches were timed one after the other, other programs could slow down some of them. In turns, a busy minute
    slows a round of all of them.
    """

    rounds: list[float]

    @property
    def spread(self) -> float | None:
        """How much faster the fastest round is, as a share of the median; None with fewer than three rounds.

        Other programs only make a round slower, so the fastest one shows best what the cache can do. If the median is
        far from it, most rounds were disturbed.
        """
        if len(self.rounds) < _FEWEST_ROUNDS:
            return None
        return max(self.rounds) / median(self.rounds) - 1

    @property
    def median(self) -> float | None:
        """The median; None if the machine is too noisy."""
        return median(self.rounds) if self.spread is not None and self.spread <= NOISE_BOUND else None


class Clock(BaseStreamer):
    """Records the time at which `generate` passes the prompts, and then each token of theirs."""

    def __init__(self, on_tokens: Callable[[torch.Tensor], None] | None = None):
        self.times, self._on_tokens = [], on_tokens

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if self._on_tokens is not None:
            self._on_tokens(value)

    def end(self) -> None:
        pass


def run(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    config: KVQuantConfig | None,
    max_new_tokens: int,
    on_tokens: Callable[[torch.Tensor], None] | None = None,
    **options,
) -> Run:
    """Generate from one prompt `[1, length]` through the cache that `config` describes (None: dense).

    `on_tokens` gets the prompt first, then each new token; `options` are `generate`'s.
    """
    clock = Clock(on_tokens)
    if config is not None:
        options |= {"cache_implementation": NAME, "cache_config": config}
    output = model.generate(  # type: ignore[operator]  # of GenerationMixin
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        streamer=clock,
        return_dict_in_generate=True,
        **options,
    )
    start, first, *_ = clock.times
    cache: Any = cache_of(output)
    quantized = isinstance(cache, QuantizedCache)
    assert quantized or config is None, type(cache)
    parts = "dense", "total", "dense_equivalent"
    return Run(
        tokens=output.sequences[0, input_ids.shape[1] :].tolist(),
        prompt_length=input_ids.shape[1],
        prefill_seconds=first - start,
        decode_seconds=clock.times[-1] - first,
        memory=cache.memory_report() if quantized else dict.fromkeys(parts, held_bytes(cache)),
        routes=cache.routes if quantized else None,
    )


def continued(
    model: PreTrainedModel, contexts: torch.Tensor, new_tokens: int, temperature: float | None = None, seed: int = 0
) -> torch.Tensor:
    """Contexts `[documents, length]`, each with the `new_tokens` tokens that the model writes after it through the
    dense cache.

    Args:
        temperature: None: the most likely tokens; otherwise tokens are drawn from the whole distribution.
        seed: of the draws, which leave torch's own generators as they were.
    """
    options: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.generate(  # type: ignore[operator]  # of GenerationMixin
            contexts,
            attention_mask=torch.ones_like(contexts),
            max_new_tokens=new_tokens,
            # Text goes on past its end, so that every document has the same number of tokens.
            eos_token_id=None,
            **options,
        )
