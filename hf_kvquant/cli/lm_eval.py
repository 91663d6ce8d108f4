"""`hf-kvquant lm-eval`: lm-eval's own command line, with the model `hf-kvquant`."""

from __future__ import annotations

from importlib.util import find_spec

import typer

# All arguments go to lm-eval unchanged, --help too.
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval with a quantized cache: --model hf-kvquant --model_args pretrained=...,kv_config=int4 ..."""
    if find_spec("lm_eval") is None:
        raise typer.BadParameter("lm-eval is not installed (pip install 'lm-eval>=0.4.13')")
    from ..measure.lm_eval import main

    try:
        main(context.args)
    except (ValueError, OSError) as error:
        # It names the argument, the task or the model.
        raise typer.BadParameter(str(error)) from error
