"""The report: the content of the page, which needs no other files, and which a browser shows without errors."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_kvquant.measure import BLIND, Settings, compare, presets
from hf_kvquant.measure.report import PAGE, plots, style, write
from hf_kvquant.measure.tables import rows

TASKS = [{"model": "nano", "cache": "int4", "task": "mmlu", "metric": "acc", "value": 0.25, "se": 0.02,
          "cache_read_share": 0.0}]  # fmt: skip
# A phone in portrait, in CSS pixels.
PHONE, DESKTOP = 360, 1200


@pytest.fixture(scope="module")
def results() -> list[dict]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    documents = torch.randint(97, (2, 90))
    methods = presets(["fp16", "int8", "int8-plain", "fp8", "int4", "int4-small"])
    found = []
    for name in ("a-small/model", "another <b>model</b>"):
        facts = {
            "model": name,
            "text": "noise & more",
            "versions": {"torch": torch.__version__},
            "machine": {"cpu": "x"},
        }
        found.append(compare(model, documents, methods, Settings(40, greedy_tokens=8), facts, progress=False))
    # Draw a line like a peer's, without its package.
    found[0]["caches"]["quanto-int4"] = {**found[0]["caches"]["int4-small"], "kind": "peer"}
    found[0]["skipped"] = {"hqq-int4": "ImportError: not here"}
    return found


@pytest.fixture(scope="module")
def folder(results, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    assert write(results, TASKS, folder) == folder / PAGE
    return folder


@pytest.fixture(scope="module")
def page(folder) -> str:
    return (folder / PAGE).read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Tags with attributes, and the text outside of `style`."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text, self._open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self._open:
            self.text.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


class TestPage:
    def test_it_needs_nothing_else(self, page):
        elements = Elements(page)
        assert not elements.all("script") and not elements.all("img")
        targets = [a[name] for _, a in elements.tags for name in ("src", "href", "xlink:href") if name in a]
        assert targets
        assert not [target for target in targets if not target.startswith(("#", "data:"))]
        assert "@import" not in page and not re.search(r"url\((?!#|['\"]?data:)", page)

    def test_ids_are_unique_and_links_lead_somewhere(self, page):
        elements = Elements(page)
        ids = [a["id"] for tag, a in elements.tags if "id" in a and tag not in ("path", "g", "use", "defs")]
        assert len(ids) == len(set(ids))
        everything = {a["id"] for _, a in elements.tags if "id" in a}
        assert {a["href"][1:] for a in elements.all("a")} <= everything
        clips = set(re.findall(r"url\(#([^)]+)\)", page))
        assert clips <= everything

    def test_every_figure_of_the_table_is_there(self, page, results):
        text = "".join(Elements(page).text)
        for result in results:
            assert result["plan"]["model"] in text
            for cells in rows(result).values():
                for cell in cells:
                    assert cell in text
        assert "hqq-int4 was left out: ImportError: not here" in text
        assert text.count(BLIND) == 1

    def test_the_columns_are_explained_before_the_first_table(self, page):
        assert 0 < page.index("<h2>The columns</h2>") < page.index("<table>")

    def test_every_table_says_that_it_scrolls_where_that_can_be_needed(self, page):
        hints = re.findall(r'<p class="swipe">[^<]+</p>\s*<div class="scroll"', page)
        assert len(hints) == page.count("<table")
        # Hidden, but shown in the same media query as the narrow plots.
        assert re.search(r"\.swipe \{ display: none; \}\s", page.replace(".narrow, ", ""))
        phone = page[page.index("@media (max-width: 40rem)") :].partition("details")[0]
        assert re.search(r"\.swipe \{ display: block; \}", phone)

    def test_text_is_escaped(self, page):
        assert "<b>model</b>" not in page
        assert html.escape("another <b>model</b>") in page

    def test_resolved_settings_versions_and_machine(self, page, results):
        text = "".join(Elements(page).text)
        for cache in results[0]["caches"].values():
            assert json.dumps(cache["settings"], indent=1) in text
        assert results[0]["plan"]["documents_sha256"] in text
        assert torch.__version__ in text

    def test_plots_are_there_for_wide_and_narrow_and_take_the_pages_colours(self, page, results):
        svgs = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
        assert len(svgs) == 2 * len(plots.PLOTS) * len(results)
        for svg in svgs:
            assert "var(--ink)" in svg and "var(--grid)" in svg
            assert not re.search(r"#0102\d\d", svg)
            assert not re.search(r"^<svg[^>]* width=", svg)

    def test_plots_as_png(self, folder, results):
        for result in results:
            for plot in plots.PLOTS:
                image = matplotlib.image.imread(
                    folder / f"{result['plan']['model'].replace('/', '--')}-{plot.name}.png"
                )
                assert image.shape[1] > 1000
                assert image[..., :3].std() > 0.05

    @pytest.mark.filterwarnings("error")
    def test_nothing_to_draw_is_no_error(self, results, tmp_path):
        """A run of the dense cache alone has a report, too."""
        alone = {**results[0], "caches": {"dense": results[0]["caches"]["dense"]}}
        assert "<svg" in write([alone], [], tmp_path).read_text(encoding="utf-8")

    def test_tasks_alone_make_a_page(self, tmp_path):
        text = "".join(Elements(write([], TASKS, tmp_path).read_text(encoding="utf-8")).text)
        assert "mmlu" in text and BLIND in text


class TestPlots:
    @pytest.mark.parametrize("width", [style.WIDE, style.NARROW])
    def test_labels_do_not_cover_each_other(self, results, width):
        figure = plots.pareto(results[0], style.PRINT, width)
        figure.draw_without_rendering()
        renderer = figure.canvas.get_renderer()
        labels = [text for text in figure.axes[0].texts if text.get_text()]
        assert {label.get_text() for label in labels} == set(results[0]["caches"]) - {"dense"}
        boxes = [label.get_window_extent(renderer) for label in labels]
        for i, box in enumerate(boxes):
            # `savefig` may move labels by a pixel.
            assert not box.padded(-1).count_overlaps([b.padded(-1) for b in boxes[:i]])

    def test_frontier(self):
        steps = plots._frontier([(1.0, 5.0), (2.0, 7.0), (3.0, 1.0)])
        assert steps == [[(1.0, 5.0), (3.0, 5.0)], [(3.0, 5.0), (3.0, 1.0)]]

    def test_curves_are_those_of_the_result(self, results):
        figure = plots.by_position(results[0], style.PRINT, style.WIDE)
        lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
        for name, cache in results[0]["caches"].items():
            if name != "dense":
                assert list(lines[name]) == [1000 * y for y in cache["by_position"]["kl"]]
        figure = plots.by_layer(results[0], style.PRINT, style.WIDE)
        lines = {line.get_label(): line.get_ydata() for line in figure.axes[1].lines}
        assert list(lines["int8"]) == [100 * y for y in results[0]["caches"]["int8"]["layer_errors"]["values"]]


# ---- in a browser --------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Measures a page in a frame, and writes the results into its own body; frames may be narrower than a window.
MEASURE = """<!doctype html><body>
<iframe style="width:{width}px;height:800px;border:0" srcdoc="{page}"></iframe>
<script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const shown = (kind) => [...page.querySelectorAll(kind)].filter((e) => e.getClientRects().length).length;
  const ink = page.querySelector("svg text");
  document.body.innerHTML = "<pre>" + JSON.stringify({{
    width: root.clientWidth, content: root.scrollWidth, wide: shown(".wide"), narrow: shown(".narrow"),
    paper: getComputedStyle(page.body).backgroundColor, text: getComputedStyle(page.body).color,
    label: ink && getComputedStyle(ink).fill,
  }}) + "</pre>";
}};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (apt-get install chromium), which is not installed")
class TestBrowser:
    def visit(self, file: Path, *options: str) -> tuple[str, list[str]]:
        """The page after its scripts have run, and the messages of the console."""
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *options]
        command += [
            f"--user-data-dir={file.parent / 'profile'}",
            "--virtual-time-budget=3000",
            "--dump-dom",
            file.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "LANG": "C"})
        assert done.returncode == 0, done.stderr
        return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE:" in line]

    def measure(self, page: str, width: int, folder: Path, *options: str) -> dict:
        file = folder / f"frame-{width}.html"
        file.write_text(MEASURE.format(width=width, page=html.escape(page)), encoding="utf-8")
        shown, console = self.visit(file, *options)
        assert console == []
        return json.loads(html.unescape(re.search(r"<pre>(.*)</pre>", shown)[1]))

    def test_it_renders_without_a_word_on_the_console(self, folder):
        shown, console = self.visit(folder / PAGE)
        assert "</svg>" in shown
        assert console == []

    def test_the_console_is_heard(self, tmp_path):
        """An error on a page reaches the console, so the test above would notice it."""
        file = tmp_path / "bad.html"
        file.write_text('<meta http-equiv="Content-Security-Policy" content="img-src \'none\'">'
                        '<img src="x.png"><script>console.error("boom")</script>', encoding="utf-8")  # fmt: skip
        console = " ".join(self.visit(file)[1])
        assert "boom" in console and "Content Security Policy" in console

    @pytest.mark.parametrize(("width", "kind"), [(PHONE, "narrow"), (DESKTOP, "wide")], ids=["phone", "desktop"])
    def test_nothing_is_wider_than_the_screen(self, page, tmp_path, results, width, kind):
        seen = self.measure(page, width, tmp_path)
        assert seen["width"] <= width
        assert seen["content"] == seen["width"]
        assert seen[kind] == len(plots.PLOTS) * len(results)
        assert seen["wide"] + seen["narrow"] == seen[kind]

    def test_light_and_dark(self, page, tmp_path):
        light = self.measure(page, DESKTOP, tmp_path, "--blink-settings=preferredColorScheme=1")
        dark = self.measure(page, DESKTOP, tmp_path, "--blink-settings=preferredColorScheme=0")
        for seen in (light, dark):
            # Labels of plots have the page's own ink, which contrasts with its paper.
            assert seen["label"] in (seen["text"], MUTED[seen is dark])
            assert abs(_brightness(seen["text"]) - _brightness(seen["paper"])) > 150
        assert _brightness(light["paper"]) > 200 > 100 > _brightness(dark["paper"])


MUTED = ("rgb(91, 100, 112)", "rgb(163, 172, 184)")


def _brightness(color: str) -> float:
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 3
