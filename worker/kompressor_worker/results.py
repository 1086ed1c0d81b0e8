"""What evaluation, gates and drift found, as `status.result` has it: in values that a person reads. No torch: the planner says it too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kompressor_api.target import passes_as_text
from kompressor_worker import gates

FAILED = 600
"""Characters of an engine's failure on the status; warnings have all of them."""


def measured_result(report: Mapping[str, Any]) -> dict[str, Any]:
    """From kompressor.json; nothing of what was not asked for."""
    found: dict[str, Any] = {}
    if distillation := report.get("distillation"):
        found |= trained(distillation)
    if evaluation := report.get("evaluation"):
        found |= evaluated(evaluation)
    if verdicts := report.get("gates"):
        found["gates"] = gates.status(verdicts)
    if compared := report.get("drift"):
        found["drift"] = drifted(compared)
    if runtime := report.get("runtime"):
        found["runtime"] = served(runtime)
    if target := report.get("target"):
        found["target"] = targeted(target)
    if calibration := report.get("data", {}).get("calibration"):
        found["calibrationDigest"] = calibration["digest"]
    return found


def evaluated(summary: Mapping[str, Any]) -> dict[str, Any]:
    """From `Evaluation.summary()`."""
    return {
        "perplexityBefore": f"{summary['perplexityBefore']:.5g}",
        "perplexityAfter": f"{summary['perplexityAfter']:.5g}",
        "kl": f"{summary['kl']:.4g}",
        "topOneAgreement": f"{100 * summary['topOneAgreement']:.4g}%",
        "evaluatedTokens": summary["tokens"],
    }


def trained(distillation: Mapping[str, Any]) -> dict[str, Any]:
    """From `Distilling.section`."""
    found: dict[str, Any] = {"trainingSteps": distillation["steps"], "trainingTokens": distillation["tokens"]}
    if before := distillation.get("before"):
        found |= {"perplexityBeforeTraining": f"{before['perplexityAfter']:.5g}", "klBeforeTraining": f"{before['kl']:.4g}"}
    if (share := distillation.get("recovered", {}).get("kl")) is not None:
        found["klRecovered"] = f"{100 * share:.4g}%"
    return found


def served(runtime: Mapping[str, Any]) -> dict[str, Any]:
    """From the report's `runtime`: figures of the largest batch."""
    if "failed" in runtime:
        return {"engine": runtime["engine"], "failed": runtime["failed"][:FAILED]}
    written: dict[str, tuple[str, Callable[[float], str]]] = {
        "timeToFirstToken": ("firstToken", lambda x: f"{1000 * x:.4g}ms"),
        "latency": ("latency", lambda x: f"{x:.4g}s"),
        "tokensPerSecond": ("tokensPerSecond", lambda x: f"{x:.4g}"),
        "costPerMillionTokens": ("costPerMillionTokens", lambda x: f"{x:.4g}"),
    }
    found = {"engine": runtime["engine"], "device": runtime["device"], "batch": max(runtime["batch"])}
    for when, side in (("Before", runtime["before"]), ("After", runtime["after"])):
        largest = max(side["batches"], key=lambda each: int(each["batch"]))
        found |= {f"{name}{when}": say(largest[key]) for name, (key, say) in written.items() if key in largest}
        found[f"memoryBytes{when}"] = side["peakBytes"]
    return found


def targeted(target: Mapping[str, Any]) -> dict[str, Any]:
    """From `Ladder.section`."""
    before, after = target["before"], target["after"]
    cost = {"costPerMillionTokens": f"{after['costPerMillionTokens']:.4g}"} if "costPerMillionTokens" in after else {}
    return {
        "plan": target["chosen"],
        "passes": passes_as_text(next(row["passes"] for row in target["plans"] if row["plan"] == target["chosen"])),
        "tries": [f"{each['plan']}: {'kept' if each['met'] else 'missed'}: {each['says']}" for each in target["tries"]],
        "totalBytes": target["need"]["total"],
        "memoryBytes": target["memoryBytes"],
        "bytesPerTokenBefore": before["bytesPerToken"],
        "bytesPerTokenAfter": after["bytesPerToken"],
        "tokensPerSecond": f"{after['tokensPerSecond']:.4g}",
        **cost,
    }


def drifted(drift: Mapping[str, Any]) -> dict[str, Any]:
    """From `drift.summarise`; empty where nothing was compared."""
    sites = drift["sites"]
    if not sites:
        return {}
    layer = max(sites, key=lambda name: sites[name]["distance"])
    return {
        "distance": f"{sites[layer]['distance']:.4g}",
        "layer": layer,
        "outside": f"{100 * max(found['outside'] for found in sites.values()):.3g}%",
        "layersAbove": len(drift["drifting"]),
    }
