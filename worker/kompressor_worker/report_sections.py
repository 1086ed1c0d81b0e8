"""The sections of report.html. Each takes its part of the report and is empty where there is none."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from kompressor_worker.report_plots import columns, heat, percent

LISTED = 60
"""Rows of a table at most; all of them are in kompressor.json."""
NUMBERED = re.compile(r"(?P<block>.*?\.\d+)\.(?P<kind>.+)", re.DOTALL)
Row = Sequence[str]


def card(title: str, sub: str, body: str, kind: str = "") -> str:
    """`body` is HTML; the other two are text."""
    below = f'<p class="sub">{escape(sub)}</p>' if sub else ""
    return f'<section class="{kind}"><h2>{escape(title)}</h2>{below}{body}</section>' if body else ""


def chips(words: Sequence[tuple[str, str]]) -> str:
    inner = "".join(f'<span class="chip">{escape(name)} <i>{escape(note)}</i></span>' for name, note in words if name)
    return f'<div class="chips">{inner}</div>' if inner else ""


def table(head: Row, rows: Iterable[Row], numbers: Sequence[int] = ()) -> str:
    """Text cells; `numbers` are columns to be set right. A cell that begins with ✓ or ✕ is coloured so."""

    def cell(tag: str, column: int, text: str) -> str:
        tones = ["number"] if column in numbers else []
        tones += {"✓": ["good"], "✕": ["bad"]}.get(text[:1], [])
        tones += ["long"] if any(len(word) > 24 for word in text.split()) else []
        return f'<{tag} class="{" ".join(tones)}">{escape(text)}</{tag}>'

    lines = ["".join(cell("td", i, text) for i, text in enumerate(row)) for row in rows]
    if not lines:
        return ""
    top = "".join(cell("th", i, text) for i, text in enumerate(head))
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table>"


def folded(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary><div>{body}</div></details>" if body else ""


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}g}" if 1e-4 <= abs(value) < 1e6 or value == 0 else f"{value:.{digits - 1}e}"


def gates(verdicts: Sequence[Mapping[str, Any]]) -> str:
    rows = [("✓ met" if v.get("met") else "✕ not met", str(v.get("metric", "")), str(v.get("says", ""))) for v in verdicts]
    return card("Gates", "Limits that the spec sets; where one is not met, nothing is published.", table(("", "Metric", "Measured"), rows))


def sizes(report: Mapping[str, Any]) -> str:
    before, after = (report.get(k, {}).get("tensorBytes") for k in ("source", "result"))
    if not before or not after or "expanded" in report:
        return ""
    whole = max(before, after)
    bars = "".join(
        f'<div class="bar {kind}"><span>{name}</span><span class="track"><span class="fill" style="width:{100 * x / whole:.2f}%"></span>'
        f'</span><span class="amount">{size(x)}</span></div>'
        for name, kind, x in (("Original", "before", before), ("Compressed", "after", after))
    )
    return card("Size", f"All tensors together; {percent(after / before)} of the original is left.", bars)


def output_error(blocks: Sequence[Mapping[str, Any]]) -> str:
    points = [(str(b.get("name", "")), float(b["outputError"])) for b in blocks if "outputError" in b]
    sub = "|compressed − original| over |original| of the hidden states after each block, on the evaluation data: it adds up with depth."
    return card("Output error by depth", sub, columns(points, percent))


def weight_error(linears: Mapping[str, Mapping[str, Any]]) -> str:
    sub = "|dequantised − original| over |original|, by kind of linear layer and block."
    return _error_map("Weight error", sub, linears, ("Scheme", "scheme"))


def pruned(linears: Mapping[str, Mapping[str, Any]]) -> str:
    sub = "|pruned − original| over |original|, by kind of linear layer and block, before any quantisation."
    return _error_map("Pruned", sub, linears, ("Asked", "asked"))


def allocation(found: Mapping[str, Any], linears: Mapping[str, Mapping[str, Any]]) -> str:
    """Where the zeros are: blocks, and a map of blocks by kinds of linear. `found`: publish.allocation's, nothing where all have as many;
    `linears`: those that are pruned."""
    if not found:
        return ""
    shares = {name: x["zeros"] / max(1, math.prod(x["shape"])) for name, x in linears.items() if "zeros" in x}
    least, most = found["smallest"], found["largest"]
    sub = (
        f"Zeros as a share of the weights, by block, and by kind of linear layer and block: from {percent(least['sparsity'])} in "
        f"{least['linear']} to {percent(most['sparsity'])} in {most['linear']}."
    )
    plot, rest = _map(shares, lambda values: sum(values) / len(values))
    return card("Zeros by layer", sub, columns(list(found.get("blocks", {}).items()), percent, height=130) + plot + rest)


def _map(found: Mapping[str, float], pool: Callable[[Sequence[float]], float]) -> tuple[str, str]:
    """Of linears: blocks by kinds, where experts are one kind and have one value; and what is in no block."""
    pooled: dict[tuple[str, str], list[float]] = {}
    outside: dict[str, float] = {}
    for name, value in found.items():
        if match := NUMBERED.fullmatch(name):
            pooled.setdefault((re.sub(r"\.\d+(?=\.|$)", ".*", match["kind"]), match["block"]), []).append(value)
        else:
            outside[name] = value
    cells = {}
    for (kind, block), values in pooled.items():
        of = f" ({len(values)} experts)" if len(values) > 1 else ""
        cells[kind, block] = (pool(values), f"{block}.{kind}{of}")
    plot = heat(cells, _unique(kind for kind, _ in cells), _unique(block for _, block in cells), percent)
    return plot, chips([(name, percent(value)) for name, value in outside.items()])


def _error_map(title: str, sub: str, linears: Mapping[str, Mapping[str, Any]], column: tuple[str, str]) -> str:
    """A map of blocks by kinds of linear, and the largest as a table. `column`: what else that shows, its head and where it stands in
    `linears`."""
    errors = {name: float(x["relativeError"]) for name, x in linears.items() if math.isfinite(x.get("relativeError", math.nan))}
    plot, rest = _map(errors, lambda values: math.sqrt(sum(v * v for v in values) / len(values)))
    worst = sorted(errors, key=lambda name: -errors[name])[:LISTED]
    rows = [
        (name, str(linears[name].get(column[1], "")), " × ".join(map(str, linears[name].get("shape", ()))), percent(errors[name]))
        for name in worst
    ]
    body = plot + rest + folded(_of("Largest errors", rows, len(errors)), table(("Linear layer", column[0], "Shape", "Error"), rows, (3,)))
    return card(title, sub, body)


def drift(found: Mapping[str, Any] | None) -> str:
    if not found or not found.get("sites"):
        return ""
    limit, sites, drifting = float(found.get("threshold", 0)), found["sites"], set(found.get("drifting", ()))
    blocks = found.get("blocks", {})
    plot = columns(list(blocks.items()), number, limit=limit, over=[name for name, value in blocks.items() if value > limit])
    order = sorted(sites, key=lambda name: (name not in drifting, -sites[name]["distance"]))[:LISTED]
    rows = [
        (
            "✕ drifts" if name in drifting else "",
            name,
            number(sites[name]["distance"], 3),
            _rare(sites[name].get("outside", 0.0)),
            f"{sites[name].get('largest', 1.0):.3g}×",
            f"channel {sites[name]['worst']['channel']}" if "worst" in sites[name] else "",
        )
        for name in order
    ]
    head = ("", "Input of", "Distance", "Outside", "Largest", "Grew most")
    body = plot + folded(_of("Inputs, farthest first", rows, len(sites)), table(head, rows, (2, 3, 4)))
    sub = (
        "How far activations on the deployment sample are from calibration's: Jensen-Shannon distance of each block's farthest input, "
        "0 for the same, 1 for nothing in common."
    )
    return card("Drift", f"{sub} {len(drifting)} of {len(sites)} inputs drift.", body)


def experts(blocks: Sequence[Mapping[str, Any]]) -> str:
    """A map of experts by blocks: which share of a block's routed tokens each expert got."""
    cells = {}
    routed = [(str(b.get("name", "")), b["expertTokens"]) for b in blocks if b.get("expertTokens")]
    few = {(str(b.get("name", "")), expert) for b in blocks for expert in b.get("expertsOnAllTokens", ())}
    for name, tokens in routed:
        for expert, count in enumerate(tokens):
            how = ", measured on all" if (name, expert) in few else ""
            cells[_last(name), str(expert)] = (count / max(1, sum(tokens)), f"{name}, expert {expert}: {count:,} tokens{how}")
    if not routed:
        return ""
    idle = sum(count == 0 for _, tokens in routed for count in tokens)
    says = f"{idle} experts got no token." if idle else "Every expert got some."
    says += f" {len(few)} got fewer than calibration.minTokensPerExpert, and were measured on all tokens." if few else ""
    across = [str(i) for i in range(max(len(tokens) for _, tokens in routed))]
    plot = heat(cells, [_last(name) for name, _ in routed], across, lambda share: f"{100 * share:.1f} %")
    return card("Tokens per expert", f"Share of a block's routed calibration tokens, blocks down, experts across. {says}", plot)


