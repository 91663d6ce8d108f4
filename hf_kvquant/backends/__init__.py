"""Where the operators run: one module per compiled backend, beside the plain PyTorch `reference`."""

AUTO = "auto"
NAMES = ("reference", "cpu", "cuda")
