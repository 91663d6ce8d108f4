"""`compare`: scores every cache on every document, document by document, and sums up the results.

The dense cache's logits of one document are the reference of that document, and are not kept longer. Its greedy
continuation of the document's context is fed to every cache: the first token at which a cache would have chosen
another one is where its own greedy text would first differ.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..host import context_length
from ..saving import weights_sum
from ..scoring import cache_read_share
from .caches import DENSE, Candidate, Dense, Preset
from .generation import continued
from .layer_errors import layer_errors
from .metrics import compare_logits, position_bins, summarize
from .store import Store
from .weighing import LONG, bytes_per_element, bytes_per_element_long

KIND = "hf_kvquant comparison"
# Greedy texts are written together, in batches of about this many tokens.
_CONTINUED_TOKENS = 8192


@dataclass(frozen=True)
class Settings:
    """Which tokens of each document are scored.

    Args:
        context: the number of tokens to prefill (with un-quantized attention); the others are decoded.
        first_scored: the first token that is scored. None: the first whose logits read the cache, `context + 1`.
        greedy_tokens: length of the greedy continuation of the context; 0 for none.
    """

    context: int = 128
    first_scored: int | None = None
    greedy_tokens: int = 64

    @property
    def first(self) -> int:
        """The first row whose logits are scored; row r predicts token r + 1."""
        return (self.context + 1 if self.first_scored is None else self.first_scored) - 1

    def check(self, length: int, longest: int | None) -> None:
        """Raise `ValueError` if this does not fit documents of `length` tokens and a model made for `longest`."""
        if not 1 <= self.context <= length:
            raise ValueError(f"context: {self.context} is not allowed; expected 1 to {length} (the document's length)")
        if not 0 <= self.first <= length - 2:
            where = "context" if self.first_scored is None else "first_scored"
            value = self.context if self.first_scored is None else self.first_scored
            raise ValueError(
                f"{where}: {value} leaves no token to score; expected at most "
                f"{length - (2 if self.first_scored is None else 1)} of a document of {length} tokens"
            )
        if self.greedy_tokens < 0:
            raise ValueError(f"greedy_tokens: {self.greedy_tokens} is not allowed; expected 0 or more")
        for name, needed in (("document", length), ("context + greedy_tokens", self.context + self.greedy_tokens)):
            if longest is not None and needed > longest:
                raise ValueError(f"{name}: {needed} tokens are not allowed; expected at most the model's {longest}")


def compare(
    model: PreTrainedModel,
    documents: torch.Tensor,
    candidates: Sequence[Candidate],
    settings: Settings,
    facts: dict,
    folder: Path | None = None,
    progress: bool = True,
    by_layer: bool = True,
    weigh: bool = True,
) -> dict:
    """Score the dense cache and `candidates` on the same tokens; the result, also in `folder/result.json`.

    A peer that cannot run is listed under `skipped` with the reason; every other error raises.

    Args:
        documents: token ids `[documents, length]`, without padding.
        facts: other data that defines the run (names of model and text, versions). It is saved with the run, and in a
            folder that was begun a change of it is refused. `machine` is saved only with the result.
        folder: the folder for finished parts, so that a killed run can go on; None keeps nothing.
        by_layer: measure the errors of each layer, too.
        weigh: measure the bytes of each cache, too.

    Raises:
        ValueError: the settings do not fit the documents, or the folder was begun with others.
    """
    settings.check(documents.shape[1], context_length(model.config))
    candidates = [Dense(), *candidates]
    machine = facts.get("machine")
    plan = {
        **{name: value for name, value in facts.items() if name != "machine"},
        "weights": weights_sum(model),
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "documents": documents.shape[0],
        "document_length": documents.shape[1],
        "documents_sha256": hashlib.sha256(documents.cpu().numpy().astype("<i4").tobytes()).hexdigest(),
        "settings": asdict(settings),
        "caches": {candidate.name: {"kind": candidate.kind, **candidate.settings()} for candidate in candidates},
    }
    store = Store(folder, plan)
    weights, skipped = _weigh(model, candidates, documents.shape[1], settings) if weigh else ({}, {})
    with tqdm(
        total=len(documents) * len(candidates), unit="piece", disable=not progress, smoothing=0.05, leave=False
    ) as bar:
        together = max(1, _CONTINUED_TOKENS // (settings.context + settings.greedy_tokens))
        for first in range(0, len(documents), together):
            group = documents[first : first + together].to(model.device)
            greedy = _greedy_texts(model, group, first, settings, store)
            for i, ids in enumerate(group.split(1)):
                _compare_document(model, ids, greedy[i : i + 1], first + i, candidates, settings, store, skipped, bar)
    candidates = [candidate for candidate in candidates if candidate.name not in skipped]
    result = {
        "kind": KIND,
        "plan": plan,
        "machine": machine,
        **_scored(documents, settings),
        "long_length": LONG,
        "caches": {
            c.name: _result(c, len(documents), settings, store)
            | ({"bytes_per_element": weights[c.name]} if weigh else {})
            for c in candidates
        },
        "skipped": skipped,
        "tasks": [],
    }
    if by_layer:
        configs = {c.name: c.config.for_model(model.config) for c in candidates if isinstance(c, Preset)}
        for name, errors in layer_errors(model, documents.to(model.device), configs).items():
            result["caches"][name]["layer_errors"] = errors
    store.finish(result)
    return result


def is_result(data: object) -> bool:
    """Whether `data` is a result of `compare`."""
    return isinstance(data, Mapping) and data.get("kind") == KIND


def _weigh(
    model: PreTrainedModel, candidates: list[Candidate], length: int, settings: Settings
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Bytes per element of each cache after a document and after a long text; and peers that cannot run here, with the
    reason."""
    weights, skipped = {}, {}
    for candidate in candidates:
        try:
            weights[candidate.name] = {
                "here": bytes_per_element(model, candidate, settings.context, length),
                "long": bytes_per_element_long(model, candidate),
            }
        except Exception as error:
            if candidate.kind != "peer":
                raise
            skipped[candidate.name] = _reason(error)
    return weights, skipped


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _compare_document(
    model: PreTrainedModel,
    ids: torch.Tensor,
    greedy: torch.Tensor,
    document: int,
    candidates: list[Candidate],
    settings: Settings,
    store: Store,
    skipped: dict[str, str],
    bar: tqdm,
) -> None:
    """Measure the parts of one document `[1, length]` and of its greedy text that are not yet in `store`."""
    missing = [c for c in candidates if c.name not in skipped and store.load(c.name, document) is None]
    bar.update(len(candidates) - len(missing))
    if not missing:
        return
    # The last token is only predicted.
    scored, targets = ids[:, :-1], ids[0, settings.first + 1 :]
    began = time.perf_counter()
    reference = torch.cat(list(candidates[0].rows(model, scored, settings.context, settings.first)))
    reference_seconds = time.perf_counter() - began
    for candidate in missing:
        bar.set_description(f"{candidate.name:<16}", refresh=False)
        try:
            part = _measure(model, candidate, scored, targets, reference, greedy, settings)
            if candidate.name == DENSE:
                part |= {"seconds": np.float64(reference_seconds), "greedy": greedy.cpu().numpy()}
        except Exception as error:
            if candidate.kind != "peer":
                raise
            skipped[candidate.name] = _reason(error)
        else:
            store.save(candidate.name, document, part)
        bar.update()


