"""Changes of a cache that concern all of its layers are whole: one that was interrupted is noticed, and taken back.

A forward call, a crop or a choice of rows changes layer after layer. An exception, Ctrl-C or lack of memory between
two layers leaves a cache whose layers disagree, and attention would go on without a word. So each change is noted when
it begins and when it ends; the next one refuses to begin where the last one did not end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .cross_attention import CROSS_ATTENTION
from .host import CacheLayerMixin, LinearAttentionCacheLayerMixin
from .layers import QuantizedLayer
from .route import Routes
from .static import is_traced

FORWARD = "forward call"


class WholeChanges:
    """What a cache with `layers` knows about its changes."""

    layers: list[CacheLayerMixin]
    _routes: Routes
    # The change that has begun and not ended, and the tokens of each layer after the last one that ended.
    _unfinished: str | None = None
    _whole: list[int]

    def begin(self, what: str) -> None:
        """Note that a change of all layers has begun. If it never reaches `end`, because of an exception, Ctrl-C or
        lack of memory, the next use is refused, for layers may disagree about their tokens.

        Raises:
            ValueError: see `check_finished`.
        """
        if is_traced():
            return
        self.check_finished()
        self._unfinished, self._whole = what, self._lengths()
        self._routes.in_call = what == FORWARD

    def check_finished(self) -> None:
        """Whether layers agree about their tokens.

        Raises:
            ValueError: an earlier change did not reach its end, or some layers gained other tokens than the rest.
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
        """The change that `begin` noted is complete."""
        # While a CUDA graph is captured nothing happens, and nothing can be asked of the device.
        if is_traced():
            return
        self._unfinished, self._whole = None, self._lengths()
        self._routes.in_call = False

    def _lengths(self) -> list[int]:
        lengths = []
        for layer in self.layers:
            if isinstance(layer, QuantizedLayer):
                lengths.append(layer.length)
            else:
                counts = isinstance(layer, CacheLayerMixin) and not isinstance(layer, CROSS_ATTENTION)
                lengths.append(int(layer.get_seq_length()) if counts else 0)
        return lengths

    def gained(self) -> dict[int, int]:
        """By how many tokens each quantized layer grew since the last complete change."""
        now = self._lengths()
        quantized = (isinstance(layer, QuantizedLayer) for layer in self.layers)
        return {i: new - old for i, (new, old, ours) in enumerate(zip(now, self._whole, quantized)) if ours}

    def _gained(self) -> dict[int, int]:
        """By how many tokens each layer in use grew since the last complete change."""
        now = self._lengths()
        return {i: new - old for i, (new, old) in enumerate(zip(now, self._whole)) if new or old}

    def _can_go_back(self) -> bool:
        """Whether a forward call is all that was interrupted, of layers whose tokens are known by their length."""
        linear = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)
        return self._unfinished in (None, FORWARD) and not linear

    @contextmanager
    def _change(self, what: str) -> Iterator[None]:
        self.begin(what)
        yield
        self.end()

    def _forget_unfinished(self) -> None:
        """Take back the tokens that some layers have of a forward call that did not reach all of them."""
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
