"""Random mixes of requests in continuous batching: forks, evictions, shared prefixes, cancellations, all at once.

Every request must predict, token by token, what it predicts alone in a `QuantizedCache` (greedy, float32). No page is
written by two requests, and none is lost. For longer than the tests have time: `make soak`, or

    python tests/test_batching_mixes.py --mixes 200 --requests 10000

which runs 200 mixes with every preset, and as many with models that have sliding layers.
"""

import argparse
import itertools
import random

import families
import pytest
from test_batching import (
    PAGE,
    PRESETS,
    check_all_free,
    check_alone,
    few_blocks,
    logged,
    random_prompts,
    random_requests,
)
from test_batching_sliding import MODELS, random_mix
from transformers import ContinuousBatchingConfig, GenerationConfig

from hf_kvquant import batching, ops


def until(chunks, end):
    """The chunks of the first `end` tokens."""
    return [(past, min(n, end - past), is_long) for past, n, is_long in chunks if past < end]


def is_long(past, n):
    """Whether new tokens read a de-quantized past and each other, not their past as stored."""
    return past > 0 and n > ops.MAX_Q_LEN


class Watch:
    """In which chunks (past, new tokens, `is_long`) all was computed that a request reads, by itself or by others.

    histories: of each request a list of chunks, and one list more for every time that it began anew.
    mixed: requests that took over a page computed in other chunks than theirs.
    """

    def __init__(self, patch):
        self.caches, self.histories, self.mixed, self.pages = [], {}, set(), {}
        self.evicted = self.shared = self.forked = 0
        make, allocator = batching.paged_cache, batching.QuantizedAllocator
        write, fork, complete = allocator.get_write_indices, allocator.fork_blocks, allocator.mark_complete_blocks

        def paged_cache(*args, **kwargs):
            self.caches.append(make(*args, **kwargs))
            return self.caches[-1]

        def get_write_indices(own, name, past, n):
            if not n:
                return write(own, name, past, n)
            histories, blocks = self.histories.setdefault(name, []), own.block_table[name]
            if not histories or past != sum(histories[-1][-1][:2] if histories[-1] else (0,)):
                self.evicted += len(histories) > 0
                self.shared += past > 0
                histories.append(until(self.pages[blocks[past // PAGE - 1]], past) if past else [])
            histories[-1].append((past, n, is_long(past, n)))
            for block in blocks[past // PAGE : -(-(past + n) // PAGE)]:
                assert [owner for owner, held in own.block_table.items() if block in held] == [name]
                self.pages[block] = [*histories[-1]]
            return write(own, name, past, n)

        def fork_blocks(own, source, name, past):
            self.forked += 1
            self.histories[name] = [until(history, past) for history in self.histories.get(source, [])[-1:]]
            self.mixed |= {name} if source in self.mixed else set()
            return fork(own, source, name, past)

        def mark_complete_blocks(own, name, *args):
            before = [*own.block_table[name]]
            complete(own, name, *args)
            for i, (old, new) in enumerate(zip(before, own.block_table[name])):
                ends = until(self.histories[name][-1], (i + 1) * PAGE)
                if old != new and until(self.pages[new], (i + 1) * PAGE) != ends:
                    self.mixed.add(name)

        patch.setattr(batching, "paged_cache", paged_cache)
        patch.setattr(allocator, "get_write_indices", get_write_indices)
        patch.setattr(allocator, "fork_blocks", fork_blocks)
        patch.setattr(allocator, "mark_complete_blocks", mark_complete_blocks)

    def can_be_alone(self, name):
        """Whether a request alone can read the same: it cannot if its pages are the beginnings of long chunks, and too
        short to be one, or if they are mixed."""
        chunks = [chunk for history in self.histories[name] for chunk in history]
        return name not in self.mixed and all(is_long(past, n) == how for past, n, how in chunks)


def run_mix(model, preset, seed):
    """Run one mix and check it; returns the watch, and how many requests were answered and compared."""
    rng = random.Random(f"{preset} {seed}")
    starts = random_prompts(rng.randrange(1000), [PAGE, 2 * PAGE])
    prompts = {
        f"r{i}": [*(rng.choice(starts) if rng.random() < 0.5 else []), *random_prompts(rng.randrange(10**6), [n])[0]]
        for i, n in enumerate(rng.choices([1, 7, 31, 64, 130, 190], k=7))
    }
    copies = rng.choice([1, 1, 2, 3])
    # A cancelled request has copies that nobody waits for.
    cancelled = {name: rng.randint(1, 10) for name in prompts if copies == 1 and rng.random() < 0.3}
    blocks = max(few_blocks(model, preset), 3) if rng.random() < 0.5 else 60
    options = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=blocks, max_batch_tokens=rng.choice([50, 100, 600, 1200]),
        scheduler_type=rng.choice(["fifo", "prefill_first"]), allow_block_sharing=rng.random() < 0.8,
    )  # fmt: skip
    config = GenerationConfig(
        cache_implementation=f"kvquant-{preset}", max_new_tokens=70, do_sample=False, eos_token_id=-1
    )
    config.num_return_sequences = copies  # the constructor refuses it for greedy search
    lengths = {name: rng.choice([2, 15, 40, 70]) for name in prompts}
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        with model.continuous_batching_context_manager(config, continuous_batching_config=options) as manager:
            for name, prompt in prompts.items():
                manager.add_request(prompt, request_id=name, max_new_tokens=lengths[name], streaming=name in cancelled)
            while len(results.keys() - cancelled) < (len(prompts) - len(cancelled)) * copies:
                result = manager.get_result(timeout=1)
                if result is None:
                    assert manager.is_running()
                    continue
                assert result.error is None
                if result.is_finished():
                    results[result.request_id] = result.generated_tokens
                elif len(result.generated_tokens) >= cancelled[result.request_id]:
                    manager.cancel_request(result.request_id)
            while manager.batch_processor.has_pending_requests():
                assert manager.is_running()
        (cache,) = watch.caches
        assert isinstance(cache, batching.QuantizedPagedCache)
    check_all_free(cache)
    compared = [name for name in results if watch.can_be_alone(name)]
    for name in compared:
        prompt = prompts[name.partition("__")[0]]
        for history in watch.histories[name]:
            check_alone(model, preset, [*prompt, *results[name]], len(prompt), [chunk[:2] for chunk in history])
    return watch, len(results), len(compared)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_mix_of_everything(preset):
    model = families.build("llama", max_position_embeddings=1024)
    watches, answered, compared = zip(*(run_mix(model, preset, seed) for seed in range(2)))
    assert sum(compared) >= 0.8 * sum(answered)
    assert any(watch.forked or watch.evicted or watch.shared for watch in watches)


def soak():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixes", type=int, default=200, help="for every preset, and with sliding layers")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first mix")
    given = parser.parse_args()
    model = families.build("llama", max_position_embeddings=1024)
    total = dict.fromkeys(("mixes", "answered", "compared", "forked", "evicted", "shared"), 0)
    seeds = range(given.seed, given.seed + given.mixes)
    for seed, preset in itertools.product(seeds, PRESETS):
        print(f"mix {seed}, {preset}; so far {total}", flush=True)
        watch, answered, compared = run_mix(model, preset, seed)
        found = (1, answered, compared, watch.forked, watch.evicted, watch.shared)
        total = {name: old + new for (name, old), new in zip(total.items(), found)}
    print(f"{total}: tokens as alone")
    for seed in seeds:
        name = list(MODELS)[seed % len(MODELS)]
        print(f"sliding mix {seed}, {name}", flush=True)
        with pytest.MonkeyPatch.context() as patch:
            random_mix(logged(patch), name, seed)
    for preset in ("int8", "int4", "int4-small"):
        random_requests(preset, f"{preset} {given.seed}", given.requests)
        print(f"{preset}: {given.requests} requests, no page lost or given twice", flush=True)


if __name__ == "__main__":
    soak()
