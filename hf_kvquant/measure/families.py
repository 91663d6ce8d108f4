"""Examines a model family with the presets of 8 and 4 bits: fused, ring (has a window), absorbed, de-quantized,
native, refused.

Each family is built tiny from its config (`tiny_models`) and generates a given text from left-padded prompts. These
must hold:

- exact: if every token is read exactly, the cache's logits are those of the dense cache, through the operator and
  through de-quantized states. This finds every wrong route, mask, scale or position, without a format's tolerance.
- fused: in every decode call of every preset the operator's output is that of the model's own attention over the
  de-quantized states, given the same arguments.
- distance: the logits of every preset are those of the dense cache within the format's tolerance.

If one of them fails, the family is `failed`, and nothing else is recorded for it.
"""

from __future__ import annotations

import contextlib
import inspect
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache, EncoderDecoderCache

from .. import integration
from ..attention import attend
from ..cache import QuantizedCache
from ..config import KVQuantConfig
from ..host import CACHE, attn_implementation, cache_of
from ..latent import LatentStates
from ..layers import QuantizedLayer
from ..recorded import RecordedStates, recorded_in
from ..sliding import SlidingQuantizedLayer
from ..states import QuantizedStates
from .facts import without_paths
from .tiny_models import FIRST_TOKEN, VOCAB, Family

# Sliding layers of tiny models are quantized too, whatever their window.
EVERY_WINDOW = {"sliding": 2}
# Every token is recent: stored codes are never read, and everything else is as usual.
EXACT = {"keys": {"format": "int8"}, "values": {"format": "int8"}, "recent_length": 128, **EVERY_WINDOW}

PROMPT, PADDED, STEPS = 62, 17, 10
# The largest difference of attention outputs, as a share of the largest output; also that of logits, of their spread.
FUSED_LIMIT = 1e-4
EXACT_LIMIT = 1e-3
# The root-mean-square distance to the dense cache's logits, as a share of their spread; unrelated logits have 1.4.
DISTANCE_LIMIT = {"int8": 0.1, "int8-plain": 0.1, "fp8": 0.5, "int4": 0.7, "int4-small": 0.9}
# The presets that read a short prompt as stored; the others read its tokens exactly.
PRESETS = tuple(DISTANCE_LIMIT)
COMPARED = "the model matrix compares it"
NOT_FUSED = f"The quantized KV cache is read through de-quantized copies: {COMPARED}."

LAYER_KINDS = {
    "DynamicLayer": "full attention",
    "QuantizedLayer": "full attention",
    "DynamicSlidingWindowLayer": "sliding window",
    "SlidingQuantizedLayer": "sliding window",
    "DynamicIndexedLayer": "indexed attention",
    "LinearAttentionLayer": "linear or convolution",
    "LinearAttentionAndFullAttentionLayer": "linear and full attention",
    "QuantizedHybridLayer": "linear and full attention",
    "LinearAttentionAndSlidingWindowAttentionLayer": "linear and sliding window",
    "SlidingQuantizedHybridLayer": "linear and sliding window",
    "DummyLayer": "no cache",
}


class Say:
    """A logits processor that makes generation say given tokens `[batch, n]`."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = torch.full_like(scores, -torch.inf).scatter(1, self.tokens[:, self.step : self.step + 1], 0.0)
        self.step += 1
        return said


class Compared:
    """Our attention function, which compares each output of the operator with the model's own attention."""

    def __init__(self):
        self.largest, self.calls, self.recorded, self.absorbed = 0.0, 0, 0, 0

    def __call__(self, module, query, key, value, attention_mask, *, dense_attention, **kwargs):
        routes = _routes(key)
        before = routes["decode_fused"]
        output = attend(module, query, key, value, attention_mask, dense_attention=dense_attention, **kwargs)
        if routes["decode_fused"] > before:
            if isinstance(key, LatentStates):
                self.absorbed += 1
                states = key.read(query.shape[2])
            else:
                states = _dequantized(key, query.shape[2]), _dequantized(value, query.shape[2])
            self.compare(output[0], dense_attention(module, query, *states, attention_mask, **kwargs)[0])
        return output

    def compare(self, output: torch.Tensor, expected: torch.Tensor) -> None:
        self.largest = max(self.largest, share(output - expected, expected.abs().max()))
        self.calls += 1

    @contextlib.contextmanager
    def with_own_code(self):
        """Within this context the products of attention code of the model's own are compared, too."""
        original, products = RecordedStates.__torch_function__, []

        def compared(cls, function, types, args=(), kwargs=None):
            routes = _routes(recorded_in(args, kwargs or {})[0])
            before = routes["decode_fused"]
            products.append(function)
            try:
                output = original(function, types, args, kwargs)
            finally:
                products.pop()
            # A rule may call others, which would be compared twice.
            if routes["decode_fused"] > before and not products:
                args, kwargs = tree_map_only(RecordedStates, lambda x: x.node.compute(), (args, kwargs or {}))
                self.compare(output, function(*args, **kwargs))
                self.recorded += 1
            return output

        RecordedStates.__torch_function__ = classmethod(compared)  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            RecordedStates.__torch_function__ = original  # type: ignore[method-assign]


