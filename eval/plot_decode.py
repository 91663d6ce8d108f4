"""Draw the time of decode attention against the length of the cache, from what bench_decode.py wrote.

    python eval/plot_decode.py eval/results/bench_decode.json eval/results/bench_decode.png

The grey line is a plain read of a BF16 cache: no attention over one can be faster.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(rows: list[dict], title: str, path: str) -> None:
    """One line per cache: median milliseconds over cached tokens, both axes logarithmic."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    names = list(dict.fromkeys(row["name"] for row in rows))
    for name in names:
        own = [row for row in rows if row["name"] == name]
        style = "--" if own[0]["kind"] == "baseline" else "-"
        axes.plot([r["length"] for r in own], [r["ms"]["median"] for r in own], style, marker="o", ms=3, label=name)
    dense = [row for row in rows if row["name"] == "sdpa-bfloat16"]
    axes.plot(
        [r["length"] for r in dense],
        [r["plain_read_ms"]["median"] for r in dense],
        color="0.6",
        label="plain read of the BF16 cache",
    )
    lengths = sorted({row["length"] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="cached tokens", ylabel="milliseconds per call", title=title)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="JSON of bench_decode.py")
    parser.add_argument("out", help="PNG to write")
    args = parser.parse_args()
    results = json.loads(Path(args.results).read_text())
    setting = results["arguments"]
    heads = f"{setting['heads']} query heads, {setting['kv_heads']} KV heads"
    title = f"{heads}, head_dim {setting['head_dim']}, {setting['dtype']}"
    draw([row for row in results["decode"] if row["kv_heads"] == setting["kv_heads"]], title, args.out)


if __name__ == "__main__":
    main()
