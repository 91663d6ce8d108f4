"""Continuous batching: requests with seeded lengths and arrivals, and what one cache needs to serve them."""

from __future__ import annotations

import functools
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from ..config import KVQuantConfig
from ..host import continuous_batching
from .process_memory import new_peak, resident
from .step import Shape, build_model

MIXES = {"long": ((1024, 3072), (32, 96)), "chat": ((32, 384), (32, 160))}
"""The lengths of prompts and of answers, from and to."""


class Request(NamedTuple):
    """A prompt, the number of new tokens, and the second of arrival."""

    prompt: list[int]
    answer: int
    arrival: float = 0.0


@dataclass(frozen=True)
class Pages:
    """The memory of a cache, in blocks of dense pages, and how it is used."""

    blocks: int
    page_size: int = 256
    batch_tokens: int = 512
    shared: bool = False  # whether requests share the pages of equal prefixes


def requests(mix: str, count: int, rate: float, prefix: int, seed: int) -> list[Request]:
    """Seeded requests.

    Args:
        rate: requests per second, as a Poisson stream; 0: all arrive at once.
        prefix: the number of tokens with which all prompts begin, beside their own.
    """
    rng, arrival, found = random.Random(seed), 0.0, []
    start = [random.Random(f"prefix {seed}").randrange(1, 256) for _ in range(prefix)]
    for _ in range(count):
        prompt, answer = (rng.randint(*span) for span in MIXES[mix])
        found.append(Request([*start, *(rng.randrange(1, 256) for _ in range(prompt))], answer, arrival))
        arrival += rng.expovariate(rate) if rate else 0.0
    return found


def serve(model: Any, config: KVQuantConfig | None, todo: list[Request], pages: Pages) -> list:
    """The manager's results for the requests, in their order; `config` None: dense pages.

    Raises:
        RuntimeError: the manager stopped, or a request failed.
    """
    asked = {} if config is None else {"cache_implementation": "kvquant", "cache_config": config}
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1, **asked)
    options = ContinuousBatchingConfig(
        page_size=pages.page_size, num_blocks=pages.blocks, max_batch_tokens=pages.batch_tokens,
        allow_block_sharing=pages.shared, auto_switch_to_flash=False,
    )  # fmt: skip
    results: dict[str, Any] = {}
    with model.continuous_batching_context_manager(generation, continuous_batching_config=options) as manager:
        began = time.perf_counter()
        for i, request in enumerate(todo):
            time.sleep(max(0.0, began + request.arrival - time.perf_counter()))
            manager.add_request(
                request.prompt, request_id=str(i), max_new_tokens=request.answer, record_timestamps=True
            )
        while len(results) < len(todo):
            result = manager.get_result(timeout=1)
            if result is not None:
                results[result.request_id] = result
            elif not manager.is_running():
                raise RuntimeError("the manager stopped before all requests were done")
    failed = [result.error for result in results.values() if result.error]
    if failed:
        raise RuntimeError(failed[0])
    return [results[str(i)] for i in range(len(todo))]


@contextmanager
def counted_hits() -> Iterator[list[int]]:
    """A list to which each request adds the number of tokens that it takes over from pages of others."""
    cache, hits = continuous_batching().PagedAttentionCache, []
    search = cache.search_prefix_match

    @functools.wraps(search)
    def counting(self: Any, *args: Any) -> int:
        hits.append(search(self, *args))
        return hits[-1]

    cache.search_prefix_match = counting
    try:
        yield hits
    finally:
        cache.search_prefix_match = search


def measure(
    shape: Shape, length: int, config: KVQuantConfig | None, todo: list[Request], pages: Pages, threads: int
) -> dict:
    """The figures of one run, for a process of its own: its peak is above the model and the code that is loaded."""
    torch.set_num_threads(threads)
    model = build_model(shape, length)
    serve(model, config, [Request([1, 2, 3], 2)], Pages(4, pages.page_size, pages.batch_tokens))
    has_memory = sys.platform.startswith("linux")
    before = resident() if has_memory else 0
    if has_memory:
        new_peak()
    with counted_hits() as hits:
        results = serve(model, config, todo, pages)
    peak = (resident("VmHWM") - before) / 1e6 if has_memory else None
    prompts = sum(len(request.prompt) for request in todo)
    return figures(results) | {"peak_mb": peak, "prompt_tokens": prompts, "shared_tokens": sum(hits)}


def figures(results: list) -> dict:
    """What the manager's results say about time."""
    begin, end = min(r.created_time for r in results), max(r.lifespan[1] for r in results)
    events = sorted((t, change) for r in results for t, change in zip(r.lifespan, (1, -1)))
    held, most = 0, 0
    for _, change in events:
        held += change
        most = max(most, held)
    first = sorted(r.timestamps[0] - r.created_time for r in results)
    others = sorted(
        (r.timestamps[-1] - r.timestamps[0]) / (len(r.timestamps) - 1) for r in results if len(r.timestamps) > 1
    )
    new = sum(len(r.generated_tokens) for r in results)
    return {
        "held_at_once": most,
        "seconds": end - begin,
        "new_tokens": new,
        "tokens_per_s": new / (end - begin),
        "first_token_s": {"median": median(first), "p99": quantile(first, 0.99)},
        "token_s": {"median": median(others), "p99": quantile(others, 0.99)},
    }


def quantile(ordered: list[float], share: float) -> float:
    """The value that `share` of the ordered values do not exceed."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