def _routes(states: object) -> Counter:
    if isinstance(states, RecordedStates):
        states = states.meaning.step.keys
    if isinstance(states, LatentStates):
        states = states.latents
    return states.routes if isinstance(states, QuantizedStates) else Counter()


def _dequantized(states: QuantizedStates | RecordedStates, q_len: int) -> torch.Tensor:
    """What the model's own attention reads."""
    if isinstance(states, RecordedStates):
        return states.node.compute()
    return states.read(q_len)


def share(difference: torch.Tensor, size: torch.Tensor) -> float:
    """The largest difference as a share of `size`; NaN counts as infinite."""
    found = float(difference.abs().max() / size)
    return found if found == found else float("inf")


class Subject:
    """A tiny model and its inputs: left-padded prompts, which for encoder-decoder models are the decoder's."""

    def __init__(self, family: Family):
        self.model = family.build()
        self.decoder_config = self.model.config.get_text_config(decoder=True)
        tokens = torch.Generator().manual_seed(1)
        ids = torch.randint(FIRST_TOKEN, VOCAB, (2, PROMPT), generator=tokens)
        self.said = torch.randint(FIRST_TOKEN, VOCAB, (2, STEPS + 1), generator=tokens)
        mask = torch.ones_like(ids)
        mask[1, :PADDED] = 0
        ids = ids * mask
        if self.model.config.is_encoder_decoder:
            source = torch.randint(FIRST_TOKEN, VOCAB, (2, 20), generator=tokens)
            ids[:, 0] = getattr(self.model.config, "decoder_start_token_id", None) or 0
            self.inputs = {"input_ids": source, "decoder_input_ids": ids, "decoder_attention_mask": mask}
        else:
            self.inputs = {"input_ids": ids, "attention_mask": mask}
        if "pixel_values" in _required(self.model.generate):
            size = self.model.config.vision_config.image_size
            self.inputs["pixel_values"] = torch.zeros(2, 3, size, size)

    def generate(self, **kwargs):
        """Logits `[steps, batch, vocab]` in float32, and the cache."""
        with torch.no_grad():
            out = self.model.generate(  # type: ignore[operator]  # of GenerationMixin
                **self.inputs, do_sample=False, max_new_tokens=STEPS + 1, return_dict_in_generate=True,
                output_logits=True, logits_processor=[Say(self.said)], **kwargs,
            )  # fmt: skip
        return torch.stack(out.logits).float(), cache_of(out)

    def cache(self, config: dict) -> QuantizedCache | EncoderDecoderCache:
        """A cache that is read through de-quantized copies."""
        cache = QuantizedCache(self.model.config, config)
        cache.disable_fused(COMPARED)
        if self.model.config.is_encoder_decoder:
            return EncoderDecoderCache(cache, DynamicCache(config=self.decoder_config))
        return cache


def _required(function) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.default is p.empty}


class Failed(Exception):
    """A check that does not hold."""


def examine(family: Family) -> dict:
    """The result of a family with all of `PRESETS`."""
    started = time.perf_counter()
    found: dict = {"model_type": family.model_type, "kind": family.kind}
    try:
        subject = Subject(family)
    except Exception as error:
        return found | {"status": "not built", "reason": _reason(error)}
    found["attention"] = attn_implementation(subject.model.config.get_text_config(decoder=True))
    try:
        dense, cache = subject.generate()
        if not torch.isfinite(dense).all():
            raise FloatingPointError("logits that are not finite")
    except Exception as error:
        return found | {"status": "dense fails", "reason": _reason(error)}
    found["dense_cache"] = type(cache).__name__
    try:
        found |= _measured(subject, dense)
    except Failed as error:
        found |= {"status": "failed", "reason": str(error)}
    except Exception as error:
        ours = isinstance(error, ValueError) and _raised_by_us(error)
        found |= {"status": "refused" if ours else "failed", "reason": _reason(error)}
    return found | {"seconds": round(time.perf_counter() - started, 1)}


