"""lm-eval through the quantized cache equals `hf` without one, equals real decode with one, and reports which scores
read it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partialmethod
from importlib.resources import files
from pathlib import Path

import families
import processes
import pytest
import scripts
import torch
import yaml
from commands import call

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate as their_simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows
from transformers import AutoTokenizer

import hf_kvquant
from hf_kvquant import KVQuantConfig, QuantizedCache, QuantSpec, ops, score_by_decoding, scoring
from hf_kvquant.measure import lm_eval, sides
from hf_kvquant.measure.lm_eval import MODEL_NAME, KVQuantLM, main, simple_evaluate
from hf_kvquant.measure.tables import task_rows

ROOT = Path(__file__).parent.parent
TASKS = ROOT / "eval" / "tasks"
MODEL = str(files("hf_kvquant") / "models" / "stdlib-nano")
# Float32 rounding may flip a code; other formats change answers much more (see the uses of this).
ROUNDING = 5e-3
MAX_LENGTH = 300
LAYERS = 4


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield


@pytest.fixture(scope="module", autouse=True)
def own_tasks():
    """lm-eval reads the thousands of files of its own tasks whenever it starts; these tests ask for none of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
        yield


# The same in a process, which then goes on like `python -m hf_kvquant.measure.lm_eval`.
SCRIPT = """
import runpy
from functools import partialmethod
from lm_eval.tasks import TaskManager

TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
runpy.run_module("hf_kvquant.measure.lm_eval", run_name="__main__", alter_sys=True)
"""


def load(kv_config="int4-small", pretrained=MODEL, **options) -> KVQuantLM:
    settings = {"dtype": "float32", "device": "cpu", "batch_size": 1, "max_length": MAX_LENGTH}
    return KVQuantLM(pretrained, kv_config=kv_config, **settings | options)


def one_token_task(folder: Path) -> str:
    """A multiple-choice task over a local JSON file whose answers are one token each."""
    prompts = ["for i in", "import os\nimport", "def __init__(", "class Stack:\n    def"]
    choices = [[" range", " the"], [" sys", " not"], ["self", "def"], [" __", " ="]]
    rows = [{"prompt": 20 * "x = 1\n" + p, "choices": c, "gold": 0} for p, c in zip(prompts, choices)]
    (folder / "one_token.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "one_token",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "one_token.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "process_results": "!function",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "nats")],
    }
    # The task reports the log-likelihoods themselves, so that every change shows.
    (folder / "measure.py").write_text(
        "def nats(doc, results):\n"
        "    values = [x[0] for x in results]\n"
        "    return {'acc': float(values[0] == max(values)), 'nats': -sum(values)}\n"
    )
    text = yaml.safe_dump(task, sort_keys=False).replace("'!function'", "!function measure.nats")
    (folder / "one_token.yaml").write_text(text)
    return "one_token"


@pytest.fixture(scope="module")
def manager(tmp_path_factory) -> TaskManager:
    folder = tmp_path_factory.mktemp("tasks")
    one_token_task(folder)
    return TaskManager(include_path=[str(TASKS), str(folder)], include_defaults=False)


TASK_NAMES = ["kvquant_lookup_8", "kvquant_choice_24", "kvquant_induction_4", "kvquant_stdlib", "one_token"]


def evaluate(lm, manager: TaskManager, tasks=TASK_NAMES, limit=2, run=simple_evaluate, **options) -> dict:
    options = {"bootstrap_iters": 0, "log_samples": True, **options}
    return run(model=lm, tasks=list(tasks), task_manager=manager, limit=limit, **options)


def plain(results: dict) -> dict:
    """Metrics and samples in the form that result files have."""
    return json.loads(json.dumps({name: results[name] for name in ("results", "samples")}, default=str))


