"""Which scheme at which bits? Our formats and other people's schemes with the same exact tokens, in one table.

    python eval/schemes.py                                            # the bundled model
    python eval/schemes.py --model MODEL --text FILE --seen OTHER
    python eval/schemes.py --again                                    # measure the rows of its JSON again, too
    python eval/schemes.py --table                                    # only write the table again

Every scheme is scored decode-faithfully twice: without exact tokens, and with the first 4 and the last 32 tokens
exact. The JSON goes to eval/results/schemes/<model>.json, and the table of all models to the README beside it. `bits`
leave out exact tokens.

With `--seen`, another text, two kinds of rows come with it: the configs that `hf-kvquant tune --text` found on it for
4 and 32 exact tokens, as eval/tuned.py has published them, and configs with error feedback calibrated on it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvquant import KVQuantConfig, QuantSpec, calibrate
from hf_kvquant.measure import Preset, Settings, compare
from hf_kvquant.measure.facts import added, machine, rounded, versions, write_json
from hf_kvquant.measure.schemes import SCHEMES, Scheme
from hf_kvquant.measure.tables import bold, markdown, put_between, three_digits
from hf_kvquant.measure.text import bundled_model, file_windows, windows

RESULTS = Path(__file__).resolve().parent / "results" / "schemes"
TUNINGS = RESULTS.parent / "tuning"
README = RESULTS / "README.md"
BEGIN, END = "<!-- schemes: written by eval/schemes.py -->", "<!-- schemes: end -->"
# Rows of tuned configs, and how their files end.
TUNED = {
    "tuned-4.5": "4.5",
    "tuned-3.375-feedback": "feedback-3.375",
    "tuned-3.3": "3.3",
    "tuned-3.3-feedback": "feedback-3.3",
}
# Rows with error feedback, and the row without it of each.
FEEDBACK = {
    "int4-feedback-32": "int4-both-channel-32",
    "int4-feedback": "int4-both-channel",
    "int3-feedback": "int3-both-channel",
}
# Tokens at both ends that are read exactly.
WINDOWS = {"none": (0, 0), "4 and 32": (4, 32)}
_DIGITS = 4


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(bundled_model()), help="a folder or hub id (default: the bundled model)"
    )
    parser.add_argument("--text", type=Path, help="a text file (default: source of Python's standard library)")
    parser.add_argument("--seen", type=Path, help="the text that configs were tuned on; error feedback too")
    parser.add_argument("--documents", type=int, default=8, help="pieces of text (default 8)")
    parser.add_argument("--window", type=int, default=512, help="tokens of a piece (default 512)")
    parser.add_argument("--context", type=int, default=128, help="tokens of a piece to prefill (default 128)")
    parser.add_argument("--again", action="store_true", help="measure every row again, not only those that are new")
    parser.add_argument("--table", action="store_true", help="only write the table again")
    args = parser.parse_args(argv)
    if not args.table:
        result = measure(args)
        write_json(RESULTS / f"{result['model']}.json", result)
    README.write_text(
        put_between(README.read_text(encoding="utf-8"), BEGIN, END, table(published())), encoding="utf-8"
    )


def ours() -> dict[str, KVQuantConfig]:
    """The presets, and integers with both sides on the channel grid; int4 also in blocks of 32, which have the bits of
    KIVI's groups."""
    found = {name: KVQuantConfig.preset(name) for name in KVQuantConfig.preset_names()}
    for name in ("int8", "int4", "int3", "int2"):
        found[f"{name}-both-channel"] = KVQuantConfig(QuantSpec(name, "channel"), QuantSpec(name, "channel"))
    short = QuantSpec("int4", "channel", block_length=32)
    found["int4-both-channel-32"] = KVQuantConfig(short, short)
    return found


def tuned(model: str) -> dict[str, dict]:
    """The published results of `hf-kvquant tune` for the model, by the names of their rows."""
    files = {name: TUNINGS / f"{model}-first4-last32-{end}.json" for name, end in TUNED.items()}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def candidates(sink_length: int, recent_length: int) -> list[Preset]:
    """Our configs and all schemes, with these exact tokens."""
    exact = {"sink_length": sink_length, "recent_length": recent_length}
    configs = [Preset(name, replace(config, **exact)) for name, config in ours().items()]
    return [*configs, *(Scheme(name, **exact) for name in SCHEMES)]


