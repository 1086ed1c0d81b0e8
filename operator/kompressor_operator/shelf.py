"""All records of one kind, by what watch events, full lists and the answers to our own writes have told. The resource version decides
which of them is newer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from kompressor_operator.observed import Key


class Record(Protocol):
    @property
    def namespace(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def uid(self) -> str: ...
    @property
    def resource_version(self) -> str: ...


R = TypeVar("R", bound=Record)


@dataclass
class Shelf(Generic[R]):
    """All records of one kind, by (namespace, name)."""

    records: dict[Key, R] = field(default_factory=dict)
    _gone: dict[str, int] = field(default_factory=dict)
    """uid -> resource version of deletions since the last list began: a list may still show them."""
    _unproven: dict[Key, int] = field(default_factory=dict)
    """What a list has shown and the watch has not told yet."""

    def read(self, body: Mapping[str, Any], parse: Callable[[Mapping[str, Any]], R]) -> R:
        """Its record; the one that is here where it is of this very version. A full list is mostly of such, and so is each echo of a write
        of ours."""
        meta = body["metadata"]
        known = self.records.get((meta["namespace"], meta["name"]))
        if known is not None and (known.uid, known.resource_version) == (meta["uid"], meta.get("resourceVersion")):
            return known
        return parse(body)

    def put(self, record: R) -> bool:
        """Keep it if it is newer than what is there. Another uid is another object under an old name."""
        key, version = (record.namespace, record.name), _version(record)
        if version <= self._gone.get(record.uid, -1):
            return False
        known = self.records.get(key)
        if known is not None and known.uid == record.uid and _version(known) > version:
            return False
        self.records[key] = record
        return True

    def told(self, record: R, deleted: bool) -> None:
        """A watch event."""
        key = (record.namespace, record.name)
        if self._unproven.get(key, 0) <= _version(record):
            self._unproven.pop(key, None)
        if not deleted:
            self.put(record)
            return
        self._gone[record.uid] = _version(record)
        known = self.records.get(key)
        if known is not None and known.uid == record.uid:
            del self.records[key]

    def begin_list(self) -> None:
        self._gone.clear()

    def listed(self, records: Iterable[R], version: str) -> list[R]:
        """A full list as of this version: repair what the watch has missed. Returns the records that are gone."""
        seen: set[Key] = set()
        for record in records:
            key = (record.namespace, record.name)
            seen.add(key)
            known = self.records.get(key)
            if self.put(record) and (known is None or _version(known) < _version(record)):
                self._unproven[key] = _version(record)
        as_of = int(version) if version.isdigit() else 0
        gone = [key for key, record in self.records.items() if key not in seen and _version(record) <= as_of]
        for key in gone:
            self._unproven.pop(key, None)
        return [self.records.pop(key) for key in gone]

    @property
    def unproven(self) -> frozenset[tuple[Key, int]]:
        """What the watch still owes us; if it does so for long, it is dead."""
        return frozenset(self._unproven.items())

    def __iter__(self) -> Iterator[R]:
        return iter(self.records.values())


def _version(record: Record) -> int:
    """Resource versions of one resource are comparable numbers (Kubernetes 1.35 says so, all servers before did so)."""
    return int(record.resource_version) if record.resource_version.isdigit() else 0
