"""Runs lm-eval's tasks through the dense and quantized caches, and prints one table.

    python eval/run_lm_eval.py --model stdlib-nano --kv_config none int8 int4 --tasks kvquant_recall kvquant_stdlib
    python eval/run_lm_eval.py --model meta-llama/Llama-3.1-8B --kv_config none int4 --tasks gsm8k --batch_size auto
    accelerate launch eval/run_lm_eval.py ...                                # requests distributed among processes

Every format is one run of lm-eval with the model `hf-kvquant` (`measure/lm_eval.py`), whose own result files land in a
folder per format under --out; options that are not listed here go to lm-eval unchanged (--log_samples,
--num_fewshot, --apply_chat_template, ...). The tasks in eval/tasks need no hub, all others are lm-eval's own.

How to read the table:

  value ± stderr     lm-eval's metric and standard error. Formats are compared on the same documents, so a difference
                     can be real though it is smaller than the errors.
  cache_read_share   how many of the scored tokens were predicted from the quantized cache. The rest is prefill, which
                     no format changes: a metric with share 0 does not see the cache, whatever it says.
                     The last --decode_tail tokens of a prompt are decoded, so that answers of one token (MMLU) see
                     the cache; with 0 the first token of an answer is prefill's, as in a plain `generate`.
                     Perplexity of documents prefills 128 tokens of every window, for "none" too, so that windows are
                     the same.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from hf_kvquant.measure.lm_eval import DECODE_TAIL, MODEL_NAME, ROLLING_CONTEXT
from hf_kvquant.measure.lm_eval import main as lm_eval
from hf_kvquant.measure.tables import BLIND, print_table
from hf_kvquant.measure.tasks import read_tasks
from hf_kvquant.measure.text import BUNDLED, bundled_model

TASKS = Path(__file__).resolve().parent / "tasks"


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default=BUNDLED, help="folder, hub id, or stdlib-nano, the bundled one (default)")
    parser.add_argument("--kv_config", nargs="+", default=["none", "int8", "fp8", "int4"],
                        help="presets or YAML files; none: the dense cache")  # fmt: skip
    parser.add_argument("--tasks", nargs="+", default=["kvquant_recall", "kvquant_stdlib"])
    parser.add_argument("--decode_tail", type=int, default=DECODE_TAIL)
    parser.add_argument("--dtype", default="float32", help="of the model (default float32: only the cache is lossy)")
    parser.add_argument("--model_args", default="", help="more of lm-eval's, as name=value,name=value")
    parser.add_argument("--out", type=Path, default=Path("lm-eval-results"))
    return parser.parse_known_args()


def newest_results(folder: Path) -> dict:
    return json.loads(max(folder.rglob("results_*.json"), key=lambda file: file.stat().st_mtime).read_text())


def show(results: dict[str, dict]) -> None:
    """Print a row per task and metric, and a column per format."""
    found = {config: {(s["task"], s["metric"]): s for s in read_tasks(result)} for config, result in results.items()}
    rows, first = [], next(iter(found.values()))
    for task in dict.fromkeys(task for task, _ in first):
        scores = [key for key in first if key[0] == task]
        rows += [[*key, *(cell(of[key]) for of in found.values())] for key in scores]
        shares = [of[scores[0]]["cache_read_share"] for of in found.values()]
        if any(share is not None for share in shares):
            seen = ["" if share is None else f"{share:.2f}" if share else BLIND for share in shares]
            rows.append(["", "cache_read_share", *seen])
    title = "value ± stderr; cache_read_share says how much of a score saw the cache"
    print_table(title, ["task", "metric", *results], rows, left=range(len(results) + 2))


def cell(score: dict) -> str:
    return f"{score['value']:.4f}" + (f" ± {score['se']:.4f}" if score["se"] is not None else "")


def main() -> None:
    args, more = arguments()
    model = str(bundled_model()) if args.model == BUNDLED else args.model
    results = {}
    for config in args.kv_config:
        folder = args.out / Path(config).stem
        settings = [
            *(f"pretrained={model}", f"dtype={args.dtype}", f"kv_config={config}", f"decode_tail={args.decode_tail}"),
            *([f"rolling_context={ROLLING_CONTEXT}"] if "rolling_context=" not in args.model_args else []),
            *([args.model_args] if args.model_args else []),
        ]
        lm_eval([
            *("--model", MODEL_NAME, "--model_args", ",".join(settings), "--include_path", str(TASKS)),
            *("--tasks", ",".join(args.tasks), "--output_path", str(folder), *more),
        ])  # fmt: skip
        if os.environ.get("RANK", "0") == "0":
            results[config] = newest_results(folder)
    if results:
        show(results)


if __name__ == "__main__":
    main()
