"""A CRD that is newer than this operator: fields that the API server knows and we do not. During an upgrade, and where one was half done.

The API server keeps every name, known or not, so that a misspelt one can be refused. Which ones it knows, its OpenAPI says: whoever has a
token may read that, where reading a CRD takes a right of the whole cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kompressor_api.failures import ADVICE
from kompressor_api.names import Reason
from kompressor_operator.cluster import ApiError, Cluster
from kompressor_operator.refusals import Refusal
from kompressor_operator.validation import Location, dotted

FRESH_SECONDS = 30.0
"""For so long a schema is asked again for what it knows. What it does not know is never taken from memory: it ends a job."""


def knows(schema: Mapping[str, Any], place: Location) -> bool:
    """Does the schema of an object name this place in it? What it only lets pass it does not."""
    node: Mapping[str, Any] = schema
    for part in place:
        below = node.get("items") if isinstance(part, int) else (node.get("properties") or {}).get(part)
        if not isinstance(below, Mapping):
            return False
        node = below
    return True


def outdated(places: Sequence[Location]) -> Refusal:
    """Waits, as for anything that has to change outside; an operator that knows the fields goes on with it."""
    named = ", ".join(dotted(str(root), rest) for root, *rest in places)
    message = f"{named}: the installed CompressionJob CRD has this, and this operator does not know it; {ADVICE[Reason.OPERATOR_OUTDATED]}"
    return Refusal(Reason.OPERATOR_OUTDATED, message, judged=False)


@dataclass
class Served:
    """What the API server knows of a CompressionJob."""

    clock: Callable[[], float] = time.monotonic
    _schema: Mapping[str, Any] = field(default_factory=dict)
    _read: float = 0.0

    async def all_known(self, cluster: Cluster, places: Iterable[Location]) -> bool:
        """Raises ApiError."""
        wanted = tuple(places)
        if self._schema and self.clock() - self._read < FRESH_SECONDS and all(knows(self._schema, place) for place in wanted):
            return True
        try:
            self._schema, self._read = await cluster.schema(), self.clock()
        except ApiError as error:
            if error.status not in (401, 403, 404):
                raise
            return False  # whoever closes this to all hears of a newer CRD as of a misspelt name
        return all(knows(self._schema, place) for place in wanted)
