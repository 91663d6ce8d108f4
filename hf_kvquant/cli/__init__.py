"""The command line: `hf-kvquant info | generate | demo | build | eval | check | ..`.

One file per command.

Nothing here is imported by `import hf_kvquant`. The program starts in `hf_kvquant_entry`, which imports this only when
a command runs.
"""

from __future__ import annotations

import sys
import warnings

import typer
from hf_kvquant_entry import OPTIONS

from . import build, calibrate, check, demo, evaluate, generate, info, lm_eval, report, serve, tune

app = typer.Typer(**OPTIONS)
app.command("info")(info.info)
app.command("generate")(generate.generate)
app.command("demo")(demo.demo)
app.command("build")(build.build)
app.command("eval")(evaluate.evaluate)
app.command("check")(check.check)
app.command("calibrate")(calibrate.calibrate)
app.command("tune")(tune.tune)
app.command("lm-eval", context_settings=lm_eval.SETTINGS)(lm_eval.lm_eval)
app.command("report")(report.report)
app.command("serve")(serve.serve)


def main() -> None:
    """Run a command as the program does."""
    warnings.showwarning = lambda message, *where: print(f"Note: {message}", file=sys.stderr)
    app()
