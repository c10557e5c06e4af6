"""The page, the table of figures and the pictures of layers say what the report says, and need nothing else."""

import csv
import io
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from types import ModuleType

import pytest
import torch
from helpers import tiny_model

import hf_compress as hfc
from hf_compress.report.harness import harness_scores
from hf_compress.report.headline import headline
from hf_compress.report.layers import Full, LayerFacts, by_layer, layer_facts, layers_svg
from hf_compress.report.report import Report
from hf_compress.report.result import Difference, Interval
from hf_compress.report.scatter import LEFT, RADIUS, WIDTH, beside, scatter_svg
from hf_compress.report.tables import rate_word

QUICK = dict(sequence_length=8, latency_rounds=2, throughput_rounds=2)


class Page(HTMLParser):
    """What a page shows, and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text, self.rows = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "data", "action")]
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        if data.strip():
            self.text.append(data.strip())
            if self.rows and self.tags[-1] in ("td", "th"):
                self.rows[-1].append(data.strip())


@pytest.fixture(scope="module")
def report():
    teacher = tiny_model("bert", num_labels=2)
    pruned = hfc.prune_neurons(hfc.prune_heads(tiny_model("bert", num_labels=2), {0: [0, 1]}), {1: range(24)})
    packed = hfc.quantize(pruned, bits=4)
    rows = [{"input_ids": [5 + i % 7, 6, 7], "attention_mask": [1, 1, 1], "label": i % 2} for i in range(20)]
    return hfc.compare({"teacher": teacher, "<packed>": packed}, eval_dataset=rows, command="hf-compress <x>", **QUICK)


def test_the_page_shows_every_figure_and_loads_nothing(report):
    page = Page(report.to_html())
    assert page.rows[0][:2] == ["model", "accuracy"] and page.rows[1][0] == "teacher" and page.rows[2][0] == "<packed>"
    assert "hf-compress <x>" in page.text, "names are text, not markup"
    assert all(link.startswith("data:image/png;base64,") for link in page.links) and len(page.links) == 1
    assert "script" not in page.tags and "link" not in page.tags and page.tags.count("svg") == 3
    assert 'name="viewport"' in report.to_html()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_the_page_without_a_network(report, tmp_path):
    """The browser writes what it shows; a script in this copy adds what it drew and whether a phone has to scroll."""
    look = """<script>addEventListener("load", () => {
        const tables = [...document.querySelectorAll("table")].map(table => table.parentElement.scrollWidth);
        document.title = JSON.stringify({image: document.images[0].naturalWidth, tables: tables.length,
            page: document.documentElement.scrollWidth, window: innerWidth});
    })</script></body>"""
    (tmp_path / "page.html").write_text(report.to_html().replace("</body>", look), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--dump-dom",
               "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path}",
               str(tmp_path / "page.html")]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    page = Page(shown)
    assert page.rows[1][0] == "teacher" and page.tags.count("svg") == 3
    seen = json.loads(shown.partition("<title>")[2].partition("</title>")[0])
    assert seen["image"] > 300 and seen["tables"] == 3 and seen["page"] <= seen["window"]


def test_everything_that_is_not_text_has_words_for_it(report):
    page = report.to_html()
    assert page.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert len(re.findall(r"<img alt=\"[^\"]{10,}\" src=", page)) == page.count("<img") == 1
    assert len(re.findall(r"<svg [^>]*role=\"img\"[^>]*aria-label=\"[^\"]{10,}\"", page)) == page.count("<svg") == 3
    assert page.count('<th scope="col">') == 6 + 7 + 2 and page.count("<h1>") == 1


def test_the_csv_holds_plain_numbers(report):
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    entry = report["<packed>"]
    assert [row["model"] for row in rows] == ["teacher", "<packed>"]
    assert float(rows[1]["byte_rate"]) == entry.byte_rate
    assert float(rows[1]["throughput_speed_up_low"]) == entry.throughput_speed_up.low
    assert rows[0]["p_value"] == "" and int(rows[1]["stored_bytes"]) == entry.measurement.stored_bytes


def test_a_report_comes_back_from_json(report):
    assert Report.from_json(report.to_json()) == report
    with pytest.raises(ValueError, match="This is no report"):
        Report.from_json('{"entries": [{}]}')


def test_save_writes_all_of_them(report, tmp_path):
    report.save(tmp_path)
    endings = {file.suffix for file in tmp_path.iterdir() if not file.name.startswith(".")}  # a manifest and a lock
    assert endings == {".json", ".md", ".csv", ".html", ".png"}


def test_facts_of_layers_are_those_of_the_weights(report):
    layers = report["<packed>"].layers
    assert [layer.heads for layer in layers] == [2, 4, 4, 4]
    assert [layer.neurons for layer in layers] == [48, 24, 48, 48]
    assert {layer.bits for layer in layers} == {4.0}
    model = tiny_model("bert")
    with torch.no_grad():
        for linear in (m for m in model.bert.encoder.layer[2].modules() if isinstance(m, torch.nn.Linear)):
            linear.weight.zero_()
    facts = layer_facts(model)
    assert facts[2].zeros == 1.0 and facts[1].zeros == 0.0 and facts[0].bits == 32.0


def test_a_block_sparse_layer_shows_what_is_stored():
    model = tiny_model("bert", hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        for linear in (m for m in model.bert.encoder.layer[0].modules() if isinstance(m, torch.nn.Linear)):
            linear.weight[:, 32:] = 0
    facts = layer_facts(hfc.to_block_sparse(model, 16))
    # two of four heads and 96 of 128 neurons were silent; q, k, v and the inputs of the neurons left, 32 x 64 each,
    # store half of their blocks, both outputs, 64 x 32 each, all
    assert (facts[0].heads, facts[0].neurons) == (2, 32)
    assert facts[0].stored_blocks == pytest.approx((4 * 1024 + 2 * 2048) / (6 * 2048))
    assert facts[1].stored_blocks == 1.0


def test_the_picture_draws_in_proportion():
    layers = [LayerFacts(4, 100, 32.0, 1.0, 0.0), LayerFacts(1, 50, 4.0, 0.25, 0.5)]
    tree = ElementTree.fromstring(layers_svg(layers, title="a & b", sensitivity=[1.0, 2.0]))
    space = "{http://www.w3.org/2000/svg}"
    bars = [float(bar.get("width")) for bar in tree.iter(f"{space}rect") if bar.get("fill") != "none"]
    full = max(bars)
    assert [round(bar / full, 3) for bar in bars] == [1, 1, 1, 1, 0, 0.5, 0.25, 0.5, 0.125, 0.25, 0.5, 1]
    assert tree.get("aria-label") == "a & b"
    with pytest.raises(ValueError, match="2 values, one a layer"):
        layers_svg(layers, title="x", sensitivity=[1.0])
    with pytest.raises(ValueError, match="nothing to draw"):
        layers_svg([], title="x")


def test_what_went_stands_in_outline_and_alike_layers_share_a_row():
    full = Full(layers=6, heads=12, neurons=1536, bits=32.0, tokens=30522)
    half = [LayerFacts(6, 768, 8.0, 1.0, 0.0)] * 2 + [LayerFacts(3, 768, 8.0, 1.0, 0.0)]
    text = layers_svg(half, title="half", full=full, tokens=9000, embedding_bits=8)
    tree = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    said = [one.text for one in tree.iter(f"{space}text")]
    assert [word for word in said if word.startswith(("layer", "tokens", "3 gone"))] == [
        "tokens", "layers 0-1", "layer 2", "3 gone"]  # fmt: skip
    bars = [one for one in tree.iter(f"{space}rect") if one.get("fill") != "none"]
    outlines = [one for one in tree.iter(f"{space}rect") if one.get("fill") == "none"]
    assert len(outlines) == len(bars) + 3, "layers that went: an outline of each figure, and no bar"
    widths = [float(bar.get("width")) / float(outlines[0].get("width")) for bar in bars]
    assert widths == pytest.approx([9000 / 30522, 0.25, 0.5, 0.5, 0.25, 0.25, 0.5, 0.25], abs=0.01)
    assert Full.of([half, [LayerFacts(4, 2000, 4.0, 1.0, 0.0)]]) == Full(3, 6, 2000, 8.0)


def test_the_headline_says_what_was_gained_and_lost(report):
    measured = replace(
        report["<packed>"], byte_rate=14.71, latency_speed_up=Interval(0.5, 0.4, 0.6),
        throughput_speed_up=Interval(22.04, 21, 23),
        difference=Difference(Interval(-0.002, -0.0144, 0.01), 0.8, "McNemar, exact"),
    )  # fmt: skip
    whole = replace(report, entries=(report["teacher"], measured), num_examples=1500)
    expected = "14.7x smaller, 2.0x slower for one text, 22.0x faster for 32, -0.2 points of accuracy (-1.4 to +1.0), "
    assert headline(whole) == f"{expected}1,500 examples"
    assert "<h1>14.7x smaller" in whole.to_html() and headline(whole, whole.entries[0]).startswith("teacher: what")
    for rate, words in ((1.0, "1.00x faster"), (0.999, "1.00x slower"), (130.4, "130x faster"), (1.06, "1.1x faster")):
        assert rate_word(rate, "faster", "slower") == words


def test_points_of_like_models_lie_beside_each_other():
    placed = []
    for x, y in ((50.0, 60.0), (50.0, 60.0), (52.0, 61.0), (200.0, 60.0)):
        placed.append(beside(placed, x, y))
    assert placed[0] == (50.0, 60.0) and placed[3] == (200.0, 60.0)  # what hides nothing stays
    assert [y for _, y in placed] == [60.0, 60.0, 61.0, 60.0]  # quality is never moved
    assert all(math.dist(a, b) >= 2 * RADIUS for a, b in itertools.combinations(placed, 2))
    edge = []
    for _ in range(5):  # of the largest size: none may leave the picture
        edge.append(beside(edge, 312.0, 60.0))
    assert all(LEFT <= x <= WIDTH - RADIUS for x, _ in edge)
    assert all(math.dist(a, b) >= 2 * RADIUS for a, b in itertools.combinations(edge, 2))


def test_points_of_the_scatter_lie_where_the_figures_are(report):
    tree = ElementTree.fromstring(scatter_svg(report))
    space = "{http://www.w3.org/2000/svg}"
    points = [(float(one.get("cx")), float(one.get("cy"))) for one in tree.iter(f"{space}circle")][::2]
    teacher, packed = report.entries
    ratio = (points[1][0] - LEFT) / (points[0][0] - LEFT)
    assert ratio == pytest.approx(packed.measurement.stored_bytes / teacher.measurement.stored_bytes, abs=0.01)
    assert (points[0][1] <= points[1][1]) == (teacher.quality >= packed.quality), "better is higher"
    with pytest.raises(ValueError, match="no quality to draw"):
        scatter_svg(replace(report, num_examples=0))


def test_sensitivities_are_averaged_by_layer():
    model = tiny_model("bert")
    values = {"bert.encoder.layer.1.output.dense": 2.0, "bert.encoder.layer.1.intermediate.dense": 4.0}
    assert by_layer(model, values) == [0.0, 3.0, 0.0, 0.0]


def test_tasks_of_the_harness_stand_beside_the_rest(report, monkeypatch):
    results = {"made_up": {"acc,none": 0.5, "acc_stderr,none": 0.01, "alias": "made_up"}}
    harness = ModuleType("lm_eval")
    harness.simple_evaluate = lambda model, tasks, limit: {"results": {task: results[task] for task in tasks}}
    huggingface = ModuleType("lm_eval.models.huggingface")
    huggingface.HFLM = lambda pretrained, tokenizer, batch_size: pretrained
    for name, module in {
        "lm_eval": harness,
        "lm_eval.models": ModuleType("m"),
        huggingface.__name__: huggingface,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    scores = harness_scores(None, None, ["made_up"])
    assert scores == {"made_up": {"acc": 0.5, "acc_stderr": 0.01}}
    whole = replace(report, tasks={"teacher": scores})
    assert "| teacher | 0.5000 ± 0.0100 |" in whole.to_markdown() and "made_up, acc" in whole.to_html()
    assert Report.from_json(whole.to_json()) == whole
    millions = whole["teacher"].measurement.parameters / 1e6
    assert whole.score_over_size(whole["teacher"]) == pytest.approx(50 / millions)
    assert report.score_over_size(report["teacher"]) == pytest.approx(100 * report["teacher"].quality / millions)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match="pip install lm_eval"):
        harness_scores(None, None, ["made_up"])