class TestDense:
    def test_none_gives_exactly_the_results_of_hf(self, manager):
        options = {"dtype": "float32", "max_length": MAX_LENGTH, "pretrained": MODEL}
        expected, ours = (
            evaluate(name, manager, run=run, model_args=options | more, device="cpu", batch_size=3)
            for name, more, run in (
                ("hf", {}, their_simple_evaluate),
                ("hf-kvquant", {"kv_config": "none"}, simple_evaluate),
            )
        )
        assert plain(ours) == plain(expected)
        assert ours["config"]["kvquant"] == {"kv_config": "none", "rolling_context": 1}
        assert all(len(expected["samples"][task]) == 2 for task in TASK_NAMES)

    def test_the_command_lines_none_is_the_dense_cache(self):
        assert load(kv_config=None).kv_config is None

    def test_equal_windows_for_comparison(self):
        """With the windows of a quantized cache, a dense one gives nearly the same as int8, which is near-lossless."""
        text = Path(json.__file__).read_text()[:3000]
        request = [Instance("loglikelihood_rolling", {}, (text,), 0)]
        dense, lossless, theirs = (
            load(*args, **kwargs).loglikelihood_rolling(request)[0]
            for args, kwargs in ((["none"], {"rolling_context": 128}), (["int8"], {}), (["none"], {}))
        )
        assert dense == pytest.approx(lossless, rel=1e-3)
        assert abs(dense - theirs) > 10 * abs(dense - lossless)


def instances(pairs: list[tuple[str, str]], task: str = "task") -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, i, (task, i, 1)) for i, pair in enumerate(pairs)]


TEXT = Path(families.__file__).read_text()
# Each answer is one token.
CONTEXT, ANSWER, OTHER_ANSWER = 20 * "x = 1\n" + "for i in", " range", " the"
PAIRS = [
    (TEXT[:400], TEXT[400:480]),
    # The same inputs, with the end of the context elsewhere.
    (TEXT[:440], TEXT[440:480]),
    (CONTEXT, ANSWER),
    (CONTEXT, OTHER_ANSWER),
    ("", TEXT[:60]),
    # Longer than the model's context.
    (TEXT[:1500], TEXT[1500:1560]),
    (TEXT[:5], TEXT[5:300]),
]


def decoded_answers(lm: KVQuantLM, pairs, decode_tail: int) -> list[tuple[float, bool]]:
    answers = []
    for context, continuation in pairs:
        if context:
            context_ids, ids = lm._encode_pair(context, continuation)
        else:
            context_ids, ids = [lm.prefix_token_id], lm.tok_encode(continuation)
        tokens = torch.tensor([(context_ids + ids)[-(MAX_LENGTH + 1) :]])
        prefilled = max(tokens.shape[1] - len(ids) - decode_tail, 1)
        logits = score_by_decoding(lm.model, tokens[:, :-1], prefilled, lm.kv_config)[:, -len(ids) :]
        log_probs = logits.log_softmax(-1).gather(-1, tokens[:, -len(ids) :, None])
        greedy = bool((logits.argmax(-1) == tokens[:, -len(ids) :]).all())
        answers.append((log_probs.double().sum().item(), greedy))
    return answers


class TestLoglikelihood:
    @pytest.mark.parametrize(
        ("kv_config", "batch_size", "decode_tail"),
        [("int4-small", 1, 0), ("int4", 4, 1), ("int4", 1, 3), ("int8-plain", 7, 1)],
    )
    def test_equals_real_decode(self, kv_config, batch_size, decode_tail):
        lm = load(kv_config, batch_size=batch_size, decode_tail=decode_tail)
        answers = lm.loglikelihood(instances(PAIRS), disable_tqdm=True)
        expected = decoded_answers(lm, PAIRS, decode_tail)
        for (ours, greedy), (decoded, decoded_greedy) in zip(answers, expected, strict=True):
            assert ours == pytest.approx(decoded, abs=ROUNDING, rel=1e-3)
            assert greedy == decoded_greedy

    def test_the_format_shows(self):
        """The format changes answers by more than the tolerance of the test above."""
        dense, quantized = (load(config).loglikelihood(instances(PAIRS), True) for config in ("none", "int4-small"))
        assert sum(abs(a[0] - b[0]) > 10 * ROUNDING for a, b in zip(dense, quantized, strict=True)) >= 4

    def test_one_token_answers_of_a_context_share_one_pass(self, monkeypatch):
        lm = load(batch_size=8)
        rows = []
        real = lm_eval.score_chunks
        monkeypatch.setattr(
            lm_eval,
            "score_chunks",
            lambda m, ids, *a, **k: rows.append(len(ids)) or real(m, ids, *a, **k),
        )
        lm.loglikelihood(instances([(CONTEXT, ANSWER), (CONTEXT, OTHER_ANSWER), (CONTEXT[6:], ANSWER)]), True)
        assert rows == [2]

    def test_what_read_the_cache(self):
        for decode_tail, expected in ((0, 0), (1, 1)):
            lm = load(decode_tail=decode_tail)
            lm.loglikelihood(instances([(CONTEXT, ANSWER)]), True)
            read = lm.get_model_info()["kvquant"]["cache_read"]["task"]
            assert read == {
                "requests": 1, "scored_tokens": 1, "read_tokens": expected, "cache_read_share": float(expected),
            }  # fmt: skip

    def test_repeated_requests_count_once(self):
        """lm-eval repeats the last request, so that every process has the same number."""
        lm = load()
        requests = instances([(CONTEXT, ANSWER)])
        lm.loglikelihood([*requests, *requests], True)
        assert lm.get_model_info()["kvquant"]["cache_read"]["task"]["requests"] == 1

    def test_share_zero_is_said(self, caplog):
        lm = load(decode_tail=0)
        lm.loglikelihood(instances([(CONTEXT, ANSWER)], "mmlu"), True)
        assert "mmlu: cache_read_share is 0, its score does not see the cache" in caplog.text


