"""report.html: what kompressor.json says, for a person to look at. One file: no scripts, nothing loaded from anywhere, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any, TypedDict

from kompressor_worker import report_sections as sections
from kompressor_worker.report_attention import attention
from kompressor_worker.report_plots import percent
from kompressor_worker.report_runtime import runtime
from kompressor_worker.report_schemes import schemes
from kompressor_worker.report_sections import card, chips, number, size
from kompressor_worker.report_shape import shape
from kompressor_worker.report_target import target
from kompressor_worker.report_training import training

__all__ = ["Report", "UnitTime", "render"]


class UnitTime(TypedDict, total=False):
    """What a unit of the stream took, by the worker that finished it."""

    name: str
    seconds: float
    peakBytes: int
    """Largest resident memory up to the unit's end."""


class BlockFacts(TypedDict, total=False):
    """One decoder block of a job with calibration or evaluation."""

    name: str
    outputError: float
    """Relative error of the block's output on the evaluation rows (evaluate.BlockError)."""
    excludedRows: int
    """Calibration rows that were not finite here."""
    notes: Mapping[str, Mapping[str, Any]]
    """Stage to pass to what the pass has to say."""
    expertTokens: Sequence[int]
    """In a mixture: calibration tokens routed to each expert."""
    expertsOnAllTokens: Sequence[int]
    """Those that few tokens are routed to: what was measured of them, was measured on all."""


class Report(TypedDict, total=False):
    """kompressor.json, and `units` beside it, which stands in no published JSON. Any part may be missing."""

    kompressor: str
    versions: Mapping[str, str]
    job: Mapping[str, Any]
    """name, namespace, uid, passes (each exactly one key: name to parameters), format."""
    fingerprint: Mapping[str, str]
    source: Mapping[str, Any]
    """uri, digest, tensorBytes."""
    result: Mapping[str, Any]
    """tensorBytes, digest, relativeError, quantizedLinears; of pruned ones prunedLinears, sparsity, bitmaskLinears, bitmaskSavedBytes."""
    warnings: Sequence[str]
    linears: Mapping[str, Mapping[str, Any]]
    """Full module name to scheme, shape, groupSize, relativeError."""
    pruned: Mapping[str, Mapping[str, Any]]
    """The same to asked, shape, zeros, relativeError."""
    allocation: Mapping[str, Any]
    """publish.allocation(): where the zeros are, if not everywhere alike."""
    structure: Mapping[str, Any]
    """structure.section()."""
    attention: Mapping[str, Any]
    """kv_memory.section()."""
    autoScheme: Mapping[str, Any]
    """AutoScheme.described()."""
    distillation: Mapping[str, Any]
    """distilling.Distilling.section()."""
    evaluation: Mapping[str, Any]
    """evaluate.Evaluation.summary(); `bos`: whether rows begin with that token."""
    gates: Sequence[Mapping[str, Any]]
    """gates.check()."""
    target: Mapping[str, Any]
    """ladder.Ladder.section()."""
    runtime: Mapping[str, Any]
    """runtime.measure.timed(), with costs; or engine and failed."""
    drift: Mapping[str, Any]
    """drift.summarise()."""
    data: Mapping[str, Mapping[str, Any]]
    """calibration, evaluation, drift: uri, samples, tokens, sequenceLength, digest and so on."""
    devices: Sequence[Mapping[str, Any]]
    """devices.facts(), where more than one kind made it."""
    blocks: Sequence[BlockFacts]
    expanded: Mapping[str, Any]
    """In a plain checkpoint that was a result of ours: uri and digest of that, and how many linears were decoded."""
    units: Sequence[UnitTime]


def render(report: Report | Mapping[str, Any]) -> bytes:
    """The page, UTF-8. The same report makes the same bytes."""
    template = Template(files("kompressor_worker").joinpath("report.html").read_text(encoding="utf-8"))
    body = "\n".join(
        part
        for part in (
            _header(report),
            _tiles(report),
            _warnings(report.get("warnings", ())),
            sections.gates(report.get("gates", ())),
            target(report.get("target", {})),
            runtime(report.get("runtime", {}), report.get("target", {})),
            sections.sizes(report),
            sections.output_error(report.get("blocks", ())),
            sections.weight_error(report.get("linears", {})),
            sections.pruned(report.get("pruned", {})),
            sections.allocation(report.get("allocation", {}), report.get("pruned", {})),
            training(report.get("distillation", {}), report.get("evaluation", {})),
            shape(report.get("structure", {})),
            attention(report.get("attention", {})),
            schemes(report.get("autoScheme", {}), report.get("evaluation", {})),
            sections.drift(report.get("drift")),
            sections.experts(report.get("blocks", ())),
            sections.costs(report.get("units", ())),
            sections.passes(report.get("job", {}).get("passes", ()), report.get("blocks", ())),
            sections.data(report.get("data", {})),
            sections.provenance(report),
        )
        if part
    )
    footer = f"Kompressor {escape(str(report.get('kompressor', '')))} · the numbers of this page are in kompressor.json beside it"
    return template.substitute(title=escape(f"{_name(report)} · Kompressor"), body=body, footer=footer).encode(errors="replace")


