"""One choice for each side that costs least within a number of bits: the multiple-choice knapsack, solved exactly.

    best = Knapsack(costs, bits)      # costs[side][spec], bits[side][spec]; the costs of the sides are added
    best.choose(1000)                 # {side: spec}, at most 1000 bits in all

Dynamic programming over the total of bits gives the solution for every limit at once (Kellerer, Pferschy and Pisinger,
Knapsack Problems, 2004, chapter 11).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

import numpy as np

Item = TypeVar("Item", bound=Hashable)
Choice = TypeVar("Choice", bound=Hashable)
# The most totals that are told apart. If there are more, bits are rounded up to a coarser unit.
_MOST_TOTALS = 100_000


class Knapsack(Generic[Item, Choice]):
    """The solutions for every limit.

    Args:
        costs: of each choice of each item; infinity for one that must not be taken.
        weights: positive integers of the same choices.
    """

    def __init__(self, costs: Mapping[Item, Mapping[Choice, float]], weights: Mapping[Item, Mapping[Choice, int]]):
        largest = sum(max(weights[item].values()) for item in costs)
        unit = math.gcd(*(weights[item][choice] for item in costs for choice in costs[item]))
        self._unit = max(unit, largest // _MOST_TOTALS)
        self.smallest = sum(min(weights[item][choice] for choice in costs[item]) for item in costs)
        self._items = {item: list(choices) for item, choices in costs.items()}
        self._units = {i: [-(-weights[i][c] // self._unit) for c in choices] for i, choices in self._items.items()}
        totals = sum(max(units) for units in self._units.values()) + 1
        self._best = np.full(totals, np.inf)
        self._best[0] = 0.0
        self._taken: dict[Item, np.ndarray] = {}
        for item, choices in self._items.items():
            following, taken = np.full(totals, np.inf), np.full(totals, -1, dtype=np.int16)
            for number, (choice, units) in enumerate(zip(choices, self._units[item])):
                cost = np.full(totals, np.inf)
                cost[units:] = self._best[: totals - units] + costs[item][choice]
                better = cost < following
                following[better], taken[better] = cost[better], number
            self._best, self._taken[item] = following, taken

    def choose(self, limit: float) -> dict[Item, Choice]:
        """The choices of least total cost whose weights add up to at most `limit`.

        Raises:
            ValueError: there are none.
        """
        totals = self._best[: max(0, math.floor(limit / self._unit) + 1)]
        if not np.isfinite(totals).any():
            raise ValueError(f"limit: {limit} is not allowed; expected at least {self.smallest}")
        total = int(np.argmin(totals))
        found = {}
        for item in reversed(self._items):
            number = int(self._taken[item][total])
            found[item] = self._items[item][number]
            total -= self._units[item][number]
        return {item: found[item] for item in self._items}
