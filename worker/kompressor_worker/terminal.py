"""What a person at a terminal sees: a bar, tables, one clear error."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from kompressor_worker.progress import Snapshot

out = Console()
err = Console(stderr=True, soft_wrap=True)


class Bar:
    """A progress bar; use as a context manager and as a listener."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[speed]}"), TextColumn("{task.fields[left]}"), console=err,
        )  # fmt: skip
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, s: Snapshot) -> None:
        if self._task is None:
            self._task = self._progress.add_task(s.unit, total=1.0, speed="", left="")
        eta = s.eta_seconds
        left = "-:--:--" if eta is None else f"{eta // 3600}:{eta // 60 % 60:02}:{eta % 60:02}"
        self._progress.update(self._task, completed=s.done, description=where(s), speed=speed(s), left=left)


class Lines:
    """Progress as log lines, for places without a terminal: one every few seconds, and the last."""

    def __init__(self, interval: float = 5.0) -> None:
        self._interval = interval
        self._next = 0.0

    def __call__(self, s: Snapshot) -> None:
        now = time.monotonic()
        last = s.phase == "Publishing" or (s.step is not None and s.step.step == s.step.steps)
        if now >= self._next or last:
            self._next = now + self._interval
            eta = f", {s.eta_seconds} s left" if s.eta_seconds else ""
            behind = "" if s.phase == "Training" else f"{s.units_done} of {s.units_total} units, "
            logging.getLogger("kompressor").info("%3d %%  %s  (%s%s%s)", s.percent, where(s), behind, speed(s), eta, extra=told(s))


def where(s: Snapshot) -> str:
    """What is being done."""
    return s.unit if s.step is None else f"{s.unit} step {s.step.step:,} of {s.step.steps:,}, loss {s.step.loss:.4g}"


def speed(s: Snapshot) -> str:
    return f"{human(s.bytes_per_second)}/s" if s.step is None else f"{s.step.tokens_per_second:,.0f} tokens/s"


def told(s: Snapshot) -> dict[str, Any]:
    """For logs that programs read."""
    return {"unit": s.unit} | ({} if s.step is None else {"step": s.step.step, "steps": s.step.steps, "loss": s.step.loss})


