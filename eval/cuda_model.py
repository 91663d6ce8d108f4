"""Predicts the speed of the CUDA decode attention from its machine code, without a GPU.

    python eval/cuda_model.py --presets int8,fp8,int4 --gpus H100,H200

Kernels are compiled as the backend compiles them, with NVRTC, and disassembled by the program that `pip install
'nvidia-cuda-nvdisasm==13.*'` brings. For the loop over plain tiles this prints instructions and wavefronts of shared
memory per 16 columns, then the cycles of a tile, and the bytes per clock that a multiprocessor takes, with 1 to 4
blocks on it; for each GPU the bytes per clock that memory delivers; for calls the microseconds, alone and behind an
append in a captured step, beside the goals.

UNCALIBRATED: no figure has been compared with a GPU (hf_kvquant/measure/gpu/warp_timing.py says what is left out).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hf_kvquant import KVQuantConfig
from hf_kvquant.measure.gpu import forecast
from hf_kvquant.measure.tables import print_table

WARNING = "UNCALIBRATED predictions: no GPU has confirmed them."


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default="int8,fp8,int4", help="names, or YAML files; some have goals")
    parser.add_argument("--gpus", default=",".join(forecast.GPUS), help="comma separated")
    parser.add_argument("--contexts", default="4096,16384,32768,65536,131072")
    parser.add_argument("--batches", default="1,8")
    args = parser.parse_args(argv)
    args.presets, args.gpus = args.presets.split(","), args.gpus.split(",")
    args.contexts, args.batches = (list(map(int, x.split(","))) for x in (args.contexts, args.batches))
    for name, given, known in (
        ("--presets", [name for name in args.presets if not Path(name).is_file()], KVQuantConfig.preset_names()),
        ("--gpus", args.gpus, forecast.GPUS),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"{name}: {sorted(unknown)} are unknown; expected some of {list(known)}")
    if reason := forecast.missing():
        raise SystemExit(reason)
    return args


def run(args: argparse.Namespace) -> dict:
    """The loops of every preset on every architecture, and the calls of every preset on every GPU."""
    loops, calls = [], []
    for preset in args.presets:
        kernels = {arch: forecast.Kernel.of(preset, arch) for arch in {forecast.GPUS[name].arch for name in args.gpus}}
        loops += [{"preset": preset, **forecast.loop_facts(kernels[arch])} for arch in sorted(kernels)]
        for name in args.gpus:
            gpu = forecast.GPUS[name]
            for batch in args.batches:
                for context in args.contexts:
                    row = forecast.call_facts(preset, kernels[gpu.arch], gpu, batch, context)
                    calls.append({"gpu": name, "preset": preset, "batch": batch, "context": context, **row})
    needed = {name: forecast.GPUS[name].bytes_per_clock for name in args.gpus}
    return {"loops": loops, "needed": needed, "calls": calls}


def show(result: dict) -> None:
    print(WARNING)
    names = ["preset", "arch", "columns", "instructions", "wavefronts", "registers", "before", "after"]
    rows = [
        [
            *(_short(row[name]) for name in names),
            *(f"{cycles:.0f}, {rate:.1f}" for cycles, rate in zip(row["cycles"], row["bytes_per_clock"])),
        ]
        for row in result["loops"]
    ]
    title = "Loop over plain tiles: per 16 columns; then cycles of a tile, bytes per clock and multiprocessor"
    print_table(title, [*names, *(f"{n} blocks" for n in range(1, 5))], rows, (0, 1))
    rows = [[name, _short(rate)] for name, rate in result["needed"].items()]
    print_table("Bytes per clock and multiprocessor that memory delivers", ["", "needed"], rows)
    names = ["gpu", "preset", "batch", "context", "us", "us_in_step", "limit_us", "over_bf16", "limit_over_bf16"]
    names += ["share_of_copy"]
    told = {None: "-", True: "met", False: "NOT MET"}
    rows = [[*(_short(row[name]) for name in names), told[row["met"]]] for row in result["calls"]]
    print_table("Calls: predicted microseconds beside the goals", [*names, "goals"], rows, (0, 1))
    print(WARNING)


def _short(value: object) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    show(run(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
