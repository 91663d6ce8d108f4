"""The benchmarks on tiny shapes: they check before they time, refuse if a check fails, and report what they did.

No test here asserts a time.
"""

import contextlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from matplotlib.text import Text
from transformers import DynamicCache, LlamaConfig

from hf_kvquant import KVQuantConfig, QuantizedCache, host, ops, reference
from hf_kvquant.backends import cpu
from hf_kvquant.measure import caches, clock, facts, operator, padded, process_memory, serving, step
from hf_kvquant.measure.report import style
from hf_kvquant.measure.weighing import tensor_bytes

EVAL = Path(__file__).parents[1] / "eval"
SHAPE = ["--heads", "4", "--kv-heads", "2", "--head-dim", "32"]
DECODE = ["--lengths", "67,130", *SHAPE, "--prompt", "70", "--rounds", "3"]
GENERATE = ["--lengths", "70", *SHAPE, "--layers", "2", "--hidden", "32", "--new", "2", "--no-memory"]
SLIDING = [*SHAPE, "--window", "70", "--length", "200", "--rounds", "3", "--weigh", "600"]
SLIDING += ["--models", "GPT-OSS 20B"]
LAPTOP = ["--lengths", "70,140", *SHAPE, "--layers", "2", "--hidden", "64", "--intermediate", "96"]
LAPTOP += ["--vocabulary", "128", "--new", "2"]
COMMON = {
    "benchmark",
    "command",
    "date",
    "machine",
    "versions",
    "arguments",
    "backend",
    "configs",
    "tolerance",
    "checks",
}
SUMMARY = {"median", "min", "max", "n"}


@pytest.fixture
def bench(monkeypatch, quanto_in_python):
    """Imports a benchmark's module by name, as a script would."""
    # Processes that a benchmark starts import less (see processes.py).
    monkeypatch.setenv("PYTHONPATH", processes.environment()["PYTHONPATH"])
    monkeypatch.syspath_prepend(str(EVAL))
    # The last cache of a server has hundreds of megabytes, twice of which would be read before every call.
    monkeypatch.setattr(clock, "processor_caches", lambda: [(2, "unified", 1 << 20), (3, "unified", 4 << 20)])

    def load(name: str):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return __import__(name)

    return load


@pytest.fixture
def run(bench, capsys):
    """Runs a benchmark that must succeed; gives its result and what it says. Not as a process, most of whose time
    would be imports; `run_script` does that."""
    threads = torch.get_num_threads()

    def run(name: str, arguments: list[str], out: Path) -> tuple[dict, str]:
        assert bench(name).main([*arguments, "--threads", "1", "--out", str(out)]) == 0
        return json.loads(out.read_text(encoding="utf-8")), capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)


def run_script(name: str, arguments: list[str], out: Path) -> tuple[dict, str]:
    command = [sys.executable, str(EVAL / f"{name}.py"), *arguments, "--threads", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=processes.environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text(encoding="utf-8")), done.stdout


def check_common(result: dict, text: str) -> None:
    assert set(result) >= COMMON
    assert result["checks"]
    assert all(check["passed"] for check in result["checks"])
    assert f"{len(result['checks'])} checks passed" in text
    assert f"backend {result['backend']}" in text
    assert result["backend"] == ops.choose_backend("auto", "cpu", torch.bfloat16)
    assert result["instruction_set"] == (cpu.isa() if result["backend"] == "cpu" else None)
    assert result["machine"]["threads"] == 1
    assert result["versions"]["torch"] == torch.__version__
    written = json.dumps(result)
    for private in (str(Path.home()), str(EVAL.parent), "--out", "/tmp"):
        assert private not in written, private
    for name, config in result["configs"].items():
        assert KVQuantConfig.from_dict(config).to_dict() == json.loads(json.dumps(config), object_hook=_int_keys), name


def _int_keys(data: dict) -> dict:
    return {int(key) if key.isdecimal() else key: value for key, value in data.items()}


