"""The seam to transformers: only this file uses its private names and knows the differences between its versions.

`NEEDS` lists each name with the versions that have it. Importing this file checks that every name exists and takes the
parameters that we pass or replace. If one is missing, it raises `ImportError` with the installed version, the name and
the versions that were tested. So an untested version is never guessed at, nor mistaken for a fault of the model.

transformers 5.24 renamed the argument, the output field and the `model_kwargs` entry of the cache: `past_key_values`
(in Mamba `cache_params`) became `cache`. `CACHE` is the installed version's name; `cache_argument` asks a model.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import Cache, GenerationConfig, PreTrainedConfig, PreTrainedModel

VERSION = transformers.__version__
OLDEST, NEWEST = "5.17", "5.24"
"""The minor versions of transformers between which the tests pass."""


@dataclass(frozen=True)
class Need:
    """A name of transformers: `path` is "module:name" or "module:Class.name", `parameters` those that we rely on, and
    `versions` the minor versions in which the name has this meaning."""

    path: str
    parameters: tuple[str, ...] = ()
    versions: str = f"{OLDEST} to {NEWEST}"

    def check(self) -> None:
        """Raises ImportError if the installed transformers has no such name, or if it lacks one of the parameters."""
        module, _, names = self.path.partition(":")
        try:
            found: Any = importlib.import_module(f"transformers.{module}")
            for name in names.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError):
            raise ImportError(self._missing("")) from None
        if self.parameters:
            known = inspect.signature(found).parameters
            lacking = [name for name in self.parameters if name not in known]
            if lacking:
                raise ImportError(self._missing(f" with the parameter {lacking[0]!r}"))

    def _missing(self, how: str) -> str:
        return (
            f"transformers {VERSION} has no {self.path.replace(':', '.')}{how}, which hf_kvquant "
            f"needs; it was tested with transformers {OLDEST} to {NEWEST}: install one of these, or a newer hf_kvquant"
        )


NEEDS = (
    # Methods that we wrap, with the arguments that we pass to them.
    Need("generation.utils:GenerationMixin.generate", ("inputs", "generation_config")),
    Need(
        "generation.utils:GenerationMixin._prepare_cache_for_generation",
        ("generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length"),
    ),
    Need("generation.utils:GenerationMixin._get_logits_processor", ("generation_config",)),
    Need("generation.utils:GenerationMixin._get_stopping_criteria", ("generation_config",)),
    Need("generation.utils:GenerationMixin.init_continuous_batching", ("generation_config",)),
    Need("modeling_utils:PreTrainedModel.get_compiled_call", ("compile_config",)),
    Need("generation.configuration_utils:ALL_CACHE_IMPLEMENTATIONS"),
    # Methods and attributes of models and configs that we read.
    Need("generation.utils:GenerationMixin.prepare_inputs_for_generation", ("input_ids",)),
    Need("generation.utils:GenerationMixin._supports_default_dynamic_cache"),
    Need("generation.utils:GenerationMixin._get_static_cache_init_shape"),
    Need("modeling_utils:PreTrainedModel._can_set_attn_implementation"),
    Need("modeling_utils:PreTrainedModel._device_mesh"),
    Need("configuration_utils:PreTrainedConfig._attn_implementation"),
    Need("configuration_utils:PreTrainedConfig.get_text_config", ("decoder",)),
    # Attention functions and masks by name.
    Need("modeling_utils:ALL_ATTENTION_FUNCTIONS.get_interface", ("attn_implementation", "default")),
    Need("modeling_utils:AttentionInterface.register", ("key", "value")),
    Need("masking_utils:AttentionMaskInterface"),
    Need("masking_utils:ALL_MASK_ATTENTION_FUNCTIONS"),
    Need("utils.output_capturing:_active_collector.get"),
    # Assisted generation, and guidance.
    Need("generation.utils:GenerationMode.ASSISTED_GENERATION"),
    Need("generation.logits_process:UnbatchedClassifierFreeGuidanceLogitsProcessor", ("model", "use_cache")),
    # The layers of caches.
    Need("cache_utils:Cache.update", ("key_states", "value_states", "layer_idx")),
    Need("cache_utils:CacheLayerMixin"),
    Need("cache_utils:DynamicLayer.crop"),
    Need("cache_utils:DynamicSlidingWindowLayer", ("sliding_window",)),
    Need("cache_utils:StaticLayer", ("max_cache_len",)),
    Need("cache_utils:StaticSlidingWindowLayer", ("max_cache_len", "sliding_window")),
    Need("cache_utils:LinearAttentionLayer", ("number_of_states",)),
    Need("cache_utils:LinearAttentionCacheLayerMixin"),
    Need("cache_utils:LinearAttentionAndFullAttentionLayer", ("number_of_states",)),
    Need("cache_utils:LinearAttentionAndStaticFullAttentionLayer", ("number_of_states", "max_cache_len")),
    Need("cache_utils:LinearAttentionAndSlidingWindowAttentionLayer", ("sliding_window", "number_of_states")),
    Need("cache_utils:LinearAttentionAndStaticSlidingWindowAttentionLayer", ("sliding_window", "number_of_states")),
)

_CONTINUOUS = "generation.continuous_batching"
CONTINUOUS_BATCHING_NEEDS = (
    Need(f"{_CONTINUOUS}.cache:ATTN_TYPE_TO_ALLOCATOR"),
    Need(f"{_CONTINUOUS}.cache:group_layers_by_attn_type", ("config",)),
    Need(f"{_CONTINUOUS}.cache:PagedAttentionMemoryHandler.attention_mask_bytes", ("max_batch_tokens", "num_sectors")),
    Need(f"{_CONTINUOUS}.cache:PagedAttentionCache.update", ("key_states", "value_states", "layer_idx", "kwargs")),
    Need(f"{_CONTINUOUS}.cache:PagedAttentionCache.search_prefix_match", ("request_id", "prompt_ids")),
    Need(f"{_CONTINUOUS}.cache_allocators:FullAttentionCacheAllocator._before_cache_tensor_init", ("bytes_per_page",)),
    Need(f"{_CONTINUOUS}.cache_allocators:FullAttentionCacheAllocator._after_cache_tensor_init", ("pool",)),
    Need(f"{_CONTINUOUS}.cache_allocators:FullAttentionCacheAllocator.get_write_indices", ("request_id",)),
    Need(f"{_CONTINUOUS}.continuous_api:PagedAttentionCache", ("continuous_batching_config",)),
    Need(f"{_CONTINUOUS}.continuous_api:OffloadingManager", ("cache", "cpu_offload_space_gib")),
    Need(f"{_CONTINUOUS}.offloading_manager:OffloadingManager._offload_to_cpu", ("victims", "victim_block_tables")),
    Need(f"{_CONTINUOUS}.offloading_manager:OffloadingManager.restore_scheduled_requests", ("requests_in_batch",)),
    Need(f"{_CONTINUOUS}.offloading_manager:OffloadingManager.free_request_cpu_cache", ("state",)),
    Need(f"{_CONTINUOUS}.continuous_api:ContinuousBatchingManager._run_generation_loop"),
    Need(f"{_CONTINUOUS}.continuous_api:ContinuousBatchingManager._create_batch_processor"),
    Need(f"{_CONTINUOUS}.utils:find_head_dim", ("config",)),
    Need(f"{_CONTINUOUS}.utils:find_num_key_value_heads", ("config",)),
    Need("generation.configuration_utils:ContinuousBatchingConfig", ("page_size", "cpu_offload_space")),
)
"""What quantized pages need; without these names everything but quantized pages works."""


def continuous_batching() -> SimpleNamespace:
    """The names of transformers' continuous batching that quantized pages build on.

    Raises:
        ImportError: this version of transformers is too old, or lacks one of them.
    """
    if tuple(int(number) for number in VERSION.split(".")[:2]) < (5, 23):
        raise ImportError(f"quantized pages need transformers 5.23 or newer, and this is {VERSION}")
    for need in CONTINUOUS_BATCHING_NEEDS:
        need.check()
    cache: Any = importlib.import_module(f"transformers.{_CONTINUOUS}.cache")
    api: Any = importlib.import_module(f"transformers.{_CONTINUOUS}.continuous_api")
    offloading: Any = importlib.import_module(f"transformers.{_CONTINUOUS}.offloading_manager")

    @contextmanager
    def replaced(allocators: dict[str, Any], handler: type) -> Iterator[None]:
        """Within this context caches have these allocators, by kind of layers, and this handler plans their memory."""
        table, planned_by = cache.ATTN_TYPE_TO_ALLOCATOR, cache.PagedAttentionMemoryHandler
        originals = dict(table)
        table.update(allocators)
        cache.PagedAttentionMemoryHandler = handler
        try:
            yield
        finally:
            table.update(originals)
            cache.PagedAttentionMemoryHandler = planned_by

    return SimpleNamespace(
        api=api,
        manager=api.ContinuousBatchingManager,
        options=configuration_utils.ContinuousBatchingConfig,
        OffloadingManager=offloading.OffloadingManager,
        PagedAttentionCache=cache.PagedAttentionCache,
        PagedAttentionMemoryHandler=cache.PagedAttentionMemoryHandler,
        FullAttentionCacheAllocator=cache.FullAttentionCacheAllocator,
        find_head_dim=cache.find_head_dim,
        find_num_key_value_heads=cache.find_num_key_value_heads,
        group_layers=cache.group_layers_by_attn_type,
        replaced=replaced,
    )


SERVER_NEEDS = (
    Need("cli.serve:Serve", ("force_model", "continuous_batching", "attn_implementation", "device", "dtype", "port")),
    Need("cli.serving.model_manager:ModelManager.load_model_and_processor"),
)


def run_server(prepare: Callable[[PreTrainedModel], None], **options: Any) -> None:
    """Run transformers' server until it is stopped; `options` are those of its command.

    Args:
        prepare: is called with the model whenever the server takes one, also when it has it already.

    Raises:
        ImportError: this version of transformers has no such server, or a package that it needs is missing.
    """
    continuous_batching()
    missing = [name for name in ("fastapi", "uvicorn", "openai", "pydantic") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"the server needs {', '.join(missing)}: pip install 'transformers[serving]'")
    for need in SERVER_NEEDS:
        need.check()
    manager = importlib.import_module("transformers.cli.serving.model_manager").ModelManager
    load = manager.load_model_and_processor

    def prepared(self: Any, *args: Any, **kwargs: Any) -> Any:
        model, processor = load(self, *args, **kwargs)
        prepare(model)
        return model, processor

    manager.load_model_and_processor = prepared
    try:
        importlib.import_module("transformers.cli.serve").Serve(**options)
    finally:
        manager.load_model_and_processor = load


for need in NEEDS:
    need.check()

# After the check, because a plain import of a missing name gives a worse message.
from transformers.cache_utils import (  # noqa: E402
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.generation import GenerationMixin, GenerationMode, configuration_utils  # noqa: E402
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface  # noqa: E402
from transformers.utils.output_capturing import _active_collector  # noqa: E402

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "CACHE",
    "CACHE_NAMES",
    "CONTINUOUS_BATCHING_NEEDS",
    "NEEDS",
    "NEWEST",
    "OLDEST",
    "VERSION",
    "AttentionInterface",
    "AttentionMaskInterface",
    "CacheLayerMixin",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GenerationMixin",
    "GenerationMode",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "LinearAttentionAndStaticFullAttentionLayer",
    "LinearAttentionAndStaticSlidingWindowAttentionLayer",
    "LinearAttentionCacheLayerMixin",
    "LinearAttentionLayer",
    "StaticLayer",
    "StaticSlidingWindowLayer",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "attn_implementation",
    "auto_class_names",
    "cache_argument",
    "cache_inputs",
    "cache_of",
    "can_set_attn_implementation",
    "configuration_utils",
    "context_length",
    "continuous_batching",
    "cross_attention_layers",
    "generation_state",
    "loses_soft_prompts",
    "records_attention_weights",
    "run_server",
    "set_attn_implementation",
    "shard",
    "static_cache_shape",
    "supports_cache",
    "takes",
    "text_length",
]

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""The names of the cache in a forward and in its output: from 5.24 on; before 5.24; in Mamba before 5.24."""


