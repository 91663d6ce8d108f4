"""The common parts of all benchmarks: command-line options, and showing and saving the result."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from .. import ops
from ..backends import cpu
from ..config import KVQuantConfig
from .caches import Preset
from .checks import refused
from .facts import document, write_json
from .step import Shape

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def new_parser(about: str) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--out", help="JSON file to write")
    return parser


def add_attention(parser: argparse.ArgumentParser) -> None:
    """Add options for the shape of attention, and for the caches."""
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights, queries and new states")
    parser.add_argument("--presets", help="comma separated, or YAML paths; default: all")
    parser.add_argument("--backend", default="auto", help="of presets: auto, cpu or reference")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add options for the shape of a model, and for the caches."""
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128, help="width of the residual stream and of the MLP")
    add_attention(parser)


def integers(text: str) -> list[int]:
    """The integers of a comma-separated list."""
    return [int(number) for number in text.split(",") if number]


def choose(
    parser: argparse.ArgumentParser, args: argparse.Namespace, known: Mapping[str, KVQuantConfig] | None = None
) -> None:
    """Add to `args` the configs (of `known`, default: the presets) and the backend that it names; take its threads."""
    if known is None:
        known = {name: KVQuantConfig.preset(name) for name in KVQuantConfig.preset_names()}
    try:
        names = args.presets.split(",") if args.presets else known
        configs = {Path(name).stem: known.get(name) or KVQuantConfig.load(name) for name in names}
        args.configs = {name: replace(config, backend=args.backend) for name, config in configs.items()}
        args.backend_chosen = ops.choose_backend(args.backend, "cpu", DTYPES[args.dtype])
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    take_threads(args)


def take_threads(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)


def shape_of(args: argparse.Namespace) -> Shape:
    """The shape from the options of `add_model`."""
    return Shape(
        args.layers, args.hidden, args.heads, args.kv_heads, args.head_dim, args.hidden,
        batch=args.batch, dtype=DTYPES[args.dtype],
    )  # fmt: skip


def summary_line(result: dict) -> str:
    """A line that says that all checks passed, with the shape, the threads, the backend and its instruction set."""
    names = ("batch", "layers", "hidden", "heads", "kv_heads", "head_dim", "dtype")
    found = [f"{name.replace('_', ' ')} {result['arguments'][name]}" for name in names if name in result["arguments"]]
    where = f"{result['machine']['threads']} threads, backend {result['backend']}"
    if result["instruction_set"]:
        where += f" ({result['instruction_set']})"
    return f"{len(result['checks'])} checks passed; {', '.join(found)}; {where}"


def chosen_presets(args: argparse.Namespace) -> list[Preset]:
    return [Preset(name, config) for name, config in args.configs.items()]


class Benchmark:
    """A run: it collects the rows of each table, checks among them, and ends with a result.

    Args:
        name: the script's name without `bench_`.
        argv: the script's command line.
    """

    def __init__(self, name: str, argv: list[str], args: argparse.Namespace, tables: tuple[str, ...]):
        self.name, self.argv, self.args = name, argv, args
        self.rows: dict[str, list[dict]] = {"checks": [], **{table: [] for table in tables}}
        self._began = time.perf_counter()

    def add(self, rows: Mapping[str, list[dict]], **where) -> bool:
        """Keep rows, each with `where`; returns whether all checks have passed so far; prints those that failed."""
        for table, new in rows.items():
            self.rows[table] += [{**where, **row} for row in new]
        return not refused(self.rows["checks"])

    def finish(self, show: Callable[[dict], None], **fields) -> int:
        """Show the result, with other `fields`, and write it to the file of `--out`; returns the exit status."""
        args = self.args
        hidden = {"configs", "out", "backend_chosen", "presets"}
        result = document(
            self.name,
            self.argv,
            {name: value for name, value in vars(args).items() if name not in hidden},
            backend=args.backend_chosen,
            instruction_set=cpu.isa() if args.backend_chosen == "cpu" else None,
            configs={name: config.to_dict() for name, config in args.configs.items()},
            **fields,
            **self.rows,
            seconds=time.perf_counter() - self._began,
        )
        show(result)
        if args.out:
            write_json(args.out, result)
        return 0
