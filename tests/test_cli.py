"""`hf-kvquant`: every command on a tiny random model, its figures against independent ones, and its errors."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import matplotlib.image
import processes
import pytest
import torch
from commands import call
from hf_kvquant_entry import COMMANDS
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_kvquant
from hf_kvquant import KVQuantConfig, ops
from hf_kvquant.cli import app, demo, evaluate, report
from hf_kvquant.measure import facts as measured
from hf_kvquant.measure.caches import DENSE
from hf_kvquant.measure.generation import NOISE_BOUND, Speed, run
from hf_kvquant.measure.text import bundled_model, held_out_files, windows
from hf_kvquant.scoring import DENSE as NOT_QUANTIZED

ROOT = Path(__file__).parent.parent
PRESETS = KVQuantConfig.preset_names()
LAYERS = 2
PROMPT = "def pop(self):\n    return self.items"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random Llama and a tokenizer with one token per byte, saved."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={"<bos>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet) + 1,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=192,
        bos_token_id=0,
        eos_token_id=None,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class TestInfo:
    def test_a_block_for_an_issue(self):
        """Every fact in a line of its own, whatever the terminal's width, and no path of the user's."""
        facts, lines = (
            json.loads(call("info", "--json").stdout),
            call("info", "--issue", columns=40).stdout.splitlines(),
        )
        assert (lines[0], lines[-1]) == ("```text", "```")
        said = {name: value.strip() for name, _, value in (line.partition(":") for line in lines[1:-1])}
        assert said["cpu backend"].startswith(facts["backends"]["cpu"]["chosen"])
        assert said["processor"] == facts["machine"]["cpu"]
        for name, version in facts["versions"].items():
            assert f"{name} {version}" in said["versions"]
        assert str(Path.home()) not in "".join(lines) and hf_kvquant.__path__[0] not in "".join(lines)

    def test_json(self):
        facts = json.loads(call("info", "--json").stdout)
        assert facts["backends"]["cpu"]["chosen"] == ops.choose_backend("auto", "cpu", torch.float32)
        assert facts["versions"]["torch"] == torch.__version__
        assert facts["versions"]["python"].split(".") == [str(n) for n in sys.version_info[:3]]
        assert facts["machine"]["threads"] == torch.get_num_threads()
        assert (facts["machine"]["gpu"] == "none") == (not torch.cuda.is_available())
        assert list(facts["presets"]) == PRESETS
        for name, preset in facts["presets"].items():
            assert KVQuantConfig.from_dict(preset["config"]) == KVQuantConfig.preset(name)
            assert preset["bits_per_element"] == KVQuantConfig.preset(name).bits_per_element(128)

    @pytest.mark.parametrize("columns", [80, 140])
    def test_text_says_the_same(self, columns):
        facts = json.loads(call("info", "--json").stdout)
        text = call("info", columns=columns).stdout
        assert facts["backends"]["cpu"]["chosen"] in text
        for name, preset in facts["presets"].items():
            row = next(line for line in text.splitlines() if f" {name} " in line)
            assert f"{preset['bits_per_element']:g}" in row

    def test_a_backend_that_cannot_run_is_explained(self, monkeypatch):
        monkeypatch.setattr(ops, "backend_status", lambda name: f"no {name} library")
        backend = json.loads(call("info", "--json").stdout)["backends"]["cpu"]
        assert backend["chosen"] == "reference"
        assert "no cpu library" in backend["why"]

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({}, "default settings: waiting threads spin (OMP_WAIT_POLICY=passive lets them sleep)"),
            ({"OMP_WAIT_POLICY": "PASSIVE"}, "OMP_WAIT_POLICY=PASSIVE: waiting threads sleep"),
            (
                {"GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": "1"},
                "GOMP_SPINCOUNT=0 OMP_NUM_THREADS=1: waiting threads sleep",
            ),
            ({"OMP_WAIT_POLICY": "active"}, "OMP_WAIT_POLICY=active: waiting threads spin"),
        ],
        ids=str,
    )
    def test_how_threads_wait(self, monkeypatch, settings, said):
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        assert measured.openmp().startswith(said)
        assert said in " ".join(call("info", columns=250).stdout.split())

    def test_the_instruction_set_of_torch(self):
        program = "from hf_kvquant.measure.facts import machine; print(machine()['torch'])"
        limits = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
        environment = {k: v for k, v in processes.environment(**limits).items() if k != "ONEDNN_MAX_CPU_ISA"}
        done = subprocess.run([sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True)
        assert done.stdout == "DEFAULT ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=AVX2\n", done.stderr


PROGRAM = """
import sys
from importlib import metadata
sys.argv = ["hf-kvquant", *{arguments}]
entry, = metadata.entry_points(group="console_scripts", name="hf-kvquant")
try:
    entry.load()()
