"""A job's recipe: read once, merged into what the job says itself, and fixed in the job's immutable ConfigMap."""

from __future__ import annotations

from dataclasses import dataclass

from kompressor_api.names import Reason
from kompressor_operator.cluster import Cluster
from kompressor_operator.conditions import Phase, Verdict
from kompressor_operator.decide import Decision, View
from kompressor_operator.observed import CompressionJob, Manifest, stamp
from kompressor_operator.refusals import Refusal


@dataclass(frozen=True)
class Resolved:
    """The spec as the worker is told, and what status.recipe is to say."""

    spec: Manifest
    recipe: Manifest | None = None


def resolve(view: View) -> Decision | None:
    """A job with a recipe says so rather than run without it."""
    if not view.job.spec.get("recipeRef") or view.observed.jobs or view.resolved is not None:
        return None
    message = "spec.recipeRef: this operator reads no recipes; write the recipe's passes into spec.passes"
    facts = {"completionTime": stamp(view.now)}
    return Decision(verdict=Verdict(Phase.FAILED, Reason.INVALID_SPEC, message, validated=False, facts=facts))


async def fetch(cluster: Cluster, job: CompressionJob) -> Resolved | Refusal:
    """Asked for by `Decision.resolve`. A refusal goes to the status; if it is not final, it is tried again. Raises ApiError."""
    return Resolved(job.spec)
