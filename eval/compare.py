"""Publish the accuracy of each cache: run the comparison, keep a small JSON of it, and write the tables of
eval/results/accuracy/README.md from it.

    python eval/compare.py --peers --documents 12 --window 1024 --context 256
    python eval/compare.py --model MODEL --text FILE --peers --out runs/mine
    python eval/compare.py --from runs/mine      # publish a finished run of `hf-kvquant eval`
    python eval/compare.py --from runs/mine --to eval/results/accuracy/windows     # elsewhere, for no table
    python eval/compare.py --add --presets int3 --documents 12 --window 1024 --context 256   # beside what is published
    python eval/compare.py --readme              # only write the tables again
    python eval/compare.py --variants --model MODEL --text FILE --to eval/results/presets
    python eval/compare.py --sides --model MODEL --text FILE --to eval/results/sides

All other options are those of `hf-kvquant eval`, which does the work (see its --help). With --variants its caches are
the presets and some with a field or a grid changed, which shows what each choice costs; with --sides, keys (in latent
attention: latents) or values (rotary keys) alone are quantized, in every format on both grids, with no exact tokens.
The JSON goes to eval/results/accuracy/<model>.json, or into the folder --to; it holds, for every cache:

    perplexity, perplexity_change   exp of the mean loss per token; its change against the dense cache as a share
    kl                              KL divergence (nats) from the dense cache's next-token distribution: mean, p99
    agreement, overlap              share of equal most likely tokens; 1 - total variation distance
    same_tokens                     greedy tokens before the text first differs from the dense cache's
    bytes_per_element               bytes of the cache: while the text was decoded, and after 8192 tokens
    by_position, layer_errors       curves along the text; relative errors of keys and values by layer
    cache_read_share                share of the scored tokens whose logits read the cache

A JSON's `added` names caches that were measured later, on the same tokens, and where.

"mean" comes with "se", one standard error over pieces of text. Seconds are those of scoring, not a cache's speed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path

from hf_kvquant import KVQuantConfig, QuantSpec
from hf_kvquant.cli import app
from hf_kvquant.measure import markdown_table
from hf_kvquant.measure.facts import added, rounded
from hf_kvquant.measure.layer_errors import SIDES
from hf_kvquant.measure.tables import bold, markdown, put_between, three_digits

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results" / "accuracy"
README = RESULTS / "README.md"
FIRST = "stdlib-nano"
# The expected order of the shipped formats and the coarsest peer, by rising loss.
ORDER = ("int8", "fp8", "int4", "quanto-int2")
BEGIN, END = "<!-- accuracy: written by eval/compare.py -->", "<!-- accuracy: end -->"
_DIGITS = 6


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="finished", type=Path, nargs="*", help="folders of finished runs")
    parser.add_argument("--to", type=Path, help="folder for the JSON; default: eval/results/accuracy")
    parser.add_argument("--variants", action="store_true", help="compare the presets with a field or a grid changed")
    parser.add_argument("--sides", action="store_true", help="compare what keys alone and values alone cost")
    parser.add_argument(
        "--readme", action="store_true", help="only write the tables of eval/results/accuracy/README.md"
    )
    parser.add_argument(
        "--add", action="store_true", help="keep the caches that are published, and add those measured"
    )
    args, rest = parser.parse_known_args(argv)
    if args.finished is not None or args.readme:
        if rest:
            parser.error(f"{rest[0]}: unknown beside --from and --readme")
        for folder in args.finished or []:
            publish(folder, args.to, args.add)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            if args.variants or args.sides:
                configs = (variants() if args.variants else {}) | (sides() if args.sides else {})
                rest += ["--presets", ",".join(written(configs, Path(temporary)))]
            folder = Path(rest[rest.index("--out") + 1]) if "--out" in rest[:-1] else Path(temporary) / "run"
            try:
                app(["eval", *rest, *([] if "--out" in rest else ["--out", str(folder)])])
            except SystemExit as done:
                if done.code:
                    raise
            publish(folder, args.to, args.add)
    README.write_text(with_tables(README.read_text(encoding="utf-8"), published()), encoding="utf-8")


def variants() -> dict[str, KVQuantConfig]:
    """Every preset, and some with one field changed, or with other grids."""
    int4, small, int8 = (KVQuantConfig.preset(name) for name in ("int4", "int4-small", "int8"))
    found = {name: KVQuantConfig.preset(name) for name in KVQuantConfig.preset_names()}

    def both(**fields) -> KVQuantConfig:
        return replace(small, keys=replace(small.keys, **fields), values=replace(small.values, **fields))

    for length in (16, 32, 64, 128):
        found[f"int4-block-{length}"] = replace(int4, keys=replace(int4.keys, block_length=length))
    for size in (16, 32, 64, None):
        found[f"int4-value-group-{size or 'head'}"] = replace(int4, values=replace(int4.values, group_size=size))
        found[f"int4-small-group-{size or 'head'}"] = both(group_size=size)
    for length in (64, 128):
        channel = {"grid": "channel", "block_length": length}
        found[f"int4-value-block-{length}"] = replace(int4, values=QuantSpec("int4", **channel))
        found[f"int4-both-block-{length}"] = replace(int4, **dict.fromkeys(SIDES, QuantSpec("int4", **channel)))
        found[f"int8-both-block-{length}"] = replace(int8, **dict.fromkeys(SIDES, QuantSpec("int8", **channel)))
    found["int4-rotated-keys"] = replace(int4, keys=small.keys)
    found["int4-plain-values"] = replace(int4, values=replace(int4.values, rotate=False))
    found["int4-small-plain"] = both(rotate=False)
    found |= {f"int4-sink-{n}": replace(int4, sink_length=n) for n in (0, 1, 4, 8)}
    return found | {f"int4-recent-{n}": replace(int4, recent_length=n) for n in (0, 16, 32, 64, 128)}


def sides() -> dict[str, KVQuantConfig]:
    """One side quantized, the other dense, without exact tokens; only specs that fit every head_dim."""
    specs = {"fp8-token": QuantSpec("fp8"), "int4-token-rotate-16": QuantSpec("int4", group_size=16, rotate=True)}
    for name in ("int8", "int4"):
        specs |= {f"{name}-token": QuantSpec(name), f"{name}-token-rotate": QuantSpec(name, rotate=True)}
        specs |= {f"{name}-channel-{n}": QuantSpec(name, "channel", block_length=n) for n in (32, 64, 128)}
    dense = dict.fromkeys(SIDES, QuantSpec("dense"))
    return {f"{side}-{name}": KVQuantConfig(**dense | {side: spec}) for side in SIDES for name, spec in specs.items()}


def written(configs: dict[str, KVQuantConfig], folder: Path) -> list[str]:
    """The paths of the configs, as files in `folder`."""
    for name, config in configs.items():
        config.to_yaml(folder / f"{name}.yaml")
    return [str(folder / f"{name}.yaml") for name in configs]


def publish(folder: Path, to: Path | None = None, add: bool = False) -> Path:
    """Write the result of a finished run, without what only that run needs, into `to` (default: `RESULTS`). `add`: to
    the result that is there.

    Raises:
        ValueError: `add`, and the result that is there is of another model, text or settings.
    """
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    for cache in result["caches"].values():
        if cache["same_tokens"]:
            del cache["same_tokens"]["each"]
    to = RESULTS if to is None else to
    to.mkdir(parents=True, exist_ok=True)
    file = to / f"{result['plan']['model'].replace('/', '--')}.json"
    if add:
        result = _added(json.loads(file.read_text(encoding="utf-8")), result)
    text = json.dumps(rounded(result, _DIGITS), indent=1, ensure_ascii=False)
    # Write a curve on one line.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text)
    file.write_text(text + "\n", encoding="utf-8")
    return file


def _added(known: dict, result: dict) -> dict:
    for field in ("weights", "dtype", "documents_sha256", "settings"):
        if known["plan"][field] != result["plan"][field]:
            raise ValueError(f"{field}: {result['plan'][field]} is not allowed; expected {known['plan'][field]}")
    found = {name: cache for name, cache in result["caches"].items() if name not in known["caches"]}
    # Presets stay together.
    caches = sorted((known["caches"] | found).items(), key=lambda item: item[1]["kind"] == "peer")
    plans = {name: (known if name in known["caches"] else result)["plan"]["caches"][name] for name, _ in caches}
    return known | {
        "plan": known["plan"] | {"caches": plans},
        "caches": dict(caches),
        "added": added(known.get("added", []), [*found], result["machine"], result["plan"]["versions"]),
    }


def published() -> list[dict]:
    """The results under `RESULTS`, the bundled model's first."""
    files = sorted(RESULTS.glob("*.json"), key=lambda file: (file.stem != FIRST, file.stem))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def with_tables(readme: str, results: list[dict]) -> str:
    """`readme` with new tables between its two markers.

    Raises:
        ValueError: the markers are missing.
    """
    return put_between(readme, BEGIN, END, tables(results))


