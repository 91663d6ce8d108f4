"""The contract that transformers' maintainers hold every cache to, for each kind of family and preset.

Each behaviour of `generate` is held against two references:

- the same call with the dense cache: the result has the same type, keys, shapes and dtypes, or both calls fail alike;
- a plain loop: every forward call of the generation is recorded (its tokens, mask and positions, and how long the
  cache was) and done again, with a cache of its own, by calling the model inside `hf_kvquant.attention(model)`. The
  logits have to be the same. So generation does to the cache just what these chunks of tokens do to it.

Beam search moves rows between calls, which a plain loop does not: there each returned text is decoded again as a row
of its own, and its score must be the sum of the log-probabilities.
"""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import families
import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache
from transformers.generation.streamers import BaseStreamer
from whole import WHOLE

import hf_kvquant
from hf_kvquant import QuantizedCache
from hf_kvquant.host import CACHE
from hf_kvquant.measure.families import PRESETS

# One of each kind: grouped queries with biases, a hybrid with sliding layers, softcap, no grouping, learned sinks,
# experts, linear and full attention in one layer, and layer by layer, an encoder-decoder model, one whose attention
# changes the cached states, one with cross-attention layers in its decoder, one that drops its cache on the way, and
# one with attention code of its own.
NAMES = (
    "qwen2", "gemma3", "gemma2", "gpt2", "gpt_oss", "mixtral", "falcon_h1", "jamba", "bart", "deepseek_v3", "mllama",
    "longrope", "bloom", *families.SLIDING,
)  # fmt: skip
LINEAR = ("falcon_h1", "jamba", "zaya_window")
# The dense cache of Mllama cannot roll back: it takes tokens of the image, too (see test_columns).
ROLLS_BACK = tuple(name for name in NAMES if name != "mllama")
# The prompt ends, and generation crosses, the border of a block of 64.
PROMPT, STEPS = 60, 6
# The root-mean-square distance of logits from those of the dense cache, as a share of the logits' own spread.
TOLERANCE = {"int8": 0.03, "int8-plain": 0.03, "fp8": 0.2, "int4": 0.3, "int4-small": 0.45}
ROUNDING = 1e-4
# The change of the logits if a code rounds the other way, because the products of a batch sum in another order.
ONE_CODE = {"int8": 0.02, "int8-plain": 0.02, "fp8": 0.05, "int4": 0.05, "int4-small": 0.05}
OLDEST = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18)

pytestmark = pytest.mark.usefixtures("narrow_windows")
every_family = pytest.mark.parametrize("name", NAMES)
every_preset = pytest.mark.parametrize("preset", PRESETS)
_tests = itertools.count()


def every_family_with_two_presets(names: tuple[str, ...] = NAMES) -> pytest.MarkDecorator:
    """The presets move on from family to family and from test to test: in each test is every preset, and each family
    meets each preset in some tests, besides those of both products at the top. The oldest transformers gets one preset
    for each family."""
    first, count = next(_tests), len(PRESETS) if WHOLE else 1 if OLDEST else 2
    pairs = [(name, PRESETS[(first + i + 2 * n) % len(PRESETS)]) for i, name in enumerate(names) for n in range(count)]
    return pytest.mark.parametrize(("name", "preset"), pairs)


