"""S3 and whatever speaks its protocol: one client a location, every request retried here, objects read by ranges.

The SDK's own retries are off: they do not cover bodies, cannot be stopped, and share one budget among all threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from kompressor_worker.errors import CorruptSource, KompressorError, NotFound, StorageError
from kompressor_worker.storage import WORK, ObjectInfo
from kompressor_worker.storage.body import fill
from kompressor_worker.storage.endpoints import endpoint_of, no_address
from kompressor_worker.storage.locations import Place
from kompressor_worker.storage.patience import Patience
from kompressor_worker.storage.s3_errors import ABSENT, PRECONDITION, code_of, is_transient, status_of, translate

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")
CONNECTIONS = 32
"""Connections kept for one location: those of all reading and writing threads, or each request would dial anew."""


@cache
def _descriptions() -> Any:
    """What botocore reads of the service from its files, once for all locations: most of what a client costs."""
    return botocore.session.get_session().get_component("data_loader")


class S3Store:
    """One location: client, bucket, prefix, and the way a request is made, retried and explained.

    Raises UserError: an endpoint that is no address."""

    def __init__(self, place: Place, environ: Mapping[str, str], patience: Patience) -> None:
        self.place = place
        self.patience = patience
        self.bucket = place.authority
        self.prefix = f"{place.path}/" if place.path else ""
        self.endpoint = endpoint_of(place, environ, "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        self._client: S3Client | None = None
        self._environ = environ
        self._lock = threading.Lock()

    @property
    def client(self) -> S3Client:
        """Raises UserError: an endpoint that the SDK refuses."""
        with self._lock:
            if self._client is None:
                try:
                    self._client = self._connect()
                except ValueError as error:  # botocore's answer to host names that no host has
                    raise no_address(self.place, "endpoint", str(self.endpoint), error) from error
            return self._client

    def _connect(self) -> S3Client:
        place, environ = self.place, self._environ
        described = botocore.session.get_session()
        described.register_component("data_loader", _descriptions())
        session = boto3.session.Session(
            botocore_session=described,
            aws_access_key_id=place.credentials.get("AWS_ACCESS_KEY_ID"),
            aws_secret_access_key=place.credentials.get("AWS_SECRET_ACCESS_KEY"),
            aws_session_token=place.credentials.get("AWS_SESSION_TOKEN"),
        )
        path_style = place.path_style if place.path_style is not None else self.endpoint is not None
        options: Any = {"addressing_style": "path" if path_style else "virtual" if place.path_style is False else "auto"}
        # A body's CRC-32, itself signed, stands for it: the SHA-256 of each byte, here and in the server, would cost a third of an upload.
        # Also without TLS, where a stranger who can change the result on its way could change the source just as well.
        options["payload_signing_enabled"] = False
        config = Config(  # type: ignore[call-arg]  # the stubs lack ignore_configured_endpoint_urls
            connect_timeout=self.patience.connect_timeout,
            read_timeout=self.patience.timeout,
            max_pool_connections=CONNECTIONS,
            retries={"total_max_attempts": 1, "mode": "standard"},
            request_checksum_calculation="when_required",  # S3Output sends its own
            response_checksum_validation="when_required",
            s3=options,
            ignore_configured_endpoint_urls=True,  # where it is, spec and environment say: no file that AWS_CONFIG_FILE names
            user_agent_extra="kompressor",
            tcp_keepalive=True,
        )
        return session.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=place.region or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or "us-east-1",
            verify=str(place.ca_bundle) if place.ca_bundle is not None else environ.get("AWS_CA_BUNDLE") or None,
            config=config,
        )

    def key(self, name: str) -> str:
        return self.prefix + name

    def below(self, name: str) -> S3Store:
        """A prefix of this one, with the same client."""
        path = f"{self.prefix}{name}"
        inside = S3Store(replace(self.place, uri=f"{self.place.uri}/{name}", path=path), self._environ, self.patience)
        inside._client = self.client
        return inside

    def call(self, what: str, request: Callable[[S3Client], T], failed: Callable[[BaseException], None] | None = None) -> T:
        """Makes a request until it is answered. `failed` sees every failure first and may raise an error of its own.

        Raises Terminated, NotFound, AccessDenied, NoSpaceLeft, UserError, StorageError.
        """
        failures = 0
        while True:
            try:
                return request(self.client)
            except KompressorError:
                raise
            except (ClientError, BotoCoreError, OSError) as error:
                failures += 1
                if failed is not None:
                    failed(error)
                if not is_transient(error) or failures >= self.patience.attempts:
                    raise translate(error, self.place, what, failures) from error
                cause = error
            self.patience.pause(failures, cause)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects below the location's prefix plus `prefix`; folder markers left out."""
        token: dict[str, Any] = {}
        while True:
            page = self.call(f"listing {self.key(prefix)}", partial(self._page, prefix=self.key(prefix), **token))
            for entry in page.get("Contents", ()):
                name = entry["Key"].removeprefix(self.prefix)
                if name and not name.endswith("/"):
                    yield ObjectInfo(name, entry["Size"], entry["ETag"])
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, s3: S3Client, prefix: str, **token: Any) -> Any:
        return s3.list_objects_v2(Bucket=self.bucket, Prefix=prefix, **token)

    def get(self, name: str) -> tuple[bytes, str]:
        """A whole object and its ETag, checked against the checksum that the store sends. Raises NotFound."""
        return self.call(f"reading {self.key(name)}", lambda s3: self._whole(s3, name))

    def get_or_none(self, name: str) -> tuple[bytes, str] | None:
        def absent(error: BaseException) -> None:
            if code_of(error) in ABSENT:
                raise _Absent from error

        try:
            return self.call(f"reading {self.key(name)}", lambda s3: self._whole(s3, name), absent)
        except _Absent:
            return None

    def size(self, name: str) -> int | None:
        """Bytes of an object, or None."""

        def absent(error: BaseException) -> None:
            if code_of(error) in ABSENT or status_of(error) == 404:
                raise _Absent from error

        try:
            return self.call(f"looking at {self.key(name)}", lambda s3: s3.head_object(Bucket=self.bucket, Key=self.key(name)), absent)[
                "ContentLength"
            ]
        except _Absent:
            return None

    def _whole(self, s3: S3Client, name: str) -> tuple[bytes, str]:
        answer = s3.get_object(Bucket=self.bucket, Key=self.key(name), ChecksumMode="ENABLED")
        return answer["Body"].read(), answer["ETag"]