def exceptions(result: dict) -> list[str]:
    """Sentences about caches of `ORDER` that do not lose less than the next one."""
    kl = {name: cache["kl"]["mean"] for name, cache in result["caches"].items()}
    pairs = itertools.pairwise(name for name in ORDER if name in kl)
    return [f"{worse} loses less than {better}" for better, worse in pairs if kl[worse] <= kl[better]]


def tables(results: list[dict]) -> str:
    """Markdown: all figures of the first model, the mean KL divergence of all models, and whether caches come in the
    order that their bits suggest."""
    first = results[0]
    # The time of scoring on some machine says nothing about a cache.
    lines = [f"{_scored([first])}:", "", markdown_table(first, leave_out=["seconds"])]
    if len(results) > 1:
        names = list(dict.fromkeys(name for result in results for name in result["caches"] if name != "dense"))
        presets = {n for result in results for n, cache in result["caches"].items() if cache["kind"] == "preset"}
        alike = {}
        for result in results[1:]:
            alike.setdefault(_on(result), []).append(result)
        lines += [
            "",
            f"The mean KL divergence (0.001 nats) there, and of {'; of '.join(map(_scored, alike.values()))}:",
            "",
            markdown(
                ["cache", *(result["plan"]["model"] for result in results)],
                ([bold(name, presets), *(_divergence(result, name) for result in results)] for name in names),
            ),
        ]
    found = {}
    for result in results:
        found.setdefault(" and ".join(exceptions(result)), []).append(result["plan"]["model"])
    lines += ["", f"Expected order of the loss: {' < '.join(ORDER)}."]
    for wrong, names in found.items():
        lines[-1] += f" On {', '.join(names)}, {wrong or 'it is so'}."
    return "\n".join(lines)


def _scored(results: list[dict]) -> str:
    """The models and the tokens of `results`, which have the same tokens."""
    return f"{', '.join(result['plan']['model'] for result in results)} on {_on(results[0])}"


def _on(result: dict) -> str:
    plan = result["plan"]
    tokens = next(iter(result["caches"].values()))["tokens"]
    return (
        f"{plan['text']}, {tokens:,} tokens in {plan['documents']} pieces of {plan['document_length']}, each after "
        f"{plan['settings']['context']} tokens of prefill"
    )


def _divergence(result: dict, name: str) -> str:
    return three_digits(1000 * result["caches"][name]["kl"]["mean"]) if name in result["caches"] else "–"


if __name__ == "__main__":
    main()
