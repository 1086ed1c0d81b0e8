"""Takes each guard of the operator away in a copy of the tree (mutations.py has them): its test must fail. `make mutate`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mutations import MUTATIONS, ROOT, SOURCE, TESTS, mutated

COPIED = ("operator", "crds", "worker", "tests", "tools", "charts", "pyproject.toml")


def run(root: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """These tests, against the sources of this tree."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(str(root / part) for part in ("crds", "operator", "worker"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(root / "pyproject.toml"), "--rootdir", str(root)]
    return subprocess.run([*command, *(str(root / TESTS / test) for test in tests)], cwd=root, env=environ, capture_output=True, text=True)


def main() -> int:
    """Every mutation, or those whose guard has one of the arguments in it. Exits 1 if a test lets one through."""
    wanted = [m for m in MUTATIONS if not sys.argv[1:] or any(word in m.guard for word in sys.argv[1:])]
    alive = []
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        root = Path(folder)
        root.chmod(0o755)  # actors are other users
        for part in COPIED:
            source = ROOT / part
            leave = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, root / part, ignore=leave) if source.is_dir() else shutil.copy(source, root / part)
        whole = run(root, *dict.fromkeys(m.test for m in wanted))
        if whole.returncode != 0:
            sys.exit(f"a test fails before anything was taken away:\n{whole.stdout[-3000:]}")
        for mutation in wanted:
            file = root / SOURCE / mutation.file
            text = file.read_text()
            file.write_text(mutated(mutation, root))
            code = run(root, mutation.test).returncode
            file.write_text(text)
            alive += [] if code == 1 else [mutation.guard]
            print(f"{'noticed' if code == 1 else f'LET THROUGH ({code})':<16} {mutation.guard}", flush=True)
    print(f"{len(wanted) - len(alive)} of {len(wanted)} noticed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
