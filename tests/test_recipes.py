"""The recipes of eval/recipes: each runs, decodes from the quantized cache as stored, and does what its page says."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
from commands import call
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    pipeline,
)

import hf_kvquant
from hf_kvquant.host import CACHE

RECIPES = Path(__file__).parent.parent / "eval" / "recipes"
MODEL = hf_kvquant.__path__[0] + "/models/stdlib-nano"
# 4 layers; 8 new tokens, the first of which comes from the prompt.
ONE_GENERATION = {"prefill_dense": 4, "decode_fused": 28, "decode_dequantized": 0, "window_lost": 0, "nonfinite": 0}

pytestmark = pytest.mark.skipif(CACHE != "cache", reason="the recipes say `cache`, the name since transformers 5.24")


def remembered(kind: type, monkeypatch) -> list:
    """Every object of a class that is made from now on."""
    made, init = [], kind.__init__

    def remember(self, *args, **kwargs):
        made.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__init__", remember)
    return made


@pytest.fixture
def caches(monkeypatch) -> list[hf_kvquant.QuantizedCache]:
    """Every quantized cache that is made during a test: some frameworks do not return theirs."""
    return remembered(hf_kvquant.QuantizedCache, monkeypatch)


def needs(*packages: str) -> None:
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed; `make recipes` installs it")


def run(name: str) -> dict:
    """The variables of a recipe after it has run."""
    return runpy.run_path(str(RECIPES / f"{name}.py"))


def environment(folder: Path) -> dict[str, str]:
    """That of a new process that keeps its files in a folder."""
    return processes.environment(HF_MODULES_CACHE=str(folder))


def test_the_page_names_every_recipe():
    page = (RECIPES / "README.md").read_text(encoding="utf-8")
    for file in RECIPES.glob("*.*"):
        assert file.name == "README.md" or f"({file.name})" in page, file.name


def share(preset: str, dtype: torch.dtype, tokens: int) -> float:
    """The bytes of a cache with so many tokens of the bundled model, as a part of the dense cache's."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)
    cache = hf_kvquant.QuantizedCache(model.config, preset)
    with torch.no_grad(), hf_kvquant.attention(model):
        model(torch.ones(1, tokens, dtype=torch.long), cache=cache)
    report = cache.memory_report()
    return (report["total"] - report["slack"]) / report["dense_equivalent"]


def test_the_bytes_that_the_page_names():
    """The README names the 58 %, too."""
    for tokens in (30, 1000):
        assert round(share("int8-plain", torch.bfloat16, tokens), 2) == 0.52
        assert round(share("int8-plain", torch.float32, tokens), 2) == 0.26
    assert round(share("int8", torch.bfloat16, 1000), 2) == 0.58
    assert share("int8", torch.bfloat16, 129) > 1 > share("int8", torch.bfloat16, 133)


def test_peft():
    needs("peft")
    found = run("peft_adapters")
    assert found["first"].sequences.shape == found["merged"].sequences.shape
    assert found["second"].cache is found["first"].cache
    assert found["second"].cache.routes == ONE_GENERATION | {"decode_fused": 28 + 32}
    assert found["merged"].cache.routes == ONE_GENERATION
    (message,) = found["switched"]
    assert "'first' times 2.0 in the cache, 'second' times 2.0 in the model" in message


def test_offloaded_weights():
    needs("accelerate")
    found = run("offloaded_weights")
    for name in ("from_disk", "from_memory"):
        assert found[name].sequences.tolist() == found["plain"].sequences.tolist()
        assert found[name].cache.routes == ONE_GENERATION


@pytest.mark.parametrize(
    ("name", "package", "linear"),
    [("torchao", "torchao", "Int8Tensor"), ("quanto", "optimum.quanto", "QLinear"),
     ("bitsandbytes", "bitsandbytes", "Linear8bitLt")],
)  # fmt: skip
def test_quantized_weights(name, package, linear):
    """The tokens are those of plain calls with the same weights and a cache that is made by hand."""
    needs(package)
    found = run("quantized_weights")
    model, out = found["models"][name], found["outputs"][name]
    projection = model.model.layers[0].self_attn.q_proj
    assert linear in (type(projection).__name__, type(projection.weight).__name__)
    assert_as_by_hand(model, found["inputs"].input_ids, out)


