"""The CUDA backend from Python to the kernels, which the emulator runs: the launches of a user's call.

The kernels' own tests are test_cuda_attention.py and test_cuda_append.py; here the arguments, grids, specialisations,
workspace and refusals are those of `backends/cuda.py`, called as `ops` calls it.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from functools import partial

import emulator
import families
import pytest
import torch
from captured import Recorded
from stored import replaced
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeepseekV3Config, LlamaConfig

import hf_kvquant
from hf_kvquant import KVQuantConfig, QuantizedCache, QuantSpec, calibrate, latent, ops, reference, static
from hf_kvquant.attention import attend
from hf_kvquant.backends import arguments, cuda
from hf_kvquant.backends.specialisation import splits_of
from hf_kvquant.states import QuantizedStates

LIMIT = {torch.float16: 0.002, torch.bfloat16: 0.008, torch.float32: 2**-16}


class Recorder(emulator.Device):
    """An emulated GPU that keeps what it launched."""

    def __init__(self):
        super().__init__()
        self.launches = []

    def launch(self, kernels, kind, *values, **touched):
        self.launches += [(kernel, kind, grid) for kernel, grid in kernels.items()]
        super().launch(kernels, kind, *values, **touched)


@pytest.fixture
def device() -> Recorder:
    return Recorder()


@pytest.fixture
def emulated(monkeypatch, device) -> Recorder:
    """The operators run on the emulator for CPU states with backend "cpu"."""

    class Backend:
        reads_rotary_keys = staticmethod(cuda.reads_rotary_keys)

        @staticmethod
        def decode_attention(*args, **options):
            return cuda.decode_attention(*args, **options, device=device)

        @staticmethod
        def quantize_append(*args, **options):
            return cuda.quantize_append(*args, **options, device=device)

    monkeypatch.setattr(ops, "_implementation", lambda *_: Backend)
    return device


def filled(
    config: str | KVQuantConfig, dtype: torch.dtype, *, kv_len: int, head_dim: int = 64, batch: int = 2, steps: int = 3
):
    """States of a cache that got a prompt and then tokens one by one."""
    model = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=head_dim)
    cache = QuantizedCache(model, config, max_length=kv_len + 40)
    key, value = torch.randn(2, batch, 2, kv_len, head_dim, generator=torch.Generator().manual_seed(3)).to(dtype)
    key[..., 5] += 9
    prompt = kv_len - steps
    cache.update(key[:, :, :prompt], value[:, :, :prompt], 0)
    cache.quantized_layers[0].takes_states = True
    for t in range(prompt, kv_len):
        states = cache.update(key[:, :, t : t + 1], value[:, :, t : t + 1], 0)
    return states


def check(query, keys, values, *args, device, **options):
    """The emulated backend against the reference over the same bytes."""
    options = {"scaling": query.shape[-1] ** -0.5, **options}
    output, logsumexp = cuda.decode_attention(query, keys, values, *args, **options, device=device)
    exact = [dataclasses.replace(s, dtype=torch.float32) for s in (keys, values)]
    expected, expected_logsumexp = reference.decode_attention(query.float(), *exact, *args, **options)
    assert output.dtype == query.dtype
    error = (output.float() - expected).norm() / expected.norm()
    assert error < LIMIT[query.dtype]
    torch.testing.assert_close(logsumexp, expected_logsumexp, rtol=0, atol=0.01)


@pytest.mark.parametrize("preset", [*KVQuantConfig.preset_names(), "channel-values"])
def test_a_cache_on_the_backend(preset, emulated):
    """Prompt, steps and attention through the operators: bytes equal the reference's, attention is close to it."""
    if preset == "channel-values":
        preset = KVQuantConfig(QuantSpec("int8"), QuantSpec("int4", "channel"), sink_length=4)
    keys, values = filled(preset, torch.bfloat16, kv_len=140)
    launched = emulated.launches.copy()
    assert [launch[0] for launch in launched] == ["quantize_append_kernel"] * 4
    query = torch.randn(2, 8, 1, 64).bfloat16()
    check(query, keys, values, device=emulated)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_implementation", lambda *_: reference)
        expected = filled(preset, torch.bfloat16, kv_len=140)
    for ours, theirs in zip((keys, values), expected):
        whole = 140 // (ours.spec.block_length or 1) * (ours.spec.block_length or 1)
        assert torch.equal(ours.data[:, :, :whole], theirs.data[:, :, :whole])
        if ours.recent is not None:
            slots = torch.arange(140 - 64, 140) % ours.recent.shape[2]
            assert torch.equal(ours.recent[:, :, slots], theirs.recent[:, :, slots])
        if ours.sink is not None:
            assert torch.equal(ours.sink, theirs.sink)
            assert torch.equal(ours.sink_positions, theirs.sink_positions)