class TestRolling:
    def test_equals_real_decode_window_by_window(self):
        lm = load("int4", batch_size=3)
        documents = [TEXT[:1400], TEXT[:200]]
        requests = [
            Instance("loglikelihood_rolling", {}, (text,), 0, ("task", i, 1)) for i, text in enumerate(documents)
        ]
        answers = lm.loglikelihood_rolling(requests, disable_tqdm=True)
        parts = {"first_window": [0.0, 0, 0], "later_windows": [0.0, 0, 0]}
        for text, answer in zip(documents, answers, strict=True):
            tokens = lm.tok_encode(text)
            total = 0.0
            for i, (inputs, wanted) in enumerate(
                get_rolling_token_windows(tokens, lm.prefix_token_id, MAX_LENGTH, 128)
            ):
                seen = len(inputs) - len(wanted) + 1
                assert i == 0 or seen >= 128
                prefilled = max(seen, min(128, len(inputs)))
                logits = score_by_decoding(lm.model, torch.tensor([inputs]), prefilled, lm.kv_config)[0]
                rows = logits[-len(wanted) :].log_softmax(-1)
                value = rows.gather(-1, torch.tensor(wanted)[:, None]).double().sum().item()
                total += value
                part = parts["first_window" if i == 0 else "later_windows"]
                for j, x in enumerate((value, len(wanted), len(inputs) - max(prefilled, seen - 1))):
                    part[j] += x
            assert answer == pytest.approx(total, rel=1e-4)
        read = lm.get_model_info()["kvquant"]["cache_read"]["task"]
        for name, (value, scored, read_tokens) in parts.items():
            assert read[name]["loglikelihood"] == pytest.approx(value, rel=1e-4)
            assert (read[name]["scored_tokens"], read[name]["read_tokens"]) == (scored, read_tokens)
        assert read["scored_tokens"] == sum(len(lm.tok_encode(text)) for text in documents)
        assert 0 < read["cache_read_share"] < read["later_windows"]["cache_read_share"] < 1

    def test_a_document_within_the_context_does_not_see_the_cache(self):
        lm = load()
        lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT[:200],), 0, ("short", 0, 1))], True)
        assert lm.get_model_info()["kvquant"]["cache_read"]["short"]["cache_read_share"] == 0.0

    def test_an_empty_document(self):
        lm = load()
        assert lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("",), 0, ("t", 0, 1))], True) == [0.0]


@torch.no_grad()
def answer_by_decoding(lm: KVQuantLM, ids: torch.Tensor, prefilled: int, count: int) -> list[int]:
    """Greedy text after `ids` `[1, length]`, one token at a time through a quantized cache."""
    cache = QuantizedCache(lm.model.config, lm.kv_config)
    with hf_kvquant.attention(lm.model):
        logits = lm.model(ids[:, :prefilled], past_key_values=cache).logits
        for token in ids[0, prefilled:]:
            logits = lm.model(token[None, None], past_key_values=cache).logits
        new = [int(logits[0, -1].argmax())]
        while len(new) < count:
            logits = lm.model(torch.tensor([new[-1:]]), past_key_values=cache).logits
            new.append(int(logits[0, -1].argmax()))
    return new