def test_gguf():
    """The weights of the file are those of the model but for 8 bits, in the same order."""
    needs("gguf", "accelerate")
    found = run("gguf_weights")
    weights = dict(found["model"].named_parameters())
    for name, plain in found["plain"].named_parameters():
        assert (weights[name] - plain).abs().max() < plain.abs().max() / 50, name
    assert_as_by_hand(found["model"], found["inputs"].input_ids, found["out"])


def assert_as_by_hand(model, ids, out) -> None:
    assert out.cache.routes == ONE_GENERATION
    cache = hf_kvquant.QuantizedCache(model.config, "int8")
    with torch.no_grad(), hf_kvquant.attention(model):
        for _ in range(8):
            token = model(ids[:, cache.get_seq_length() :], cache=cache).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], dim=1)
    assert torch.equal(ids, out.sequences)
    assert cache.routes == ONE_GENERATION


def test_pipelines(caches):
    found = run("pipelines")
    assert len(found["batch"]) == 2
    assert found["chat"][0]["generated_text"][-1]["role"] == "assistant"
    # A generation of a pipeline may end early.
    assert len(caches) == 3
    for cache in caches:
        assert cache.routes["decode_fused"] > 0 == cache.routes["decode_dequantized"]


def test_saved_with_the_model(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", processes.environment()["PYTHONPATH"])
    found = run("saved_with_the_model")
    assert found["cache"].kv_config.values.format == "int4"
    assert found["cache"].routes == ONE_GENERATION
    with_import, without = found["runs"]["import hf_kvquant"], found["runs"][""]
    assert with_import.stdout == "kvquant\n"
    assert without.returncode == 1 and "Invalid `cache_implementation` (kvquant)" in without.stderr


def test_lm_eval(caches):
    needs("lm_eval", "datasets")
    found = run("lm_eval_hf")
    assert found["scores"]["kvquant-int8"] == found["scores"]["dynamic"] > 0.5
    assert len(caches) == 2 * 8
    for cache in caches:
        assert cache.routes["decode_fused"] > 0 == cache.routes["decode_dequantized"]


def test_lighteval(caches, monkeypatch):
    """It turns gradients off when it is imported, and downloads data of a task that is not asked for."""
    needs("lighteval")
    import requests

    monkeypatch.setattr(requests, "get", lambda url: SimpleNamespace(status_code=404))
    with torch.enable_grad():
        scores = run("lighteval_task")["scores"]
    assert scores["kvquant-int8"] == scores["dynamic"] > 0.5
    assert [cache.kv_config for cache in caches] == [
        hf_kvquant.KVQuantConfig.preset(name) for name in ("int8", "int4-small")
    ]
    for cache in caches:
        assert cache.routes["decode_fused"] > 0 == cache.routes["decode_dequantized"]


def test_from_a_repository(tmp_path):
    """In a process of its own, which does not import hf_kvquant before the repository does."""
    done = subprocess.run(
        [sys.executable, str(RECIPES / "from_a_repository.py")], env=environment(tmp_path), capture_output=True,
        text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{ONE_GENERATION}\n"


def test_kv_replay():
    """Replay gives the probabilities of the rollout, but for rounding; a dense pass does not."""
    found = run("kv_replay")
    for preset, row in found["table"].items():
        (dense, dense_ratio), (replay, ratio) = row["dense"], row["replay"]
        assert 0 <= replay < 1e-5 < dense, preset
        assert replay < dense / 20, preset
        assert max(abs(r - 1) for r in ratio) < 0.01 < max(abs(r - 1) for r in dense_ratio), preset
    tokens = found["ids"][:, found["prompt_length"] :, None]
    assert (found["log_probs"] - found["generated"].gather(-1, tokens)[..., 0]).abs().max() < 0.05
    assert found["model"].model.layers[0].self_attn.k_proj.weight.grad.norm() > 0


def test_smolagents(caches):
    needs("smolagents")
    assert 0 < run("smolagents_model")["answer"].token_usage.output_tokens <= 8
    assert [cache.routes["decode_fused"] > 0 for cache in caches] == [True]


def test_trl(caches, monkeypatch):
    needs("trl", "peft", "datasets")
    from hf_kvquant.batching import QuantizedPagedCache

    pages = remembered(QuantizedPagedCache, monkeypatch)
    found = run("trl_rollouts")
    for name, rewards in found["rewards"].items():
        assert sum(rewards[-2:]) > sum(rewards[:2]), name
    # Scoring makes caches, too, which stay empty.
    rollouts = [cache for cache in caches if not cache.is_empty]
    assert len(pages) == len(found["rewards"]["GRPO, pages"])
    assert len(rollouts) + len(pages) == sum(len(rewards) for rewards in found["rewards"].values())
    for cache in rollouts + pages:
        assert cache.routes["decode_fused"] > 0 == cache.routes["decode_dequantized"]
    for cache in rollouts:
        report = cache.memory_report()
        assert report["total"] - report["slack"] < 0.26 * report["dense_equivalent"]


# Each door, as a function of a model's folder and of what is asked for there.


def call_generate(folder, **asked):
    AutoModelForCausalLM.from_pretrained(folder).generate(torch.tensor([[5, 6]]), max_new_tokens=2, **asked)


def call_pipeline(folder, **asked):
    pipeline("text-generation", folder)("def", max_new_tokens=2, **asked)


def call_saved(folder, **asked):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.update(**asked)
    with tempfile.TemporaryDirectory() as mine:
        model.save_pretrained(mine)
        AutoModelForCausalLM.from_pretrained(mine).generate(torch.tensor([[5, 6]]), max_new_tokens=2)


def call_batch(folder, **asked):
    model = AutoModelForCausalLM.from_pretrained(folder)
    options = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16)
    config = GenerationConfig(max_new_tokens=2, **asked)
    model.generate_batch([[5, 6]], generation_config=config, continuous_batching_config=options)


def call_repository(folder, **asked):
    generate = runpy.run_path(str(RECIPES / "repository" / "custom_generate" / "generate.py"))["generate"]
    preset = asked.pop("cache_implementation").removeprefix("kvquant-")
    if asked:
        pytest.skip("it takes presets only")
    generate(AutoModelForCausalLM.from_pretrained(folder), preset, inputs=torch.tensor([[5, 6]]), max_new_tokens=2)


def call_peft(folder, **asked):
    needs("peft")
    import peft

    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(target_modules=["lm_head"])
    )
    model.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=2, **asked)


