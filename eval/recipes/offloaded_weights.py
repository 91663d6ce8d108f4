"""accelerate: a model whose weights are on another device, or on disk, until a layer needs them.

pip install accelerate; python eval/recipes/offloaded_weights.py
"""

import tempfile

import accelerate
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvquant

folder = hf_kvquant.__path__[0] + "/models/stdlib-nano"
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("def read_lines(path):\n", return_tensors="pt")
options = {"max_new_tokens": 8, "return_dict_in_generate": True, "cache_implementation": "kvquant-int8"}
plain = AutoModelForCausalLM.from_pretrained(folder).generate(**inputs, **options)

# With a GPU: device_map="auto", which offloads what does not fit. Without one, the layers here are on disk.
places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
with tempfile.TemporaryDirectory() as weights:
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places | {"lm_head": "cpu"}, offload_folder=weights
    )
    from_disk = model.generate(**inputs, **options)

# Hooks on a model that is loaded already; dispatch_model adds the same ones to several devices.
model = AutoModelForCausalLM.from_pretrained(folder)
accelerate.cpu_offload(model, execution_device="cuda" if torch.cuda.is_available() else "cpu")
from_memory = model.generate(**inputs.to("cuda" if torch.cuda.is_available() else "cpu"), **options)

for name, out in (("plain", plain), ("disk", from_disk), ("memory", from_memory)):
    print(f"{name}:", out.sequences[0, -8:].tolist(), out.cache.routes)