def costs(units: Sequence[Mapping[str, Any]]) -> str:
    times = [(str(u.get("name", "")), float(u["seconds"])) for u in units if "seconds" in u]
    peaks = [(str(u.get("name", "")), float(u["peakBytes"])) for u in units if "peakBytes" in u]
    body = ""
    if times:
        body += f"<h3>Seconds, {duration(sum(t for _, t in times))} in all</h3>" + columns(times, lambda x: f"{x:.3g}", height=150)
    if peaks:
        body += "<h3>Peak memory</h3>" + columns(peaks, size, kind="second", height=110)
    return card("Time and memory", "Of each unit of the stream, by the worker that finished it.", body)


def passes(entries: Sequence[Mapping[str, Any]], blocks: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (name, ", ".join(f"{k}: {_plain(v)}" for k, v in (params or {}).items()) or "defaults")
        for entry in entries
        for name, params in entry.items()
    ]
    notes = [
        (str(stage), str(name), _plain(note))
        for block in blocks
        for stage, of_stage in block.get("notes", {}).items()
        for name, note in of_stage.items()
    ]
    more = folded(_of("Notes of the passes", notes[:LISTED], len(notes)), table(("Stage", "Pass", "Note"), notes[:LISTED]))
    return card("Passes", "In the order in which they ran.", table(("Pass", "Parameters"), rows) + more)


