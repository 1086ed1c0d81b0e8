"""What evaluation, gates and drift found, as `status.result` has it: in values that a person reads. No torch: the planner says it too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kompressor_api.target import passes_as_text
from kompressor_worker import gates


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
