"""Task scores, read from lm-eval's result files, beside the comparison's own figures.

    {"results": {"lambada_openai": {"acc,none": 0.61, "acc_stderr,none": 0.007, ...}}, "config": {"model_args": ...}}

The `model_args` of a file name its cache (`kv_config`); without one it is the dense cache. `hf_kvquant`'s model class
writes beside each score how much of it read the cache, as `cache_read_share`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..scoring import DENSE as NOT_QUANTIZED
from .caches import DENSE

_SHARE = "cache_read_share"


def is_lm_eval(data: object) -> bool:
    return isinstance(data, Mapping) and isinstance(data.get("results"), Mapping)


def read_tasks(data: Mapping) -> list[dict]:
    """One dict per score: `model`, `cache`, `task`, `metric`, `value`, `se`, `cache_read_share` (None if not said).

    Raises:
        ValueError: `data` is not a result of lm-eval.
    """
    if not is_lm_eval(data):
        raise ValueError(f"lm-eval result: {sorted(data)} is not allowed; expected a mapping with `results`")
    arguments = _arguments((data.get("config") or {}).get("model_args"))
    cache = Path(str(arguments.get("kv_config", NOT_QUANTIZED))).stem
    found = []
    for task, scores in data["results"].items():
        for key, value in scores.items():
            metric, _, filtered = key.partition(",")
            if metric.endswith("_stderr") or metric == _SHARE or isinstance(value, bool):
                continue
            if not filtered or not isinstance(value, (int, float)):
                continue
            error = scores.get(f"{metric}_stderr,{filtered}")
            found.append(
                {
                    "model": Path(str(arguments.get("pretrained", data.get("model_name", "")))).name,
                    "cache": DENSE if cache == NOT_QUANTIZED else cache,
                    "task": task,
                    "metric": metric if filtered == "none" else f"{metric} ({filtered})",
                    "value": value,
                    # lm-eval writes "N/A" if it has no error.
                    "se": error if isinstance(error, (int, float)) else None,
                    "cache_read_share": _share(data, task, scores, filtered),
                }
            )
    return found


def _share(data: Mapping, task: str, scores: Mapping, filtered: str) -> float | None:
    for share in (scores.get(f"{_SHARE},{filtered}"), scores.get(_SHARE), data.get(_SHARE)):
        if isinstance(share, Mapping):
            share = share.get(task)
        if isinstance(share, (int, float)):
            return float(share)
    return None


def _arguments(model_args: object) -> dict:
    """The arguments as a mapping; lm-eval writes them as it got them: a mapping, or "name=value,name=value"."""
    if isinstance(model_args, Mapping):
        return dict(model_args)
    pairs = (pair.partition("=") for pair in str(model_args or "").split(",") if pair)
    return {name.strip(): value for name, _, value in pairs}
