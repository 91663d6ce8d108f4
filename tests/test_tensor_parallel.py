"""Tensor parallelism: two processes, each with its own heads of every layer, generate what one process generates."""

import json
import subprocess
import sys
from pathlib import Path

import families
import processes
import pytest
import tensor_parallel
import torch
from transformers import AutoModelForCausalLM

import hf_kvquant

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this build of torch has no gloo, through which the processes would talk", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    families.build("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def ranks(folder):
    """What each of the two processes found."""
    worker = Path(tensor_parallel.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(worker), str(folder)], capture_output=True, text=True, timeout=300,
        env=processes.environment("accelerate", OMP_NUM_THREADS="1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_the_tokens_are_those_of_one_process(alone, ranks):
    expected = tensor_parallel.tokens(alone)
    for rank in ranks:
        assert rank["tokens"] == expected


def test_each_process_holds_its_own_heads(alone, ranks):
    out = tensor_parallel.generate(alone, "kvquant-int4")
    cache = hf_kvquant.host.cache_of(out)
    for rank in ranks:
        assert rank["heads"] == cache.layers[0].keys.shape[1] // 2 == 1
        assert rank["bytes"] == cache.memory_report()["dense_equivalent"] // 2


def test_scores_are_those_of_one_process(alone, ranks):
    expected = torch.tensor(tensor_parallel.scores(alone))
    for rank in ranks:
        torch.testing.assert_close(torch.tensor(rank["scores"]), expected, rtol=0, atol=1e-2)


def test_a_saved_cache_belongs_to_its_process(alone, folder, ranks):
    for number, rank in enumerate(ranks):
        assert rank["equal"]
        assert "was computed by another part of the model: " in rank["other"]
        with pytest.raises(ValueError, match=f"{number}.safetensors: was computed by another"):
            hf_kvquant.QuantizedCache.load(folder / f"{number}.safetensors", alone)
