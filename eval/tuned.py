"""Publish runs of `hf-kvquant tune`: keep a small JSON of each, and write the table of eval/results/tuning/README.md.

hf-kvquant tune stdlib-nano --bits 5 --out runs/a
python eval/tuned.py runs/a runs/b
python eval/tuned.py                 # only write the table again
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from hf_kvquant.measure.facts import read_json, rounded, write_text
from hf_kvquant.measure.tables import markdown, put_between, with_error

RESULTS = Path(__file__).resolve().parent / "results" / "tuning"
README = RESULTS / "README.md"
BEGIN, END = "<!-- tuned: written by eval/tuned.py -->", "<!-- tuned: end -->"
_DIGITS = 5


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="folders of finished runs")
    for folder in parser.parse_args(argv).folders:
        publish(read_json(folder / "result.json"))
    README.write_text(
        put_between(README.read_text(encoding="utf-8"), BEGIN, END, table(published())), encoding="utf-8"
    )


def publish(result: dict) -> Path:
    """Write the result into `RESULTS`, one file for each model, windows and budget."""
    name = f"{result['model']}-{windows(result['base']).replace(', ', '-').replace(' ', '')}-{result['bits']:g}"
    text = json.dumps(rounded(result, _DIGITS), indent=1, ensure_ascii=False)
    # A list or mapping without others inside is written on one line.
    text = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda leaf: re.sub(r"\s+", " ", leaf[0]), text)
    text = re.sub(r'("error_feedback": ")[^"]*/', r"\1", text)
    file = RESULTS / f"{name}.json"
    write_text(file, text + "\n")
    return file


def windows(base: dict) -> str:
    """The exact tokens of a config in words, and whether it has error feedback."""
    is_exact = base["sink_length"] or base["recent_length"]
    exact = f"first {base['sink_length']}, last {base['recent_length']}" if is_exact else "none"
    return exact + ", feedback" * (base.get("error_feedback") is not None)


def published() -> list[dict]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))]


def table(results: list[dict]) -> str:
    """Markdown: held-out KL divergence (0.001 nats) of the result and of the best uniform config, and the verdict."""
    head = (
        "model", "exact tokens", "budget", "best uniform", "bits", "bytes", "KL", "tuned: bits", "bytes", "KL",
        "lower", "beats it",
    )  # fmt: skip
    lines = []
    for result in results:
        verdict, best, caches = result["verdict"], result["uniform"][0], result["held_out"]["caches"]
        cells = [result["model"], windows(result["base"]), f"{result['bits']:g}", best["name"]]
        for name, bits in (("uniform", best["bits"]), ("tuned", result["chosen_bits"])):
            weight = caches[name]["bytes_per_element"]["long"]
            cells += [f"{bits:.3f}", f"{weight:.3f}", with_error(caches[name]["kl"], 1000)]
        difference = {"mean": -verdict["difference"]["mean"], "se": verdict["difference"]["se"]}
        cells.append(f"{verdict['margin']:.0%} ({with_error(difference, 1000)})")
        lines.append([*cells, "yes" if verdict["beats"] else "no"])
    return markdown(head, lines, left=(0, 1, 3, 11))


if __name__ == "__main__":
    main()
