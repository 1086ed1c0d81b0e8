"""All tests: each folder of tests/ in a pytest of its own, the largest in several, two at a time, for one often waits for its cluster
while the other computes. They share the cores: each has as many threads as there are for it.

    python tools/run_tests.py                   # everything
    LANES=1 python tools/run_tests.py           # one folder after the other
    python tools/run_tests.py -k resume -x      # one pytest with these arguments

A control plane ends with its folder, and does not idle beside all that comes later. What a folder's tests say is shown when they end; at
the very end every test that failed is named again with its reason, for that is what people and logs that are cut off see.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
MINUTE = 60.0
LONGEST = ("e2e", "operator", "chaos")
"""Are begun before the other folders, so that none is left to run alone at the end."""
PARTS = {"worker": 3}
"""Of a folder whose tests need nothing that is expensive to have twice. They are begun between the others, most of which wait as much as
they compute."""
BESIDE = "the rest"
"""Files that lie in no folder."""
WIDEST = 300
"""Characters of a reason."""


def suites(tests: Path) -> dict[str, list[str]]:
    """Name -> what pytest is given; every test file below `tests` is in exactly one."""
    folders = sorted(folder.name for folder in tests.iterdir() if folder.is_dir() and any(folder.rglob("test_*.py")))
    whole = [*(name for name in LONGEST if name in folders), *(name for name in folders if name not in LONGEST and name not in PARTS)]
    others = [(name, [str(tests / name)]) for name in whole]
    if loose := sorted(str(file) for file in tests.glob("test_*.py")):
        others.append((BESIDE, loose))
    parts = [part for name, count in PARTS.items() if name in folders for part in parts_of(tests / name, count)]
    return {name: paths for pair in zip_longest(parts, others) for name, paths in filter(None, pair)}


def parts_of(folder: Path, count: int) -> list[tuple[str, list[str]]]:
    """Neighbours, which are often of one kind and about as slow, go to different ones."""
    files = sorted(str(file) for file in folder.rglob("test_*.py"))
    return [(f"{folder.name} {n + 1} of {count}", files[n::count]) for n in range(count) if files[n::count]]


@dataclass
class Running:
    name: str
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    results: IO[bytes]
    """junit's XML, once it has ended."""
    began: float


def run_all(wanted: Mapping[str, Sequence[str]], lanes: int) -> dict[str, int]:
    """Exit codes by name. What each says is printed when it has ended, and at the end what failed; whatever ends this, nothing goes on."""
    waiting, running, codes, failed = list(wanted.items()), list[Running](), dict[str, int](), list[str]()
    told = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < lanes:
                running.append(start(*waiting.pop(0), threads=max(1, len(os.sched_getaffinity(0)) // lanes)))
            time.sleep(0.1)
            if time.monotonic() - told > MINUTE:
                told = time.monotonic()
                say("; ".join(f"{one.name}: {told - one.began:.0f} s" for one in running))
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                codes[one.name] = one.process.returncode
                failed += show(one)
    finally:
        for one in running:
            one.process.send_signal(signal.SIGINT)  # as Ctrl-C does: fixtures are taken down
        for one in running:
            one.process.wait()
            failed += show(one)
        for line in failed:
            say(line)
    return codes


def start(name: str, paths: Sequence[str], threads: int) -> Running:
    output = tempfile.TemporaryFile()  # noqa: SIM115  # read once its process has ended
    results = tempfile.NamedTemporaryFile(suffix=".xml")  # noqa: SIM115
    junit = ["-o", "junit_family=xunit1", f"--junit-xml={results.name}"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *junit, *paths]
    say(f"{name}: begun")
    environ = {"OMP_NUM_THREADS": str(threads)} | os.environ
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=output, stderr=subprocess.STDOUT)
    return Running(name, process, output, results, time.monotonic())


def show(ended: Running) -> list[str]:
    """Prints what it said; returns a line for each test that failed, or for a pytest that ended otherwise: which one, and why."""
    ended.output.seek(0)
    sys.stdout.write(ended.output.read().decode(errors="replace"))
    code = ended.process.returncode
    say(f"{ended.name}: {'passed' if code == 0 else 'FAILED'} in {time.monotonic() - ended.began:.0f} s")
    named = list(failures(Path(ended.results.name)))
    return named or ([f"FAILED {ended.name}: pytest ended with exit code {code}"] if code else [])


def failures(results: Path) -> Iterator[str]:
    """Of junit's XML; nothing where pytest was killed before it could write it."""
    with suppress(ElementTree.ParseError):
        for case in ElementTree.parse(results).iter("testcase"):
            for problem in (*case.iter("failure"), *case.iter("error")):
                said = (problem.get("message") or problem.text or problem.tag).strip()
                yield f"FAILED {case.get('file')}::{case.get('name')}: {said.splitlines()[0][:WIDEST]}"


def say(line: str) -> None:
    print(f"-- {line}", flush=True)


def main(arguments: Sequence[str]) -> int:
    if arguments:
        return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT).returncode
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    codes = run_all(suites(ROOT / "tests"), int(os.environ.get("LANES", "2")))
    bad = sorted(name for name, code in codes.items() if code != 0)
    say(f"{len(codes)} folders in {time.monotonic() - began:.0f} s: " + (f"FAILED: {', '.join(bad)}" if bad else "all passed"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
