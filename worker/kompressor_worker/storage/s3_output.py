"""The result in a bucket: shards are multipart uploads to their final keys, working objects lie under WORK, config.json comes last."""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from kompressor_worker.errors import ClaimLost, OutputOccupied
from kompressor_worker.storage import JOURNAL, WORK, ObjectInfo, Part
from kompressor_worker.storage.s3 import S3Source, S3Store
from kompressor_worker.storage.s3_errors import ABSENT, PRECONDITION, UNSUPPORTED, code_of, may_be_done, status_of
from kompressor_worker.storage.s3_uploads import Uploads, encoded

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_BATCH = 1000
"""Keys in one DeleteObjects request, at most."""
_SINGLY = 8
"""Up to so many keys are deleted one by one, which every store can."""


class S3Output:
    """A prefix. Shards become visible as they are completed, the result exists when config.json does."""

    minimum_part = 5 << 20
    local = False

    def __init__(self, store: S3Store) -> None:
        self.uri = store.place.uri
        self.conditional: bool | None = None
        self._store = store
        self._uploads = Uploads(store)

    # working objects

    def place(self, name: str) -> str:
        return f"{self.uri.rstrip('/')}/{name}"

    def inner(self, name: str) -> S3Output:
        made = S3Output(self._store.below(f"{WORK}{name}"))
        made.conditional, made._uploads.checksums = self.conditional, self._uploads.checksums
        return made

    def as_source(self) -> S3Source:
        return S3Source(self._store)

    def probe(self) -> bool:
        name = f"{WORK}probe-{secrets.token_hex(8)}"
        try:
            self.conditional = self._honours_conditions(name)
        except _Unsupported:
            self._uploads.checksums = False
            try:
                self.conditional = self._honours_conditions(name)
            except _Unsupported:
                self.conditional = False
                self.write(name, b"2")
        self.delete([name])
        return self.conditional

    def _honours_conditions(self, name: str) -> bool:
        self._put(name, b"1", {"IfNoneMatch": "*"}, probing=True)
        for condition in ({"IfNoneMatch": "*"}, {"IfMatch": '"00000000000000000000000000000000"'}):
            try:
                self._put(name, b"2", condition, probing=True)
            except ClaimLost:
                continue
            return False
        return True

    def existing(self) -> dict[str, ObjectInfo]:
        return {info.name: info for info in self._store.list() if not info.name.startswith(WORK)}

    def room(self) -> int | None:
        return None

    def read_published(self, name: str) -> bytes:
        return self._store.get(name)[0]

    def read(self, name: str) -> tuple[bytes, str] | None:
        return self._store.get_or_none(name)

    def write(self, name: str, data: bytes) -> None:
        self._put(name, data, {})

    def replace(self, name: str, data: bytes, etag: str | None) -> str:
        if self.conditional is not False:
            return self._put(name, data, {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag})
        found = self.read(name)
        if (found[1] if found else None) != etag:
            raise self._lost(name)
        return self._put(name, data, {})

    def delete(self, names: Sequence[str]) -> None:
        keys = [self._store.key(name) for name in names]
        if len(keys) > _SINGLY:
            batches = [keys[start : start + _BATCH] for start in range(0, len(keys), _BATCH)]
            keys = [key for batch in batches for key in self._delete_batch(batch)]
        for key in keys:
            self._store.call(f"deleting {key}", partial(self._delete_one, key=key))

    def _delete_one(self, s3: S3Client, key: str) -> None:
        s3.delete_object(Bucket=self._store.bucket, Key=key)

    def _delete_batch(self, keys: list[str]) -> list[str]:
        """Deletes many keys with one request; returns those that must be deleted one by one."""
        objects: Any = {"Objects": [{"Key": key} for key in keys], "Quiet": True}

        def failed(error: BaseException) -> None:
            if code_of(error) in UNSUPPORTED | {"MissingContentMD5", "InvalidDigest"}:
                raise _Unsupported from error

        try:
            answer = self._store.call(
                f"deleting {len(keys)} objects", lambda s3: s3.delete_objects(Bucket=self._store.bucket, Delete=objects), failed
            )
        except _Unsupported:
            return keys
        return [error["Key"] for error in answer.get("Errors", ()) if error.get("Code") not in ABSENT]

    # uploads

    def begin(self, name: str, size: int) -> str:
        return self._uploads.begin(name)

    def upload_exists(self, name: str, upload: str, parts: Sequence[Part]) -> bool:
        return self._uploads.exists(name, upload, parts)

    def write_part(self, name: str, upload: str, number: int, offset: int, chunks: Sequence[memoryview]) -> Part:
        return self._uploads.write(name, upload, number, offset, chunks)

    def complete(self, name: str, upload: str, parts: Sequence[Part]) -> None:
        if parts:
            self._uploads.complete(name, upload, parts)
        else:  # S3 knows no upload without parts
            self.write(name, b"")
            self._uploads.abort(name, upload)

    def abort(self, name: str, upload: str) -> None:
        self._uploads.abort(name, upload)

    # the end

    def publish(self, name: str, data: bytes) -> None:
        try:
            self.replace(name, data, None)
        except ClaimLost:
            found = self.read(name)
            if found is None or found[0] != data:
                raise OutputOccupied(f"{self.uri}: somebody else has published {name} here; choose another output, or remove it") from None

    def unpublish(self, names: Sequence[str]) -> None:
        self.delete(names)

    def cleanup(self, keep: Sequence[str] = ()) -> None:
        for name, upload in self._uploads.leftovers():
            self._uploads.abort(name, upload)
        names = [info.name for info in self._store.list(WORK) if info.name not in keep]
        self.delete(sorted(names, key=lambda name: name == JOURNAL))

    # inside

    def _put(self, name: str, data: bytes, condition: dict[str, str], probing: bool = False) -> str:
        """PutObject under a condition; returns the ETag. Raises ClaimLost where the condition does not hold.

        A try that failed may have been done, with only its answer lost: then the next one finds the condition broken by ourselves, and
        the object tells.
        """
        extra: dict[str, Any] = dict(condition)
        if self._uploads.checksums:
            extra["ChecksumCRC32"] = encoded(zlib.crc32(data))
        doubtful = False

        def failed(error: BaseException) -> None:
            nonlocal doubtful
            if condition and (code_of(error) in PRECONDITION or code_of(error) in ABSENT):
                raise _Refused from error
            if probing and (code_of(error) in UNSUPPORTED or status_of(error) == 501):
                raise _Unsupported from error
            doubtful = doubtful or may_be_done(error)

        try:
            return self._store.call(
                f"writing {self._store.key(name)}",
                lambda s3: s3.put_object(Bucket=self._store.bucket, Key=self._store.key(name), Body=data, **extra),
                failed,
            )["ETag"]
        except _Refused as error:
            found = self.read(name) if doubtful else None
            if found is not None and found[0] == data:
                return found[1]
            raise self._lost(name) from error

    def _lost(self, name: str) -> ClaimLost:
        return ClaimLost(f"{self.uri}: {name} was changed by another worker, which owns this output now; this one stops")


class _Refused(Exception):
    """A condition does not hold."""


class _Unsupported(Exception):
    """The store does not know this kind of request."""
