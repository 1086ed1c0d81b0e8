"""`make test`: every test file is run by it once, and a folder that fails is heard of."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from run_tests import run_all, suites

TESTS = Path(__file__).parent


def test_every_file_is_run_once() -> None:
    given = [Path(path) for paths in suites(TESTS).values() for path in paths]
    ran = Counter(file for path in given for file in ([path] if path.is_file() else path.rglob("test_*.py")))
    assert ran == Counter(TESTS.rglob("test_*.py"))


def test_what_fails_is_said_and_in_the_end_said_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = """import os
import pytest
@pytest.fixture
def gone():
    raise OSError("no such thing")
def test_it():
    assert 'this' == 'that'
def test_fixture(gone):
    pass
@pytest.mark.parametrize("n", [1, 2])
def test_many(n):
    assert n == 1, "first line\\nsecond line"
"""
    good, dies = "def test_it():\n    pass\n", "import os\ndef test_it():\n    os._exit(3)\n"
    for name, body in {"bad/test_b.py": broken, "dies/test_d.py": dies, "good/test_a.py": good, "test_c.py": good}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(body)
    assert run_all(suites(tmp_path), lanes=2) == {"bad": 1, "dies": 3, "good": 0, "the rest": 0}
    said = capfd.readouterr().out
    assert "-- bad: FAILED in" in said and "-- good: passed in" in said and "second line" in said
    again = sorted(line for line in said.splitlines()[-4:])
    assert [line.removeprefix("-- FAILED ").rpartition("/")[2] for line in again if "test_b" in line] == [
        'test_b.py::test_fixture: failed on setup with "OSError: no such thing"',
        "test_b.py::test_it: AssertionError: assert 'this' == 'that'",
        "test_b.py::test_many[2]: AssertionError: first line",
    ]
    assert all(line.startswith("-- FAILED ") for line in again) and "-- FAILED dies: pytest ended with exit code 3" in again


def test_the_largest_folder_is_split_and_the_cores_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for name in ("chaos/test_c.py", *(f"worker/test_{n}.py" for n in range(5))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"import os\ndef test_it():\n    assert os.environ['OMP_NUM_THREADS'] == '{threads}'\n")
    given = suites(tmp_path)
    assert list(given) == ["worker 1 of 3", "chaos", "worker 2 of 3", "worker 3 of 3"]
    assert [[Path(file).name for file in given[f"worker {n} of 3"]] for n in (1, 2)] == [
        ["test_0.py", "test_3.py"],
        ["test_1.py", "test_4.py"],
    ]
    assert set(run_all(given, lanes=2).values()) == {0}
