"""`kompressor.io/v1alpha1`: the spec and status of a CompressionJob, as pydantic models.

The CRD is generated from these models (`make crds`), `kompressor run` validates with them, and the operator does the
same, so there is one truth. Every field's description is what `kubectl explain` prints. Unknown names are refused,
never dropped. The parameters of a pass live beside its maths in the worker; here a pass is one name and an opaque
object.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from kompressor_api.fields import Count, Flag, Message, Model, Name, Short, Text, Time, Uri, Warnings
from kompressor_api.pod import PlainDict, Resources, Toleration

__all__ = [
    "CaBundle",
    "CompressionJobSpec",
    "CompressionJobStatus",
    "Location",
    "Model",
    "ModelSpec",
    "Name",
    "OutputSpec",
    "PassEntry",
    "Progress",
    "Result",
    "RetrySpec",
    "Short",
    "SourceLocation",
    "StatusCondition",
    "Uri",
    "WorkerSpec",
    "canonical_endpoint",
    "canonical_uri",
]


class CaBundle(Model):
    """A certificate authority for a private endpoint."""

    config_map: Name = Field(description="ConfigMap in the job's namespace that holds the PEM bundle.")
    key: Short = Field(default="ca.crt", description="Key of the bundle in the ConfigMap.")


class Location(Model):
    """A place in object storage, on a hub or on a volume, and how to reach it."""

    uri: Uri = Field(description="s3://bucket/prefix, hf://owner/name, pvc://claim/path; file:///path outside a cluster only.")
    endpoint: Annotated[str, StringConstraints(pattern=r"^https?://.+$", max_length=512)] | None = Field(
        default=None, description="URL of an S3-compatible server, or of a hub mirror. Default: AWS, or the public hub."
    )
    region: Short | None = Field(default=None, description="Region of the bucket. Default: what the environment says, else us-east-1.")
    path_style: Flag | None = Field(
        default=None,
        description="Address buckets as endpoint/bucket rather than bucket.endpoint. Default: true with an endpoint.",
    )
    ca_bundle: CaBundle | None = Field(default=None, description="Certificate authority of the endpoint, if it is a private one.")
    credentials_secret: Name | None = Field(
        default=None,
        description=(
            "Secret in the job's namespace with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), "
            "or HF_TOKEN. Default: the identity of the worker's pod."
        ),
    )

    @field_validator("uri")
    @classmethod
    def _leads_nowhere_else(cls, uri: str) -> str:
        if ".." in canonical_uri(uri).split("/"):
            raise ValueError(f"{uri}: '..' gives one place two names; write the place that it leads to")
        return uri


class SourceLocation(Location):
    """Where the checkpoint is read from."""

    revision: Short | None = Field(
        default=None,
        description="Branch, tag or commit on a hub; pinned to a commit when the job starts. Default: main.",
    )


class ModelSpec(Model):
    """The model to compress."""

    source: SourceLocation = Field(description="The checkpoint: config.json and safetensors files.")


class OutputSpec(Location):
    """Where the result is written. Readers see nothing there until all of it is there."""

    format: Literal["compressed-tensors"] = Field(
        default="compressed-tensors",
        description="File format of the result: compressed-tensors (vLLM, SGLang, transformers).",
    )

    @field_validator("uri")
    @classmethod
    def _writable(cls, uri: str) -> str:
        if uri.startswith("hf://"):
            raise ValueError(f"output {uri}: a hub is read-only here; use s3:// or pvc://")
        return uri


class WorkerSpec(Model):
    """The pod that does the work."""

    image: Annotated[str, StringConstraints(min_length=1, max_length=512)] | None = Field(
        default=None, description="Worker image. Default: the one the operator was installed with."
    )
    resources: Annotated[dict[str, Any], PlainDict(Resources)] = Field(
        default_factory=dict, description="Requests and limits of the worker's container, as in a Pod."
    )
    node_selector: dict[Short, Short] = Field(default_factory=dict, max_length=32, description="Labels that the worker's node must have.")
    tolerations: list[Annotated[dict[str, Any], PlainDict(Toleration)]] = Field(
        default_factory=list, max_length=32, description="Taints that the worker's pod tolerates, as in a Pod."
    )
    service_account_name: Name | None = Field(
        default=None,
        description="Existing service account for the pod (workload identity). Default: one made for this job alone.",
    )


class RetrySpec(Model):
    """What happens when a worker fails for a reason that may pass."""

    limit: Count = Field(
        default=4,
        ge=0,
        le=100,
        description="Failed pods tolerated before the job is Failed; preemption is not counted.",
    )


PassEntry = Annotated[dict[str, dict[str, Any]], Field(min_length=1, max_length=1)]


class CompressionJobSpec(Model):
    """Model, passes and output. Immutable but for suspend, retry and ttlSecondsAfterFinished."""

    model: ModelSpec = Field(description="The model to compress.")
    output: OutputSpec = Field(description="Where the result is written, and in which format.")
    passes: list[PassEntry] = Field(
        min_length=1,
        max_length=16,
        description="What to do, in this order; each entry has exactly one key, the name of a pass.",
    )
    worker: WorkerSpec = Field(default_factory=WorkerSpec, description="The pod that does the work.")
    suspend: Flag = Field(default=False, description="Stop the worker at its last committed block; false goes on from there.")
    retry: RetrySpec = Field(default_factory=RetrySpec, description="How failures that may pass are retried.")
    ttl_seconds_after_finished: Count | None = Field(
        default=None,
        ge=0,
        le=31536000,
        description="Seconds from the end until the child Job is removed; the CompressionJob stays. Default: never.",
    )

    @model_validator(mode="after")
    def _source_and_output_are_apart(self) -> CompressionJobSpec:
        if canonical_endpoint(self.model.source.endpoint) != canonical_endpoint(self.output.endpoint):
            return self
        source, output = canonical_uri(self.model.source.uri) + "/", canonical_uri(self.output.uri) + "/"
        if source == output:
            raise ValueError(f"output.uri {self.output.uri} is the source itself; choose another prefix")
        if output.startswith(source):  # it would become part of the source
            raise ValueError(f"output.uri {self.output.uri} lies inside the source; choose a prefix beside it")
        if source.startswith(output):
            raise ValueError(f"model.source.uri {self.model.source.uri} lies inside the output; choose another output.uri")
        return self


class StatusCondition(BaseModel):
    """One observation, as in every Kubernetes resource."""

    model_config = ConfigDict(extra="allow")
    type: Short = Field(description="Ready, Reconciling, Stalled, Validated, Suspended, Complete or Failed.")
    status: Literal["True", "False", "Unknown"] = Field(description="True, False or Unknown.")
    reason: Short = Field(description="CamelCase reason of the last transition.")
    message: Message = Field(default="", description="What happened, and what to do about it.")
    lastTransitionTime: Time = Field(description="When the status last changed.")
    observedGeneration: int | None = Field(default=None, description="The generation that this condition speaks of.")


class Progress(BaseModel):
    """How far the worker is; written by the worker."""

    model_config = ConfigDict(extra="allow")
    percent: int | None = Field(default=None, ge=0, le=100, description="Share of the source's bytes that are done, in percent.")
    unit: Short | None = Field(default=None, description="What is being compressed now, such as model.layers.7.")
    unitsDone: int | None = Field(default=None, description="Units (embeddings, blocks, head) committed.")
    unitsTotal: int | None = Field(default=None, description="Units in the model.")
    bytesRead: int | None = Field(default=None, description="Bytes of the source that are done.")
    bytesTotal: int | None = Field(default=None, description="Bytes of the source.")
    bytesPerSecond: int | None = Field(default=None, description="Source bytes per second, since this worker started.")
    etaSeconds: int | None = Field(default=None, description="Estimated seconds to the end.")
    updatedAt: Time | None = Field(default=None, description="When the worker last said so.")


class Result(BaseModel):
    """What came out; written by the worker when the output is published."""

    model_config = ConfigDict(extra="allow")
    uri: Text | None = Field(default=None, description="Where the result is.")
    sourceBytes: int | None = Field(default=None, description="Tensor bytes of the source.")
    outputBytes: int | None = Field(default=None, description="Tensor bytes of the result.")
    ratio: Text | None = Field(default=None, description="sourceBytes / outputBytes, such as 3.6x.")
    quantizedTensors: int | None = Field(default=None, description="Linear layers quantised.")
    relativeError: Text | None = Field(
        default=None, description="Root of squared weight error over squared weights, all quantised layers together."
    )
    sourceDigest: Text | None = Field(default=None, description="Digest of the source's files and headers.")
    resultDigest: Text | None = Field(default=None, description="Digest over the digests of all published tensors.")
    resumedFromUnit: int | None = Field(default=None, description="The unit at which the last worker went on; absent if undisturbed.")
    seconds: int | None = Field(default=None, description="Wall-clock seconds of the last worker.")
    warnings: Warnings | None = Field(default=None, description="What the report warns of.")


class CompressionJobStatus(BaseModel):
    """What is true now. Conditions follow kstatus; phase is for people."""

    model_config = ConfigDict(extra="allow")
    observedGeneration: int = Field(default=-1, description="The generation that the conditions speak of.")
    phase: Short | None = Field(default=None, description="One word for people; nothing decides on it.")
    conditions: list[StatusCondition] = Field(
        default_factory=list,
        max_length=16,
        description="Ready, Reconciling, Stalled, Validated, Suspended, Complete, Failed.",
    )
    jobName: Short | None = Field(default=None, description="The child Job of the current attempt.")
    attempt: int | None = Field(default=None, description="The current attempt; a new Job each.")
    retries: int | None = Field(default=None, description="Pods of the current Job that failed.")
    startTime: Time | None = Field(default=None, description="When the first child Job was created.")
    completionTime: Time | None = Field(default=None, description="When the job ended.")
    specDigest: Text | None = Field(default=None, description="Digest of the spec that the worker was given.")
    progress: Progress | None = Field(default=None, description="How far the worker is; written by the worker.")
    result: Result | None = Field(default=None, description="What came out; written by the worker.")


def canonical_uri(uri: str) -> str:
    """The same place has one spelling: no trailing, doubled or dotted slashes; on volumes, where a path is a URL's, no percent signs."""
    scheme, _, rest = uri.partition("://")
    authority, _, path = rest.partition("/")
    if scheme in ("pvc", "file"):
        path = unquote(path)
    return "/".join([f"{scheme}://{authority}", *(part for part in path.split("/") if part not in ("", "."))])


def canonical_endpoint(endpoint: str | None) -> str:
    """The same server has one spelling: small letters, no default port, no slash at its end."""
    parts = urlsplit((endpoint or "").lower())
    default = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
    path = "/".join(part for part in parts.path.split("/") if part)
    return f"{parts.scheme}://{parts.netloc.removesuffix(default)}/{path}"
