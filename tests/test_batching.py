"""Continuous batching with quantized pages: a request reads the same alone and in a batch, and no page is lost."""

import dataclasses
import random
from types import SimpleNamespace

import families
import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from whole import WHOLE

import hf_kvquant
from hf_kvquant import KVQuantConfig, host

try:
    host.continuous_batching()
except ImportError:
    pytest.skip("transformers before 5.23 has other pages", allow_module_level=True)

from hf_kvquant import batching
from hf_kvquant.measure.families import PRESETS

PAGE = 256
# Rounding decides between two tokens whose logits differ by less than this share of their standard deviation: in
# float32 a sum in a matrix product depends on the batch.
TIE = 1e-3


@pytest.fixture(scope="module")
def model():
    return families.build("llama", max_position_embeddings=1024)


class Log:
    """What the caches of a test did: the chunks of every request, and the bytes that each held when it was freed."""

    def __init__(self):
        self.caches, self.chunks, self.held = [], {}, {}


@pytest.fixture
def log(monkeypatch):
    return logged(monkeypatch)


def logged(patch):
    """A log of the caches that are made, and of their requests, as long as the patch is in place."""
    log = Log()
    make, write, free = (
        batching.paged_cache,
        batching.QuantizedAllocator.get_write_indices,
        batching.QuantizedAllocator.free_blocks,
    )

    def paged_cache(*args, **kwargs):
        log.caches.append(make(*args, **kwargs))
        return log.caches[-1]

    def get_write_indices(self, request_id, past, n):
        # Models with both kinds of layers have two allocators.
        if self.index == 0:
            log.chunks.setdefault(request_id, []).append((past, n))
        return write(self, request_id, past, n)

    def free_blocks(self, request_id, no_cache=False):
        if self.block_table.get(request_id) and log.chunks.get(request_id):
            held = log.held.setdefault(request_id, {})
            held |= read_all(self, request_id, sum(log.chunks[request_id][-1]))
        return free(self, request_id, no_cache)

    patch.setattr(batching, "paged_cache", paged_cache)
    patch.setattr(batching.QuantizedAllocator, "get_write_indices", get_write_indices)
    patch.setattr(batching.QuantizedAllocator, "free_blocks", free_blocks)
    return log


def read_all(allocator, request_id, length):
    """What the next query of a request reads in the layers of one kind: by layer, keys and values."""
    chunk = SimpleNamespace(request_id=request_id, past=length, n=0)
    window = allocator.window
    return {
        index: [
            x[:, :, max(0, x.shape[2] - window + 1) :] if window else x
            for x in layer.past(allocator.table([chunk], allocator.exact_block(index)), 0)
        ]
        for index, layer in allocator.layers.items()
    }


def asked(preset):
    """What a generation config needs for a preset's name, or for a config."""
    if isinstance(preset, str):
        return {"cache_implementation": f"kvquant-{preset}"}
    return {"cache_implementation": "kvquant", "cache_config": preset}


def generate(model, preset, prompts, new=24, num_return_sequences=1, **options):
    options = {"page_size": PAGE, "num_blocks": 64, "max_batch_tokens": 512} | options
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, **asked(preset))
    config.num_return_sequences = num_return_sequences  # the constructor refuses it for greedy search
    results = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=ContinuousBatchingConfig(**options)
    )
    for result in results.values():
        assert result.error is None
    return results


