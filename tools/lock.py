"""Compiles the lock files in locks/ from pyproject.toml and the .in files there: names and versions only, for every platform.

Versions that a lock names already are kept; `python tools/lock.py --upgrade` takes the newest ones.
"""

from __future__ import annotations

import subprocess
import sys

from setup import ROOT, find_uv

LOCKS = ROOT / "locks"
TARGETS: dict[str, list[str]] = {
    "dev": ["--all-extras", "pyproject.toml"],
    "operator": ["--constraint", "locks/dev.lock", "--extra", "operator", "pyproject.toml"],  # what is tested is what is shipped
    "planner": ["--constraint", "locks/dev.lock", "--extra", "planner", "pyproject.toml"],
    "worker": ["--constraint", "locks/dev.lock", "--extra", "worker", "pyproject.toml"],
    "vllm": ["--override", "locks/vllm-overrides.txt", "locks/vllm.in"],
    "peer": ["locks/peer.in"],
    "trl": ["locks/trl.in"],
}


def main() -> None:
    flags = ["--universal", "--python-version", "3.11", "--no-header", "--no-annotate", "--no-emit-index-url", "--quiet", *sys.argv[1:]]
    for name, arguments in TARGETS.items():
        print(f"==> locks/{name}.lock", flush=True)
        subprocess.run([find_uv(), "pip", "compile", *flags, *arguments, "-o", LOCKS / f"{name}.lock"], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
