"""Every name that operator, worker, chart and tests must agree on."""

from __future__ import annotations

from enum import IntEnum, StrEnum

GROUP = "kompressor.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "CompressionJob"
PLURAL = "compressionjobs"
SHORT_NAME = "kcj"
RECIPE_KIND = "CompressionRecipe"
RECIPE_PLURAL = "compressionrecipes"
RECIPE_SHORT_NAME = "kcr"
CLUSTER_RECIPE_KIND = "ClusterCompressionRecipe"
CLUSTER_RECIPE_PLURAL = "clustercompressionrecipes"
CLUSTER_RECIPE_SHORT_NAME = "kccr"
TOP_LEVEL = ("apiVersion", "kind", "metadata", "spec", "status")
"""All that a manifest may have at its top."""

LABEL_JOB_UID = f"{GROUP}/job-uid"
"""On every child: the CompressionJob's uid; also the watch selector of child Jobs and Pods."""
LABEL_ATTEMPT = f"{GROUP}/attempt"
LABEL_STEP = f"{GROUP}/step"
"""On a child Job and its pods: a Step. Those of older releases lack it and compress."""
LABEL_GROUP = f"{GROUP}/group"
"""On the pods of a group, and on its Job: how many pods it has. Others lack it."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
"""On the child Job that compresses, never on its pods."""
QUEUE_GROUP = "kueue.x-k8s.io"
FINALIZER = f"{GROUP}/cleanup"
"""Only with deletionPolicy Delete, put on before the first child."""
ANNOTATION_MEMORY_PLAN = f"{GROUP}/memory-plan"
"""On a child Job: how many times smaller than usual its memory plan is; 0 for the first try, so the Jobs alone tell the history."""
ANNOTATION_FAILURES_BEFORE = f"{GROUP}/failures-before"
"""On a child Job: the failures of earlier attempts that counted against `retry.limit`."""
LABEL_NAME = "app.kubernetes.io/name"
LABEL_INSTANCE = "app.kubernetes.io/instance"
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGED_BY = "kompressor-operator"
FIELD_MANAGER = "kompressor-operator"
WORKER_FIELD_MANAGER = "kompressor-worker"

MUTABLE = ("suspend", "retry", "ttlSecondsAfterFinished")
"""The fields of a spec that may change while the job lives; everything else is in its digest."""

WORKER_CONTAINER = "worker"
"""The preflight's and the clean-up's are called alike, so that failure rules and parsing are the same."""
JOB_DIRECTORY = "/etc/kompressor/job"
JOB_FILE = "job.json"
"""The job's immutable ConfigMap: one key `job.json`, mounted at JOB_DIRECTORY; {apiVersion, kind, metadata, spec}."""
CA_DIRECTORY = "/etc/kompressor/ca"
"""A location's caBundle is mounted at CA_DIRECTORY/<role>/<key>."""
CLAIM_DIRECTORY = "/var/run/kompressor/claims"
"""pvc://CLAIM/path is CLAIM_DIRECTORY/CLAIM/path in the worker's pod; the operator mounts the claim there."""
SCRATCH_DIRECTORY = "/var/cache/kompressor"
"""A writable emptyDir: kernel, Triton, Inductor and Hugging Face caches; HOME points at it too."""
SHARED_MEMORY_DIRECTORY = "/dev/shm"
TERMINATION_LOG = "/dev/termination-log"

