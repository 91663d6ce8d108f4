"""What is added to transformers, in one place, and how to take it away again.

transformers has no registry for caches, so methods of `GenerationMixin` are wrapped; for every name that is not ours
they pass straight through. Attention functions and their masks are registered under `kvquant|<base>`, where <base> is
whatever the user loaded the model with: it stays the prefill path.

Private names of transformers appear in this file only.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import (
    AttentionInterface,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    PreTrainedModel,
    StaticCache,
)
from transformers.generation import GenerationMode, configuration_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.utils.output_capturing import _active_collector

from .attention import attend
from .cache import FORWARD, QuantizedCache
from .config import KVQuantConfig

NAME = "kvquant"
# Attribute of a model: the longest static cache that `generate` made for it.
_LONGEST = "_previous_max_cache_length"


def cache_implementations() -> list[str]:
    """Every value of `cache_implementation` that is ours: "kvquant", "kvquant-<preset>", "kvquant-<preset>-static"."""
    return [NAME, *(f"{NAME}-{preset}" for preset in KVQuantConfig.names())]


def install() -> None:
    """Add our names to transformers; done by `import hf_kvquant`, harmless when repeated."""
    if _originals:
        return
    known = configuration_utils.ALL_CACHE_IMPLEMENTATIONS
    _originals["ALL_CACHE_IMPLEMENTATIONS"] = known
    configuration_utils.ALL_CACHE_IMPLEMENTATIONS = type(known)([*known, *cache_implementations()])
    for name, wrap in _WRAPPERS.items():
        _originals[name] = getattr(GenerationMixin, name)
        setattr(GenerationMixin, name, wrap(_originals[name]))


def uninstall() -> None:
    """Undo `install`; caches that exist go on working inside `attention(model)`."""
    if not _originals:
        return
    configuration_utils.ALL_CACHE_IMPLEMENTATIONS = _originals.pop("ALL_CACHE_IMPLEMENTATIONS")
    for name in _WRAPPERS:
        setattr(GenerationMixin, name, _originals.pop(name))


_originals: dict[str, object] = {}


@contextmanager
def attention(model: PreTrainedModel, attend: Callable = attend, name: str = NAME) -> Iterator[None]:
    """Within this context the model's attention understands what a `QuantizedCache` returns.

    `generate` enters it by itself; plain forward calls with a quantized cache need it. It may be nested, and entered
    by several threads for one model; when the last one leaves, the model is as it was.

    Args:
        attend: the attention function, and `name` the prefix that it is registered under (see `scoring`).
    """
    configs = _attention_configs(model)
    entered = []
    try:
        for config in configs:
            with _switch_lock:
                count, base = _switched.get(id(config), (0, config._attn_implementation))
                _register(name, base, attend)
                if count == 0:
                    config._attn_implementation_internal = f"{name}|{base}"
                elif config._attn_implementation != f"{name}|{base}":
                    raise RuntimeError(f"the model is in use as {config._attn_implementation!r}; {name!r} has to wait")
                _switched[id(config)] = (count + 1, base)
                entered.append(config)
        with _watched(model):
            yield
    finally:
        for config in entered:
            with _switch_lock:
                count, base = _switched.pop(id(config))
                if count > 1:
                    _switched[id(config)] = (count - 1, base)
                else:
                    config._attn_implementation_internal = base


@contextmanager
def _watched(model: PreTrainedModel) -> Iterator[None]:
    """Within this context every forward call of the model notes in its quantized cache that it began and ended."""
    with _switch_lock:
        _watchers[model] += 1
        # Once for a model, and not for a part of one that is watched: calls are noted where they begin.
        related = any(model in other.modules() or other in model.modules() for other in _hooks)
        if not related:
            _hooks[model] = (
                model.register_forward_pre_hook(_call_begins, with_kwargs=True),
                model.register_forward_hook(_call_ends, with_kwargs=True),
            )
    try:
        yield
    finally:
        with _switch_lock:
            _watchers[model] -= 1
            if not _watchers[model]:
                del _watchers[model]
                for hook in _hooks.pop(model, ()):
                    hook.remove()


_watchers: Counter[torch.nn.Module] = Counter()
_hooks: dict[torch.nn.Module, tuple] = {}


def _call_begins(model: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    for cache in _caches_given(args, kwargs):
        cache.begin(FORWARD)


def _call_ends(model: torch.nn.Module, args: tuple, kwargs: dict, output: object) -> None:
    for cache in _caches_given(args, kwargs):
        cache.end()


def _caches_given(args: tuple, kwargs: dict) -> list[QuantizedCache]:
    # A compiled graph does not run this: it would be compiled anew for every length.
    if torch.compiler.is_compiling():
        return []
    return [cache for cache in map(_quantized_cache, (*args, *kwargs.values())) if cache is not None]


_switch_lock = threading.RLock()
_switched: dict[int, tuple[int, str]] = {}


def _attention_configs(model: PreTrainedModel) -> list:
    """Every distinct config that an attention module of the model reads, where its class goes through the registry."""
    found: dict[int, tuple[object, bool]] = {}
    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        can_switch = part._can_set_attn_implementation()
        for module in part.modules():
            config = getattr(module, "config", None)
            if getattr(config, "_attn_implementation", None) is not None:
                found[id(config)] = (config, can_switch)
                # Masks are made with the text config, which a composite model keeps inside its own. Flat
                # encoder-decoder configs answer with a copy, which nobody else reads.
                text = config.get_text_config(decoder=True)
                if text._attn_implementation is not None and text is config.get_text_config(decoder=True):
                    found.setdefault(id(text), (text, can_switch))
    return [config for config, can_switch in found.values() if can_switch]


def _register(name: str, base: str, attend: Callable) -> None:
    """Attention and mask for `<name>|<base>`; without the mask a left-padded batch would be silently wrong."""
    if "|" in base:
        raise ValueError(
            f"attn_implementation: {base!r} cannot be the base of {name!r}; load the model with a plain one"
        )
    registered = f"{name}|{base}"
    if registered in AttentionInterface._global_mapping:
        return
    AttentionInterface.register(registered, functools.partial(_attend, attend, functools.partial(_dense, base)))
    if base in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(registered, ALL_MASK_ATTENTION_FUNCTIONS[base])


def _attend(attend: Callable, dense_attention: Callable, *args, **kwargs):
    """`attend`, told of `output_attentions`: most models record the weights with hooks and do not pass it on."""
    if "attentions" in (_active_collector.get() or ()):
        kwargs["output_attentions"] = True
    return attend(*args, dense_attention=dense_attention, **kwargs)


def _dense(base: str, module: torch.nn.Module, *args, **kwargs):
    """The attention that the module's own forward would have called for `base`."""
    registry, eager = _attention_functions(type(module))
    function = registry.get_interface(base, eager)
    if function is None:
        raise ValueError(f"attn_implementation: {type(module).__name__} has no attention function for {base!r}")
    return function(_ModuleView(module, base), *args, **kwargs)