def check_alone(model, preset, tokens, num_prompt, chunks, held=None):
    """Replay the chunks of one request with a `QuantizedCache` of its own. It must predict the same tokens, and, if
    `held` is given, hold the same numbers at the end."""
    cache = None
    for past, n in chunks:
        new = torch.tensor([tokens[past : past + n]])
        with hf_kvquant.attention(model), torch.no_grad():
            if cache is None or past != cache.get_seq_length():
                # The request begins, begins anew after an eviction, or takes over the pages of another's prompt.
                cache = hf_kvquant.QuantizedCache(model.config, preset)
                if past:
                    model(torch.tensor([tokens[:past]]), **host.cache_inputs(model, cache))
            logits = model(new, **host.cache_inputs(model, cache)).logits[0, -1]
        end = past + n
        if num_prompt <= end < len(tokens):
            behind = logits.max() - logits[tokens[end]]
            assert behind <= TIE * logits.std(), f"token {end} of {num_prompt} + {len(tokens) - num_prompt}"
    if held is not None:
        assert sorted(held) == list(range(len(cache.layers)))
        for index, layer in enumerate(cache.layers):
            for batched, alone in zip(held[index], (layer.keys, layer.values)):
                torch.testing.assert_close(batched, alone, rtol=0, atol=1e-9)


def check_all_alone(model, preset, prompts, results, log):
    for i, prompt in enumerate(prompts):
        tokens = [*prompt, *results[f"req_{i}"].generated_tokens]
        # In float32 a sum in a matrix product depends on the batch, and then a code, and what it decides.
        held = log.held[f"req_{i}"] if model.dtype == torch.float64 else None
        check_alone(model, preset, tokens, len(prompt), log.chunks[f"req_{i}"], held)


def check_all_free(cache):
    """Every block is free, or kept because its content may be shared; none is counted twice."""
    cache.evict_cached_blocks()
    for allocator in cache.cache_allocators.values():
        assert not allocator.block_table and not allocator.exact_table and not allocator.ledger.shared_ref_counts
        assert not getattr(allocator, "numbers", None)
    cache.pool.try_to_free_sectors()
    assert sorted(cache.pool.free_sectors) == list(range(2, cache.num_sectors + 2))


def random_prompts(seed, lengths):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, families.VOCAB, (n,), generator=generator).tolist() for n in lengths]


def two_presets(*names: str) -> pytest.MarkDecorator:
    """int4 has exact copies, whose pages are not shared, and another one; the mixes below have all presets."""
    return pytest.mark.parametrize("preset", PRESETS if WHOLE else names)


