"""What each choice behind the int4 presets costs: KL divergence to the dense cache against bits per element.

Scores the same windows of text decode-faithfully with one field of a preset changed at a time (block length, group
size, rotation, sink and recent lengths, grids), and prints and saves the mean KL divergence. The presets in configs/
are chosen from this table; bits are of the body at the model's head_dim, windows cost a constant on top.

    python eval/tune_presets.py --model hf_kvquant/models/stdlib-nano --text FILE --out eval/results/presets/NAME.json
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvquant
from hf_kvquant import KVQuantConfig, score


def variants() -> dict[str, KVQuantConfig]:
    """Every preset, and the int4 presets with one field changed."""
    int4, small = KVQuantConfig.preset("int4"), KVQuantConfig.preset("int4-small")
    found = {name: KVQuantConfig.preset(name) for name in KVQuantConfig.preset_names()}
    for block_length in (16, 32, 64, 128):
        found[f"int4 block {block_length}"] = replace(int4, keys=replace(int4.keys, block_length=block_length))
    for group_size in (16, 32, 64, None):
        values = replace(int4.values, group_size=group_size)
        found[f"int4 value group {group_size or 'head'}"] = replace(int4, values=values)
        found[f"int4-small group {group_size or 'head'}"] = replace(
            small, keys=replace(small.keys, group_size=group_size), values=replace(small.values, group_size=group_size)
        )
    found["int4 plain values"] = replace(int4, values=replace(int4.values, rotate=False))
    found["int4-small plain"] = replace(
        small, keys=replace(small.keys, rotate=False), values=replace(small.values, rotate=False)
    )
    for sink_length in (0, 1, 4, 8):
        found[f"int4 sink {sink_length}"] = replace(int4, sink_length=sink_length)
    for recent_length in (0, 16, 32, 64, 128):
        found[f"int4 recent {recent_length}"] = replace(int4, recent_length=recent_length)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--text", required=True, help="a text that the model has not been trained on")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window")
    parser.add_argument("--context", type=int, default=128, help="tokens of a window that are prefilled")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(args.model)(Path(args.text).read_text(encoding="utf-8"))["input_ids"]
    windows = torch.tensor(ids[: len(ids) // args.window * args.window]).view(-1, args.window)[: args.windows]
    head_dim = model.config.head_dim

    def log_probs(kv_config) -> torch.Tensor:
        with torch.no_grad():
            return score(model, windows, args.context, kv_config)[:, args.context :].log_softmax(-1)

    dense = log_probs("none")
    rows = []
    for name, config in tqdm(variants().items(), unit="variant"):
        specs = (config.keys, config.values)
        if any(s.group_size and head_dim % s.group_size for s in specs):
            continue
        divergence = (dense.exp() * (dense - log_probs(config))).sum(-1).flatten()
        rows.append(
            {
                "variant": name,
                "bits_per_element": config.bits_per_element(head_dim),
                "kl_mean": divergence.mean().item(),
                "kl_p99": divergence.quantile(0.99).item(),
                "config": config.to_dict(),
            }
        )
    table = Table(title=f"{Path(args.model).name}: head_dim {head_dim}, {dense[..., 0].numel()} scored tokens")
    for column in ("variant", "bits", "KL mean", "KL 99 %"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        table.add_row(
            row["variant"], f"{row['bits_per_element']:.3f}", f"{row['kl_mean']:.6f}", f"{row['kl_p99']:.5f}"
        )
    Console().print(table)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "command": f"python eval/tune_presets.py --model {Path(args.model).name} --text {Path(args.text).name}"
            f" --window {args.window} --context {args.context} --windows {args.windows}",
            "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "package": hf_kvquant.__name__,
            "rows": rows,
        }
        args.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
