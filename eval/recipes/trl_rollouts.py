"""TRL: rollouts of GRPO and RLOO from a quantized cache, with plain generation of transformers; and with KV replay.

pip install trl peft; python eval/recipes/trl_rollouts.py
"""

import tempfile

import datasets
import peft
import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvquant

# No exact copies: even short rollouts take about half of a bfloat16 cache's bytes, and a quarter of a float32 cache's.
PRESET = "int8-plain"

folder = hf_kvquant.__path__[0] + "/models/stdlib-nano"
tokenizer = AutoTokenizer.from_pretrained(folder)
prompts = ["def read_lines(path):\n", "class Path:\n", "import os\n", "for line in file:\n"]


def share_of_spaces(completions: list[str], **kwargs: object) -> list[float]:
    """A reward that a few steps can raise."""
    return [sum(c.isspace() for c in text) / max(len(text), 1) for text in completions]


class ReplayTrainer(trl.GRPOTrainer):
    """GRPO with the log-probabilities that the rollouts had, in the place of a dense pass's (see kv_replay.py)."""

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        context, policy = input_ids.shape[1] - logits_to_keep, self.accelerator.unwrap_model(model)
        # Rows from the last one of the prompt on; the last row of all predicts no token.
        options = {"first_row": context - 1, "straight_through": True}
        chunks = hf_kvquant.score_chunks(policy, input_ids, context, PRESET, attention_mask, **options)
        log_probs = torch.cat([logits for _, logits in chunks], dim=1)[:, :-1].log_softmax(-1)
        chosen = log_probs.gather(-1, input_ids[:, context:, None])[..., 0]
        return chosen, -(log_probs.exp() * log_probs).sum(-1).detach(), None


def train(trainer: type, config: type, lora: peft.LoraConfig | None = None, **more: object) -> list[float]:
    """The mean reward of every step. `more` goes to the config."""
    with tempfile.TemporaryDirectory() as out:
        options = config(
            output_dir=out, cache_implementation=f"kvquant-{PRESET}", max_completion_length=24, num_generations=8,
            per_device_train_batch_size=32, max_steps=6, learning_rate=2e-3 if lora is None else 2e-2, logging_steps=1,
            save_strategy="no", report_to="none", bf16=False, disable_tqdm=True, seed=0, **more,
        )  # fmt: skip
        running = trainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
            args=options,
            reward_funcs=share_of_spaces,
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts * 32}),
            processing_class=tokenizer,
            peft_config=lora,
        )
        running.train()
    return [entry["reward"] for entry in running.state.log_history if "reward" in entry]


# With continuous batching, every rollout has quantized pages; its options are those of a ContinuousBatchingConfig.
pages = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"num_blocks": 64, "max_batch_tokens": 512},
}
rewards = {
    "GRPO": train(trl.GRPOTrainer, trl.GRPOConfig),
    "GRPO, replay": train(ReplayTrainer, trl.GRPOConfig),
    "GRPO, pages": train(trl.GRPOTrainer, trl.GRPOConfig, **pages),
    "RLOO": train(trl.RLOOTrainer, trl.RLOOConfig),
    "GRPO, LoRA": train(
        trl.GRPOTrainer, trl.GRPOConfig, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    ),
}
for name, series in rewards.items():
    print(name, " ".join(f"{reward:.2f}" for reward in series))