def _cache_name() -> str:
    """The first of `CACHE_NAMES` that the installed version takes."""
    for name in CACHE_NAMES:
        need = Need("generation.utils:GenerationMixin.prepare_inputs_for_generation", (name,))
        try:
            need.check()
        except ImportError as error:
            missing = error
        else:
            return name
    raise missing


CACHE = _cache_name()


def cache_argument(model: torch.nn.Module) -> str | None:
    """The argument under which the model, or a model inside of it, takes a cache; None if no forward has one."""
    parts = {type(part): None for part in model.modules() if isinstance(part, PreTrainedModel)}
    named = [name for part in parts for name in CACHE_NAMES if name in inspect.signature(part.forward).parameters]
    return CACHE if CACHE in named else next(iter(named), None)


def loses_soft_prompts(model: PreTrainedModel) -> bool:
    """Whether PEFT's prompt or prefix tuning prepares the model's inputs, and knows the cache by another name only.

    Then it takes every step for the first one: it adds the prompt again, or replaces the prefix by an empty cache.
    """
    prepare: Any = model.prepare_inputs_for_generation
    config: Any = getattr(getattr(prepare, "__self__", None), "active_peft_config", None)
    # An encoder takes these before generation begins.
    taken = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING") if model.config.is_encoder_decoder else ()
    if not getattr(config, "is_prompt_learning", False) or config.peft_type in taken:
        return False
    return CACHE not in inspect.unwrap(prepare).__code__.co_consts