ENV_POD_UID = "KOMPRESSOR_POD_UID"
ENV_POD_NAME = "POD_NAME"
ENV_POD_NAMESPACE = "POD_NAMESPACE"
ENV_MEMORY_PLAN = "KOMPRESSOR_MEMORY_PLAN"
"""How often the worker ran out of memory before: 1 or 2; absent at first. Each step asks for a smaller memory plan."""
ENV_PODS = "KOMPRESSOR_PODS"
"""Pods of the group that trains together; absent without one, as are the next two."""
ENV_LEADER = "KOMPRESSOR_LEADER"
"""Host name of pod 0, which the others meet at."""
ENV_PORT = "KOMPRESSOR_PORT"
"""Where they meet there."""
GROUP_PORT = 29500
ENV_POD_INDEX = "JOB_COMPLETION_INDEX"
"""Which pod of the group this is, from 0; set by the Job controller."""
ENV_PROCESSES_PER_POD = "KOMPRESSOR_PROCESSES_PER_POD"
"""Training processes that a pod starts; absent where nothing is trained."""
ENV_GROUP_PATIENCE = "KOMPRESSOR_GROUP_PATIENCE"
"""Seconds that a pod waits for the others of its group. Default: GROUP_PATIENCE_SECONDS."""
GROUP_PATIENCE_SECONDS = 1800
TRAINING_PASS = "distil"
"""The one pass whose work many processes share."""
ENV_OUTPUT = "KOMPRESSOR_OUTPUT"
"""For `kompressor clean --in-cluster`: spec.output as JSON, since the job's ConfigMap may be gone already."""
ENV_JOB_UID = "KOMPRESSOR_JOB_UID"
"""For `kompressor clean --in-cluster`: whose output it may delete."""
ENV_TERMINATION_LOG = "KOMPRESSOR_TERMINATION_LOG"
ENV_CLAIM_DIRECTORY = "KOMPRESSOR_CLAIM_DIRECTORY"
ENV_CA_DIRECTORY = "KOMPRESSOR_CA_DIRECTORY"


class Step(StrEnum):
    """What a child Job is for."""

    COMPRESS = "compress"
    PREFLIGHT = "preflight"
    CLEANUP = "cleanup"


class Role(StrEnum):
    """What a location is for; its credentials come as environment variables with this prefix (`SOURCE_AWS_ACCESS_KEY_ID`)."""

    SOURCE = "source"
    OUTPUT = "output"
    DATA = "data"
    """What passes are calibrated with."""
    EVALUATION = "evaluation"
    DRIFT = "drift"
    TEACHER = "teacher"
    """Of the pass distil, as are the next three: who is learned from, where that is not the source."""
    STUDENT = "student"
    TRAINING = "training"
    """What is trained on, where that is not the calibration's."""
    LOGITS = "logits"
    """Where the teacher's logits are kept."""

    @property
    def env_prefix(self) -> str:
        return f"{self.upper()}_"


class ExitCode(IntEnum):
    """How a worker ends. The child Job's podFailurePolicy acts on these numbers."""

    DONE = 0
    USER_ERROR = 64
    """The job cannot work as written: bad spec, missing bucket, denied credentials, occupied output. Final."""
    CORRUPT_SOURCE = 65
    """The checkpoint is broken: truncated shard, overlapping offsets, missing tensor. Final."""
    BAD_NUMERICS = 66
    """NaN or Inf in weights. Final."""
    GATE_FAILED = 67
    """The result is not good enough. Final; nothing is published."""
    OUT_OF_MEMORY = 71
    """The worker saw its own allocation fail. The next attempt runs with a smaller memory plan."""
    STORAGE = 74
    """Object storage did not answer, or has no space. Retried in place; counts against `retry.limit`."""
    TERMINATED = 75
    """SIGTERM, or the claim on the output was lost; the journal is committed. Retried in place, not counted."""
    PEER_LOST = 76
    """Another pod of the group went away. Retried in place, not counted: only the pod that failed of its own counts."""


FINAL_EXIT_CODES = (ExitCode.USER_ERROR, ExitCode.CORRUPT_SOURCE, ExitCode.BAD_NUMERICS, ExitCode.GATE_FAILED)
UNCAUGHT_EXIT_CODES = (1, 2, 134, 139)


