"""Decode over the latents of multi-head latent attention (MLA) as stored, with the up-projections absorbed.

Such a module caches a latent c `[batch, 1, n, rank]` and a rotary key r `[batch, 1, n, rope_dim]`, and expands both to
keys and values of every head. A decode step does not need the expansion:

    score = q_nope . (W_key c) + q_rope . r = (q_nope W_key) . c + q_rope . r
    output = W_value (sum of weights x c)

So the operator attends with `q_nope W_key` to the latents, which are its keys and its values, and with `q_rope` to the
rotary keys, the second part of its keys (`ops.latent_attention`).

Source: https://arxiv.org/abs/2405.04434, section 2.1.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from . import ops
from .recorded import RecordedStates
from .route import layer_of_fresh, say_dequantized, tagged
from .states import QuantizedStates

# The method by which a module expands latents and rotary keys, and the sizes that its projection's weight has.
EXPANSION = "expand_kv"
_SIZES = ("num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


class LatentStates(NamedTuple):
    """The latents and rotary keys of one layer, as stored, in place of the keys and values that they expand to.

    Args:
        expand: the module's own expansion of tensors.
        num_heads, head_dim: those of the expanded keys, or values.
        obstacle: why the module's weight cannot be absorbed now, or None.
    """

    latents: QuantizedStates
    rotary: QuantizedStates
    expand: Callable
    num_heads: int
    head_dim: int
    obstacle: str | None = None

    @property
    def shape(self) -> torch.Size:
        """That of the expanded keys, or values."""
        batch, _, length, _ = self.latents.shape
        return torch.Size((batch, self.num_heads, length, self.head_dim))

    def read(self, q_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that the newest `q_len` queries read, expanded; see `QuantizedStates.read`."""
        return self.expand(self.latents.read(q_len), self.rotary.read(q_len))


@contextmanager
def patched(model: torch.nn.Module) -> Iterator[None]:
    """Within this context the model's latent attention modules hand stored latents on to attention."""
    entered = []
    try:
        for module in model.modules():
            if not _is_latent(module):
                continue
            with _lock:
                _entered[module] = _entered.get(module, 0) + 1
                entered.append(module)
                if _entered[module] == 1:
                    setattr(module, EXPANSION, _expansion(module, getattr(module, EXPANSION)))
        yield
    finally:
        for module in entered:
            with _lock:
                _entered[module] -= 1
                if not _entered[module]:
                    del _entered[module]
                    delattr(module, EXPANSION)


_lock = threading.Lock()
_entered: dict[torch.nn.Module, int] = {}


def _is_latent(module: Any) -> bool:
    has_sizes = all(isinstance(getattr(module, name, None), int) for name in _SIZES)
    # An instance's own method is someone else's patch.
    own = vars(module).get(EXPANSION) is not None and module not in _entered
    return has_sizes and not own and callable(getattr(module, EXPANSION, None)) and hasattr(module, "kv_b_proj")


def _expansion(module: Any, expand: Callable) -> Callable:
    """The module's expansion of tensors, which returns stored latents as `LatentStates`. The layers of the cache learn
    from it whether they may return them (see `route`)."""
    found: str | None = None

    def expand_kv(latents: Any, rotary: Any) -> tuple[Any, Any]:
        nonlocal found
        if isinstance(latents, QuantizedStates):
            states = LatentStates(
                latents, rotary, expand, module.num_heads, module.qk_nope_head_dim + module.qk_rope_head_dim,
                _not_foldable(module, latents),
            )  # fmt: skip
            return states, states._replace(head_dim=module.v_head_dim)
        if isinstance(latents, RecordedStates):
            # A step of a layer that has not learned it: the first one after a prefill outside of this context.
            layer, why = latents.meaning.step.layer(), found or "latents whose expansion is not known yet"
            latents, rotary = (x.numbers(why) for x in (latents, rotary))
        elif hasattr(latents, "expanded"):
            # Those of `scoring`.
            return latents.expanded(module, rotary, expand)
        else:
            layer = layer_of_fresh(latents, rotary)
            latents, rotary = getattr(latents, "plain", latents), getattr(rotary, "plain", rotary)
        kept = getattr(latents, "kept", None)
        key, value = expand(latents, rotary)
        if kept is not None:
            key.kept = kept
        if layer is None or torch.compiler.is_compiling():
            return key, value
        found = obstacle_of_expansion(module, latents, rotary, key, value)
        if found is not None:
            say_dequantized(found)
            return key, value
        return tagged(key, layer), tagged(value, layer)

    return expand_kv


