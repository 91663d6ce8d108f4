"""Quantized weights: a model of torchao, quanto or bitsandbytes, and the quantized cache beside it.

pip install torchao optimum-quanto bitsandbytes; python eval/recipes/quantized_weights.py
"""

from importlib.util import find_spec

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

import hf_kvquant

folder = hf_kvquant.__path__[0] + "/models/stdlib-nano"
inputs = AutoTokenizer.from_pretrained(folder)("def read_lines(path):\n", return_tensors="pt")

configs = {}
if find_spec("torchao"):
    from torchao.quantization import Int8WeightOnlyConfig

    configs["torchao"] = TorchAoConfig(Int8WeightOnlyConfig())
if find_spec("optimum") and find_spec("optimum.quanto"):
    configs["quanto"] = QuantoConfig(weights="int8")
if find_spec("bitsandbytes"):
    configs["bitsandbytes"] = BitsAndBytesConfig(load_in_8bit=True)

models, outputs = {}, {}
for name, config in configs.items():
    models[name] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    outputs[name] = models[name].generate(
        **inputs, max_new_tokens=8, do_sample=False, cache_implementation="kvquant-int8", return_dict_in_generate=True
    )
    print(f"{name}:", outputs[name].sequences[0, -8:].tolist(), outputs[name].cache.routes)
