"""Lets Python start in less time, without packages that transformers imports wherever it finds them: see
tests/processes.py."""

import gc
import os
import sys

# Imports make many objects, and hardly any garbage: Python would look for it for a fifth of the time.
gc.set_threshold(100_000)
hidden = {"accelerate", "hqq", "optimum", "peft", "scipy", "sklearn", "torchao"}
hidden -= set(os.environ.get("SHOWN", "").split(","))
# transformers takes a package whose entry is None as one that is not installed.
sys.modules.update(dict.fromkeys(hidden))
