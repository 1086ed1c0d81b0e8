"""What it means when the API server does not let a child be created. Pure: from status code and message to a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from kompressor_api.failures import ADVICE
from kompressor_api.names import Reason
from kompressor_operator.conditions import Phase, Verdict
from kompressor_operator.object_meta import stamp

NAMESPACE_GOES = "is being terminated"
"""In the message of whatever is refused because its namespace is being deleted."""


@dataclass(frozen=True)
class Refusal:
    """Something that another try alone does not cure."""

    reason: Reason
    message: str
    final: bool = False
    """The spec itself is at fault, and cannot be changed."""
    judged: bool = True
    """False: whether the spec is valid cannot be told yet."""

    def verdict(self, now: datetime) -> Verdict:
        phase = Phase.FAILED if self.final else Phase.PENDING
        facts = {"completionTime": stamp(now)} if self.final else {}
        if not self.judged:
            return Verdict(phase, self.reason, self.message, validated=None, validated_message=self.message)
        return Verdict(phase, self.reason, self.message, validated=not self.final, facts=facts)


def refusal(kind: str, name: str, status: int, message: str) -> Refusal | None:
    """Judge a failed creation. None: trouble that may pass by itself, such as a busy server, so just try again."""
    said = f"{kind} {name}: {message}"
    if NAMESPACE_GOES in message:
        return None  # the namespace goes away, and the CompressionJob with it
    if status == 403 and "exceeded quota" in message:  # it counts objects, so a smaller pod would not help
        remedy = "end what else counts against that quota, or raise it; the operator tries again"
        return Refusal(Reason.QUOTA_EXCEEDED, f"{said}; {remedy}")
    if status == 403 or (status in (400, 422) and "denied the request" in message):
        return Refusal(Reason.FORBIDDEN, f"{said}; {ADVICE[Reason.FORBIDDEN]}")
    if kind == "Job" and status in (400, 422):
        where = "spec.worker, whose podTemplate is laid over spec.template here, or the claim in a pvc:// uri"
        remedy = f"correct {where}; delete this CompressionJob and apply again"
        return Refusal(Reason.INVALID_SPEC, f"{said}; {remedy}", final=True)
    if status == 422:  # the child follows from the spec alone, so another try makes the same one
        remedy = "correct what it names in spec; delete this CompressionJob and apply again"
        return Refusal(Reason.INVALID_SPEC, f"{said}; {remedy}", final=True)
    return None


def conflict(kind: str, namespace: str, name: str) -> Refusal:
    """An object of that name exists and is not ours."""
    remedy = f"delete it (`kubectl -n {namespace} delete {kind.lower()} {name}`) or apply this CompressionJob under another name"
    return Refusal(Reason.NAME_CONFLICT, f"{kind} {namespace}/{name} exists and belongs to something else; {remedy}")
