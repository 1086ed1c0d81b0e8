"""What is odd about the data that a job asks for, though it can be done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker.architectures import text_config
from kompressor_worker.estimate import is_block, steps_of
from kompressor_worker.layout import ModelLayout
from kompressor_worker.passes import Pass
from kompressor_worker.samples import FoundData
from kompressor_worker.schemes import Scheme

HUGE_BYTES = 1 << 30
HUGE_SHARE = 100
"""A dataset is huge when it has more than so many times the bytes of what is drawn from it."""
BYTES_PER_TOKEN = 5
"""Of text as files hold it."""


def shape_warnings(spec: CompressionJobSpec, layout: ModelLayout, passes: Sequence[Pass], schemes: Mapping[str, Scheme]) -> tuple[str, ...]:
    """Rows longer than the model's positions, and too few of them for the Hessians. From headers alone."""
    hungry = any(p.measures for p in passes)
    used = [s for s in (spec.calibration if hungry else None, spec.drift if hungry else None, spec.evaluation) if s is not None]
    found = []
    positions = text_config(layout.config).get("max_position_embeddings")
    if type(positions) is int:
        found += [
            f"{s.SECTION}.sequenceLength {s.sequence_length} is above the model's max_position_embeddings {positions}: what it computes "
            f"beyond is not what it was trained for; set {positions} or less"
            for s in used
            if s.sequence_length > positions
        ]
    if needed := max((p.shortest_row for p in passes), default=0):
        found += [
            f"{s.SECTION}.sequenceLength {s.sequence_length} is "
            + (
                f"below {needed}: no row sees past the window"
                if s.sequence_length < needed
                else f"less than {2 * needed}: few tokens see past the window"
            )
            + f"; set {2 * needed} or more"
            for s in used
            if s.sequence_length < 2 * needed
        ]
    reducing = any(p.reduces for p in passes)
    if hungry and spec.calibration is not None and (reducing or any("hessian" in p.statistics for p in passes)):
        tokens = spec.calibration.samples * spec.calibration.sequence_length
        sites = [
            site
            for unit in layout.units
            if is_block(unit) and not unit.dropped
            for number, sites in enumerate(steps_of(unit.as_stored() if reducing else unit, layout))
            for site in sites
            if any(x.name in schemes or x.pruned for x in site.linears) or (reducing and number % 2)
        ]
        if sites and (worst := max(sites, key=lambda s: s.columns / s.share)).columns > tokens * worst.share:
            enough = -(-worst.columns // max(1, round(spec.calibration.sequence_length * worst.share)))
            each = "" if worst.share == 1 else f", about {round(tokens * worst.share):,} of them each expert,"
            found.append(
                f"calibration has at most {tokens:,} tokens{each} and the input of {worst.linears[-1].name} has {worst.columns:,} columns: "
                f"with fewer rows than columns a Hessian says little; set calibration.samples to {enough:,} or more"
            )
    return tuple(found)


def size_warnings(data: Mapping[str, FoundData]) -> tuple[str, ...]:
    """Datasets that are read to the end for very little."""
    found = []
    for section, each in data.items():
        drawn = each.sample.samples * each.sample.sequence_length * BYTES_PER_TOKEN
        if each.files.bytes > max(HUGE_BYTES, HUGE_SHARE * drawn):
            found.append(
                f"{section}: all {each.files.bytes / 1e9:.1f} GB of {each.source.uri} are read to draw {each.sample.samples} rows, about "
                f"{drawn / 1e6:.0f} MB; a smaller file of the same kind starts sooner"
            )
    return tuple(found)