class Kernels(TorchDispatchMode):
    """Notes the operations of torch that launch kernels on a GPU: all but views and allocations."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if func.namespace == "aten" and not is_view and "empty" not in func.name():
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_a_layer_of_a_captured_step_launches_three_kernels(preset, emulated, monkeypatch):
    """Append, attend, merge; lengths and routes are counted on the way."""
    model = LlamaConfig(num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2, head_dim=64)
    config = dataclasses.replace(KVQuantConfig.preset(preset), static=True)
    cache = QuantizedCache(model, config, max_length=100)
    key, value = torch.randn(2, 1, 2, 71, 64).bfloat16()
    cache.update(key[:, :, :70], value[:, :, :70], 0)
    cache.quantized_layers[0].takes_states = True
    query, mask = torch.randn(1, 8, 1, 64).bfloat16(), torch.zeros(1, 1, 1, 100, dtype=torch.bool)
    mask[..., :71] = True
    emulated.launches.clear()
    monkeypatch.setattr(static, "is_captured", lambda: True)
    with Kernels() as torchs:
        states = cache.update(key[:, :, 70:], value[:, :, 70:], 0)
        module = torch.nn.Module()
        output, _ = attend(module, query, *states, mask, dense_attention=None, scaling=0.125)
    assert [kernel for kernel, _, _ in emulated.launches] == [
        "quantize_append_kernel", "decode_attention_kernel", "merge_splits_kernel",
    ]  # fmt: skip
    assert torchs.seen == []
    monkeypatch.undo()
    assert (cache.get_seq_length(), cache.routes["decode_fused"], cache.routes["prefill_dense"]) == (71, 1, 1)
    exact = [s.known() for s in states]
    expected, _ = reference.decode_attention(query, *exact, scaling=0.125)
    assert (output.transpose(1, 2).float() - expected.float()).norm() < 0.008 * expected.float().norm()


BLOCKS = QuantSpec("int4", "channel", block_length=32)
OF_MODELS = {
    "few-bits": KVQuantConfig(
        QuantSpec("int3", "channel", block_length=32), QuantSpec("int2", rotate=True), sink_length=2, recent_length=8
    ),
    "feedback": KVQuantConfig(BLOCKS, BLOCKS, sink_length=2, recent_length=8),
}


@pytest.fixture
def model_and_config(request, tmp_path):
    """A model in float32, and a config of `OF_MODELS`, with factors of the model if that is its name."""
    model, config = families.build("llama"), OF_MODELS[request.param]
    if request.param == "feedback":
        calibrate(model, families.prompt(length=100)).save(tmp_path / "model.feedback")
        config = dataclasses.replace(config, error_feedback=str(tmp_path / "model.feedback"))
    return model, config


def by_the_reference(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_implementation", lambda *_: reference)
        return run()


def same_blocks(cache: QuantizedCache, expected: QuantizedCache, length: int) -> None:
    """The bytes of the first layer, which do not depend on attention."""
    for ours, theirs in zip(cache.layers[0]._views(), expected.layers[0]._views()):
        rows = length // (ours.spec.block_length or 1)
        assert torch.equal(ours.data[:, :, :length], theirs.data[:, :, :length])
        assert torch.equal(ours.scale[:, :, :rows], theirs.scale[:, :, :rows])


def check_appends(device: Recorder, number: int, config: KVQuantConfig) -> None:
    """The device launched this number of appends, with feedback of both sides if the config has it."""
    kinds = [kind for kernel, kind, _ in device.launches if kernel == "quantize_append_kernel"]
    assert len(kinds) == number
    expected = [] if config.error_feedback is None else ["KVQUANT_K_FEEDBACK", "KVQUANT_V_FEEDBACK"]
    assert all([name for name in kind if "FEEDBACK" in name] == expected for kind in kinds)


@pytest.mark.parametrize("is_static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("model_and_config", OF_MODELS, indirect=True)
def test_a_model_generates(model_and_config, is_static, emulated):
    """A prompt of a block, and single tokens that complete the next one: the reference's tokens and bytes."""
    model, config = model_and_config
    config = dataclasses.replace(config, static=is_static)

    def run():
        options = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        with torch.no_grad():
            out = model.generate(
                families.prompt(length=60), cache_implementation="kvquant", cache_config=config, **options
            )
        return out.sequences, out.past_key_values

    tokens, cache = run()
    check_appends(emulated, 8 * len(cache.layers), config)
    expected_tokens, expected = by_the_reference(run)
    assert torch.equal(tokens, expected_tokens)
    same_blocks(cache, expected, 64)


