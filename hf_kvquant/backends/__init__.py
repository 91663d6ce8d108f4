"""The compiled backends of the operators, one module each; the `reference` in plain PyTorch is a backend too."""

AUTO = "auto"
NAMES = ("reference", "cpu", "cuda")
# The kernels for a GPU read a row in words of 16 bytes, so with few bits head_dim and group_size have to be multiples
# of their elements.
_GPU_MULTIPLES = {"int3": 64, "int2": 64}


def gpu_refusal(side: str, format: str, head_dim: int, group_size: int | None) -> str | None:
    """Why the kernels for a GPU do not take this format with this head_dim and group_size; None if they do.

    Args:
        side: "keys" or "values", for the message.
        group_size: None: the whole head, or the channel grid.
    """
    multiple = _GPU_MULTIPLES.get(format, 1)
    for field, value in (("head_dim", head_dim), ("group_size", group_size or 0)):
        if value % multiple:
            unsupported = f"{value} is not supported by the CUDA kernels for {side} of {format}"
            return f"{field}: {unsupported}; expected a multiple of {multiple}"
    return None
