"""`hf-kvquant serve MODEL`: transformers' own server, with quantized pages in its continuous batching.

Its endpoint is OpenAI's: `/v1/chat/completions`, `/v1/completions`, `/v1/models`. The server imports its
other packages when it starts: `pip install "transformers[serving]"`.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from transformers import ContinuousBatchingConfig

from .. import host
from ..integration import NAME
from .models import DEFAULT_PRESET, ConfigOption, Dtype, ModelArgument, PresetOption, load_config, source_of


def serve(
    model: ModelArgument,
    preset: PresetOption = None,
    config: ConfigOption = None,
    num_blocks: Annotated[int, typer.Option(min=1, help="Memory of the cache, in blocks of dense pages.")] = 128,
    page_size: Annotated[int, typer.Option(min=64, help="Tokens of a page; a multiple of 64.")] = 256,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="New tokens of one forward call, at most.")] = 512,
    listen: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    dtype: Annotated[Dtype, typer.Option(help="auto: the checkpoint's own.")] = Dtype.auto,
    attn: Annotated[str, typer.Option(help="Attention of prompts: sdpa, or eager for models without sdpa.")] = "sdpa",
) -> None:
    """Serve a model to OpenAI clients from quantized pages, on the CPU."""
    kv_config = load_config(preset, config)
    if kv_config is None:
        raise typer.BadParameter("dense pages are served by `transformers serve`", param_hint="--preset")
    # Clients have to name the model in exactly this way.
    name = source_of(model)
    options = ContinuousBatchingConfig(
        num_blocks=num_blocks, page_size=page_size, max_batch_tokens=max_batch_tokens, auto_switch_to_flash=False
    )

    def prepare(loaded: Any) -> None:
        """Ask for the cache in every request, and check now that it can be served."""
        if loaded.generation_config.cache_implementation == NAME:
            return
        loaded.generation_config.cache_implementation = NAME
        loaded.generation_config.cache_config = kv_config
        init = loaded.init_continuous_batching
        init(loaded.generation_config, options)
        # The server passes no options, and a client may send a generation config of its own.
        loaded.init_continuous_batching = lambda generation_config, **_: init(generation_config, options)
        where = f"http://{listen}:{port}/v1"
        print(
            f"Serving {name} at {where} with the {preset or config or DEFAULT_PRESET} cache",
            file=sys.stderr,
            flush=True,
        )

    try:
        host.run_server(
            prepare, force_model=name, continuous_batching=True, attn_implementation=attn, device="cpu",
            dtype=dtype.value, host=listen, port=port,
        )  # fmt: skip
    except ImportError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="MODEL") from error
    except ValueError as error:
        # It names the model, or the option.
        raise typer.BadParameter(str(error)) from error