finally:
    print("imported:", *sorted({{name.partition(".")[0] for name in sys.modules}}))
"""


def program(*arguments: str) -> subprocess.CompletedProcess:
    """Run the installed program in a process of its own; its last line names the packages that it imported."""
    # Not in the repository's folder, where Python would import the source instead of the installed package.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "COLUMNS": "140"}
    code = PROGRAM.format(arguments=list(arguments))
    return subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )


class TestProgram:
    @pytest.mark.parametrize(
        ("arguments", "code"), [(["--help"], 0), ([], 2), (["inf"], 2)], ids=["help", "none", "typo"]
    )
    def test_without_a_command_it_imports_neither_torch_nor_transformers(self, arguments, code):
        run = program(*arguments)
        assert run.returncode == code, run.stderr
        said, _, imported = run.stdout.rpartition("imported: ")
        assert "typer" in imported.split()
        assert not {"torch", "transformers", "hf_kvquant", "numpy"} & set(imported.split())
        if "inf" in arguments:
            assert "No such command" in run.stderr
        else:
            assert all(name in said + run.stderr for name in COMMANDS)

    def test_a_command_runs(self):
        run = program("info", "--json")
        assert run.returncode == 0, run.stderr
        facts, _, imported = run.stdout.rpartition("imported: ")
        assert "presets" in json.loads(facts)
        assert "torch" in imported.split()

    def test_the_help_is_that_of_the_commands(self):
        registered = {command.name: command.callback.__doc__ for command in app.registered_commands}
        assert registered == COMMANDS


def continuation(folder: Path, cache: str | None, new_tokens: int, prompt: str = PROMPT):
    """Text and cache of the same generation through the library itself."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    output = model.generate(
        ids, max_new_tokens=new_tokens, do_sample=False, cache_implementation=cache, return_dict_in_generate=True
    )
    return tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True), output.past_key_values


