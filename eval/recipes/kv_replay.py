"""KV replay: train with the log-probabilities that a rollout from a quantized cache had, not those of a dense pass.

python eval/recipes/kv_replay.py

A trainer (GRPO, RLOO, PPO) computes the log-probabilities of generated text in a dense forward pass. If the text was
generated from a quantized cache, they are another policy's. For every preset that does not read such short texts
exactly this prints how much: the KL divergence of the trained policy from the one that generated, and percentiles of a
token's importance ratio.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvquant

torch.manual_seed(0)
folder = hf_kvquant.__path__[0] + "/models/stdlib-nano"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
prompts = ["def read_lines(path):\n", "class Path:\n    def __init__(self):\n", "import os\n", "for line in file:\n"]
inputs = tokenizer(prompts * 2, return_tensors="pt", padding=True, padding_side="left")
prompt_length, new_tokens = inputs.input_ids.shape[1], 96
mask = torch.nn.functional.pad(inputs.attention_mask, (0, new_tokens), value=1)


def rollout(preset: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with generated text, and the log-probabilities of all tokens at each step of generation."""
    out = model.generate(
        **inputs, cache_implementation=f"kvquant-{preset}", max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=True, top_k=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, dim=1).double().log_softmax(-1)


def mismatch(preset: str) -> dict[str, tuple[float, list[float]]]:
    """KL divergence in nats, and the 1st, 50th and 99th percentile of the ratio: of a dense pass, and of replay."""
    ids, generated = rollout(preset)
    tokens, found = ids[:, prompt_length:, None], {}
    for name, config in (("dense", "none"), ("replay", preset)):
        logits = hf_kvquant.score(model, ids, prompt_length, config, mask)
        trained = logits[:, prompt_length - 1 : -1].double().log_softmax(-1)
        kl = (generated.exp() * (generated - trained)).sum(-1).mean().item()
        ratio = (trained.gather(-1, tokens) - generated.gather(-1, tokens)).exp()
        found[name] = (kl, torch.quantile(ratio.flatten(), torch.tensor([0.01, 0.5, 0.99]).double()).tolist())
    return found


presets = hf_kvquant.KVQuantConfig.preset_names()
presets = [name for name in presets if hf_kvquant.KVQuantConfig.preset(name).recent_length < new_tokens]
table = {preset: mismatch(preset) for preset in presets}
for preset, row in table.items():
    for name, (kl, ratio) in row.items():
        print(f"{preset:12}{name:8}KL {kl:.1e}   ratio", " ".join(f"{r:.3f}" for r in ratio))

# What a trainer needs: the same log-probabilities with gradients.
ids, generated = rollout("int4")
log_probs, _ = hf_kvquant.score_tokens(model, ids, prompt_length, "int4", mask, straight_through=True)
log_probs = log_probs[:, prompt_length - 1 :]
(-log_probs.mean()).backward()