def cross_attention_layers(config: PreTrainedConfig) -> set[int]:
    """The layers of a decoder that attend to other tokens than its own (in Mllama, to image tokens)."""
    return set(getattr(config.get_text_config(decoder=True), "cross_attention_layers", None) or ())


def context_length(config: PreTrainedConfig) -> int | None:
    """The number of tokens that the model was made for, or None if its config does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


GENERATION_STATE = ("rope_deltas", "_cached_decode_position_ids", "_prefill_len")
"""Attributes in which models keep state of a generation outside of the cache: offsets of positions after images
(Qwen-VL and 23 others), and the positions of an image that is being generated (GLM-Image)."""


def generation_state(model: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, str]]:
    """The module and attribute of each `GENERATION_STATE` in the model, under names that hold for every instance."""
    return {
        f"{type(module).__name__}.{name}": (module, name)
        for module in model.modules()
        for name in GENERATION_STATE
        if name in vars(module)
    }


def shard(model: PreTrainedModel) -> str | None:
    """Which part of a model this process holds: its place among the processes, or None if it holds the whole model."""
    mesh = model._device_mesh
    return None if mesh is None or mesh.size() == 1 else f"{list(mesh.get_coordinate())} of {list(mesh.shape)}"


def takes(model: torch.nn.Module, argument: str) -> bool:
    """Whether the model's forward has a parameter of this name."""
    return argument in inspect.signature(model.forward).parameters


