"""What a process of a tensor-parallel model computes with quantized caches, for `test_tensor_parallel.py`.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/tensor_parallel.py FOLDER

Each process writes `rank-<rank>.json` to the folder, from which it has loaded the model.
"""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.distributed import DistributedConfig

import hf_kvquant
from hf_kvquant import host

PROMPT = torch.arange(3, 63)[None]
CACHES = ("kvquant-int4", "kvquant-int8", "kvquant-int4-static", "kvquant-int8-static")
BATCH = [PROMPT[0].tolist(), [5, 6, 7], list(range(10, 90))]


def generate(model, name, **options):
    options = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True} | options
    return model.generate(PROMPT, cache_implementation=name, **options)


def generate_batch(model, name):
    config = GenerationConfig(cache_implementation=name, max_new_tokens=12, do_sample=False, eos_token_id=-1)
    options = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=256, page_size=256)
    results = model.generate_batch(BATCH, generation_config=config, continuous_batching_config=options)
    return [results[f"req_{i}"].generated_tokens for i in range(len(BATCH))]


def has_pages():
    try:
        host.continuous_batching()
    except ImportError:
        return False
    return True


def tokens(model):
    """The tokens of every way to generate."""
    found = {name: generate(model, name).sequences[0].tolist() for name in CACHES}
    found["beams"] = generate(model, "kvquant-int4", num_beams=3).sequences[0].tolist()
    found["chunks"] = generate(model, "kvquant-int4-static", prefill_chunk_size=16).sequences[0].tolist()
    found["lookup"] = generate(model, "kvquant-int4", prompt_lookup_num_tokens=3).sequences[0].tolist()
    if has_pages():
        found |= {f"pages {name}": generate_batch(model, name) for name in CACHES[:2]}
    return found


def scores(model):
    return hf_kvquant.score_tokens(model, PROMPT, 40, "int4")[0].tolist()


def error(function):
    try:
        function()
    except ValueError as error:
        return str(error)
    return None


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=DistributedConfig(tp_plan="auto")
    )
    rank = int(os.environ["RANK"])
    cache = host.cache_of(generate(model, "kvquant-int4"))
    found = {"tokens": tokens(model), "scores": scores(model), "heads": cache.layers[0].keys.shape[1]}
    found["bytes"] = cache.memory_report()["dense_equivalent"]
    files = [folder / f"{who}.safetensors" for who in (rank, 1 - rank)]
    cache.save(files[0], model)
    again = hf_kvquant.QuantizedCache.load(files[0], model)
    found["equal"] = all(
        torch.equal(a, b)
        for old, new in zip(cache.layers, again.layers)
        for a, b in ((old.keys, new.keys), (old.values, new.values))
    )
    torch.distributed.barrier()
    found["other"] = error(lambda: hf_kvquant.QuantizedCache.load(files[1], model))
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
