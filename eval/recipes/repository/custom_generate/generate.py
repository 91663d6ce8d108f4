"""The function that `model.generate(custom_generate=<this repository>)` calls, in the place of transformers' own.

Its users need no import of hf_kvquant; requirements.txt tells them to install it.
"""

import hf_kvquant  # noqa: F401  # It adds the names to transformers.


def generate(model, preset="int8", **kwargs):
    """`model.generate` with a quantized cache of this preset."""
    return type(model).generate(model, cache_implementation=f"kvquant-{preset}", **kwargs)
