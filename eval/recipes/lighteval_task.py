"""lighteval: tasks that generate take the cache in `generation_parameters`.

pip install lighteval "huggingface_hub<2" "xxhash<4"; python eval/recipes/lighteval_task.py

On the command line, a file of custom tasks imports hf_kvquant:

    lighteval accelerate "model_name=MODEL,generation_parameters={cache_implementation:kvquant-int8}" TASK \
        --custom-tasks FILE

Other tasks compare likelihoods in one forward pass, which never reads a quantized cache.
"""

import runpy
import shutil
import tempfile
import types
from pathlib import Path

from lighteval.logging.evaluation_tracker import EvaluationTracker
from lighteval.metrics.metrics import Metrics
from lighteval.models.model_input import GenerationParameters
from lighteval.models.transformers.transformers_model import TransformersModelConfig
from lighteval.pipeline import ParallelismManager, Pipeline, PipelineParameters
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc

import hf_kvquant

exercises = runpy.run_path(str(Path(__file__).parents[1] / "tasks" / "recall.py"))["exercises"]
custom = types.ModuleType("custom")  # or the path of a Python file with a TASKS_TABLE
scores = {}


def document(line: dict, task_name: str) -> Doc:
    return Doc(task_name=task_name, query=line["prompt"], choices=[line["answer"]], gold_index=0)


with tempfile.TemporaryDirectory() as folder:
    exercises("lookup", 8)["test"].to_json(f"{folder}/lookup/test.jsonl")
    # A copy, because lighteval stores answers inside the folder of a local model.
    model = shutil.copytree(hf_kvquant.__path__[0] + "/models/stdlib-nano", f"{folder}/model")
    custom.TASKS_TABLE = [
        LightevalTaskConfig(
            name="lookup_8", hf_repo=f"{folder}/lookup", hf_subset="default", prompt_function=document,
            evaluation_splits=["test"], generation_size=16, stop_sequence=["\n"], metrics=[Metrics.exact_match],
        )
    ]  # fmt: skip
    for name in ("dynamic", "kvquant-int8", "kvquant-int4-small"):
        pipeline = Pipeline(
            tasks="lookup_8",
            pipeline_parameters=PipelineParameters(
                launcher_type=ParallelismManager.ACCELERATE, custom_tasks_directory=custom, max_samples=8
            ),
            evaluation_tracker=EvaluationTracker(output_dir=folder),
            model_config=TransformersModelConfig(
                model_name=model,
                batch_size=8,
                generation_parameters=GenerationParameters(cache_implementation=name),
            ),
        )
        pipeline.evaluate()
        scores[name] = float(pipeline.get_results()["results"]["all"]["em"])
print(scores)