class TestEqualsAlone:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_requests_of_many_lengths(self, model, log, preset):
        prompts = random_prompts(1, [1, 40, 63, 64, 250, 256, 300])
        results = generate(model, preset, prompts, new=70, max_batch_tokens=1024)
        check_all_alone(model, preset, prompts, results, log)
        (cache,) = log.caches
        assert isinstance(cache, batching.QuantizedPagedCache)
        routes = cache.routes
        assert routes["prefill_dense"] == 14 and routes["decode_fused"] == 138 and not routes["decode_dequantized"]
        check_all_free(cache)

    @two_presets("int4", "fp8")
    def test_prompts_in_chunks_beside_decoding_requests(self, model, log, preset):
        prompts = random_prompts(2, [20, 150, 90, 10, 270])
        results = generate(model, preset, prompts, max_batch_tokens=70, new=12)
        assert any(past and n > 32 for chunks in log.chunks.values() for past, n in chunks)
        assert any(past and 1 < n <= 32 for chunks in log.chunks.values() for past, n in chunks)
        check_all_alone(model, preset, prompts, results, log)
        check_all_free(log.caches[0])

    @two_presets("int4", "int8-plain")
    def test_every_number_in_the_pages(self, log, preset):
        """In float64, in which sums in another order do not change a code."""
        model = families.build("llama").double()
        prompts = random_prompts(2, [3, 100, 70, 260])
        results = generate(model, preset, prompts, max_batch_tokens=150, new=8, page_size=384)
        check_all_alone(model, preset, prompts, results, log)

    @two_presets("int4", "int8")
    def test_shared_prefixes(self, model, log, preset):
        start = random_prompts(3, [2 * PAGE])[0]
        prompts = [start + rest for rest in random_prompts(4, [50, 3, 33])]
        # One after the other, because only pages that are complete are shared.
        results = generate(model, preset, prompts, new=8, max_requests_per_batch=1, max_batch_tokens=1024)
        first = sorted(chunks[0] for chunks in log.chunks.values())
        cache = log.caches[0]
        assert cache.use_prefix_sharing == (preset != "int4")
        assert [past for past, _ in first] == ([0, 2 * PAGE, 2 * PAGE] if cache.use_prefix_sharing else [0, 0, 0])
        check_all_alone(model, preset, prompts, results, log)
        check_all_free(cache)

    @two_presets("int4", "int4-small")
    def test_forks(self, model, log, preset):
        prompts = random_prompts(5, [30, 240])
        results = generate(model, preset, prompts, new=40, num_return_sequences=3)
        assert len(results) == 6
        for i, prompt in enumerate(prompts):
            for name in (f"req_{i}", f"req_{i}__child#0", f"req_{i}__child#1"):
                tokens = [*prompt, *results[name].generated_tokens]
                chunks = log.chunks[name] if "child" not in name else log.chunks[f"req_{i}"][:1] + log.chunks[name]
                check_alone(model, preset, tokens, len(prompt), chunks)
        check_all_free(log.caches[0])

    @two_presets("int4", "int8")
    def test_forks_of_a_single_token(self, model, log, preset):
        """Copies are made before the last token of the prompt, so the manager runs such a request with no token. (A
        batch of no tokens at all fails in the model, with dense pages too.)"""
        prompts = [[5], random_prompts(5, [30])[0]]
        results = generate(model, preset, prompts, new=4, num_return_sequences=2)
        assert log.chunks["req_0"][0] == (0, 0)
        for name in ("req_0", "req_0__child#0"):
            chunks = [chunk for chunk in log.chunks[name] if chunk[1]]
            check_alone(model, preset, [5, *results[name].generated_tokens], 1, chunks)
        check_all_free(log.caches[0])

    @two_presets("int4", "fp8")
    def test_evictions(self, model, log, preset):
        prompts = random_prompts(6, [230, 240, 250, 220, 210])
        # So few pages that requests lose theirs and begin anew.
        results = generate(model, preset, prompts, new=60, num_blocks=few_blocks(model, preset))
        assert any(past == 0 for chunks in log.chunks.values() for past, _ in chunks[1:])
        check_all_alone(model, preset, prompts, results, log)
        check_all_free(log.caches[0])


def full(cache):
    return cache.cache_allocators["full_attention"]


def few_blocks(model, preset):
    """The smallest `num_blocks` with room for four requests of one page each."""
    for num_blocks in range(1, 64):
        cache = make_cache(preset, model.config, torch.float32, num_blocks=num_blocks, page_size=PAGE)
        allocator = full(cache)
        if allocator.num_blocks >= 4 * (1 + allocator.exact_blocks):
            return num_blocks
    raise AssertionError(preset)


@pytest.mark.parametrize("seed", range(3 if WHOLE else 1))
@pytest.mark.parametrize("preset", PRESETS)
def test_a_random_mix(model, log, preset, seed):
    rng = random.Random(f"{preset} {seed}")
    prompts = random_prompts(rng.randrange(1000), [rng.choice([1, 7, 31, 64, 190, 270]) for _ in range(6)])
    results = generate(
        model, preset, prompts, new=rng.choice([1, 20, 70]), max_batch_tokens=rng.choice([40, 100, 600]),
        num_blocks=rng.choice([4, 40]), allow_block_sharing=rng.random() < 0.5,
        scheduler_type=rng.choice(["fifo", "prefill_first"]),
    )  # fmt: skip
    check_all_alone(model, preset, prompts, results, log)
    check_all_free(log.caches[0])


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_other_families(log, family):
    model = families.build(family)
    prompts = random_prompts(8, [60, 131, 5])
    check_all_alone(model, "int4", prompts, generate(model, "int4", prompts, page_size=256), log)