def _measured(subject: Subject, dense: torch.Tensor) -> dict:
    spread = dense.std()
    compared = Compared()
    context = integration.attention(subject.model, attend=compared)
    with context, compared.with_own_code(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        logits, cache = subject.generate(cache_implementation="kvquant", cache_config=EXACT)
        exact = {"own_route": share(logits - dense, spread)}
        layers, status = _layers(own(cache), compared.absorbed > 0)
        exact["dequantized"] = share(subject.generate(**{CACHE: subject.cache(EXACT)})[0] - dense, spread)
        presets: dict[str, dict[str, Any]] = {}
        for preset in PRESETS:
            compared.largest = 0.0
            config = KVQuantConfig.preset(preset).to_dict() | EVERY_WINDOW
            logits, cache = subject.generate(cache_implementation="kvquant", cache_config=config)
            distance = float((logits - dense).pow(2).mean().sqrt() / spread)
            routes = {route: count for route, count in own(cache).routes.items() if count}
            presets[preset] = {"fused": compared.largest, "distance": distance, "routes": routes}
    for name, difference in exact.items():
        _require(f"exact, {name}", difference, EXACT_LIMIT)
    for preset, figures in presets.items():
        _require(f"{preset}: fused against de-quantized", figures["fused"], FUSED_LIMIT)
        _require(f"{preset}: distance to the dense cache", figures["distance"], DISTANCE_LIMIT[preset])
    obstacles = sorted({str(w.message) for w in said if "de-quantize" in str(w.message)} - {NOT_FUSED})
    return {
        "status": status,
        "layers": layers,
        "cross_attention": "dense" if subject.model.config.is_encoder_decoder else None,
        "exact": {name: _figure(value) for name, value in exact.items()},
        "presets": {
            name: figures | {"fused": _figure(figures["fused"]), "distance": _figure(figures["distance"])}
            for name, figures in presets.items()
        },
        "compared_calls": compared.calls,
        "recorded_calls": compared.recorded,
        "obstacles": obstacles,
    }


def own(cache) -> QuantizedCache:
    """The self-attention cache, which has to be ours."""
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if not isinstance(cache, QuantizedCache):
        raise Failed(f"generation used a {type(cache).__name__}")
    return cache


def _layers(cache: QuantizedCache, has_latents: bool) -> tuple[dict[str, dict[str, int]], str]:
    """How many layers of each kind took which route, and the route of those that are quantized. No model has layers
    of latents beside quantized ones of keys."""
    routes = cache.routes
    counted: dict[str, Counter] = {}
    for layer in cache.layers:
        name = type(layer).__name__
        kind = LAYER_KINDS.get(name, name)
        if not isinstance(layer, QuantizedLayer):
            route = "native"
        elif not layer.is_initialized:
            route = "never used"
        elif not routes["decode_dequantized"] or (layer.takes_states and routes["decode_fused"]):
            as_stored = "absorbed" if has_latents else "fused"
            route = "ring" if isinstance(layer, SlidingQuantizedLayer) else as_stored
        else:
            route = "partly fused" if routes["decode_fused"] else "de-quantized"
        counted.setdefault(kind, Counter())[route] += 1
    quantized = {"fused", "absorbed", "partly fused", "de-quantized"}
    found = {"fused" if route == "ring" else route for routes in counted.values() for route in routes}
    ways = found & quantized
    if not ways:
        raise Failed("no layer used the quantized cache")
    # Every decode step of every layer took the route that is recorded.
    used = sum(layer.is_initialized for layer in cache.quantized_layers)
    if routes["decode_fused"] + routes["decode_dequantized"] < STEPS * used:
        raise Failed(f"{used} quantized layers in {STEPS} steps took the routes {routes}")
    is_mixed = routes["decode_fused"] and routes["decode_dequantized"]
    status = "partly fused" if is_mixed or len(ways) > 1 else ways.pop()
    return {kind: dict(sorted(routes.items())) for kind, routes in counted.items()}, status


def _require(what: str, value: float, limit: float) -> None:
    if not value <= limit:
        raise Failed(f"{what}: {value:.2g} is more than {limit:g}")


def _figure(value: float) -> float:
    return float(f"{value:.2g}")


def _raised_by_us(error: Exception) -> bool:
    return Path(integration.__file__).parent in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parents


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return without_paths(f"{type(error).__name__}: {text}"[:300])
