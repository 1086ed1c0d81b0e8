"""report.html: well formed, loads nothing, says the numbers, and takes any text for text."""

from __future__ import annotations

import json
import random
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import families
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nursery import Nursery

import jobs
from kompressor_worker.report_html import render
from kompressor_worker.report_plots import columns, heat, percent

VOID = {"meta", "br", "hr", "img", "input", "link"}
ALONE = {"rect", "line", "circle", "path"}
"""SVG elements that close themselves."""


class Page(HTMLParser):
    """Checks that every element is closed in order; collects text and attributes."""

    def __init__(self, page: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(page.decode())
        self.close()
        assert self.open == [], "not closed"
        self.text = "".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def report(layers: int = 4, experts: int = 0, word: str = "model") -> dict[str, Any]:
    chance = random.Random(0)
    kinds = [f"mlp.experts.{e}.down_proj" for e in range(experts)] or ["self_attn.q_proj", "mlp.down_proj"]
    linears = {f"{word}.layers.{i}.{kind}": 0.05 + 0.05 * chance.random() for i in range(layers) for kind in kinds}
    linears[f"{word}.layers.0.{kinds[0]}"] = 0.3456
    sites = {f"{word}.layers.{i}.mlp.down": {"distance": 0.01 * i, "outside": 1e-7, "largest": 1.5} for i in range(layers)}
    return {
        "kompressor": "9.8.7",
        "versions": {"torch": "2.9.1"},
        "job": {"name": word, "passes": [{"gptq": {"scheme": "W4A16", "groupSize": 128}}, {"kvCache": {}}], "format": "compressed-tensors"},
        "fingerprint": {"passes": "sha256:1234"},
        "source": {"uri": f"s3://bucket/{word}", "digest": "sha256:5678", "tensorBytes": 16_060_000_000},
        "result": {"tensorBytes": 5_730_000_000, "digest": "xxh3-128:9abc", "relativeError": 0.0973, "quantizedLinears": len(linears)},
        "warnings": [f"a warning of {word}"],
        "linears": {name: {"scheme": "W4A16", "shape": [8, 16], "groupSize": 128, "relativeError": x} for name, x in linears.items()},
        "evaluation": {
            "rows": 64, "tokens": 130944, "kl": 0.021345, "perplexityBefore": 6.13721, "perplexityAfter": 6.29134,
            "perplexityIncrease": 0.025114, "topOneAgreement": 0.93412,
        },
        "gates": [{"metric": "kl", "value": 0.021345, "limit": 0.02, "met": False, "says": f"{word} is at 0.021345, allowed are 0.02"}],
        "drift": {
            "threshold": 0.015, "sites": sites, "blocks": {f"{word}.layers.{i}": 0.01 * i for i in range(layers)},
            "drifting": [f"{word}.layers.{i}.mlp.down" for i in range(2, layers)],
        },
        "data": {"calibration": {"uri": f"s3:{word}", "samples": 512, "sequenceLength": 2048, "tokens": 1048576, "digest": "sha256:77d1"}},
        "blocks": [
            {
                "name": f"{word}.layers.{i}", "outputError": 0.01 * (i + 1), "expertTokens": list(range(experts)),
                "notes": {f"{word}.layers.{i}.mlp.down": {"gptq": {"dampening": 0.01, "why": word}}},
            }
            for i in range(layers)
        ],
        "units": [{"name": f"{word}.layers.{i}", "seconds": 19.5 + i, "peakBytes": 5_100_000_000} for i in range(layers)],
    }  # fmt: skip


def fewer_experts(experts: int) -> dict[str, Any]:
    """The section on a result with half of them: what pruning chose in one block, and merging in another."""
    chance = random.Random(1)
    scores, tokens = [chance.random() for _ in range(experts)], [chance.randrange(99) for _ in range(experts)]
    gone = sorted(range(experts), key=lambda n: scores[n])[: experts // 2]
    few = [n for n in range(experts) if tokens[n] < 32]
    pruned = {"importance": "reap", "minTokens": 32, "layers": {"3": {"gone": gone, "scores": scores, "tokens": tokens, "few": few}}}
    merged = {"layers": {"4": {"merged": [[2, 0], [1, 3]], "tokens": tokens}}}
    sizes = {"num_local_experts": [experts, experts // 2]}
    return {"sizes": sizes, "parameters": [10**9, 6 * 10**8], "passes": {"pruneExperts": pruned, "mergeExperts": merged}}


FORMS = {
    "none": report(0),
    "one": report(1),
    "many": report(80),
    "experts": report(6, 64),
    "fewer": {**report(6, 64), "structure": fewer_experts(64)},
    "nothing": {},
}


@pytest.mark.parametrize("form", FORMS)
def test_well_formed_and_alone(form: str) -> None:
    page = render(FORMS[form])
    found = Page(page)
    assert not {"script", "link", "iframe", "img", "image", "use", "object", "embed", "base"} & set(found.tags)
    assert not [
        a for a in found.attributes if a[0] in ("src", "href", "xlink:href", "srcset", "action", "background") or a[0].startswith("on")
    ]
    assert "url(" not in page.decode() and "@import" not in page.decode() and "http" not in page.decode()
    for name, value in found.attributes:
        assert "nan" not in value.lower() and "inf" not in value.lower(), (name, value)
    assert render(FORMS[form]) == page


def test_says_the_numbers() -> None:
    text = Page(render(report(4))).text
    for number in (
        "2.80×", "16.1 GB", "5.73 GB", "35.7 %", "6.291", "before 6.137, +2.51 %", "0.0213", "93.4 %", "130,944 tokens", "9.73 %",
        "34.6 %", "1 of 1 gates not met", "allowed are 0.02", "2 of 4 inputs drift", "threshold 0.015", "< 0.001 %",
        "1 min 24 s in all", "gptq → kvCache", "groupSize: 128", "512 × 2,048", "1,048,576", "dampening 0.01",
        "sha256:77d1", "sha256:5678", "sha256:1234", "xxh3-128:9abc", "9.8.7", "2.9.1",
    ):  # fmt: skip
        assert number in text, number


def test_columns_are_as_high_as_their_values() -> None:
    """Read from the SVG: heights in proportion, what is over the limit marked, the limit's line where it belongs."""
    plot = columns([("b.0", 0.02), ("b.1", 0.08), ("b.2", 0.04)], percent, limit=0.06, over=["b.1"], height=200)
    heights = [float(h) for h in re.findall(r'<rect class="mark[^>]*? height="([\d.]+)"', plot)]
    assert heights[1] / heights[0] == pytest.approx(4, rel=0.01) and heights[2] / heights[0] == pytest.approx(2, rel=0.01)
    assert re.findall(r'<rect class="mark (\w*)', plot) == ["", "bad", ""]
    (y,) = re.findall(r'class="limit-line"[^>]* y1="([\d.]+)"', plot)
    assert (200 - float(y)) / heights[1] == pytest.approx(0.75, rel=0.01)
    assert columns([("a", float("nan"))], percent) == columns([], percent) == ""


def test_the_darkest_cell_is_the_largest_error() -> None:
    plot = heat({("q", "0"): (0.1, "q0"), ("q", "1"): (0.3, "q1"), ("o", "1"): (0.2, "o1")}, ["q", "o"], ["0", "1"], percent)
    strength = {unescape(t): float(o) for o, t in re.findall(r'fill-opacity="([\d.]+)"><title>(\w+)', plot)}
    assert strength["q0"] < strength["o1"] < strength["q1"] == 1.0
    assert plot.count('class="none"') == 1, "o of block 0 is not there"


def test_experts_that_went_are_framed() -> None:
    """And those that got few tokens, and those that became one, are told by their numbers."""
    structure = fewer_experts(8)
    chosen = structure["passes"]["pruneExperts"]["layers"]["3"]
    page = render({**report(2, 8), "structure": structure})
    framed = re.findall(r'<rect class="cell framed"[^>]*><title>block 3, expert (\d+), (\d+) tokens', page.decode())
    assert framed == [(str(n), str(chosen["tokens"][n])) for n in sorted(chosen["gone"])]
    text, tokens = Page(page).text, chosen["tokens"]
    for said in (
        "Experts of a layer",
        f"{len(chosen['few'])}: {', '.join(map(str, chosen['few']))}",
        "2 clusters in 1 blocks",
        "1, 3",
        f"{tokens[2]}, {tokens[0]}",
    ):
        assert said in text, said


ODD = ["<script>alert(1)</script>", "\"><img src=x onerror='a()'>", "$title & ${body}", "\n", "\ud800"]


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_characters=".\0", exclude_categories=["Nd", "Cs"]), min_size=1, max_size=12) | st.sampled_from(ODD))
def test_any_text_is_text(word: str) -> None:
    plain = Page(render(report(2, word="x")))
    page = Page(render(report(2, word=word)))
    assert page.tags == plain.tags
    assert [name for name, _ in page.attributes] == [name for name, _ in plain.attributes]
    assert " ".join(f"a warning of {word}".encode(errors="replace").decode().split()) in " ".join(page.text.split())


def test_a_job_that_needs_no_data_publishes_one(nursery: Nursery, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = jobs.write(tmp_path / "job.json", jobs.manifest(families.tiny_model("llama").as_uri(), out.as_uri()))
    code, said = nursery.run(job)
    assert code == 0, said
    made = json.loads((out / "kompressor.json").read_text())
    page = (out / "report.html").read_bytes()
    assert "report.html" in made["files"] and "report.html" not in made["digests"] and "units" not in made
    assert percent(made["result"]["relativeError"]) in Page(page).text
    assert "Seconds" not in Page(page).text and render(made).count(b"<section") == page.count(b"<section")
