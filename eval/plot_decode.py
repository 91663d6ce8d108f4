"""Draw the time of decode attention against the length of the cache, from what bench_decode.py wrote.

    python eval/plot_decode.py eval/results/bench_decode.json eval/results/bench_decode.png

The dotted line is a plain read of a BF16 cache: no attention over one can be faster.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from hf_kvquant.report.style import COLORS, PRINT, WIDE, dress, label_ends, new_figure

# Ours in colours, what they are compared with in ink; one colour has one meaning in every plot of this folder.
PRESET_COLORS = dict(zip(("int8", "int8-plain", "fp8", "int4", "int4-small"), COLORS[1:]))
BASELINES = {
    "sdpa-bfloat16": "SDPA, BF16, heads packed",
    "sdpa-bfloat16-gqa": "SDPA, BF16, enable_gqa (transformers)",
    "sdpa-float32": "SDPA, FP32, heads packed",
}
DASHES = dict(zip(BASELINES, ("-", (0, (6, 2)), (0, (3, 2)))))


def draw(rows: list[dict], title: str) -> Figure:
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
    dense = [row for row in rows if row["name"] == "sdpa-bfloat16"]
    points = [(row["length"], row["plain_read_ms"]["median"]) for row in dense]
    line("plain read of the BF16 cache", points, COLORS[0], ls=":")
    lengths = sorted({row["length"] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="cached tokens", ylabel="milliseconds per call", title=title)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.set_yticks(ticks := [0.3, 1, 3, 10, 30, 100, 300], [f"{n:g}" for n in ticks])
    dress(axes, PRINT)
    label_ends(axes, ends)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="JSON of bench_decode.py")
    parser.add_argument("out", help="PNG to write")
    args = parser.parse_args()
    results = json.loads(Path(args.results).read_text(encoding="utf-8"))
    setting = results["arguments"]
    heads = f"{setting['heads']} query heads, {setting['kv_heads']} KV heads"
    title = f"One call of decode attention: {heads}, head_dim {setting['head_dim']}, {setting['dtype']}"
    draw([row for row in results["decode"] if row["kv_heads"] == setting["kv_heads"]], title).savefig(
        args.out, dpi=130
    )


if __name__ == "__main__":
    main()
