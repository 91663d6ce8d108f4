"""Pages of waiting requests in the main memory: requests leave, come back with the same bytes, and go on as if alone.

No pinned memory is needed: the pool is ordinary memory here, and the model is on the CPU.
"""

import dataclasses
from types import SimpleNamespace

import families
import pytest
import torch
from transformers import ContinuousBatchingConfig

from hf_kvquant import KVQuantConfig, host

try:
    host.continuous_batching()
except ImportError:
    pytest.skip("transformers before 5.23 has other pages", allow_module_level=True)

from test_batching import (  # noqa: F401 (a fixture)
    PRESETS,
    check_all_alone,
    check_all_free,
    generate,
    log,
    make_cache,
    random_prompts,
)
from test_batching_sliding import Request, build, page_size
from transformers.generation.continuous_batching import offloading_manager

from hf_kvquant import batching, waiting


class Moves:
    """The managers of a test, the bytes of every request's blocks in the main memory, and which came back."""

    def __init__(self):
        self.managers, self.bytes, self.restored = [], {}, {}

    @property
    def total(self):
        return {key: sum(manager.moved[key] for manager in self.managers) for key in ("left", "returned")}


@pytest.fixture
def moves(monkeypatch):
    """Lets a model on the CPU have a pool, and watches it."""
    moves = Moves()
    init, leave, restore = (
        waiting.OffloadingManager.__init__,
        waiting._Tables.leave,
        waiting.OffloadingManager.restore_scheduled_requests,
    )

    def empty(*sizes, pin_memory=False, **options):
        return torch.empty(*sizes, **options)

    def refuse(model, config, options, check=batching.refuse_unserved):
        check(model, config, dataclasses.replace(options, cpu_offload_space=0.0))

    def noted_init(self, *args, **kwargs):
        moves.managers.append(self)
        init(self, *args, **kwargs)

    def noted_leave(self, request_id):
        leave(self, request_id)
        ids = moves.managers[-1]._request_id_to_cpu_blocks[request_id]
        kind = self._allocator.layer_type
        copied = moves.managers[-1]._cpu_views[kind][ids[kind]].clone()
        moves.bytes[request_id, kind] = dict(zip(self.away[request_id], copied)), copied[len(self.away[request_id]) :]

    def noted_restore(self, requests):
        back = [future.state.request_id for future in requests if future.state.is_cpu_offloaded]
        restore(self, requests)
        for request_id in back:
            for kind, allocator in self.cache._cache.cache_allocators.items():
                pages, exact = moves.bytes.pop((request_id, kind))
                for number, block in allocator.numbered_pages(request_id).items():
                    if number in pages:
                        assert torch.equal(allocator._copy_view[block], pages[number])
                        moves.restored[request_id, kind] = number
                for block, copied in zip(allocator.exact_table.get(request_id, []), exact, strict=True):
                    assert torch.equal(allocator._copy_view[block], copied)

    fake = SimpleNamespace(**{name: getattr(torch, name) for name in dir(torch)} | {"empty": empty})
    monkeypatch.setattr(offloading_manager, "torch", fake)
    monkeypatch.setattr(batching, "refuse_unserved", refuse)
    monkeypatch.setattr(waiting.OffloadingManager, "__init__", noted_init)
    monkeypatch.setattr(waiting._Tables, "leave", noted_leave)
    monkeypatch.setattr(waiting.OffloadingManager, "restore_scheduled_requests", noted_restore)
    return moves


def check_moved(moves, log):  # noqa: F811
    """Requests left and came back, none began anew, and the pool is empty again."""
    assert moves.total["left"] == moves.total["returned"] > 0 and moves.restored and not moves.bytes
    assert all(past for chunks in log.chunks.values() for past, _ in chunks[1:])
    (manager,) = moves.managers
    assert not manager._request_id_to_cpu_blocks and not any(tables.away for tables in manager._tables())
    manager._cpu_pool.try_to_free_sectors()
    assert len(manager._cpu_pool.free_sectors) == manager._num_cpu_sectors
    check_all_free(log.caches[-1])


def fit(cache, lengths):
    """Whether prompts of these lengths fit; if so, they have their blocks."""
    return all(cache.can_store_request_tokens(Request(str(i)), n) for i, n in enumerate(lengths))


def take_the_rest(cache, lengths):
    """Leave room for prompts of these lengths only; returns a function that gives the rest back."""
    assert fit(cache, lengths)
    pool, indices = cache.pool, [allocator.index for allocator in cache.cache_allocators.values()]
    sectors, pool.free_sectors = pool.free_sectors, []
    blocks = [pool.get_free_blocks(index, pool.count_free_blocks(index)) for index in indices]
    for i in range(len(lengths)):
        cache.free_blocks(str(i))

    def give_back():
        pool.free_sectors += sectors
        for index, taken in zip(indices, blocks):
            pool.free_blocks(index, taken)

    return give_back


