"""The compiled backends of the operators, one module each; the `reference` in plain PyTorch is a backend too."""

from ..quantization import QuantSpec

AUTO = "auto"
NAMES = ("reference", "cpu", "cuda")
# The kernels for a GPU read a row in words of 16 bytes, so with few bits head_dim and group_size have to be multiples
# of their elements.
_GPU_MULTIPLES = {"int3": 64, "int2": 64}


def gpu_refusal(keys: QuantSpec, values: QuantSpec, head_dims: tuple[int, int]) -> str | None:
    """Why the kernels for a GPU do not take these specs with these head_dims, of keys and of values; None if they do.
    The message names the side."""
    for side, spec, head_dim in zip(("keys", "values"), (keys, values), head_dims):
        multiple = _GPU_MULTIPLES.get(spec.format, 1)
        for field, value in (("head_dim", head_dim), ("group_size", spec.group_size or 0)):
            if value % multiple:
                unsupported = f"{value} is not supported by the CUDA kernels for {side} of {spec.format}"
                return f"{field}: {unsupported}; expected a multiple of {multiple}"
    return None