def human(size: float) -> str:
    """Bytes for people, in powers of 1000 as disks and model cards have them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def table(title: str, rows: Mapping[str, Any]) -> Table:
    t = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    t.add_column(style="dim")
    t.add_column(overflow="fold")  # a URI is never cut
    for key, value in rows.items():
        t.add_row(key, str(value))
    return t


def flow_rows(plan: Mapping[str, Any]) -> dict[str, str]:
    """What a plan says of activations that flow; nothing where none do."""
    if "activationBytes" not in plan:
        return {}
    on_disk = f", {human(plan['spilledBytes'])} of them on disk" if plan["spilledBytes"] else ""
    total = max(1, sum(plan["multiplyAdds"].values()))
    shares = ", ".join(f"{name} {100 * n / total:.0f} %" for name, n in plan["multiplyAdds"].items() if n)
    rows = {
        "  activations": f"{human(plan['activationBytes'] + plan['spilledBytes'])}{on_disk}",
        "  one block": f"{human(plan['blockBytes'])}; a step in fp32 and its rows {human(plan['stepBytes'])}",
    }
    if plan["statisticsBytes"]:
        rows["  statistics"] = human(plan["statisticsBytes"])
    if plan["headBytes"]:
        rows["  evaluation"] = f"{human(plan['headBytes'])} at the head"
    rate = f"{plan['multiplyAddsPerSecond'] / 1e9:,.0f} G a second"
    return rows | {"  computing": f"{total / 1e12:,.3g} T multiply-adds at {rate}: {shares}"}


def training_rows(plan: Mapping[str, Any]) -> dict[str, str]:
    """What a plan says of a training; nothing where there is none."""
    if (found := plan.get("training")) is None:
        return {}
    about = "about " if found["stepsAreEstimated"] else ""
    each = f" in each of {found['processes']} processes" if found["processes"] > 1 else ""
    sizes = f"{found['studentParameters']:,} parameters learn from {found['teacherParameters']:,}"
    return {
        "training": f"{about}{found['steps']:,} steps, {found['tokens']:,} tokens; {sizes}",
        "  takes": f"about {found['seconds']:,} s, {human(found['memoryBytes'])}{each}",
    }


def shape_rows(plan: Mapping[str, Any]) -> dict[str, str]:
    """What a plan says of sizes, of the KV cache and of a budget of bits; nothing of what stays or was not asked for."""
    rows: dict[str, str] = {}
    if sizes := plan.get("sizes"):
        before, after = plan["parameters"]
        named = ", ".join(f"{name} {was:,} -> {now:,}" for name, (was, now) in sizes.items())
        rows["shape"] = f"{named}; {before:,} -> {after:,} parameters"
    if cache := plan.get("kvCache"):
        (before, after), (_, full) = cache["bytesPerToken"], cache["fullLayers"]
        rows["KV cache"] = f"{before:,} -> {after:,} bytes a token at a context of {cache['context']:,}; {full} layers with full attention"
    if budget := plan.get("autoScheme"):
        between = f"candidates allow {human(budget['smallestBytes'])} to {human(budget['largestBytes'])}"
        rows["budget"] = f"at most {human(budget['mostBytes'])} of {human(budget['budgetBytes'])}; {between}"
    return rows


def bitmask_rows(found: Mapping[str, Any]) -> dict[str, str]:
    """What a plan or a result says of linears that are stored by a bitmask; nothing where none is."""
    count = found.get("bitmaskLinears", found.get("bitmaskTensors"))
    return {"by bitmask": f"{count} linears, {human(found['bitmaskSavedBytes'])} smaller than with their zeros"} if count else {}


def measured_rows(result: Mapping[str, Any]) -> dict[str, str]:
    """What training, evaluation, gates and drift say in `status.result`, line by line; nothing of what was not asked for."""
    rows: dict[str, str] = {}
    if "trainingSteps" in result:
        back = f", which took {result['klRecovered']} of the student's divergence away" if "klRecovered" in result else ""
        rows["training"] = f"{result['trainingSteps']:,} steps on {result['trainingTokens']:,} tokens{back}"
    if "perplexityBefore" in result:
        rows["perplexity"] = (
            f"{result['perplexityBefore']} -> {result['perplexityAfter']}, on {result['evaluatedTokens']:,} held-out tokens"
        )
        rows["logits"] = f"KL divergence {result['kl']} nats a token, the same likeliest token at {result['topOneAgreement']}"
    if runtime := result.get("runtime"):
        rows |= runtime_rows(runtime)
    if gates := result.get("gates"):
        rows["gates"] = "\n".join(gate_line(gate) for gate in gates)
    if drift := result.get("drift"):
        above = f"{drift['layersAbove']} inputs above the threshold" if drift["layersAbove"] else "nothing above the threshold"
        rows["drift"] = (
            f"{above}; farthest {drift['layer']}: distance {drift['distance']}; outside the calibrated range at most {drift['outside']}"
        )
    return rows


def runtime_rows(runtime: Mapping[str, Any]) -> dict[str, str]:
    if "failed" in runtime:
        return {"served": f"not measured: {runtime['failed']}"}

    def both(name: str) -> str:
        return f"{runtime[f'{name}Before']} -> {runtime[f'{name}After']}"

    cost = f", {both('costPerMillionTokens')} a million tokens" if "costPerMillionTokensAfter" in runtime else ""
    return {
        "served": f"by {runtime['engine']} on {runtime['device']}, {runtime['batch']} at a time: first token {both('timeToFirstToken')}, "
        f"{both('tokensPerSecond')} tokens/s{cost}",
        "  memory": f"{human(runtime['memoryBytesBefore'])} -> {human(runtime['memoryBytesAfter'])}",
    }


GATES = {"perplexity": "perplexity rises by", "kl": "KL divergence", "latency": "a request takes", "memory": "bytes of memory"}


def gate_line(gate: Mapping[str, Any]) -> str:
    return f"{'met' if gate['met'] else 'NOT met'}: {GATES[gate['metric']]} {gate['value']}, allowed {gate['limit']}"


def is_interactive() -> bool:
    return sys.stderr.isatty()