class TestGenerate:
    PROMPTS = (TEXT[:400], TEXT[900:1150], TEXT[1500:1900])

    def requests(self, **options) -> list[Instance]:
        options = {"until": ["\x00"], "max_gen_toks": 24, "do_sample": False} | options
        return [Instance("generate_until", {}, (p, options), i, ("task", i, 1)) for i, p in enumerate(self.PROMPTS)]

    @pytest.mark.parametrize("decode_tail", [0, 1, 40])
    def test_is_generate_with_our_cache(self, monkeypatch, decode_tail):
        lm, caches = load(decode_tail=decode_tail), []
        init = QuantizedCache.__init__
        monkeypatch.setattr(
            QuantizedCache, "__init__", lambda self, *a, **k: caches.append(self) or init(self, *a, **k)
        )
        answers = lm.generate_until(self.requests(), disable_tqdm=True)
        assert len(caches) == len(self.PROMPTS)
        for cache in caches:
            assert cache.kv_config == KVQuantConfig.preset("int4-small")
            assert cache.routes["decode_dequantized"] == 0
            assert cache.routes["prefill_dense"] == LAYERS
            # One update per new token after the first, and those of the tail: up to 32 tokens each, then one token.
            assert cache.routes["decode_fused"] == LAYERS * (23 + {0: 0, 1: 1, 40: 3}[decode_tail])
        dense = load("none").generate_until(self.requests(), disable_tqdm=True)
        assert answers != dense
        for prompt, answer in zip(self.PROMPTS, answers, strict=True):
            ids = lm.tokenizer(prompt, return_tensors="pt").input_ids
            new = answer_by_decoding(lm, ids, ids.shape[1] - decode_tail, 24)
            assert lm.tokenizer.decode(new, skip_special_tokens=True) == answer

    def test_padded_batch(self):
        """Rows of a batch equal the same rows alone; with int8, which is nearly dense, rounding changes no token."""
        together, alone = (load("int8", batch_size=n, decode_tail=5) for n in (3, 1))
        assert together.generate_until(self.requests(), True) == alone.generate_until(self.requests(), True)

    @pytest.mark.parametrize(
        ("longest", "decode_tail", "share"), [(1, 0, 0.0), (1, 1, 1.0), (24, 0, 23 / 24), (24, 1, 1.0)]
    )
    def test_what_read_the_cache(self, longest, decode_tail, share):
        lm = load(decode_tail=decode_tail)
        lm.generate_until(self.requests(max_gen_toks=longest), disable_tqdm=True)
        read = lm.get_model_info()["kvquant"]["cache_read"]["task"]
        assert read["cache_read_share"] == pytest.approx(share, abs=0 if share in (0, 1) else 0.05)


GREEDY = TestGenerate().requests()


class TestBatchSizeAuto:
    def test_gives_the_same(self):
        answers = []
        for size in (1, "auto"):
            lm = load("int8", batch_size=size, max_batch_size=2)
            document = [Instance("loglikelihood_rolling", {}, (TEXT[:1400],), 0, ("task", 0, 1))]
            likelihoods = [x for x, _ in lm.loglikelihood(instances(PAIRS[:4]), True)]
            answers.append((likelihoods + lm.loglikelihood_rolling(document, True), lm.generate_until(GREEDY, True)))
            assert lm.batch_size == size
        (one, one_text), (auto, auto_text) = answers
        assert auto == pytest.approx(one, rel=1e-3)
        assert auto_text == one_text

    def test_is_found_on_the_quantized_path(self, monkeypatch):
        lm, lengths = load(batch_size="auto", max_batch_size=4), []
        real = lm_eval.score

        def out_of_memory_at_four(model, ids, *args):
            lengths.append(tuple(ids.shape))
            if len(ids) > 2:
                raise RuntimeError("CUDA out of memory.")
            return real(model, ids, *args)

        monkeypatch.setattr(lm_eval, "score", out_of_memory_at_four)
        lm.loglikelihood(instances(PAIRS), True)
        assert lengths[0] == (4, MAX_LENGTH)
        assert lm.batch_sizes == {0: 2}


