"""Continuous batching on a GPU, without one: its kernels run in the emulator, and the device "meta" takes the place of
"cuda", which tensors on the CPU cannot be mixed with either."""

from __future__ import annotations

from types import SimpleNamespace

import emulator
import families
import pytest
import torch
from test_cuda_attention import TOLERANCE
from transformers import ContinuousBatchingConfig, GenerationConfig

from hf_kvquant import KVQuantConfig, host, ops, reference, route

try:
    host.continuous_batching()
except ImportError:
    pytest.skip("transformers before 5.23 has other pages", allow_module_level=True)

from test_batching import generate, make_cache, random_prompts

from hf_kvquant import batching
from hf_kvquant.backends import arguments, cuda

META = torch.device("meta")


class Emulated:
    """The backend of `ops`: each result is compared with the reference's."""

    def __init__(self):
        self.device, self.kinds, self.rows = emulator.Device(), set(), []
        launch = self.device.launch

        def noted(kernels, kind, *rest, **touched):
            self.kinds.update((kernel, kind["KVQUANT_PAGE_LENGTH"]) for kernel in kernels)
            launch(kernels, kind, *rest, **touched)

        self.device.launch = noted

    paged_read, takes_prompts = staticmethod(reference.paged_read), staticmethod(reference.takes_prompts)

    def paged_append(self, *given):
        cuda.paged_append(*given, device=self.device)

    def paged_attention(self, query, *states, **settings):
        self.rows.append(len(query))
        got, logsumexp = cuda.paged_attention(query, *states, **settings, device=self.device)
        expected, right = reference.paged_attention(query, *states, **settings)
        tolerance, of_logsumexp = TOLERANCE[query.dtype]
        assert (got - expected).float().abs().max() <= tolerance * expected.float().abs().max()
        torch.testing.assert_close(logsumexp, right, rtol=of_logsumexp, atol=of_logsumexp)
        return got, logsumexp