@pytest.fixture(autouse=True)
def quiet():
    """Ignore the warning that a model reads de-quantized states; other tests expect it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass
class Call:
    """One forward call of a generation: its arguments, the length of the cache, its logits, and the number of its
    tokens."""

    given: dict
    past: int
    logits: torch.Tensor
    fed: int = 0


def base(name: str) -> str:
    """The attention that a family is tested with: transformers' sdpa leaves out Gemma 2's softcap and has no sinks."""
    return "eager" if name in ("gemma2", "gpt_oss", "bloom") else "sdpa"


class Host:
    """A tiny model, and what differs between decoders and encoder-decoder models, whose prompt is the decoder's."""

    def __init__(self, name: str, seed: int = 0, **options):
        self.model = families.build(name, attn=base(name), seed=seed, **families.small(name), **options)
        self.num_full = families.ALL[name].num_full
        self.fused = families.ALL[name].fused
        self.is_encoder_decoder = self.model.config.is_encoder_decoder
        self.sees_images = name == "mllama"

    def inputs(self, batch: int = 1, length: int = PROMPT, seed: int = 1) -> dict:
        return self.of_ids(families.prompt(batch, length, seed))

    def of_ids(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> dict:
        """The arguments of `generate` for a prompt `[batch, length]`."""
        prefix = ""
        given = {}
        if self.is_encoder_decoder:
            prefix = "decoder_"
            given = {"input_ids": families.prompt(1, 20, seed=3).expand(ids.shape[0], -1)}
            ids = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, 1:]], 1)
        given[f"{prefix}input_ids"] = ids
        if mask is not None:
            given[f"{prefix}attention_mask"] = mask
        if self.sees_images:
            given |= families.image(*ids.shape)
        return given

    def image_for(self, cache, ids: torch.Tensor) -> dict:
        """The arguments about the image for a plain call: the mask of all tokens and, in the first call, the image."""
        if not self.sees_images:
            return {}
        past = int(cache.get_seq_length())
        image = families.image(ids.shape[0], past + ids.shape[1])
        return self.without_image(image) if past else image

    def without_image(self, inputs: dict) -> dict:
        """The arguments for tokens that follow those of a cache, which has seen the image."""
        image = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        return {name: value for name, value in inputs.items() if name not in image}

    def prompt(self, inputs: dict) -> torch.Tensor:
        return inputs["decoder_input_ids" if self.is_encoder_decoder else "input_ids"]

    def generate(self, inputs: dict, **kwargs):
        options = {"do_sample": False, "max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True}
        with torch.no_grad():
            return self.model.generate(**(inputs | options | kwargs))

    def cache(self, preset: str, **kwargs) -> QuantizedCache | EncoderDecoderCache:
        cache = QuantizedCache(self.model.config, preset, **kwargs)
        if self.is_encoder_decoder:
            return EncoderDecoderCache(cache, DynamicCache(config=self.model.config))
        return cache

    @contextmanager
    def recorded(self) -> Iterator[list[Call]]:
        calls: list[Call] = []

        def before(module, args, kwargs):
            assert not args
            # A model that computes all tokens again has dropped the cache.
            cache = kwargs.get(CACHE)
            given = {k: v for k, v in kwargs.items() if k != CACHE}
            # Until transformers 5.17 a sliding layer's length is a tensor, which later calls change.
            calls.append(Call(given, 0 if cache is None else int(cache.get_seq_length()), torch.empty(0)))

        def after(module, args, kwargs, output):
            calls[-1].logits = output.logits
            calls[-1].fed = int(kwargs[CACHE].get_seq_length()) - calls[-1].past

        hooks = [
            self.model.register_forward_pre_hook(before, with_kwargs=True),
            self.model.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            yield calls
        finally:
            for hook in hooks:
                hook.remove()

    def assert_replayed(self, calls: list[Call], cache) -> None:
        """A plain loop over the recorded chunks gives the recorded logits."""
        rolls_back = any(later.past < call.past + call.fed for call, later in itertools.pairwise(calls))
        if rolls_back:
            cache.activate_past_recording()
        with torch.no_grad(), hf_kvquant.attention(self.model):
            for call in calls:
                if rolls_back and cache.get_seq_length():
                    cache.crop(call.past - int(cache.get_seq_length()))
                assert cache.get_seq_length() == call.past
                logits = self.model(**call.given, **{CACHE: cache}).logits
                torch.testing.assert_close(logits, call.logits, rtol=0, atol=ROUNDING)

    def decode(self, cache, ids: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, n, vocab]` of tokens fed one by one."""
        given = {}
        if self.is_encoder_decoder:
            source = families.prompt(1, 20, seed=3).expand(ids.shape[0], -1)
            given = {"encoder_outputs": self.model.get_encoder()(source)}
        name = "decoder_input_ids" if self.is_encoder_decoder else "input_ids"
        with torch.no_grad(), hf_kvquant.attention(self.model):
            logits = []
            for i in range(ids.shape[1]):
                new = {name: ids[:, i : i + 1]}
                new |= self.image_for(cache, new[name])
                logits.append(self.model(**given, **new, **{CACHE: cache}, use_cache=True).logits)
        return torch.cat(logits, 1)

    def prefill(self, cache, ids: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, vocab]` after a prompt fed at once."""
        inputs = self.of_ids(ids)
        if cache.get_seq_length():
            inputs = self.without_image(inputs) | self.image_for(cache, ids)
        with torch.no_grad(), hf_kvquant.attention(self.model):
            return self.model(**inputs, **{CACHE: cache}, use_cache=True).logits[:, -1]


@functools.lru_cache(maxsize=None)
def host(name: str, seed: int = 0) -> Host:
    return Host(name, seed)


def own(cache) -> QuantizedCache:
    """The self-attention cache, which has to be ours."""
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    assert type(cache) is QuantizedCache
    return cache


def form(result) -> object:
    """Types, keys, shapes and dtypes of a result, without the cache and without values."""
    if isinstance(result, torch.Tensor):
        return tuple(result.shape), result.dtype
    if isinstance(result, dict):
        return type(result), {k: form(v) for k, v in result.items() if k != CACHE}
    if isinstance(result, (tuple, list)):
        return type(result), [form(v) for v in result]
    return type(result)


def distance(logits: torch.Tensor, dense: torch.Tensor) -> float:
    return float((logits - dense).pow(2).mean().sqrt() / dense.std())


_dense: dict[tuple, object] = {}


def dense(name: str, inputs: dict, key: object = None, **kwargs):
    """The result with the dense cache, or the error; found once for all presets (`key` tells other calls apart)."""
    given = tuple((k, tuple(v.shape), float(v.double().sum())) for k, v in inputs.items())
    known = (
        name,
        given,
        key,
        tuple(sorted((k, str(v)) for k, v in kwargs.items() if isinstance(v, (int, float, str)))),
    )
    if known not in _dense:
        torch.manual_seed(0)
        try:
            _dense[known] = host(name).generate(inputs, **kwargs)
        except Exception as error:
            _dense[known] = error
    return _dense[known]


def held(name: str, preset: str, inputs: dict, key: object = None, **kwargs):
    """Generate with the preset and hold the result to both references; None where the dense cache fails too.

    Returns the result and the recorded calls.
    """
    subject = host(name)
    choice = {"cache_implementation": f"kvquant-{preset}"}
    expected = dense(name, inputs, key, **kwargs)
    if isinstance(expected, Exception):
        with pytest.raises(type(expected)):
            subject.generate(inputs, **choice, **kwargs)
        return None
    torch.manual_seed(0)
    with subject.recorded() as calls:
        out = subject.generate(inputs, **choice, **kwargs)
    assert form(out) == form(expected)
    subject.assert_replayed(calls, subject.cache(preset))
    routes = own(out[CACHE]).routes
    assert routes["decode_fused" if subject.fused else "decode_dequantized"] > 0
    assert routes["decode_dequantized" if subject.fused else "decode_fused"] == 0
    return out, calls


# --- decoding, one row at a time


@every_family
@every_preset
def test_greedy(name, preset):
    flags = {"output_scores": True, "output_hidden_states": True}
    out, calls = held(name, preset, host(name).inputs(2), **flags)
    assert len(calls) == STEPS
    assert torch.equal(out.sequences[:, -STEPS:], torch.stack(out.logits, 1).argmax(-1))


@every_family
@every_preset
def test_logits_are_the_dense_caches_within_the_tolerance(name, preset):
    """The dense reference holds without a cache, too: a dense cache changes nothing."""
    subject = host(name)
    inputs, said = subject.inputs(2), families.prompt(2, STEPS, seed=8)
    with_cache = torch.stack(dense(name, inputs, "said", logits_processor=[families.Say(said)]).logits)
    without = torch.stack(dense(name, inputs, "said", logits_processor=[families.Say(said)], use_cache=False).logits)
    assert distance(without, with_cache) <= 1e-4
    out = subject.generate(inputs, logits_processor=[families.Say(said)], cache_implementation=f"kvquant-{preset}")
    logits = torch.stack(out.logits)
    torch.testing.assert_close(logits[0], with_cache[0], rtol=0, atol=ROUNDING)
    assert 0 < distance(logits[1:], with_cache[1:]) <= TOLERANCE[preset]


@every_family_with_two_presets()
def test_sampling_and_num_return_sequences(name, preset):
    out, calls = held(name, preset, host(name).inputs(2), do_sample=True, num_return_sequences=2)
    assert out.sequences.shape == (4, PROMPT + STEPS)
    assert len({tuple(row.tolist()) for row in out.sequences}) > 2
    assert len(calls) == STEPS


@every_family_with_two_presets()
def test_custom_generate(name, preset):
    """A user's own loop, like the recipes on the hub, finds the cache among its arguments."""
    seen = []

    def last_but_one(model, input_ids, *, generation_config, **kwargs):
        cache = kwargs.pop(CACHE)
        """Says the second best token."""
        seen.append(type(cache))
        kwargs = {k: kwargs[k] for k in ("encoder_outputs",) if kwargs.get(k) is not None}
        name, new, logits = "decoder_input_ids" if kwargs else "input_ids", input_ids, []
        for _ in range(generation_config.max_length - input_ids.shape[1]):
            out = model(**{name: new, CACHE: cache}, use_cache=True, **kwargs)
            logits.append(out.logits[:, -1])
            new = out.logits[:, -1].topk(2).indices[:, 1:]
            input_ids = torch.cat([input_ids, new], 1)
        return {"sequences": input_ids, "logits": tuple(logits), CACHE: cache}

    _, calls = held(name, preset, host(name).inputs(), last_but_one.__name__, custom_generate=last_but_one)
    assert seen[-1] is (EncoderDecoderCache if host(name).is_encoder_decoder else QuantizedCache)
    assert len(calls) == STEPS


@every_family_with_two_presets()
def test_streaming(name, preset):
    class Kept(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], 0

        def put(self, value):
            self.tokens.extend(value.flatten().tolist())

        def end(self):
            self.ended += 1

    subject, streamer = host(name), Kept()
    out = subject.generate(subject.inputs(), cache_implementation=f"kvquant-{preset}", streamer=streamer)
    assert streamer.tokens == out.sequences[0].tolist()
    assert streamer.ended == 1


@every_family_with_two_presets()
def test_inputs_embeds(name, preset):
    subject = host(name)
    if subject.is_encoder_decoder:
        pytest.skip("the decoder's prompt has no embeddings as input")
    ids = subject.prompt(subject.inputs(2))
    embeds = subject.model.get_input_embeddings()(ids).detach()
    result = held(name, preset, {"inputs_embeds": embeds})
    if result is None:
        return
    out = result[0]
    by_ids = subject.generate({"input_ids": ids}, cache_implementation=f"kvquant-{preset}")
    # Without prompt tokens the sequences have the new tokens only.
    assert torch.equal(out.sequences, by_ids.sequences[:, PROMPT:])


@every_family_with_two_presets()
def test_prefill_in_chunks(name, preset):
    result = held(name, preset, host(name).inputs(), prefill_chunk_size=16)
    if result is not None:
        assert [call.past for call in result[1]] == [0, 16, 32, 48, *range(PROMPT, PROMPT + STEPS - 1)]


# --- beams


def scores_of(subject: Host, cache, sequences: torch.Tensor, start: int) -> torch.Tensor:
    """Sums of the log-probabilities of sequences `[batch, length]` from `start` on, each decoded as a row."""
    logits = [subject.prefill(cache, sequences[:, :start])[:, None]]
    logits.append(subject.decode(cache, sequences[:, start:-1]))
    said = torch.cat(logits, 1).log_softmax(-1)
    return said.gather(-1, sequences[:, start:, None]).sum((1, 2))


@every_family_with_two_presets()
@pytest.mark.parametrize("do_sample", [False, True], ids=["beams", "sampled"])
def test_beams(name, preset, do_sample):
    subject = host(name)
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "length_penalty": 0.0}
    # Sampled beams are scored by the distribution that was sampled from, so these options leave it unchanged.
    options |= {"do_sample": True, "top_k": 0} if do_sample else {}
    inputs = subject.inputs(2)
    torch.manual_seed(0)
    out = subject.generate(inputs, cache_implementation=f"kvquant-{preset}", **options)
    assert form(out) == form(dense(name, inputs, **options))
    assert own(out.past_key_values).get_seq_length() == PROMPT + STEPS - 1
    assert (out.beam_indices[:, :STEPS] % 3 != out.beam_indices[:, :1] % 3).any(), "no beam was moved"
    expected = scores_of(subject, subject.cache(preset), out.sequences, PROMPT)
    torch.testing.assert_close(out.sequences_scores, expected, rtol=0, atol=20 * ROUNDING)


@pytest.mark.parametrize("options", [{"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
                                     {"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}],
                         ids=["group-beams", "contrastive", "dola"])  # fmt: skip
def test_modes_that_moved_to_the_hub_fail_as_with_the_dense_cache(options):
    subject = host("qwen2")
    errors = []
    for choice in ({}, {"cache_implementation": "kvquant-int4"}):
        with pytest.raises(Exception) as caught:
            subject.generate(subject.inputs(), **options, **choice)
        errors.append((caught.type, str(caught.value)[:60]))
    assert errors[0] == errors[1]


# --- speculation


@contextmanager
def assistant_of(name: str, choice: str | None) -> Iterator:
    assistant = host(name, seed=1).model
    assistant.generation_config.cache_implementation = choice
    try:
        yield assistant
    finally:
        assistant.generation_config.cache_implementation = None


@every_family_with_two_presets(ROLLS_BACK)
@pytest.mark.parametrize("draft", ["dense", "quantized"])
def test_assisted_decoding(name, preset, draft):
    if families.DENSE_WINDOWS_FAIL_ASSISTED and name in families.SLIDING:
        pytest.skip("the dense cache of this transformers fails, or does not, as drafts are accepted")
    subject = host(name)
    inputs = subject.inputs()
    with assistant_of(name, f"kvquant-{preset}" if draft == "quantized" else None) as assistant:
        result = held(name, preset, inputs, assistant_model=assistant, max_new_tokens=12)
    if result is None:
        return
    out, calls = result
    assert calls[0].fed > PROMPT, "nothing was drafted"
    assert own(out.past_key_values).routes["window_lost"] == 0
    if subject.fused:
        # Sixteen queries at once are sixteen single steps.
        plain = subject.generate(inputs, cache_implementation=f"kvquant-{preset}", max_new_tokens=12)
        assert torch.equal(out.sequences, plain.sequences)


@every_family_with_two_presets(ROLLS_BACK)
def test_prompt_lookup(name, preset):
    subject = host(name)
    inputs = subject.of_ids(families.prompt(1, 15, seed=4).repeat(1, 4))
    result = held(name, preset, inputs, prompt_lookup_num_tokens=5, max_new_tokens=12)
    if result is None:
        return
    out, calls = result
    assert calls[0].fed > PROMPT, "nothing was looked up"
    if subject.fused:
        plain = subject.generate(inputs, cache_implementation=f"kvquant-{preset}", max_new_tokens=12)
        assert torch.equal(out.sequences, plain.sequences)


# --- batches


@every_family_with_two_presets()
def test_left_padding(name, preset):
    subject = host(name)
    ids = families.prompt(2, PROMPT, seed=5)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    inputs = subject.of_ids(ids * mask, mask)
    said = families.prompt(2, STEPS, seed=8)
    expected = dense(name, inputs, "said", logits_processor=[families.Say(said)])
    with subject.recorded() as calls:
        out = subject.generate(inputs, logits_processor=[families.Say(said)], cache_implementation=f"kvquant-{preset}")
    subject.assert_replayed(calls, subject.cache(preset, attention_mask=mask))
    assert distance(torch.stack(out.logits), torch.stack(expected.logits)) <= TOLERANCE[preset]
    for layer in own(out.past_key_values).quantized_layers:
        assert torch.equal(layer.padding, mask == 0)


@every_family_with_two_presets()
def test_a_row_that_stops_early_does_not_disturb_the_others(name, preset):
    subject = host(name)
    inputs, choice = subject.inputs(2), {"cache_implementation": f"kvquant-{preset}"}
    plain = subject.generate(inputs, **choice).sequences
    end = int(plain[0, PROMPT + 2])
    if end in plain[1, PROMPT:] or end in plain[0, PROMPT : PROMPT + 2]:
        pytest.skip("both rows say the token")
    out = held(name, preset, inputs, eos_token_id=end)[0]
    assert out.sequences[0, PROMPT:].tolist() == plain[0, PROMPT : PROMPT + 3].tolist() + [0] * (STEPS - 3)
    assert torch.equal(out.sequences[1], plain[1])


# --- one cache, many calls


@every_family_with_two_presets()
def test_three_turns(name, preset):
    """The returned cache goes into the next call, which feeds only the new tokens."""
    subject = host(name)
    out, calls = held(name, preset, subject.inputs())
    cache = out.past_key_values
    replay = subject.cache(preset)
    subject.assert_replayed(calls, replay)
    for turn in (1, 2):
        new = families.prompt(1, 5, seed=20 + turn)
        before = cache.get_seq_length()
        inputs = subject.without_image(subject.of_ids(torch.cat([out.sequences, new], 1)))
        with subject.recorded() as calls:
            out = subject.generate(inputs, **{CACHE: cache})
        assert out.past_key_values is cache
        if not subject.is_encoder_decoder:  # whose whole prompt transformers feeds again, with a dense cache too
            assert [call.past for call in calls] == [before, *range(before + 6, before + 6 + STEPS - 1)]
            assert calls[0].fed == 6
        subject.assert_replayed(calls, replay)
    assert own(cache).routes["prefill_dense"] == subject.num_full


@every_family_with_two_presets()
def test_a_prompt_cache_for_many_continuations(name, preset):
    """The cache is filled once; each continuation has a copy, alone or as a row of a batch."""
    subject = host(name)
    ids = families.prompt(1, PROMPT, seed=6)
    filled = subject.cache(preset)
    subject.prefill(filled, ids)
    before = own(filled).memory_report()
    new = families.prompt(2, 7, seed=7)
    alone = []
    for row in range(2):
        fresh = subject.cache(preset)
        subject.prefill(fresh, ids)
        alone.append(subject.decode(fresh, new[row : row + 1]))
        copied = copy.deepcopy(filled)
        torch.testing.assert_close(subject.decode(copied, new[row : row + 1]), alone[row], rtol=0, atol=ROUNDING)
    assert filled.get_seq_length() == PROMPT
    assert own(filled).memory_report() == before
    if name in LINEAR:
        return  # transformers' linear layers do not repeat
    batch = copy.deepcopy(filled)
    batch.batch_repeat_interleave(2)
    torch.testing.assert_close(subject.decode(batch, new), torch.cat(alone), rtol=0, atol=ONE_CODE[preset])
    batch.batch_select_indices(torch.tensor([1]))
    fresh = subject.cache(preset)
    subject.prefill(fresh, ids)
    last = subject.decode(fresh, torch.cat([new[1:], new[:1, :3]], 1))[:, -3:]
    torch.testing.assert_close(subject.decode(batch, new[:1, :3]), last, rtol=0, atol=ONE_CODE[preset])


@every_family_with_two_presets()
@pytest.mark.parametrize("removed", [1, 20, 64])
def test_crop(name, preset, removed):
    """A crop leaves the cache as if the tokens had never come; if transformers' layers cannot crop, ours fail too."""
    subject = host(name)
    ids, other = families.prompt(1, PROMPT + 3, seed=6), families.prompt(1, removed, seed=9)
    cache, fresh = subject.cache(preset), subject.cache(preset)
    plain = DynamicCache(config=subject.model.config.get_text_config(decoder=True))
    if subject.is_encoder_decoder:
        plain = EncoderDecoderCache(plain, DynamicCache(config=subject.model.config))
    for each in (cache, plain):
        subject.prefill(each, ids[:, :PROMPT])
        for new in other.split(32, dim=1):
            subject.prefill(each, new)
    try:
        plain.crop(-removed)
    except Exception as error:
        # Quantized sliding layers go back as far as full attention.
        if name not in families.SLIDING or name in LINEAR:
            with pytest.raises(type(error)):
                cache.crop(-removed)
            return
        plain = None
    cache.crop(-removed)
    assert cache.get_seq_length() == PROMPT
    assert plain is None or plain.get_seq_length() == PROMPT
    subject.prefill(fresh, ids[:, :PROMPT])
    expected = subject.decode(fresh, ids[:, PROMPT:])
    torch.testing.assert_close(subject.decode(cache, ids[:, PROMPT:]), expected, rtol=0, atol=ROUNDING)


@every_family_with_two_presets()
def test_reset(name, preset):
    subject = host(name)
    if OLDEST and name in ("gemma2", "gemma3", "gpt_oss", "bart"):
        pytest.skip("until transformers 5.17 its own layers (sliding, cross-attention) are not empty after a reset")
    cache, fresh = subject.cache(preset), subject.cache(preset)
    subject.prefill(cache, families.prompt(2, PROMPT, seed=9))
    subject.decode(cache, families.prompt(2, 3, seed=7))
    cache.reset()
    assert cache.get_seq_length() == 0
    ids, new = families.prompt(2, PROMPT, seed=6), families.prompt(2, 5, seed=7)
    for each in (cache, fresh):
        subject.prefill(each, ids)
    torch.testing.assert_close(subject.decode(cache, new), subject.decode(fresh, new), rtol=0, atol=ROUNDING)


@every_family_with_two_presets()
def test_more_tokens_than_were_allocated(name, preset):
    subject = host(name)
    inputs = subject.inputs()
    reserved = subject.generate(
        inputs, past_key_values=subject.cache(preset, max_length=PROMPT + 2), max_new_tokens=20
    )
    expected = subject.generate(inputs, cache_implementation=f"kvquant-{preset}", max_new_tokens=20)
    assert torch.equal(reserved.sequences, expected.sequences)
    cache = subject.cache(preset, max_length=PROMPT + 2)
    subject.prefill(cache, subject.prompt(inputs))
    grown = subject.decode(cache, expected.sequences[:, PROMPT:-1])
    torch.testing.assert_close(grown, torch.stack(expected.logits[1:], 1), rtol=0, atol=ROUNDING)


@every_family_with_two_presets()
def test_offloading_between_steps(name, preset):
    subject = host(name)
    cache, fresh = subject.cache(preset), subject.cache(preset)
    ids, new = families.prompt(1, PROMPT, seed=6), families.prompt(1, 5, seed=7)
    for each in (cache, fresh):
        subject.prefill(each, ids)
    for layer in own(cache).quantized_layers:
        layer.offload()
        layer.prefetch()
    torch.testing.assert_close(subject.decode(cache, new), subject.decode(fresh, new), rtol=0, atol=0)


# --- what is not generation stays as it is


@every_family
def test_training_is_left_alone(name):
    """A quantized generation does not change loss and gradients, with gradient checkpointing too."""
    subject = host(name)
    ids = families.prompt(2, 20)
    given = subject.of_ids(ids)

    def gradient() -> list[torch.Tensor]:
        subject.model.zero_grad()
        torch.manual_seed(0)
        subject.model(**given, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in subject.model.parameters() if p.grad is not None]

    model = subject.model
    try:
        model.train()
        model.gradient_checkpointing_enable()
        before = gradient()
        model.eval()
        subject.generate(subject.inputs(), cache_implementation="kvquant-int4")
        assert model.is_gradient_checkpointing
        model.train()
        after = gradient()
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
        model.zero_grad()
    assert len(before) == len(after) > 0
    for a, b in zip(before, after):
        assert torch.equal(a, b)


@every_family
@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_attention_weights(name, preset):
    """Attention weights exist only in dense attention, which then reads de-quantized copies of the same cache."""
    subject = host(name)
    subject.model.set_attn_implementation("eager")
    try:
        inputs = subject.inputs()
        expected = subject.generate(inputs, output_attentions=True)
        out = subject.generate(inputs, cache_implementation=f"kvquant-{preset}", output_attentions=True)
        plain = subject.generate(inputs, cache_implementation=f"kvquant-{preset}")
    finally:
        subject.model.set_attn_implementation(base(name))
    assert form(out) == form(expected)
    assert own(out.past_key_values).routes["decode_fused"] == 0
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(plain.logits), rtol=0, atol=10 * ROUNDING)


def test_compiled_forward():
    """A compiled model generates the same as the plain one; the operator is one node of its graph."""
    subject = Host("qwen2", num_hidden_layers=1)
    inputs = subject.inputs()
    expected = subject.generate(inputs, cache_implementation="kvquant-int4", max_new_tokens=3)
    torch._dynamo.reset()
    subject.model.forward = torch.compile(subject.model.forward, backend="eager")
    out = subject.generate(inputs, cache_implementation="kvquant-int4", max_new_tokens=3)
    torch._dynamo.reset()
    assert torch.equal(out.sequences, expected.sequences)
    assert own(out.past_key_values).routes == own(expected.past_key_values).routes
