"""`compare`: every cache over every document, document by document, and what it amounts to.

The dense cache's logits of one document are the reference of that document, and are not kept longer. Its greedy
continuation of the document's context is fed to every cache: the first token that a cache would have chosen otherwise
is where its own greedy text would first differ.
"""

from __future__ import annotations

import hashlib
import statistics
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..host import context_length
from ..scoring import cache_read_share
from .layer_errors import layer_errors
from .methods import Dense, Method, Preset
from .metrics import compare_logits, position_bins, summarize
from .store import Store
from .weighing import LONG, bytes_per_element, bytes_per_element_long

REFERENCE = Dense.name
KIND = "hf_kvquant comparison"


@dataclass(frozen=True)
class Settings:
    """What is scored of each document.

    Args:
        context: columns that are prefilled (un-quantized attention); the others are decoded.
        first_scored: the first token that is scored. None: the first whose logits read the cache, `context + 1`.
        greedy_tokens: length of the greedy continuation of the context; 0 for none.
    """

    context: int = 128
    first_scored: int | None = None
    greedy_tokens: int = 64

    @property
    def first(self) -> int:
        """The first row whose logits are scored: row r predicts token r + 1."""
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
    methods: Sequence[Method],
    settings: Settings,
    facts: dict,
    folder: Path | None = None,
    progress: bool = True,
) -> dict:
    """Score the dense cache and `methods` on the same tokens; the result as plain data, also in `folder/result.json`.

    A peer that cannot run is listed under `skipped` with the reason; everything else that goes wrong raises.

    Args:
        documents: token ids `[documents, length]`, without padding.
        facts: what else defines the run (names of model and text, versions): saved with it, and a change of it is
            refused in a folder that was begun. `machine` is saved only with the result.
        folder: where finished parts are kept, so that a killed run goes on; None keeps nothing.

    Raises:
        ValueError: settings do not fit the documents, or the folder was begun with others.
    """
    settings.check(documents.shape[1], context_length(model.config))
    methods = [Dense(), *methods]
    machine = facts.get("machine")
    plan = {
        **{name: value for name, value in facts.items() if name != "machine"},
        "weights": fingerprint(model),
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "documents": documents.shape[0],
        "document_length": documents.shape[1],
        "documents_sha256": hashlib.sha256(documents.cpu().numpy().astype("<i4").tobytes()).hexdigest(),
        "settings": asdict(settings),
        "caches": {method.name: {"kind": method.kind, **method.settings()} for method in methods},
    }
    store = Store(folder, plan)
    weights, skipped = _weigh(model, methods, documents.shape[1], settings)
    with tqdm(total=len(documents) * len(methods), unit="piece", disable=not progress, smoothing=0.05) as bar:
        for document, ids in enumerate(documents.split(1)):
            _compare_document(model, ids.to(model.device), document, methods, settings, store, skipped, bar)
    methods = [method for method in methods if method.name not in skipped]
    result = {
        "kind": KIND,
        "plan": plan,
        "machine": machine,
        **_scored(documents, settings),
        "long_length": LONG,
        "caches": {
            m.name: _result(m, len(documents), settings, store) | {"bytes_per_element": weights[m.name]}
            for m in methods
        },
        "skipped": skipped,
        "tasks": [],
    }
    configs = {method.name: method.config for method in methods if isinstance(method, Preset)}
    for name, errors in layer_errors(model, documents.to(model.device), configs).items():
        result["caches"][name]["layer_errors"] = errors
    store.finish(result)
    return result


def is_result(data: object) -> bool:
    """Whether `data` is what `compare` gives."""
    return isinstance(data, Mapping) and data.get("kind") == KIND