def run(model, config, log, moves, monkeypatch):  # noqa: F811
    """Answer prompts that all begin a new page soon; in float64, so that every number is compared."""
    model, size, window = model.double(), page_size(model, config), model.config.sliding_window or 0
    # A window has left a page or more.
    pages = 2 + window // size if window else 1
    lengths = [pages * size - n for n in (4, 6, 8)]
    prompts, make = random_prompts(6, lengths), batching.paged_cache
    enough = next(
        n
        for n in range(1, 99)
        if fit(make_cache(config, model.config, model.dtype, num_blocks=n, page_size=size), lengths)
    )

    def scarce(*args, **kwargs):
        cache = make(*args, **kwargs)
        moves.give_back = take_the_rest(cache, lengths)
        return cache

    monkeypatch.setattr(batching, "paged_cache", scarce)
    results = generate(
        model, config, prompts, new=14, num_blocks=enough, page_size=size, max_batch_tokens=sum(lengths),
        cpu_offload_space=0.25,
    )  # fmt: skip
    moves.give_back()
    check_all_alone(model, config, prompts, results, log)
    check_moved(moves, log)
    assert {kind for _, kind in moves.restored} == {*log.caches[-1].cache_allocators}


@pytest.mark.parametrize("preset", PRESETS)
def test_requests_leave_and_come_back(log, moves, preset, monkeypatch):  # noqa: F811
    model = families.build("llama", max_position_embeddings=2048)
    model.config.sliding_window = None
    run(model, KVQuantConfig.preset(preset), log, moves, monkeypatch)


@pytest.mark.parametrize("preset", ["int8", "int4", "int4-small"])
@pytest.mark.parametrize("name", ["mistral 100", "qwen2 130", "gemma3 24"])
def test_requests_with_windows_leave_and_come_back(log, moves, name, preset, monkeypatch):  # noqa: F811
    """Prompts longer than the window, which has left pages behind before the request leaves."""
    run(build(name), dataclasses.replace(KVQuantConfig.preset(preset), sliding=8), log, moves, monkeypatch)
    assert all(number for (_, kind), number in moves.restored.items() if kind == "sliding_attention")


def test_a_page_that_the_window_has_left_comes_back_nowhere():
    """The pages of the table when a request left, and those that it has when it comes back, need not be the same."""
    model = build("mistral 100")
    config = dataclasses.replace(KVQuantConfig.preset("int8-plain"), sliding=8)
    cache = make_cache(config, model.config, torch.float32, page_size=64, num_blocks=40)
    (allocator,) = cache.cache_allocators.values()
    tables = waiting._Tables(allocator)
    # A chunk of 31 tokens is short: the pages that its first token sees are still there.
    request = Request("one")
    for n in (130, 31):
        assert cache.can_store_request_tokens(request, n)
        request.tokens += n
    left = tables.get("one", [])
    assert len(left) == 3 and allocator.numbers["one"] == [0, 1, 2]
    tables.leave("one")
    cache.free_blocks("one", no_cache=True)
    request.tokens = 230
    assert cache.can_store_request_tokens(request, 40)
    unused, pages = allocator.trash_block, allocator.numbered_pages("one")
    assert [*pages] == [2, 3, 4] and unused not in pages.values()
    assert tables.get("one", []) == [unused, unused, pages[2]]


def test_a_request_that_is_cancelled_while_it_waits_leaves_nothing(moves):
    manager = waiting.OffloadingManager.__new__(waiting.OffloadingManager)
    config = KVQuantConfig.preset("int8")
    cache = make_cache(config, families.build("llama").config, torch.float32, page_size=256, num_blocks=16)
    scheduler = SimpleNamespace(waiting_requests={}, starved_requests=[])
    alone = SimpleNamespace(tp_all_reduce_min=lambda x, on_cpu: x)
    manager.__init__(
        cache, scheduler=scheduler, cpu_offload_space_gib=0.1, safety_threshold=0.5, compute_stream=None,
        distributed_helper=alone,
    )  # fmt: skip
    request = Request("one")
    request.is_cpu_offloaded = False
    assert cache.can_store_request_tokens(request, 300)
    tables = {kind: each.block_table.get("one", [])[:] for kind, each in manager.cache.cache_allocators.items()}
    assert manager._offload_to_cpu([request], {"one": tables}) == {"one"} and request.is_cpu_offloaded
    assert all(table.away == {"one": [0, 1]} for table in manager._tables())
    manager.free_request_cpu_cache(request)
    assert not any(table.away for table in manager._tables()) and not manager._request_id_to_cpu_blocks


def test_a_pool_is_for_a_gpu(monkeypatch):
    model, config = families.build("llama"), KVQuantConfig.preset("int4")
    refuse = batching.refuse_unserved
    for space in (0.5, None):
        with pytest.raises(ValueError, match=f"cpu_offload_space: {space} is not served .*; expected 0 on a CPU"):
            refuse(model, config, ContinuousBatchingConfig(cpu_offload_space=space))
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    for space in (0.0, 0.5, None):
        refuse(model, config, ContinuousBatchingConfig(cpu_offload_space=space))
    for name, why in (("use_async_batching", "waits for the one before it"), ("use_cuda_graph", "captured in")):
        with pytest.raises(ValueError, match=f"{name}: True is not served .*; expected False, because .*{why}"):
            refuse(model, config, ContinuousBatchingConfig(**{name: True}))


def test_dense_pages_keep_the_managers_own():
    made = waiting.offloading_manager(
        make_cache(None, families.build("llama").config, torch.float32, page_size=256, num_blocks=16),
        scheduler=None, cpu_offload_space_gib=0.0, safety_threshold=0.5, compute_stream=None,
        distributed_helper=SimpleNamespace(tp_all_reduce_min=lambda x, on_cpu: x),
    )  # fmt: skip
    assert type(made) is offloading_manager.OffloadingManager
