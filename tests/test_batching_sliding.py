"""Continuous batching of models with sliding layers: a request reads the same alone and in a batch, its pages follow
the window, and no page is lost."""

import dataclasses
import random
from contextlib import suppress
from math import lcm
from types import SimpleNamespace

import families
import pytest
import torch
from transformers import ContinuousBatchingConfig
from whole import WHOLE

from hf_kvquant import KVQuantConfig, host

try:
    host.continuous_batching()
except ImportError:
    pytest.skip("transformers before 5.23 has other pages", allow_module_level=True)

from test_batching import (  # noqa: F401 (a fixture)
    PRESETS,
    check_all_alone,
    check_all_free,
    check_alone,
    generate,
    log,
    make_cache,
    random_prompts,
)

from hf_kvquant import allocators, batching

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
QWEN = {"use_sliding_window": True, "num_hidden_layers": 3, "layer_types": MIXED}
# Family, options, and the attention that it is loaded with.
MODELS = {
    "mistral 24": ("mistral", {"sliding_window": 24}, "sdpa"),
    "mistral 100": ("mistral", {"sliding_window": 100}, "sdpa"),
    "gemma3 24": ("gemma3", {}, "sdpa"),
    "gemma2 70": ("gemma2", {"sliding_window": 70}, "eager"),
    "gpt_oss 24": ("gpt_oss", {}, "eager"),
    "qwen2 130": ("qwen2", QWEN | {"sliding_window": 130}, "sdpa"),
    "wider than the context": ("qwen2", QWEN | {"sliding_window": 4096}, "sdpa"),
}


def build(name):
    family, options, attn = MODELS[name]
    return families.build(family, attn=attn, **options)


def preset(name, sliding):
    return dataclasses.replace(KVQuantConfig.preset(name), sliding=sliding)


def page_size(model, config, least=64):
    """The shortest page from `least` on that has room for the exact copies of a layer."""
    for size in range(least, 1024, 64):
        with suppress(ValueError):
            batching.refuse_unserved(model, config, ContinuousBatchingConfig(page_size=size))
            return size
    raise AssertionError(config)


def kinds(cache):
    """Which kinds of layers have quantized pages."""
    return {
        kind: not all(spec.is_dense for layout in allocator.layouts for spec in layout.specs)
        for kind, allocator in cache.cache_allocators.items()
    }


@pytest.mark.parametrize("quantized", [True, False], ids=["quantized windows", "dense windows"])
@pytest.mark.parametrize("name", MODELS)
def test_requests_alone_and_in_a_batch(log, name, quantized):  # noqa: F811
    model, config = build(name), preset("int4", 8 if quantized else "dense")
    prompts = random_prompts(1, [1, 30, 64, 140, 300])
    if not quantized and name.startswith("mistral"):
        with pytest.raises(ValueError, match="nothing to quantize"):
            generate(model, config, prompts)
        return
    size = page_size(model, config)
    results = generate(model, config, prompts, new=40, max_batch_tokens=100, page_size=size, num_blocks=80)
    assert any(past and n > 32 for chunks in log.chunks.values() for past, n in chunks)
    check_all_alone(model, config, prompts, results, log)
    (cache,) = log.caches
    is_quantized = {"sliding_attention": quantized or name == "wider than the context", "full_attention": True}
    assert kinds(cache) == {kind: is_quantized[kind] for kind in cache.cache_allocators}
    check_all_free(cache)


@pytest.mark.parametrize("name", ["int8", "int4", "int8-plain", "int4-small"])
def test_every_number_in_the_pages(log, name):  # noqa: F811
    """In float64, in which sums in another order do not change a code."""
    model, config = build("qwen2 130").double(), preset(name, 8)
    prompts = random_prompts(2, [3, 100, 270, 420])
    size = page_size(model, config)
    results = generate(model, config, prompts, max_batch_tokens=450, new=50, page_size=size, num_blocks=16)
    check_all_alone(model, config, prompts, results, log)


@pytest.mark.parametrize("seed", range(4 if WHOLE else 2))
@pytest.mark.parametrize("name", ["mistral 24", "qwen2 130", "gemma3 24"])
def test_a_random_mix(log, name, seed):  # noqa: F811
    random_mix(log, name, seed)


def random_mix(log, name, seed):  # noqa: F811
    rng = random.Random(f"{name} {seed}")
    model, config = build(name), preset(rng.choice(PRESETS), 8)
    prompts = random_prompts(rng.randrange(1000), [rng.choice([1, 7, 31, 64, 190, 270]) for _ in range(6)])
    results = generate(
        model, config, prompts, new=rng.choice([1, 20, 70]), max_batch_tokens=rng.choice([40, 100, 600]),
        page_size=page_size(model, config, rng.choice([64, 256])), num_blocks=rng.choice([12, 60]),
        scheduler_type=rng.choice(["fifo", "prefill_first"]),
    )  # fmt: skip
    check_all_alone(model, config, prompts, results, log)
    check_all_free(log.caches[0])


@pytest.mark.parametrize("name", ["mistral 100", "qwen2 130", "gpt_oss 24"])
def test_forks(log, name):  # noqa: F811
    model, config = build(name), preset("int4", 8)
    prompts = random_prompts(5, [1, 30, 240])
    size = page_size(model, config)
    results = generate(model, config, prompts, new=60, num_return_sequences=3, page_size=size)
    assert len(results) == 9
    for i, prompt in enumerate(prompts):
        for name in (f"req_{i}", f"req_{i}__child#0", f"req_{i}__child#1"):
            tokens = [*prompt, *results[name].generated_tokens]
            chunks = log.chunks[name] if "child" not in name else log.chunks[f"req_{i}"][:1] + log.chunks[name]
            check_alone(model, config, tokens, len(prompt), [chunk for chunk in chunks if chunk[1]])
    check_all_free(log.caches[0])


