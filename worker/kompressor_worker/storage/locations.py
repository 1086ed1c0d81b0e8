"""From a location of the API to a store: which kind, with whose credentials, which certificates, which folder."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from pydantic import ValidationError

from kompressor_api.datasets import Sample
from kompressor_api.names import (
    CA_DIRECTORY,
    CLAIM_DIRECTORY,
    ENV_CA_DIRECTORY,
    ENV_CLAIM_DIRECTORY,
    Reason,
    Role,
)
from kompressor_api.v1alpha1 import Location, SourceLocation
from kompressor_worker.errors import AccessDenied, NotFound, UserError
from kompressor_worker.storage import Output, Source, s3_environment
from kompressor_worker.storage.patience import Patience

L = TypeVar("L", bound=Location)

_FIELDS = {
    Role.SOURCE: "model.source",
    Role.OUTPUT: "output",
    Role.DATA: "calibration.dataset",
    Role.EVALUATION: "evaluation.dataset",
    Role.DRIFT: "drift.dataset",
    Role.TEACHER: "distil.teacher.source",
    Role.STUDENT: "distil.student.source",
    Role.TRAINING: "distil.dataset",
    Role.LOGITS: "distil.teacher.offline.location",
}
_MODELS = (Role.SOURCE, Role.TEACHER, Role.STUDENT)
_WRITTEN = (Role.OUTPUT, Role.LOGITS)


@dataclass(frozen=True)
class Place:
    """A location with everything looked up that the environment has to say about it."""

    role: Role
    scheme: str
    uri: str
    authority: str
    """Bucket, claim, owner of a hub repository; empty for file://."""
    path: str
    """Below the authority, without slashes at its ends."""
    endpoint: str | None
    region: str | None
    path_style: bool | None
    ca_bundle: Path | None
    credentials: Mapping[str, str]
    """AWS_ACCESS_KEY_ID and so on, HF_TOKEN; empty: the default chain of the SDK."""
    secret: str | None
    """Name of the Secret that the credentials come from, for error messages."""

    @property
    def missing(self) -> Reason:
        return _missing(self.role)

    @property
    def field(self) -> str:
        """Where it stands in the spec."""
        return _FIELDS[self.role]

    @property
    def holds(self) -> str:
        """What is looked for there, for error messages."""
        return "config.json" if self.role in _MODELS else "the data"

    @property
    def credentials_source(self) -> str:
        """For error messages: where the credentials came from, and so what to correct."""
        if self.secret is not None:
            return f"Secret {self.secret} (keys AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, HF_TOKEN)"
        if self.credentials:
            return f"the environment variables {', '.join(self.role.env_prefix + key for key in sorted(self.credentials))}"
        return "the pod's own identity (no credentialsSecret is set)"


def open_source(
    location: SourceLocation, environ: Mapping[str, str], stop: threading.Event | None = None, role: Role = Role.SOURCE
) -> Source:
    """The checkpoint's store; nothing is read yet, but a hub's revision, which is pinned here.

    `stop` ends all waiting once set: calls then raise Terminated. Raises UserError, NotFound (no claim, no such revision), AccessDenied.
    """
    place = locate(location, role, environ)
    patience = Patience.from_environ(environ, stop)
    if place.scheme == "s3":
        from kompressor_worker.storage.s3 import S3Source, S3Store

        return S3Source(S3Store(place, environ, patience))
    if place.scheme == "hf":
        from kompressor_worker.storage.hub import HubSource

        return HubSource(place, location.revision, environ, patience)
    from kompressor_worker.storage.file_source import FileSource

    root, confine = _folder(place, environ)
    return FileSource(place.uri, root, confine)


def open_data(sample: Sample, environ: Mapping[str, str], stop: threading.Event | None = None) -> Source:
    """The store of a dataset: that of one file, if the uri is a file's, or of a folder. On S3 it takes a request to find out which.

    Arguments and errors as for open_source.
    """
    place = locate(sample.dataset, sample.ROLE, environ)
    patience = Patience.from_environ(environ, stop)
    folder, _, name = place.path.rpartition("/")
    if place.scheme == "s3":
        from kompressor_worker.storage.s3 import S3Source, S3Store

        one = S3Source(S3Store(replace(place, path=folder), environ, patience), only=name)
        return one if name and one.exists() else S3Source(S3Store(place, environ, patience))
    if place.scheme == "hf":
        from kompressor_worker.storage.hub import HubSource

        return HubSource(place, sample.dataset.revision, environ, patience)
    from kompressor_worker.storage.file_source import FileSource

    root, confine = _folder(place, environ)
    if not root.exists():
        raise NotFound(f"{place.role} {place.uri}: nothing at {root}; give the file or the folder that holds the data", place.missing)
    if root.is_file():
        return FileSource(place.uri, root.parent, confine, root.name, place.holds, place.missing)
    return FileSource(place.uri, root, confine, holds=place.holds, missing=place.missing)


