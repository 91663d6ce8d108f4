"""The program `hf-kvquant`: it lists its commands without importing any of them.

This module is installed as `hf_kvquant_entry`, beside the package: importing anything inside of `hf_kvquant` adds its
names to transformers, for which torch and transformers are imported, and that takes seconds.
"""

from __future__ import annotations

import sys
from typing import Any

import typer

# Each command by what `hf-kvquant --help` says about it.
COMMANDS = {
    "info": "Show which backend runs here and why, the machine, versions and presets.",
    "generate": "Continue a prompt, and print the speed and the bytes of the cache.",
    "demo": "Compare every preset with the dense cache: text, speed, bytes and agreement.",
    "build": "Compile the CUDA kernels ahead of time (default: head_dim 64 and 128, bfloat16).",
    "eval": "Compare caches with the dense one: perplexity, KL divergence, agreement, text, bytes.",
    "check": "Check whether a cache is safe for a model; if not, say which layers break, and what to write instead.",
    "calibrate": "Measure the factors of error feedback of a model, for the field `error_feedback` of a config.",
    "tune": "Find the config that loses least on a model within a number of bits, and write it as YAML.",
    "lm-eval": "Run lm-eval with a quantized cache: --model hf-kvquant --model_args pretrained=...,kv_config=int4 ...",
    "report": "Write a page of comparisons: tables, accuracy against bytes, loss along the text, error by layer.",
    "serve": "Serve a model to OpenAI clients from quantized pages, on the CPU.",
}
OPTIONS: dict[str, Any] = dict(
    help="A quantized KV cache for HuggingFace transformers, attended to as stored.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def main() -> None:
    """The entry point."""
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        try:
            from hf_kvquant import cli
        except ImportError as error:
            # For instance a transformers that is too new.
            raise SystemExit(f"Error: {error}") from error
        cli.main()
    else:
        listing()()


def listing() -> typer.Typer:
    """An application that prints the help and refuses unknown commands; its commands do nothing."""
    app = typer.Typer(**OPTIONS)
    for name, summary in COMMANDS.items():
        app.command(name, help=summary)(lambda: None)
    return app