def broken_keys(monkeypatch) -> None:
    """Store every key doubled, in real caches and in scoring; not values."""
    append, quantize = ops.quantize_append, scoring.quantize
    monkeypatch.setattr(ops, "quantize_append", lambda key, *args, **kwargs: append(2 * key, *args, **kwargs))
    defaults = scoring._score_chunks.__kwdefaults__
    monkeypatch.setitem(defaults, "quantizers", lambda _: (lambda x, *args: quantize(2 * x, *args), quantize))


# Keys and values of different formats, and nothing read exactly.
TELLING = KVQuantConfig(QuantSpec("int8"), QuantSpec("fp8"))


class TestABrokenCacheShows:
    """The proof of `cache_read_share`: scores that it says read the cache change with the cache, and no others do."""

    def both(self, manager, monkeypatch, tasks, limit, **options) -> tuple[dict, dict]:
        whole = evaluate(load(TELLING, batch_size=4, **options), manager, tasks, limit)
        broken_keys(monkeypatch)
        return whole, evaluate(load(TELLING, batch_size=4, **options), manager, tasks, limit)

    def test_in_every_metric_that_reads_it(self, manager, monkeypatch):
        # Twice the keys make attention sharper, which does little harm here: counted metrics need some documents, and
        # questions that the cache answers.
        tasks = ["kvquant_lookup_24", "kvquant_choice_24", "kvquant_induction_16", "kvquant_copy_32", "one_token"]
        whole, broken = self.both(manager, monkeypatch, tasks, 12, max_length=2048, decode_tail=16)
        changed = {}
        for task in tasks:
            assert whole["results"][task]["cache_read_share,none"] == 1.0
            for metric in ("exact_match,none", "acc,none", "nats,none"):
                if metric in whole["results"][task] and (task, metric) != ("one_token", "acc,none"):
                    changed[task, metric] = [r["results"][task][metric] for r in (whole, broken)]
        assert all(a != b for a, b in changed.values()), changed

    def test_in_perplexity(self, manager, monkeypatch):
        whole, broken = self.both(manager, monkeypatch, ["kvquant_stdlib"], 1)
        assert whole["results"]["kvquant_stdlib"]["cache_read_share,none"] > 0.5
        for metric in ("word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"):
            assert broken["results"]["kvquant_stdlib"][metric] > 1.01 * whole["results"]["kvquant_stdlib"][metric]

    def test_in_none_that_does_not(self, manager, monkeypatch):
        whole, broken = self.both(manager, monkeypatch, ["one_token"], None, decode_tail=0)
        assert whole["results"]["one_token"]["cache_read_share,none"] == 0.0
        assert plain(whole) == plain(broken)

    def test_nor_in_short_documents_and_first_tokens(self, monkeypatch):
        document = [Instance("loglikelihood_rolling", {}, (TEXT[:200],), 0, ("short", 0, 1))]
        token = TestGenerate().requests(max_gen_toks=1)
        answers = []
        for broken in (False, True):
            if broken:
                broken_keys(monkeypatch)
            lm = load(TELLING, decode_tail=0)
            answers.append((lm.loglikelihood_rolling(document, True), lm.generate_until(token, True)))
            assert [r["cache_read_share"] for r in lm.get_model_info()["kvquant"]["cache_read"].values()] == [0.0, 0.0]
        assert answers[0] == answers[1]