def open_output(location: Location, environ: Mapping[str, str], stop: threading.Event | None = None, role: Role = Role.OUTPUT) -> Output:
    """The result's store; nothing is touched yet. Arguments and errors as for open_source."""
    place = locate(location, role, environ)
    patience = Patience.from_environ(environ, stop)
    if place.scheme == "s3":
        from kompressor_worker.storage.s3 import S3Store
        from kompressor_worker.storage.s3_output import S3Output

        return S3Output(S3Store(place, environ, patience))
    if place.scheme == "hf":
        raise UserError(f"output {location.uri}: a hub is read-only here; use s3:// or pvc://")
    from kompressor_worker.storage.files import FileOutput
    from kompressor_worker.storage.posix import Disk

    root, confine = _folder(place, environ)
    if root == confine or root.parent == root:
        raise UserError(f"output {place.uri} is the root of its volume, where nothing can be renamed into place; add a folder to it")
    return FileOutput(place.uri, root, Disk(durable=place.scheme == "pvc"))


def named(kind: type[L], uri: str, endpoint: str | None, region: str | None, schemes: str) -> L:
    """The location that a person names on a command line; a path is a folder's. Raises UserError: names the argument and its value."""
    if "://" not in uri:
        uri = Path(uri).absolute().as_uri()
    try:
        return kind(uri=uri, endpoint=endpoint, region=region)
    except ValidationError as error:
        first = error.errors()[0]
        argument, said = first["loc"][0], first["msg"].removeprefix("Value error, ")
    if argument == "endpoint":
        raise UserError(f"--endpoint {endpoint}: no URL of a server ({said}); give one such as https://s3.example.org:9000")
    if argument == "region":
        raise UserError(f"--region {region}: no name of a region ({said}); give one such as us-east-1")
    raise UserError(said if uri in said else f"{uri}: {said}; give {schemes} or a path")


def locate(location: Location, role: Role, environ: Mapping[str, str]) -> Place:
    """Raises UserError (a uri that leads out of its place), NotFound (the CA bundle is not mounted), AccessDenied (half a key pair)."""
    scheme, _, rest = location.uri.partition("://")
    authority, _, path = rest.partition("/")
    if scheme in ("file", "pvc"):
        path = unquote(path)
    names = [name for name in path.split("/") if name not in ("", ".")]
    if ".." in names:
        raise UserError(f"{role} {location.uri}: '..' is refused; write the place it leads to")
    bundle = None
    if location.ca_bundle is not None:
        bundle = Path(environ.get(ENV_CA_DIRECTORY) or CA_DIRECTORY) / role.value / location.ca_bundle.key
        if not bundle.is_file():
            raise NotFound(
                f"{role} {location.uri}: no CA bundle at {bundle}; ConfigMap {location.ca_bundle.config_map} needs the key "
                f"{location.ca_bundle.key}",
                reason=_missing(role),
            )
    credentials = s3_environment(role.env_prefix, environ)
    if ("AWS_ACCESS_KEY_ID" in credentials) != ("AWS_SECRET_ACCESS_KEY" in credentials):
        prefix = role.env_prefix
        raise AccessDenied(
            f"{role} {location.uri}: of {prefix}AWS_ACCESS_KEY_ID and {prefix}AWS_SECRET_ACCESS_KEY only one is set; "
            f"give both keys in Secret {location.credentials_secret or '(credentialsSecret)'}, or neither for the pod's own identity"
        )
    return Place(
        role=role,
        scheme=scheme,
        uri=f"{scheme}://{authority}/{'/'.join(names)}".rstrip("/"),
        authority=authority,
        path="/".join(names),
        endpoint=location.endpoint,
        region=location.region,
        path_style=location.path_style,
        ca_bundle=bundle,
        credentials=credentials,
        secret=location.credentials_secret,
    )


def _missing(role: Role) -> Reason:
    if role in _WRITTEN:
        return Reason.OUTPUT_NOT_FOUND
    return Reason.SOURCE_NOT_FOUND if role in _MODELS else Reason.DATA_NOT_FOUND


def _folder(place: Place, environ: Mapping[str, str]) -> tuple[Path, Path | None]:
    """The folder of a file:// or pvc:// location, and the folder it may not lead out of."""
    if place.scheme == "file":
        return Path("/") / place.path, None
    claim = Path(environ.get(ENV_CLAIM_DIRECTORY) or CLAIM_DIRECTORY) / place.authority
    if not claim.is_dir():
        raise NotFound(
            f"{place.role} {place.uri}: claim {place.authority} is not mounted at {claim}; create the PersistentVolumeClaim in the "
            f"job's namespace, or set {ENV_CLAIM_DIRECTORY} outside a cluster",
            reason=place.missing,
        )
    root = claim / place.path
    if not root.resolve().is_relative_to(claim.resolve()):
        raise UserError(f"{place.role} {place.uri}: a link leads out of the claim, to {root.resolve()}; name a folder of the claim")
    return root, claim
