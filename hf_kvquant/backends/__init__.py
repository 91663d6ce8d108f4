"""The compiled backends of the operators, one module each; the `reference` in plain PyTorch is a backend too."""

AUTO = "auto"
NAMES = ("reference", "cpu", "cuda")