def call_accelerate(folder, **asked):
    needs("accelerate")
    import accelerate

    model = AutoModelForCausalLM.from_pretrained(folder)
    accelerate.cpu_offload(model, execution_device="cpu")
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, **asked)


def call_lm_eval(folder, **asked):
    needs("lm_eval", "datasets")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=folder, device="cpu")
    options = {"until": ["\n"], "max_gen_toks": 2, **asked}
    model.generate_until([Instance("generate_until", {}, ("def", options), 0)])


def call_smolagents(folder, **asked):
    needs("smolagents")
    import smolagents

    model = smolagents.TransformersModel(folder, device_map="cpu", max_new_tokens=2, **asked)
    model.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model.generate([{"role": "user", "content": [{"type": "text", "text": "def"}]}])


def call_trl(folder, **asked):
    needs("trl", "datasets")
    import datasets
    import trl

    name, more = asked.pop("cache_implementation"), {"generation_kwargs": asked} if asked else {}
    with tempfile.TemporaryDirectory() as out:
        config = trl.GRPOConfig(
            output_dir=out, cache_implementation=name, max_completion_length=2, num_generations=2, max_steps=1,
            per_device_train_batch_size=2, report_to="none", bf16=False, **more,
        )  # fmt: skip
        trl.GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder), args=config,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["def"] * 2}),
            processing_class=AutoTokenizer.from_pretrained(folder),
        ).train()  # fmt: skip


