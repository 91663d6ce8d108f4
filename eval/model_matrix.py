"""Tries every model family of the installed transformers with the presets of 8 and 4 bits: fused, absorbed,
de-quantized, refused.

    make matrix                                                   # every family; resumes where it was stopped
    python eval/model_matrix.py --only LlamaForCausalLM T5ForConditionalGeneration
    python eval/model_matrix.py --render                          # only the documents, from the JSON

`measure/families.py` says what has to hold for a family. Each is examined in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import time
from collections import Counter
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from hf_kvquant.measure.facts import versions, write_text
from hf_kvquant.measure.families import PRESETS, examine
from hf_kvquant.measure.tables import markdown, put_between
from hf_kvquant.measure.tiny_models import families

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
TIMEOUT = 300


# ---- all of them ---------------------------------------------------------------------------------------------------


def _in_child(name: str, pipe) -> None:
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        pipe.send(examine(families()[name]))
    pipe.close()


def run(names: list[str], jobs: int, done) -> None:
    """Examine families in a process each, `jobs` at a time, and call `done(name, result)` for each."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(names)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop()
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_in_child, args=(name, writer))
            process.start()
            writer.close()
            running[reader] = (name, process, time.monotonic() + TIMEOUT)
        for reader in multiprocessing.connection.wait(list(running), timeout=1.0):
            name, process, _ = running.pop(reader)
            try:
                result = reader.recv()
            except EOFError:
                process.join()
                result = {"status": "failed", "reason": f"the process ended with exit code {process.exitcode}"}
            process.join()
            done(name, result)
        for reader, (name, process, deadline) in list(running.items()):
            if time.monotonic() > deadline:
                process.kill()
                process.join()
                del running[reader]
                done(name, {"status": "failed", "reason": f"no result after {TIMEOUT} seconds"})


# ---- the documents -------------------------------------------------------------------------------------------------

STATUS = {
    "fused": "every decode step reads the quantized cache as stored",
    "absorbed": "the same over latents (MLA), which are not expanded: its up-projection is folded into the query",
    "partly fused": "part of its attention reads it as stored, the rest de-quantized copies: slower, one warning",
    "de-quantized": "attention changes the cached states, so each step reads de-quantized copies: slower, one warning",
    "refused": "a `ValueError` says why the cache cannot act",
    "failed": "a check failed",
    "dense fails": "the tiny random model does not generate from text with the dense cache either: not judged",
    "not built": "no tiny model could be made from the config: not judged",
}
KINDS = ("causal", "encoder-decoder", "vision-language", "multimodal")
BEGIN, END = "<!-- models: written by eval/model_matrix.py -->", "<!-- models: end -->"


def _count(families: dict, status: str, kind: str | None = None) -> int:
    return sum(f["status"] == status and kind in (None, f["kind"]) for f in families.values())


def _table(columns: list[str], rows: list[list[object]]) -> str:
    return markdown(columns, rows, left=range(len(columns))) + "\n"


def _summary(document: dict) -> str:
    families = document["families"]
    rows = [
        [f"**{status}**", *[_count(families, status, kind) for kind in KINDS], _count(families, status), meaning]
        for status, meaning in STATUS.items()
        if _count(families, status)
    ]
    return _table(["", *KINDS, "all", "meaning"], rows)


def _layers_text(layers: dict[str, dict[str, int]]) -> str:
    return "; ".join(f"{kind}: {', '.join(routes)}" for kind, routes in layers.items())


def _names(document: dict, *statuses: str) -> list[str]:
    return sorted((n for n, f in document["families"].items() if f["status"] in statuses), key=str.lower)