def test_decode_result(run, tmp_path):
    result, text = run("bench_decode", DECODE, tmp_path / "decode.json")
    check_common(result, text)
    assert set(result["configs"]) >= set(KVQuantConfig.preset_names())
    rows = {(row["length"], row["name"]): row for row in result["decode"]}
    names = {"sdpa-bfloat16", "sdpa-bfloat16-gqa", "sdpa-float32", *result["configs"]}
    assert set(rows) == {(length, name) for length in (67, 130) for name in names}
    for row in rows.values():
        assert set(row["ms"]) == SUMMARY
        assert row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"]
        assert row["ms"]["n"] == 3
        read = row["bytes_read"] / row["ms"]["median"] / 1e6
        assert row["gb_per_s"] == pytest.approx(read)
        assert row["share_of_plain_read"] == pytest.approx(read / row["plain_read_gb_per_s"])
    assert {(row["length"], row["name"]) for row in result["append"]} == {
        (length, name) for length in (67, 130) for name in ("torch.cat", *result["configs"])
    }
    assert {row["name"] for row in result["prompt"]} >= {"prefill attention", *result["configs"]}
    assert [row["length"] for row in result["plain_read"]] == [67, 130]
    # Two heads, keys and values of 32 int8 codes and one float16 scale.
    assert rows[130, "int8-plain"]["bytes_read"] == 2 * 2 * 130 * (32 + 2)
    assert rows[130, "sdpa-bfloat16"]["bytes_read"] == 2 * 2 * 130 * 32 * 2


def test_the_tables_of_the_laptop(bench):
    laptop = bench("bench_laptop")
    readme = laptop.README.read_text(encoding="utf-8")
    assert laptop.with_tables(readme, facts.read_json(laptop.RESULT)) == readme, "bench_laptop.py --readme"


def test_the_tables_of_avx2(bench):
    """Copies of the results' figures, measured with the instruction set that the command forces."""
    decode = bench("bench_decode")
    results = [facts.read_json(file) for file in decode.RESULTS]
    assert [result["instruction_set"] for result in results] == ["avx2"] * 3
    limits = "AVX2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2"
    assert [result["machine"]["torch"] for result in results[2:]] == [limits]
    readme = decode.README.read_text(encoding="utf-8")
    assert decode.with_tables(readme, results) == readme, "bench_decode.py --readme"


def test_decode_table(bench):
    decode, names = bench("bench_decode"), ("int8", "fp8")
    decoded = [
        {"length": length, "name": name, "ms": {"median": ms}, "faster_than_sdpa_bfloat16": 6 / ms,
         "share_of_plain_read": 0.25}
        for length in (1024, 4096) for name, ms in (("sdpa-bfloat16", 6.0), ("int8", 1.5), ("fp8", 2.0))
    ]  # fmt: skip
    result = {
        "decode": decoded,
        "configs": dict.fromkeys(names),
        "arguments": {"lengths": [1024, 4096]},
        "machine": {"cpu": "a processor", "threads": 2},
        "instruction_set": "avx2",
    }
    limited = result | {"machine": {"cpu": "another", "threads": 1, "torch": "AVX2 ATEN_CPU_CAPABILITY=avx2"}}
    page = decode.with_tables(f"# Page\n{decode.BEGIN}\nold\n{decode.END}\nend\n", [result, result, limited])
    assert page.startswith(f"# Page\n{decode.BEGIN}\n") and page.endswith(f"\n{decode.END}\nend\n")
    assert page.count("a processor, 2 threads, instruction set `avx2`:") == 2 and "old" not in page
    assert "another, one thread, instruction set `avx2`, torch's `AVX2`:" in page
    assert "| 4,096 | 6.00 | 4.0 (25%) | 3.0 (25%) |" in page
    with pytest.raises(ValueError, match="expected the lines"):
        decode.with_tables("# Page\n", [result])


def test_decode_with_as_many_kv_heads_as_heads(run, tmp_path):
    arguments = [*DECODE, "--presets", "int8-plain", "--lengths", "67", "--mha-lengths", "40", "--prompt", "0"]
    result, text = run("bench_decode", arguments, tmp_path / "decode.json")
    rows = {(row["kv_heads"], row["length"]): row for row in result["decode"] if row["name"] == "int8-plain"}
    assert set(rows) == {(2, 67), (4, 40)}
    assert rows[4, 40]["bytes_read"] == 2 * 4 * 40 * (32 + 2)
    assert "over 40 tokens of 4 KV heads" in text and "over 67 tokens of 2 KV heads" in text
    assert {(row["kv_heads"], row["length"]) for row in result["checks"]} == {(2, 67), (4, 40)}


LATENT = ["--lengths", "67,130", "--heads", "4", "--hidden", "64", "--latent", "32", "--rounds", "3"]