def test_a_cancelled_request_frees_its_pages_and_others_go_on(model, log):
    prompts = random_prompts(9, [50, 60])
    config = GenerationConfig(
        cache_implementation="kvquant-int4", max_new_tokens=200, do_sample=False, eos_token_id=-1
    )
    options = ContinuousBatchingConfig(page_size=PAGE, num_blocks=64, max_batch_tokens=256)
    with model.continuous_batching_context_manager(config, continuous_batching_config=options) as manager:
        manager.add_request(prompts[0], request_id="goes", streaming=True)
        manager.add_request(prompts[1], request_id="stays", max_new_tokens=30)
        for result in manager.request_id_iter("goes"):
            if len(result.generated_tokens) >= 3:
                break
        manager.cancel_request("goes")
        stays = next(result for result in manager if result.request_id == "stays" and result.is_finished())
    tokens = [*prompts[1], *stays.generated_tokens]
    assert len(stays.generated_tokens) == 30 and len(log.chunks["goes"]) < 200
    check_alone(model, "int4", tokens, 60, log.chunks["stays"])
    check_all_free(log.caches[0])


# --- memory


def make_cache(preset, config, dtype, device="cpu", **options):
    options = {"max_batch_tokens": 64, "max_memory_percent": 0.5, "max_blocks_per_request": 0} | options
    kv_config = None if preset is None else KVQuantConfig.load(preset)
    return batching.paged_cache(
        kv_config, config=config, continuous_batching_config=ContinuousBatchingConfig(**options), device=device,
        distributed_helper=SimpleNamespace(tp_size=1), dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "least"), [("int8", 1.85), ("int8-plain", 1.85), ("int4", 3.4), ("int4-small", 3.4)]
)
def test_equal_bytes_hold_more_tokens(preset, least):
    """head_dim 128 and BF16, one request as long as the cache: exact copies and alignment included."""
    config = families.build("llama", num_hidden_layers=4, head_dim=128, hidden_size=128).config
    config._attn_implementation = "sdpa"
    options = {"page_size": 256, "num_blocks": 32}
    dense = make_cache(None, config, torch.bfloat16, **options)
    ours = make_cache(preset, config, torch.bfloat16, **options)
    # The same bytes, up to one sector and the two that are never handed out.
    assert ours.cache_tensor.nbytes <= dense.cache_tensor.nbytes + 3 * ours.bytes_per_sector
    state = SimpleNamespace(request_id="one", current_len=lambda: 0)
    fits = [
        max(
            n
            for n in range(0, cache.max_tokens_read + 1, 64)
            if cache.can_store_request_tokens(state, n, dry_run=True)
        )
        for cache in (dense, ours)
    ]
    assert fits[0] == 32 * 256
    assert fits[1] >= least * fits[0]
    assert fits[1] + full(ours).exact_blocks * 256 == full(ours).num_blocks * 256


def test_a_share_of_memory_is_not_exceeded():
    config = families.build("llama").config
    budget = {"num_blocks": None, "page_size": 256, "max_memory_percent": 0.002}
    dense, ours = (make_cache(preset, config, torch.float32, **budget) for preset in (None, "int4"))
    import psutil

    assert ours.cache_tensor.nbytes < 0.002 * psutil.virtual_memory().total
    assert full(ours).num_blocks * 256 > dense.num_blocks * 256


@pytest.mark.parametrize("preset", ["int8", "int4", "int4-small"])
def test_no_page_is_lost_or_given_twice(preset):
    random_requests(preset, preset, 700)


