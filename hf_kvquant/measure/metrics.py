"""How far a cache's predictions are from the dense cache's: per token, then as means with standard errors.

Per scored token: `nll`, the loss (nats) of the token that follows in the text; `kl`, the KL divergence (nats) of the
cache's next-token distribution from the dense cache's, KL(dense || cache); `overlap`, 1 - the total variation distance
of the two (the probability that both draw the same token under the best coupling); `agree`, whether both have the same
most likely token.
"""

from __future__ import annotations

import numpy as np
import torch

# The most elements compared at once: with a large vocabulary, a whole document in float64 would need gigabytes.
_AT_ONCE = 1 << 22
_POSITION_BINS = 16


@torch.no_grad()
def compare_logits(reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, np.ndarray]:
    """`nll`, `kl`, `overlap` and `agree` of each row, float64 and bool `[rows]`.

    Args:
        reference, logits: those of the dense cache and of the measured one, `[rows, vocab]`.
        targets: the token that follows each row, `[rows]`.
    """
    found = {"nll": [], "kl": [], "overlap": [], "agree": []}
    rows = max(1, _AT_ONCE // logits.shape[-1])
    for p, q, target in zip(reference.split(rows), logits.split(rows), targets.split(rows)):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        # A token that is impossible in the dense distribution adds nothing, whatever its probability in the other.
        divergence = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
        found["nll"].append(-log_q.gather(-1, target[:, None])[:, 0])
        # Rounding gives +-1e-17 for equal distributions.
        found["kl"].append(divergence.clamp(min=0))
        found["overlap"].append(torch.minimum(p, q).sum(-1))
        found["agree"].append(log_p.argmax(-1) == log_q.argmax(-1))
    return {name: torch.cat(parts).cpu().numpy() for name, parts in found.items()}


def summarize(documents: list[dict[str, np.ndarray]], dense: list[dict[str, np.ndarray]]) -> dict:
    """Means over all tokens, each with its standard error, of one cache's documents.

    Documents have the same number of tokens. Standard errors are those of a mean over documents, because tokens of one
    document are not independent (None for a single one); that of the perplexity's change is over the differences in
    loss from the dense cache on the same document.
    """
    loss = _mean([d["nll"] for d in documents])
    added = _mean([d["nll"] - reference["nll"] for d, reference in zip(documents, dense)])
    kl = _mean([d["kl"] for d in documents])
    return {
        "tokens": sum(len(d["nll"]) for d in documents),
        "perplexity": _exponential(loss),
        "perplexity_change": _exponential(added, minus=1.0),
        "kl": kl | {"p99": float(np.quantile(np.concatenate([d["kl"] for d in documents]), 0.99))},
        "agreement": _mean([d["agree"] for d in documents]),
        "overlap": _mean([d["overlap"] for d in documents]),
        "by_position": {
            "loss": _by_position([d["nll"] for d in documents]),
            "added_loss": _by_position([d["nll"] - r["nll"] for d, r in zip(documents, dense)]),
            "kl": _by_position([d["kl"] for d in documents]),
        },
    }


def position_bins(tokens: int) -> list[tuple[int, int]]:
    """The scored tokens of a document as up to 16 runs of about equal length, each `(first, last + 1)`."""
    parts = np.array_split(np.arange(tokens), min(_POSITION_BINS, tokens))
    return [(int(part[0]), int(part[-1]) + 1) for part in parts]


def _mean(documents: list[np.ndarray]) -> dict[str, float | None]:
    means = np.array([d.mean(dtype=np.float64) for d in documents])
    error = means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else None
    return {"mean": float(means.mean()), "se": None if error is None else float(error)}


def _exponential(x: dict, minus: float = 0.0) -> dict[str, float | None]:
    """`exp(x) - minus`, with its error to first order."""
    value = float(np.exp(x["mean"]))
    return {"mean": value - minus, "se": None if x["se"] is None else value * x["se"]}


def _by_position(documents: list[np.ndarray]) -> list[float]:
    mean = np.mean(documents, axis=0)
    return [float(mean[start:end].mean()) for start, end in position_bins(len(mean))]