class TestGenerate:
    @pytest.mark.parametrize("preset", [*PRESETS, NOT_QUANTIZED])
    def test_text_bytes_and_routes(self, folder, preset):
        result = call("generate", folder, PROMPT, "--preset", preset, "--max-new-tokens", 40)
        text, cache = continuation(folder, None if preset == NOT_QUANTIZED else f"kvquant-{preset}", 40)
        assert result.stdout.strip() == text.strip()
        if preset == NOT_QUANTIZED:
            nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            assert f"{nbytes:,}, 1.000 of a dense cache" in result.stderr
            assert "routes" not in result.stderr
        else:
            memory = cache.memory_report()
            ratio = memory["total"] / memory["dense_equivalent"]
            assert f"{memory['total']:,}, {ratio:.3f} of a dense cache" in result.stderr
            assert f"prefill_dense {LAYERS}, decode_fused {LAYERS * 39}, decode_dequantized 0" in result.stderr
            assert f"{preset}, read by the {ops.choose_backend('auto', 'cpu', torch.float32)} backend" in result.stderr
        assert f"{len(PROMPT)} tokens, " in result.stderr
        assert "40 tokens, " in result.stderr

    def test_a_config_file_and_a_prompt_file(self, folder, tmp_path):
        (tmp_path / "mine.yaml").write_text("{keys: {format: int8}, values: {format: dense}}")
        (tmp_path / "prompt.py").write_text(PROMPT)
        config, prompt = tmp_path / "mine.yaml", tmp_path / "prompt.py"
        result = call("generate", folder, "--prompt-file", prompt, "--config", config, "--max-new-tokens", 5)
        assert "mine.yaml, read by" in result.stderr
        assert f"decode_fused {LAYERS * 4}" in result.stderr
        _, cache = continuation(folder, "kvquant-int8-plain", 5)
        assert f"{cache.memory_report()['total']:,}" not in result.stderr

    def test_sampling_follows_its_seed(self, folder):
        arguments = "generate", folder, PROMPT, "--temperature", 1.5, "--max-new-tokens", 40
        texts = [call(*arguments, "--seed", seed).stdout for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]

    def test_dtype(self, folder):
        result = call(
            "generate", folder, PROMPT, "--preset", NOT_QUANTIZED, "--dtype", "float16", "--max-new-tokens", 2
        )
        tokens = len(PROMPT) + 1
        assert f"({LAYERS * 2 * tokens * 32 * 2:,} in float16)" in result.stderr

    def test_one_token_has_no_decode_speed(self, folder):
        decode = {
            n: call("generate", folder, PROMPT, "--max-new-tokens", n)
            .stderr.split("decode")[1]
            .splitlines()[0]
            .strip()
            for n in (1, 2)
        }
        assert decode[1] == "1 tokens"
        assert decode[2].endswith("tokens/s after the first")

    def test_a_text_longer_than_the_model_was_made_for_is_noted(self, folder):
        assert "more than the 192" in call("generate", folder, "x" * 150, "--max-new-tokens", 43).stderr
        assert "more than" not in call("generate", folder, "x" * 149, "--max-new-tokens", 43).stderr


ERRORS = {
    "no such model": (["{no}/model", "x"], "does not exist"),
    "a folder without a model": (["{empty}", "x"], "has no config.json"),
    "a broken model": (["{broken}", "x"], "cannot be loaded"),
    "weights that were cut short": (["{cut}", "x"], "cannot be loaded: Error while deserializing header"),
    "no tokenizer": (
        ["{untold}", "x"],
        "cannot be loaded: Couldn't instantiate the backend tokenizer from one of: (1)",
    ),
    "no such preset": (["{model}", "x", "--preset", "int5"], "'int5' is unknown"),
    "no such file": (["{model}", "x", "--config", "{no}.yaml"], "cannot be read"),
    "not a config": (["{model}", "x", "--config", "{bad}"], "unknown field"),
    "a group size that does not fit": (["{model}", "x", "--config", "{group}"], "does not divide head_dim"),
    "a layer that the model lacks": (["{model}", "x", "--config", "{layer}"], "no such full-attention layer"),
    "a backend that cannot run": (["{model}", "x", "--config", "{cuda}"], "cannot run"),
    "preset and file": (["{model}", "x", "--preset", "int8", "--config", "{bad}"], "not both"),
    "no prompt": (["{model}"], "give a prompt"),
    "two prompts": (["{model}", "x", "--prompt-file", "{bad}"], "not both"),
    "no such prompt file": (["{model}", "--prompt-file", "{no}.txt"], "cannot be read"),
    "an empty prompt": (["{model}", ""], "no token"),
    "greedy at a temperature": (["{model}", "x", "--greedy", "--temperature", "1"], "not both"),
    "a temperature of zero": (["{model}", "x", "--temperature", "0"], "above 0"),
    "a temperature that is no number": (["{model}", "x", "--temperature", "nan"], "above 0"),
    "a seed of too many bits": (["{model}", "x", "--seed", 2**64], "less than or equal to 18446744073709551615"),
    "an unknown option": (["{model}", "x", "--bits", "4"], "No such option"),
}