def test_latent_result(run, tmp_path):
    result, text = run("bench_latent", LATENT, tmp_path / "latent.json")
    check_common(result, text)
    names = {"dense", "dense, absorbed", *KVQuantConfig.preset_names()}
    rows = {(row["length"], row["name"]): row for row in result["step"]}
    assert set(rows) == {(length, name) for length in (67, 130) for name in names}
    for row in rows.values():
        assert set(row["ms"]) == SUMMARY
        dense = rows[row["length"], "dense"]["ms"]["median"]
        assert row["faster_than_dense"] == pytest.approx(dense / row["ms"]["median"])
    alone = {(row["length"], row["name"]): row for row in result["operator"]}
    assert set(alone) == {(length, name) for length, name in rows if name != "dense"}
    # Latents are stored once, and are keys and values: 32 int8 codes and a float16 scale per token.
    assert alone[130, "int8-plain"]["bytes_read"] == 130 * (32 + 2)
    assert alone[130, "int8-plain"]["multiplications_per_byte"] == 2 * 4 * 130 * 32 / (130 * 34)
    done = {check["check"] for check in result["checks"]}
    assert {"the step took the fused route", "step against de-quantized states", "step against transformers'"} <= done


def test_latent_refuses_a_wrong_step(refuses, monkeypatch):
    from hf_kvquant import latent

    original = latent.attend
    monkeypatch.setattr(latent, "attend", lambda *args, **kwargs: original(*args, **kwargs) * 1.1)
    refuses("bench_latent", [*LATENT, "--presets", "int8"], "step against de-quantized states")


def test_error_result(tmp_path):
    out = tmp_path / "error.json"
    result, text = run_script("bench_error", ["--lengths", "67,130", "--head-dims", "32", "--seeds", "2"], out)
    check_common(result, text)
    rows = {(row["name"], row["dtype"], row["level"]): row for row in result["rows"]}
    levels, dtypes = result["arguments"]["levels"], ("float32", "float16", "bfloat16")
    assert levels[0] == "scalar"
    names = [("SDPA, dense cache", None), *((name, level) for name in result["configs"] for level in levels)]
    assert set(rows) == {(name, dtype, level) for name, level in names for dtype in dtypes}
    for (name, _, level), row in rows.items():
        # Two lengths, two seeds, with and without outliers, four spreads.
        assert row["samples"] == 2 * 2 * 2 * 4
        assert 0 < row["rms"] <= row["largest"]
        by_spread = row["rms_by_spread"].values()
        assert row["rms"] ** 2 == pytest.approx(sum(x * x for x in by_spread) / len(by_spread))
        assert level is None or f"| {name} | {row['dtype']} |" in text
        assert level is None or row["largest"] <= row["limit"]
    # Portable code errs hardly more than the rounding of its output to 8 bits: between 2^-10 and 2^-9.
    assert 2**-10 < rows["int8", "bfloat16", "scalar"]["rms"] < 2**-9


def test_generate_result(run, tmp_path):
    result, text = run("bench_generate", GENERATE, tmp_path / "generate.json")
    check_common(result, text)
    rows = {row["name"]: row for row in result["steps"]}
    rivals = {"dense-static", "quanto-int4", "hqq-int4", "hqq-int8", "transformers-fp8"}
    skipped = {row["name"]: row["reason"] for row in result["skipped"]}
    assert set(rows) | set(skipped) == {"dense", "dense-float32", *rivals, *KVQuantConfig.preset_names()}
    assert set(skipped) <= rivals
    assert not set(rows) & set(skipped)
    for name, why in skipped.items():
        assert why
        assert f"skipped {name}" in text
    for row in rows.values():
        assert set(row["ms"]) == SUMMARY
        assert row["ms"]["n"] == 2
        assert row["faster_than_dense"] == pytest.approx(rows["dense"]["ms"]["median"] / row["ms"]["median"])
    # Two layers, keys and values, two heads.
    assert rows["dense"]["cache_bytes"] == 2 * 2 * 2 * 70 * 32 * 2
    assert rows["dense-float32"]["cache_bytes"] == 2 * rows["dense"]["cache_bytes"]
    assert rows["int8-plain"]["cache_bytes"] == rows["int8-plain"]["memory_report"]["total"]
    done = {check["check"] for check in result["checks"] if check["name"] == "int4"}
    assert {"every step took the fused route", "memory_report counts every tensor", "logits are finite"} <= done


def test_serving(bench, tmp_path):
    try:
        host.continuous_batching()
    except ImportError:
        pytest.skip("transformers before 5.23 has other pages")
    out = tmp_path / "serving.json"
    arguments = [*SHAPE, "--layers", "2", "--hidden", "32", "--head-dim", "64", "--mix", "chat", "--requests", "3"]
    arguments += ["--rate", "5", "--prefix", "260", "--blocks", "16", "--presets", "int8,int4", "--out", str(out)]
    assert bench("bench_serving").main(arguments) == 0
    result = json.loads(out.read_text())
    assert {check["name"] for check in result["checks"]} == {"dense", "int8", "int4"}
    assert all(check["passed"] for check in result["checks"])
    assert [row["name"] for row in result["rows"]] == ["dense", "int8", "int4"]
    assert len({row["new_tokens"] for row in result["rows"]}) == 1
    for row in result["rows"]:
        assert 1 <= row["held_at_once"] <= 3
        assert 0 < row["first_token_s"]["median"] <= row["first_token_s"]["p99"]
        assert 0 < row["token_s"]["median"] <= row["token_s"]["p99"]
        assert row["prompt_tokens"] > 3 * 260
        assert row["shared_tokens"] in (0, 256, 512)
        assert row["peak_mb"] is None or 0 < row["peak_mb"] < 1000


