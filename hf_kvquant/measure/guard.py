"""`check`: whether a config is safe for a model, in minutes; if not, which layers break, why, and what repairs them.

First the whole cache is measured. Only if it fails are its sides measured, each alone with all others dense. The worst
sides *break*, as few as possible: those without which the others add up to half of the allowed divergence. In place of
each the cheapest spec is taken that costs no more than an equal share of the allowed divergence. Errors of layers need
not add, so the repaired cache is measured as a whole; if it fails too, less is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel

from ..config import KVQuantConfig
from ..quantization import FORMATS, QuantSpec
from .caches import DENSE
from .layer_errors import SIDES, Side, dense_states, layer_errors
from .outliers import stand_outs
from .sides import alone, is_narrow, losses, promising, sides, total_bits, with_specs

# Each attempt at a repair allows this part of the divergence that the one before did.
_STRICTER = 0.25
_ATTEMPTS = 3
_WHOLE = "whole"


@dataclass(frozen=True)
class Limits:
    """What a cache may cost.

    Args:
        kl: the most mean KL divergence (nats) of the next token's distribution from the dense cache's.
        agreement: the least share of tokens whose most likely successor is the dense cache's.
    """

    kl: float = 0.05
    agreement: float = 0.9

    def __post_init__(self) -> None:
        if not self.kl > 0:
            raise ValueError(f"kl: {self.kl} is not allowed; expected a number above 0")
        if not 0 <= self.agreement <= 1:
            raise ValueError(f"agreement: {self.agreement} is not allowed; expected a share from 0 to 1")

    def allow(self, figures: Mapping) -> bool:
        """Whether figures of `losses` are within the limits. A NaN is not."""
        return figures["kl"]["mean"] <= self.kl and figures["agreement"]["mean"] >= self.agreement


def check(
    model: PreTrainedModel,
    documents: torch.Tensor,
    config: KVQuantConfig,
    context: int,
    limits: Limits = Limits(),
    progress: bool = True,
) -> dict:
    """Measure a config on documents `[documents, length]`, decode-faithfully after `context` tokens; plain data.

        passed, kl, agreement, perplexity_change    of the whole cache; see `metrics.summarize`
        bits                                        stored per element, exact tokens left out
        layer_errors                                of `layer_errors`, centred
        worst                                       the side with the largest of them: layer, side, error
        broken                                      if it failed: layer, side, kl alone, causes (see `outliers`), and
                                                    `instead` (a spec) of each side that breaks, the worst first
        repaired                                    if it failed: passed, kl, agreement, bits and config with `instead`

    Raises:
        ValueError: the documents are too short for `context`, the model has nothing to quantize, or its own logits are
            not finite.
    """
    config = config.for_model(model.config)
    shapes = sides(model, config)

    def measured(configs: Mapping[str, KVQuantConfig]) -> dict[str, dict]:
        return losses(model, documents, configs, context, {}, progress=progress)

    documents = documents.to(model.device)
    first = measured({_WHOLE: config})
    figures = first[_WHOLE]
    if not math.isfinite(first[DENSE]["perplexity"]["mean"]):
        raise ValueError("model: its own logits are not finite, so nothing can be compared with them")
    errors = layer_errors(model, documents, {_WHOLE: config}, centred=True)[_WHOLE]
    known = [(error, i, side) for side in SIDES for i, error in enumerate(errors[side]) if error is not None]
    worst = max(known, key=lambda entry: (math.isnan(entry[0]), entry[0]), default=None)
    result = {
        "limits": asdict(limits),
        "passed": limits.allow(figures),
        **_summary(figures),
        "bits": total_bits(config, shapes),
        "layer_errors": errors,
        "worst": None if worst is None else {"layer": worst[1], "side": worst[2], "error": worst[0]},
        "broken": [],
        "repaired": None,
    }
    if result["passed"]:
        return result

    quantized = [side for side in shapes if not _spec(config, side).is_dense]
    names = {side: f"{side[0]}-{side[1]}" for side in quantized}
    found = measured({name: alone(config, side) for side, name in names.items()})
    costs = {side: _kl(found[name]) for side, name in names.items()}
    # If only the agreement is outside of its limit, the divergence must still fall.
    allowed = min(limits.kl, _kl(figures))
    narrow = any(is_narrow(_spec(config, side)) for side in quantized)
    choices = promising(model, documents, {side: shapes[side] for side in quantized}, narrow=narrow)
    alternatives: dict[Side, dict[QuantSpec, float]] = {}
    for _ in range(_ATTEMPTS):
        broken = _breaking(costs, allowed / 2)
        new = {f"{names[s]}-{spec.code}": (s, spec) for s in broken if s not in alternatives for spec in choices[s]}
        figures_of = measured({name: alone(config, side, spec) for name, (side, spec) in new.items()}) if new else {}
        for name, (side, spec) in new.items():
            alternatives.setdefault(side, {})[spec] = _kl(figures_of[name])
        instead = {side: _cheapest(alternatives[side], allowed / len(quantized)) for side in broken}
        repaired = with_specs(config, instead)
        after = measured({_WHOLE: repaired})[_WHOLE]
        if limits.allow(after):
            break
        allowed *= _STRICTER
    why = _causes(model, documents, config, broken)
    result["broken"] = [
        {
            "layer": side[0], "side": side[1], "kl": costs[side], "causes": why[side],
            "instead": repaired.to_dict()["layers"][side[0]][side[1]],
        }
        for side in broken
    ]  # fmt: skip
    result["repaired"] = {
        "passed": limits.allow(after), **_summary(after), "bits": total_bits(repaired, shapes),
        "config": repaired.to_dict(),
    }  # fmt: skip
    return result


def _summary(figures: Mapping) -> dict:
    return {name: figures[name] for name in ("kl", "agreement", "perplexity_change")}


def _kl(figures: Mapping) -> float:
    """The mean; infinity if it is not a number."""
    kl = figures["kl"]["mean"]
    return kl if kl == kl else math.inf


def _spec(config: KVQuantConfig, side: Side) -> QuantSpec:
    return config.for_layer(side[0])[SIDES.index(side[1])]


def _breaking(costs: Mapping[Side, float], rest: float) -> list[Side]:
    """The fewest sides (at least one) without which the costs of the others add up to at most `rest`; worst first."""
    order = sorted(costs, key=lambda side: -costs[side])
    count = next(n for n in range(1, len(order) + 1) if sum(costs[side] for side in order[n:]) <= rest)
    return order[:count]


def _cheapest(costs: dict[QuantSpec, float], share: float) -> QuantSpec:
    """The first spec that costs no more than the share; the dense one, the last, costs nothing."""
    return next(spec for spec, cost in costs.items() if cost <= share)


def _causes(
    model: PreTrainedModel, documents: torch.Tensor, config: KVQuantConfig, broken: list[Side]
) -> dict[Side, list[dict]]:
    """What stands out on each side, in the document in which it stands out most."""
    found: dict[Side, list[dict]] = {side: [] for side in broken}
    for number, ids in enumerate(documents.split(1)):
        states = dense_states(model, ids)
        for side in broken:
            if side in states:
                entries = stand_outs(states[side], ids, FORMATS[_spec(config, side).format].reach)
                found[side] += [{"document": number, **entry} for entry in entries]
    for side, entries in found.items():
        best: dict[str, dict] = {}
        for entry in sorted(entries, key=lambda entry: -entry["ratio"]):
            best.setdefault(entry["kind"], entry)
        found[side] = list(best.values())
    return found


def explained(cause: Mapping) -> str:
    """An entry of `causes` in words."""
    if cause["kind"] == "nonfinite":
        return f"head {cause['head']} is not finite at position {cause['position']} of document {cause['document']}"
    if cause["kind"] == "tiny":
        return f"no element of head {cause['head']} is above {cause['largest']:.1e}, too small for scales in FP16"
    where = f"channel {cause['channel']} of head {cause['head']}"
    times = f"{cause['ratio']:,.0f} times the typical spread"
    if cause["kind"] == "constant":
        return f"{where} has a constant of {times}"
    if cause["kind"] == "channel":
        return f"{where} varies by {times}"
    return f"token {cause['token']} (position {cause['position']}) has {times} in {where}"