class TestErrors:
    @pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS)
    def test_generate(self, folder, tmp_path, arguments, message):
        sides = "keys: {format: int8}, values: {format: int8}"
        written = {
            "bad": "{formats: int8}",
            "group": "{keys: {format: int8, group_size: 48}, values: {format: int8}}",
            "layer": f"{{{sides}, layers: {{9: {{keys: {{format: int4}}}}}}}}",
            "cuda": f"{{{sides}, backend: cuda}}",
        }
        places = {"model": folder, "no": tmp_path / "no", "empty": tmp_path / "empty", "broken": tmp_path / "broken"}
        for name, text in written.items():
            places[name] = tmp_path / f"{name}.yaml"
            places[name].write_text(text)
        places["empty"].mkdir()
        places["broken"].mkdir()
        (places["broken"] / "config.json").write_text("{}")
        for name in ("cut", "untold"):
            places[name] = shutil.copytree(folder, tmp_path / name)
        weights = places["cut"] / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        for file in places["untold"].glob("token*"):
            file.unlink()
        if "{cuda}" in arguments and torch.cuda.is_available():
            pytest.skip("there is a GPU")
        result = call("generate", *(str(a).format(**places) for a in arguments), code=2)
        said = " ".join(result.output.replace("│", " ").split())
        assert message in said
        assert "Traceback" not in said
        assert isinstance(result.exception, SystemExit)

    @pytest.mark.parametrize(
        "command", [["eval", "--model"], ["tune", "--bits", 5], ["demo", "--model"], ["report"]], ids=lambda c: c[0]
    )
    def test_a_folder_that_cannot_be_made(self, folder, tmp_path, command):
        (tmp_path / "file").write_text("")
        result = call(*command, folder, "--out", tmp_path / "file" / "new", code=2, columns=400)
        assert f"'{tmp_path / 'file' / 'new'}' cannot be a folder: '{tmp_path / 'file'}' is no folder" in result.output

    @pytest.mark.parametrize(
        "command", [["check", "--preset", "int4", "--write"], ["calibrate", "--out"]], ids=lambda c: c[0]
    )
    def test_a_file_that_cannot_be_written(self, folder, tmp_path, command):
        for file in (tmp_path, tmp_path / "no" / "new"):
            result = call(*command, file, folder, code=2, columns=400)
            assert f"'{file}' is not allowed; expected a file's name in an existing folder" in result.output

    def test_a_folder_that_may_not_be_written_to(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: mode & os.W_OK == 0 or Path(path) != tmp_path)
        result = call("demo", "--model", folder, "--out", tmp_path / "new", code=2, columns=400)
        assert f"'{tmp_path}' may not be written to" in result.output
        result = call("calibrate", folder, "--out", tmp_path / "new", code=2, columns=400)
        assert f"'{tmp_path / 'new'}' is not allowed" in result.output

    def test_demo(self, folder, tmp_path):
        (tmp_path / "file").write_text("")
        for arguments, message in (
            (["--model", tmp_path / "no"], "does not exist"),
            (["--model", folder, "--new-tokens", 192], "do not fit"),
            (["--model", folder, "--new-tokens", 8, "--positions", 10**9], "held-out source has"),
            (["--model", folder, "--out", tmp_path / "file"], "cannot be a folder"),
        ):
            out = [] if "--out" in arguments else ["--out", tmp_path / "out"]
            result = call("demo", *arguments, *out, code=2)
            assert message in " ".join(result.output.replace("│", " ").split())


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The output of a demo, its figures, its folder, and its report with the tokenizer."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    arguments = "--positions", 250, "--new-tokens", 20, "--prompt-tokens", 100
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        show = demo.show
        patch.setattr(demo, "show", lambda *given: (shown.append(given[:2]), show(*given)))
        result = call("demo", "--model", folder, "--out", out, *arguments, columns=80)
    return result.stdout, json.loads((out / "demo.json").read_text()), out, shown[0]


