"""PEFT: LoRA adapters that act, that are switched between two turns, and that are merged.

pip install peft; python eval/recipes/peft_adapters.py
"""

import warnings

import peft
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvquant

folder = hf_kvquant.__path__[0] + "/models/stdlib-nano"
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("def read_lines(path):\n", return_tensors="pt")
options = {"max_new_tokens": 8, "return_dict_in_generate": True}

# Random adapters, which a real program would load with PeftModel.from_pretrained and load_adapter.
lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora, adapter_name="first").eval()
model.add_adapter("second", lora)

# Active: generate as without an adapter.
first = model.generate(**inputs, cache_implementation="kvquant-int8", **options)
print("first:", first.cache.routes)

# Switched between two turns: the cached tokens stay as the first adapter made them, and a warning says so.
model.set_adapter("second")
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    second = model.generate(input_ids=first.sequences, cache=first.cache, **options)
switched = [str(w.message) for w in said if "other adapters" in str(w.message)]
print("second:", second.cache.routes, *switched)

# Merged: a plain model again.
merged = model.merge_and_unload().generate(**inputs, cache_implementation="kvquant-int4", **options)
print("merged:", merged.cache.routes)
