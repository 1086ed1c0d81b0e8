"""How attempts fail: each class with its exit codes, how it is retried, and what to do about it; and a remedy for every reason.

One table for the operator, the documentation and the tests. The order is that of the child Job's podFailurePolicy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from kompressor_api.names import UNCAUGHT_EXIT_CODES, ExitCode, Reason, Step

__all__ = ["ADVICE", "ANEW", "FAILURES", "KILLED", "PREFLIGHT_ADVICE", "Failure", "Retry", "advice_for", "failure_of_code"]

KILLED = 137
"""SIGKILL; only the kubelet's reason says whether it was for memory."""


class Retry(StrEnum):
    """What follows a failure."""

    NEVER = "never"
    FREE = "in place, not counted"
    IN_PLACE = "in place, counted against spec.retry.limit"
    SMALLER = "as a next attempt with a smaller memory plan, twice at most"
    NEXT = "as a next attempt, counted against spec.retry.limit"


@dataclass(frozen=True)
class Failure:
    """One class of failures."""

    title: str
    codes: tuple[int, ...]
    """Exit codes of the worker's container; none where the pod is taken away."""
    reason: Reason
    """Of the condition, unless the worker's own words name a more exact one."""
    retry: Retry
    advice: str


ANEW = "delete this CompressionJob and apply it again"
"""What it takes to change a spec."""

_CURES: Mapping[Reason, str] = {
    Reason.IMAGE_PULL_FAILED: "make that image available to the node, or create its pull secret, and the pod starts by itself",
    Reason.UNSCHEDULABLE: "add a node that fits, or free one, and the pod starts by itself",
    Reason.QUOTA_EXCEEDED: "end what else counts against the ResourceQuota, or raise it, and the pod follows by itself",
    Reason.POD_REFUSED: "allow the pod in the namespace's policy, and it follows by itself",
    Reason.CONTAINER_NOT_STARTED: "correct what is named",
}
"""What cures a job as it is, where another one would be a remedy too."""

ADVICE: Mapping[Reason, str] = {
    # the ends
    Reason.INVALID_SPEC: f"correct the manifest, {ANEW}",
    Reason.ACCESS_DENIED: "check the keys in the Secret that credentialsSecret names, and what they may read and write",
    Reason.SOURCE_NOT_FOUND: "correct model.source.uri, or upload the checkpoint",
    Reason.DATA_NOT_FOUND: "correct the dataset's uri, or upload the data",
    Reason.BAD_DATA: "correct format, field or samples of the dataset, or its files",
    Reason.DOES_NOT_FIT: f"ask for what the message says would fit (a smaller context or concurrency, more memory), {ANEW}",
    Reason.ENGINE_MISSING: (
        "name an image that has the engine in spec.worker.image or the operator's worker.image (Dockerfile, targets worker-vllm and "
        f"worker-llama-cpp), or leave evaluation.runtime out, {ANEW}"
    ),
    Reason.ENGINE_FAILED: (
        "read the end of the engine's log in the message; correct what it names and apply the job again, which measures and nothing else, "
        "or without its gates on latency and memory, which publishes"
    ),
    Reason.OUTPUT_OCCUPIED: "choose another output.uri, or remove what is there",
    Reason.OUTPUT_NOT_FOUND: "create the bucket or claim that output.uri names",
    Reason.JOURNAL_MISMATCH: "apply the job as it was begun, or remove the unfinished work with `kompressor clean`",
    Reason.CORRUPT_SOURCE: "upload the checkpoint again, and compare its digests with its origin's",
    Reason.UNSUPPORTED_MODEL: "choose passes that take this family, or another checkpoint",
    Reason.BAD_NUMERICS: "look for NaN and Inf in the checkpoint; choose a higher precision where passes overflow",
    Reason.GATE_FAILED: "choose more bits, more calibration samples or another pass, or widen the gate",
    Reason.OUT_OF_MEMORY: "raise spec.worker.resources.limits.memory",
    Reason.STORAGE_FAILED: "check that the endpoint answers and has space; apply the job again and it goes on at its last block",
    Reason.NO_SPACE_LEFT: "free space at the output, or on the worker's scratch volume, and apply the job again",
    Reason.TERMINATED: "see why the pod was stopped: node pressure, preemption, a lost node or a person",
    Reason.CLAIM_LOST: "see which other worker or job writes to the same output, and end one of them",
    Reason.PEER_LOST: "see how the other pod of the group ended; the group goes on from its last checkpoint by itself",
    Reason.GROUP_INCOMPLETE: "see that all pods of spec.worker.parallelism can be scheduled at once, and that they may reach one another",
    Reason.LOSS_NOT_FINITE: "lower distil's learning rate or raise its warm-up; the last good checkpoint is kept",
    Reason.WORKER_CRASHED: "read its log with `kubectl logs`; if the input is sound this is a bug worth a report",
    Reason.BACKOFF_LIMIT_EXCEEDED: "read the pods' logs with `kubectl logs`, and raise spec.retry.limit if the cause may pass",
    Reason.DEADLINE_EXCEEDED: "raise spec.activeDeadlineSeconds, or give it a faster node; applied again, it goes on at its last block",
    # early truth
    Reason.IMAGE_PULL_FAILED: (
        f"{_CURES[Reason.IMAGE_PULL_FAILED]}; or correct spec.worker.image (of another container: podTemplate) "
        f"or the operator's worker.image, {ANEW}"
    ),
    Reason.UNSCHEDULABLE: (
        f"{_CURES[Reason.UNSCHEDULABLE]}; or ask for less in spec.worker.resources or correct its nodeSelector or tolerations, {ANEW}"
    ),
    Reason.SECRET_MISSING: "create the Secret that is named, with its keys, in the job's namespace; the pod starts by itself then",
    Reason.QUOTA_EXCEEDED: f"{_CURES[Reason.QUOTA_EXCEEDED]}; or ask for less in spec.worker.resources, {ANEW}",
    Reason.NODE_LOST: (
        "bring the node back, or if it is dead for good delete the Node or taint it with "
        "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute, and the job goes on elsewhere"
    ),
    Reason.NAME_CONFLICT: "delete the object that is named, or apply this CompressionJob under another name",
    Reason.POD_REFUSED: f"{_CURES[Reason.POD_REFUSED]}; or change spec.worker, {ANEW}",
    Reason.CONTAINER_NOT_STARTED: f"{_CURES[Reason.CONTAINER_NOT_STARTED]}; where that is spec.worker, {ANEW}",
    Reason.CONTAINER_FAILED: (
        "read its log with `kubectl logs POD -c CONTAINER`, and correct it in spec.worker.podTemplate or in the webhook that adds it"
    ),
    Reason.CONTAINER_LINGERS: (
        "end it, such as with `kubectl exec POD -c CONTAINER -- kill 1`, and the job goes on by itself; for the next one make it a "
        "sidecar: an init container with restartPolicy: Always, which ends with the worker"
    ),
    Reason.VOLUME_NOT_MOUNTED: "create what is named in the job's namespace, or bind its claim; the pod starts by itself then",
    Reason.RECIPE_NOT_FOUND: "create the recipe that spec.recipeRef names, or correct its kind and name",
    Reason.OPERATOR_OUTDATED: (
        "the operator is older than the CRD: bring it to the same version with `helm upgrade`, and the job goes on by itself"
    ),
    Reason.FORBIDDEN: "allow it in the operator's role, or in the admission policy that is named; the operator tries again",
    Reason.RESOURCES_BELOW_PLAN: "raise spec.worker.resources to what the plan estimates, or expect smaller memory plans",
    Reason.CLEANUP_FAILED: "delete what is left at output.uri by hand",
}
"""What to do, one sentence for every reason that can end a job or hold it up."""

