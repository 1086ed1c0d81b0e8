"""What to do about a CompressionJob: `(job, observed, now) -> Decision`. Pure, level-based, without memory.

The policies are asked in order and the first that has an opinion decides. They read the world as it was bucketed beforehand, so
each is a unit test; what they want done is data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from kompressor_operator.conditions import Verdict
from kompressor_operator.manifests import Attempt
from kompressor_operator.observed import CompressionJob, Manifest, Observed
from kompressor_operator.validation import PassParameters


@dataclass(frozen=True)
class View:
    """Everything that a policy may look at."""

    job: CompressionJob
    observed: Observed
    now: datetime
    passes: PassParameters = field(default_factory=dict)


@dataclass(frozen=True)
class JobPatch:
    """A change of one of the three fields of a child Job that may change."""

    job: str
    spec: Manifest


@dataclass(frozen=True)
class Involved:
    """A child whose warning events are wanted before deciding again."""

    kind: str
    name: str
    uid: str


@dataclass(frozen=True)
class Decision:
    """What is to be done, in this order; empty: nothing."""

    confirm: bool = False
    """Not yet: this cannot be taken back, so look at the API server itself and decide again."""
    look: Involved | None = None
    """Not yet: read the warnings about this child and decide again."""
    start: Attempt | None = None
    """Create the children and the Job of this attempt."""
    patches: tuple[JobPatch, ...] = ()
    verdict: Verdict | None = None
    """What the status is to say; None leaves it alone."""
    keep_generation: bool = False
    """Finished: the stored end holds for the new generation too."""
    again_after: float | None = None
    """Seconds after which time alone may change the answer."""


Policy = Callable[[View], Decision | None]

NOTHING = Decision()
CONFIRM = Decision(confirm=True)


def decide(view: View, policies: Sequence[Policy]) -> Decision:
    """Ask the policies in order; the first hit wins."""
    return next((decision for policy in policies if (decision := policy(view)) is not None), NOTHING)
