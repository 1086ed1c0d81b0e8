"""`make test`: every test file is run by it once, and a folder that fails is heard of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from run_tests import run_all, suites

TESTS = Path(__file__).parent


def test_every_file_is_run_once() -> None:
    given = [Path(path) for paths in suites(TESTS).values() for path in paths]
    ran = Counter(file for path in given for file in ([path] if path.is_file() else path.rglob("test_*.py")))
    assert ran == Counter(TESTS.rglob("test_*.py"))


def test_what_fails_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, body in {"good/test_a.py": "pass", "bad/test_b.py": "assert 'this' == 'that'", "test_c.py": "pass"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"def test_it():\n    {body}\n")
    assert run_all(suites(tmp_path), lanes=2) == {"good": 0, "bad": 1, "the rest": 0}
    said = capfd.readouterr().out
    assert "'this' == 'that'" in said and "-- bad: FAILED in" in said and "-- good: passed in" in said