def random_requests(preset, seed, count):
    """That many random requests: arrivals, growth, forks, shared prefixes, ends; memory is short all the time. After
    every step the pages are compared with what a page of one owner, or of several that share it, must be."""
    rng, config = random.Random(seed), families.build("llama").config
    cache = make_cache(preset, config, torch.float32, page_size=256, num_blocks=60)
    allocator, alive, serial = full(cache), {}, 0

    def check():
        owners = {}
        for name, blocks in allocator.block_table.items():
            for block in {*blocks, *allocator.exact_table.get(name, ())}:
                owners.setdefault(block, []).append(name)
            assert not set(blocks) & set(allocator.exact_table.get(name, ()))
        for block, names in owners.items():
            assert len(names) == allocator.ledger.shared_ref_counts.get(block, 1)
        exact = [block for blocks in allocator.exact_table.values() for block in blocks]
        assert len(set(exact)) == len(exact) and all(len(owners[block]) == 1 for block in exact)
        free = [leaf for tree in cache.pool._free_blocks[0].trees.values() for leaf in tree]
        assert (
            not {*free} & {*owners} and len({*free}) == len(free) and not {*free} & {*allocator.ledger.cached_blocks}
        )
        in_sectors = len(cache.pool.free_sectors) * allocator.blocks_per_sector
        assert len(free) + len(owners) + len(allocator.ledger.cached_blocks) + in_sectors == allocator.num_blocks

    def grow(name, n):
        state = alive[name]
        if cache.can_store_request_tokens(state, n):
            complete = cache.count_new_complete_blocks(state, n)
            state.position += n
            cache.mark_complete_blocks(state, complete)

    while serial < count:
        action = rng.random()
        if action < 0.3:
            serial += 1
            name, length = f"r{serial}", rng.choice([3, 200, 600])
            # Few different tokens, so that prefixes match.
            tokens = [rng.randrange(2)] * length
            alive[name] = state = SimpleNamespace(
                request_id=name, initial_tokens=tokens, generated_tokens=[0] * 4000, position=0, status=None
            )
            state.current_len = lambda state=state: state.position
            state.position = cache.search_prefix_match(name, tokens)
            grow(name, length - state.position)
            if not allocator.block_table.get(name):
                cache.free_blocks(alive.pop(name).request_id)
        elif action < 0.6 and alive:
            grow(rng.choice(sorted(alive)), rng.choice([1, 1, 64, 300]))
        elif action < 0.7 and alive:
            source = alive[rng.choice(sorted(alive))]
            copies = {"full_attention": ([], [])}
            names = [f"{source.request_id}c{serial}-{i}" for i in range(2)]
            serial += 1
            for name in cache.prepare_fork_request(source, names, copies):
                alive[name] = SimpleNamespace(**vars(source) | {"request_id": name})
                alive[name].current_len = lambda state=alive[name]: state.position
            cache.perform_cache_copy(copies)
        elif action < 0.75:
            cache.evict_cached_blocks()
        elif alive:
            cache.free_blocks(alive.pop(rng.choice(sorted(alive))).request_id, no_cache=rng.random() < 0.3)
        check()
    for name in list(alive):
        cache.free_blocks(alive.pop(name).request_id)
    check_all_free(cache)


# --- refusals


@pytest.mark.parametrize(
    ("named", "option"),
    [
        ("use_async_batching", {"use_async_batching": True}),
        ("cpu_offload_space", {"cpu_offload_space": 0.5}),
        ("use_cuda_graph", {"use_cuda_graph": True}),
        ("default_compile_level", {"default_compile_level": 1}),
    ],
)
def test_an_option_that_is_not_served_is_named(model, named, option):
    with pytest.raises(ValueError, match=f"{named}: .* is not served in continuous batching with quantized pages"):
        generate(model, "int4", [[3, 4, 5]], **option)


