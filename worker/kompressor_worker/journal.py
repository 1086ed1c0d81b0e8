"""What is done, in one small object: the only commit point of a job, and the fence against a second worker.

The journal is replaced by conditional PUT, never overwritten: whoever finds its ETag changed has lost the claim and stops. It holds the
fingerprint of the job, the next unit, and the parts of every upload; per-unit records and pending bytes are objects of their own, written
before the commit that names them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kompressor_api.names import Reason
from kompressor_worker.devices import Span, spans
from kompressor_worker.errors import OutputOccupied, UserError
from kompressor_worker.shards import OutputPlan, Position
from kompressor_worker.storage import JOURNAL, WORK, Output, Part

log = logging.getLogger(__name__)

VERSION = 1
RELEASE = "kompressor"
"""In a fingerprint: which release made it. Recorded, never compared: a job goes on and counts as done after an upgrade too; what a new
release could not go on with has another VERSION."""


@dataclass(frozen=True)
class Upload:
    """One shard on its way: its multipart upload, and the parts that are stored."""

    name: str
    id: str
    parts: tuple[Part, ...] = ()

    @property
    def offset(self) -> int:
        return self.parts[-1].offset + self.parts[-1].size if self.parts else 0


@dataclass(frozen=True)
class State:
    fingerprint: Mapping[str, str]
    owner: str
    unit: int = 0
    """The first unit that is not committed."""
    uploads: tuple[Upload, ...] = ()
    tail: str | None = None
    """Name of the object with the bytes that follow the last part."""
    snapshot: int | None = None
    """The unit before which the stored activations stand; calibrated jobs only."""
    surveys: int = 0
    """How many surveys are done: what they have found is stored, and the units' work is decided by it."""
    survey: int | None = None
    """The unit before which the one that is being done has been saved."""
    publishing: bool = False
    """All units are committed; shards may be whole already."""
    devices: tuple[Span, ...] = ()
    """Who made which units; none: the fingerprint's device all of them."""
    files: tuple[str, ...] = ()
    """All that publishing writes, once it has begun."""
    tries: tuple[Mapping[str, Any], ...] = ()
    """Plans of a target that were carried out before this one and did not keep what they should: their names, and what was measured."""
    job: str = ""
    """The uid of the CompressionJob whose work this is, so that cleaning up after another one leaves it; empty outside of a cluster."""

    @property
    def begun(self) -> bool:
        """Whether anything is done already."""
        return bool(self.unit or self.surveys or self.survey)


@dataclass
class Journal:
    output: Output
    state: State
    etag: str | None
    resumed_from: int | None = None
    lost_uploads: list[str] = field(default_factory=list)
    """Uploads that the store no longer had; their shards are made again."""

    def commit(self, state: State) -> None:
        """Makes `state` what a restart goes on from. Raises ClaimLost when another worker has taken over."""
        self.etag = self.output.replace(JOURNAL, encode(state), self.etag)
        self.state = state

    def write_record(self, unit: int, record: Mapping[str, Any]) -> None:
        """What is to be said of a finished unit in the report; goes before the commit that counts it."""
        self.output.write(_record_name(unit), json.dumps(record, sort_keys=True, separators=(",", ":")).encode())

    def read_record(self, unit: int) -> dict[str, Any]:
        found = self.output.read(_record_name(unit))
        if found is None:
            raise self._incomplete(_record_name(unit))
        try:
            record: dict[str, Any] = json.loads(found[0])
        except ValueError as error:
            raise self._incomplete(_record_name(unit)) from error
        return record

    def records(self, units: int) -> list[str]:
        """The names of so many units' records."""
        return [_record_name(unit) for unit in range(units)]

    def write_tail(self, unit: int, tail: bytes) -> str | None:
        if not tail:
            return None
        name = f"{WORK}tail-{unit:05d}"
        self.output.write(name, tail)
        return name

    def read_tail(self) -> bytes:
        if self.state.tail is None:
            return b""
        found = self.output.read(self.state.tail)
        if found is None:
            raise self._incomplete(self.state.tail)
        return found[0]

    def _incomplete(self, name: str) -> UserError:
        return UserError(
            f"{self.output.uri}: the journal counts on {name}, which is missing or damaged; {remedy(self.output.uri)}",
            Reason.JOURNAL_MISMATCH,
        )


def open_journal(
    output: Output,
    fingerprint: Mapping[str, str],
    owner: str,
    plan_after: Callable[[int], OutputPlan],
    device_may_change: bool = False,
    job: str = "",
) -> Journal:
    """Claims the output: starts a journal, or takes over the one that is there. Raises UserError when it belongs to another job, naming the
    field that differs, or to another kind of device, unless that may change; ClaimLost when another worker claims at the same moment.
    `plan_after`: the output's plan once so many surveys are done."""
    found = output.read(JOURNAL)
    if found is None:
        journal = Journal(output, State(dict(fingerprint), owner, job=job), None)
        journal.commit(journal.state)
        return journal
    state = decode(found[0], output.uri)
    refuse_other_job(state, fingerprint, output.uri)
    journal = Journal(output, state, found[1])
    plan = plan_after(state.surveys)
    kept, lost = surviving(output, state, plan)
    if lost:
        log.warning("%s: the store no longer has the upload of %s; going back to unit %d", output.uri, ", ".join(lost), kept.unit)
    journal.lost_uploads = lost
    if kept.unit < len(plan.stages):
        kept = _on_this_device(kept, fingerprint.get("device"), device_may_change, output.uri)
    if kept.unit or kept.publishing:
        journal.resumed_from = kept.unit
    journal.commit(replace(kept, owner=owner, job=job))
    return journal


