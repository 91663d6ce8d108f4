"""Perplexity of a model through each KV cache, measured as decode reads it.

    python eval/perplexity.py --model hf_kvquant/models/stdlib-nano --presets int8,int4 --peers
    python eval/perplexity.py --model MODEL --text FILE --window 2048 --context 512

Each piece of text is prefilled up to --context, with un-quantized attention; all further tokens are scored as if they
were decoded one by one, so that every logit reads the quantized cache. The figures:

    perplexity    exp of the mean loss (nats) per scored token, with one standard error over pieces of text
    change %      against the dense cache on the same tokens; its error is that of the paired differences
    KL            mean KL divergence (0.001 nats) of the next token's distribution from the dense cache's: it sees what
                  perplexity averages away
    saw the cache  the share of scored tokens whose logits read the cache

--one-pass measures the usual way instead: the whole piece in one prefill. No logit reads the cache then, so every
format looks perfect, and the table says so ("does not see the cache"). It is here to show why that way won't do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hf_kvquant.cli.evaluate import default_presets, model_name, read_documents
from hf_kvquant.cli.models import BUNDLED, load_model
from hf_kvquant.comparison import BLIND, REFERENCE, Settings, compare, peers, presets
from hf_kvquant.comparison.tables import with_error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUNDLED, help="folder or hub id; default: the bundled one")
    parser.add_argument("--text", type=Path, help="text file; default: source of Python's standard library")
    parser.add_argument("--presets", help="comma separated names or YAML files; default: fp16 and all presets")
    parser.add_argument("--peers", action="store_true", help="also transformers' own quantized caches (slow)")
    parser.add_argument("--documents", type=int, default=16, help="pieces of text")
    parser.add_argument("--window", type=int, default=512, help="tokens of a piece")
    parser.add_argument("--context", type=int, default=128, help="tokens of a piece that are prefilled")
    parser.add_argument("--one-pass", action="store_true", help="the usual way, which never reads the cache")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, float16, or auto: the checkpoint's")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)

    settings = Settings(context=args.context, greedy_tokens=0)
    if args.one_pass:
        settings = Settings(context=args.window, first_scored=1, greedy_tokens=0)
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    try:
        methods = presets(args.presets.split(",") if args.presets else default_presets())
        documents, source = read_documents(tokenizer, args.text, args.documents, args.window)
        methods += peers() if args.peers else []
        result = compare(model, documents, methods, settings, {"model": model_name(args.model), "text": source})
    except ValueError as error:
        parser.error(str(error))

    share = result["cache_read_share"]
    table = Table(title=f"{model_name(args.model)} on {source}", title_justify="left")
    for header in ("cache", "perplexity", "change %", "KL", "saw the cache"):
        table.add_column(header, justify="left" if header == "cache" else "right", no_wrap=True)
    for name, cache in result["caches"].items():
        compared = name != REFERENCE
        table.add_row(
            name,
            with_error(cache["perplexity"]),
            with_error(cache["perplexity_change"], 100, "+") if compared else "–",
            with_error(cache["kl"], 1000) if compared else "–",
            f"{share:.1%}" if share else BLIND,
        )
    console = Console()
    console.print(table)
    for name, reason in result["skipped"].items():
        console.print(f"{name} was left out: {reason}")


if __name__ == "__main__":
    main()