def _name(report: Mapping[str, Any]) -> str:
    """The job's name, or the last word of where the model came from."""
    uri = str(report.get("source", {}).get("uri", ""))
    return str(report.get("job", {}).get("name") or uri.rstrip("/").rsplit("/", 1)[-1] or "Compressed model")


def _header(report: Mapping[str, Any]) -> str:
    verdicts: Sequence[Mapping[str, Any]] = report.get("gates", ())
    failed = sum(not v.get("met") for v in verdicts)
    tone, says = "", "No gates set"
    if verdicts:
        tone, says = ("bad", f"✕ {failed} of {len(verdicts)} gates not met") if failed else ("good", "✓ All gates met")
    elif not report.get("evaluation"):
        says = "Not evaluated"
    schemes: dict[str, int] = {}
    for linear in report.get("linears", {}).values():
        group = linear.get("groupSize", -1)
        name = f"{linear.get('scheme', '?')}{f' g{group}' if group and group > 0 else ''}"
        schemes[name] = schemes.get(name, 0) + 1
    job = report.get("job", {})
    words = [(name, f"× {count}") for name, count in sorted(schemes.items(), key=lambda item: -item[1])]
    words += [(" → ".join(name for entry in job.get("passes", ()) for name in entry), "passes")]
    words += [(str(job["format"]), "format")] if job.get("format") else []
    return (
        f'<header><div><p class="eyebrow">Compression report</p><h1>{escape(_name(report))}</h1>'
        f'<p class="path">{escape(str(report.get("source", {}).get("uri", "")))}</p>{chips(words)}</div>'
        f'<span class="verdict {tone}">{says}</span></header>'
    )


def _tiles(report: Mapping[str, Any]) -> str:
    tiles: list[tuple[str, str, str]] = []
    before, after = (report.get(k, {}).get("tensorBytes") for k in ("source", "result"))
    if before and after and "expanded" not in report:
        tiles.append(("Smaller by", f"{before / after:.2f}×", f"{size(before)} → {size(after)}"))
    if parameters := report.get("structure", {}).get("parameters"):
        tiles.append(("Parameters", f"-{percent(1 - parameters[1] / parameters[0])}", f"{parameters[0]:,} → {parameters[1]:,}"))
    if evaluation := report.get("evaluation"):
        tiles += _evaluation_tiles(evaluation)
    result = report.get("result", {})
    if "relativeError" in result:
        tiles.append(("Weight error", percent(result["relativeError"]), f"{result.get('quantizedLinears', 0):,} linear layers"))
    if "sparsity" in result:
        by_bitmask = f", {result['bitmaskLinears']:,} of them stored by a bitmask" if "bitmaskLinears" in result else ""
        note = f"of the weights of {result['prunedLinears']:,} pruned linear layers{by_bitmask}"
        tiles.append(("Zeros", percent(result["sparsity"]), note))
    return f'<div class="tiles">{"".join(_tile(*tile) for tile in tiles)}</div>' if tiles else ""


def _evaluation_tiles(evaluation: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    if "perplexityAfter" in evaluation:
        change = evaluation.get("perplexityIncrease", evaluation["perplexityAfter"] / evaluation["perplexityBefore"] - 1)
        note = f"before {number(evaluation['perplexityBefore'])}, {100 * change:+.2f} %"
        yield "Perplexity", number(evaluation["perplexityAfter"]), note
    if "kl" in evaluation:
        yield "KL divergence", number(evaluation["kl"], 3), "nats a token"
    if "topOneAgreement" in evaluation:
        yield "Same next token", percent(evaluation["topOneAgreement"]), f"of {evaluation.get('tokens', 0):,} tokens"


def _tile(name: str, value: str, note: str) -> str:
    texts = zip(("name", "value", "note"), (name, value, note), strict=True)
    lines = "".join(f'<div class="{kind}">{escape(text)}</div>' for kind, text in texts)
    return f'<div class="tile">{lines}</div>'


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    listed = "".join(f"<li>{escape(str(w))}</li>" for w in warnings)
    return card("Warnings" if len(warnings) > 1 else "A warning", "", f"<ul>{listed}</ul>", kind="notice")
