"""What a person at a terminal sees: a bar, tables, one clear error."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from kompressor_worker.progress import Snapshot

out = Console()
err = Console(stderr=True, soft_wrap=True)


class Bar:
    """A progress bar; use as a context manager and as a listener."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TransferSpeedColumn(), TimeRemainingColumn(), console=err,
        )  # fmt: skip
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, s: Snapshot) -> None:
        if self._task is None:
            self._task = self._progress.add_task(s.unit, total=s.bytes_total)
        self._progress.update(self._task, completed=s.bytes_done, description=s.unit)


class Lines:
    """Progress as log lines, for places without a terminal: one every few seconds, and the last."""

    def __init__(self, interval: float = 5.0) -> None:
        self._interval = interval
        self._next = 0.0

    def __call__(self, s: Snapshot) -> None:
        now = time.monotonic()
        if now >= self._next or s.phase != "Compressing":
            self._next = now + self._interval
            eta = f", {s.eta_seconds} s left" if s.eta_seconds else ""
            logging.getLogger("kompressor").info(
                "%3d %%  %s  (%d of %d units, %s/s%s)",
                s.percent, s.unit, s.units_done, s.units_total, human(s.bytes_per_second), eta, extra={"unit": s.unit},
            )  # fmt: skip


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
    """What evaluation, gates and drift say in `status.result`, line by line; nothing of what was not asked for."""
    rows: dict[str, str] = {}
    if "perplexityBefore" in result:
        rows["perplexity"] = (
            f"{result['perplexityBefore']} -> {result['perplexityAfter']}, on {result['evaluatedTokens']:,} held-out tokens"
        )
        rows["logits"] = f"KL divergence {result['kl']} nats a token, the same likeliest token at {result['topOneAgreement']}"
    if gates := result.get("gates"):
        rows["gates"] = "\n".join(gate_line(gate) for gate in gates)
    if drift := result.get("drift"):
        above = f"{drift['layersAbove']} inputs above the threshold" if drift["layersAbove"] else "nothing above the threshold"
        rows["drift"] = (
            f"{above}; farthest {drift['layer']}: distance {drift['distance']}; outside the calibrated range at most {drift['outside']}"
        )
    return rows


def gate_line(gate: Mapping[str, Any]) -> str:
    measured = "perplexity rises by" if gate["metric"] == "perplexity" else "KL divergence"
    return f"{'met' if gate['met'] else 'NOT met'}: {measured} {gate['value']}, allowed {gate['limit']}"


def is_interactive() -> bool:
    return sys.stderr.isatty()