class TestDemo:
    def test_table_and_json_agree(self, finished):
        text, figures, *_ = finished
        table = text[text.index("Every cache") :].splitlines()
        for name, cache in figures["caches"].items():
            row = next(line.split() for line in table if line.split()[:1] == [name])
            expected = [
                f"{cache['bits_at_long_context']:g}",
                f"{cache['memory']['total'] / 1e3:,.0f}",
                f"{cache['ratio']:.3f}",
            ]
            for rate in (cache["prefill_tokens_per_second"], cache["decode_tokens_per_second"]):
                expected.append("noisy" if rate is None else f"{rate:,.0f}")
            if name != DENSE:
                expected.append(f"{cache['same_tokens_scored']['median']:g}")
                expected += [f"{cache['agreement'][kind]:.2%}" for kind in ("greedy", "held_out")]
            else:
                expected += ["–"] * 3
            assert row[1:] == expected

    def test_every_header_is_whole(self, finished):
        lines = finished[0][finished[0].index("Every cache") :].splitlines()
        heads = " ".join(" ".join(lines[1:4]).split())
        assert "…" not in heads
        assert all(word in heads for word in ("bits", "dense", "prompt,", "choice,", "own text", "real text"))

    def test_it_says_where_the_files_are(self, finished):
        text, _, out, _ = finished
        said = "".join(text.split())
        assert f"Plot:{out / 'demo.png'}" in said
        assert f"Figures:{out / 'demo.json'}" in said

    def test_json(self, finished):
        _, figures, *_ = finished
        assert list(figures["caches"]) == [DENSE, *PRESETS]
        assert figures["scoring"]["positions"] >= 250
        assert figures["writing"]["prompt_tokens"] == 100
        for name, cache in figures["caches"].items():
            assert cache["ratio"] == cache["memory"]["total"] / cache["memory"]["dense_equivalent"]
            assert cache["memory"]["dense_equivalent"] == LAYERS * 2 * 119 * 32 * 4
            assert cache["bytes_per_element"] == 4 * cache["ratio"]
            for kind in ("prefill", "decode"):
                rates = cache[f"{kind}_rounds"]
                assert len(rates) == 5 and min(rates) > 0
                speed = Speed(rates)
                assert cache[f"{kind}_spread"] == speed.spread
                assert cache[f"{kind}_tokens_per_second"] == (median(rates) if speed.spread <= NOISE_BOUND else None)
            assert 1 <= cache["same_tokens"] <= 20
            assert (cache["text"] == figures["caches"][DENSE]["text"]) == (cache["same_tokens"] == 20)
            if name == DENSE:
                assert cache["agreement"] == {"greedy": 1.0, "held_out": 1.0}
                assert cache["same_tokens"] == 20
            else:
                assert KVQuantConfig.from_dict(cache["config"]) == KVQuantConfig.preset(name)
                assert cache["routes"]["decode_fused"] == LAYERS * 19
                assert cache["routes"]["decode_dequantized"] == 0

    @pytest.mark.parametrize("preset", ["int4", "int4-small"])
    def test_agreement_is_that_of_real_decode(self, finished, folder, preset):
        """The test decodes token by token, and lets the text run freely."""
        scoring, cache = finished[1]["scoring"], finished[1]["caches"][preset]
        context, new = scoring["context"], scoring["new_tokens"]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        texts, sources = windows(AutoTokenizer.from_pretrained(folder), len(scoring["sources"]), context + new)
        assert sources == scoring["sources"]
        with torch.inference_mode():
            decoded = hf_kvquant.score_by_decoding(model, texts, context, preset)[:, context:].argmax(-1)
            dense = model(texts).logits[:, context:].argmax(-1)
        assert decoded.numel() == scoring["positions"]
        # Rounding may decide a tie the other way.
        agreement = (decoded == dense).float().mean().item()
        assert agreement == pytest.approx(cache["agreement"]["held_out"], abs=1.5 / scoring["positions"])
        assert agreement < 1, "this model's tokens must depend on the cache, else the test says nothing"

        options = {"max_new_tokens": new, "do_sample": False, "attention_mask": torch.ones_like(texts[:, :context])}
        free, reference = (
            model.generate(texts[:, :context], cache_implementation=name, **options)[:, context:]
            for name in (f"kvquant-{preset}", None)
        )
        same = (free == reference).long().cumprod(-1).sum(-1).tolist()
        per_prompt = cache["same_tokens_scored"]["per_prompt"]
        assert sum(a != b for a, b in zip(same, per_prompt, strict=True)) <= 1
        assert min(same) < new

    def test_a_noisy_speed_is_no_figure(self, finished, tmp_path, monkeypatch):
        """If another program disturbs rounds of one cache, the table and the plot say so for that cache only."""
        report, tokenizer = finished[3]
        slow = {name: Speed([20.0, 7.0, 101.0, 21.0, 99.0]) for name in ("int8",)}
        calm = {name: Speed([100.0, 98.0, 101.0, 99.0, 40.0]) for name in report.decode}
        console = Console(width=80, record=True, file=io.StringIO())
        demo.show(replace(report, prefill=calm, decode=calm | slow), tokenizer, console)
        text = console.export_text()
        table = text[text.index("Every cache") :].splitlines()
        rows = {line.split()[0]: line.split() for line in table if line.split()[:1] and len(line.split()) >= 9}
        assert rows["int8"][4:6] == ["99", "noisy"]
        assert all(row[4:6] == ["99", "99"] for name, row in rows.items() if name in PRESETS and name != "int8")
        assert "noisy: no figure" in " ".join(text.split())
        figures = replace(report, prefill=calm, decode=calm | slow).figures()
        assert figures["caches"]["int8"]["decode_tokens_per_second"] is None
        assert figures["caches"]["int8"]["decode_rounds"] == [20.0, 7.0, 101.0, 21.0, 99.0]
        demo.plot(figures, tmp_path / "noisy.png")
        assert (tmp_path / "noisy.png").stat().st_size > 10_000

    def test_speed(self):
        assert Speed([20.0, 7.0, 101.0, 21.0, 99.0]).median is None
        assert Speed([100.0, 125.1, 100.0]).median is None
        # Two disturbed rounds of five do not change the median.
        assert Speed([100.0, 104.0, 1.0, 102.0, 5.0]).median == 100
        assert Speed([100.0, 104.0, 1.0, 102.0, 5.0]).spread == pytest.approx(0.04)
        assert Speed([100.0, 100.0]).spread is None
        assert Speed([100.0, 100.0]).median is None

    def test_caches_take_turns(self, folder, tmp_path, monkeypatch):
        order = []

        def noted(model, prompt, config, new_tokens, **options):
            order.append((config, new_tokens))
            return run(model, prompt, config, new_tokens, **options)

        monkeypatch.setattr(demo, "run", noted)
        call("demo", "--model", folder, "--out", tmp_path, "--positions", 8, "--new-tokens", 2, "--prompt-tokens", 8)
        configs = [None, *(KVQuantConfig.preset(name) for name in PRESETS)]
        # A warm-up of each cache, then five rounds.
        assert [config for config, _ in order] == configs * 6
        assert [new for _, new in order[len(configs) :]] == [2] * 5 * len(configs)

    def test_a_busy_machine_gets_fewer_rounds_and_says_so(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(demo, "_ROUNDS_SECONDS", 0)
        arguments = "--positions", 8, "--new-tokens", 2, "--prompt-tokens", 8
        text = call("demo", "--model", folder, "--out", tmp_path, *arguments).stdout
        assert "noisy: no figure" in text
        figures = json.loads((tmp_path / "demo.json").read_text())
        assert all(len(cache["decode_rounds"]) == 1 for cache in figures["caches"].values())
        assert all(cache["decode_tokens_per_second"] is None for cache in figures["caches"].values())

    def test_the_plot_is_no_blank_page(self, finished):
        file = finished[2] / "demo.png"
        assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        pixels = matplotlib.image.imread(file)
        assert pixels.shape[0] > 300
        assert pixels.shape[1] > 900
        for part in torch.from_numpy(pixels).tensor_split(3, dim=1):
            assert (part[..., :3] < 0.9).any(-1).float().mean() > 0.02

    def test_without_matplotlib_there_is_no_plot_and_it_says_so(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(demo, "find_spec", lambda name: None)
        arguments = "--positions", 8, "--new-tokens", 2, "--prompt-tokens", 8
        result = call("demo", "--model", folder, "--out", tmp_path, *arguments)
        assert "matplotlib is not installed" in result.stdout
        assert [f.name for f in tmp_path.iterdir()] == ["demo.json"]

    def test_a_prompt_that_does_not_fit_is_shortened_and_it_says_so(self, folder, tmp_path):
        arguments = "--positions", 8, "--new-tokens", 20, "--prompt-tokens", 1000
        result = call("demo", "--model", folder, "--out", tmp_path, *arguments)
        assert "prompt has 172 tokens instead of 1000" in result.stdout
        assert json.loads((tmp_path / "demo.json").read_text())["writing"]["prompt_tokens"] == 172


class TestText:
    def test_only_files_that_the_model_was_not_trained_on(self):
        spec = importlib.util.spec_from_file_location("train_model", ROOT / "eval" / "train_model.py")
        train_model = importlib.util.module_from_spec(spec)
        sys.modules["train_model"] = train_model
        try:
            spec.loader.exec_module(train_model)
            held_out = train_model.held_out_files()
        finally:
            del sys.modules["train_model"]
        assert set(held_out_files().values()) <= set(held_out)
        assert len(held_out_files()) > 10

    def test_windows(self, folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids, names = windows(tokenizer, 60, 1000)
        files = held_out_files()
        assert ids.shape == (60, 1000)
        assert (ids[:, 0] == tokenizer.bos_token_id).all()
        assert len(set(map(tuple, ids.tolist()))) == 60
        assert files[names[0]].read_text(encoding="utf-8").startswith(tokenizer.decode(ids[0, 1:])[:500])
        assert len(set(names[:10])) == 10
        assert (windows(tokenizer, 60, 1000)[0] == ids).all()

    def test_text_for_calibration_is_other_text(self, folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids, names = windows(tokenizer, 60, 1000, held_out=False)
        assert ids.shape == (60, 1000) and len(set(names)) == 60
        assert not set(names) & set(held_out_files())

    def test_the_bundled_model_is_there(self):
        assert (bundled_model() / "model.safetensors").stat().st_size > 1e6


@pytest.fixture(scope="module")
def evaluation(folder, tmp_path_factory) -> list:
    """Arguments of a small evaluation."""
    text = tmp_path_factory.mktemp("text") / "numbers.txt"
    text.write_text(NUMBERS, encoding="utf-8")
    return ["eval", "--model", folder, "--text", text, *EVALUATION]


@pytest.fixture(scope="module")
def evaluated(evaluation, tmp_path_factory) -> tuple[Path, str]:
    """The folder of one evaluation, and the output of the command."""
    out = tmp_path_factory.mktemp("evaluated")
    return out, call(*evaluation, "--out", out).stdout


NUMBERS = "".join(f"{i:04d}" for i in range(500))


EVALUATION = ["--presets", "fp16,int8,int4", "--documents", "2", "--window", "100", "--context", "50",
              "--greedy-tokens", "8"]  # fmt: skip
LM_EVAL = {
    "results": {"copying": {"acc,none": 0.5, "acc_stderr,none": 0.01}},
    "config": {"model_args": "pretrained=m"},
}


class TestEval:
    def test_table_and_files(self, folder, evaluated):
        out, printed = evaluated
        result = json.loads((out / "result.json").read_text())
        assert list(result["caches"]) == ["dense", "fp16", "int8", "int4"]
        assert result["plan"]["model"] == folder.name
        assert result["plan"]["text"] == "numbers.txt"
        assert result["plan"]["versions"]["torch"] == torch.__version__
        assert result["plan"]["settings"] == {"context": 50, "first_scored": None, "greedy_tokens": 8}
        said = (
            "2 pieces of 100 tokens, the first 50 prefilled; 98 tokens scored, 100.0% of their logits read the cache"
        )
        assert said in " ".join(printed.split())
        assert f"{result['caches']['int4']['bytes_per_element']['here']:.3f}" in printed

    def test_it_goes_on_and_refuses_other_settings(self, evaluation, evaluated):
        def kept() -> dict:
            result = json.loads((out / "result.json").read_text())
            # It changes while other programs run.
            del result["machine"]["load_average"]
            return result

        out, _ = evaluated
        before = kept()
        call(*evaluation, "--out", out)
        assert kept() == before
        result = call(*evaluation, "--context", 51, "--out", out, code=2)
        assert "settings.context: 50 became 51" in " ".join(result.output.replace("│", " ").split())

    def test_a_text_file_is_scored_in_pieces_spread_over_it(self, folder, tmp_path):
        (tmp_path / "numbers.txt").write_text(NUMBERS, encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids, name = evaluate.read_documents(tokenizer, tmp_path / "numbers.txt", 3, 101)
        assert name == "numbers.txt"
        assert (ids[:, 0] == tokenizer.bos_token_id).all()
        assert [tokenizer.decode(row[1:]) for row in ids] == [NUMBERS[start : start + 100] for start in (0, 600, 1300)]

    def test_without_a_text_it_is_source_that_every_machine_has(self, folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids, name = evaluate.read_documents(tokenizer, None, 3, 101)
        assert name == evaluate.STANDARD_LIBRARY
        assert ids.tolist() == windows(tokenizer, 3, 101)[0].tolist()

    def test_task_results_stand_beside_it(self, evaluation, tmp_path):
        (tmp_path / "lm.json").write_text(json.dumps(LM_EVAL), encoding="utf-8")
        arguments = "--task-results", tmp_path / "lm.json", "--out", tmp_path / "out"
        printed = call(*evaluation, *arguments).stdout
        assert "copying" in printed and "not said" in printed
        assert json.loads((tmp_path / "out" / "result.json").read_text())["tasks"][0]["se"] == 0.01

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (["--presets", "int5"], "'int5' is neither a preset nor a file"),
            (["--context", "100"], "context: 100 leaves no token to score"),
            (["--window", "500"], "expected at most the model's 192"),
            (["--text", "no.txt"], "text: 'no.txt' cannot be read"),
            (["--task-results", "no.json"], "'no.json' cannot be read as JSON"),
        ],
        ids=lambda x: str(x[0]) if isinstance(x, list) else "",
    )
    def test_wrong_use_is_one_clear_line(self, evaluation, tmp_path, arguments, match):
        result = call(*evaluation, *arguments, "--out", tmp_path / "out", code=2)
        assert match in " ".join(result.output.replace("│", " ").split())
        assert "Traceback" not in result.output
        assert not (tmp_path / "out").exists()


class TestReport:
    def test_page_and_plots(self, evaluated, tmp_path):
        (tmp_path / "lm.json").write_text(json.dumps(LM_EVAL), encoding="utf-8")
        call("report", evaluated[0], tmp_path / "lm.json", "--out", tmp_path / "page")
        page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
        assert "<svg" in page and "copying" in page
        assert len(list((tmp_path / "page").glob("*.png"))) == 3

    def test_what_is_no_result(self, tmp_path):
        (tmp_path / "a.json").write_text("{}", encoding="utf-8")
        assert "neither a result of" in call("report", tmp_path / "a.json", code=2).output
        assert "cannot be read as JSON" in call("report", tmp_path, code=2).output

    def test_without_matplotlib_it_says_so(self, evaluated, tmp_path, monkeypatch):
        monkeypatch.setattr(report, "find_spec", lambda name: None)
        assert "need matplotlib" in call("report", evaluated[0], "--out", tmp_path, code=2).output
