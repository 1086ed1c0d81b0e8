"""The pages in docs/ are complete, and what they name is there: reasons, files, links, make targets, values of the chart, rights."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import generate_docs
from kompressor_api.failures import ADVICE, FAILURES, KILLED
from kompressor_api.names import MUTABLE, UNCAUGHT_EXIT_CODES, ExitCode, Reason

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NAMES = ("install", "first-job", "gitops", "security", "failures", "runbook", "metrics")
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def commands(page: Path) -> list[str]:
    """The lines of a page's code blocks without a language; a backslash joins two."""
    blocks = re.findall(r"^ *```\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"(kubectl|helm|make|docker|curl|\.venv/\S+) ", line)]


def test_every_page_is_there_and_the_readme_leads_to_it() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in NAMES:
        assert (DOCS / f"{name}.md").exists(), name
        assert f"(docs/{name}.md)" in readme, f"README.md does not link to docs/{name}.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_failures_are_told_as_the_code_has_them() -> None:
    page = (DOCS / "failures.md").read_text()
    assert page == generate_docs.text(), "run `make docs`"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")]
    reasons = [row[0].strip("`") for row in rows if len(row) == 2 and row[0] != "reason"]
    assert sorted(reasons) == sorted(map(str, Reason)), "each reason once"
    assert dict.fromkeys(generate_docs.ALL_IS_WELL).keys() & ADVICE.keys() == set()
    codes = [int(code) for row in rows if len(row) == 5 for code in re.findall(r"\d+", row[1])]
    assert sorted(codes) == sorted({*map(int, ExitCode), *UNCAUGHT_EXIT_CODES, KILLED} - {0}), "each exit code once"
    assert [row[0] for row in rows if len(row) == 5][1:] == [failure.title for failure in FAILURES], "in the order of the Job's policy"


def test_reasons_in_other_pages_exist() -> None:
    for text in (page.read_text() for page in PAGES):
        for reason in re.findall(r"STATUS (?:is|goes from) (\w+)", text) + re.findall(r"event ([A-Z]\w+)", text):
            assert reason in set(Reason), reason


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_what_there_is(page: Path) -> None:
    values = yaml.safe_load((ROOT / "charts" / "kompressor" / "values.yaml").read_text())
    makefile = (ROOT / "Makefile").read_text()
    for line in commands(page):
        words = shlex.split(line.split("#")[0])
        for before, word in itertools.pairwise(words):
            if before == "-f" and word not in ("-", "-n"):
                assert (ROOT / word).exists(), f"{page.name}: {line}"
            if before == "make":
                assert re.search(rf"^{word}:", makefile, re.MULTILINE), f"{page.name}: {line}"
            if before == "--set":
                known(values, word.split("=")[0])
        for file in re.findall(r"--from-file=[^=\s]+=(\S+)", line):
            assert (ROOT / file).exists(), f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_values_in_tables_exist(page: Path) -> None:
    values = yaml.safe_load((ROOT / "charts" / "kompressor" / "values.yaml").read_text())
    if page.stem not in ("install", "security"):
        return
    for cell in re.findall(r"^\| ((?:`[a-z]\w*(?:\.\w+)+`(?:, )?)+) \|", page.read_text(), re.MULTILINE):
        for path in re.findall(r"`([^`]+)`", cell):
            known(values, path)


def known(values: dict[str, Any], path: str) -> None:
    found: Any = values
    for part in path.split("."):
        assert isinstance(found, dict) and part in found, f"the chart has no value {path}"
        found = found[part]


def test_rights_are_those_of_the_chart() -> None:
    """Resource by resource, verb by verb."""
    template = (ROOT / "charts" / "kompressor" / "templates" / "_rules.tpl").read_text()
    text = re.sub(r"#.*", "", re.sub(r"\{\{.*?\}\}", "", template, flags=re.DOTALL))
    granted: dict[str, set[str]] = {}
    for resources, verbs in re.findall(r"resources: \[([^]]*)\]\s*verbs: \[([^]]*)\]", text):
        for resource in resources.split(","):
            granted.setdefault(resource.strip(), set()).update(verb.strip() for verb in verbs.split(","))
    told: dict[str, set[str]] = {}
    for line in (DOCS / "security.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].startswith("`"):
            for resource in re.findall(r"`([^`]+)`", cells[0]):
                told[resource] = {verb.strip() for verb in cells[1].split(",")}
    assert told == granted


def test_what_may_change_is_told() -> None:
    fields = [f"`{name}`" for name in MUTABLE]
    words = f"{', '.join(fields[:-1])} and {fields[-1]}"
    for name in ("first-job", "gitops"):
        assert words in " ".join((DOCS / f"{name}.md").read_text().split()), name
