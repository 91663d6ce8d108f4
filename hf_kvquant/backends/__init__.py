"""The compiled backends of the operators, one module each; the `reference` in plain PyTorch is a backend too."""

AUTO = "auto"
NAMES = ("reference", "cpu", "cuda")
# Beside "dense", what the kernels for a GPU take; other backends take every format.
GPU_FORMATS = ("int8", "fp8", "int4")


def gpu_refusal(side: str, format: str) -> str:
    """The message for a format that is not among `GPU_FORMATS`."""
    expected = f"expected one of {[*GPU_FORMATS, 'dense']}"
    return f"{side}.format: {format!r} is not supported on a GPU yet; {expected}"
