"""Models and cache configs as named on the command line; an error about a name is one clear line."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import torch
import typer
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .. import ops
from ..config import KVQuantConfig
from ..measure.text import BUNDLED, bundled_model
from ..scoring import DENSE

DEFAULT_PRESET = "int4"
# The most letters of what transformers says about a model that it cannot load.
_REASON = 400


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


ModelArgument = Annotated[
    str, typer.Argument(help=f"A model folder, a hub id, or {BUNDLED}, which is bundled.", show_default=False)
]
PresetOption = Annotated[
    str | None, typer.Option(help=f"{', '.join(KVQuantConfig.preset_names())}. [default: {DEFAULT_PRESET}]")
]
ConfigOption = Annotated[Path | None, typer.Option(help="A YAML file instead of a preset.")]


# Options that name what a command writes are checked at once, because measuring it takes minutes.
def _writable(folder: Path) -> Path:
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        problem = "may not be written to" if nearest.is_dir() else "is no folder"
        raise typer.BadParameter(f"{str(folder)!r} cannot be a folder: {str(nearest)!r} {problem}")
    return folder


def _writable_file(file: Path | None) -> Path | None:
    if file is not None:
        folder = file.absolute().parent
        if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise typer.BadParameter(
                f"{str(file)!r} is not allowed; expected a file's name in an existing folder that may be written to"
            )
    return file


def folder_option(text: str) -> Any:
    """The option of a folder to write to, which is made if it is not there."""
    return typer.Option(help=text, callback=_writable)


def file_option(text: str) -> Any:
    """The option of a file to write."""
    return typer.Option(help=text, show_default=False, callback=_writable_file)


def load_model(name: str, dtype: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model (evaluation mode) and its tokenizer, from a folder or a hub id, or the bundled one by its name.

    Args:
        dtype: a torch dtype's name, or "auto" for the checkpoint's own.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.

    Raises:
        typer.BadParameter: the model or the tokenizer cannot be loaded, or there is no such device.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("'cuda' is not here: torch sees no GPU", param_hint="--device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    source = source_of(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        what = "cannot be loaded" if _is_path(name) else "is no folder here, and cannot be loaded from the hub"
        reason = shorten(str(error), _REASON, placeholder=" ..") or type(error).__name__
        raise typer.BadParameter(f"{name!r} {what}: {reason}", param_hint="MODEL") from error
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]  # its wrapper hides `self`


def source_of(name: str) -> str:
    """The folder or hub id of a model as named on the command line; "./model" stays "./model".

    Raises:
        typer.BadParameter: the name looks like a path, and there is no model.
    """
    if name == BUNDLED and not Path(name).exists():
        return str(bundled_model())
    if not _is_path(name):
        return name
    folder = os.path.expanduser(name)
    if not Path(folder, "config.json").is_file():
        problem = "has no config.json" if Path(folder).is_dir() else "does not exist"
        raise typer.BadParameter(f"the model folder {name!r} {problem}", param_hint="MODEL")
    return folder


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def load_config(preset: str | None, file: Path | None) -> KVQuantConfig | None:
    """The cache's config: that of a YAML file or of a preset, `DEFAULT_PRESET` if neither is given; None for the dense
    cache.

    Raises:
        typer.BadParameter: both are given, there is no such preset, or the file is not a config.
    """
    if preset is not None and file is not None:
        raise typer.BadParameter("give either a preset or a config file, not both", param_hint="--preset / --config")
    preset = preset or DEFAULT_PRESET
    if file is None and preset == DENSE:
        return None
    try:
        return KVQuantConfig.preset(preset) if file is None else KVQuantConfig.from_yaml(file)
    except ValueError as error:
        hint = "--preset" if file is None else "--config"
        more = f" (or {DENSE!r} for the dense cache)" if file is None else ""
        raise typer.BadParameter(f"{error}{more}", param_hint=hint) from error


def backend_of(config: KVQuantConfig | None, model: PreTrainedModel) -> str | None:
    """The backend that reads the model's cache; None for the dense cache.

    Raises:
        typer.BadParameter: the config asks for a backend that cannot run here.
    """
    if config is None:
        return None
    try:
        return ops.choose_backend(config.backend, model.device.type, model.dtype)
    except RuntimeError as error:
        raise typer.BadParameter(str(error), param_hint="--config") from error
