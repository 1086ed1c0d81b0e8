"""Places that a job reads and writes, and how to reach them."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import unquote, urlsplit

from pydantic import Field, StringConstraints, field_validator

from kompressor_api.fields import Flag, Model, Name, Short, Uri

__all__ = ["CaBundle", "Location", "SourceLocation", "canonical_endpoint", "canonical_uri", "refuse_overlap"]


class CaBundle(Model):
    """A certificate authority for a private endpoint."""

    config_map: Name = Field(description="ConfigMap in the job's namespace that holds the PEM bundle.")
    key: Short = Field(default="ca.crt", description="Key of the bundle.")


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
    ca_bundle: CaBundle | None = Field(default=None, description="Certificate authority of a private endpoint.")
    credentials_secret: Name | None = Field(
        default=None,
        description=(
            "Secret in the job's namespace with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), "
            "or HF_TOKEN. Default: the pod's identity."
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


def refuse_overlap(source: Location, output: Location) -> None:
    """Raises ValueError where one is the other, or lies in it."""
    if canonical_endpoint(source.endpoint) != canonical_endpoint(output.endpoint):
        return
    read, written = canonical_uri(source.uri) + "/", canonical_uri(output.uri) + "/"
    if read == written:
        raise ValueError(f"output.uri {output.uri} is the source itself; choose another prefix")
    if written.startswith(read):  # it would become part of the source
        raise ValueError(f"output.uri {output.uri} lies inside the source; choose a prefix beside it")
    if read.startswith(written):
        raise ValueError(f"model.source.uri {source.uri} lies inside the output; choose another output.uri")
