"""Hides packages that transformers imports wherever it finds them: see tests/processes.py."""

import sys

# transformers takes a package whose entry is None as one that is not installed.
sys.modules.update(dict.fromkeys(("accelerate", "hqq", "optimum", "peft", "scipy", "sklearn", "torchao")))