PREFLIGHT_ADVICE: Mapping[Reason, str] = {
    Reason.IMAGE_PULL_FAILED: (
        f"{_CURES[Reason.IMAGE_PULL_FAILED]}; or correct the operator's planner.image, or where that is empty spec.worker.image, {ANEW}"
    ),
    Reason.UNSCHEDULABLE: f"{_CURES[Reason.UNSCHEDULABLE]}; or correct spec.worker.tolerations, or set preflight to Skip, {ANEW}",
    Reason.QUOTA_EXCEEDED: _CURES[Reason.QUOTA_EXCEEDED],
}
"""What to do about a preflight's pod, where it differs: it has image, size and nodes of its own."""


def advice_for(reason: Reason, step: Step) -> str:
    """What to do where a pod of this step is held up. That of a clean-up belongs to a job that is never applied again."""
    others = {Step.PREFLIGHT: PREFLIGHT_ADVICE, Step.CLEANUP: _CURES}
    return others.get(step, ADVICE).get(reason, ADVICE[reason])


def _failure(title: str, reason: Reason, retry: Retry, *codes: int) -> Failure:
    return Failure(title, tuple(int(code) for code in codes), reason, retry, ADVICE[reason])


FAILURES: tuple[Failure, ...] = (
    _failure("evicted, preempted, or its node is gone", Reason.TERMINATED, Retry.FREE),
    _failure("terminated", Reason.TERMINATED, Retry.FREE, ExitCode.TERMINATED),
    _failure("another pod of the group went away", Reason.PEER_LOST, Retry.FREE, ExitCode.PEER_LOST),
    _failure("user error", Reason.INVALID_SPEC, Retry.NEVER, ExitCode.USER_ERROR),
    _failure("corrupt source", Reason.CORRUPT_SOURCE, Retry.NEVER, ExitCode.CORRUPT_SOURCE),
    _failure("bad numerics", Reason.BAD_NUMERICS, Retry.NEVER, ExitCode.BAD_NUMERICS),
    _failure("gate failed", Reason.GATE_FAILED, Retry.NEVER, ExitCode.GATE_FAILED),
    _failure("out of memory", Reason.OUT_OF_MEMORY, Retry.SMALLER, ExitCode.OUT_OF_MEMORY),
    _failure("killed, but not for memory", Reason.WORKER_CRASHED, Retry.NEXT, KILLED),
    _failure("transient storage", Reason.STORAGE_FAILED, Retry.IN_PLACE, ExitCode.STORAGE),
    _failure("uncaught", Reason.WORKER_CRASHED, Retry.IN_PLACE, *UNCAUGHT_EXIT_CODES),
)


def failure_of_code(code: int) -> Failure:
    """The class of an exit code other than 0; an unknown one is uncaught."""
    return next((failure for failure in FAILURES if code in failure.codes), FAILURES[-1])
