"""Train `stdlib-nano`, the small Llama model that ships in the wheel, on this machine's own Python source.

    python eval/train_model.py --minutes 50 --seed 0 --out hf_kvquant/models/stdlib-nano
    python eval/train_model.py --latent --minutes 50 --out stdlib-nano-latent --results stdlib-nano-latent

The demo, the tests and the accuracy measurements need a model that has truly learned to use its context, on machines
without a hub. So this trains a byte-level BPE and a 3.9 M parameter `LlamaForCausalLM` (grouped queries, head_dim 64,
context 2048, 7.8 MB in bfloat16) on the `.py` files of the standard library, which every machine has. About 5 % of the
files are held out (`held_out_files`), and about 8 % of the sequences are synthetic recall exercises.

With `--latent` the model has the latent attention of DeepSeek V3 instead (latents of 128 elements, rotary keys of 32),
to measure what quantized latents cost; it is not shipped.

Cost: `--minutes` of training on two CPU cores, then two or three minutes of measurement; 2 GB of memory. The learning
rate and the context length (512 for the first three quarters, then 2048) follow the elapsed share of the budget, so a
slow machine sees fewer tokens but always anneals to zero. Hence a re-run reproduces the recipe, not the bits.
A killed run goes on where it stopped with `--resume`.

Writes the model folder, and `train.json` and `loss.png` into `--results`.
"""

import argparse
import itertools
import json
import math
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, LlamaConfig, PreTrainedTokenizerFast

from hf_kvquant.measure.facts import machine, versions, whole_file
from hf_kvquant.measure.report.style import PRINT, new_figure
from hf_kvquant.measure.text import SKIPPED_FOLDERS, is_held_out

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
PROMPTS = ("import os\n\n\ndef ", "class Stack:\n", 'def read_lines(path):\n    """', "for name in sorted(")


@dataclass(frozen=True)
class Recipe:
    """The choices made by hand; `train.json` records them."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 672
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    # Only of latent attention.
    kv_lora_rank: int = 0
    qk_rope_head_dim: int = 32

    tokens_per_step: int = 4096
    short_context: int = 512
    long_context_from: float = 0.75  # share of the time budget after which sequences are 2048 long
    synthetic_share: float = 0.08
    muon_lr: float = 8e-3  # update RMS 0.2 * lr, see `adjust_lr_fn`
    adamw_lr: float = 4e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    decay_from: float = 0.4  # share of the time budget after which the rate falls linearly to zero
    max_grad_norm: float = 1.0


# ---- text ----------------------------------------------------------------------------------------------------------


def stdlib_files(stdlib=None) -> list[Path]:
    """The standard library's hand-written `.py` files, sorted: no tests, no tables, no near-duplicates.

    A file counts as a near-duplicate if over half of its long lines occur in files before it.
    """
    stdlib = Path(stdlib or sysconfig.get_paths()["stdlib"])
    files, seen = [], set()
    for path in sorted(stdlib.rglob("*.py"), key=lambda path: path.relative_to(stdlib).as_posix()):
        parts = path.relative_to(stdlib).parts
        # Folders such as config-3.11-x86_64-linux-gnu and files such as _sysconfigdata_* describe one machine.
        if SKIPPED_FOLDERS & set(parts) or "-" in parts[0] or parts[-1].startswith("_sysconfigdata"):
            continue
        text = read_source(path)
        if not text.strip() or "decoding_table" in text or parts == ("html", "entities.py"):
            continue
        lines = {line.strip() for line in text.splitlines() if len(line.strip()) >= 20}
        if lines and len(lines & seen) > len(lines) / 2:
            continue
        seen |= lines
        files.append(path)
    return files


def held_out_files(stdlib=None) -> list[Path]:
    """The files of `stdlib_files` that the model has never seen: about 5 %, chosen by the hash of their path.

    This is exact under the Python version of the training; others move text from one file to another.
    """
    stdlib = Path(stdlib or sysconfig.get_paths()["stdlib"])
    return [path for path in stdlib_files(stdlib) if is_held_out(path.relative_to(stdlib).as_posix())]


def read_source(path: Path) -> str:
    """The text of a source file, its line ends as they are; "" if it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return ""


