"""Every model family of the installed transformers with every preset: what is fused, de-quantized, native or refused.

    make matrix                                                   # every family; resumes where it was stopped
    python eval/model_matrix.py --only LlamaForCausalLM T5ForConditionalGeneration
    python eval/model_matrix.py --render                          # only the documents, from the JSON

Each family is built tiny from its config (`_tiny_models`) and generates a given text from left-padded prompts, in a
process of its own. What has to hold:

- exact: with a window that covers every token, the cache's logits are those of the dense cache, through the operator
  and through de-quantized states. This finds every wrong route, mask, scale or position, without a format's tolerance.
- fused: in every decode call of every preset the operator's output is that of the model's own attention over the
  de-quantized states, given the same arguments.
- distance: the logits of every preset are those of the dense cache within the format's tolerance.

A family for which one of them fails is `failed`; nothing else is recorded for it.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import multiprocessing
import multiprocessing.connection
import os
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from _bench import versions, without_paths
from _tiny_models import FIRST_TOKEN, VOCAB, Family, families
from tqdm import tqdm
from transformers import DynamicCache, EncoderDecoderCache

import hf_kvquant
from hf_kvquant import KVQuantConfig, QuantizedCache, QuantizedStates
from hf_kvquant.attention import attend
from hf_kvquant.host import CACHE, cache_of
from hf_kvquant.layers import QuantizedLayer

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
PRESETS = KVQuantConfig.preset_names()
# A window over every token: what is stored is never read, and everything else is as always.
EXACT = {"keys": {"format": "int8"}, "values": {"format": "int8"}, "recent_length": 128}

PROMPT, PADDED, STEPS = 62, 17, 10
# Largest difference of attention outputs, as a share of the largest output; the same for logits and their spread.
FUSED_LIMIT = 1e-4
EXACT_LIMIT = 1e-3
# Distance to the dense cache's logits, root mean square, as a share of the logits' spread; unrelated logits have 1.4.
DISTANCE_LIMIT = {"int8": 0.1, "int8-plain": 0.1, "fp8": 0.5, "int4": 0.7, "int4-small": 0.9}
TIMEOUT = 300

LAYER_KINDS = {
    "DynamicLayer": "full attention",
    "QuantizedLayer": "full attention",
    "DynamicSlidingWindowLayer": "sliding window",
    "DynamicIndexedLayer": "indexed attention",
    "LinearAttentionLayer": "linear or convolution",
    "LinearAttentionAndFullAttentionLayer": "linear and full attention",
    "QuantizedHybridLayer": "linear and full attention",
    "LinearAttentionAndSlidingWindowAttentionLayer": "linear and sliding window",
    "DummyLayer": "no cache",
}


# ---- one family ----------------------------------------------------------------------------------------------------


class Say:
    """A logits processor that makes generation say given tokens `[batch, n]`."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = torch.full_like(scores, -torch.inf).scatter(1, self.tokens[:, self.step : self.step + 1], 0.0)
        self.step += 1
        return said


class Compared:
    """Our attention function, which compares each output of the operator with the model's own attention."""

    def __init__(self):
        self.largest, self.calls = 0.0, 0

    def __call__(self, module, query, key, value, attention_mask, *, dense_attention, **kwargs):
        routes = Counter(key.routes) if isinstance(key, QuantizedStates) else None
        output = attend(module, query, key, value, attention_mask, dense_attention=dense_attention, **kwargs)
        if routes is not None and key.routes["decode_fused"] > routes["decode_fused"]:
            first = key.shape[2] - query.shape[2]
            states = key.dequantize(position=first), value.dequantize(position=first)
            expected = dense_attention(module, query, *states, attention_mask, **kwargs)[0]
            self.largest = max(self.largest, share(output[0] - expected, expected.abs().max()))
            self.calls += 1
        return output


def share(difference: torch.Tensor, size: torch.Tensor) -> float:
    """The largest difference as a share of `size`; not a number counts as infinite."""
    found = float(difference.abs().max() / size)
    return found if found == found else float("inf")


