"""Which scheme at which bits? Our formats and other people's schemes with the same exact tokens, in one table.

    python eval/schemes.py                                            # the bundled model
    python eval/schemes.py --model MODEL --text FILE
    python eval/schemes.py --table                                    # only write the table again

Every scheme is scored decode-faithfully twice: without exact tokens, and with the first 4 and the last 32 tokens
exact. The JSON goes to eval/results/schemes/<model>.json, and the table of all models to the README beside it. `bits`
leave out exact tokens.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvquant import KVQuantConfig, QuantSpec
from hf_kvquant.measure import Preset, Settings, compare
from hf_kvquant.measure.caches import DENSE
from hf_kvquant.measure.facts import machine, rounded, versions, write_json
from hf_kvquant.measure.schemes import SCHEMES, Scheme
from hf_kvquant.measure.tables import bold, markdown, put_between, three_digits
from hf_kvquant.measure.text import bundled_model, file_windows, windows

RESULTS = Path(__file__).resolve().parent / "results" / "schemes"
README = RESULTS / "README.md"
BEGIN, END = "<!-- schemes: written by eval/schemes.py -->", "<!-- schemes: end -->"
# Tokens at both ends that are read exactly.
WINDOWS = {"none": (0, 0), "4 and 32": (4, 32)}
_DIGITS = 4


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(bundled_model()), help="a folder or hub id (default: the bundled model)"
    )
    parser.add_argument("--text", type=Path, help="a text file (default: source of Python's standard library)")
    parser.add_argument("--documents", type=int, default=8, help="pieces of text (default 8)")
    parser.add_argument("--window", type=int, default=512, help="tokens of a piece (default 512)")
    parser.add_argument("--context", type=int, default=128, help="tokens of a piece to prefill (default 128)")
    parser.add_argument("--table", action="store_true", help="only write the table again")
    args = parser.parse_args(argv)
    if not args.table:
        result = measure(args)
        write_json(RESULTS / f"{result['model']}.json", result)
    README.write_text(
        put_between(README.read_text(encoding="utf-8"), BEGIN, END, table(published())), encoding="utf-8"
    )


def ours() -> dict[str, KVQuantConfig]:
    """The presets, int3 and int2 on the grids of `int4`, and integers with both sides on the channel grid."""
    found = {name: KVQuantConfig.preset(name) for name in KVQuantConfig.preset_names()}
    for name in ("int3", "int2"):
        found[name] = KVQuantConfig(QuantSpec(name, "channel"), QuantSpec(name, rotate=True))
    for name in ("int8", "int4", "int3", "int2"):
        found[f"{name}-both-channel"] = KVQuantConfig(QuantSpec(name, "channel"), QuantSpec(name, "channel"))
    return found


def candidates(sink_length: int, recent_length: int) -> list[Preset]:
    """Our configs and all schemes, with these exact tokens."""
    exact = {"sink_length": sink_length, "recent_length": recent_length}
    configs = [Preset(name, replace(config, **exact)) for name, config in ours().items()]
    return [*configs, *(Scheme(name, **exact) for name in SCHEMES)]


def measure(args: argparse.Namespace) -> dict:
    """The bits and the KL divergence of every scheme, as the JSON has them."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.text is None:
        documents, _ = windows(tokenizer, args.documents, args.window)
    else:
        documents = file_windows(tokenizer, args.text, args.documents, args.window)
    found = {}
    for name, exact in WINDOWS.items():
        result = compare(
            model,
            documents,
            candidates(*exact),
            Settings(args.context, greedy_tokens=0),
            {},
            by_layer=False,
            weigh=False,
        )
        found[name] = {cache: figures["kl"] for cache, figures in result["caches"].items() if cache != DENSE}
    head_dim = model.config.head_dim
    plan = result["plan"]
    return rounded({
        "machine": machine(),
        "versions": versions(),
        "model": Path(args.model).name,
        "text": "held-out source of Python's standard library" if args.text is None else args.text.name,
        **{name: plan[name] for name in ("weights", "documents", "document_length", "documents_sha256", "settings")},
        "head_dim": head_dim,
        "bits": {each.name: bits_of(each, head_dim) for each in candidates(0, 0)},
        "kl": found,
    }, _DIGITS)  # fmt: skip


def bits_of(candidate: Preset, head_dim: int) -> float:
    own = candidate if isinstance(candidate, Scheme) else candidate.config
    return own.bits_per_element(head_dim)


def published() -> list[dict]:
    """The results under `RESULTS`, by head_dim and name."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))]
    return sorted(found, key=lambda result: (result["head_dim"], result["model"]))


def table(results: list[dict]) -> str:
    """Markdown: bits, and KL divergence (0.001 nats) without and with exact tokens, on each model; by falling bits."""
    names = sorted(results[0]["bits"], key=lambda name: -results[0]["bits"][name])
    widths = sorted({result["head_dim"] for result in results})
    bits = {result["head_dim"]: result["bits"] for result in results}
    head = ["scheme", *(f"bits at {width}" for width in widths), *(result["model"] for result in results)]
    lines = []
    our_names = list(ours())
    for name in names:
        cells = [f"{bits[width][name]:.3f}" for width in widths]
        cells += [
            " / ".join(three_digits(1000 * result["kl"][w][name]["mean"]) for w in WINDOWS) for result in results
        ]
        lines.append([bold(name, our_names), *cells])
    return markdown(head, lines)


if __name__ == "__main__":
    main()
