"""Does the loss grow over thousands of decoded tokens? Divergence along text that the model itself writes.

    python eval/long_decode.py                       # the bundled model up to its 2,048 tokens; about ten minutes
    python eval/long_decode.py --length 512 --documents 2 --out long.json
    python eval/long_decode.py --table               # only write the table again

The dense cache writes on after each prompt, once greedily and once sampling from the whole distribution. Every preset
then decodes the same tokens, one by one through its real cache, so each key and value that it stores comes from
states that earlier quantized tokens have changed. The KL divergence of the next token's distribution from the dense
cache's is shown by position. Errors that add up would make it rise.

The JSON goes to eval/results/long_decode.json, and the table to eval/results/accuracy/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvquant import KVQuantConfig
from hf_kvquant.measure import Settings, compare
from hf_kvquant.measure.caches import DENSE, Decoded
from hf_kvquant.measure.facts import machine, rounded, versions, write_json
from hf_kvquant.measure.generation import continued
from hf_kvquant.measure.tables import markdown, put_between, three_digits
from hf_kvquant.measure.text import bundled_model, windows

RESULTS = Path(__file__).resolve().parent / "results"
FILE, README = RESULTS / "long_decode.json", RESULTS / "accuracy" / "README.md"
BEGIN, END = "<!-- long decode: written by eval/long_decode.py -->", "<!-- long decode: end -->"
# How each text is written, as the temperature that `continued` takes.
WRITTEN = {"greedy": None, "sampled": 1.0}
# The table shows means over this many equal stretches of the text.
_STRETCHES = 4
_DIGITS = 4


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or hub id (default: the bundled model)")
    parser.add_argument("--presets", default=",".join(KVQuantConfig.preset_names()), help="names, comma separated")
    parser.add_argument("--documents", type=int, default=4, help="prompts (default 4)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt (default 64)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of prompt and text together (default 2048)")
    parser.add_argument("--out", type=Path, default=FILE, help="the JSON file; elsewhere, the table stays as it is")
    parser.add_argument("--table", action="store_true", help="only write the table again")
    args = parser.parse_args(argv)
    if not args.table:
        write_json(args.out, measure(args))
    if args.out == FILE:
        result = json.loads(FILE.read_text(encoding="utf-8"))
        README.write_text(with_table(README.read_text(encoding="utf-8"), result), encoding="utf-8")
    else:
        print(table(json.loads(args.out.read_text(encoding="utf-8"))))


def measure(args: argparse.Namespace) -> dict:
    """The figures of every preset and way of writing, as the JSON has them."""
    source = args.model or str(bundled_model())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    prompts, _ = windows(AutoTokenizer.from_pretrained(source), args.documents, args.prompt)
    candidates = [Decoded(name, KVQuantConfig.preset(name)) for name in args.presets.split(",")]
    found = {}
    for how, temperature in WRITTEN.items():
        documents = continued(model, prompts, args.length - args.prompt, temperature)
        settings = Settings(args.prompt, greedy_tokens=0)
        result = compare(model, documents, candidates, settings, {}, by_layer=False, weigh=False)
        found[how] = {
            name: {"kl": cache["kl"], "agreement": cache["agreement"], "by_position": cache["by_position"]["kl"]}
            for name, cache in result["caches"].items()
            if name != DENSE
        }
    return rounded({
        "command": "python eval/long_decode.py "
        f"--documents {args.documents} --prompt {args.prompt} --length {args.length}",
        "machine": machine(),
        "versions": versions(),
        "model": Path(source).name,
        "weights": result["plan"]["weights"],
        "configs": {candidate.name: candidate.settings() for candidate in candidates},
        "documents": args.documents,
        "prompt": args.prompt,
        "length": args.length,
        "positions": result["positions"],
        "caches": found,
    }, _DIGITS)  # fmt: skip


def stretches(result: dict) -> list[tuple[int, int, slice]]:
    """First token, last token and bins of each stretch of the text."""
    positions = result["positions"]
    cuts = [round(i * len(positions) / _STRETCHES) for i in range(_STRETCHES + 1)]
    return [(positions[a][0], positions[b - 1][1] - 1, slice(a, b)) for a, b in itertools.pairwise(cuts)]


def table(result: dict) -> str:
    """Markdown: the mean KL divergence (0.001 nats) of each preset by stretch, of greedy and of sampled text."""
    columns = [f"{how} {first:,} to {last:,}" for how in WRITTEN for first, last, _ in stretches(result)]
    lines = []
    for name in result["configs"]:
        curves = [result["caches"][how][name]["by_position"] for how in WRITTEN]
        means = [statistics.fmean(curve[bins]) for curve in curves for _, _, bins in stretches(result)]
        lines.append([name, *(three_digits(1000 * mean) for mean in means)])
    return markdown(["preset", *columns], lines)


def with_table(readme: str, result: dict) -> str:
    """`readme` with a new table between its two markers.

    Raises:
        ValueError: the markers are missing.
    """
    head = (
        f"{result['model']}, {result['documents']} prompts of {result['prompt']} tokens from held-out source, decoded "
        f"to {result['length']:,} tokens in float32 (`{result['command']}`, [JSON](../long_decode.json)):"
    )
    return put_between(readme, BEGIN, END, f"{head}\n\n{table(result)}")


if __name__ == "__main__":
    main()
