"""The compiled backends of the operators, one module each; the `reference` in plain PyTorch is a backend too."""

AUTO = "auto"
NAMES = ("reference", "cpu", "cuda")
# The kernels for a GPU read a row in words of 16 bytes, so with few bits head_dim has to be a multiple of this.
_GPU_MULTIPLES = {"int3": 64, "int2": 64}


def gpu_refusal(side: str, format: str, head_dim: int) -> str | None:
    """Why the kernels for a GPU do not take a side ("keys" or "values") with this head_dim in this format; None where
    they take the format at every head_dim that they take at all, or at this one."""
    multiple = _GPU_MULTIPLES.get(format, 1)
    if head_dim % multiple == 0:
        return None
    unsupported = f"{head_dim} is not supported by the CUDA kernels for {side} of {format}"
    return f"head_dim: {unsupported}; expected a multiple of {multiple}"
