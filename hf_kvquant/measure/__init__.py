"""Everything that measures a cache: what it costs in accuracy, how long it takes, and what it weighs.

    from hf_kvquant.measure import Settings, compare, peers, presets

    settings = Settings(context=128, greedy_tokens=64)
    result = compare(model, documents, [*presets(["int8", "int4"]), *peers()], settings, facts={"model": "mine"})

`caches` lists what is compared. `comparison` scores every token decode-faithfully: its logits read the cache as
decode does (see `scoring`); one forward pass over a text would not, and would call every format perfect. `operator`
and `step` check and time decode attention and a model's decode step, with `clock`, `checks` and `facts`. The cache
imports nothing of this.
"""

from .caches import PEERS, Peer, Preset, peers, presets
from .comparison import Settings, compare, is_result
from .tables import BLIND, markdown_table, notes, rich_table, task_table
from .tasks import is_lm_eval, read_tasks

__all__ = [
    "BLIND",
    "PEERS",
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
