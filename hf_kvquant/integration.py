"""Adds the quantized cache to transformers, all in one place, and takes it away again.

transformers has no registry for caches, so methods of its models are wrapped. The wrappers pass calls that do not
concern our names straight through. Attention functions and their masks are registered under `kvquant|<base>`, where
<base> is the attention that the user loaded the model with, which stays the prefill path.

A call of `generate` that asks for a quantized cache has it in every forward call, filled, or raises; see `_Request`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
)

from . import host, latent
from .attention import attend
from .cache import QuantizedCache
from .changes import FORWARD
from .config import KVQuantConfig
from .message import told
from .route import say_once, switched_attention
from .saving import active_adapters, adapters_difference

NAME = "kvquant"


def cache_implementations() -> list[str]:
    """Every value of `cache_implementation` that is ours: "kvquant", "kvquant-<preset>", "kvquant-<preset>-static"."""
    return [NAME, *(f"{NAME}-{preset}" for preset in KVQuantConfig.names())]


def install() -> None:
    """Add our names to transformers. `import hf_kvquant` does it; a second call changes nothing."""
    if _originals:
        return
    known: Any = host.configuration_utils.ALL_CACHE_IMPLEMENTATIONS
    # First what may fail: an import that failed is tried again.
    all_names = type(known)([*known, *cache_implementations()])
    _originals["ALL_CACHE_IMPLEMENTATIONS"] = known
    host.configuration_utils.ALL_CACHE_IMPLEMENTATIONS = all_names
    for (owner, name), wrap in _WRAPPERS.items():
        _originals[name] = getattr(owner, name)
        setattr(owner, name, wrap(_originals[name]))


def uninstall() -> None:
    """Undo `install`. Existing caches still work inside `attention(model)`."""
    if not _originals:
        return
    host.configuration_utils.ALL_CACHE_IMPLEMENTATIONS = _originals.pop("ALL_CACHE_IMPLEMENTATIONS")
    for owner, name in _WRAPPERS:
        setattr(owner, name, _originals.pop(name))


_originals: dict[str, Any] = {}


@contextmanager
def attention(model: PreTrainedModel, attend: Callable = attend, name: str = NAME) -> Iterator[None]:
    """Within this context the model's attention can read a `QuantizedCache`.

    `generate` enters it by itself; plain forward calls with a quantized cache need it. It may be nested, and several
    threads may enter it for one model; when the last one leaves, the model is as it was.

    Args:
        attend, name: another attention function, and the prefix that it is registered under (see `scoring`).

    Raises:
        ValueError: `model` is not a model of transformers.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model: a {type(model).__name__} is not allowed; expected a model")
    with _switched_attention(model, attend, name), _watched(model):
        yield


@contextmanager
def _switched_attention(model: PreTrainedModel, attend: Callable = attend, name: str = NAME) -> Iterator[None]:
    """Within this context the model's attention modules call `attend`."""
    configs = _attention_configs(model)
    entered = []
    try:
        for config in configs:
            with _switch_lock:
                used = host.attn_implementation(config)
                count, base = _switched.get(id(config), (0, used))
                _register(name, base, attend)
                if count == 0:
                    host.set_attn_implementation(config, f"{name}|{base}")
                elif used != f"{name}|{base}":
                    raise RuntimeError(f"the model is in use as {used!r}; {name!r} has to wait")
                _switched[id(config)] = (count + 1, base)
                entered.append(config)
        with switched_attention(), latent.patched(model):
            yield
    finally:
        for config in entered:
            with _switch_lock:
                count, base = _switched.pop(id(config))
                if count > 1:
                    _switched[id(config)] = (count - 1, base)
                else:
                    host.set_attn_implementation(config, base)


@contextmanager
def _watched(model: PreTrainedModel, calls_begin_here: bool = False) -> Iterator[None]:
    """Within this context every forward call of the model tells its quantized cache when it begins and ends.

    Only the outermost module of a call does so: a module inside or around a watched one is not watched as well, unless
    calls are known to begin there.
    """
    with _switch_lock:
        _watchers[model] += 1
        related = any(model in other.modules() or other in model.modules() for other in _hooks)
        _state_places[model] = host.generation_state(model)
        _adapters[model] = active_adapters(model, model)
        if model not in _hooks and (calls_begin_here or not related):
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


