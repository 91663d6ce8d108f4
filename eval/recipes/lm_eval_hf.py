"""lm-eval's own model type `hf`: tasks that generate take the cache in `gen_kwargs`.

pip install lm-eval datasets; python eval/recipes/lm_eval_hf.py

Other tasks compare likelihoods in one forward pass, which never reads a quantized cache: `hf-kvquant lm-eval` with the
model type `hf-kvquant` scores them as decode would.
"""

from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

import hf_kvquant

tasks = TaskManager(include_path=str(Path(__file__).parents[1] / "tasks"))
scores = {}
for name in ("dynamic", "kvquant-int8", "kvquant-int4-small"):
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": hf_kvquant.__path__[0] + "/models/stdlib-nano", "device": "cpu"},
        tasks=["kvquant_lookup_8"],
        task_manager=tasks,
        gen_kwargs={"cache_implementation": name},
        limit=8,
        bootstrap_iters=0,
    )
    scores[name] = results["results"]["kvquant_lookup_8"]["exact_match,none"]
print(scores)
