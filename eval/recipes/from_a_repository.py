"""custom_generate: the cache from a repository, for programs that do not import hf_kvquant.

python eval/recipes/from_a_repository.py

The folder repository/ is what such a repository holds.
"""

import importlib.util
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

folder = importlib.util.find_spec("hf_kvquant").submodule_search_locations[0] + "/models/stdlib-nano"
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = AutoTokenizer.from_pretrained(folder)("def read_lines(path):\n", return_tensors="pt")

repository = Path(__file__).parent / "repository"  # or a name on the Hub
out = model.generate(
    **inputs,
    custom_generate=str(repository),
    trust_remote_code=True,
    preset="int4",
    max_new_tokens=8,
    return_dict_in_generate=True,
)
print(out.cache.routes)