@functools.lru_cache(maxsize=None)
def _attention_functions(module_class: type) -> tuple[AttentionInterface, Callable | None]:
    """The registry that a module's forward looks its attention up in, and its own eager function."""
    forward = inspect.unwrap(module_class.forward)
    names = forward.__globals__
    eager = next(
        (names[n] for n in forward.__code__.co_names if n.endswith("eager_attention_forward") and n in names), None
    )
    return names.get("ALL_ATTENTION_FUNCTIONS", AttentionInterface()), eager


class _ModuleView:
    """A module whose config shows the base attention: flash attention looks its name up there, eager its flags."""

    def __init__(self, module: torch.nn.Module, base: str):
        self._module, self._base = module, base

    def __getattr__(self, name: str):
        value = getattr(self._module, name)
        return _ConfigView(value, self._base) if name == "config" else value


class _ConfigView:
    def __init__(self, config, base: str):
        self._config, self._attn_implementation = config, base

    def __getattr__(self, name: str):
        return getattr(self._config, name)


def _requested(model: PreTrainedModel, generation_config, kwargs: dict) -> str | None:
    """The `cache_implementation` that a call of `generate` asks for."""
    own = getattr(model.generation_config, "cache_implementation", None)
    if getattr(generation_config, "is_assistant", False):
        return own
    given = kwargs.get("cache_implementation") or getattr(generation_config, "cache_implementation", None)
    return given or own


def _is_ours(name: object) -> bool:
    return isinstance(name, str) and (name == NAME or name.startswith(f"{NAME}-"))