def _call_begins(model: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    # Compiled graphs leave this out; with it, they would be compiled anew for every length.
    if torch.compiler.is_compiling():
        return None
    request = _Request.of(model)
    if request is not None:
        args, kwargs = request.call_begins(args, kwargs)
    keeps_weights = kwargs.get("output_attentions")
    if keeps_weights is None:
        keeps_weights = host.asks_for_weights(model)
    for cache in _caches_given((args, kwargs)):
        cache.begin(FORWARD, bool(keeps_weights))
        _put_back_state(model, cache)
        _note_other_adapters(model, cache)
    return args, kwargs


def _call_ends(model: torch.nn.Module, args: tuple, kwargs: dict, output: object) -> None:
    if torch.compiler.is_compiling():
        return
    request = _Request.of(model)
    for cache in _caches_given((args, kwargs)):
        if request is not None:
            request.check_filled(cache.gained(), FORWARD)
        cache.end()
        cache.model_state = {key: getattr(*place) for key, place in _state_places.get(model, {}).items()}


def _put_back_state(model: torch.nn.Module, cache: QuantizedCache) -> None:
    """Restore the state that the model keeps outside of the cache to the state that belongs to the cached tokens.
    Another generation may have overwritten it, and a model that was just loaded has none."""
    places = _state_places.get(model) or {}
    if not places or cache.is_empty:
        return
    for key, (module, name) in places.items():
        if key in cache.model_state:
            setattr(module, name, cache.model_state[key])


_state_places: weakref.WeakKeyDictionary[torch.nn.Module, dict] = weakref.WeakKeyDictionary()


def _note_other_adapters(model: torch.nn.Module, cache: QuantizedCache) -> None:
    """Warn if an adapter was switched between two turns: tokens of the first stay as the old adapter made them."""
    now, was = _adapters.get(model), cache.adapters
    # Within a generation both are the same object.
    if was is not None and now is not None and was is not now and was != now and not cache.is_empty:
        say_once(
            "The tokens in the quantized KV cache were computed with other adapters and are not computed anew: "
            f"{adapters_difference(was, now, 'the cache')}."
        )
    cache.adapters = now


_adapters: weakref.WeakKeyDictionary[torch.nn.Module, dict] = weakref.WeakKeyDictionary()


def _caches_given(arguments: Iterable[Any], depth: int = 3) -> list[QuantizedCache]:
    """The quantized caches among the arguments of a call, including those inside dictionaries and sequences."""
    found = []
    for value in arguments:
        if isinstance(value, (dict, tuple, list)):
            if depth > 1:
                found += _caches_given(value.values() if isinstance(value, dict) else value, depth - 1)
        elif isinstance(value, Cache):
            cache = _quantized_cache(value)
            if cache is not None:
                found.append(cache)
    return found


_switch_lock = threading.RLock()
_switched: dict[int, tuple[int, str]] = {}
_PAGED_ATTENTION = f"{NAME}-paged"


def _attention_configs(model: PreTrainedModel) -> list:
    """Every distinct config that an attention module of the model reads, if its class looks attention up by name."""
    found: dict[int, tuple[object, bool]] = {}
    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        can_switch = host.can_set_attn_implementation(part)
        for module in part.modules():
            config = getattr(module, "config", None)
            if host.attn_implementation(config) is not None:
                found[id(config)] = (config, can_switch)
                # Masks are made with the text config, which a composite model keeps inside its own config. A flat
                # encoder-decoder config returns a new copy each time, which no module reads.
                text = config.get_text_config(decoder=True)
                if host.attn_implementation(text) is not None and text is config.get_text_config(decoder=True):
                    found.setdefault(id(text), (text, can_switch))
    return [config for config, can_switch in found.values() if can_switch]


def _register(name: str, base: str, attend: Callable) -> None:
    """Register attention and mask as `<name>|<base>`; without the mask, padded batches would be silently wrong.
    Batches of pages have no mask: each request attends to itself."""
    # Before we see it, the manager of continuous batching makes "paged|eager" of "eager".
    plain = base.removeprefix("paged|") if name == _PAGED_ATTENTION else base
    if "|" in plain:
        raise ValueError(
            f"attn_implementation: {base!r} cannot be the base of {name!r}; load the model with a plain one"
        )
    registered = f"{name}|{base}"
    if registered in host.ALL_ATTENTION_FUNCTIONS:
        return
    host.AttentionInterface.register(registered, functools.partial(_attend, attend, functools.partial(_dense, plain)))
    if base in host.ALL_MASK_ATTENTION_FUNCTIONS and name != _PAGED_ATTENTION:
        host.AttentionMaskInterface.register(registered, host.ALL_MASK_ATTENTION_FUNCTIONS[base])


def _attend(attend: Callable, dense_attention: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call `attend` with `output_attentions`, which most models do not pass on: they record the weights with hooks."""
    if host.records_attention_weights():
        kwargs["output_attentions"] = True
    return attend(*args, dense_attention=dense_attention, **kwargs)


def _dense(base: str, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The attention that the module's own forward would have called for `base`."""
    registry, eager = _attention_functions(type(module))  # type: ignore[arg-type]  # classes can be hashed
    function = registry.get_interface(base, eager)
    if function is None:
        raise ValueError(f"attn_implementation: {type(module).__name__} has no attention function for {base!r}")
    return function(_ModuleView(module, base), *args, **kwargs)


@functools.lru_cache(maxsize=None)
def _attention_functions(module_class: Any) -> tuple[host.AttentionInterface, Callable | None]:
    """The registry in which a module's forward looks its attention up, and the module's own eager function."""
    forward = inspect.unwrap(module_class.forward)
    names = forward.__globals__
    eager = next(
        (names[n] for n in forward.__code__.co_names if n.endswith("eager_attention_forward") and n in names), None
    )
    return names.get("ALL_ATTENTION_FUNCTIONS", host.ALL_ATTENTION_FUNCTIONS), eager


class _ModuleView:
    """A module whose config names the base attention, as the attention functions read it there."""

    def __init__(self, module: torch.nn.Module, base: str):
        self._module, self._base = module, base

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return _ConfigView(value, self._base) if name == "config" else value


class _ConfigView:
    def __init__(self, config: Any, base: str):
        self._config, self._attn_implementation = config, base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class _Request:
    """A call of `generate` with a quantized cache.

    The model's code comes between `generate` and the cache: `prepare_inputs_for_generation`, or an adapter that
    replaces it, may drop the cache, swap it or leave layers unfilled, and transformers then goes on with a dense one.
    So every forward call of the model inside that `generate` is checked before and after.
    """

    _current: ContextVar[_Request | None] = ContextVar("kvquant_request", default=None)

    def __init__(self, model: PreTrainedModel, outer: _Request | None, by_call: bool):
        self.model = model
        # The request around this one: an assistant's `generate` runs inside its target's.
        self.outer = outer
        # True if the call names the cache, False if a generation config saved with the model does.
        self.by_call = by_call
        self.cache: Cache | None = None
        self.max_length: int | None = None

    @classmethod
    def of(cls, model: torch.nn.Module) -> _Request | None:
        """The request that runs in this thread, if it is for this model and its cache has been made."""
        request = cls._current.get()
        return request if request is not None and request.model is model and request.cache is not None else None

    @classmethod
    @contextmanager
    def runs(cls, request: _Request | None) -> Iterator[None]:
        token = cls._current.set(request)
        try:
            yield
        finally:
            cls._current.reset(token)

    def call_begins(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of a forward call, with the cache of this request in them.

        Raises:
            RuntimeError: the call has no cache, or another one, and the tokens in this one would be lost.
        """
        own = _quantized_cache(self.cache)
        is_restored = not any(cache is own for cache in _caches_given((args, kwargs)))
        if is_restored:
            kwargs = kwargs | {host.cache_argument(self.model): self._restored(args, kwargs)}
        if is_restored or own.is_empty:
            mask = kwargs.get(_mask_argument(self.model))
            if isinstance(mask, torch.Tensor) and mask.ndim == 2:
                # The mask covers the tokens of this call only; the model may add others in front of them.
                own.set_padding(mask, of_last=True)
        return args, kwargs

    def _restored(self, args: tuple, kwargs: dict) -> Cache:
        own = _quantized_cache(self.cache)
        other = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if isinstance(self.cache, EncoderDecoderCache):
            other = getattr(other, "self_attention_cache", other)
        stored, tokens = own.get_seq_length(), _tokens_given(args, kwargs)
        if other is None and tokens > stored:
            # The model computes all tokens again (longrope scales positions differently from some length on).
            own.reset()
            return self.cache
        name = type(self.model).__name__
        if other is None:
            raise RuntimeError(
                f"{name} was called with {tokens} tokens and without the quantized cache, which holds the {stored} "
                "before them: its prepare_inputs_for_generation dropped the cache; generate with a dense cache"
            )
        if isinstance(other, DynamicCache) and not stored and len(other.layers) == len(own.layers):
            # Prefix tuning: the prefix becomes the first tokens of the quantized cache.
            own.take_over(other)
            return self.cache
        raise RuntimeError(
            f"{name} was called with a {type(other).__name__} instead of the quantized cache of this generate(): its "
            "prepare_inputs_for_generation, or an adapter's, swapped the cache; generate with a dense cache"
        )

    def check_filled(self, gained: dict[int, int], by: str) -> None:
        """Check that all quantized layers have stored the same number of tokens, at least one.

        Raises:
            ValueError: they have not.
        """
        if any(gained.values()) and len(set(gained.values())) == 1:
            return
        why = "a layer ignored the cache"
        if self.model.training and any(
            getattr(part, "gradient_checkpointing", False) for part in self.model.modules()
        ):
            why = "gradient checkpointing calls layers without a cache; call model.eval() before generate"
        raise ValueError(
            f"{type(self.model).__name__} did not fill the quantized cache: in this {by} its layers gained {gained} "
            f"tokens, expected the same number for all: {why}"
        )


def _mask_argument(model: PreTrainedModel) -> str:
    return "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"


def _tokens_given(args: tuple, kwargs: dict) -> int:
    """The number of tokens in the arguments of a forward call."""
    names = ("decoder_input_ids", "decoder_inputs_embeds", "inputs_embeds", "input_ids")
    given = (kwargs.get(name) for name in names)
    ids = next((x for x in (*given, *args) if isinstance(x, torch.Tensor)), None)
    return 0 if ids is None else ids.shape[1]


def _asked_for(
    model: PreTrainedModel, generation_config: GenerationConfig | None, kwargs: dict
) -> tuple[str | None, bool]:
    """The `cache_implementation` that a call of `generate` asks for, and whether the call itself names it."""
    own = getattr(model.generation_config, "cache_implementation", None)
    if getattr(generation_config, "is_assistant", False):
        return own, False
    given = kwargs.get("cache_implementation") or getattr(generation_config, "cache_implementation", None)
    return (given, True) if given else (own, False)


def _is_ours(name: object) -> bool:
    return isinstance(name, str) and (name == NAME or name.startswith(f"{NAME}-"))


def _refuse_lost_config(name: str | None, config: object) -> None:
    """transformers ignores a `cache_config` without a name that takes it, and would go on with a dense cache.

    Raises:
        ValueError: the config is one of ours.
    """
    is_dict = isinstance(config, Mapping) and {"keys", "values"} <= config.keys()
    if is_dict or isinstance(config, (KVQuantConfig, str, Path)):
        raise ValueError(
            f"cache_implementation: {name!r} does not read cache_config={told(config)}; expected {NAME!r}"
        )


def _refuse_no_cache(kwargs: dict) -> None:
    """transformers would fail on the first attribute that a name or a config lacks.

    Raises:
        ValueError: what is given as the cache is only what one of ours is made from.
    """
    for argument in host.CACHE_NAMES:
        given = kwargs.get(argument)
        if _is_ours(given) or isinstance(given, KVQuantConfig) or given is QuantizedCache:
            raise ValueError(
                f"{argument}: {told(given)} is not allowed; expected a QuantizedCache, or the name as "
                "cache_implementation"
            )


def _quantized_cache(cache: object) -> QuantizedCache | None:
    """The quantized cache in the argument that a user passed as a cache, if there is one."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    return cache if isinstance(cache, QuantizedCache) else None


def _wrap_generate(generate: Callable) -> Callable:
    @functools.wraps(generate)
    def wrapper(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        generation_config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        name, by_call = _asked_for(self, generation_config, kwargs)
        _refuse_no_cache(kwargs)
        outer = _Request._current.get()
        given = _caches_given([kwargs.get(name) for name in host.CACHE_NAMES])
        if not _is_ours(name):
            _refuse_lost_config(name, kwargs.get("cache_config"))
        if not _is_ours(name) and not given and outer is None:
            return generate(self, *args, **kwargs)
        request = _Request(self, outer, by_call)
        with _Request.runs(request):
            if not _is_ours(name) and not given:
                return generate(self, *args, **kwargs)
            with _switched_attention(self), _watched(self, calls_begin_here=True):
                for cache in given:
                    _put_back_state(self, cache)
                result = generate(self, *args, **kwargs)
            own = _quantized_cache(request.cache)
            if own is not None:
                # Compiled steps are not checked one by one.
                request.check_filled({layer.layer_idx: layer.tokens for layer in own.quantized_layers}, "generation")
            return result

    return wrapper


def _wrap_prepare_cache(prepare: Callable) -> Callable:
    @functools.wraps(prepare)
    def wrapper(
        self: PreTrainedModel,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: host.GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        arguments = (generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        request = _Request._current.get() or _Request(self, None, by_call=True)
        if generation_config.is_assistant:
            # The assistant's generation config is a copy of the target's, but its own model chooses its cache.
            own = self.generation_config
            generation_config.cache_implementation = getattr(own, "cache_implementation", None)
            generation_config.cache_config = getattr(own, "cache_config", None)
            if model_kwargs.get(host.CACHE) is not None:
                generation_config.cache_implementation = None
        if generation_mode == host.GenerationMode.ASSISTED_GENERATION:
            # Candidates are stored before they are verified.
            max_cache_length += 1 + (generation_config.prompt_lookup_num_tokens or 0)
        request.max_length = max_cache_length
        mask = model_kwargs.get(_mask_argument(self))
        given = _quantized_cache(model_kwargs.get(host.CACHE))
        if given is not None:
            _refuse_all_dense(given)
            # An assistant generates again every few tokens, each time a little further: its cache grows by itself.
            if not generation_config.is_assistant:
                _check_continues(given, host.text_length(generation_config, mask))
                given.reserve(max_cache_length)
            if mask is not None:
                given.set_padding(mask)
            request.cache = model_kwargs[host.CACHE]
        name = generation_config.cache_implementation
        if given is not None:
            _refuse_lost_soft_prompts(self, f"{host.CACHE}: a {type(given).__name__}")
        if not _is_ours(name) or model_kwargs.get(host.CACHE) is not None:
            return prepare(self, *arguments)
        if generation_config.use_cache is False and not request.by_call:
            # An argument of the call takes precedence over a name that was saved with the model.
            return prepare(self, *arguments)
        _refuse_lost_soft_prompts(self, f"cache_implementation: {name!r}")
        cache: Any = _build(self, generation_config, max_cache_length, request)
        if self.config.is_encoder_decoder:
            cache = EncoderDecoderCache(cache, _cross_attention_cache(self, cache, model_kwargs))
        elif cache.is_compileable and generation_config.prefill_chunk_size is not None:
            _initialize(
                self, cache, batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            )
        if mask is not None:
            _quantized_cache(cache).set_padding(mask, of_last=True)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[host.CACHE] = request.cache = cache

    return wrapper


def _check_continues(cache: QuantizedCache, length: int | None) -> None:
    """Check that the text goes on behind the cached tokens: transformers cuts off as many tokens as are cached.

    Raises:
        ValueError: no token is new, or an earlier call was interrupted.
    """
    cache.check_finished()
    cached = cache.get_seq_length()
    if length is not None and cached and length <= cached:
        raise ValueError(
            f"input_ids: {length} tokens are not allowed with a cache of {cached}; expected the cached tokens and new "
            "ones behind them"
        )


def _refuse_all_dense(cache: QuantizedCache) -> None:
    if not cache.quantized_layers:
        raise ValueError(
            f"format: 'dense' is not allowed for keys and values of all {len(cache.layers)} layers; expected a "
            "quantized format in one of them, or a cache of transformers"
        )


def _refuse_lost_soft_prompts(model: PreTrainedModel, asked: str) -> None:
    if host.loses_soft_prompts(model):
        raise ValueError(
            f"{asked} cannot act: this release of PEFT looks for the cache of prompt and prefix tuning under its old "
            f"name, so with transformers {host.VERSION} every cache, the dense one too, gives wrong tokens; install "
            "transformers before 5.24, or a newer PEFT"
        )


def _build(
    model: PreTrainedModel, generation_config: GenerationConfig, max_length: int, request: _Request
) -> QuantizedCache:
    name = generation_config.cache_implementation
    if generation_config.use_cache is False:
        raise ValueError(f"cache_implementation: {name!r} needs use_cache=True")
    config = _kv_config(model, generation_config, name)
    if config.static:
        if generation_config.is_assistant and request.outer is not None:
            # An assistant's cache lives as long as its target's, with the same sequence and candidates after it.
            ahead = (generation_config.num_assistant_tokens or 0) + 1
            max_length = max(max_length, (request.outer.max_length or 0) + ahead)
        # At least as long as every cache before, so that a compiled step serves this call too, as in transformers.
        max_length = max(max_length, generation_config.max_cache_len or 0, _longest_static.get(model, 0))
        _longest_static[model] = max_length
    cache = QuantizedCache(model.config, config, max_length=max_length)
    _refuse_all_dense(cache)
    head_dims = host.head_dims(model.config)
    if head_dims is not None:
        # Before the prompt runs. A cache that is not made here learns device and dtype with its first tokens.
        for layer in cache.quantized_layers:
            layer.check_formats(model.device, model.dtype, head_dims)
    return cache


def _kv_config(model: PreTrainedModel, generation_config: GenerationConfig, name: str) -> KVQuantConfig:
    """The config that a generation config asks for under one of our names."""
    config = generation_config.cache_config
    if not host.supports_cache(model):
        raise ValueError(
            f"cache_implementation: {name!r} cannot act: {type(model).__name__} does not support Cache objects"
        )
    if name == NAME:
        if config is None:
            raise ValueError(
                f"cache_config: missing; cache_implementation={NAME!r} needs a YAML path, dict or KVQuantConfig"
            )
    elif config is not None:
        raise ValueError(
            f"cache_config: {told(config)} is not allowed with the preset {name!r}; expected "
            f"cache_implementation={NAME!r}"
        )
    else:
        config = KVQuantConfig.preset(name.removeprefix(f"{NAME}-"))
    return KVQuantConfig.load(config, "cache_config")


_longest_static: weakref.WeakKeyDictionary[PreTrainedModel, int] = weakref.WeakKeyDictionary()


def _cross_attention_cache(
    model: PreTrainedModel, cache: QuantizedCache, model_kwargs: dict
) -> DynamicCache | StaticCache:
    config = model.config.get_text_config(decoder=True)
    if cache.kv_config.static:
        return StaticCache(config, max_cache_len=model_kwargs["encoder_outputs"][0].shape[1])
    return DynamicCache(config=config)


def _initialize(model: PreTrainedModel, cache: QuantizedCache, batch_size: int) -> None:
    """Allocate before a compiled prefill. If the prefill allocated, it would be compiled anew for the next cache."""
    shape = host.static_cache_shape(model)
    if shape is not None:
        cache.early_initialization(batch_size, *shape, dtype=model.dtype, device=model.device)


def _wrap_compiled_call(compiled_call: Callable) -> Callable:
    @functools.wraps(compiled_call)
    def wrapper(self: PreTrainedModel, compile_config: Any) -> Callable:
        call = compiled_call(self, compile_config)
        if _Request.of(self) is None:
            return call

        def checked(*args: Any, **kwargs: Any) -> Any:
            request = _Request.of(self)
            if request is not None:
                args, kwargs = request.call_begins(args, kwargs)
            return call(*args, **kwargs)

        return checked

    return wrapper


def _wrap_logits_processor(logits_processor: Callable) -> Callable:
    @functools.wraps(logits_processor)
    def wrapper(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        processors = logits_processor(self, *args, **kwargs)
        request = _Request.of(self)
        if request is None:
            return processors
        for processor in processors:
            if isinstance(processor, host.UnbatchedClassifierFreeGuidanceLogitsProcessor):
                _quantize_guidance(processor.unconditional_context, request)
        return _AsideProcessors(processors)

    return wrapper


def _wrap_stopping_criteria(stopping_criteria: Callable) -> Callable:
    @functools.wraps(stopping_criteria)
    def wrapper(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        criteria = stopping_criteria(self, *args, **kwargs)
        return criteria if _Request.of(self) is None else _AsideCriteria(criteria)

    return wrapper


class _AsideProcessors(LogitsProcessorList):
    """Processors may call the model for purposes of their own; such calls are not steps of the generation."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Request.runs(None):
            return super().__call__(*args, **kwargs)


class _AsideCriteria(StoppingCriteriaList):
    """Criteria may call the model, too; such calls are not steps of the generation."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Request.runs(None):
            return super().__call__(*args, **kwargs)


def _quantize_guidance(context: dict, request: _Request) -> None:
    """Let the unconditional pass of classifier-free guidance keep a quantized cache, too."""
    own = _quantized_cache(request.cache)
    if context["use_cache"] and own is request.cache:
        # Not static: the pass has a prompt of its own, whose length is not known here.
        config, mask = replace(own.kv_config, static=False), context["attention_mask"]
        own.unconditional = QuantizedCache(request.model.config, config, attention_mask=mask)
        context[host.CACHE] = own.unconditional


def _wrap_continuous_batching(init: Callable) -> Callable:
    @functools.wraps(init)
    def wrapper(
        self: PreTrainedModel, generation_config: Any = None, continuous_batching_config: Any = None, **kwargs: Any
    ) -> Any:
        name, by_call = _asked_for(self, generation_config, {})
        asked = None
        if _is_ours(name):
            given = generation_config if by_call else self.generation_config
            asked, continuous_batching_config = _paged(self, name, given, continuous_batching_config)
        # A persistent manager is used again, whatever the call asks for.
        manager = getattr(self, "_cached_continuous_batching_manager", None)
        kept = getattr(getattr(manager, "continuous_batching_config", None), _PAGED, None)
        if manager is not None and kept != asked:
            raise ValueError(
                f"cache_implementation: {name!r} is not that of the model's persistent manager; "
                "call model.destroy_cached_continuous_batching_manager() first"
            )
        return init(self, generation_config, continuous_batching_config, **kwargs)

    return wrapper


_PAGED = "kvquant"
"""The attribute of a `ContinuousBatchingConfig` that holds the `KVQuantConfig` of a manager with quantized pages."""


def _paged(model: PreTrainedModel, name: str, generation_config: Any, options: Any) -> tuple[KVQuantConfig, Any]:
    """The config of quantized pages, and the manager's options with it.

    Raises:
        ValueError: quantized pages do not serve the model, an option, or this version of transformers.
    """
    try:
        known = host.continuous_batching()
    except ImportError as error:
        raise ValueError(f"cache_implementation: {name!r} cannot act in continuous batching: {error}") from None
    from . import batching

    # Whatever `use_cache` says: transformers' server sets it to False.
    kv_config = _kv_config(model, generation_config, name)
    if options is None:
        options = getattr(generation_config, "continuous_batching_config", None) or known.options()
    batching.refuse_unserved(model, kv_config, options)
    options = copy.deepcopy(options)
    options.auto_switch_to_flash = False
    # Where these are None, the manager would choose.
    options.use_cuda_graph = options.use_async_batching = False
    setattr(options, _PAGED, kv_config)
    return kv_config, options


def _with_paged_attention(method: Callable) -> Callable:
    """The attention of quantized pages is in place while their manager makes its buffers, and while it runs."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.continuous_batching_config, _PAGED, None) is None:
            return method(self, *args, **kwargs)
        from . import batching

        with _switched_attention(self.model, batching.attend, _PAGED_ATTENTION):
            return method(self, *args, **kwargs)

    return wrapper


def _wrap_paged_cache(cache_class: Callable) -> Callable:
    @functools.wraps(cache_class, updated=())
    def make(*args: Any, **kwargs: Any) -> Any:
        from . import batching

        return batching.paged_cache(getattr(kwargs.get("continuous_batching_config"), _PAGED, None), *args, **kwargs)

    return make


def _wrap_offloading(manager_class: Callable) -> Callable:
    @functools.wraps(manager_class, updated=())
    def make(*args: Any, **kwargs: Any) -> Any:
        from . import waiting

        return waiting.offloading_manager(*args, **kwargs)

    return make


_WRAPPERS = {
    (host.GenerationMixin, "generate"): _wrap_generate,
    (host.GenerationMixin, "_prepare_cache_for_generation"): _wrap_prepare_cache,
    (host.GenerationMixin, "_get_logits_processor"): _wrap_logits_processor,
    (host.GenerationMixin, "_get_stopping_criteria"): _wrap_stopping_criteria,
    (host.GenerationMixin, "init_continuous_batching"): _wrap_continuous_batching,
    (PreTrainedModel, "get_compiled_call"): _wrap_compiled_call,
}
try:
    _batching = host.continuous_batching()
except ImportError:
    # Other versions of transformers have no pages that could be quantized; `_paged` says so.
    pass
else:
    _WRAPPERS |= {
        (_batching.manager, "_create_batch_processor"): _with_paged_attention,
        (_batching.manager, "_run_generation_loop"): _with_paged_attention,
        (_batching.api, "PagedAttentionCache"): _wrap_paged_cache,
        (_batching.api, "OffloadingManager"): _wrap_offloading,
    }
