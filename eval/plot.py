"""Draw the pictures of the READMEs from the results of the benchmarks: `python eval/plot.py`.

`overview.png`: the time of a decode step and the bytes of the cache, from one result of bench_generate.py.

`bench_decode.png`: the time of decode attention over the length of the cache, from results of bench_decode.py. The
dotted line is a plain read of a BF16 cache: no attention over one can be faster.

`bench_decode_avx2_zen4_1thread.png`: the same with AVX2 only.

`bench_cpu_field.png`, `bench_cpu_field_zen4_1thread.png`: beside other packages, from results of bench_cpu_field.py.

`bench_serving.png`: tokens per second of continuous batching, as multiples of dense pages, from results of
bench_serving.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_kvquant.measure.report.style import COLORS, PRINT, WIDE, dress, label_ends, new_figure

RESULTS = Path(__file__).parent / "results"
# Our caches have colours, the others ink; a colour means the same in every picture.
PRESET_COLORS = dict(zip(("int8", "int8-plain", "fp8", "int4", "int4-small"), COLORS[1:]))
BASELINES = {
    "sdpa-bfloat16": "SDPA, BF16, heads packed",
    "sdpa-bfloat16-gqa": "SDPA, BF16, enable_gqa (transformers)",
    "sdpa-float32": "SDPA, FP32, heads packed",
}
DASHES = dict(zip(BASELINES, ("-", (0, (6, 2)), (0, (3, 2)))))
# The label, colour and line style in the picture, by the name in the results.
LINES = {
    "dense": ("DynamicCache", PRINT.ink, "-"),
    "dense-static": ("StaticCache", PRINT.ink, (0, (4, 2))),
    "transformers-fp8": ("transformers-fp8", COLORS[5], "-"),
    "hqq-int8": ("hqq-int8", COLORS[3], "-"),
    "quanto-int4": ("quanto-int4", COLORS[7], "-"),
    "int8": ("kvquant-int8", COLORS[1], "-"),
    "int4": ("kvquant-int4", COLORS[4], "-"),
}
# What is served, by the name of the result.
MIXES = {
    "bench_serving": "short prompts (chat)",
    "bench_serving_long": "long prompts",
    "bench_serving_window": "long prompts,\nwindow of 1,024 tokens",
}


def read(name: str) -> dict:
    """The content of a file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def draw_overview(results: dict) -> Figure:
    """Milliseconds of a step, and megabytes of the cache, over cached tokens; all axes logarithmic."""
    figure = new_figure(PRINT, (1.2 * WIDE, 4.6))
    left, right = figure.subplots(1, 2)
    shown = [row for row in results["steps"] if row["name"] in LINES]
    time, weight = (lambda row: row["ms"]["median"]), (lambda row: row["cache_bytes"] / 1e6)
    panel(left, shown, time, "ms", [3, 10, 30, 100, 300, 1000])
    # The two dense caches have the same size.
    dense = [row for row in shown if row["name"] != "dense-static"]
    panel(right, dense, weight, "MB", [1, 3, 10, 30, 100, 300])
    left.set_title("One decode step, milliseconds", loc="left")
    right.set_title("The cache, megabytes", loc="left")
    shape, machine = results["arguments"], results["machine"]
    figure.suptitle(
        f"{shape['layers']} layers, {shape['heads']} query heads, {shape['kv_heads']} KV heads, "
        f"head_dim {shape['head_dim']}, {shape['dtype']}; {machine['threads']} threads of an {machine['cpu']}",
        fontsize=10, color=PRINT.muted,
    )  # fmt: skip
    return figure


def panel(axes: Axes, rows: list[dict], value: Callable[[dict], float], unit: str, ticks: list[int]) -> None:
    """One line per cache, with its name and its last value at its end."""
    lengths = sorted({row["length"] for row in rows})
    ends = []
    for name, (label, color, style) in LINES.items():
        points = [(row["length"], value(row)) for row in rows if row["name"] == name]
        if not points:
            continue
        width = 2.4 if label.startswith("kvquant") else 1.4
        axes.plot(*zip(*points), color=color, ls=style, lw=width, marker="o", ms=4)
        length, last = points[-1]
        ends.append((length, last, f"{label} {float(f'{last:.3g}'):,g} {unit}", color))
    axes.set(xscale="log", yscale="log", xlabel="cached tokens", xlim=(lengths[0] / 1.2, lengths[-1] * 1.2))
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.set_yticks(ticks, [f"{n:,}" for n in ticks])
    dress(axes, PRINT)
    label_ends(axes, ends)


