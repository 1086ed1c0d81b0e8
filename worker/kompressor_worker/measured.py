"""What the units' records have to say of a whole job: calibration, drift, shape, evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kompressor_worker import devices, kv_memory, structure
from kompressor_worker.assignment import Assignment
from kompressor_worker.calibration import Rows
from kompressor_worker.journal import Journal
from kompressor_worker.samples import FoundData, facts


def measured(assigned: Assignment, rows: Mapping[str, Rows], data: Mapping[str, FoundData], journal: Journal) -> dict[str, Any]:
    """What kompressor.json says of shape, calibration and evaluation, from the units' records, and all warnings."""
    spec, layout = assigned.spec, assigned.layout
    records = {unit.name: journal.read_record(number) for number, unit in enumerate(layout.units)}
    found: dict[str, Any] = {"data": facts(rows, data)} if rows else {}
    warnings: list[str] = []
    if blocks := {name: record["block"] for name, record in records.items() if "block" in record}:
        found["blocks"] = [
            {"name": name, **{k: v for k, v in block.items() if k not in ("cost", "drift")}} for name, block in blocks.items()
        ]
        if spec.drift is not None and "drift" in rows:
            from kompressor_worker import drift

            found["drift"] = drift.summarise({name: block.get("drift", {}) for name, block in blocks.items()}, spec.drift.threshold)
            warnings += drift.warnings(found["drift"])
    if shape := structure.section(layout, {next(iter(entry)): p for entry, p in zip(spec.passes, assigned.passes, strict=True)}, blocks):
        found["structure"] = shape
    if attention := kv_memory.section(layout, assigned.passes):
        found["attention"] = attention
    found |= {p.section: p.described() for p in assigned.passes if p.section}
    if evaluation := next((record["evaluation"] for record in records.values() if "evaluation" in record), None):
        found["evaluation"] = {**evaluation, "bos": rows["evaluation"].bos}
    if journal.state.devices:
        found["devices"] = devices.facts(journal.state.devices, list(records))
        warnings.append(devices.warning(found["devices"]))
    return {**found, "warnings": [*layout.warnings, *warnings]}