@pytest.mark.parametrize("model_and_config", OF_MODELS, indirect=True)
def test_a_captured_step_of_a_model(model_and_config, emulated, monkeypatch):
    """A step that completes a block asks nothing of the device, and the next step reads what it stored."""
    model, config = model_and_config

    def run():
        cache = QuantizedCache(model.config, dataclasses.replace(config, static=True), max_length=80)
        with torch.no_grad(), hf_kvquant.attention(model):
            for tokens in families.prompt(length=64).split([62, 1, 1], 1):
                with monkeypatch.context() as patch, Recorded() if tokens.shape[1] == 1 else nullcontext():
                    patch.setattr(static, "is_captured", lambda length=tokens.shape[1]: length == 1)
                    model(tokens, past_key_values=cache)
            return model(families.prompt(length=1), past_key_values=cache).logits, cache

    logits, cache = run()
    assert cache.routes["decode_dequantized"] == 0 and cache.get_seq_length() == 65
    check_appends(emulated, 4 * len(cache.layers), config)
    expected_logits, expected = by_the_reference(run)
    same_blocks(cache, expected, 64)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)


class _UpProjection(torch.nn.Module):
    """The sizes and the weight of DeepSeek V3's latent attention, with fewer channels of its heads."""

    num_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim = 16, 512, 16, 64, 16

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        heads = self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        self.kv_b_proj = torch.nn.Linear(self.kv_lora_rank, heads, bias=False, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("preset", ["int8", "int8-plain", "fp8", "int4"])
def test_latents_of_512_elements(preset, dtype, emulated):
    """A cache of latents and rotary keys, and a step over both, equal the reference's."""
    torch.manual_seed(0)
    module, config = _UpProjection(dtype), KVQuantConfig.preset(preset)
    key, value = torch.randn(1, 1, 100, 512).to(dtype), torch.randn(1, 1, 100, 64).to(dtype)
    query = torch.randn(1, 16, 1, 80).to(dtype)

    def step() -> tuple[torch.Tensor, list[QuantizedStates]]:
        model = DeepseekV3Config(num_hidden_layers=1, kv_lora_rank=512, qk_rope_head_dim=64)
        cache = QuantizedCache(model, config, max_length=140)
        cache.update(key[:, :, :97], value[:, :, :97], 0)
        cache.quantized_layers[0].takes_states = True
        states = cache.update(key[:, :, 97:], value[:, :, 97:], 0)
        assert [x.data.shape[:2] for x in states] == [(1, 1)] * 2
        stored = latent.LatentStates(*states, None, 16, 80)
        with torch.no_grad():
            return latent.attend(module, query, stored, None, None, scaling=0.1), states

    output, ours = step()
    assert [launch[0] for launch in emulated.launches][-2:] == ["decode_attention_kernel", "merge_splits_kernel"]
    _, kind, (_, _, shares) = emulated.launches[-2]
    assert (kind["KVQUANT_R_HEAD_DIM"], shares) == (64, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_implementation", lambda *_: reference)
        expected, theirs = step()
    for a, b in zip(ours, theirs):
        whole = 100 // (a.spec.block_length or 1) * (a.spec.block_length or 1)
        assert torch.equal(a.data[:, :, :whole], b.data[:, :, :whole])
    assert (output.float() - expected.float()).norm() < 2 * LIMIT[dtype] * expected.float().norm()


@pytest.mark.parametrize(("q_len", "q_per_kv"), [(1, 1), (1, 4), (5, 3), (16, 4), (32, 1)])
def test_row_tiles_cover_every_query(q_len, q_per_kv, device):
    keys, values = filled("int8-plain", torch.float16, kv_len=90, batch=1)
    query = torch.randn(1, 2 * q_per_kv, q_len, 64).half()
    check(query, keys, values, device=device)
    (_, _, grid), (_, _, merge) = device.launches
    assert grid == (1, 2 * -(-q_len * q_per_kv // 16), 1)
    assert merge == (q_len, 2 * q_per_kv, 1)


@pytest.mark.parametrize("kv_len", [255, 256, 257, 1100])
def test_splits_cover_every_column(kv_len, device):
    keys, values = filled("int8-plain", torch.float16, kv_len=kv_len, batch=1)
    check(torch.randn(1, 2, 1, 64).half(), keys, values, device=device)
    assert device.launches[0][2] == (-(-kv_len // 256), 2, 1)


def test_a_length_on_the_device_replaces_the_hosts(device):
    keys, values = filled("int4", torch.bfloat16, kv_len=150)
    length = torch.tensor(133)
    limited = [dataclasses.replace(s, device_length=length, length=180) for s in (keys, values)]
    query = torch.randn(2, 4, 1, 64).bfloat16()
    check(query, *limited, device=device)
    assert device.launches[0][2][0] == 3 + 1


def test_masks_softcap_and_learned_sinks(device):
    keys, values = filled("fp8", torch.bfloat16, kv_len=100)
    query = torch.randn(2, 4, 3, 64).bfloat16()
    padding = torch.arange(100) >= torch.tensor([0, 40])[:, None]
    check(query, keys, values, padding, torch.linspace(-1, 3, 4), softcap=15.0, device=device)
    additive = torch.randn(1, 4, 3, 100).masked_fill(torch.rand(1, 4, 3, 100) < 0.3, torch.finfo(torch.float32).min)
    check(query, keys, values, additive, device=device)


def test_one_specialisation_serves_all_shapes(device):
    for kv_len, batch, heads in ((70, 1, 2), (99, 3, 8)):
        keys, values = filled("int8", torch.bfloat16, kv_len=kv_len, batch=batch)
        cuda.decode_attention(torch.randn(batch, heads, 1, 64).bfloat16(), keys, values, scaling=0.1, device=device)
    assert len({launch[1] for launch in device.launches}) == 1


def test_new_tokens_that_are_not_aligned_are_copied(device):
    """Slices of a fused projection may be unaligned; the kernel reads eight channels at once."""
    keys, values = filled("fp8", torch.bfloat16, kv_len=70, batch=1)
    whole = torch.randn(1, 2, 4, 3 * 64 + 1).bfloat16()
    key, value = whole[..., 1:65], whole[..., 65:129]
    faults = torch.zeros(2, dtype=torch.int64)
    cuda.quantize_append(key, value, keys, values, faults, start=70, device=device)
    expected = [replaced(s, data=s.data.clone(), scale=s.scale.clone()) for s in (keys, values)]
    reference.quantize_append(key, value, *expected, faults, start=70)
    for ours, theirs in zip((keys, values), expected):
        assert torch.equal(ours.data[:, :, :74], theirs.data[:, :, :74])


class TestRefusals:
    def test_storage_that_is_not_aligned(self, device):
        keys, values = filled("int8-plain", torch.bfloat16, kv_len=70, batch=1)
        memory = torch.empty(keys.data.numel() + 1, dtype=torch.uint8)[1:]
        moved = replaced(values, data=memory.view_as(values.data))
        with pytest.raises(
            ValueError, match=r"values data: address \d+ is not allowed; expected a multiple of 16 bytes"
        ):
            cuda.decode_attention(torch.randn(1, 2, 1, 64).bfloat16(), keys, moved, scaling=1.0, device=device)
        x = torch.randn(1, 2, 1, 64).bfloat16()
        with pytest.raises(ValueError, match="values data: address"):
            cuda.quantize_append(x, x, keys, moved, torch.zeros(2, dtype=torch.int64), start=70, device=device)
        assert not device.launches

    def test_strides_that_are_not_aligned(self, device):
        keys, values = filled("int4", torch.bfloat16, kv_len=70, batch=1)
        scale = torch.zeros(1, 2, keys.scale.shape[2] * 64 + 1, dtype=torch.float16)[..., :-1]
        scale = scale.unflatten(2, (-1, 64))
        with pytest.raises(
            ValueError, match=r"keys scale: stride \d+ is not allowed; expected a multiple of 16 bytes"
        ):
            cuda.decode_attention(
                torch.randn(1, 2, 1, 64).bfloat16(), replaced(keys, scale=scale, zero_point=scale), values,
                scaling=1.0, device=device,
            )  # fmt: skip

    def test_float64(self, device):
        keys, values = filled("fp8", torch.float64, kv_len=70, batch=1)
        with pytest.raises(ValueError, match=r"dtype: torch\.float64 is not supported; expected one of"):
            cuda.decode_attention(torch.randn(1, 2, 1, 64).double(), keys, values, scaling=1.0, device=device)

    @pytest.mark.parametrize("lacking", ["recent", "sink"])
    @pytest.mark.parametrize("side", ["keys", "values"])
    def test_copies_that_the_other_side_has(self, device, side, lacking):
        config = KVQuantConfig.preset("int4")
        states = dict(zip(("keys", "values"), filled(config, torch.bfloat16, kv_len=70, batch=1)))
        query, settings = torch.randn(1, 2, 1, 64).bfloat16(), dict(scaling=1.0, device=device)
        bare = states | {side: replaced(states[side], **{lacking: None})}
        if (side, lacking) == ("values", "recent"):  # the open block of keys reaches farther than values' copies
            cuda.decode_attention(query, **bare, **settings)
            config = dataclasses.replace(config, values=QuantSpec("int8", "channel"))
            states = dict(zip(("keys", "values"), filled(config, torch.bfloat16, kv_len=70, batch=1)))
            bare = states | {side: replaced(states[side], recent=None)}
        with pytest.raises(ValueError, match=f"{side} {lacking}: None is not allowed; expected copies of tokens"):
            cuda.decode_attention(query, **bare, **settings)

    def test_states_elsewhere_than_on_a_gpu(self):
        keys, values = filled("fp8", torch.bfloat16, kv_len=70, batch=1)
        with pytest.raises(ValueError, match="states on cpu are not allowed"):
            cuda.decode_attention(torch.randn(1, 2, 1, 64).bfloat16(), keys, values, scaling=1.0)


@pytest.mark.parametrize(
    ("operator", "what", "said"),
    [
        ("decode_attention", "keys", "keys: the stored tensors do not fit: .*, all on the device of query"),
        ("decode_attention", "values", "values: the stored tensors do not fit: .*, all on the device of query"),
        ("decode_attention", "mask", "mask: .* does not fit"),
        ("decode_attention", "s_aux", "s_aux: .* does not fit"),
        ("decode_attention", "rotary_query", "rotary_query: .* does not fit"),
        ("decode_attention", "rotary_keys", "rotary keys: the stored tensors do not fit"),
        ("quantize_append", "keys", "key: device cpu does not fit"),
        ("quantize_append", "values", "value: device cpu does not fit"),
        ("quantize_append", "value", "value: device cpu does not fit"),
        ("quantize_append", "faults", "faults: .* does not fit"),
        ("quantize_append", "padding", "padding: .* does not fit"),
    ],
)
def test_a_tensor_on_another_gpu_is_refused(monkeypatch, operator, what, said):
    """Its address would end the process. Here every tensor but one, or those of a side, says that it is on the first
    GPU."""
    # Not the states that the cache has used: that theirs fit a device is known.
    made = filled("fp8", torch.bfloat16, kv_len=70, batch=1)
    keys, values = (replaced(states) for states in made)
    rotary_keys = replaced(keys, **{name: x.clone() for name, x in keys.stored._asdict().items() if x is not None})
    x, y = torch.randn(2, 1, 2, 1, 64).bfloat16()
    arguments = {
        "decode_attention": {
            "query": x, "keys": keys, "values": values, "mask": torch.ones(1, 70, dtype=torch.bool),
            "s_aux": torch.zeros(2), "rotary": (y, rotary_keys), "scaling": 1.0,
        },
        "quantize_append": {
            "key": x, "value": y, "keys": keys, "values": values, "start": 70,
            "faults": torch.zeros(2, dtype=torch.int64), "padding": torch.zeros(1, 71, dtype=torch.bool),
        },
    }[operator]  # fmt: skip
    moved = {"rotary_query": y, "rotary_keys": rotary_keys, **arguments}[what]
    tensors = [moved] if isinstance(moved, torch.Tensor) else [x for x in moved.stored if x is not None]
    elsewhere = set(map(id, tensors))
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: int(id(tensor) in elsewhere))
    with pytest.raises(ValueError, match=said):
        getattr(cuda, operator)(**arguments)


def test_splits_of_another_length_are_other_kernels(device):
    """What was found out about the states before, in splits of the usual length, must not be used again."""
    keys, values = filled("int8-plain", torch.float16, kv_len=1100, batch=1)
    attend = partial(check, torch.randn(1, 2, 1, 64).half(), keys, values, device=device)
    attend()
    with splits_of(512):
        attend()
    attend()
    lengths = [(kind["KVQUANT_UNIT"], grid[0]) for kernel, kind, grid in device.launches if kernel.startswith("dec")]
    assert lengths == [(256, 5), (512, 3), (256, 5)]


def test_places_of_a_side_are_those_of_the_struct():
    """`_STORED` counts words; the struct is the definition."""
    fields = [name for name, _ in arguments.Side._fields_]
    for places in (cuda._STORED, cuda._SCALES):
        for tensor, (address, batch, head) in places.items():
            strides = "scale" if tensor == "zero_point" else tensor
            assert [fields[i] for i in (address, batch, head)] == [tensor, f"{strides}_batch", f"{strides}_head"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    assert cuda.unavailable() in ("torch is built without CUDA", "torch sees no GPU")
    assert "CUDA" in ops.backend_status("cuda") or "GPU" in ops.backend_status("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnAGpu:
    """Streams, graphs and threads, which the emulator does not have; eval/gpu_suite.py checks every specialisation."""

    @staticmethod
    def moved(preset: str, kv_len: int, dtype: torch.dtype = torch.bfloat16):
        states = filled(preset, dtype, kv_len=kv_len)
        return [dataclasses.replace(s.to("cuda"), backend="cuda") for s in states]

    @pytest.mark.parametrize("preset", KVQuantConfig.preset_names())
    def test_attention(self, preset):
        keys, values = self.moved(preset, 600)
        check(torch.randn(2, 8, 2, 64).bfloat16().cuda(), keys, values, device=None)

    @pytest.mark.parametrize("preset", KVQuantConfig.preset_names())
    def test_attention_in_float32(self, preset):
        keys, values = self.moved(preset, 600, torch.float32)
        check(torch.randn(2, 8, 2, 64).cuda(), keys, values, device=None)

    def test_a_captured_call_reads_what_its_tensors_hold_then(self):
        keys, values = self.moved("int8", 300)
        query = torch.randn(2, 8, 1, 64).bfloat16().cuda()
        call = lambda: ops.decode_attention(query, keys, values, scaling=0.1)[0]  # noqa: E731
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        query.mul_(-0.5)
        graph.replay()
        assert torch.equal(captured, call())
