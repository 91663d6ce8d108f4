"""GenerationConfig: the cache as a default that is saved with the model, in its generation_config.json.

python eval/recipes/saved_with_the_model.py
"""

import subprocess
import sys
import tempfile

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvquant

folder = hf_kvquant.__path__[0] + "/models/stdlib-nano"
inputs = AutoTokenizer.from_pretrained(folder)("def read_lines(path):\n", return_tensors="pt")

LOAD = """
import sys
{first}
from transformers import AutoModelForCausalLM
print(AutoModelForCausalLM.from_pretrained(sys.argv[1]).generation_config.cache_implementation)
"""

with tempfile.TemporaryDirectory() as mine:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.cache_implementation = "kvquant"
    # A dict, which JSON can hold; with a preset's name as the implementation it is left out.
    model.generation_config.cache_config = {"keys": {"format": "int8"}, "values": {"format": "int4", "rotate": True}}
    model.save_pretrained(mine)

    # Whoever loads it gets the quantized cache without asking for it.
    loaded = AutoModelForCausalLM.from_pretrained(mine)
    cache = loaded.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True).cache
    dense = loaded.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True, cache_implementation="dynamic")
    print(cache.routes, type(dense.cache).__name__)

    # A program without `import hf_kvquant` cannot load the model: transformers does not know the name.
    runs = {}
    for first in ("import hf_kvquant", ""):
        command = [sys.executable, "-c", LOAD.format(first=first), mine]
        runs[first] = subprocess.run(command, cwd=mine, capture_output=True, text=True)
    print(runs["import hf_kvquant"].stdout, runs[""].stderr.splitlines()[-1])