def _measure(
    model: PreTrainedModel,
    candidate: Candidate,
    scored: torch.Tensor,
    targets: torch.Tensor,
    reference: torch.Tensor,
    greedy: torch.Tensor,
    settings: Settings,
) -> dict[str, np.ndarray]:
    start, seconds, parts = 0, -time.perf_counter(), []
    # The dense cache's logits are known, and its greedy text is its own.
    is_reference = candidate.name == DENSE
    pieces = [reference] if is_reference else candidate.rows(model, scored, settings.context, settings.first)
    for rows in pieces:
        end = start + len(rows)
        seconds += time.perf_counter()
        parts.append(compare_logits(reference[start:end], rows, targets[start:end]))
        seconds -= time.perf_counter()
        start = end
    seconds += time.perf_counter()
    assert start == len(reference), (candidate.name, start, len(reference))
    part = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    part["seconds"] = np.float64(seconds)
    if settings.greedy_tokens:
        same = np.ones(settings.greedy_tokens, dtype=bool)
        if not is_reference:
            same = _agreement_with(model, candidate, greedy, settings.context)
        part["same_tokens"] = np.int64(same.cumprod().sum())
        # Only over tokens whose logits read the cache.
        part["greedy_agreement"] = same[1:].mean() if len(same) > 1 else np.float64(1)
    return part


def _greedy_texts(
    model: PreTrainedModel, documents: torch.Tensor, first: int, settings: Settings, store: Store
) -> torch.Tensor:
    """The contexts and their greedy continuations through the dense cache `[documents, context + greedy_tokens]`."""
    contexts = documents[:, : settings.context]
    if not settings.greedy_tokens:
        return contexts
    stored = [store.load(DENSE, first + i) for i in range(len(documents))]
    if None not in stored:
        return torch.from_numpy(np.concatenate([part["greedy"] for part in stored])).to(documents.device)
    return continued(model, contexts, settings.greedy_tokens)


def _agreement_with(model: PreTrainedModel, candidate: Candidate, greedy: torch.Tensor, context: int) -> np.ndarray:
    """At which tokens the candidate and the dense cache's greedy text agree, bool `[greedy_tokens]`."""
    rows = candidate.rows(model, greedy[:, :-1], context, context) if greedy.shape[1] > context + 1 else []
    chosen = torch.cat([greedy[0, context : context + 1], *(logits.argmax(-1) for logits in rows)])
    # The first new token comes from prefill, which is the same for all caches.
    return (chosen == greedy[0, context:]).cpu().numpy()


def _result(candidate: Candidate, documents: int, settings: Settings, store: Store) -> dict:
    parts, dense = ([store.load(name, i) for i in range(documents)] for name in (candidate.name, DENSE))
    same = None
    if settings.greedy_tokens:
        each = [int(part["same_tokens"]) for part in parts]
        agreement = statistics.fmean(float(part["greedy_agreement"]) for part in parts)
        same = {"median": statistics.median(each), "limit": settings.greedy_tokens, "each": each}
        same["agreement"] = agreement
    return {
        "kind": candidate.kind,
        "settings": candidate.settings(),
        **summarize(parts, dense),
        "same_tokens": same,
        "seconds": float(sum(part["seconds"] for part in parts)),
    }


def _scored(documents: torch.Tensor, settings: Settings) -> dict:
    """Which tokens were scored, and the share of them whose logits read the cache."""
    count, length = documents.shape
    share = cache_read_share([settings.context] * count, [settings.first + 1] * count, [length] * count)
    bins = position_bins(length - 1 - settings.first)
    return {
        "cache_read_share": share,
        # The tokens of each bin of the figures by position: first and last + 1.
        "positions": [[settings.first + 1 + start, settings.first + 1 + end] for start, end in bins],
    }