def draw_decode(rows: list[dict], title: str) -> Figure:
    """One line per cache: median milliseconds over cached tokens, both axes logarithmic."""
    figure = new_figure(PRINT, (WIDE, 5.2))
    axes = figure.subplots()
    ends = []

    def line(name: str, points: list[tuple[int, float]], color: str, **style) -> None:
        axes.plot(*zip(*points), color=color, **style)
        ends.append((*points[-1], f"{name}: {points[-1][1]:.3g} ms", color))

    for name in dict.fromkeys(row["name"] for row in rows):
        points = [(row["length"], row["ms"]["median"]) for row in rows if row["name"] == name]
        if name in BASELINES:
            line(BASELINES[name], points, PRINT.muted, ls=DASHES[name], marker="o", ms=3)
        else:
            line(name, points, PRESET_COLORS.get(name, PRINT.ink), marker="o", ms=3.5, lw=1.8)
    dense = [row for row in rows if row["name"] == "sdpa-bfloat16" and "plain_read_ms" in row]
    if points := [(row["length"], row["plain_read_ms"]["median"]) for row in dense]:
        line("plain read of the BF16 cache", points, COLORS[0], ls=":")
    lengths = sorted({row["length"] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="cached tokens", ylabel="milliseconds per call", title=title)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.set_yticks(ticks := [0.3, 1, 3, 10, 30, 100, 300], [f"{n:g}" for n in ticks])
    dress(axes, PRINT)
    label_ends(axes, ends)
    return figure


def draw_serving(results: dict[str, dict]) -> Figure:
    """One group of bars per mix: tokens per second of each cache, as multiples of the dense one's."""
    figure = new_figure(PRINT, (WIDE, 3.6))
    axes = figure.subplots()
    places, place = {}, 0.0
    for name, mix in MIXES.items():
        rows = results[name]["rows"]
        speeds = [row["tokens_per_s"] for row in rows]
        places[place - (len(rows) - 1) / 2] = mix
        for row, speed in zip(rows, speeds):
            ratio = speed / speeds[0]
            axes.barh(place, ratio, 0.8, color=PRESET_COLORS.get(row["name"], PRINT.muted))
            label = "dense" if row["name"] == "dense" else f"kvquant-{row['name']}"
            axes.text(ratio + 0.05, place, f"{label}: {speed:.0f} tokens/s", va="center", color=PRINT.ink, fontsize=9)
            place -= 1.0
        place -= 0.7
    axes.set_yticks(list(places), list(places.values()))
    axes.set(xlabel="tokens per second of all requests, as a multiple of dense pages of the same bytes")
    axes.set_xlim(0, 1.3 * axes.get_xlim()[1])
    dress(axes, PRINT)
    axes.grid(False, axis="y")
    return figure


def main() -> None:
    draw_serving({name: read(name) for name in MIXES}).savefig(RESULTS / "bench_serving.png", dpi=130)
    draw_overview(read("bench_overview")).savefig(RESULTS / "overview.png", dpi=130)
    decode = ("bench_decode", "bench_decode_avx2_zen4_1thread")
    field = ("bench_cpu_field", "bench_cpu_field_zen4_1thread")
    for name, kind in [(name, "decode") for name in decode] + [(name, "field") for name in field]:
        result = read(name)
        shape, machine = result["arguments"], result["machine"]
        heads = f"{shape['heads']} query heads, {shape['kv_heads']} KV heads"
        title = f"One call of decode attention: {heads}, head_dim {shape['head_dim']}, {shape['dtype']}\n"
        title += f"{machine['threads']} thread{'s' * (machine['threads'] > 1)} of an {machine['cpu']}"
        if "instruction_set" in result:
            title += f", {result['instruction_set']}"
        rows = [row for row in result[kind] if row.get("kv_heads", shape["kv_heads"]) == shape["kv_heads"]]
        # A peer that cannot run has no figure.
        draw_decode([row for row in rows if "ms" in row], title).savefig(RESULTS / f"{name}.png", dpi=130)


if __name__ == "__main__":
    main()