def cache_inputs(model: torch.nn.Module, cache: Cache) -> dict:
    """The keyword arguments of a forward call that uses the cache."""
    return {cache_argument(model) or CACHE: cache, "use_cache": True}


def cache_of(output: Mapping) -> Cache | None:
    """The cache in a model's output, or in the dictionary that generation keeps."""
    # The search begins with the newest name and stops at a hit, because transformers warns when an old one is read.
    name = next((name for name in CACHE_NAMES if name in output), None)
    return None if name is None else output[name]


def auto_class_names(mapping: str) -> dict[str, str | tuple[str, ...]]:
    """The names of an auto class's model classes, by model type; none if this release has no such mapping."""
    from transformers.models.auto import modeling_auto

    return getattr(modeling_auto, mapping, {})


def attn_implementation(config: PreTrainedConfig) -> str | None:
    """The name of the attention function that modules with this config call."""
    return getattr(config, "_attn_implementation", None)


def set_attn_implementation(config: PreTrainedConfig, name: str | None, nested: bool = False) -> None:
    """Set that name for this config alone, or for the configs inside of it, too."""
    if nested:
        config._attn_implementation = name
    else:
        config._attn_implementation_internal = name


def can_set_attn_implementation(model: PreTrainedModel) -> bool:
    """Whether the model's class looks its attention function up by name."""
    return model._can_set_attn_implementation()


def supports_cache(model: PreTrainedModel) -> bool:
    """Whether `generate` would make a `DynamicCache` for the model."""
    generates: Any = model
    return generates._supports_default_dynamic_cache() and cache_argument(model) is not None


@contextmanager
def keeps_caches(model: torch.nn.Module) -> Iterator[None]:
    """Within this context the model is without gradient checkpointing, in which its layers get no cache."""
    parts = [part for part in model.modules() if getattr(part, "gradient_checkpointing", False)]
    for part in parts:
        part.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for part in parts:
            part.gradient_checkpointing = True  # type: ignore[assignment]


def head_dims(config: PreTrainedConfig) -> tuple[int, int] | None:
    """The lengths of a head's cached keys and values in a model of this config; None if they are not known before they
    arrive."""
    config = config.get_text_config(decoder=True)
    if getattr(config, "kv_lora_rank", None) is not None:
        return None
    known = getattr(config, "head_dim", None)
    width, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
    if known is None and isinstance(width, int) and isinstance(heads, int):
        known = width // heads
    if not isinstance(known, int):
        return None
    of_values = getattr(config, "v_head_dim", None)
    return known, of_values if isinstance(of_values, int) else known


def text_length(generation_config: GenerationConfig, mask: torch.Tensor | None) -> int | None:
    """The number of tokens that `generate` was given; None if it is not known.

    Args:
        mask: that of these tokens. transformers 5.24 drops a mask of ones and keeps its length.
    """
    return getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]


def static_cache_shape(model: PreTrainedModel) -> tuple[int, int] | None:
    """`num_heads` and `head_dim` for allocating a static cache of the model early; None if they are not known."""
    generates: Any = model
    return generates._get_static_cache_init_shape()


def records_attention_weights() -> bool:
    """Whether the running call of the model collects attention weights; most models do not pass that argument on."""
    return "attentions" in (_active_collector.get() or ())


def asks_for_weights(module: torch.nn.Module) -> bool:
    """Whether the module's config asks every call for attention weights."""
    config = getattr(module, "config", None)
    if isinstance(config, PreTrainedConfig) and not torch.compiler.is_dynamo_compiling():
        # The attribute `output_attentions` of a config runs through five Python functions, in every layer of a step.
        own = object.__getattribute__(config, "__dict__").get("_output_attentions", config)
        if own is not config:
            return bool(own)
    return bool(getattr(config, "output_attentions", False))
