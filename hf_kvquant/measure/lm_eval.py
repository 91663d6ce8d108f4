"""lm-eval (EleutherAI's lm-evaluation-harness) through the quantized cache: its model `hf-kvquant`.

    hf-kvquant lm-eval --model hf-kvquant --model_args pretrained=...,kv_config=int4 --tasks lambada_openai
    simple_evaluate(model="hf-kvquant", model_args={"pretrained": "...", "kv_config": "int4"}, tasks=[...])

lm-eval finds models in its own list and among registered classes, not by entry points. So this module must be imported
first, which lm-eval's own program does not do; `hf-kvquant lm-eval` imports it and then runs lm-eval's command line.

`--model hf` with a quantized cache would not do: lm-eval scores a text in one forward pass, which is prefill and never
reads a quantized cache, so every format would look perfect (see `scoring`). Here every request goes through the cache:

- loglikelihood (multiple choice, perplexity of answers): the context is prefilled except for its last `decode_tail`
  tokens, and the continuation is scored as decode sees it;
- loglikelihood_rolling (perplexity of documents): every window prefills `rolling_context` tokens, and the rest is
  scored as decode sees it;
- generate_until: `generate` goes on from a quantized cache that holds the prompt, prefilled except for its last
  `decode_tail` tokens.

Without that tail the prompt's prefill would choose the first token of every answer, and so all of a one-token answer
and most of an answer that is looked up: these would not depend on the format.

lm-eval's results say how much of a task's score read the cache: `cache_read_share` of each task, with its components
under config.kvquant.cache_read.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lm_eval
import torch
from lm_eval import evaluator
from lm_eval._cli import HarnessCLI
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, setup_logging
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cache import QuantizedCache
from ..config import KVQuantConfig
from ..host import CACHE, cache_inputs
from ..integration import NAME, attention
from ..ops import MAX_Q_LEN
from ..scoring import DENSE, mask_inputs, score, score_by_decoding, score_chunks
from .tasks import read_tasks

MODEL_NAME = "hf-kvquant"
DECODE_TAIL = 1
ROLLING_CONTEXT = 128
_SCORING = ("parallel", "decoding")
# The parts of a task that are reported: all of it and, for documents, their first and their later windows.
_WHOLE, _FIRST, _LATER = "whole", "first_window", "later_windows"
# An argument without a default that is left out would be a TypeError of lm-eval's.
_MISSING = "missing"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Scored:
    """Tokens to score: the last `num_scored` rows of `inputs` predict a continuation; the first `prefilled`
    tokens are prefilled. Continuations that differ only in their last token, which is not an input, share one."""

    inputs: tuple[int, ...]
    prefilled: int
    num_scored: int

    @property
    def first_row(self) -> int:
        return len(self.inputs) - self.num_scored

    @property
    def num_read(self) -> int:
        """The number of scored tokens that are predicted by a row that read the cache."""
        return len(self.inputs) - max(self.first_row, self.prefilled)


@dataclass
class _Reads:
    """Sums over requests: tokens that were scored, those whose logits read the cache, and their log-likelihood."""

    requests: int = 0
    scored_tokens: int = 0
    read_tokens: int = 0
    loglikelihood: float = 0.0

    def add(self, other: _Reads) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def share(self) -> float:
        return self.read_tokens / self.scored_tokens if self.scored_tokens else 0.0


@register_model(MODEL_NAME)
class KVQuantLM(HFLM):
    """lm-eval's `hf` model with a quantized KV cache. It takes all arguments of `hf`, and these.

    Args:
        kv_config: a preset's name, a YAML path, a dict or a `KVQuantConfig`; "none" for the dense cache, which gives
            exactly the results of `hf`.
        decode_tail: the number of tokens at the end of a context or prompt that are decoded, not prefilled. With the
            default, 1, every scored token reads the cache; with more, the cache answers a whole question. With 0
            prefill predicts an answer's first token, as in a plain `generate`: one-token answers do not see the cache.
        rolling_context: the number of tokens that every window of loglikelihood_rolling prefills, and by which windows
            overlap. The default is 128, or for the dense cache 1, as in `hf`: give 128 to compare on equal windows.
        scoring: "parallel", or "decoding" for models that cannot be scored in one pass: one token at a time, slow.

    Raises:
        ValueError: an argument is missing or not allowed, the model is an encoder-decoder model, or lm-eval's
            `use_cache` is set.
    """

    def __init__(
        self,
        *args,
        kv_config: KVQuantConfig | str | Path | dict | None = _MISSING,
        decode_tail: int = DECODE_TAIL,
        rolling_context: int | None = None,
        scoring: str = "parallel",
        **kwargs,
    ):
        if kv_config == _MISSING:
            raise ValueError(f"kv_config: missing; expected a preset's name, a YAML path, or {DENSE!r}")
        # lm-eval's command line reads "none" as None.
        self.kv_config = None if kv_config in (None, DENSE) else KVQuantConfig.load(kv_config)
        if rolling_context is None:
            rolling_context = 1 if self.kv_config is None else ROLLING_CONTEXT
        _check_count("decode_tail", decode_tail, 0)
        _check_count("rolling_context", rolling_context, 1)
        if scoring not in _SCORING:
            raise ValueError(f"scoring: {scoring!r} is not allowed; expected one of {list(_SCORING)}")
        self.decode_tail, self.rolling_context, self.scoring = decode_tail, rolling_context, scoring
        self.cache_read: dict[str, dict[str, _Reads]] = {}
        super().__init__(*args, **kwargs)
        if self.kv_config is not None and self.backend != "causal":
            raise ValueError(
                f"backend: {self.backend!r} cannot be scored through a quantized cache; expected 'causal'"
            )
        if rolling_context >= self.max_length:
            raise ValueError(
                f"rolling_context: {rolling_context} is not allowed; expected less than max_length {self.max_length}"
            )
        # `hf` distributes requests among GPUs only; processes without one would all do the same work.
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and self._world_size == 1:  # type: ignore[has-type]  # set by `HFLM`
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def set_cache_hook(self, cache_hook) -> None:
        if self.kv_config is not None and cache_hook.dbdict is not None:
            raise ValueError("use_cache: saved answers do not say which KV cache they are from; run without it")
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict:
        """The entry of the model in lm-eval's results, under "config"."""
        settings = {"kv_config": DENSE, "rolling_context": self.rolling_context}
        if self.kv_config is not None:
            settings = {
                "kv_config": self.kv_config.to_dict(),
                "decode_tail": self.decode_tail,
                "rolling_context": self.rolling_context,
                "scoring": self.scoring,
                "cache_read": {task: _figures(parts) for task, parts in self.cache_read.items()},
            }
        return super().get_model_info() | {"kvquant": settings}

    # ---- the three kinds of requests -------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        answers = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        if self.kv_config is not None:
            self._record(requests, self._last_reads)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each `(key, context tokens, continuation tokens)`: log-likelihood, and whether it is the greedy text."""
        if self.kv_config is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        scored, continuations = [], []
        for _, context, continuation in requests:
            assert context, "lm-eval gives every request a context"
            if len(continuation) > self.max_length:
                raise ValueError(f"continuation: {len(continuation)} tokens; expected at most {self.max_length}")
            tokens = context + continuation
            if len(tokens) > self.max_length + 1:
                excess = len(tokens) - self.max_length - 1
                _log.warning("%d tokens are too many for the model; the first %d are left out", len(tokens), excess)
            inputs = tuple(tokens[-(self.max_length + 1) :][:-1])
            context_length = len(inputs) - len(continuation) + 1
            scored.append(_Scored(inputs, max(context_length - self.decode_tail, 1), len(continuation)))
            continuations.append(continuation)
        answers = self._score(scored, continuations, disable_tqdm)
        self._last_reads = [{_WHOLE: _Reads(1, s.num_scored, s.num_read, a[0])} for s, a in zip(scored, answers)]
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole documents, in windows of at most `max_length` tokens.

        Every token is scored once. The first window starts with the prefix token and scores all of its tokens, those
        of its context by prefill; other windows score the tokens after their context. They are reported separately.
        """
        if self.kv_config is None and self.rolling_context == 1:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, self.rolling_context)
            for pair in pairs:
                windows.append(pair)
                owners.append(owner)
        if self.kv_config is None:
            pairs = [(None, *make_disjoint_window(pair)) for pair in windows]
            answers = super()._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)
            reads = None
        else:
            scored = [
                # The first window's context is scored; it is as long as the unscored context of the others.
                _Scored(
                    tuple(inputs), max(min(self.rolling_context, len(inputs)), len(inputs) - len(text) + 1), len(text)
                )
                for inputs, text in windows
            ]
            answers = self._score(scored, [text for _, text in windows], disable_tqdm)
            reads = [defaultdict(_Reads) for _ in requests]
            for i, (owner, s, answer) in enumerate(zip(owners, scored, answers)):
                for name in (_WHOLE, _FIRST if i == 0 or owners[i - 1] != owner else _LATER):
                    reads[owner][name].add(_Reads(1, s.num_scored, s.num_read, answer[0]))
            self._record(requests, reads)
        totals = [0.0] * len(requests)
        for owner, (loglikelihood, _) in zip(owners, answers):
            totals[owner] += loglikelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = super().generate_until(requests, disable_tqdm=disable_tqdm)
        if self.kv_config is not None:
            reads = []
            for request, answer in zip(requests, answers):
                longest = request.args[1].get("max_gen_toks", self.max_gen_toks)
                # One more token was chosen than the answer shows: the one that ended it, unless length did.
                chosen = min(len(self.tok_encode(answer, add_special_tokens=False)) + 1, longest)
                has_tail = self.decode_tail > 0 and len(self.tok_encode(request.args[0])) > 1
                reads.append({_WHOLE: _Reads(1, chosen, chosen if has_tail else chosen - 1)})
            self._record(requests, reads)
        return answers

    def _model_generate(self, context, max_length: int, stop: list[str], **generation_kwargs) -> torch.Tensor:
        length = context.shape[1]
        tail = min(self.decode_tail, length - 1)
        if self.kv_config is not None and tail > 0:
            mask = generation_kwargs.get("attention_mask")
            cache = QuantizedCache(self.model.config, self.kv_config, max_length=max_length, attention_mask=mask)
            # `generate` itself decodes the last token; more than MAX_Q_LEN at once would not be decode.
            cuts = [0, *range(length - tail, length - 1, MAX_Q_LEN), length - 1]
            with torch.no_grad(), self._autocast(), attention(self.model):
                for start, end in itertools.pairwise(cuts):
                    inputs = mask_inputs(self.model, mask, start, end)
                    self.model(context[:, start:end], **cache_inputs(self.model, cache), **inputs)
            generation_kwargs[CACHE] = cache
        elif self.kv_config is not None:
            generation_kwargs |= {"cache_implementation": NAME, "cache_config": self.kv_config}
        return super()._model_generate(context, max_length, stop, **generation_kwargs)

    def _model_call(self, inps: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Logits; with a quantized cache lm-eval calls this only to find the largest batch that fits in memory."""
        if self.kv_config is None:
            return super()._model_call(inps, *args, **kwargs)
        with self._autocast():
            return score(self.model, inps, 1, self.kv_config)

    # ---- scoring ---------------------------------------------------------------------------------------------------

    def _score(
        self, scored: Sequence[_Scored], continuations: Sequence[Sequence[int]], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        """The answers for lm-eval, one per continuation; each `_Scored` goes through the model once."""
        members = defaultdict(list)
        for i, item in enumerate(scored):
            members[item].append(i)
        # The longest first, as in lm-eval: there is least padding, and memory runs out early if at all.
        order = sorted(members, key=lambda item: (-len(item.inputs), item.inputs))
        answers: list = [None] * len(scored)
        with tqdm(total=len(scored), disable=disable_tqdm or self.rank != 0, desc="Scoring") as bar:
            for batch in self._batches(order):
                texts = [[continuations[i] for i in members[item]] for item in batch]
                for item, of_item in zip(batch, self._score_batch(batch, texts)):
                    for i, answer in zip(members[item], of_item):
                        answers[i] = answer
                    bar.update(len(of_item))
        return answers

    def _batches(self, order: Sequence[_Scored]) -> Iterator[Sequence[_Scored]]:
        self.batch_sizes = {}
        # lm-eval's search for a batch size reads the number of tokens from these.
        as_requests = [(None, list(item.inputs), [0]) for item in order]
        start = 0
        while start < len(order):
            size = self.batch_size
            if self.scoring == "decoding":
                size = 1
            elif size == "auto":
                size = self._batch_scheduler(start, as_requests)
            yield order[start : start + size]
            start += size

    @torch.no_grad()
    def _score_batch(
        self, batch: Sequence[_Scored], texts: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[tuple[float, bool]]]:
        """For each continuation of each item of the batch: log-likelihood, and whether it is the greedy text."""
        input_ids = torch.zeros(len(batch), max(len(item.inputs) for item in batch), dtype=torch.long)
        for row, item in zip(input_ids, batch):
            row[: len(item.inputs)] = torch.tensor(item.inputs)
        targets = [torch.tensor(of_item, device=self.device) for of_item in texts]
        totals = [torch.zeros(len(of_item), dtype=torch.float64) for of_item in texts]
        greedy = [torch.ones(len(of_item), dtype=torch.bool) for of_item in texts]
        for start, logits in self._logits(batch, input_ids.to(self.device)):
            for row, item in enumerate(batch):
                first, last = max(start, item.first_row), min(start + logits.shape[1], len(item.inputs))
                if first >= last:
                    continue
                # Rows [rows, vocab], and the tokens that they predict, [continuations, rows].
                log_probs = logits[row, first - start : last - start].log_softmax(-1, dtype=self.softmax_dtype)
                tokens = targets[row][:, first - item.first_row : last - item.first_row].to(log_probs.device)
                found = log_probs.expand(len(tokens), -1, -1).gather(-1, tokens[..., None])[..., 0]
                totals[row] += found.double().sum(-1).cpu()
                greedy[row] &= (log_probs.argmax(-1) == tokens).all(-1).cpu()
        return [list(zip(total.tolist(), best.tolist())) for total, best in zip(totals, greedy)]

    def _logits(self, batch: Sequence[_Scored], input_ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        prefilled = [item.prefilled for item in batch]
        if self.scoring == "decoding":
            with self._autocast():
                yield 0, score_by_decoding(self.model, input_ids, prefilled[0], self.kv_config)
            return
        first_row = min(item.first_row for item in batch)
        with self._autocast():
            yield from score_chunks(self.model, input_ids, prefilled, self.kv_config, first_row=first_row)

    def _autocast(self):
        enabled = self.mixed_precision_dtype is not None
        return torch.autocast(self.device.type, dtype=self.mixed_precision_dtype, enabled=enabled)

    # ---- what read the cache ---------------------------------------------------------------------------------------

    def _record(self, requests: Sequence[Instance], reads: Sequence[dict[str, _Reads]]) -> None:
        """Add up the reads of each task over all processes; only the first process, which reports, gets the sums."""
        mine: dict[str, dict[str, _Reads]] = defaultdict(lambda: {_WHOLE: _Reads()})
        # lm-eval repeats a request to give every process the same number.
        once = {id(request): (request.task_name, parts) for request, parts in zip(requests, reads)}
        for task, parts in once.values():
            for name, part in parts.items():
                mine[str(task)].setdefault(name, _Reads()).add(part)
        for of_process in self.gather_object(dict(mine)) or []:
            for task, parts in of_process.items():
                sums = self.cache_read.setdefault(task, {})
                for name, part in parts.items():
                    sums.setdefault(name, _Reads()).add(part)
        for task in mine if self.rank == 0 else ():
            if self.cache_read[task][_WHOLE].read_tokens == 0:
                _log.warning("%s: cache_read_share is 0, its score does not see the cache", task)


def _check_count(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}: {value!r} is not allowed; expected an integer, {low} or more")


def _figures(parts: dict[str, _Reads]) -> dict:
    """The figures of a task, and those of its first and later windows, as plain data."""
    figures = {name: {**vars(part), "cache_read_share": part.share} for name, part in parts.items()}
    whole = figures.pop(_WHOLE)
    # A sum over the choices of a question would mean nothing.
    del whole["loglikelihood"]
    return whole | figures


def simple_evaluate(*args, **kwargs) -> dict | None:
    """lm-eval's `simple_evaluate`, with `cache_read_share` beside the metrics of each task in its results."""
    results = evaluator.simple_evaluate(*args, **kwargs)
    if results is not None:
        for task, read in results["config"].get("kvquant", {}).get("cache_read", {}).items():
            results["results"][task]["cache_read_share,none"] = read["cache_read_share"]
    return results


def known_tasks(names: Sequence[str], folder: Path | None = None) -> TaskManager:
    """lm-eval's tasks and those in `folder`, if all `names` are among them.

    Raises:
        ValueError: a name is not.
    """
    manager = TaskManager(include_path=folder)
    for name in names:
        if not manager.match_tasks([name]):
            where = "lm-eval's own" if folder is None else f"lm-eval's own and in {str(folder)!r}"
            raise ValueError(f"lm-eval: {name!r} is not a task; expected one of {where} (lm-eval ls tasks)")
    return manager


def task_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    configs: Mapping[str, KVQuantConfig | None],
    tasks: Sequence[str],
    manager: TaskManager,
    limit: int | None = None,
) -> list[dict]:
    """The scores of a loaded model through several caches, by name (None: the dense one), as `read_tasks` gives them.

    All caches get equal windows of documents (`rolling_context`).
    """
    scores = []
    for name, config in configs.items():
        lm = KVQuantLM(pretrained=model, tokenizer=tokenizer, kv_config=config, rolling_context=ROLLING_CONTEXT)
        found = simple_evaluate(model=lm, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False)
        if found is not None:
            scores += [score | {"cache": name} for score in read_tasks(found)]
    return scores


@contextmanager
def _reporting() -> Iterator[None]:
    """Within this context lm-eval's command line calls our `simple_evaluate`."""
    lm_eval.simple_evaluate = simple_evaluate
    try:
        yield
    finally:
        # Restore the lazy attribute, which the module makes when it is first read.
        del lm_eval.simple_evaluate


def main(arguments: Sequence[str] | None = None) -> None:
    """lm-eval's own command line, with `hf-kvquant` among its models."""
    given = sys.argv
    sys.argv = ["lm-eval", *(given[1:] if arguments is None else arguments)]
    try:
        setup_logging()
        cli = HarnessCLI()
        with _reporting():
            cli.execute(cli.parse_args())
    finally:
        sys.argv = given


if __name__ == "__main__":
    main()
