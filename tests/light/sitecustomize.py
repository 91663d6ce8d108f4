"""Lets Python start in less time, without packages that transformers imports wherever it finds them: see
tests/processes.py."""

import gc
import sys

# Imports make many objects, and hardly any garbage: Python would look for it for a fifth of the time.
gc.set_threshold(100_000)
# transformers takes a package whose entry is None as one that is not installed.
sys.modules.update(dict.fromkeys(("accelerate", "hqq", "optimum", "peft", "scipy", "sklearn", "torchao")))