# --- memory


def mixed_config(num_hidden_layers=6, window=512, **options):
    """Five sliding layers for each full one, as in Gemma 3."""
    types = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(num_hidden_layers)]
    config = families.build(
        "gemma3", num_hidden_layers=num_hidden_layers, layer_types=types, sliding_window=window,
        max_position_embeddings=8192, **options,
    ).config  # fmt: skip
    config._attn_implementation = "sdpa"
    return config


class Request:
    def __init__(self, name):
        self.request_id, self.tokens = name, 0

    def current_len(self):
        return self.tokens


@pytest.mark.parametrize("chunk", [1, 31, 200, 1500])
@pytest.mark.parametrize("sliding", [512, "dense"])
def test_pages_follow_the_window(sliding, chunk):
    cache = make_cache(preset("int8", sliding), mixed_config(), torch.float32, page_size=128, num_blocks=60)
    allocator, request = cache.cache_allocators["sliding_attention"], Request("one")
    most = -(-512 // 128) + 1 + -(-min(chunk, 512) // 128) + 1
    while request.tokens < 3000:
        assert cache.can_store_request_tokens(request, chunk)
        request.tokens += chunk
        numbers = allocator.numbers["one"]
        assert len(numbers) == len(allocator.block_table["one"]) <= most
        # What the next query sees is there.
        seen = range(max(0, request.tokens - 511) // 128, -(-request.tokens // 128))
        assert set(seen) <= set(numbers)
    cache.free_blocks("one")
    check_all_free(cache)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_no_page_is_lost_or_given_twice(name, seed):
    rng = random.Random(f"{name} {seed}")
    config = mixed_config(rng.choice([6, 7]), rng.choice([24, 200, 600]))
    cache = make_cache(preset(name, rng.choice([8, "dense"])), config, torch.float32, page_size=384, num_blocks=40)
    alive, serial = {}, 0

    def check():
        taken = 0
        for allocator in cache.cache_allocators.values():
            exact = [block for blocks in allocator.exact_table.values() for block in blocks]
            owned = [block for blocks in allocator.block_table.values() for block in blocks] + exact
            free = [leaf for tree in cache.pool._free_blocks[allocator.index].trees.values() for leaf in tree]
            in_use = {*owned, *free}
            # Blocks are shared between copies of a request, in full layers only.
            assert len(exact) == len({*exact}) and not {*owned} & {*free}
            shares = allocator.use_block_sharing
            assert shares or len(owned) == len({*owned})
            assert len(in_use) % allocator.blocks_per_sector == 0
            taken += len(in_use) // allocator.blocks_per_sector
        assert taken + cache.pool.num_free_sectors == cache.num_sectors

    while serial < 300:
        serial += 1
        action = rng.random()
        if action < 0.3:
            alive[f"r{serial}"] = Request(f"r{serial}")
        if action < 0.7 and alive:
            request = alive[rng.choice(sorted(alive))]
            n = rng.choice([1, 1, 64, 300, 900])
            if cache.can_store_request_tokens(request, n):
                request.tokens += n
        elif action < 0.8 and any(request.tokens for request in alive.values()):
            source = alive[rng.choice([name for name, request in alive.items() if request.tokens])]
            copies = {kind: ([], []) for kind in cache.cache_allocators}
            for name in cache.prepare_fork_request(source, [f"c{serial}"], copies):
                alive[name] = Request(name)
                alive[name].tokens = source.tokens
            cache.perform_cache_copy(copies)
        elif alive:
            cache.free_blocks(alive.pop(rng.choice(sorted(alive))).request_id)
        check()
    for name in alive:
        cache.free_blocks(name)
    check_all_free(cache)


@pytest.mark.parametrize("sliding", [512, "dense"])
@pytest.mark.parametrize(("name", "least"), [("int8", 1.7), ("int4", 3.0)])
def test_equal_bytes_hold_more_tokens(name, least, sliding):
    """A long request of a model with head_dim 128, BF16 and 24 layers: exact copies, windows and padding included."""
    config = mixed_config(24, head_dim=128, hidden_size=128)
    options = {"page_size": 128, "num_blocks": 24}
    dense = make_cache(None, config, torch.bfloat16, **options)
    ours = make_cache(preset(name, sliding), config, torch.bfloat16, **options)
    # The same bytes, up to one sector and the two that are never handed out.
    assert ours.cache_tensor.nbytes <= dense.cache_tensor.nbytes + 3 * ours.bytes_per_sector
    fits = [
        max(n for n in range(0, 60000, 128) if cache.can_store_request_tokens(Request("one"), n, dry_run=True))
        for cache in (dense, ours)
    ]
    assert fits[1] >= least * fits[0]


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (5, 1), (22, 4), (17, 17), (3, 40)])
@pytest.mark.parametrize("bytes_", [(66000, 131072), (131072, 66000), (36864, 37120), (139264, 1)])
def test_pages_of_two_kinds_are_hardly_padded(shape, bytes_):
    kinds = dict(zip(("sliding_attention", "full_attention"), zip(shape, bytes_)))
    pages = allocators.page_bytes({
        kind: [SimpleNamespace(page_bytes=size)] * count for kind, (count, size) in kinds.items()
    })  # fmt: skip
    blocks = [count * pages[kind] for kind, (count, _) in kinds.items()]
    assert all(pages[kind] % 64 == 0 and pages[kind] >= size for kind, (_, size) in kinds.items())
    assert lcm(*blocks) <= 16 * max(blocks)
    if 1 not in bytes_:
        assert sum(pages[kind] / size for kind, (_, size) in kinds.items()) <= 2.2
