"""What each cache costs in accuracy: the dense cache, our presets and transformers' own quantized caches, on the same
tokens.

    from hf_kvquant.comparison import Settings, compare, peers, presets

    settings = Settings(context=128, greedy_tokens=64)
    result = compare(model, documents, [*presets(["int8", "int4"]), *peers()], settings, facts={"model": "mine"})

Every token is scored decode-faithfully: its logits read the cache as decode does (see `scoring`). One forward pass
over a text would not, and would call every format perfect.
"""

from .methods import Method, Preset, presets
from .peer_caches import PEERS, Peer, peers
from .runner import REFERENCE, Settings, compare, is_result
from .tables import BLIND, markdown_table, notes, rich_table, task_table
from .tasks import is_lm_eval, read_tasks

__all__ = [
    "BLIND",
    "PEERS",
    "REFERENCE",
    "Method",
    "Peer",
    "Preset",
    "Settings",
    "compare",
    "is_lm_eval",
    "is_result",
    "markdown_table",
    "notes",
    "peers",
    "presets",
    "read_tasks",
    "rich_table",
    "task_table",
]