# ---- synthetic recall exercises ------------------------------------------------------------------------------------


def random_word(rng) -> str:
    return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size=rng.integers(3, 7)))


def random_value(rng) -> str:
    return str(rng.integers(10, 10000)) if rng.random() < 0.5 else f"'{random_word(rng)}'"


def lookup_document(rng, items: int) -> str:
    """A dict literal with random keys, then lookups of some of them, in random order."""
    table = {random_word(rng): random_value(rng) for _ in range(items)}
    name = rng.choice(["d", "table", "config", "values", "mapping"])
    form = rng.choice(["assert {name}['{key}'] == {value}\n", ">>> {name}['{key}']\n{value}\n"])
    asked = rng.choice(list(table), size=max(2, len(table) // 2), replace=False)
    entries = "".join(f"    '{key}': {value},\n" for key, value in table.items())
    answers = "".join(form.format(name=name, key=key, value=table[key]) for key in asked)
    return f"{name} = {{\n{entries}}}\n{answers}"


def copy_document(rng, items: int) -> str:
    """A list of random lines, then the same list again."""
    lines = "".join(f"    '{random_word(rng)} {random_word(rng)}',\n" for _ in range(items))
    return f"first = [\n{lines}]\nsecond = [\n{lines}]\nassert first == second\n"


def induction_document(rng, items: int) -> str:
    """A few random values, repeated over and over."""
    period = [random_value(rng) for _ in range(max(2, items // 3))]
    return f"pattern = [{', '.join(period * 4)}]\n"


def synthetic_sequence(rng, tokenizer, length: int) -> list[int]:
    """Whole exercises, one after the other, cut at `length` tokens; longer sequences hold longer exercises."""
    ids = []
    while len(ids) < length:
        make = rng.choice([lookup_document, lookup_document, copy_document, induction_document])
        items = int(4 * (length / 64) ** rng.random())  # log-uniform from 4 to length / 16
        ids += [tokenizer.bos_token_id, *tokenizer(make(rng, items)).input_ids, tokenizer.eos_token_id]
    return ids[:length]


# ---- tokenizer and data --------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str], recipe: Recipe):
    """A byte-level BPE: any text comes back exactly, and nothing is added to it (no prefix space, no BOS)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def token_stream(texts: list[str], tokenizer):
    """All texts in one int64 array, each between BOS and EOS."""
    return numpy.concatenate([[tokenizer.bos_token_id, *tokenizer(text).input_ids, tokenizer.eos_token_id]
                              for text in texts])  # fmt: skip


class Sequences:
    """Sequence n of an endless, seeded order over one stream; holds no state, so a run resumes from the number alone.

    Every epoch cuts the stream at another offset and shuffles the pieces; a fixed share of sequences is synthetic.
    """

    def __init__(self, stream, tokenizer, length: int, recipe: Recipe, seed: int):
        self.stream, self.tokenizer, self.length, self.seed = stream, tokenizer, length, seed
        self.synthetic_share = recipe.synthetic_share
        self.count = (len(stream) - 1) // length - 1
        self.epoch = None

    def __getitem__(self, n: int):
        import numpy

        rng = numpy.random.default_rng([self.seed, self.length, n])
        if rng.random() < self.synthetic_share:
            return numpy.array(synthetic_sequence(rng, self.tokenizer, self.length + 1))
        epoch, index = divmod(n, self.count)
        if epoch != self.epoch:
            order_rng = numpy.random.default_rng([self.seed, self.length, epoch, 1])
            self.epoch, self.offset = epoch, order_rng.integers(self.length)
            self.order = order_rng.permutation(self.count)
        start = self.offset + self.order[index] * self.length
        return self.stream[start : start + self.length + 1]

    def batch(self, first: int, rows: int):
        import numpy
        import torch

        return torch.from_numpy(numpy.stack([self[n] for n in range(first, first + rows)]))


# ---- training ------------------------------------------------------------------------------------------------------


def build_model(recipe: Recipe, tokenizer):
    config_type, attention = LlamaConfig, {"head_dim": recipe.head_dim}
    if recipe.kv_lora_rank:
        config_type = DeepseekV3Config
        attention = {
            "kv_lora_rank": recipe.kv_lora_rank,
            "q_lora_rank": None,
            "qk_rope_head_dim": recipe.qk_rope_head_dim,
            "qk_nope_head_dim": recipe.head_dim,
            "v_head_dim": recipe.head_dim,
            "first_k_dense_replace": recipe.num_hidden_layers,  # no experts
        }
    config = config_type(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        max_position_embeddings=recipe.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **attention,
    )
    return AutoModelForCausalLM.from_config(config)


def build_optimizers(model, recipe: Recipe) -> list:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(
        matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [muon, adamw]


def lr_factor(progress: float, step: int, recipe: Recipe) -> float:
    """Linear warm-up by steps, then flat, then linearly to zero at the end of the time budget."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    return warm * min(1.0, max(0.0, 1.0 - progress) / (1.0 - recipe.decay_from))


@dataclass
class Progress:
    """The progress of a run; with model and optimizers it is the whole content of a checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    short_sequences: int = 0
    long_sequences: int = 0


def train(model, tokenizer, stream, held_out, recipe: Recipe, args) -> tuple[Progress, list[dict]]:
    """Train until the time budget is spent; returns where it ended and the loss curve (a point every 20 steps)."""

    def loss_of(ids):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    compiled_loss = torch.compile(loss_of, dynamic=False)
    optimizers = build_optimizers(model, recipe)
    progress, curve, recent = Progress(), [], []
    if args.resume and args.checkpoint.exists():
        saved = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        progress, curve = Progress(**saved["progress"]), saved["curve"]

    contexts = {"short": recipe.short_context, "long": recipe.max_position_embeddings}
    sequences = {kind: Sequences(stream, tokenizer, n, recipe, args.seed) for kind, n in contexts.items()}
    budget, last_saved, next_held_out = args.minutes * 60, progress.seconds, progress.seconds + args.minutes * 3
    bar = tqdm(total=round(budget), initial=round(progress.seconds), mininterval=10, smoothing=0,
               bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} s{postfix}")  # fmt: skip
    while progress.seconds < budget:
        started = time.monotonic()
        done = progress.seconds / budget
        kind = "short" if done < recipe.long_context_from else "long"
        rows = recipe.tokens_per_step // contexts[kind]
        first = getattr(progress, f"{kind}_sequences")
        factor = lr_factor(done, progress.step, recipe)
        for optimizer, lr in zip(optimizers, (recipe.muon_lr, recipe.adamw_lr), strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor

        loss = compiled_loss(sequences[kind].batch(first, rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        recent.append(loss.item())
        setattr(progress, f"{kind}_sequences", first + rows)
        progress.step += 1
        progress.tokens += recipe.tokens_per_step
        progress.seconds += time.monotonic() - started
        if progress.step % 20 == 0:
            point = {"step": progress.step, "tokens": progress.tokens, "seconds": round(progress.seconds, 1),
                     "context": contexts[kind], "train_loss": round(sum(recent) / len(recent), 4),
                     "lr_factor": round(factor, 4)}  # fmt: skip
            if progress.seconds >= next_held_out:
                next_held_out += args.minutes * 3  # every 5 % of the budget
                point["held_out_loss"] = round(window_losses(model, held_out[: 32 * 512 + 1], 512).mean().item(), 4)
            curve.append(point)
            recent.clear()
            bar.set_postfix_str(", ".join(f"{key} {value}" for key, value in point.items() if key != "seconds"))
        bar.update(round(progress.seconds) - bar.n)
        if progress.seconds - last_saved > 120:
            last_saved = progress.seconds
            save_checkpoint(args.checkpoint, model, optimizers, progress, curve)
    bar.close()
    save_checkpoint(args.checkpoint, model, optimizers, progress, curve)
    return progress, curve


def save_checkpoint(path: Path, model, optimizers, progress: Progress, curve: list[dict]) -> None:
    state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers],
             "progress": asdict(progress), "curve": curve}  # fmt: skip
    with whole_file(path) as temporary:
        torch.save(state, temporary)


# ---- measurement ---------------------------------------------------------------------------------------------------


def window_losses(model, stream, length: int):
    """Loss in nats of every token, [windows, length], over consecutive windows that start from an empty context."""
    windows = (len(stream) - 1) // length
    losses = []
    with torch.no_grad():
        for start in range(0, windows * length, length):
            ids = torch.as_tensor(stream[start : start + length + 1])
            logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
            losses.append(F.cross_entropy(logits.float(), ids[1:], reduction="none"))
    return torch.stack(losses)


def measure(model, tokenizer, train_stream, held_out, recipe: Recipe, seed: int) -> dict:
    """Held-out loss of the saved model: against the unigram baseline, by position, and on recall exercises."""
    length = recipe.max_position_embeddings
    losses = window_losses(model, held_out, length)
    targets = held_out[1 : losses.numel() + 1]
    num_bytes = len(tokenizer.decode(targets.tolist(), skip_special_tokens=True).encode())
    counts = numpy.bincount(train_stream, minlength=recipe.vocab_size) + 1.0
    unigram = float(-numpy.log(counts[targets] / counts.sum()).mean())
    mean = losses.mean().item()
    to_bits_per_byte = len(targets) / math.log(2) / num_bytes
    edges = [0, 64, 128, 256, 512, 768, 1024, 1536, 2048]
    # The same last quarter of every window, once with all that precedes it and once with at most half of it.
    late = losses[:, length * 3 // 4 :].mean().item()
    shorter = [window_losses(model, held_out[n + length // 2 : n + length + 1], length // 2)[0, length // 4 :]
               for n in range(0, losses.numel(), length)]  # fmt: skip
    return {
        "tokens": len(targets),
        "bytes": num_bytes,
        "held_out_loss": round(mean, 4),
        "held_out_bits_per_byte": round(mean * to_bits_per_byte, 4),
        "unigram_loss": round(unigram, 4),
        "unigram_bits_per_byte": round(unigram * to_bits_per_byte, 4),
        "loss_at_context_512": round(window_losses(model, held_out, 512).mean().item(), 4),
        "loss_by_position": {f"{a}-{b}": round(losses[:, a:b].mean().item(), 4)
                             for a, b in itertools.pairwise(edges)},
        "loss_of_last_quarter": {"context 1536-2048": round(late, 4),
                                 "context 512-1024": round(sum(x.mean().item() for x in shorter) / len(shorter), 4)},
        "lookup_accuracy": {str(items): lookup_accuracy(model, tokenizer, items, seed) for items in (8, 24, 48, 96)},
    }  # fmt: skip


def lookup_accuracy(model, tokenizer, items: int, seed: int, tables: int = 40) -> float:
    """Share of dict lookups answered exactly by greedy decoding, over fresh tables of `items` four-digit values."""
    right = 0
    for table_seed in range(tables):
        rng = numpy.random.default_rng([seed, items, table_seed, 2])
        table = {random_word(rng): str(rng.integers(1000, 10000)) for _ in range(items)}
        key = rng.choice(list(table))
        entries = "".join(f"    '{name}': {value},\n" for name, value in table.items())
        prompt = f"d = {{\n{entries}}}\nassert d['{key}'] =="
        ids = torch.tensor([tokenizer(prompt).input_ids])
        answer = tokenizer(f" {table[key]}\n").input_ids
        output = model.generate(ids, max_new_tokens=len(answer), do_sample=False)[0, ids.shape[1] :]
        right += tokenizer.decode(output).startswith(f" {table[key]}\n")
    return right / tables


def write_samples(model, tokenizer, seed: int) -> list[dict]:
    samples = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        for temperature in (0.0, 0.8):
            torch.manual_seed(seed)
            choice = {"temperature": temperature, "top_k": 0} if temperature else {}
            output = model.generate(**inputs, max_new_tokens=120, do_sample=bool(choice), **choice)
            text = tokenizer.decode(output[0], skip_special_tokens=True)
            samples.append({"prompt": prompt, "temperature": temperature, "text": text})
    return samples


def plot(curve: list[dict], measured: dict, path: Path) -> None:
    """Training and held-out loss over tokens, beside the held-out loss by position."""
    figure = new_figure(PRINT, (11, 4.2))
    left, right = figure.subplots(1, 2)
    held_out = [point for point in curve if "held_out_loss" in point]
    left.plot([p["tokens"] / 1e6 for p in curve], [p["train_loss"] for p in curve], lw=0.8, label="training")
    left.plot([p["tokens"] / 1e6 for p in held_out], [p["held_out_loss"] for p in held_out], "o-", ms=4,
              label="held-out files (first 16k tokens, context 512)")  # fmt: skip
    left.axhline(measured["unigram_loss"], color="grey", ls=":", label="unigram baseline, held-out files")
    long_from = next((p["tokens"] / 1e6 for p in curve if p["context"] > 512), None)
    if long_from:
        left.axvline(long_from, color="grey", lw=0.8, ls="--", label="context 512 → 2048")
    left.set(xlabel="training tokens (millions)", ylabel="loss (nats per token)", title="stdlib-nano: loss")
    left.legend(fontsize=8)
    bins = measured["loss_by_position"]
    right.bar(range(len(bins)), bins.values(), color="tab:orange")
    right.set_xticks(range(len(bins)), bins.keys(), rotation=45, ha="right")
    right.set(xlabel="position in a 2048-token window", ylabel="loss (nats per token)",
              title="Held-out loss by position, final model")  # fmt: skip
    figure.savefig(path, dpi=110)


# ---- the run -------------------------------------------------------------------------------------------------------


def main() -> None:
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=50, help="time budget of the training itself")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=root / "hf_kvquant/models/stdlib-nano")
    parser.add_argument("--results", type=Path, default=root / "eval/results/train_model")
    parser.add_argument("--checkpoint", type=Path, default=Path(tempfile.gettempdir()) / "stdlib-nano.pt")
    parser.add_argument("--latent", action="store_true", help="with latent attention; give --out and --results, too")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    args = parser.parse_args()
    if args.latent and parser.get_default("out") == args.out:
        parser.error("--latent: expected --out, the folder of another model than the shipped one")

    recipe = Recipe(num_key_value_heads=4, kv_lora_rank=128) if args.latent else Recipe()
    torch.manual_seed(args.seed)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    held_out_paths = held_out_files(stdlib)
    train_paths = sorted(set(stdlib_files(stdlib)) - set(held_out_paths))
    train_texts = [read_source(path) for path in train_paths]
    held_out_texts = [read_source(path) for path in held_out_paths]
    numpy.random.default_rng(args.seed).shuffle(train_texts)
    tokenizer = train_tokenizer(train_texts, recipe)
    stream, held_out = token_stream(train_texts, tokenizer), token_stream(held_out_texts, tokenizer)
    model = build_model(recipe, tokenizer)
    print(f"{len(train_texts)} files, {len(stream)} tokens; held out: {len(held_out_texts)} files, {len(held_out)} "
          f"tokens; {model.num_parameters()} parameters", flush=True)  # fmt: skip

    progress, curve = train(model, tokenizer, stream, held_out, recipe, args)

    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.model_max_length = recipe.max_position_embeddings
    tokenizer.save_pretrained(args.out)
    # safetensors makes the file readable by its owner only; the files of a wheel must be readable by everybody.
    (args.out / "model.safetensors").chmod(0o644)
    # Measure what ships: the rounded weights, read back from the folder.
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    measured = measure(model, tokenizer, stream, held_out, recipe, args.seed)
    result = {
        "command": "python eval/train_model.py "
                   f"{'--latent ' if args.latent else ''}--minutes {args.minutes:g} --seed {args.seed}",
        "seed": args.seed,
        "machine": machine(),
        "versions": versions(["tokenizers"]),
        "recipe": asdict(recipe),
        "parameters": model.num_parameters(),
        "train": {"files": len(train_texts), "tokens": len(stream)},
        "held_out": {"files": len(held_out_texts), "tokens": len(held_out),
                     "names": [path.relative_to(stdlib).as_posix() for path in held_out_paths]},
        "progress": asdict(progress),
        "tokens_per_second": round(progress.tokens / progress.seconds),
        "measured": measured,
        "samples": write_samples(model, tokenizer, args.seed),
        "curve": curve,
    }  # fmt: skip
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "train.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    plot(curve, measured, args.results / "loss.png")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