def _weigh(
    model: PreTrainedModel, methods: list[Method], length: int, settings: Settings
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Bytes per number of each cache after a document and after a long text; and which peers cannot run here, why."""
    weights, skipped = {}, {}
    for method in methods:
        try:
            weights[method.name] = {
                "here": bytes_per_element(model, method, settings.context, length),
                "long": bytes_per_element_long(model, method),
            }
        except Exception as error:
            if method.kind != "peer":
                raise
            skipped[method.name] = _reason(error)
    return weights, skipped


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _compare_document(
    model: PreTrainedModel,
    ids: torch.Tensor,
    document: int,
    methods: list[Method],
    settings: Settings,
    store: Store,
    skipped: dict[str, str],
    bar: tqdm,
) -> None:
    """Measure what `store` has not yet of one document `[1, length]`."""
    missing = [m for m in methods if m.name not in skipped and store.load(m.name, document) is None]
    bar.update(len(methods) - len(missing))
    if not missing:
        return
    # The last token is only predicted.
    scored, targets = ids[:, :-1], ids[0, settings.first + 1 :]
    part = store.load(REFERENCE, document)
    greedy = _continue(model, ids, settings) if part is None else torch.from_numpy(part["greedy"]).to(ids.device)
    reference = torch.cat(list(methods[0].rows(model, scored, settings.context, settings.first)))
    for method in missing:
        bar.set_description(f"{method.name:<16}", refresh=False)
        try:
            part = _measure(model, method, scored, targets, reference, greedy, settings)
        except Exception as error:
            if method.kind != "peer":
                raise
            skipped[method.name] = _reason(error)
        else:
            if method.name == REFERENCE:
                part["greedy"] = greedy.cpu().numpy()
            store.save(method.name, document, part)
        bar.update()


def _measure(
    model: PreTrainedModel,
    method: Method,
    scored: torch.Tensor,
    targets: torch.Tensor,
    reference: torch.Tensor,
    greedy: torch.Tensor,
    settings: Settings,
) -> dict[str, np.ndarray]:
    start, seconds, parts = 0, -time.perf_counter(), []
    for rows in method.rows(model, scored, settings.context, settings.first):
        end = start + len(rows)
        seconds += time.perf_counter()
        parts.append(compare_logits(reference[start:end], rows, targets[start:end]))
        seconds -= time.perf_counter()
        start = end
    seconds += time.perf_counter()
    assert start == len(reference), (method.name, start, len(reference))
    part = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    part["seconds"] = np.float64(seconds)
    if settings.greedy_tokens:
        part["same_tokens"] = np.int64(_same_tokens(model, method, greedy, settings.context))
    return part


def _continue(model: PreTrainedModel, ids: torch.Tensor, settings: Settings) -> torch.Tensor:
    """The context and its greedy continuation through the dense cache `[1, context + greedy_tokens]`."""
    context = ids[:, : settings.context]
    if not settings.greedy_tokens:
        return context
    return model.generate(
        context,
        attention_mask=torch.ones_like(context),
        max_new_tokens=settings.greedy_tokens,
        do_sample=False,
        # Text goes on past its end, so that every prompt has as many tokens.
        eos_token_id=None,
    )


def _same_tokens(model: PreTrainedModel, method: Method, greedy: torch.Tensor, context: int) -> int:
    """How many tokens of the dense cache's greedy text the other cache would write before the first that differs."""
    written = greedy[0, context:]
    if len(written) == 1:
        return 1
    chosen = torch.cat([rows.argmax(-1) for rows in method.rows(model, greedy[:, :-1], context, context)])
    # The first new token comes from prefill, which is the same for all.
    return 1 + int((chosen == written[1:]).long().cumprod(0).sum())


def _result(method: Method, documents: int, settings: Settings, store: Store) -> dict:
    parts, dense = ([store.load(name, i) for i in range(documents)] for name in (method.name, REFERENCE))
    same = None
    if settings.greedy_tokens:
        each = [int(part["same_tokens"]) for part in parts]
        same = {"median": statistics.median(each), "limit": settings.greedy_tokens, "each": each}
    return {
        "kind": method.kind,
        "settings": method.settings(),
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
        # Columns of the tokens that the figures by position belong to: first and last + 1 of each bin.
        "positions": [[settings.first + 1 + start, settings.first + 1 + end] for start, end in bins],
    }


def fingerprint(model: PreTrainedModel) -> str:
    """Tells one checkpoint from another: a checksum of the beginning of every parameter, as float32."""
    checksum = 0
    for parameter in model.parameters():
        checksum = zlib.crc32(parameter.detach().flatten()[:1024].float().cpu().numpy().tobytes(), checksum)
    return f"{checksum:08x}"