class _Absent(Exception):
    """An object is not there, and that is an answer."""


class S3Source:
    """A prefix, or `only` one object of it, read by ranges; each object must stay the one that was listed."""

    def __init__(self, store: S3Store, only: str | None = None) -> None:
        self.uri = store.place.uri
        self._store = store
        self._only = only
        self._listed: dict[str, ObjectInfo] = {}

    def list(self) -> dict[str, ObjectInfo]:
        found = self._store.list() if self._only is None else self._one(self._only)
        self._listed = {info.name: info for info in found if not info.name.startswith(WORK)}
        if not self._listed:
            place = self._store.place
            raise NotFound(f"{self.uri}: nothing there; give the prefix that holds {place.holds}", reason=place.missing)
        return dict(self._listed)

    def exists(self) -> bool:
        """Whether the `only` object is there."""
        return self._only is not None and any(self._one(self._only))

    def _one(self, name: str) -> Iterator[ObjectInfo]:
        return (info for info in islice(self._store.list(name), 1) if info.name == name)  # it is the first of all keys that begin so

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        listed = self._listed.get(name)
        if start == 0 and (stop is None or (listed is not None and stop == listed.size)):
            data, etag = self._store.get(name)
            if listed is not None and etag != listed.etag:
                raise self._changed(name)
            if stop is not None and len(data) != stop:
                raise self._short(name, stop, len(data))
            return data
        if stop is None:
            stop = listed.size if listed is not None else self._store.size(name) or 0
        buffer = bytearray(stop - start)
        self.read_into(name, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        buffer = buffer.cast("B")

        def given_up(cause: BaseException, done: int, attempts: int) -> KompressorError:
            return translate(cause, self._store.place, f"reading {name} at byte {start + done}", attempts)

        stop = start + len(buffer)
        fill(buffer, lambda done: self._open(name, start + done, stop), self._store.patience, given_up)

    def path(self, name: str) -> None:
        return None

    def _open(self, name: str, start: int, stop: int) -> Any:
        """A response whose body is the bytes [start, stop)."""
        listed = self._listed.get(name)
        extra: dict[str, Any] = {"IfMatch": listed.etag} if listed is not None else {}

        def failed(error: BaseException) -> None:
            if code_of(error) in PRECONDITION or status_of(error) == 412:
                raise self._changed(name) from error
            if status_of(error) == 416:
                raise self._short(name, stop, listed.size if listed else None) from error

        answer: Any = self._store.call(
            f"reading {self._store.key(name)}",
            lambda s3: s3.get_object(Bucket=self._store.bucket, Key=self._store.key(name), Range=f"bytes={start}-{stop - 1}", **extra),
            failed,
        )
        raw = answer["Body"]._raw_stream
        sent = answer["ContentLength"]
        if answer["ResponseMetadata"]["HTTPStatusCode"] != 206 and (start or sent != stop):
            raw.close()
            at = self._store.endpoint
            raise StorageError(f"{self.uri}: the store at {at} does not honour Range, which streaming needs")
        if sent < stop - start:
            raw.close()
            raise self._short(name, stop, start + sent)
        return raw

    def _changed(self, name: str) -> CorruptSource:
        return CorruptSource(f"{self.uri}: {name} changed while it was read; let its writer end, then start again")

    def _short(self, name: str, wanted: int, size: int | None) -> CorruptSource:
        return CorruptSource(
            f"{self.uri}: {name} ends at byte {'?' if size is None else size}, but bytes up to {wanted} are wanted; "
            "it is truncated, upload it again"
        )
