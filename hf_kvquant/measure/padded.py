"""`generate` with a left-padded batch: how many rows fit a number of bytes, and how fast they are answered."""

from __future__ import annotations

import itertools
import random
import time
from statistics import median
from typing import Any

import torch

from ..cache import QuantizedCache
from ..config import KVQuantConfig
from ..host import cache_of
from ..integration import NAME
from .checks import is_true
from .generation import Clock
from .serving import MIXES, requests
from .step import Shape, all_fused, build_model
from .weighing import held_bytes, tensor_bytes


def measure(shape: Shape, config: KVQuantConfig | None, mix: str, budget: int, seed: int, threads: int) -> dict:
    """The largest batch of seeded prompts whose cache stays within `budget` bytes, for a process of its own.

    Rows are padded to the longest prompt of the mix, and get its longest answer. `config` None: transformers'
    `DynamicCache`.

    Raises:
        ValueError: the budget holds no row.
    """
    torch.set_num_threads(threads)
    (_, longest), (_, answer) = MIXES[mix]
    model = build_model(shape, longest + answer)
    rng = random.Random(f"padded {seed}")
    full = [rng.randrange(1, shape.vocabulary) for _ in range(longest)]
    # The bytes of a row do not depend on the others. This is the first use of all code, too.
    one, _ = _generate(model, config, [full], answer)
    rows = budget // held_bytes(one)
    if rows == 0:
        raise ValueError(f"budget: {budget} bytes hold no row; one needs {held_bytes(one)}")
    prompts = [full, *(request.prompt for request in requests(mix, rows - 1, 0.0, 0, seed))]
    del one
    began = time.perf_counter()
    cache, times = _generate(model, config, prompts, answer)
    checks = [is_true("", "the cache stays within the budget", held_bytes(cache) <= budget)]
    if isinstance(cache, QuantizedCache):
        checks += [
            is_true("", "every step took the fused route", all_fused(cache, answer - 1)),
            is_true("", "memory_report counts every tensor", held_bytes(cache) == tensor_bytes(cache)),
        ]
    return {
        "checks": checks,
        "rows": rows,
        "cache_bytes": held_bytes(cache),
        "new_tokens": rows * answer,
        "tokens_per_s": rows * answer / (times[-1] - began),
        "first_token_s": times[0] - began,
        "step_s": median(b - a for a, b in itertools.pairwise(times)),
    }


def _generate(model: Any, config: KVQuantConfig | None, prompts: list[list[int]], answer: int) -> tuple[Any, list]:
    """The cache after `answer` new tokens for each prompt, and the time of each of them."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    asked = {} if config is None else {"cache_implementation": NAME, "cache_config": config}
    clock = Clock()
    output = model.generate(
        ids,
        attention_mask=(ids != 0).long(),
        max_new_tokens=answer,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        streamer=clock,
        return_dict_in_generate=True,
        **asked,
    )
    return cache_of(output), clock.times[1:]
