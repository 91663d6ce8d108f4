"""`Tuner`: the config that loses least on this model within a number of bits per element.

    tuner = Tuner(model, documents, held_out, bits=5.0, context=128, base=KVQuantConfig.preset("int4"), folder=folder)
    tuner.seconds()                  # an estimate, before anything long starts
    result = tuner.run()             # result["config"] is what `KVQuantConfig.from_dict` takes

1. Of all specs of a side (format, grid, group, block, rotation), those that others beat are left out, and on a GPU
   those that its kernels do not take. Formats of less than 4 bits take part below 5 bits, because what they save in
   some layers pays for 8 bits in others, and wherever the budget is too small for all others.
2. Each remaining one is scored decode-faithfully, alone, with all other sides dense.
3. As if these losses added up, the best choice for every number of bits is known; a few of them are measured as whole
   caches. So are the best uniform configs: the same spec of keys, and of values, in all layers.
4. From the best whole cache within the budget, single sides are changed and measured *inside of it*, and the best
   choice is taken again, for as long as the measured loss of the whole falls.
5. The result and the best uniform config are scored on a text that no choice has seen.

Every measurement is kept in `folder`, so a killed run goes on, and another budget repeats only the steps 3 to 5.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..config import KVQuantConfig, LayerOverride
from ..quantization import QuantSpec
from .caches import Preset
from .comparison import Settings, compare
from .knapsack import Knapsack
from .layer_errors import SIDES, Side
from .sides import alone, bits, fed, fewest_usual_bits, losses, promising, sides, total_bits
from .store import document_file

KIND = "hf_kvquant tuning"
TUNED, UNIFORM = "tuned", "uniform"
# A spec is left out if another one has no more bits and less than this part of its error.
_SLACK = 1.5
_ERROR_DOCUMENTS = 2
# Points of the curve, and uniform configs of the smallest estimated loss, that are measured as whole caches.
_POINTS, _UNIFORM = 8, 6
# Below these bits, formats of less than 4 bits take part.
_NARROW_BELOW = 5.0
# The curve ends here: more bits than the 8-bit formats have are not worth a search.
_MOST_BITS = 9.0
# In a round every side is changed to its neighbours by bits: this many with fewer, and with more.
_NEIGHBOURS = 2
# A difference of this many standard errors is one.
_CERTAIN = 2.0

Assignment = Mapping[Side, QuantSpec]


class Tuner:
    """A search, as in the module's description.

    Args:
        documents, held_out: token ids `[documents, length]` to choose by, and to judge the result by.
        bits: the most stored bits per element, exact tokens left out.
        context: the number of tokens to prefill of each document; the others are decoded.
        base: where windows of exact tokens and all other fields come from; its specs count as one uniform config.
        folder: where measurements are kept.
        facts: other data that defines the run; see `compare`.
        rounds: the most repetitions of step 4.
        narrow: whether formats of less than 4 bits take part; None: as in step 1.

    Raises:
        ValueError: `bits` is less than any config of this model has (the message names the smallest), or `base` has
            overrides of layers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        documents: torch.Tensor,
        held_out: torch.Tensor,
        bits: float,
        context: int,
        base: KVQuantConfig,
        folder: Path,
        facts: Mapping | None = None,
        rounds: int = 2,
        progress: bool = True,
        narrow: bool | None = None,
    ):
        if base.layers:
            raise ValueError(f"base: overrides of the layers {[i for i, _ in base.layers]}; expected a uniform config")
        base = base.for_model(model.config)
        self.model, self.base, self.budget, self.context, self.rounds = model, base, bits, context, rounds
        self.documents, self.held_out = documents.to(model.device), held_out.to(model.device)
        self.folder, self.facts, self.progress = folder, dict(facts or {}), progress
        self.shapes = sides(model, base)
        self._elements = {side: heads * head_dim for side, (heads, head_dim) in self.shapes.items()}
        self.narrow = self._needs_narrow() if narrow is None else narrow
        free = self._knapsack({side: dict.fromkeys(specs, 0.0) for side, specs in self.choices.items()})
        smallest = free.smallest / sum(self._elements.values())
        if not bits >= smallest:
            raise ValueError(
                f"bits: {bits} is not allowed; expected at least {smallest:g}, the fewest in which this model's cache "
                "can be stored"
            )

    def _needs_narrow(self) -> bool:
        return self.budget < _NARROW_BELOW or not self.budget >= fewest_usual_bits(self.shapes)

    # ---- what is measured -----------------------------------------------------------------------------------------

    @cached_property
    def choices(self) -> dict[Side, list[QuantSpec]]:
        """The specs of each side, by rising bits: those that are promising on any side of the same kind and shape."""
        found = promising(self.model, self.documents[:_ERROR_DOCUMENTS], self.shapes, _SLACK, self.narrow)
        kept: dict[tuple, set[QuantSpec]] = {}
        for side, specs in found.items():
            kept.setdefault((side[1], self.shapes[side]), set()).update(specs)

        def order(side: Side) -> list[QuantSpec]:
            return sorted(kept[side[1], self.shapes[side]], key=lambda s: (bits(s, self.shapes[side][1]), s.code))

        return {side: order(side) for side in self.shapes}

    @cached_property
    def losses_alone(self) -> dict[Side, dict[QuantSpec, float]]:
        """The KL divergence that each spec of each side costs alone; the dense one costs nothing."""
        configs = {
            _name(side, spec): alone(self.base, side, spec)
            for side, specs in self.choices.items()
            for spec in specs
            if not spec.is_dense
        }
        found = self._measured("alone", configs)
        return {
            side: {spec: 0.0 if spec.is_dense else found[_name(side, spec)] for spec in specs}
            for side, specs in self.choices.items()
        }

    def config(self, chosen: Assignment) -> KVQuantConfig:
        """The shortest config: the most frequent specs for all layers, and overrides of the others."""
        usual = {name: Counter(chosen[side] for side in chosen if side[1] == name) for name in SIDES}
        most: dict[str, Any] = {
            name: max(count, key=lambda spec: (count[spec], spec.code)) for name, count in usual.items()
        }
        layers: dict[int, dict[str, Any]] = {}
        for (layer_idx, name), spec in chosen.items():
            if spec != most[name]:
                layers.setdefault(layer_idx, {})[name] = spec
        overrides = tuple((layer_idx, LayerOverride(**specs)) for layer_idx, specs in layers.items())
        config = replace(self.base, **most, layers=overrides, error_feedback=None)
        return fed(config, self.base.error_feedback)

    def bits_of(self, chosen: Assignment) -> float:
        """Stored bits per element, exact tokens left out."""
        return total_bits(self.config(chosen), self.shapes)

    def seconds(self) -> float:
        """About how long `run` takes, from the time of one document."""
        one = {"one": self.base}
        self._scored(self.documents[:1], one)
        begin = time.perf_counter()
        self._scored(self.documents[:1], one)
        # Half of it is the dense cache, which is scored once for many others.
        seconds = (time.perf_counter() - begin) / 2
        specs = sum(len(specs) - 1 for specs in self.choices.values())
        rounds = self.rounds * (2 * _NEIGHBOURS * len(self.shapes) + 2)
        caches = specs + rounds + _POINTS + _UNIFORM + len(KVQuantConfig.preset_names())
        return seconds * (caches * len(self.documents) + 4 * len(self.held_out))

    # ---- the search -----------------------------------------------------------------------------------------------

    def run(self) -> dict:
        """Search, and judge the result; plain data.

        bits, smallest, base        the budget, the smallest possible, and the config with the windows
        config, chosen_bits         the result, and its bits
        alone                       the KL divergence of each spec alone, by layer, side and code
        curve                       of the best choices for several numbers of bits: bits, kl, and the estimate
        uniform                     of the uniform configs within the budget: name, bits, kl, config
        rounds                      the measured KL divergence after each round
        held_out                    the result of `compare` on the held-out text
        verdict                     of `judge`
        """
        best = self._knapsack(self.losses_alone)
        elements = sum(self._elements.values())
        smallest = best.smallest / elements
        levels = sorted({self.budget, *np.linspace(smallest, max(self.budget, _MOST_BITS), _POINTS).round(3)})
        points: dict[str, Assignment] = {
            f"{level:g}": best.choose(level * elements) for level in levels if level >= smallest
        }
        curve = self._measured("curve-" + _at(self.budget), self._configs(points))
        uniform = self._uniform()
        together = self._measured("uniform-" + _at(self.budget), self._configs(uniform))
        chosen, kl = points[f"{self.budget:g}"], curve[f"{self.budget:g}"]
        best_uniform = min(uniform, key=together.__getitem__)
        if together[best_uniform] < kl:
            chosen, kl = uniform[best_uniform], together[best_uniform]
        rounds = [kl]
        for number in range(self.rounds):
            chosen, after = self._improved(chosen, kl, f"round-{number + 1}-{_at(self.budget)}")
            rounds.append(after)
            if not after < kl:
                break
            kl = after
        config = self.config(chosen)
        held_out = self._judged({TUNED: config, UNIFORM: self.config(uniform[best_uniform])})
        return {
            "kind": KIND,
            **self.facts,
            "bits": self.budget,
            "smallest": smallest,
            "base": self.base.to_dict(),
            "config": config.to_dict(),
            "chosen_bits": self.bits_of(chosen),
            "alone": [
                {"layer": i, "side": side, "spec": spec.code, "bits": bits(spec, self.shapes[i, side][1]), "kl": cost}
                for (i, side), costs in self.losses_alone.items()
                for spec, cost in costs.items()
            ],
            "curve": [
                {"bits": self.bits_of(point), "kl": curve[name], "estimate": self._estimate(point)}
                for name, point in points.items()
            ],
            "uniform": [
                {"name": name, "bits": self.bits_of(each), "kl": together[name], "config": self.config(each).to_dict()}
                for name, each in sorted(uniform.items(), key=lambda item: together[item[0]])
            ],
            "rounds": rounds,
            "held_out": held_out,
            "verdict": judge(*self._by_document()),
        }

    def _uniform(self) -> dict[str, Assignment]:
        """The uniform configs within the budget: presets, `base`, and those with the smallest estimated loss."""
        found: dict[str, Assignment] = {}

        def assigned(keys: QuantSpec, values: QuantSpec) -> Assignment:
            return {side: keys if side[1] == "keys" else values for side in self.shapes}

        for name in KVQuantConfig.preset_names():
            preset = KVQuantConfig.preset(name).for_model(self.model.config)
            found[name] = assigned(preset.keys, preset.values)
        if assigned(self.base.keys, self.base.values) not in found.values():
            found["base"] = assigned(self.base.keys, self.base.values)
        # Layers of different shapes may have different choices.
        of_side = {name: [set(specs) for side, specs in self.choices.items() if side[1] == name] for name in SIDES}
        pairs = itertools.product(*(set.intersection(*choices) for choices in of_side.values()))
        within = [pair for pair in pairs if self.bits_of(assigned(*pair)) <= self.budget]
        for keys, values in sorted(within, key=lambda pair: self._estimate(assigned(*pair)))[:_UNIFORM]:
            if assigned(keys, values) not in found.values():
                found[f"{_slug(keys)}_{_slug(values)}"] = assigned(keys, values)
        found = {name: chosen for name, chosen in found.items() if self.bits_of(chosen) <= self.budget}
        # The cheapest specs of all, if nothing uniform of the above is within the budget.
        return found or {"smallest": {side: specs[0] for side, specs in self.choices.items()}}

    def _improved(self, chosen: Assignment, kl: float, stage: str) -> tuple[Assignment, float]:
        """The best of the whole caches that changes of single sides suggest; `chosen` itself if none is better."""
        near: dict[Side, list[QuantSpec]] = {}
        for side, specs in self.choices.items():
            if chosen[side] in specs:
                i = specs.index(chosen[side])
                near[side] = specs[max(0, i - _NEIGHBOURS) : i] + specs[i + 1 : i + 1 + _NEIGHBOURS]
            else:
                # A preset's spec that others beat.
                near[side] = specs[:-1]
        changed = {_name(side, spec): {**chosen, side: spec} for side, specs in near.items() for spec in specs}
        found = self._measured(stage, self._configs(changed))
        costs = {s: {chosen[s]: 0.0} | {spec: found[_name(s, spec)] - kl for spec in near[s]} for s in chosen}
        limit = self.budget * sum(self._elements.values())
        candidates = {"all": self._knapsack(costs).choose(limit), "pair": self._best_pair(chosen, costs)}
        whole = self._measured(f"{stage}-whole", self._configs(candidates))
        best = min(whole, key=whole.__getitem__)
        return (candidates[best], whole[best]) if whole[best] < kl else (chosen, kl)

    def _best_pair(self, chosen: Assignment, costs: Mapping[Side, Mapping[QuantSpec, float]]) -> Assignment:
        """The change of at most two sides with the least estimated loss within the budget: fewer changes, whose losses
        are more likely to add up."""
        changes = [(side, spec) for side, specs in costs.items() for spec in specs]
        spare = self.budget * sum(self._elements.values()) - sum(self._weight(s, spec) for s, spec in chosen.items())
        more = {(s, spec): self._weight(s, spec) - self._weight(s, chosen[s]) for s, spec in changes}
        best, least = dict(chosen), 0.0
        for a, b in itertools.combinations(changes, 2):
            cost = costs[a[0]][a[1]] + costs[b[0]][b[1]]
            if a[0] != b[0] and cost < least and more[a] + more[b] <= spare:
                best, least = {**chosen, a[0]: a[1], b[0]: b[1]}, cost
        return best

    # ---- measuring ------------------------------------------------------------------------------------------------

    def _weight(self, side: Side, spec: QuantSpec) -> int:
        """Stored bits of one token."""
        return round(self._elements[side] * bits(spec, self.shapes[side][1]))

    def _knapsack(self, costs: Mapping[Side, Mapping[QuantSpec, float]]) -> Knapsack:
        return Knapsack(costs, {side: {s: self._weight(side, s) for s in specs} for side, specs in costs.items()})

    def _estimate(self, chosen: Assignment) -> float:
        return sum(self.losses_alone[side].get(spec, math.inf) for side, spec in chosen.items())

    def _configs(self, chosen: Mapping[str, Assignment]) -> dict[str, KVQuantConfig]:
        return {name: self.config(each) for name, each in chosen.items()}

    def _measured(self, stage: str, configs: Mapping[str, KVQuantConfig]) -> dict[str, float]:
        """The mean KL divergence of each config on the documents; infinity if it is not a number."""
        found = self._scored(self.documents, configs, self.folder / stage)
        kl = {name: found[name]["kl"]["mean"] for name in configs}
        return {name: x if x == x else math.inf for name, x in kl.items()}

    def _scored(
        self, documents: torch.Tensor, configs: Mapping[str, KVQuantConfig], folder: Path | None = None
    ) -> dict:
        return losses(self.model, documents, configs, self.context, self.facts, folder, progress=self.progress)

    @property
    def _judged_folder(self) -> Path:
        return self.folder / f"held-out-{_at(self.budget)}"

    def _judged(self, configs: Mapping[str, KVQuantConfig]) -> dict:
        candidates = [Preset(name, config) for name, config in configs.items()]
        return compare(self.model, self.held_out, candidates, Settings(self.context, greedy_tokens=0), self.facts,
                       self._judged_folder, progress=self.progress, by_layer=False)  # fmt: skip

    def _by_document(self) -> list[list[float]]:
        """The mean KL divergence of each held-out document: of the result, and of the uniform config."""

        def each(name: str) -> list[float]:
            files = [document_file(self._judged_folder, name, i) for i in range(len(self.held_out))]
            return [float(np.load(file)["kl"].mean()) for file in files]

        return [each(TUNED), each(UNIFORM)]


def judge(tuned: Sequence[float], uniform: Sequence[float]) -> dict:
    """Whether a config loses less than another on the same documents.

    `margin`: the share of the other's KL divergence that it saves; `difference` of the means with its standard error
    over documents; `beats`: the difference is below zero by more than two standard errors.
    """
    differences = [a - b for a, b in zip(tuned, uniform)]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else math.inf
    other = statistics.fmean(uniform)
    return {
        "margin": 1 - statistics.fmean(tuned) / other if other else 0.0,
        "difference": {"mean": mean, "se": error},
        "beats": mean < -_CERTAIN * error,
    }


def _name(side: Side, spec: QuantSpec) -> str:
    return f"{side[0]}-{side[1]}-{_slug(spec)}"


def _slug(spec: QuantSpec) -> str:
    """The code as a part of a file name."""
    return spec.code.replace(":", "-")


def _at(bits: float) -> str:
    return f"{bits:g}-bits"