def _quantized_cache(cache) -> QuantizedCache | None:
    """The quantized cache in what a user passed as `past_key_values`, if any."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    return cache if isinstance(cache, QuantizedCache) else None


def _wrap_generate(generate: Callable) -> Callable:
    @functools.wraps(generate)
    def wrapper(self, *args, **kwargs):
        generation_config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        name = _requested(self, generation_config, kwargs)
        if not _is_ours(name) and _quantized_cache(kwargs.get("past_key_values")) is None:
            return generate(self, *args, **kwargs)
        with attention(self):
            return generate(self, *args, **kwargs)

    return wrapper


def _wrap_prepare_cache(prepare: Callable) -> Callable:
    @functools.wraps(prepare)
    def wrapper(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length):
        arguments = (generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        if generation_config.is_assistant:
            # The assistant's generation config is a copy of the target's; its cache is its own model's choice.
            own = self.generation_config
            generation_config.cache_implementation = getattr(own, "cache_implementation", None)
            generation_config.cache_config = getattr(own, "cache_config", None)
            if model_kwargs.get("past_key_values") is not None:
                generation_config.cache_implementation = None
        encoder_decoder = self.config.is_encoder_decoder
        mask = model_kwargs.get("decoder_attention_mask" if encoder_decoder else "attention_mask")
        given = _quantized_cache(model_kwargs.get("past_key_values"))
        if given is not None:
            # An assistant comes back every few tokens, each time a little longer: its cache grows by itself.
            if not generation_config.is_assistant:
                given.reserve(max_cache_length)
            if mask is not None:
                given.set_padding(mask)
        if not _is_ours(generation_config.cache_implementation) or model_kwargs.get("past_key_values") is not None:
            return prepare(self, *arguments)
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            # Candidates are stored before they are verified.
            max_cache_length += 1 + (generation_config.prompt_lookup_num_tokens or 0)
        cache = _build(self, generation_config, max_cache_length, mask)
        if encoder_decoder:
            cache = EncoderDecoderCache(cache, _cross_attention_cache(self, cache, model_kwargs))
        elif cache.is_compileable and generation_config.prefill_chunk_size is not None:
            _initialize(
                self, cache, batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            )
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache

    return wrapper


def _build(model: PreTrainedModel, generation_config, max_length: int, mask: torch.Tensor | None) -> QuantizedCache:
    name, config = generation_config.cache_implementation, generation_config.cache_config
    if generation_config.use_cache is False:
        raise ValueError(f"cache_implementation: {name!r} needs use_cache=True")
    no_cache = f"cache_implementation: {name!r} cannot act: {type(model).__name__} does not support Cache objects"
    if not model._supports_default_dynamic_cache():
        raise ValueError(no_cache)
    if name == NAME:
        if config is None:
            raise ValueError(
                f"cache_config: missing; cache_implementation={NAME!r} needs a YAML path, dict or KVQuantConfig"
            )
    elif config is not None:
        raise ValueError(f"cache_config: goes with cache_implementation={NAME!r} only, not with the preset {name!r}")
    else:
        config = KVQuantConfig.preset(name.removeprefix(f"{NAME}-"))
    config = KVQuantConfig.load(config)
    if config.static:
        if generation_config.is_assistant:
            raise ValueError(
                f"cache_implementation: {name!r} cannot act in an assistant, whose cache grows from call to call; "
                "choose one that is not static"
            )
        # As long as the longest before, so that a compiled step serves this call too; as transformers does.
        max_length = max(max_length, generation_config.max_cache_len or 0, getattr(model, _LONGEST, 0))
        setattr(model, _LONGEST, max_length)
    cache = QuantizedCache(model.config, config, max_length=max_length, attention_mask=mask)
    if not _reads_a_cache(model):
        raise ValueError(no_cache)
    return cache


def _cross_attention_cache(
    model: PreTrainedModel, cache: QuantizedCache, model_kwargs: dict
) -> DynamicCache | StaticCache:
    config = model.config.get_text_config(decoder=True)
    if cache.kv_config.static:
        return StaticCache(config, max_cache_len=model_kwargs["encoder_outputs"][0].shape[1])
    return DynamicCache(config=config)


def _initialize(model: PreTrainedModel, cache: QuantizedCache, batch_size: int) -> None:
    """Allocate before a compiled prefill, which would be compiled anew for a cache that had been allocated in it."""
    shape = model._get_static_cache_init_shape()
    if shape is not None:
        cache.early_initialization(batch_size, *shape, dtype=model.dtype, device=model.device)


def _reads_a_cache(model: PreTrainedModel) -> bool:
    """Whether some forward names `past_key_values`; OpenAI GPT and XLM take any argument, and ignore this one."""
    parts = {type(part) for part in model.modules() if isinstance(part, PreTrainedModel)}
    return any("past_key_values" in inspect.signature(part.forward).parameters for part in parts)


def _wrap_continuous_batching(init: Callable) -> Callable:
    @functools.wraps(init)
    def wrapper(self, generation_config=None, *args, **kwargs):
        name = _requested(self, generation_config, {})
        if _is_ours(name):
            raise ValueError(
                f"cache_implementation: {name!r} cannot act in continuous batching, which has its own paged cache"
            )
        return init(self, generation_config, *args, **kwargs)

    return wrapper


_WRAPPERS = {
    "generate": _wrap_generate,
    "_prepare_cache_for_generation": _wrap_prepare_cache,
    "init_continuous_batching": _wrap_continuous_batching,
}
