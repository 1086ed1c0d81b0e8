"""A stand-in for an engine's Python: run as one, it says whether it has the package, and as a driver it answers as vllm_driver.py does.

It opens what it is given, and times follow from the bytes that it finds, so that a smaller checkpoint is faster and takes less.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SECONDS_A_BYTE = 1e-8
"""Of a step."""
IDLE = 1 << 20
"""Bytes of memory that it takes beside the weights."""

SCRIPT = """#!{python}
import hashlib, json, os, subprocess, sys, time
from pathlib import Path

HOW = {how!r}
if sys.argv[2] == "-c":
    sys.exit(HOW == "missing")
print("stand-in starts", flush=True)
print("stand-in warns", file=sys.stderr, flush=True)
seen, weights = {{}}, 0
with os.fdopen(int(sys.argv[3])) as commands, os.fdopen(int(sys.argv[4]), "w") as answers:
    for line in commands:
        asked = json.loads(line)
        if "model" in asked:
            folder = Path(asked["model"])
            seen = {{p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}}
            weights = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
            record = {{"asked": asked, "files": seen, "environ": dict(os.environ), "pid": os.getpid()}}
            with open({record!r}, "a") as file:
                print(json.dumps(record), file=file)
            answer = {{"engine": "vllm 0.0-stand-in", "device": ""}}
        elif "memory" in asked:
            answer = {{"peakBytes": weights + {idle}, "nowBytes": 0}}
        else:
            if HOW == "dies":
                print("Segmentation fault (core dumped)", flush=True)
                os.kill(os.getpid(), 11)
            if HOW == "hangs":
                subprocess.Popen(["sleep", "600"])
                time.sleep(600)
            if HOW == "refuses":
                answer = {{"error": "ValueError: no kernel for this scheme"}}
            else:
                step, requests, tokens = weights * {rate}, len(asked["prompts"]), asked["generate"]
                assert all(len(prompt) == len(asked["prompts"][0]) for prompt in asked["prompts"])
                first = [step * (i + 1) for i in range(requests)]
                decoding = step * (tokens - 1)
                answer = {{"firstToken": first, "seconds": first[-1] + decoding}}
                answer |= {{"decodeTokens": requests * (tokens - 1), "decodeSeconds": decoding}}
        print(json.dumps(answer), file=answers, flush=True)
"""


def stand_in(folder: Path, how: str = "works") -> dict[str, str]:
    """The environment that names it; what it has seen goes to `folder`. `how`: works, missing, dies, hangs, refuses."""
    folder.mkdir(exist_ok=True)
    python = folder / f"python-{how}"
    python.write_text(SCRIPT.format(python=sys.executable, how=how, record=str(folder / "seen"), rate=SECONDS_A_BYTE, idle=IDLE))
    python.chmod(0o755)
    return {"KOMPRESSOR_VLLM_PYTHON": str(python)}


def seen(folder: Path) -> list[dict[str, Any]]:
    """Of each checkpoint that it has loaded: what was asked, digests of its files, its environment, its process."""
    return [json.loads(line) for line in (folder / "seen").read_text().splitlines()]