@pytest.mark.parametrize(("name", "hits"), [("int8", 256), ("int4", 0)])
def test_serving_counts_what_is_shared(bench, name, hits):
    """The prefix has one whole page. int4 has exact tokens, and shares nothing."""
    try:
        host.continuous_batching()
    except ImportError:
        pytest.skip("transformers before 5.23 has other pages")
    first, second = serving.requests("chat", 2, 0.0, 260, 0)
    todo = [first._replace(answer=2), second._replace(answer=2, arrival=1.5)]
    shape = step.Shape(1, 32, 2, 1, 64, 32)
    found = serving.measure(shape, 1024, KVQuantConfig.preset(name), todo, serving.Pages(32, shared=True), 1)
    assert found["shared_tokens"] == hits and found["prompt_tokens"] == sum(len(x.prompt) for x in todo)
    assert found["peak_mb"] is None or 0 < found["peak_mb"] < 1000


def test_padded(bench, tmp_path):
    """Rows are as many as the bytes hold, and one more would not fit."""
    out = tmp_path / "padded.json"
    arguments = [*SHAPE, "--layers", "1", "--hidden", "32", "--head-dim", "64", "--blocks", "6"]
    assert bench("bench_padded").main([*arguments, "--presets", "int8,int4-small", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    rows = {row["name"]: row for row in result["batches"]}
    # 6 blocks of 256 tokens; a row has 384 tokens and an answer of 160, whose last token is not stored.
    assert rows["dense"]["rows"] == 6 * 256 // (384 + 159) == 2
    assert rows["dense"]["rows"] < rows["int8"]["rows"] < rows["int4-small"]["rows"]
    for row in rows.values():
        assert row["cache_bytes"] <= result["budget_bytes"] < row["cache_bytes"] * (row["rows"] + 1) / row["rows"]
        assert row["new_tokens"] == 160 * row["rows"]
        assert min(row["first_token_s"], row["step_s"], row["tokens_per_s"]) > 0
    assert {check["check"] for check in result["checks"] if check["name"] == "int8"} == {
        "the cache stays within the budget",
        "every step took the fused route",
        "memory_report counts every tensor",
    }


def test_padded_needs_a_row():
    with pytest.raises(ValueError, match="budget: 1000 bytes hold no row; one needs"):
        padded.measure(step.Shape(1, 32, 2, 1, 64, 32), None, "chat", 1000, 0, 1)


def test_serving_refuses_wrong_answers(bench, monkeypatch, capsys):
    serving = bench("bench_serving")
    monkeypatch.setattr(serving, "same_alone", lambda model, args, config: config is None)
    arguments = [*SHAPE, "--layers", "1", "--hidden", "32", "--mix", "chat", "--presets", "int8"]
    assert serving.main(arguments) == 1
    assert "REFUSED" in capsys.readouterr().out


def test_generate_compiled(bench, tmp_path):
    """Every static cache takes plain and compiled steps, and no further graph is compiled while steps are timed."""
    out = tmp_path / "compiled.json"
    arguments = [*GENERATE, "--presets", "int8,int4", "--compile", "--batch", "2", "--no-memory", "--out", str(out)]
    assert bench("bench_generate").main(arguments) == 0
    result = json.loads(out.read_text())
    rows = {row["name"]: row for row in result["steps"]}
    fixed = {"dense-static", "int8-static", "int4-static"}
    assert set(rows) == {"dense", "dense-float32", "int8", "int4", *fixed, *(f"{name}-compiled" for name in fixed)}
    for name in fixed:
        assert rows[f"{name}-compiled"]["cache_bytes"] == rows[name]["cache_bytes"]
    # Two layers, keys and values, two rows of two heads.
    assert rows["dense"]["cache_bytes"] == 2 * 2 * 2 * 2 * 70 * 32 * 2
    checks = {(check["name"], check["check"]) for check in result["checks"]}
    assert ("compiled", "graphs that were compiled while steps were timed") in checks
    assert ("int4-static-compiled", "every step took the fused route") in checks


def test_sliding_result(run, tmp_path):
    result, text = run("bench_sliding", SLIDING, tmp_path / "sliding.json")
    check_common(result, text)
    rows = {row["name"]: row for row in result["steps"]}
    assert set(rows) == {"dense", "dense-static", "int8", "int4", "fp8"}
    for row in rows.values():
        assert set(row["ms"]) == SUMMARY
        assert row["ms"]["n"] == 3
        assert row["ms"]["min"] <= row["mean_ms"] <= row["ms"]["max"]
        assert row["faster_than_dense"] == pytest.approx(rows["dense"]["mean_ms"] / row["mean_ms"])
    # Keys and values of two heads; fp8 has 64 tokens that a crop may bring back, and room for as many.
    assert 0 <= rows["dense"]["cache_bytes"] - 2 * 2 * 70 * 32 * 2 < 100
    assert 0 <= rows["fp8"]["cache_bytes"] - 2 * 2 * (70 + 2 * 64) * (32 + 2) < 100
    caches = {(row["model"], row["length"], row["name"]): row for row in result["bytes"]}
    assert len(caches) == 7
    # GPT-OSS: twelve layers with all tokens, twelve with a window of 128, which the default leaves dense.
    dense = 2 * 8 * 64 * 2 * 12 * (600 + 128)
    assert caches["GPT-OSS 20B", 600, "dense"]["cache_bytes"] == pytest.approx(dense, rel=0.001)
    assert caches["GPT-OSS 20B", 600, "int8"] == caches["GPT-OSS 20B", 600, "int8, sliding: dense"] | {"name": "int8"}
    done = {check["check"] for check in result["checks"] if check["name"] == "int4"}
    assert {"every step took the fused route", "memory_report counts every tensor"} <= done


def test_the_readme_has_the_tables_of_sliding_layers(bench):
    sliding = bench("bench_sliding")
    readme = sliding.README.read_text(encoding="utf-8")
    assert sliding.with_tables(readme, facts.read_json(sliding.RESULT)) == readme, "bench_sliding.py --readme"


def test_laptop_result(run, tmp_path):
    result, text = run("bench_laptop", LAPTOP, tmp_path / "laptop.json")
    check_common(result, text)
    # Of each layer: queries and outputs, keys and values, three matrices of the MLP.
    linear = 2 * (2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 96)
    kept = 128 * 64 + (2 * 2 + 1) * 64
    assert result["parameters"] == linear + kept
    made, skipped = {row["weights"]: row for row in result["weights"]}, {row["weights"] for row in result["skipped"]}
    assert {*made} | skipped == {"unquantized", "torchao-int8", "torchao-int4"}
    assert made["unquantized"]["bytes"] == 2 * (linear + kept)
    for name, bits in (("torchao-int8", 8), ("torchao-int4", 4)):
        if name in made:
            assert bits / 8 * linear < made[name]["bytes"] - 2 * kept < (bits + 2) / 8 * linear
    names = {"dense", "dense-static", "int8", "int4"}
    rows = {(row["weights"], row["length"], row["name"]): row for row in result["steps"]}
    assert set(rows) == {(weights, length, name) for weights in made for length in (70, 140) for name in names}
    for (weights, _, _), row in rows.items():
        assert set(row["ms"]) == SUMMARY
        assert row["ms"]["n"] == 2
        assert row["tokens_per_s"] * row["ms"]["median"] == pytest.approx(1000)
        assert row["cache_ms"] == pytest.approx(row["ms"]["median"] - made[weights]["ms"]["median"])
    # Two layers, keys and values, two heads, and the steps of the check.
    assert rows["unquantized", 70, "dense"]["cache_bytes"] == 2 * 2 * 2 * (70 + 2) * 32 * 2
    done = {check["check"] for check in result["checks"] if check["name"] == "int4"}
    assert {"every step took the fused route", "memory_report counts every tensor", "logits are finite"} <= done
    assert f"unquantized, {made['unquantized']['bytes'] / 1e9:.2f} GB" in text


def test_laptop_tables(bench, tmp_path):
    laptop = bench("bench_laptop")
    out = tmp_path / "laptop.json"
    assert laptop.main([*LAPTOP, "--weights", "unquantized", "--threads", "1", "--out", str(out)]) == 0
    page = laptop.with_tables(f"# Page\n{laptop.BEGIN}\nold\n{laptop.END}\nend\n", facts.read_json(out))
    assert page.startswith("# Page\n") and page.endswith("end\n") and "old" not in page
    assert "| weights | cached tokens | 1 token | dense | dense-static | **int8** | **int4** |" in page
    assert sum(line.startswith("| unquantized, 0.00 GB | ") for line in page.splitlines()) == 2
    assert sum(line.startswith(("| 70 | ", "| 140 | ")) for line in page.splitlines()) == 2


@pytest.mark.parametrize("missing", ["torchao.quantization", "torchao.prototype.quantization.int4"])
def test_laptop_names_the_reason_of_weights_that_cannot_be_made(missing, bench, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    laptop = bench("bench_laptop")
    args = laptop.parse(LAPTOP)
    plain = step.build_model(laptop.whole_shape(args), 160)
    (row,) = laptop.bench_weights(args, plain, "torchao-int4")["skipped"]
    assert row["weights"] == "torchao-int4"
    assert missing in row["reason"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="process memory is read from /proc")
def test_process_memory_grows_by_the_cache(bench):
    generate = bench("bench_generate")
    shape = ["--heads", "4", "--kv-heads", "4", "--head-dim", "64", "--layers", "2", "--threads", "1"]
    args = generate.parse(["--length", "8192", *shape, "--presets", "int8-plain"])
    cache_bytes = 2 * 2 * 4 * 8192 * 64 * 2
    chosen = [c for c in generate.candidates(args) if c.name in ("dense", "dense-float32", "int8-plain")]
    torch.set_num_threads(1)
    found = process_memory.measure_memory(generate.shape_of(args), chosen, 8192, 18)
    assert found["dense"]["cache_mb"] == pytest.approx(cache_bytes / 1e6, rel=0.25)
    assert found["dense-float32"]["cache_mb"] == pytest.approx(2 * cache_bytes / 1e6, rel=0.25)
    # A step of DynamicCache copies keys of a layer before it drops the old ones.
    assert found["dense"]["step_peak_mb"] >= found["dense"]["cache_mb"]
    assert found["int8-plain"]["cache_mb"] < 0.8 * found["dense"]["cache_mb"]


@pytest.fixture
def refuses(bench, capsys, tmp_path):
    """Runs a benchmark that must refuse: it says so and why, shows no figures and writes no file."""

    def run(name: str, arguments: list[str], *said: str) -> None:
        out = tmp_path / "result.json"
        assert bench(name).main([*arguments, "--out", str(out)]) == 1
        text = capsys.readouterr().out
        assert all(what in text for what in ("REFUSED", *said)), text
        assert "checks passed" not in text
        assert " ms " not in text
        assert not out.exists()

    return run


def changed(call, output=lambda x: x, logsumexp=lambda x: x, but=None):
    """The operator with other results, but not on the backend `but`."""

    def wrong(query, keys, *args, **kwargs):
        found = call(query, keys, *args, **kwargs)
        return found if keys.backend == but else (output(found[0]), logsumexp(found[1]))

    return wrong


WRONG = {
    "output": {"output": lambda x: x * 1.02},
    "not a number": {"output": lambda x: x * torch.nan},
    "log-sum-exp": {"logsumexp": lambda x: x + 0.1},
}


def test_error_refuses_wrong_attention(refuses, monkeypatch):
    monkeypatch.setattr(cpu, "decode_attention", changed(cpu.decode_attention, **WRONG["output"]))
    refuses("bench_error", ["--lengths", "67", "--head-dims", "32", "--seeds", "1"])


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_decode_refuses_wrong_attention(refuses, monkeypatch, wrong):
    """Every other backend is compared with the reference: with a wrong reference nothing fits."""
    monkeypatch.setattr(reference, "decode_attention", changed(reference.decode_attention, **wrong))
    refuses("bench_decode", [*DECODE, "--presets", "int8", "--backend", "auto"])


def test_decode_refuses_wrong_operator(refuses, monkeypatch):
    monkeypatch.setattr(ops, "decode_attention", changed(ops.decode_attention, **WRONG["output"], but="reference"))
    refuses("bench_decode", [*DECODE, "--presets", "int4-small"], "attention against the reference")


def test_decode_refuses_wrong_bytes(refuses, monkeypatch):
    right = ops.quantize_append

    def wrong(key, value, keys, values, *args, **kwargs):
        right(key, value, keys, values, *args, **kwargs)
        if keys.backend != "reference":
            values.data[0, 0, kwargs["start"], 0] ^= 1

    monkeypatch.setattr(ops, "quantize_append", wrong)
    refuses("bench_decode", [*DECODE, "--presets", "int8"], "appended values")


def test_generate_refuses_wrong_operator(refuses, monkeypatch):
    """At 2 % off it loses no more than int8 does, so only the comparison with the de-quantized route can tell."""
    monkeypatch.setattr(ops, "decode_attention", changed(ops.decode_attention, **WRONG["output"]))
    refuses("bench_generate", [*GENERATE, "--presets", "int8"], "fused against the de-quantized")


def test_sliding_refuses_wrong_operator(refuses, monkeypatch):
    monkeypatch.setattr(ops, "decode_attention", changed(ops.decode_attention, **WRONG["output"]))
    refuses("bench_sliding", [*SLIDING, "--presets", "int8"], "fused against attention over the de-quantized window")


def test_laptop_refuses_wrong_operator(refuses, monkeypatch):
    monkeypatch.setattr(ops, "decode_attention", changed(ops.decode_attention, output=lambda x: x.flip(-1)))
    refuses("bench_laptop", [*LAPTOP, "--weights", "unquantized"], "logits near DynamicCache")


def test_generate_refuses_a_cache_that_is_not_read_fused(refuses, monkeypatch):
    fill = step.fill

    def unlearned(*args, **kwargs):
        cache = fill(*args, **kwargs)
        for layer in getattr(cache, "quantized_layers", []):
            layer.takes_states = False
        return cache

    monkeypatch.setattr(step, "fill", unlearned)
    refuses("bench_generate", [*GENERATE, "--presets", "int8"], "fused route")


def test_generate_names_the_reason_of_a_rival_that_cannot_run(bench, monkeypatch):
    def broken(backend, *args, **kwargs):
        raise ImportError(f"no {backend} in /some/where/site-packages/{backend}.py")

    monkeypatch.setattr(caches.transformers, "QuantizedCache", broken)
    generate = bench("bench_generate")
    args = generate.parse([*GENERATE, "--presets", "int8"])
    found = generate.bench_length(args, 70)
    reasons = {row["name"]: row["reason"] for row in found["skipped"]}
    assert reasons["transformers-fp8"] == "ImportError: no fp8 in fp8.py"
    assert {row["name"] for row in found["steps"]} == {"dense", "dense-float32", "dense-static", "int8"}


def test_tensor_bytes_counts_storages_once():
    """A view of a large storage keeps all of it alive; two views of it are one."""
    cache = DynamicCache()
    whole = torch.zeros(2, 1, 1, 10, 16)
    cache.update(whole[0], whole[1], 0)
    cache.layers[0].keys, cache.layers[0].values = whole[0, :, :, :5], whole[1, :, :, :5]
    assert tensor_bytes(cache) == whole.nbytes


@pytest.mark.parametrize("preset", KVQuantConfig.preset_names())
def test_tensor_bytes_of_ours_is_the_memory_report(preset):
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    cache = QuantizedCache(config, preset)
    for layer_idx in range(2):
        cache.update(*torch.randn(2, 3, 2, 130, 32), layer_idx)
    assert tensor_bytes(cache) == cache.memory_report()["total"]


def test_bytes_read_of_the_channel_grid_with_windows():
    """int4 preset at 130 tokens: keys 98 columns in two blocks (recent_length 32) and so on, counted by hand."""
    keys, values = operator.fill(KVQuantConfig.preset("int4"), *torch.randn(2, 1, 2, 130, 32).bfloat16(), 1, 0)
    exact = 32 * 32 * 2 + 4 * 32 * 2
    assert operator.bytes_read(keys) == 2 * (98 * 16 + 2 * (32 + 32) * 2 + exact)
    assert operator.bytes_read(values) == 2 * (98 * 16 + 98 * 2 + exact)


def test_command_and_reasons_carry_no_folders():
    argv = ["--lengths", "1,2", "--presets", "/somewhere/mine.yaml", "--out", "/tmp/x.json", "--rounds", "3"]
    assert facts.command("decode", argv) == (
        "python eval/bench_decode.py --lengths 1,2 --presets mine.yaml --rounds 3"
    )
    assert facts.command("decode", ["--out=/tmp/x.json"]) == "python eval/bench_decode.py"
    assert facts.without_paths("see https://a.b/c/d and kv_len/2") == "see https://a.b/c/d and kv_len/2"


def test_what_was_measured_later_is_told_with_its_machine():
    first = facts.added([], ["a", "b"], {"cpu": "one"}, {})
    assert first == [{"caches": ["a", "b"], "machine": {"cpu": "one"}, "versions": {}}]
    assert facts.added(first, [], {"cpu": "two"}, {}) == first
    later = facts.added(first, ["c", "b"], {"cpu": "two"}, {})
    assert [(entry["caches"], entry["machine"]["cpu"]) for entry in later] == [(["a"], "one"), (["c", "b"], "two")]
    assert [entry["machine"]["cpu"] for entry in facts.added(later, ["a"], {"cpu": "three"}, {})] == ["two", "three"]


def test_rounds_are_interleaved_and_bounded():
    calls = []
    tasks = {name: lambda name=name: calls.append(name) for name in "AB"}
    samples = clock.time_interleaved(tasks, rounds=5, seconds=60, before=lambda: calls.append("-"))
    rounds = ["".join(calls[i : i + 4]) for i in range(0, len(calls), 4)]
    # Each round has all tasks, in an order of its own.
    assert len(rounds) == 5 + clock.WARM_UP_ROUNDS
    assert set(rounds) == {"-A-B", "-B-A"}
    assert {name: len(s) for name, s in samples.items()} == {"A": 5, "B": 5}
    samples = clock.time_interleaved(tasks, rounds=50, seconds=0, before=lambda: None)
    assert {name: len(s) for name, s in samples.items()} == {"A": clock.MIN_ROUNDS, "B": clock.MIN_ROUNDS}


def test_steps_in_a_row(monkeypatch):
    taken = []
    monkeypatch.setattr(step, "switched", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(step, "step", lambda forward, cache, token: taken.append(f"{cache}{token}"))
    samples = step.time_steps({"A": (None, None, "a"), "B": (None, None, "b")}, range(6), in_a_row=3)
    assert taken == ["a0", "a1", "a2", "b0", "b1", "b2", "a3", "a4", "a5", "b3", "b4", "b5"]
    # The first step of a turn is not counted.
    assert {name: len(s) for name, s in samples.items()} == {"A": 4, "B": 4}


def test_steps_in_a_row_that_do_not_fit_are_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench("bench_generate").main(["--new", "10", "--in-a-row", "4"])
    assert "--in-a-row 4: expected a divisor of --new 10" in capsys.readouterr().err


class TestPlots:
    """The pictures of the READMEs: every line has its name and its last figure beside its end."""

    def labels(self, figure) -> list[str]:
        return [text.get_text() for axes in figure.axes for text in axes.texts]

    def test_overview(self, bench):
        plot = bench("plot")
        result = plot.read("bench_overview")
        found = {(row["name"], row["length"]): row for row in result["steps"]}
        # Every cache is a line: it was measured at every length.
        assert {name for name, _ in found} >= set(plot.LINES)
        assert len(found) == len({name for name, _ in found}) * len({length for _, length in found})
        labels = self.labels(plot.draw_overview(result))
        last = max(length for _, length in found)
        assert f"kvquant-int4 {found['int4', last]['ms']['median']:.3g} ms" in labels
        assert f"kvquant-int4 {found['int4', last]['cache_bytes'] / 1e6:.3g} MB" in labels
        # One panel has all of them, the other has the dense caches once.
        assert len(labels) == 2 * len(plot.LINES) - 1

    def test_decode(self, bench):
        plot = bench("plot")
        result = plot.read("bench_decode")
        rows = [row for row in result["decode"] if row["kv_heads"] == result["arguments"]["kv_heads"]]
        labels = self.labels(plot.draw_decode(rows, "title"))
        assert len(labels) == len({row["name"] for row in rows}) + 1
        assert any(label.startswith("int4-small: ") for label in labels)

    def test_the_field(self, bench):
        plot = bench("plot")
        rows = [row for row in plot.read("bench_cpu_field")["field"] if "ms" in row]
        labels = self.labels(plot.draw_decode(rows, "title"))
        assert len(labels) == len({row["name"] for row in rows})
        assert any(label.startswith("onnxruntime-int8: ") for label in labels)

    def test_serving(self, bench):
        plot = bench("plot")
        results = {name: plot.read(name) for name in plot.MIXES}
        rows = [row for result in results.values() for row in result["rows"]]
        figure = plot.draw_serving(results)
        names = ["dense" if row["name"] == "dense" else f"kvquant-{row['name']}" for row in rows]
        assert self.labels(figure) == [f"{n}: {row['tokens_per_s']:.0f} tokens/s" for n, row in zip(names, rows)]
        first = [result["rows"][0] for result in results.values() for _ in result["rows"]]
        expected = [row["tokens_per_s"] / dense["tokens_per_s"] for row, dense in zip(rows, first)]
        assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx(expected)

    def test_labels_at_the_ends_keep_apart_and_their_order(self):
        figure = style.new_figure(style.PRINT, (4, 3))
        axes = figure.subplots()
        axes.set(xlim=(0, 1), ylim=(0, 10))
        style.label_ends(axes, [(1, y, f"at {y}", "black") for y in (5, 5.1, 5.05, 9, 1)])
        figure.draw_without_rendering()
        # The boxes of the text alone: an annotation's own box includes its line.
        boxes = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}
        ordered = [boxes[f"at {y}"] for y in (1, 5, 5.05, 5.1, 9)]
        assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(ordered))
        middle = axes.transData.transform((1, 9))[1]
        assert boxes["at 9"].y0 < middle < boxes["at 9"].y1