def _on_this_device(state: State, device: str | None, may_change: bool, uri: str) -> State:
    """`state`, if its next units can be made on `device` (None: any makes the same). Raises UserError."""
    before = state.fingerprint.get("device")
    if device is None or before is None:
        return state
    if device != before and state.begun and not may_change:
        raise UserError(
            f"{uri}: an unfinished job is here whose device was {before}, this one's is {device}; run it on the same kind of node, with as "
            "many threads; or set worker.allowDeviceChange: true in a job like this one, which goes on here, with other bytes than one "
            f"device would make; or {remedy(uri)}",
            Reason.JOURNAL_MISMATCH,
        )
    if device != before and state.unit:
        log.warning("going on at unit %d on another device: %s; until here it was %s", state.unit, device, before)
    made = spans(state.devices, state.unit, before, device)
    return replace(state, fingerprint={**state.fingerprint, "device": device}, devices=made)


def refuse_unusable_journal(output: Output, fingerprint: Mapping[str, str]) -> None:
    """What `open_journal` would refuse, without claiming anything; on which device it will be done is not asked. Raises UserError."""
    if (found := output.read(JOURNAL)) is not None:
        refuse_other_job(decode(found[0], output.uri), fingerprint, output.uri)


def refuse_other_job(state: State, fingerprint: Mapping[str, str], uri: str) -> None:
    for key in differing(state.fingerprint, fingerprint):
        if key != "device":
            old, new = state.fingerprint.get(key), fingerprint.get(key)
            raise UserError(
                f"{uri}: an unfinished job is here whose {key} was {old}, this one's is {new}; {remedy(uri)}",
                Reason.JOURNAL_MISMATCH,
            )


def refuse_usurped(output: Output, uid: str) -> None:
    """After a lost claim: raises OutputOccupied if it went to another CompressionJob than `uid`. Taking it back would never end, for that
    one's pods would do the same, so the job that came last goes on. Silent where it went to a pod of the same job, and where no journal is
    left: then the next worker finds what the other one has published."""
    found = output.read(JOURNAL)
    other = decode(found[0], output.uri).job if found is not None else ""
    if other not in ("", uid):
        raise OutputOccupied(
            f"{output.uri}: the CompressionJob with uid {other} has taken over this output and goes on with the same work; choose another "
            "output.uri for one of the two, or delete that job and apply this one again"
        )


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The fields of two fingerprints that say that they are not of the same work."""
    return [key for key in sorted({*old, *new} - {RELEASE}) if old.get(key) != new.get(key)]


def remedy(uri: str) -> str:
    scheme, _, path = uri.partition("://")
    folder, _, name = path.rpartition("/")
    # on file systems the working objects are in the staging folder beside the target
    place = f"{uri}/{WORK}" if scheme == "s3" else f"{scheme}://{folder}/.{name}.kompressor"
    return f"choose another output, or delete {place} to start afresh"


def surviving(output: Output, state: State, plan: OutputPlan) -> tuple[State, list[str]]:
    """The latest state whose uploads all still exist, and the names of those that do not."""
    if state.publishing:
        return state, []  # shards may be whole already; `complete` tells
    lost = [u.name for u in state.uploads if not output.upload_exists(u.name, u.id, u.parts)]
    if not lost:
        return state, []
    first = min(i for i, shard in enumerate(plan.shards) if shard.name in lost)
    for unit in range(state.unit, 0, -1):
        position = plan.position(unit)
        if position.shard >= first and position != Position(first, 0):
            continue
        if state.snapshot is not None and unit < state.snapshot:
            break  # the activations of then are gone
        uploads = _cut_back(state.uploads, plan, position)
        if uploads is not None:
            return replace(state, unit=unit, uploads=uploads, tail=None), lost
    return replace(state, unit=0, uploads=(), tail=None, snapshot=None), lost


def _cut_back(uploads: Sequence[Upload], plan: OutputPlan, position: Position) -> tuple[Upload, ...] | None:
    """The uploads as they were at `position`, if a part ended there."""
    kept = []
    for upload in uploads:
        shard = next(i for i, s in enumerate(plan.shards) if s.name == upload.name)
        if shard < position.shard:
            kept.append(upload)
        elif shard == position.shard and position.offset:
            parts = tuple(p for p in upload.parts if p.offset < position.offset)
            cut = replace(upload, parts=parts)
            if cut.offset != position.offset:
                return None
            kept.append(cut)
    return tuple(kept)


def encode(state: State) -> bytes:
    return json.dumps({"version": VERSION, **asdict(state)}, sort_keys=True, separators=(",", ":")).encode()


def decode(data: bytes, uri: str) -> State:
    """Raises UserError where the journal of the output at `uri` is of another version, or not readable at all."""
    try:
        raw = json.loads(data)
        if (theirs := raw.pop("version")) != VERSION:
            raise UserError(
                f"{uri}: the journal has version {theirs!r}, this worker's is {VERSION}; finish the job with the release that began it, "
                f"or {remedy(uri)}",
                Reason.JOURNAL_MISMATCH,
            )
        uploads = tuple(Upload(u["name"], u["id"], tuple(Part(**p) for p in u["parts"])) for u in raw.pop("uploads"))
        devices = tuple(Span(**span) for span in raw.pop("devices", ()))
        files, tries = (tuple(raw.pop(name, ())) for name in ("files", "tries"))
        state = State(uploads=uploads, devices=devices, files=files, tries=tries, **raw)
        if not (isinstance(state.fingerprint, dict) and type(state.unit) is int and state.unit >= 0):
            raise TypeError(f"fingerprint {state.fingerprint!r}, unit {state.unit!r}")
        return state
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{uri}: {JOURNAL} is damaged ({type(error).__name__}: {error}); {remedy(uri)}", Reason.JOURNAL_MISMATCH) from error


def _record_name(unit: int) -> str:
    return f"{WORK}units/{unit:05d}.json"