def after_seeing(results: Mapping[str, dict], feedback: Path, exact: tuple[int, int]) -> list[Preset]:
    """The candidates that know another text: tuned configs from their `results`, and those with a `feedback` file."""
    lengths = dict(zip(("sink_length", "recent_length"), exact))
    tunings = {name: KVQuantConfig.from_dict(result["config"]) for name, result in results.items()}
    fed = {name: ours()[base] for name, base in FEEDBACK.items()}
    fed |= {name: config for name, config in tunings.items() if config.error_feedback is not None}
    configs = tunings | {name: replace(config, error_feedback=str(feedback)) for name, config in fed.items()}
    return [Preset(name, replace(config, **lengths)) for name, config in configs.items()]


def measure(args: argparse.Namespace) -> dict:
    """The bits and the KL divergence of every scheme, as the JSON has them."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.text is None:
        documents, _ = windows(tokenizer, args.documents, args.window)
    else:
        documents = file_windows(tokenizer, args.text, args.documents, args.window)
    name = Path(args.model).name
    file = RESULTS / f"{name}.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() and not args.again else {}
    found: dict[str, dict] = known.get("kl", {window: {} for window in WINDOWS})
    results = tuned(name) if args.seen else {}
    bits = known.get("bits", {})
    with tempfile.TemporaryDirectory() as folder:
        feedback = Path(folder) / "feedback"
        if args.seen:
            calibrate(model, file_windows(tokenizer, args.seen, args.documents, args.window)).save(feedback)
        for window, exact in WINDOWS.items():
            rows = candidates(*exact) + (after_seeing(results, feedback, exact) if args.seen else [])
            bits |= {each.name: bits_of(each, model.config.head_dim) for each in rows}
            # A config of the same name may have been tuned or calibrated again.
            rows = [each for each in rows if each.name in {*TUNED, *FEEDBACK} or each.name not in found[window]]
            settings = Settings(args.context, greedy_tokens=0)
            result = compare(model, documents, rows, settings, {}, by_layer=False, weigh=False)
            found[window] |= {each.name: result["caches"][each.name]["kl"] for each in rows}
    plan = {
        field: result["plan"][field]
        for field in ("weights", "documents", "document_length", "documents_sha256", "settings")
    }
    other = [field for field in plan if known and known[field] != plan[field]]
    if other:
        raise SystemExit(f"{file} has rows with another {other[0]}; measure all of them with --again")
    where = {"machine": machine(), "versions": versions()}
    return rounded({
        **({field: known[field] for field in where} if known else where),
        "model": name,
        "text": "held-out source of Python's standard library" if args.text is None else args.text.name,
        "seen": args.seen.name if args.seen else known.get("seen"),
        **plan,
        "head_dim": model.config.head_dim,
        "bits": bits | {name: result["chosen_bits"] for name, result in results.items()},
        "kl": found,
        "added": added(known["added"], [each.name for each in rows], **where) if known else [],
    }, _DIGITS)  # fmt: skip


def bits_of(candidate: Preset, head_dim: int) -> float:
    own = candidate if isinstance(candidate, Scheme) else candidate.config
    return own.bits_per_element(head_dim)


def published() -> list[dict]:
    """The results under `RESULTS`, by head_dim and name."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))]
    return sorted(found, key=lambda result: (result["head_dim"], result["model"]))


def table(results: list[dict]) -> str:
    """Markdown: bits (of tuned configs the most of all models), and KL divergence (0.001 nats) without and with exact
    tokens, on each model; by falling bits."""
    widths = sorted({result["head_dim"] for result in results})
    bits = {
        width: {
            name: max(result["bits"][name] for result in results if result["head_dim"] == width)
            for name in results[0]["bits"]
        }
        for width in widths
    }
    names = sorted(bits[widths[0]], key=lambda name: -bits[widths[0]][name])
    head = ["scheme", *(f"bits at {width}" for width in widths), *(result["model"] for result in results)]
    lines = []
    our_names = [*ours(), *TUNED, *FEEDBACK]
    for name in names:
        cells = [f"{bits[width][name]:.3f}" for width in widths]
        cells += [
            " / ".join(three_digits(1000 * result["kl"][w][name]["mean"]) for w in WINDOWS) for result in results
        ]
        lines.append([bold(name, our_names), *cells])
    return markdown(head, lines)


if __name__ == "__main__":
    main()