@pytest.mark.parametrize("preset", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_requests_in_the_managers_batches(family, preset, monkeypatch):
    """Prompts that come in chunks, and decode steps of both requests in one call; mistral's layers have windows."""
    window = {"sliding_window": 600} if family == "mistral" else {}
    model = families.build(family, max_position_embeddings=1024, **window).bfloat16()
    backend = Emulated()
    monkeypatch.setattr(ops, "_implementation", lambda *_: backend)
    results = generate(model, preset, random_prompts(2, [700, 20]), new=4, max_batch_tokens=512)
    assert [len(result.generated_tokens) for result in results.values()] == [4, 4]
    assert {1, 2} >= set(backend.rows) and 2 in backend.rows
    kernels = {"decode_attention_kernel", "merge_splits_kernel", "quantize_append_kernel"}
    assert backend.kinds == {(kernel, 256) for kernel in kernels}


def test_a_manager_on_a_gpu_captures_nothing(monkeypatch):
    """Where graphs can be captured, a padding of batches would choose them."""
    name = "transformers.generation.continuous_batching.initialization.get_accelerator_graph_name"
    monkeypatch.setattr(name, lambda: "cuda")
    model, options = families.build("llama"), ContinuousBatchingConfig(num_blocks=8, q_padding_interval_size=64)
    manager = model.init_continuous_batching(GenerationConfig(cache_implementation="kvquant-int8"), options)
    chosen = manager.continuous_batching_config
    assert chosen.use_cuda_graph == (False, False) and chosen.use_async_batching is False


def test_which_devices_are_served(monkeypatch):
    model, preset = families.build("llama"), KVQuantConfig.preset("int4")
    for served in ("cpu", "cuda:1"):
        monkeypatch.setattr(type(model), "device", torch.device(served))
        batching.refuse_unserved(model, preset, ContinuousBatchingConfig())
    monkeypatch.setattr(type(model), "device", META)
    with pytest.raises(ValueError, match="device: meta is not served .*; expected 'cpu' or 'cuda'"):
        batching.refuse_unserved(model, preset, ContinuousBatchingConfig())


def test_a_head_dim_that_a_gpu_does_not_take_is_refused_before_the_manager_starts(monkeypatch):
    model = families.build("llama", head_dim=96)
    few = KVQuantConfig.from_dict({"keys": {"format": "int8"}, "values": {"format": "int3"}})
    batching.refuse_unserved(model, few, ContinuousBatchingConfig())
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(ops, "choose_backend", lambda *_: "cuda")
    with pytest.raises(ValueError, match="head_dim: 96 is not supported by the CUDA kernels for values of int3"):
        batching.refuse_unserved(model, few, ContinuousBatchingConfig())


class Addresses:
    """The backend of `ops` as far as the arguments of the kernels; the counts of faults are the CPU's."""

    def __init__(self):
        self.calls = []

    def paged_append(self, key, value, keys, values, faults, factors):
        call = arguments.paged_append(key, value, keys, values, faults.to(META), factors=factors)
        self.calls.append(call)

    def paged_attention(self, query, keys, values, s_aux=None, **settings):
        call, *results = arguments.paged_attention(query, keys, values, s_aux, **settings)
        self.calls.append(call)
        return results


@pytest.mark.parametrize("preset", ["int8", "int4"])
@pytest.mark.parametrize("window", [None, 512])
def test_every_tensor_of_a_call_is_on_the_device(window, preset, monkeypatch):
    backend = Addresses()
    monkeypatch.setattr(ops, "_implementation", lambda *_: backend)
    sizes = {} if window is None else {"sliding_window": window}
    config = families.build("llama" if window is None else "mistral", **sizes).config
    kv_config = KVQuantConfig.from_dict(KVQuantConfig.preset(preset).to_dict() | {"sink_length": 4})
    cache = make_cache(kv_config, config, torch.bfloat16, device="meta", page_size=256, num_blocks=64)
    (allocator,) = cache.cache_allocators.values()
    # What they hold cannot be read on "meta".
    allocator.faults = torch.zeros(2, dtype=torch.int64)
    heads, head_dim = allocator.num_key_value_heads, allocator.head_dim

    def step(**news):
        """A forward call with the new tokens of requests, given as (past, n)."""
        for name, (past, n) in news.items():
            assert cache.can_store_request_tokens(SimpleNamespace(request_id=name, current_len=lambda p=past: p), n)
            allocator.get_write_indices(name, past, n)
        ends, totals = torch.tensor([[0, 0], *([n, past + n] for past, n in news.values())]).cumsum(0).T
        tokens = int(ends[-1])
        new = torch.empty(1, heads, tokens, head_dim, dtype=torch.bfloat16, device=META)
        query = torch.empty(1, 2 * heads, tokens, head_dim, dtype=torch.bfloat16, device=META)
        lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": {allocator.layer_type: totals}}
        states = cache.update(new, new, 0, lengths)
        output, _ = batching.attend(
            torch.nn.Identity(), query, *states, None, dense_attention=dense_attention, sliding_window=window
        )
        assert output.device == META and output.shape == (1, tokens, 2 * heads, head_dim)

    def dense_attention(module, query, key, value, mask, **_):
        assert {x.device for x in (query, key, value) if x is not None} == {META}
        assert mask is None or (mask.device == META and mask.shape[-1] == key.shape[2])
        return query.transpose(1, 2), None

    step(a=(0, 700))
    step(b=(0, 20), a=(700, 100))
    step(a=(800, 1), b=(20, 1))
    step(b=(21, 3), c=(0, 5), a=(801, 2))
    assert sum(isinstance(call, arguments.Attention) for call in backend.calls) == 1 + 3
    assert all(call.pages.page_length == 256 for call in backend.calls)
    # A NaN is told in the call after, which waits for the device anyway.
    allocator.faults[0] = 1
    monkeypatch.setattr(route, "_said", set())
    with pytest.warns(UserWarning, match="A NaN or infinity reached the quantized KV cache of a batch"):
        step(a=(803, 1))
    # A step copies the pages once, and what the appends and the queries of its layers see differs in lengths only.
    rows = allocator.batch(torch.tensor([0, 1]), torch.tensor([0, 804])).short[0]
    table, after = rows.before(0), rows.after(0)
    for name in ("pages", "exact", "lengths"):
        has_own = getattr(after.on_device, name) is not getattr(table.on_device, name)
        assert has_own is (name == "lengths")
    # A table that was not brought to the device is refused.
    layer = allocator.layers[0]
    states = layer.states(table._replace(on_device=None))
    query = torch.empty(len(table.lengths), heads, 1, head_dim, dtype=torch.bfloat16, device=META)
    with pytest.raises(ValueError, match="table pages: torch.int64 on cpu is not allowed; .* int64 on meta"):
        arguments.paged_attention(query, *states, None, 1.0, 0.0)
