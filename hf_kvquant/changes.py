"""Detects interrupted changes of a cache, and takes them back.

A forward call, a crop or a choice of rows changes layer after layer. An exception, Ctrl-C or lack of memory between
two layers leaves layers with different numbers of tokens, and attention would go on in silence. So the beginning and
the end of each change are noted, and the next change refuses to begin if the last one did not end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .cross_attention import CROSS_ATTENTION
from .host import CacheLayerMixin, LinearAttentionCacheLayerMixin
from .layers import QuantizedLayer
from .route import Routes
from .static import is_traced

FORWARD = "forward call"


class WholeChanges:
    """The part of a cache that keeps track of changes of its `layers`."""

    # Ours and transformers' own, whose common base does not declare all that they have.
    layers: list[Any]
    _routes: Routes
    # The change that has begun and not ended, and the number of tokens of each layer after the last one that ended.
    _unfinished: str | None = None
    _whole: list[int]

    def settle(self) -> None:
        """Wait until the layers are whole in memory that the CPU reads (see `offloading`)."""

    @property
    def quantized_layers(self) -> list[QuantizedLayer]:
        return [layer for layer in self.layers if isinstance(layer, QuantizedLayer)]

    def begin(self, what: str, keeps_weights: bool = False) -> None:
        """Note that a change of all layers has begun. If it never reaches `end`, because of an exception, Ctrl-C or
        lack of memory, the next use is refused, because layers may have different numbers of tokens.

        Args:
            keeps_weights: whether the model that is called shall return attention weights.

        Raises:
            ValueError: see `check_finished`.
        """
        if is_traced():
            return
        self.check_finished()
        self._close_steps(is_whole=False)
        if what != FORWARD:
            self.settle()
        self._unfinished, self._whole = what, self._lengths()
        self._routes.in_call, self._routes.keeps_weights = what == FORWARD, keeps_weights

    def check_finished(self) -> None:
        """Check that layers agree about their tokens.

        Raises:
            ValueError: an earlier change did not reach its end, or layers gained different numbers of tokens.
        """
        gained = self._gained()
        if self._unfinished is not None and (any(gained.values()) or not self._can_go_back()):
            repair = "" if self._unfinished != FORWARD else "; cache.crop(0) forgets the tokens of that call"
            raise ValueError(
                f"the quantized cache was left in the middle of a {self._unfinished}{repair}; cache.reset() empties it"
            )
        if len(set(gained.values())) > 1:
            raise ValueError(
                f"the layers of the quantized cache disagree: since the last whole call they gained {gained} tokens; "
                "cache.crop(0) goes back to what all of them have, cache.reset() empties it"
            )

    def end(self) -> None:
        """Note that the change that has begun is complete."""
        # While a CUDA graph is captured nothing runs, and nothing can be read from the device.
        if is_traced():
            return
        self._close_steps(is_whole=True)
        self._unfinished, self._whole = None, self._lengths()
        self._routes.in_call = False

    def _close_steps(self, is_whole: bool) -> None:
        """The cache may change now: recorded states that are still held become numbers, or, of a call that was
        interrupted, useless."""
        steps = self._routes.steps
        while steps:
            step = steps.pop()
            step.close() if is_whole else step.abandon()

    def _lengths(self) -> list[int]:
        lengths = []
        for layer in self.layers:
            if isinstance(layer, QuantizedLayer):
                lengths.append(layer.tokens)
            else:
                counts = isinstance(layer, CacheLayerMixin) and not isinstance(layer, CROSS_ATTENTION)
                lengths.append(int(layer.get_seq_length()) if counts else 0)
        return lengths

    def gained(self) -> dict[int, int]:
        """The number of tokens that each quantized layer gained since the last complete change."""
        now = self._lengths()
        quantized = (isinstance(layer, QuantizedLayer) for layer in self.layers)
        return {i: new - old for i, (new, old, ours) in enumerate(zip(now, self._whole, quantized)) if ours}

    def _gained(self) -> dict[int, int]:
        """The number of tokens that each layer in use gained since the last complete change."""
        now = self._lengths()
        return {i: new - old for i, (new, old) in enumerate(zip(now, self._whole)) if new or old}

    def _can_go_back(self) -> bool:
        """Whether only a forward call was interrupted, and no layer has linear states, which cannot go back."""
        linear = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)
        return self._unfinished in (None, FORWARD) and not linear

    @contextmanager
    def _change(self, what: str) -> Iterator[None]:
        self.begin(what)
        yield
        self.end()

    def _forget_unfinished(self) -> None:
        """Remove the tokens of a forward call that reached only some of the layers."""
        self._close_steps(is_whole=False)
        for layer in self.quantized_layers:
            layer.recover()
        gained = self._gained()
        if self._unfinished is None and len(set(gained.values())) <= 1:
            return
        target = 0 if self._unfinished else min(gained.values())
        ahead = {layer_idx: tokens - target for layer_idx, tokens in gained.items() if tokens > target}
        try:
            if not self._can_go_back():
                raise RuntimeError("the state of its layers before that is not known")
            for layer_idx, tokens in ahead.items():
                self.layers[layer_idx].crop(-tokens)
        except RuntimeError as error:
            raise ValueError(
                f"the quantized cache was interrupted and cannot go back ({error}); cache.reset() empties it"
            ) from None
        self.end()
