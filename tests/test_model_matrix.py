"""The model matrix: a sample of it is measured again, and the documents match its results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import transformers

from hf_kvquant.measure import families as checks
from hf_kvquant.measure import tiny_models

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "eval" / "results"
# One family of each status and kind of layer.
SAMPLE = (
    "LlamaForCausalLM", "Gemma3ForCausalLM", "GptOssForCausalLM", "Qwen3NextForCausalLM", "FalconH1ForCausalLM",
    "DeepseekV3ForCausalLM", "BloomForCausalLM", "ProphetNetForCausalLM", "BartForConditionalGeneration",
    "Qwen2VLForConditionalGeneration", "MambaForCausalLM", "OpenAIGPTLMHeadModel",
)  # fmt: skip
AS_STORED = ("fused", "absorbed")
ACTS = (*AS_STORED, "partly fused", "de-quantized")
# A second stream of its own.
PARTLY = {"ProphetNetForCausalLM", "ProphetNetForConditionalGeneration"}


@pytest.fixture(scope="module")
def matrix():
    """The script as a module."""
    sys.path.insert(0, str(ROOT / "eval"))
    try:
        import model_matrix
    finally:
        sys.path.remove(str(ROOT / "eval"))
    return model_matrix


@pytest.fixture(scope="module")
def results() -> dict:
    """The results with the newest transformers, which the documents show."""
    return json.loads((RESULTS / "model_matrix.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    """The sample, measured in a process of its own."""
    out = tmp_path_factory.mktemp("matrix") / "sample.json"
    done = subprocess.run(
        [sys.executable, "model_matrix.py", "--jobs", "1", "--out", str(out), "--only", *SAMPLE],
        cwd=ROOT / "eval", env=processes.environment(OMP_NUM_THREADS="1"), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8"))["families"]


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_is_as_published(name, measured, results):
    found, published = measured[name], results["families"][name]
    assert found["status"] == published["status"], found
    assert found.get("layers") == published.get("layers")
    if found["status"] == "refused":
        assert found["reason"] == published["reason"]


def test_every_family_is_there(matrix, results):
    if results["versions"]["transformers"] != transformers.__version__:
        pytest.skip(f"the results are of transformers {results['versions']['transformers']}")
    assert list(results["families"]) == list(tiny_models.families())


@pytest.mark.parametrize(
    ("file", "known"),
    [
        ("model_matrix.json", set()),
        # In this version transformers' sdpa leaves out the softcap of this model, which the operator applies.
        ("model_matrix_oldest.json", {"VaultGemmaForCausalLM"}),
    ],
    ids=["newest", "oldest"],
)
def test_no_family_failed(file, known):
    families = json.loads((RESULTS / file).read_text(encoding="utf-8"))["families"]
    assert {name for name, f in families.items() if f["status"] == "failed"} == known


def test_results_keep_their_promises(matrix, results):
    acting = {name: f for name, f in results["families"].items() if f["status"] in ACTS}
    assert sum(f["status"] in AS_STORED for f in acting.values()) >= 240
    assert {name for name, f in acting.items() if f["status"] not in AS_STORED} == PARTLY
    for name, found in acting.items():
        assert max(found["exact"].values()) <= checks.EXACT_LIMIT, name
        assert set(found["presets"]) == set(checks.PRESETS), name
        for preset, figures in found["presets"].items():
            assert figures["fused"] <= checks.FUSED_LIMIT, (name, preset)
            assert figures["distance"] <= checks.DISTANCE_LIMIT[preset], (name, preset)
            fused = figures["routes"].get("decode_fused", 0)
            assert (fused > 0) == (found["status"] != "de-quantized"), (name, preset)
            if found["status"] in AS_STORED:
                assert "decode_dequantized" not in figures["routes"], (name, preset)
    for name, found in results["families"].items():
        if found["status"] not in ACTS:
            assert found["reason"], name


def test_the_documents_say_what_the_results_say(matrix, results):
    """`python eval/model_matrix.py --render` writes both."""
    assert (RESULTS / "model_matrix.md").read_text(encoding="utf-8") == matrix.page(results)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert matrix.with_sentence(readme, results) == readme

    with pytest.raises(ValueError, match="README.md: expected the lines"):
        matrix.with_sentence("no markers", results)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM"])
def test_a_wrong_operator_fails_the_matrix(name, matrix, monkeypatch):
    """The comparison that the matrix rests on notices a wrong scale."""
    import torch

    import hf_kvquant
    from hf_kvquant import attention as context
    from hf_kvquant import ops

    original = ops.decode_attention
    monkeypatch.setattr(
        ops, "decode_attention",
        lambda *args, scaling, **kwargs: original(*args, scaling=scaling * 1.01, **kwargs),
    )  # fmt: skip
    subject, compared = checks.Subject(tiny_models.families()[name]), checks.Compared()
    with torch.no_grad(), context(subject.model, compared, name=f"kvquant-{name}"), compared.with_own_code():
        cache = hf_kvquant.QuantizedCache(subject.model.config, "int8")
        ids = subject.inputs["input_ids"]
        subject.model(ids, past_key_values=cache)
        subject.model(ids[:, :1], past_key_values=cache)
    assert compared.calls == 2
    assert compared.recorded == (2 if name == "BloomForCausalLM" else 0)
    assert compared.largest > checks.FUSED_LIMIT