class Condition(StrEnum):
    READY = "Ready"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    VALIDATED = "Validated"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"
    CLEANUP_BLOCKED = "CleanupBlocked"
    """Only while a deletion with deletionPolicy Delete waits for something that keeps the clean-up's pod from running."""


class Reason(StrEnum):
    """Stable CamelCase reasons of conditions, events and termination messages."""

    # on the way
    PENDING = "Pending"
    PREFLIGHT = "Preflight"
    QUEUED = "Queued"
    COMPRESSING = "Compressing"
    RETRYING = "Retrying"
    SUSPENDED = "Suspended"
    RESUMED = "Resumed"
    VALID = "Valid"
    RESOURCES_BELOW_PLAN = "ResourcesBelowPlan"
    """A warning: the job's own resources are smaller than what the preflight estimates."""
    CLEANED_UP = "CleanedUp"
    CLEANUP_FAILED = "CleanupFailed"
    # early truth: still Reconciling, something outside must change
    IMAGE_PULL_FAILED = "ImagePullFailed"
    UNSCHEDULABLE = "Unschedulable"
    SECRET_MISSING = "SecretMissing"
    QUOTA_EXCEEDED = "QuotaExceeded"
    NODE_LOST = "NodeLost"
    NAME_CONFLICT = "NameConflict"
    POD_REFUSED = "PodRefused"
    """The Job controller cannot create the pod, for another reason than quota."""
    CONTAINER_NOT_STARTED = "ContainerNotStarted"
    """The kubelet cannot start the container, for another reason than image or Secret."""
    CONTAINER_FAILED = "ContainerFailed"
    """A container beside the worker's: an init container or sidecar that ends before the worker can start, or one that fails the pod."""
    CONTAINER_LINGERS = "ContainerLingers"
    """The worker has ended, and a container beside it has not: the pod goes on, and with it the Job."""
    VOLUME_NOT_MOUNTED = "VolumeNotMounted"
    RECIPE_NOT_FOUND = "RecipeNotFound"
    OPERATOR_OUTDATED = "OperatorOutdated"
    """The spec has a field that the installed CRD knows and the operator does not."""
    FORBIDDEN = "Forbidden"
    """The API server refuses what the operator asks for: its role, or an admission policy."""
    # the ends
    COMPLETED = "Completed"
    ALREADY_COMPRESSED = "AlreadyCompressed"
    INVALID_SPEC = "InvalidSpec"
    ACCESS_DENIED = "AccessDenied"
    SOURCE_NOT_FOUND = "SourceNotFound"
    DATA_NOT_FOUND = "DataNotFound"
    BAD_DATA = "BadData"
    """A dataset that is too small, or cannot be read as it is described."""
    DOES_NOT_FIT = "DoesNotFit"
    """No plan fits spec.target: known from headers, before a GPU is asked for."""
    ENGINE_MISSING = "EngineMissing"
    """evaluation.runtime names an engine that is not in the worker's image."""
    ENGINE_FAILED = "EngineFailed"
    """The engine did not measure what a gate judges."""
    OUTPUT_OCCUPIED = "OutputOccupied"
    OUTPUT_NOT_FOUND = "OutputNotFound"
    JOURNAL_MISMATCH = "JournalMismatch"
    CORRUPT_SOURCE = "CorruptSource"
    UNSUPPORTED_MODEL = "UnsupportedModel"
    BAD_NUMERICS = "BadNumerics"
    GATE_FAILED = "GateFailed"
    OUT_OF_MEMORY = "OutOfMemory"
    STORAGE_FAILED = "StorageFailed"
    NO_SPACE_LEFT = "NoSpaceLeft"
    TERMINATED = "Terminated"
    CLAIM_LOST = "ClaimLost"
    PEER_LOST = "PeerLost"
    GROUP_INCOMPLETE = "GroupIncomplete"
    """The other pods of the group did not come."""
    LOSS_NOT_FINITE = "LossNotFinite"
    WORKER_CRASHED = "WorkerCrashed"
    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