class TestCommandLine:
    TASKS = "kvquant_lookup_8,kvquant_choice_24,kvquant_stdlib"

    def command(self, folder: Path, tasks: str) -> list[str]:
        settings = f"pretrained={MODEL},dtype=float32,kv_config=int4,max_length={MAX_LENGTH}"
        return [
            *("--model", "hf-kvquant", "--model_args", settings, "--include_path", str(TASKS), "--tasks", tasks),
            *("--limit", "3", "--device", "cpu", "--output_path", str(folder), "--log_samples"),
        ]

    def results(self, folder: Path) -> dict:
        (file,) = folder.rglob("results_*.json")
        return json.loads(file.read_text())

    @pytest.fixture(scope="class")
    def finished(self, tmp_path_factory) -> tuple[dict, Path]:
        folder = tmp_path_factory.mktemp("one")
        main(self.command(folder, self.TASKS))
        return self.results(folder), folder

    def test_lm_evals_own_files(self, finished):
        results, folder = finished
        settings = results["config"]["kvquant"]
        assert KVQuantConfig.from_dict(settings["kv_config"]) == KVQuantConfig.preset("int4")
        assert (settings["decode_tail"], settings["rolling_context"]) == (1, 128)
        for task in self.TASKS.split(","):
            share = results["results"][task]["cache_read_share,none"]
            assert 0.5 < share <= 1
            assert settings["cache_read"][task]["cache_read_share"] == share
            assert len(list(folder.rglob(f"samples_{task}_*.jsonl"))) == 1
        assert {"first_window", "later_windows"} <= set(settings["cache_read"]["kvquant_stdlib"])

    def test_lm_eval_is_as_it_was_afterwards(self, finished):
        import lm_eval

        assert lm_eval.simple_evaluate is their_simple_evaluate
        assert sys.argv[0] != "lm-eval"  # main uses this name while it runs

    def test_two_processes(self, finished, tmp_path):
        """`accelerate launch` distributes requests, here by gloo between two processes without a GPU."""
        script = tmp_path / "script.py"
        script.write_text(SCRIPT)
        # With --cpu accelerate would start one process only, unless MPI is there.
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                  "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
        shown = ("accelerate", "scipy", "sklearn")
        run = subprocess.run(
            [sys.executable, *launch, script, *self.command(tmp_path, self.TASKS)],
            cwd=tmp_path, env=processes.environment(*shown, ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1"),
            capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
        assert "on rank 1" in run.stdout + run.stderr, "one process did everything"
        one, two = finished[0], self.results(tmp_path)
        for task in self.TASKS.split(","):
            for metric, value in one["results"][task].items():
                expected = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
                assert two["results"][task][metric] == expected, (task, metric)
            ours, theirs = (r["config"]["kvquant"]["cache_read"][task] for r in (one, two))
            for count in ("requests", "scored_tokens", "read_tokens"):
                assert ours[count] == theirs[count]

    def test_through_our_command_line(self):
        """All options, --help included, are lm-eval's."""
        result = call("lm-eval", "run", "--help")
        assert "--include_path" in result.output

    def test_a_wrong_argument_is_one_clear_line(self):
        arguments = "--model", MODEL_NAME, "--model_args", f"pretrained={MODEL}", "--include_path", TASKS
        result = call("lm-eval", *arguments, "--tasks", "kvquant_stdlib", code=2)
        assert "Invalid value: kv_config: missing; expected a preset's name" in result.output


def test_device_map(tmp_path):
    """accelerate's hooks read weights from disk when a layer needs them."""
    lm = load(parallelize=True, max_cpu_memory="6MiB", offload_folder=str(tmp_path))
    assert set(lm.model.hf_device_map.values()) >= {"disk"}
    answers, expected = (x.loglikelihood(instances(PAIRS), True) for x in (lm, load()))
    for ours, theirs in zip(answers, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


class TestOtherModels:
    """A model that changes keys before attention is decoded token by token if asked to."""

    def lm(self, **options) -> KVQuantLM:
        model = families.build("falcon", attn="eager", vocab_size=4096)
        return load("int8-plain", model, tokenizer=AutoTokenizer.from_pretrained(MODEL), **options)

    def test_decoding(self):
        lm = self.lm(scoring="decoding", batch_size=4)
        answers = lm.loglikelihood(instances(PAIRS[:2]), True)
        for (ours, _), (decoded, _) in zip(answers, decoded_answers(lm, PAIRS[:2], 1), strict=True):
            assert ours == pytest.approx(decoded, rel=1e-5)

    def test_parallel_is_refused(self):
        with pytest.raises((ValueError, AttributeError), match="score_by_decoding"):
            self.lm().loglikelihood(instances(PAIRS[:1]), True)


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"decode_tail": -1}, r"decode_tail: -1 .*0 or more"),
            ({"decode_tail": True}, r"decode_tail: True"),
            ({"rolling_context": 0}, r"rolling_context: 0 .*1 or more"),
            ({"rolling_context": MAX_LENGTH}, rf"rolling_context: {MAX_LENGTH} .*less than max_length {MAX_LENGTH}"),
            ({"scoring": "fast"}, r"scoring: 'fast' .*parallel"),
            ({"kv_config": "int5"}, r"int5"),
        ],
    )
    def test_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            load(**options)

    def test_kv_config_is_required(self):
        with pytest.raises(ValueError, match="kv_config: missing; expected a preset's name"):
            KVQuantLM(MODEL)

    def test_encoder_decoder_models_are_refused(self):
        model = families.build("t5", vocab_size=4096)
        with pytest.raises(ValueError, match="backend: 'seq2seq'"):
            load("int8", model, tokenizer=AutoTokenizer.from_pretrained(MODEL))

    def test_saved_answers_are_refused(self, manager, tmp_path):
        with pytest.raises(ValueError, match="use_cache"):
            evaluate(load(), manager, ["one_token"], use_cache=str(tmp_path / "answers"))