class Subject:
    """A tiny model and its inputs: left-padded prompts, which for encoder-decoder models are the decoder's."""

    def __init__(self, family: Family):
        self.model = family.build()
        self.decoder_config = self.model.config.get_text_config(decoder=True)
        tokens = torch.Generator().manual_seed(1)
        ids = torch.randint(FIRST_TOKEN, VOCAB, (2, PROMPT), generator=tokens)
        self.said = torch.randint(FIRST_TOKEN, VOCAB, (2, STEPS + 1), generator=tokens)
        mask = torch.ones_like(ids)
        mask[1, :PADDED] = 0
        ids = ids * mask
        if self.model.config.is_encoder_decoder:
            source = torch.randint(FIRST_TOKEN, VOCAB, (2, 20), generator=tokens)
            ids[:, 0] = getattr(self.model.config, "decoder_start_token_id", None) or 0
            self.inputs = {"input_ids": source, "decoder_input_ids": ids, "decoder_attention_mask": mask}
        else:
            self.inputs = {"input_ids": ids, "attention_mask": mask}
        if "pixel_values" in _required(self.model.generate):
            size = self.model.config.vision_config.image_size
            self.inputs["pixel_values"] = torch.zeros(2, 3, size, size)

    def generate(self, **kwargs):
        """Logits `[steps, batch, vocab]` in float32, and the cache."""
        with torch.no_grad():
            out = self.model.generate(
                **self.inputs, do_sample=False, max_new_tokens=STEPS + 1, return_dict_in_generate=True,
                output_logits=True, logits_processor=[Say(self.said)], **kwargs,
            )  # fmt: skip
        return torch.stack(out.logits).float(), cache_of(out)

    def cache(self, config: dict) -> QuantizedCache | EncoderDecoderCache:
        """A cache that is read through de-quantized copies."""
        cache = QuantizedCache(self.model.config, config)
        cache.disable_fused("the model matrix compares it")
        if self.model.config.is_encoder_decoder:
            return EncoderDecoderCache(cache, DynamicCache(config=self.decoder_config))
        return cache


def _required(function) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.default is p.empty}


class Failed(Exception):
    """A check that does not hold."""


def examine(family: Family) -> dict:
    """What a family does with every preset."""
    started = time.perf_counter()
    found: dict = {"model_type": family.model_type, "kind": family.kind}
    try:
        subject = Subject(family)
    except Exception as error:
        return found | {"status": "not built", "reason": _reason(error)}
    found["attention"] = subject.model.config.get_text_config(decoder=True)._attn_implementation
    try:
        dense, cache = subject.generate()
        if not torch.isfinite(dense).all():
            raise FloatingPointError("logits that are not finite")
    except Exception as error:
        return found | {"status": "dense fails", "reason": _reason(error)}
    found["dense_cache"] = type(cache).__name__
    try:
        found |= _measured(subject, dense)
    except Failed as error:
        found |= {"status": "failed", "reason": str(error)}
    except Exception as error:
        ours = isinstance(error, ValueError) and _raised_by_us(error)
        found |= {"status": "refused" if ours else "failed", "reason": _reason(error)}
    return found | {"seconds": round(time.perf_counter() - started, 1)}


def _measured(subject: Subject, dense: torch.Tensor) -> dict:
    spread = dense.std()
    compared = Compared()
    with hf_kvquant.attention(subject.model, attend=compared), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        logits, cache = subject.generate(cache_implementation="kvquant", cache_config=EXACT)
        exact = {"own_route": share(logits - dense, spread)}
        layers, status = _layers(own(cache))
        exact["dequantized"] = share(subject.generate(**{CACHE: subject.cache(EXACT)})[0] - dense, spread)
        presets = {}
        for preset in PRESETS:
            compared.largest = 0.0
            logits, cache = subject.generate(cache_implementation=f"kvquant-{preset}")
            distance = float((logits - dense).pow(2).mean().sqrt() / spread)
            routes = {route: count for route, count in own(cache).routes.items() if count}
            presets[preset] = {"fused": compared.largest, "distance": distance, "routes": routes}
    for name, difference in exact.items():
        _require(f"exact, {name}", difference, EXACT_LIMIT)
    for preset, figures in presets.items():
        _require(f"{preset}: fused against de-quantized", figures["fused"], FUSED_LIMIT)
        _require(f"{preset}: distance to the dense cache", figures["distance"], DISTANCE_LIMIT[preset])
    obstacles = sorted({str(w.message) for w in said if "because of" in str(w.message)})
    return {
        "status": status,
        "layers": layers,
        "cross_attention": "dense" if subject.model.config.is_encoder_decoder else None,
        "exact": {name: _figure(value) for name, value in exact.items()},
        "presets": {
            name: figures | {"fused": _figure(figures["fused"]), "distance": _figure(figures["distance"])}
            for name, figures in presets.items()
        },
        "compared_calls": compared.calls,
        "obstacles": obstacles,
    }


def own(cache) -> QuantizedCache:
    """The self-attention cache, which has to be ours."""
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if not isinstance(cache, QuantizedCache):
        raise Failed(f"generation used a {type(cache).__name__}")
    return cache


