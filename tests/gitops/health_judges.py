"""What GitOps tools make of an object, by none of our own code: kstatus itself, Argo CD's Lua, Flux's CEL. And what they should."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import celpy
import yaml
from celpy.adapter import json_to_cel
from lupa import lua51

ROOT = Path(__file__).resolve().parents[2]
Object = Mapping[str, Any]
CLOSE = """
for _, name in ipairs({"string", "math", "io", "os", "debug", "coroutine", "python"}) do _G[name] = nil end
getmetatable("").__index = nil
"""
STATUSES = ("Healthy", "Progressing", "Degraded", "Suspended", "Missing", "Unknown")
"""Of Argo CD; any other it shows as Unknown."""


def kstatus(objects: Iterable[Object], judge: Path) -> list[str]:
    """What cli-utils computes, a word for each object."""
    lines = "\n".join(map(json.dumps, objects))
    return subprocess.run([judge], input=lines, capture_output=True, text=True, check=True).stdout.split()


class ArgoCD:
    """Runs health.lua as Argo CD does: Lua 5.1 with the base and table libraries alone (`useOpenLibs` is off by default), the object as the
    global `obj`, a table with status and message as the answer, and no status but Argo CD's own."""

    def __init__(self) -> None:
        self.script = (ROOT / "gitops" / "argocd" / "health.lua").read_text()

    def __call__(self, found: Object) -> tuple[str, str]:
        lua = lua51.LuaRuntime(unpack_returned_tuples=True)
        lua.execute(CLOSE)
        lua.globals()["obj"] = lua.table_from(found, recursive=True)
        answer = lua.execute(self.script)
        assert answer["status"] in STATUSES, answer["status"]
        return str(answer["status"]), str(answer["message"])


class Flux:
    """Judges as Flux's status evaluator: another generation, inProgress, failed, current, else in progress; errors are errors."""

    def __init__(self) -> None:
        shipped = yaml.safe_load((ROOT / "gitops" / "flux" / "health-check.yaml").read_text())
        (check,) = shipped["spec"]["healthCheckExprs"]
        self.of = check["apiVersion"], check["kind"]
        environment = celpy.Environment()
        self.programs = {
            name: environment.program(environment.compile(check[name])) for name in ("inProgress", "failed", "current") if name in check
        }

    def __call__(self, found: Object) -> str:
        assert (found["apiVersion"], found["kind"]) == self.of
        observed = found.get("status", {}).get("observedGeneration")
        if observed is not None and observed != found["metadata"]["generation"]:
            return "InProgress"
        variables = {name: json_to_cel(value) for name, value in found.items()}
        words = {"inProgress": "InProgress", "failed": "Failed", "current": "Current"}
        return next((words[name] for name, program in self.programs.items() if program.evaluate(variables)), "InProgress")


Judged = tuple[str, str, str]
"""Words of kstatus, Argo CD and Flux."""

ON_THE_WAY: Judged = ("InProgress", "Progressing", "InProgress")
_WORDS: Mapping[str, Judged] = {
    "Suspended": ("InProgress", "Suspended", "Current"),  # its user wants it so: nothing else is to wait for it
    "Complete": ("Current", "Healthy", "Current"),
    "Failed": ("Failed", "Degraded", "Failed"),
}


def words_for(phase: str) -> Judged:
    """What the three should make of a phase."""
    return _WORDS.get(phase, ON_THE_WAY)
