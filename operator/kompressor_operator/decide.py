"""What to do about a CompressionJob: `(job, observed, now) -> Decision`. Pure, level-based, without memory.

The policies are asked in order and the first that has an opinion decides. They read the world as it was bucketed beforehand, so
each is a unit test; what they want done is data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from kompressor_operator.conditions import Event, Verdict
from kompressor_operator.manifests import Attempt
from kompressor_operator.observed import ChildJob, CompressionJob, Manifest, Observed
from kompressor_operator.settings import Settings
from kompressor_operator.validation import Location, PassParameters


@dataclass(frozen=True)
class View:
    """Everything that a policy may look at."""

    job: CompressionJob
    observed: Observed
    now: datetime
    settings: Settings
    passes: PassParameters = field(default_factory=dict)
    resolved: Manifest | None = None
    """The spec as the worker is told, read from the job's ConfigMap or just put together from its recipe; None if nobody has asked."""
    recipe: Manifest | None = None
    """Which recipe `resolved` was made with: what status.recipe is to say."""
    misspelt: bool = False
    """The API server does not know either what we do not know in the spec."""
    kueue: bool | None = None
    """Does the cluster have Kueue? None: not known yet."""
    tries: int = 0
    """How often a reconcile of this job has failed since it last succeeded."""

    @property
    def told(self) -> CompressionJob:
        """The job with the spec as the worker is told: what children, digests and checks go by."""
        return self.job if self.resolved is None else replace(self.job, spec=self.resolved)


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
    """What is to be done, in this order; empty: nothing. The status is written last."""

    confirm: bool = False
    """Not yet: this cannot be taken back, so look at the API server itself and decide again."""
    look: Involved | None = None
    """Not yet: read the warnings about this child and decide again."""
    finalizer: bool | None = None
    """True: not yet, put ours on and decide again. False: take it off, after all else."""
    resolve: bool = False
    """Not yet: read the recipe, or the ConfigMap that was made from it, and decide again with `View.resolved`."""
    unknown: tuple[Location, ...] = ()
    """Not yet: does the API server know these places, which we do not? Then the operator is the one to be corrected, else decide again."""
    dry_run: Attempt | None = None
    """Let the API server judge the Job of this attempt before anything is created."""
    create: tuple[Manifest, ...] = ()
    """Children, in this order; what is there already is as good, if it is ours."""
    keep: tuple[Manifest, ...] = ()
    """Children that are to be there all along: looked for, and created where somebody has deleted them."""
    start: Attempt | None = None
    """Create the children and the Job of this attempt."""
    patches: tuple[JobPatch, ...] = ()
    deletes: tuple[ChildJob, ...] = ()
    """These very child Jobs, and their pods in the background."""
    event: Event | None = None
    """Told after all that was to be done, beside what the verdict tells."""
    verdict: Verdict | None = None
    """What the status is to say; None leaves it alone."""
    blocked: Event | None = None
    """Of a job that is being deleted: what keeps its clean-up from running, to be told on the status and, once, as an event."""
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
