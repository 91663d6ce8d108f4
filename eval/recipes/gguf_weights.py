"""GGUF: weights from a file of llama.cpp, which transformers loads as dense ones, and the quantized cache beside them.

pip install gguf; python eval/recipes/gguf_weights.py
"""

import tempfile

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvquant

folder = hf_kvquant.__path__[0] + "/models/stdlib-nano"
inputs = AutoTokenizer.from_pretrained(folder)("def read_lines(path):\n", return_tensors="pt")
plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def write(path: str, model: torch.nn.Module) -> None:
    """A GGUF file of a Llama with 8-bit weights (Q8_0). Most users download theirs."""
    config, file = model.config, gguf.GGUFWriter(path, "llama")
    file.add_block_count(config.num_hidden_layers)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_dimension_count(config.head_dim)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    file.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied to the embeddings
            continue
        if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates neighbours, transformers the halves of a head
            weight = weight.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.dim() == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(weight.contiguous().numpy(), kind)
        file.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


with tempfile.TemporaryDirectory() as mine:
    write(f"{mine}/model.gguf", plain)
    model = AutoModelForCausalLM.from_pretrained(mine, gguf_file="model.gguf", dtype=torch.bfloat16)
out = model.generate(
    **inputs, max_new_tokens=8, do_sample=False, cache_implementation="kvquant-int8", return_dict_in_generate=True
)
print(out.sequences[0, -8:].tolist(), out.cache.routes)
