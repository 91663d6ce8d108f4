"""The command line: `hf-kvquant info | generate | demo | build | eval | lm-eval | report`. One file per command.

Nothing here is imported by `import hf_kvquant`.
"""

from __future__ import annotations

import sys
import warnings

import typer

from . import build, demo, evaluate, generate, info, lm_eval, report

app = typer.Typer(
    help="A quantized KV cache for HuggingFace transformers, attended to as stored.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command("info")(info.info)
app.command("generate")(generate.generate)
app.command("demo")(demo.demo)
app.command("build")(build.build)
app.command("eval")(evaluate.evaluate)
app.command("lm-eval", context_settings=lm_eval.SETTINGS)(lm_eval.lm_eval)
app.command("report")(report.report)


def main() -> None:
    """The entry point `hf-kvquant`."""
    warnings.showwarning = lambda message, *where: print(f"Note: {message}", file=sys.stderr)
    app()