def test_what_cannot_act_raises(model, monkeypatch):
    def refused(match, model=model, preset="int4", **options):
        before = host.attn_implementation(model.config)
        with pytest.raises(ValueError, match=match):
            generate(model, preset, [[3, 4, 5]], **options)
        assert host.attn_implementation(model.config) == before

    refused("static: True is not served .* expected false", preset="int4-static")
    moved = dataclasses.replace(KVQuantConfig.preset("int4"), offload=True)
    refused("offload: True is not served in continuous batching .* expected false", preset=moved)
    refused("page_size: 100 is not allowed .* expected a multiple of 64", page_size=100)
    refused("page_size: 64 is not allowed: the exact tokens of a request take", page_size=64)
    narrow = families.build("mistral", sliding_window=16)
    refused("attn_implementation: flex_attention is not served", families.build("llama", attn="flex_attention"))
    refused("a window of 16 tokens, which `sliding: 512` does not quantize: nothing to quantize", narrow)
    config = KVQuantConfig.from_dict(KVQuantConfig.preset("int4").to_dict() | {"sliding": 16, "sink_length": 16})
    refused("sink_length: 16 is not allowed with a window of 16 tokens", narrow, preset=config)
    monkeypatch.setattr(type(model), "_supports_default_dynamic_cache", lambda self: False)
    refused("does not support Cache objects")


def test_a_persistent_manager_keeps_its_cache(model, log):
    prompts = random_prompts(10, [20])
    config = GenerationConfig(cache_implementation="kvquant-int8", max_new_tokens=5, do_sample=False, eos_token_id=-1)
    options = ContinuousBatchingConfig(page_size=PAGE, num_blocks=32, max_batch_tokens=64)
    try:
        first, second = (
            model.generate_batch(prompts, config, options, persistent_manager=True) for _ in range(2)
        )  # fmt: skip
        assert [x.generated_tokens for x in first.values()] == [x.generated_tokens for x in second.values()]
        assert len(log.caches) == 1
        for other in (None, "kvquant-int4"):
            config = GenerationConfig(cache_implementation=other, max_new_tokens=5, do_sample=False, eos_token_id=-1)
            with pytest.raises(ValueError, match="is not that of the model's persistent manager"):
                model.generate_batch(prompts, config, options)
    finally:
        model.destroy_cached_continuous_batching_manager()


def test_dense_batches_are_transformers_own(model, log):
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1)
    options = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)
    model.generate_batch(random_prompts(11, [20]), config, options)
    assert type(log.caches[0]).__name__ == "PagedAttentionCache"


def test_other_versions_are_told(monkeypatch):
    need = host.CONTINUOUS_BATCHING_NEEDS[1]
    module, _, name = need.path.partition(":")
    with monkeypatch.context() as patch:
        patch.delattr(f"transformers.{module}.{name}")
        with pytest.raises(ImportError, match=f"has no .*{name}"):
            host.continuous_batching()
    monkeypatch.setattr(host, "VERSION", "5.22.1")
    with pytest.raises(ImportError, match="quantized pages need transformers 5.23 or newer, and this is 5.22.1"):
        host.continuous_batching()


def test_an_attention_argument_that_is_not_served_is_named():
    allocator = SimpleNamespace(sliding_window=None)
    states = batching.NewStates(torch.zeros(1, 2, 3, 4), SimpleNamespace(is_stored=False, allocator=allocator))
    call = {"query": torch.zeros(1, 4, 3, 4), "key": states, "value": states, "attention_mask": None}
    for name in ("sinks", "position_bias", "sliding_window", "dropout"):
        with pytest.raises(ValueError, match=f"attention argument '{name}': not served"):
            batching.attend(torch.nn.Identity(), **call, dense_attention=None, **{name: 2})
    with pytest.raises(ValueError, match="attention argument 'attention_mask': not served"):
        batching.attend(torch.nn.Identity(), **call | {"attention_mask": torch.ones(1)}, dense_attention=None)
    with pytest.raises(ValueError, match="Identity attends to Tensor and NewStates in continuous batching"):
        batching.attend(torch.nn.Identity(), **call | {"key": torch.ones(1)}, dense_attention=None)


def test_a_model_that_changes_cached_states_is_told():
    states = batching.NewStates(torch.zeros(1, 2, 3, 4), None)
    for use in (lambda: states[0], lambda: torch.cat([states]), lambda: states.transpose(1, 2)):
        with pytest.raises((TypeError, AttributeError), match="changes cached states before attention"):
            use()