class TestScript:
    """eval/run_lm_eval.py: one run of lm-eval per cache, and a table."""

    @pytest.fixture(scope="class")
    def script(self):
        return scripts.script("run_lm_eval")

    def test_every_cache_is_a_run(self, script, monkeypatch, tmp_path, capsys):
        calls = []

        def run(arguments):
            calls.append(arguments)
            folder = Path(arguments[arguments.index("--output_path") + 1])
            config = folder.name
            share = {} if config == "none" else {"cache_read_share,none": 0.0 if config == "int4" else 0.75}
            metrics = {"name": "t", "acc,none": 0.5, "acc_stderr,none": 0.01, **share}
            folder.mkdir(parents=True)
            (folder / "results_1.json").write_text(json.dumps({"results": {"t": metrics}}))

        monkeypatch.setattr(script, "lm_eval", run)
        settings = ["--kv_config", "none", "int8", "int4", "--tasks", "t", "--out", str(tmp_path), "--limit", "3"]
        monkeypatch.setattr(sys, "argv", ["run_lm_eval.py", *settings])
        monkeypatch.setenv("COLUMNS", "200")
        script.main()
        for arguments, config in zip(calls, ("none", "int8", "int4"), strict=True):
            (given,) = [x for x in arguments if "pretrained=" in x]
            assert f"kv_config={config}" in given
            # The dense cache gets the same windows.
            assert "rolling_context=128" in given
            assert arguments[-2:] == ["--limit", "3"]
        shown = capsys.readouterr().out
        assert shown.count("0.5000 ± 0.0100") == 3
        assert "0.75" in shown
        assert "does not see the cache" in shown


class TestTune:
    """`hf-kvquant tune --lm-eval TASK`."""

    @staticmethod
    def tune(*arguments: object, code: int = 0) -> str:
        given = ["tune", MODEL, "--documents", 2, "--window", 96, "--rounds", 0, "--bits", 5, *arguments]
        return " ".join(call(*given, code=code).output.replace("│", " ").split())

    def test_scores_the_dense_cache_the_best_uniform_config_and_the_result(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sides, "CHOICES", sides.CHOICES | {"group_size": (None,), "block_length": (None,)})
        folder = tmp_path / "tasks"
        folder.mkdir()
        name = one_token_task(folder)
        printed = self.tune(
            "--lm-eval", name, "--lm-eval-path", folder, "--lm-eval-limit", 3, "--out", tmp_path / "out"
        )
        result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
        found = {(score["cache"], score["metric"]): score for score in result["tasks"]}
        assert sorted({cache for cache, _ in found}) == ["dense", "tuned", "uniform"]
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        configs = {"dense": "none", "uniform": result["uniform"][0]["config"], "tuned": result["config"]}
        for cache, config in configs.items():
            lm = load(config, max_length=None)
            expected = evaluate(lm, manager, [name], limit=3)["results"][name]["nats,none"]
            assert found[cache, "nats"]["value"] == pytest.approx(expected, abs=1e-6)
            assert found[cache, "nats"]["cache_read_share"] == (None if cache == "dense" else 1.0)
        assert len({found[cache, "nats"]["value"] for cache in configs}) == 3
        assert all(" ".join(row) in printed for row in task_rows(result["tasks"]))

    def test_an_unknown_task_ends_it_before_the_search(self, tmp_path):
        printed = self.tune("--lm-eval", "no_such_task", "--out", tmp_path / "out", code=2)
        assert "'no_such_task' is not a task" in printed and not (tmp_path / "out").exists()