def page(document: dict) -> str:
    """The Markdown page of a result file."""
    families, made = document["families"], document["versions"]
    text = [
        "# Which models, and how\n\n"
        f"Every text-generating model class of transformers {made['transformers']} with the presets of 8 and 4 bits, "
        "as a tiny random model. Made by `make matrix` (`eval/model_matrix.py`, which says what is checked) from "
        "[model_matrix.json](model_matrix.json); do not edit.\n\n" + _summary(document)
    ]
    judged = _names(document, "fused", "absorbed", "partly fused", "de-quantized")
    worst = max(families[n]["presets"][p]["fused"] for n in judged if families[n]["compared_calls"] for p in PRESETS)
    exact = max(max(families[n]["exact"].values()) for n in judged)
    text.append(
        "\nWherever the cache acts, the operator gives what the model's own attention gives over de-quantized states "
        f"(largest difference {worst:.1g} of the output), and if every token is read exactly, the logits are the "
        f"dense cache's (largest difference {exact:.1g} of their spread). Linear and convolution layers and "
        "cross-attention keep transformers' own caches (native). A layer with a sliding window is a ring: quantized, "
        "read as stored, and bounded by its window. Here that is so for every window, with `sliding: 2`; the presets "
        "leave windows of less than 512 tokens dense. A window that hides no token counts as full attention.\n"
    )
    own = [n for n in judged if families[n].get("recorded_calls") and families[n]["status"] == "fused"]
    text.append(
        "\nAttention code of the model's own (ALiBi, merged heads, casts), whose products the cache records and gives "
        f"to the operator: {_list(own)}.\n"
    )
    others = _names(document, "de-quantized", "partly fused")
    rows = [[n, families[n]["kind"], families[n]["status"], _reasons(families[n]["obstacles"])] for n in others]
    noted = [n for n in judged if n not in others and families[n]["obstacles"]]
    rows += [[n, families[n]["kind"], families[n]["status"], _reasons(families[n]["obstacles"])] for n in noted]
    text.append(f"\n## De-quantized, and why\n\n{_table(['model', 'kind', 'status', 'reason'], rows)}")
    rows = []
    for name in judged:
        found = families[name]
        presets = found["presets"]
        rows.append(
            [name, found["kind"], _layers_text(found["layers"]), max(found["exact"].values()),
             max(p["fused"] for p in presets.values()) if found["compared_calls"] else "-",
             *[presets[preset]["distance"] for preset in PRESETS]]
        )  # fmt: skip
    text.append(
        "\n## It acts\n\n`exact`: largest difference to the dense cache's logits, as a share of their spread, when "
        "every token is read exactly. `operator`: largest difference between the operator and the model's own "
        "attention over de-quantized states, as a share of the largest output. Then the distance of each preset's "
        "logits to the dense cache's, root mean square over their spread (random weights, head_dim 16: no statement "
        "about accuracy). The cross-attention cache of encoder-decoder models is dense.\n\n"
        + _table(["model", "kind", "layers", "exact", "operator", *PRESETS], rows)
    )
    for status in ("refused", "failed", "dense fails", "not built"):
        names = _names(document, status)
        if names:
            rows = [[name, families[name]["kind"], _cell(families[name]["reason"])] for name in names]
            text.append(f"\n## {status.capitalize()}\n\n{_table(['model', 'kind', 'reason'], rows)}")
    return "".join(text)


def _reasons(obstacles: list[str]) -> str:
    return " ".join(obstacle.rpartition(", because of ")[2].removesuffix(".") for obstacle in obstacles)


def _list(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _cell(text: str) -> str:
    return "`" + text.replace("|", "/").replace("`", "'") + "`"


def sentence(document: dict) -> str:
    """The sentence about models in the README."""
    families, version = document["families"], document["versions"]["transformers"]
    partly, dequantized = _count(families, "partly fused"), _count(families, "de-quantized")
    absorbed = _count(families, "absorbed")
    parts = [
        f"{_count(families, 'fused') + absorbed} decode from the quantized cache as stored"
        + (f" ({absorbed} of them from latents)" if absorbed else ""),
        *([f"{partly} partly"] if partly else []),
        *([f"{dequantized} from de-quantized copies"] if dequantized else []),
        f"{_count(families, 'refused')} are refused with a reason",
    ]
    unjudged = _count(families, "dense fails") + _count(families, "not built")
    return (
        f"`make matrix` tries the presets of 8 and 4 bits on the {len(families)} text-generating model classes of "
        f"transformers {version}:\n{', '.join(parts[:-1])}, and {parts[-1]};\n{unjudged} could not be judged "
        "([all of them](eval/results/model_matrix.md))."
    )


def with_sentence(readme: str, document: dict) -> str:
    """The README with the sentence between its two markers updated from the results.

    Raises:
        ValueError: the markers are missing.
    """
    return put_between(readme, BEGIN, END, sentence(document))


def save(path: Path, document: dict) -> None:
    """Write one line per family, so that changes are readable; the file is whole at every moment."""
    facts = json.dumps({name: value for name, value in document.items() if name != "families"})
    families = ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in document["families"].items())
    write_text(path, f'{facts[:-1]}, "families": {{\n{families}\n}}}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="model classes; default: all")
    parser.add_argument(
        "--again", nargs="+", metavar="STATUS", default=[], help="examine families of this status again"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "model_matrix.json")
    parser.add_argument("--render", action="store_true", help="only write the documents")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    known = families()
    if unknown := sorted(set(args.only or ()) - set(known)):
        parser.error(f"--only: {unknown} are no models of transformers {transformers.__version__}")
    document = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    if args.render and not document:
        parser.error(f"--render: {args.out} does not exist; expected a file that this script wrote")
    is_of_another = document and document["versions"]["transformers"] != transformers.__version__
    if not document or (is_of_another and not args.render):
        document = {"versions": versions(), "families": {}}
    results = document["families"]
    if not args.render:
        names = args.only or [n for n in known if n not in results or results[n]["status"] in args.again]
        progress = tqdm(total=len(names), unit="family")

        def done(name: str, result: dict) -> None:
            results[name] = {k: v for k, v in result.items() if v is not None}
            document["families"] = {n: results[n] for n in known if n in results}
            save(args.out, document)
            progress.update()
            progress.write(f"{name}: {result['status']} {result.get('reason', '')}")

        run(names, args.jobs, done)
        progress.close()
    if args.out == RESULTS / "model_matrix.json" and not args.only:
        (RESULTS / "model_matrix.md").write_text(page(document), encoding="utf-8")
        README.write_text(with_sentence(README.read_text(encoding="utf-8"), document), encoding="utf-8")
    print(dict(Counter(result["status"] for result in results.values())))


if __name__ == "__main__":
    main()
