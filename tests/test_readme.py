"""The READMEs: their Python blocks run when pasted, their links lead somewhere, their figures are those of the JSON.

The blocks of one README run in order in one fresh process, in an empty folder outside of the repository. A block that
cannot run everywhere has `<!-- not run: REASON -->` on the line before it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import processes
import pytest

from hf_kvquant import KVQuantConfig
from hf_kvquant.host import CACHE
from hf_kvquant.measure.tables import three_digits

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "eval" / "results"
FOLDERS = ("configs", "eval", "hf_kvquant", "kernels", "tests")
READMES = {
    str(file.relative_to(ROOT)): file.read_text(encoding="utf-8")
    for file in [
        ROOT / "README.md",
        *(file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("README.md"))),
    ]
}
TOP = READMES["README.md"]

RUN = """
import json, sys, time
for number, code in json.load(sys.stdin):
    print(f"block {number}:", flush=True)
    begin = time.perf_counter()
    exec(compile(code, f"block {number}", "exec"), globals())
    print(f"block {number} took {time.perf_counter() - begin:.1f} s", flush=True)
"""


class Block(NamedTuple):
    number: int
    code: str
    not_run: str | None


def blocks(text: str) -> list[Block]:
    """The Python blocks of a README; `not_run` is the reason of one that is marked."""
    found = re.findall(r"^(?:<!-- not run: (.+) -->\n)?( *)```python\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [
        Block(n, re.sub(f"^{indent}", "", code, flags=re.MULTILINE), why or None)
        for n, (why, indent, code) in enumerate(found, 1)
    ]


def run(code: list[Block], folder: Path) -> subprocess.CompletedProcess:
    environment = processes.environment()
    # Nor do the modules of the tests belong to what a README can import.
    path = [p for p in environment["PYTHONPATH"].split(os.pathsep) if Path(p).resolve() != ROOT / "tests"]
    return subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps([(block.number, block.code) for block in code]), cwd=folder,
        env=environment | {"PYTHONPATH": os.pathsep.join(path)}, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip


@pytest.mark.skipif(
    CACHE != "cache", reason="before transformers 5.24 `cache=` is past_key_values=, as the README says"
)
@pytest.mark.parametrize("name", [name for name, text in READMES.items() if blocks(text)])
def test_python_blocks_run_when_pasted(name, tmp_path, capsys):
    found = blocks(READMES[name])
    done = run([block for block in found if not block.not_run], tmp_path)
    times = re.findall(r"^block \d+ took .*$", done.stdout, re.MULTILINE)
    skipped = [f"block {block.number} not run: {block.not_run}" for block in found if block.not_run]
    with capsys.disabled():
        print(f"\n{name}: {', '.join([*times, *skipped])}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(times) + len(skipped) == len(found)


def test_a_block_that_fails_is_noticed(tmp_path):
    text = (
        "```python\na = 1\n```\n<!-- not run: needs a hub -->\n```python\nhub()\n```\n"
        "  ```python\n  assert a == 2\n  ```\n"
    )
    first, second, third = blocks(text)
    assert (first.not_run, second.not_run, third.not_run) == (None, "needs a hub", None)
    done = run([first, third], tmp_path)
    assert done.returncode != 0
    assert "block 1 took" in done.stdout and "block 3 took" not in done.stdout
    assert 'File "block 3", line 1' in done.stderr


def anchors(text: str) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)]+)\)", READMES[name]):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """The rows of the first table after a heading, by their first cell without marks."""
    lines = text.partition(f"{heading}\n")[2].partition("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    return {re.sub(r"[`*]", "", first): rest for first, *rest in cells[2:]}


def steps(*files: str) -> dict[tuple[str, int, int], dict]:
    """The rows of results of bench_generate.py by name, length and batch."""
    found = {}
    for file in files:
        result = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
        for row in result["steps"]:
            found[row["name"], row["length"], result["arguments"]["batch"]] = row
    return found


def milliseconds(row: dict) -> float:
    return row["ms"]["median"]


def test_every_file_of_the_package_is_named():
    table = READMES["hf_kvquant/README.md"].partition("## The files")[2]
    for file in [*(ROOT / "hf_kvquant").glob("[!_]*.py"), *(ROOT / "hf_kvquant" / "measure").glob("[!_]*.py")]:
        assert f"`{file.name}`" in table, file.name


class TestPresets:
    def test_the_table_says_what_the_results_say(self):
        accuracy = json.loads((RESULTS / "accuracy" / "stdlib-nano.json").read_text(encoding="utf-8"))["caches"]
        measured, table = steps("bench_generate"), rows(TOP, "## Choose a preset")
        assert set(table) == {
            *(f"kvquant-{name}" for name in KVQuantConfig.preset_names()), "dense DynamicCache", "dense StaticCache"
        }  # fmt: skip
        for name in KVQuantConfig.preset_names():
            bits, kl, ms, _ = table[f"kvquant-{name}"]
            assert float(bits) == pytest.approx(KVQuantConfig.preset(name).bits_per_element(128), abs=0.005), name
            assert kl == three_digits(1000 * accuracy[name]["kl"]["mean"]), name
            assert float(ms) == pytest.approx(milliseconds(measured[name, 8192, 1]), abs=0.051), name
        for name, key in (("dense DynamicCache", "dense"), ("dense StaticCache", "dense-static")):
            assert float(table[name][2]) == pytest.approx(milliseconds(measured[key, 8192, 1]), rel=0.005)

    def test_the_fields_of_their_configs(self):
        table = rows(READMES["configs/README.md"], "# Presets and configs")
        assert set(table) == set(KVQuantConfig.preset_names())
        for name, (keys, values, bits, exact) in table.items():
            config = KVQuantConfig.preset(name)
            for cell, spec in ((keys, config.keys), (keys if values == "the same" else values, config.values)):
                assert cell.startswith(spec.format) and f"{spec.grid} grid" in cell, (name, cell)
                assert ("rotated" in cell) == spec.rotate, (name, cell)
            assert float(bits) == pytest.approx(config.bits_per_element(128), abs=0.005)
            assert ("open block" in exact) == config.keys.is_channel
            assert re.findall(r"\d+", exact) == [str(n) for n in (config.sink_length, config.recent_length) if n]


class TestSpeed:
    text = READMES["eval/results/README.md"]

    def test_whole_steps(self):
        measured = steps("bench_generate")
        names = {
            "DynamicCache": ["dense"], "StaticCache": ["dense-static"],
            "quanto-int4 / hqq-int4": ["quanto-int4", "hqq-int4"],
            "hqq-int8 / transformers-fp8": ["hqq-int8", "transformers-fp8"],
            "kvquant-int8": ["int8"], "kvquant-int8-plain / kvquant-fp8": ["int8-plain", "fp8"],
            "kvquant-int4": ["int4"], "kvquant-int4-small": ["int4-small"],
            "kvquant-int3 / kvquant-int2": ["int3", "int2"],
        }  # fmt: skip
        table = rows(self.text, "## A whole decode step")
        assert set(table) == set(names)
        for name, (ms, faster, share) in table.items():
            found = [measured[each, 8192, 1] for each in names[name]]
            for cell, row in zip(re.findall(r"[\d.]+", ms), found, strict=True):
                assert float(cell) == pytest.approx(milliseconds(row), rel=0.005, abs=0.051), name
            for cell, row in zip(re.findall(r"[\d.]+", faster), found, strict=True):
                assert float(cell) == pytest.approx(row["faster_than_dense"], rel=0.03), name
            for cell, row in zip(re.findall(r"[\d.]+", share), found):
                assert float(cell) == pytest.approx(row["share_of_dense_bytes"], rel=0.02), name

    def test_short_steps(self):
        text = " ".join(self.text.partition("\nWhere little is cached")[2].partition("\n#")[0].split())
        measured = [
            milliseconds(steps(name)[cache, 128, 1])
            for name in ("bench_short", "bench_short_in_a_row")
            for cache in ("int8", "int4", "dense-static")
        ]
        assert list(map(float, re.findall(r"\d\.\d\d", text))) == pytest.approx(measured, abs=0.0051)
        command = json.loads((RESULTS / "bench_short.json").read_text(encoding="utf-8"))["command"]
        assert f"`{command}`" in text

    def test_compiled_steps(self):
        measured = steps("bench_compiled", "bench_compiled_32k", "bench_compiled_batch8")
        columns = [(128, 1), (512, 1), (1024, 1), (8192, 1), (32768, 1), (128, 8), (1024, 8), (8192, 8)]
        names = {
            "DynamicCache": "dense", "StaticCache": "dense-static", "StaticCache, compiled": "dense-static-compiled",
            "kvquant-int8": "int8", "kvquant-int8-static": "int8-static",
            "kvquant-int8-static, compiled": "int8-static-compiled",
            "kvquant-int4-static, compiled": "int4-static-compiled",
        }  # fmt: skip
        table = rows(self.text, "## Compiled decode steps")
        assert set(table) == set(names)
        for name, cells in table.items():
            for cell, column in zip(cells, columns, strict=True):
                shown = float(cell.replace(",", ""))
                assert shown == pytest.approx(milliseconds(measured[(names[name], *column)]), rel=0.005, abs=0.051), (
                    name
                )

    @pytest.mark.parametrize(
        ("title", "name"),
        [("Continuous batching", "bench_serving"), ("Continuous batching with windows", "bench_serving_window")],
    )
    def test_continuous_batching(self, title, name):
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        measured = {row["name"]: row for row in result["rows"]}
        assert f"`{result['command']}`" in " ".join(self.text.split())
        table = rows(self.text, f"## {title}")
        assert set(table) == {name if name == "dense" else f"kvquant-{name}" for name in measured}
        for name, cells in table.items():
            row = measured[name.removeprefix("kvquant-")]
            faster = row["tokens_per_s"] / measured["dense"]["tokens_per_s"]
            first, token = row["first_token_s"]["median"], row["token_s"]["median"] * 1e3
            expected = (row["held_at_once"], row["tokens_per_s"], faster, first, token)
            for cell, figure in zip(cells, expected, strict=True):
                assert float(cell) == pytest.approx(figure, abs=0.051 if "." in cell else 0.51), (name, cell)

    def test_continuous_batching_of_long_prompts(self):
        result = json.loads((RESULTS / "bench_serving_long.json").read_text(encoding="utf-8"))
        text = " ".join(self.text.split())
        assert f"`{result['command']}`" in text
        dense, *ours = (row["tokens_per_s"] for row in result["rows"])
        said = re.search(r"give ([\d.]+) times \(int8\) and ([\d.]+) times \(int4\)", text).groups()
        assert [float(x) for x in said] == pytest.approx([x / dense for x in ours], abs=0.051)

    def test_a_padded_batch(self):
        result = json.loads((RESULTS / "bench_padded.json").read_text(encoding="utf-8"))
        assert f"`{result['command']}`" in " ".join(self.text.split())
        table = rows(self.text, "## A padded batch")
        dense = result["batches"][0]["tokens_per_s"]
        for cells, row in zip(table.values(), result["batches"], strict=True):
            assert cells == [
                str(row["rows"]),
                f"{row['tokens_per_s']:.0f}",
                f"{row['tokens_per_s'] / dense:.1f}",
                f"{row['first_token_s']:.1f}",
                f"{row['step_s'] * 1e3:.0f}",
            ]

    def test_a_stream_of_requests(self):
        result = json.loads((RESULTS / "bench_serving_stream.json").read_text(encoding="utf-8"))
        assert f"`{result['command']}`" in " ".join(self.text.split())
        table = rows(self.text, "## A stream of requests")
        assert [name.removeprefix("kvquant-") for name in table] == [row["name"] for row in result["rows"]]
        for cells, row in zip(table.values(), result["rows"], strict=True):
            first, token = row["first_token_s"], row["token_s"]
            assert cells == [
                str(row["held_at_once"]),
                f"{row['tokens_per_s']:.0f}",
                f"{first['median']:.2f}, {first['p99']:.2f}",
                f"{token['median'] * 1e3:.0f}, {token['p99'] * 1e3:.0f}",
                f"{row['peak_mb']:.0f}",
                f"{row['shared_tokens'] / row['prompt_tokens']:.0%}".replace("%", " %"),
            ]

    def test_what_the_processor_allows(self):
        def numbers(text):
            return [float(x.replace(",", "")) for x in re.findall(r"\d[\d.,]*", text)]

        heading = "### What the processor allows"
        section = self.text.partition(f"{heading}\n")[2].partition("\n## ")[0]
        ghz, lengths = float(re.search(r"([\d.]+) GHz", section)[1]), (16384, 65536)
        lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| AVX")]
        assert len(lines) == 6
        for level, name, products, _, call, bound, ratio, *goal in lines:
            file = {"AVX2": "bench_decode_avx2_zen4_1thread", "AVX-512": "bench_decode_zen4_1thread"}[level]
            result = json.loads((RESULTS / f"{file}.json").read_text("utf-8"))
            ms = {(row["name"], row["length"]): row["ms"]["median"] for row in result["decode"]}
            tile = result["arguments"]["kv_heads"] / 64
            ours, sdpa = ([ms[each, n] * ghz * 1e6 / (n * tile) for n in lengths] for each in (name, "sdpa-bfloat16"))
            assert result["machine"]["threads"] == 1
            assert numbers(call) == pytest.approx(ours, abs=5.1)
            assert numbers(bound) == [round(x / numbers(products)[0], 1) for x in sdpa]
            assert numbers(ratio) == [round(x / y, 2) for x, y in zip(sdpa, ours)]
            for text in goal:
                goals, cycles = map(numbers, text.split(":"))
                assert cycles == pytest.approx([x / y for x, y in zip(sdpa, goals * (3 - len(goals)))], abs=5.1)

    def test_the_field(self):
        files = ("bench_cpu_field", "bench_cpu_field_batch8", "bench_cpu_field_1thread")
        *two, one = [json.loads((RESULTS / f"{file}.json").read_text("utf-8")) for file in files]
        text = " ".join(self.text.partition("\n### ")[0].split())
        assert f"`{two[0]['command']}`" in text
        assert [result["arguments"]["threads"] for result in (*two, one)] == [2, 2, 1]
        found = {(r["name"], r["batch"], r["length"]): r for result in two for r in result["field"] if "ms" in r}
        columns = [(1, 1024), (1, 8192), (1, 32768), (1, 65536), (8, 1024), (8, 8192)]
        self.check_field(rows(self.text.partition("\n### ")[0], "## Beside other packages"), found, columns)
        for ours in ("int8", "int4"):
            said = re.findall(rf"([\d.]+) to ([\d.]+) times as long as `{ours}`", text)
            for ends, results in zip(said, (two, [one]), strict=True):
                times = self.times_as_long([r for result in results for r in result["field"] if "ms" in r], ours)
                assert [float(x) for x in ends] == pytest.approx([min(times), max(times)], abs=0.051)

    def test_the_field_on_a_zen_4(self):
        result = json.loads((RESULTS / "bench_cpu_field_zen4_1thread.json").read_text("utf-8"))
        heading = "### Beside them on a Zen 4"
        section = self.text.partition(f"{heading}\n")[2].partition("\n## ")[0]
        text = " ".join(section.split())
        assert f"`{result['command']}`" in text and result["arguments"]["threads"] == 1
        other = json.loads((RESULTS / "bench_cpu_field_zen4.json").read_text("utf-8"))
        assert (other["arguments"]["threads"], other["arguments"]["rounds"]) == (2, 25)
        field, two = ([row for row in each["field"] if "ms" in row] for each in (result, other))
        found = {(row["name"], row["batch"], row["length"]): row for row in field}
        self.check_field(rows(f"{heading}\n{section}", heading), found, [(1, 8192), (1, 32768)])
        for ours in ("int8", "int4"):
            said = re.findall(rf"([\d.]+) and ([\d.]+) times as long as `{ours}`", text)
            for ends, rows_of_run in zip(said, (field, two), strict=True):
                times = sorted(self.times_as_long(rows_of_run, ours))
                assert sorted(map(float, ends)) == pytest.approx(times, abs=0.051)

    @staticmethod
    def check_field(table: dict[str, list[str]], found: dict, columns: list[tuple[int, int]]) -> None:
        names = {"torch SDPA, BF16": "sdpa-bfloat16"}
        names |= {name: name.lower().replace("kvquant-", "").replace(" ", "-") for name in table if name not in names}
        assert set(names.values()) == {name for name, *_ in found}
        for name, (bits, *cells) in table.items():
            measured = [found[(names[name], *column)] for column in columns]
            assert float(bits) == pytest.approx(found[names[name], 1, 8192]["bits_per_element"], abs=0.0051)
            for cell, row in zip(cells, measured, strict=True):
                assert float(cell) == pytest.approx(milliseconds(row), abs=0.51 * 10 ** -len(cell.partition(".")[2]))

    @staticmethod
    def times_as_long(field: list[dict], ours: str) -> list[float]:
        """How many times as long as ours the fastest package takes, for each batch and length from 8,192 tokens on."""
        times = []
        for row in field:
            if row["name"] == ours and row["length"] >= 8192:
                shape = (row["batch"], row["length"])
                peers = [r for r in field if r["kind"] == "peer" and (r["batch"], r["length"]) == shape]
                times.append(min(map(milliseconds, peers)) / milliseconds(row))
        return times

    def test_the_operator(self):
        result = json.loads((RESULTS / "bench_decode.json").read_text(encoding="utf-8"))
        ms = {(row["kv_heads"], row["length"], row["name"]): milliseconds(row) for row in result["decode"]}
        presets = result["arguments"]["presets"] if "presets" in result["arguments"] else list(result["configs"])
        table = rows(self.text, "## The operator alone")
        for where, *key in (
            ("1,024", 8, 1024), ("4,096", 8, 4096), ("16,384", 8, 16384), ("65,536", 8, 65536),
            ("16,384, 32 KV heads (MHA)", 32, 16384),
        ):  # fmt: skip
            for cell, preset in zip(table[where], presets, strict=True):
                assert float(cell) == pytest.approx(ms[(*key, "sdpa-bfloat16")] / ms[(*key, preset)], abs=0.051), where

    def test_errors(self):
        result = json.loads((RESULTS / "bench_error.json").read_text(encoding="utf-8"))
        lines = [line for line in self.text.partition("## Errors")[2].splitlines() if line.startswith("| ")][1:]
        shown = {}
        for line in lines:
            name, dtype, scalar, best, largest, _ = (cell.strip() for cell in line.strip("|").split("|"))
            shown[name, dtype] = scalar, best, largest
        levels = result["arguments"]["levels"]
        found = {}
        for row in result["rows"]:
            found.setdefault((row["name"], row["dtype"]), {})[row["level"]] = row
        assert set(shown) == set(found)
        for key, (scalar, best, largest) in shown.items():
            by_level = found[key]
            for cell, level in ((scalar, levels[0]), (best, levels[-1])):
                row = by_level.get(level, by_level.get(None))
                if cell:
                    assert float(cell) == pytest.approx(row["rms"], rel=0.05), key
            assert float(largest) == pytest.approx(max(row["largest"] for row in by_level.values()), rel=0.05), key