def call_replay(folder, cache_implementation, cache_config=None):
    kv_config = cache_config or cache_implementation.removeprefix("kvquant-")
    hf_kvquant.score_tokens(AutoModelForCausalLM.from_pretrained(folder), torch.tensor([[5, 6, 7]]), 2, kv_config)


def call_program(folder, cache_implementation, cache_config=None):
    asked = ["--config", cache_config] if cache_config else ["--preset", cache_implementation.removeprefix("kvquant-")]
    raise ValueError(" ".join(call("generate", folder, "def", *asked, code=2).output.replace("│", " ").split()))


DOORS = {name.removeprefix("call_"): door for name, door in list(globals().items()) if name.startswith("call_")}
UNKNOWN = (
    r"Invalid `cache_implementation` \(kvquant-int7\).*'kvquant-int4'|"
    "'int7' is (neither a preset nor a file|unknown); .*'int4'"
)
NOWHERE = r"'/nowhere\.yaml' is neither a preset nor a file|/nowhere\.yaml: cannot be read"
NO_ATTENTION = "MambaForCausalLM (does not support Cache|has layers that .* not serve)|mamba: .* nothing to quantize"


@pytest.fixture(scope="module")
def without_attention(tmp_path_factory) -> str:
    """The folder of a model that has nothing to quantize."""
    folder = tmp_path_factory.mktemp("mamba")
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=4096, hidden_size=16, num_hidden_layers=1, state_size=4, pad_token_id=2)
    MambaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
class TestBadInput:
    """One clear error at every door, which says what was wrong and what is expected."""

    def test_a_name_that_does_not_exist(self, door):
        with pytest.raises(ValueError, match=UNKNOWN):
            door(MODEL, cache_implementation="kvquant-int7")

    def test_a_config_that_does_not_exist(self, door):
        with pytest.raises(ValueError, match=NOWHERE):
            door(MODEL, cache_implementation="kvquant", cache_config="/nowhere.yaml")

    def test_a_model_that_cannot_be_quantized(self, door, without_attention):
        with pytest.raises(ValueError, match=NO_ATTENTION):
            door(without_attention, cache_implementation="kvquant-int8")


TOO_NEW = "import transformers.masking_utils as changed; del changed.AttentionMaskInterface\n"


PROGRAM = "import hf_kvquant_entry, sys; sys.argv = ['hf-kvquant', 'info']; hf_kvquant_entry.main()"
REPOSITORY = f"import runpy; runpy.run_path({str(RECIPES / 'from_a_repository.py')!r})"


@pytest.mark.parametrize("door", [PROGRAM, REPOSITORY], ids=["program", "repository"])
def test_a_transformers_that_is_too_new(door, tmp_path):
    """tests/test_host.py has `import hf_kvquant`, and every name that may be missing."""
    done = subprocess.run(
        [sys.executable, "-c", TOO_NEW + door], env=environment(tmp_path), capture_output=True, text=True, cwd=tmp_path
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert re.search(
        "transformers .* has no masking_utils.AttentionMaskInterface.* tested with transformers", lines[-1]
    )
    assert door is REPOSITORY or not any(line.startswith("Traceback") for line in lines)


def test_the_notebook(tmp_path):
    """Its cells run in order in a process of their own; it is stored without output, which would go stale."""
    notebook = json.loads((RECIPES / "first_steps.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "'decode_dequantized': 0" in done.stdout
    shares = dict(re.findall(r"^(\S+) +\d+ of \d+ tokens, (\d+)% of the bytes$", done.stdout, re.MULTILINE))
    assert list(shares) == hf_kvquant.KVQuantConfig.preset_names()
    assert int(shares["int4-small"]) < 30 < int(shares["int8-plain"]) < 60