def data(samples: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (
            section,
            str(x.get("uri", "")),
            f"{x.get('samples', 0):,} × {x.get('sequenceLength', 0):,}",
            f"{x.get('tokens', 0):,}",
            "; ".join(f"{k} {_plain(x[k])}" for k in ("documents", "skipped", "packing", "seed", "bos") if k in x),
            str(x.get("digest", "")),
        )
        for section, x in samples.items()
    ]
    return card("Data", "", table(("For", "From", "Rows", "Tokens", "How", "Digest of the token ids"), rows, (2, 3)))


def provenance(report: Mapping[str, Any]) -> str:
    source, result = report.get("source", {}), report.get("result", {})
    facts = [
        ("Source", source.get("uri")),
        ("Source digest", source.get("digest")),
        ("Result digest", result.get("digest")),
        *((f"Fingerprint: {name}", value) for name, value in report.get("fingerprint", {}).items() if value != source.get("digest")),
        *((f"{x['first']} to {x['last']}", f"made on {x['device']}") for x in report.get("devices", ())),
        ("Kompressor", report.get("kompressor")),
        *((name, value) for name, value in report.get("versions", {}).items()),
        ("Job", "/".join(str(x) for x in (report.get("job", {}).get(k) for k in ("namespace", "name", "uid")) if x)),
    ]
    rows = "".join(f'<tr><td>{escape(name)}</td><td class="mono">{escape(str(value))}</td></tr>' for name, value in facts if value)
    return card("Where it comes from", "", f"<table><tbody>{rows}</tbody></table>" if rows else "")


def _of(what: str, shown: Sequence[Any], all_of_them: int) -> str:
    return f"{what} ({all_of_them:,})" if len(shown) == all_of_them else f"{what} ({len(shown)} of {all_of_them:,})"


def _rare(share: float) -> str:
    return "< 0.001 %" if 0 < share < 1e-5 else percent(share)


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _plain(value: Any) -> str:
    """A parameter or a note as one would write it: text as it is, yes and no, mappings without brackets at the outside."""
    if isinstance(value, Mapping):
        return "; ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value)