def obstacle_of_expansion(
    module: Any, latents: torch.Tensor, rotary: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> str | None:
    """The reason why the up-projection of these latents to these keys and values cannot be absorbed, or None."""
    return _not_foldable(module, latents) or _not_absorbed(module, latents, rotary, key, value)


def _up_projection(module: Any) -> torch.Tensor:
    """The weight that expands a latent, `[num_heads, qk_nope_head_dim + v_head_dim, rank]`."""
    return module.kv_b_proj.weight.view(module.num_heads, -1, module.kv_lora_rank)


def _not_foldable(module: Any, latents: torch.Tensor | QuantizedStates) -> str | None:
    """The reason why the weight of the up-projection is not all that it does, or None."""
    projection = module.kv_b_proj
    if type(projection) is not torch.nn.Linear or projection.bias is not None:
        bias = " with a bias" if getattr(projection, "bias", None) is not None else ""
        return f"a {type(projection).__name__}{bias} as kv_b_proj (expected a Linear layer without bias)"
    if projection.weight.dtype != latents.dtype or projection.weight.device != latents.device:
        return f"{projection.weight.dtype} weights on {projection.weight.device} in kv_b_proj"
    # An instance's own `forward` is how offloading wraps a module.
    if projection._forward_hooks or projection._forward_pre_hooks or "forward" in vars(projection):
        return "hooks on kv_b_proj"
    return None


def _not_absorbed(
    module: Any, latents: torch.Tensor, rotary: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> str | None:
    """The reason why keys and values are not what the formula in the docstring above makes of latents and rotary keys,
    or None. The last token is expanded again, and compared."""
    rank, nope = module.kv_lora_rank, module.qk_nope_head_dim
    if latents.shape[-1] != rank or rotary.shape[-1] != module.qk_rope_head_dim or latents.shape[1] != 1:
        return f"latents of shape {tuple(latents.shape)}"
    if module.kv_b_proj.weight.shape != (module.num_heads * (nope + module.v_head_dim), rank):
        return f"a weight of shape {tuple(module.kv_b_proj.weight.shape)} in kv_b_proj"
    with torch.no_grad():
        both = latents[:, :, -1:] @ _up_projection(module).mT
        expected = torch.cat([both[..., :nope], rotary[:, :, -1:].expand(-1, both.shape[1], -1, -1)], dim=-1)
        for name, ours, theirs in (("keys", expected, key), ("values", both[..., nope:], value)):
            theirs = theirs[:, :, -1:]
            if ours.shape != theirs.shape or not _is_near(ours, theirs):
                return f"{name} of {type(module).__name__} that are not kv_b_proj's product with the latents"
    return None


def _is_near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors differ by rounding; a NaN equals a NaN."""
    compute = torch.promote_types(ours.dtype, torch.float32)
    both = ours.isnan() & theirs.isnan()
    distance = (ours.to(compute) - theirs.to(compute)).masked_fill(both, 0).norm()
    return bool(distance <= 8 * torch.finfo(ours.dtype).eps * ours.to(compute).masked_fill(both, 0).norm())


def obstacle_of(states: LatentStates, query: torch.Tensor, kwargs: dict) -> str | None:
    """The reason why the operator cannot read these latents in a call of attention with these arguments, or None."""
    latents = states.latents
    if states.obstacle is not None:
        return states.obstacle
    for name in ("softcap", "position_bias", "sinks"):
        if kwargs.get(name) is not None and not (name == "softcap" and kwargs[name] == 0):
            return f"the attention argument {name!r} over latents"
    if query.dtype != latents.dtype:
        return f"queries of {query.dtype} over latents of {latents.dtype}"
    return _obstacle_of_backend(latents.backend, latents.device.type, latents.dtype, latents.head_dim)


@torch.compiler.assume_constant_result
def _obstacle_of_backend(requested: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    # Here, because an import of the package loads no compiled backend.
    from .backends.arguments import MAX_HEAD_DIM
    from .backends.specialisation import HEAD_DIMS, takes_head_dim

    backend = ops.choose_backend(requested, device_type, dtype)
    if backend == "cuda" and not takes_head_dim(head_dim):
        return f"latents of {head_dim} elements on a GPU (expected {HEAD_DIMS})"
    if backend == "cpu" and (head_dim % 16 or head_dim > MAX_HEAD_DIM):
        return f"latents of {head_dim} elements (expected a multiple of 16 up to {MAX_HEAD_DIM})"
    return None


def attend(
    module: Any,
    query: torch.Tensor,
    states: LatentStates,
    mask: torch.Tensor | None,
    s_aux: torch.Tensor | None,
    *,
    scaling: float,
) -> torch.Tensor:
    """Attention of the newest queries over stored latents.

    Args:
        query: `[batch, num_heads, q_len, qk_nope_head_dim + qk_rope_head_dim]`.
        mask, s_aux: as in `reference.decode_attention`.

    Returns:
        `[batch, num_heads, q_len, v_head_dim]`.
    """
    weight, nope = _up_projection(module), module.qk_nope_head_dim
    absorbed = query[..., :nope] @ weight[:, :nope]
    output, _ = ops.latent_attention(
        absorbed, query[..., nope:], states.latents, states.rotary, mask, s_aux, scaling=scaling
    )
    # The weight's rows as they are stored: with the weight transposed, the product takes four times as long.
    return (weight[:, nope:] @ output.mT).mT
