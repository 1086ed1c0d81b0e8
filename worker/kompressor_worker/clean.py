"""Removes what one job has left at its output, and nothing else: what its report or its journal lists, file by file.

Every step may be cut off and done again: config.json goes first, so that no loader opens half a result; the report, which lists the rest,
goes last. Where a worker of the job is still alive somewhere, the journal's claim is taken from it first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kompressor_api.names import ENV_JOB_UID, ENV_OUTPUT
from kompressor_api.v1alpha1 import OutputSpec
from kompressor_worker.errors import ClaimLost, UserError
from kompressor_worker.journal import State, decode, encode
from kompressor_worker.publish import CONFIG, REPORT, parse_report
from kompressor_worker.storage import JOURNAL, WORK, Output
from kompressor_worker.storage.locations import named

CLAIMS = 5
"""How often the claim is tried for while a worker commits: each try ends a worker."""


@dataclass(frozen=True)
class Cleaned:
    uri: str
    files: int
    """Published ones that were removed."""
    unfinished: bool
    """Whether unfinished work was."""

    @property
    def message(self) -> str:
        parts = [f"{self.files} files"] * bool(self.files) + ["unfinished work"] * self.unfinished
        return f"{self.uri}: removed {' and '.join(parts)}" if parts else f"{self.uri}: nothing there is this job's, nothing was removed"


def ordered_output(environ: Mapping[str, str]) -> tuple[OutputSpec, str]:
    """The output and the job's uid, as the operator gives them. Raises UserError."""
    try:
        location = OutputSpec.model_validate(json.loads(environ[ENV_OUTPUT]))
        uid = environ[ENV_JOB_UID]
    except (KeyError, ValueError) as error:
        raise UserError(f"{ENV_OUTPUT} (spec.output as JSON) and {ENV_JOB_UID} must be set: {type(error).__name__}: {error}") from error
    if not uid or location.uri.startswith("file://"):
        raise UserError(f"{ENV_JOB_UID}={uid!r}, {location.uri}: a uid, and s3:// or pvc:// are needed in a cluster")
    return location, uid


def wanted_output(uri: str | None, endpoint: str | None, region: str | None) -> OutputSpec:
    """The output that a person names. Raises UserError."""
    if uri is None:
        raise UserError("which output? give s3://, pvc://, file:// or a path")
    return named(OutputSpec, uri, endpoint, region, "s3://, pvc://, file://")


def clean(output: Output, uid: str | None) -> Cleaned:
    """`uid` of the job whose result and unfinished work goes; None: unfinished work alone, whosever it is.

    Raises ClaimLost (a worker goes on committing), UserError (a damaged journal), AccessDenied, StorageError."""
    if uid == "":
        raise UserError(f"{output.uri}: an empty uid names no job; leave it out to remove unfinished work alone")
    existing = output.existing()
    report = parse_report(output.read_published(REPORT)) if REPORT in existing else {}
    listed = set(report.get("files") or ()) if uid is not None and made_by(report, uid) else set()
    state = take_over(output, uid)
    if state is not None and CONFIG not in existing and (not report or made_by(report, state.job)):  # cut off while it was published
        listed |= {*state.files, *(upload.name for upload in state.uploads)}
    removed = listed & set(existing)
    for group in (removed & {CONFIG}, removed - {CONFIG, REPORT}, removed & {REPORT}):
        if group:
            output.unpublish(sorted(group))
    kept = output.read(f"{WORK}{REPORT}") if state is None else None  # of a gate that was not met
    unfinished = state is not None or (kept is not None and (uid is None or made_by(parse_report(kept[0]), uid)))
    if unfinished:
        if kept is not None:
            output.cleanup(keep=[f"{WORK}{REPORT}"])  # it goes last: whose the rest is stands there
        output.cleanup()
    return Cleaned(output.uri, len(removed), unfinished)


def made_by(report: Mapping[str, Any], uid: str) -> bool:
    job = report.get("job")
    return isinstance(job, dict) and job.get("uid") == uid


def take_over(output: Output, uid: str | None) -> State | None:
    """The journal's state, if it is of this job, and from here on no worker's any more."""
    for _ in range(CLAIMS):
        found = output.read(JOURNAL)
        if found is None:
            return None
        state = decode(found[0], output.uri)
        if uid is not None and state.job != uid:
            return None
        if output.conditional is None:
            output.probe()
        try:
            output.replace(JOURNAL, encode(replace(state, owner="kompressor clean")), found[1])
        except ClaimLost:
            continue
        return state
    raise ClaimLost(f"{output.uri}: its worker goes on; delete the job's pods, then clean up again")