def _layers(cache: QuantizedCache) -> tuple[dict[str, dict[str, int]], str]:
    """How many layers of each kind took which route, and the route of those that are quantized."""
    routes = cache.routes
    counted: dict[str, Counter] = {}
    for layer in cache.layers:
        name = type(layer).__name__
        kind = LAYER_KINDS.get(name, name)
        if not isinstance(layer, QuantizedLayer):
            route = "native"
        elif not layer.is_initialized:
            route = "never used"
        else:
            route = "fused" if layer.takes_states and routes["decode_fused"] else "de-quantized"
        counted.setdefault(kind, Counter())[route] += 1
    ways = {route for routes in counted.values() for route in routes} & {"fused", "de-quantized"}
    if not ways:
        raise Failed("no layer used the quantized cache")
    # Every decode step of every layer took the route that is recorded.
    takes = sum(bool(layer.takes_states) for layer in cache.quantized_layers if layer.is_initialized)
    others = sum(not layer.takes_states for layer in cache.quantized_layers if layer.is_initialized)
    if routes["decode_fused"] + routes["decode_dequantized"] < STEPS * (takes + others):
        raise Failed(f"{takes + others} quantized layers in {STEPS} steps took the routes {routes}")
    status = "partly fused" if len(ways) == 2 or (routes["decode_fused"] and routes["decode_dequantized"]) else None
    return {kind: dict(sorted(routes.items())) for kind, routes in counted.items()}, status or ways.pop()


def _require(what: str, value: float, limit: float) -> None:
    if not value <= limit:
        raise Failed(f"{what}: {value:.2g} is more than {limit:g}")


def _figure(value: float) -> float:
    return float(f"{value:.2g}")


def _raised_by_us(error: Exception) -> bool:
    return Path(hf_kvquant.__file__).parent in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parents


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return without_paths(f"{type(error).__name__}: {text}"[:300])


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
    "partly fused": "some layers read it as stored, others de-quantized copies",
    "de-quantized": "attention changes the cached states, so each step reads de-quantized copies: slower, said once",
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
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


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
        f"Every text-generating model class of transformers {made['transformers']} with every preset, as a tiny "
        "random model. Made by `make matrix` (`eval/model_matrix.py`, which says what is checked) from "
        "[model_matrix.json](model_matrix.json); do not edit.\n\n" + _summary(document)
    ]
    judged = _names(document, "fused", "partly fused", "de-quantized")
    worst = max(families[n]["presets"][p]["fused"] for n in judged if families[n]["compared_calls"] for p in PRESETS)
    exact = max(max(families[n]["exact"].values()) for n in judged)
    text.append(
        "\nWherever the cache acts, the operator gives what the model's own attention gives over de-quantized states "
        f"(largest difference {worst:.1g} of the output), and with a window over every token the logits are the "
        f"dense cache's (largest difference {exact:.1g} of their spread). Sliding-window, linear and convolution "
        "layers keep transformers' own caches, and so does cross-attention. A sliding window that hides no token "
        f"counts as full attention.\n\nDe-quantized: {_list(_names(document, 'de-quantized', 'partly fused'))}.\n"
    )
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
        "a window covers every token. `operator`: largest difference between the operator and the model's own "
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


def _list(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _cell(text: str) -> str:
    return "`" + text.replace("|", "/").replace("`", "'") + "`"


def sentence(document: dict) -> str:
    """What the README says of the models."""
    families, version = document["families"], document["versions"]["transformers"]
    partly = _count(families, "partly fused")
    parts = [
        f"{_count(families, 'fused')} decode from the quantized cache as stored",
        *([f"{partly} in some of their layers"] if partly else []),
        f"{_count(families, 'de-quantized')} from de-quantized copies",
        f"{_count(families, 'refused')} are refused with a reason",
    ]
    unjudged = _count(families, "dense fails") + _count(families, "not built")
    return (
        f"`make matrix` tries every preset on the {len(families)} text-generating model classes of transformers "
        f"{version}:\n{', '.join(parts[:-1])}, and {parts[-1]};\n{unjudged} could not be judged "
        "([all of them](eval/results/model_matrix.md))."
    )


def with_sentence(readme: str, document: dict) -> str:
    """The README with the sentence between its two markers as the results have it.

    Raises:
        ValueError: the markers are missing.
    """
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"{README.name}: expected the lines {BEGIN!r} and {END!r}, between which the sentence stands")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{sentence(document)}\n{END}{rest.partition(END)[2]}"


def save(path: Path, document: dict) -> None:
    """One line a family, so that changes are readable; the file is whole at every moment."""
    facts = json.dumps({name: value for name, value in document.items() if name != "families"})
    families = ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in document["families"].items())
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f'{facts[:-1]}, "families": {{\n{families}\n}}}}\n', encoding="utf-8")
    os.replace(temporary, path)


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
