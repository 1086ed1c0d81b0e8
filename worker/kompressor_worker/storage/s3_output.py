"""The result in a bucket: multipart uploads to the final keys, working objects under WORK, config.json last."""

from __future__ import annotations

import base64
import secrets
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kompressor_worker.errors import AccessDenied, ClaimLost, OutputOccupied, StorageError
from kompressor_worker.storage import WORK, ObjectInfo, Part
from kompressor_worker.storage.body import Chunks
from kompressor_worker.storage.s3 import S3Store
from kompressor_worker.storage.s3_errors import (
    ABSENT,
    PRECONDITION,
    UNSUPPORTED,
    code_of,
    reached_store,
    status_of,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_BATCH = 1000
"""Keys in one DeleteObjects request, at most."""


class S3Output:
    """A prefix. Shards become visible as they are completed, the result exists when config.json does."""

    minimum_part = 5 << 20

    def __init__(self, store: S3Store) -> None:
        self.uri = store.place.uri
        self.conditional: bool | None = None
        self._store = store
        self._checksums = True
        """Whether the store takes CRC-32 headers; probe() finds out."""
        self._begun: set[tuple[str, str]] = set()

    # working objects

    def probe(self) -> bool:
        name = f"{WORK}probe-{secrets.token_hex(8)}"
        try:
            self.conditional = self._honours_conditions(name)
        except _Unsupported:
            self._checksums = False
            try:
                self.conditional = self._honours_conditions(name)
            except _Unsupported:
                self.conditional = False
                self.write(name, b"2")
        finally:
            self.delete([name])
        return self.conditional

    def _honours_conditions(self, name: str) -> bool:
        self._put(name, b"1", {"IfNoneMatch": "*"}, probing=True)
        for condition in ({"IfNoneMatch": "*"}, {"IfMatch": '"00000000000000000000000000000000"'}):
            try:
                self._put(name, b"2", condition, probing=True)
                return False
            except ClaimLost:
                pass
        return True

    def existing(self) -> dict[str, ObjectInfo]:
        return {info.name: info for info in self._store.list() if not info.name.startswith(WORK)}

    def read_published(self, name: str) -> bytes:
        return self._store.get(name)[0]

    def read(self, name: str) -> tuple[bytes, str] | None:
        return self._store.get_or_none(name)

    def write(self, name: str, data: bytes) -> None:
        self._put(name, data, {})

    def replace(self, name: str, data: bytes, etag: str | None) -> str:
        if self.conditional is False:
            found = self.read(name)
            if (found[1] if found else None) != etag:
                raise self._lost(name)
            return self._put(name, data, {})
        return self._put(name, data, {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag})

    def delete(self, names: Sequence[str]) -> None:
        keys = [self._store.key(name) for name in names]
        if len(keys) > 8:
            keys = [key for start in range(0, len(keys), _BATCH) for key in self._delete_batch(keys[start : start + _BATCH])]
        for key in keys:
            self._store.call(f"deleting {key}", lambda s3, key=key: s3.delete_object(Bucket=self._store.bucket, Key=key))  # type: ignore[misc]

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
        extra = {"ChecksumAlgorithm": "CRC32"} if self._checksums else {}
        answer = self._store.call(
            f"starting the upload of {self._store.key(name)}",
            lambda s3: s3.create_multipart_upload(Bucket=self._store.bucket, Key=self._store.key(name), **extra),  # type: ignore[arg-type]
        )
        upload = answer["UploadId"]
        self._begun.add((name, upload))
        return upload

    def upload_exists(self, name: str, upload: str, parts: Sequence[Part]) -> bool:
        found: dict[int, tuple[int, str]] = {}
        marker = 0

        def failed(error: BaseException) -> None:
            if code_of(error) == "NoSuchUpload" or code_of(error) in ABSENT:
                raise _NoUpload

        while True:
            try:
                page: Any = self._store.call(
                    f"looking at the upload of {self._store.key(name)}",
                    lambda s3: s3.list_parts(
                        Bucket=self._store.bucket,
                        Key=self._store.key(name),
                        UploadId=upload,
                        PartNumberMarker=marker,  # noqa: B023
                    ),
                    failed,
                )
            except _NoUpload:
                return False
            found |= {part["PartNumber"]: (part["Size"], part["ETag"]) for part in page.get("Parts", ())}
            if not page.get("IsTruncated"):
                break
            marker = page["NextPartNumberMarker"]
        return all(found.get(part.number) == (part.size, part.etag.split(";")[0]) for part in parts)

    def write_part(self, name: str, upload: str, number: int, offset: int, chunks: Sequence[memoryview]) -> Part:
        body = Chunks(chunks)
        crc = _encoded(body.crc32()) if self._checksums else None
        extra = {"ChecksumCRC32": crc} if crc else {}

        def send(s3: S3Client) -> Any:
            body.seek(0)
            return s3.upload_part(
                Bucket=self._store.bucket,
                Key=self._store.key(name),
                UploadId=upload,
                PartNumber=number,
                Body=body,
                ContentLength=len(body),
                **extra,  # type: ignore[arg-type]
            )

        def failed(error: BaseException) -> None:
            if code_of(error) == "NoSuchUpload":
                raise ClaimLost(
                    f"{self.uri}: the upload of {name} is gone: another worker owns this output and ended it, or a lifecycle rule of "
                    "the bucket did; the next worker finds out and does it again"
                ) from error

        answer = self._store.call(f"writing part {number} of {self._store.key(name)}", send, failed)
        return Part(number, offset, len(body), answer["ETag"] + (f";{crc}" if crc else ""))

    def complete(self, name: str, upload: str, parts: Sequence[Part]) -> None:
        size = sum(part.size for part in parts)
        if not parts:  # S3 knows no upload without parts
            self.write(name, b"")
            self.abort(name, upload)
            return
        listed: Any = {"Parts": [_completed(part) for part in sorted(parts, key=lambda part: part.number)]}

        def failed(error: BaseException) -> None:
            if code_of(error) == "NoSuchUpload":
                raise _NoUpload

        gone = False
        try:
            self._store.call(
                f"completing {self._store.key(name)}",
                lambda s3: s3.complete_multipart_upload(
                    Bucket=self._store.bucket, Key=self._store.key(name), UploadId=upload, MultipartUpload=listed
                ),
                failed,
            )
        except _NoUpload:
            gone = True
        found = self._size(name)
        if found != size:
            raise StorageError(
                f"{self.uri}: {name} should hold {size} bytes after its upload, but "
                f"{'is not there' if found is None else f'holds {found}'}{' and its upload is gone' if gone else ''}; start again"
            )
        self._begun.discard((name, upload))

    def abort(self, name: str, upload: str) -> None:
        self._abort(self._store.key(name), upload)
        self._begun.discard((name, upload))

    def _abort(self, key: str, upload: str) -> None:
        def failed(error: BaseException) -> None:
            if code_of(error) == "NoSuchUpload" or code_of(error) in ABSENT:
                raise _NoUpload

        try:
            self._store.call(
                f"aborting the upload of {key}",
                lambda s3: s3.abort_multipart_upload(Bucket=self._store.bucket, Key=key, UploadId=upload),
                failed,
            )
        except _NoUpload:
            pass

    def _size(self, name: str) -> int | None:
        def absent(error: BaseException) -> None:
            if code_of(error) in ABSENT or status_of(error) == 404:
                raise _NoUpload

        try:
            answer = self._store.call(
                f"looking at {self._store.key(name)}",
                lambda s3: s3.head_object(Bucket=self._store.bucket, Key=self._store.key(name)),
                absent,
            )
        except _NoUpload:
            return None
        return answer["ContentLength"]

    # the end

    def publish(self, name: str, data: bytes) -> None:
        try:
            if self.conditional is False:
                if self.read(name) is not None:
                    raise self._lost(name)
                self._put(name, data, {})
            else:
                self._put(name, data, {"IfNoneMatch": "*"})
        except ClaimLost:
            found = self.read(name)
            if found is None or found[0] != data:
                raise OutputOccupied(f"{self.uri}: somebody else has published {name} here; choose another output, or remove it") from None

    def cleanup(self) -> None:
        self.delete([info.name for info in self._store.list(WORK)])
        for key, upload in self._leftovers():
            self._abort(key, upload)

    def _leftovers(self) -> list[tuple[str, str]]:
        """Uploads begun here and not ended, also by workers before this one: straight below the prefix only, deeper keys may be
        another output's."""
        found = [(self._store.key(name), upload) for name, upload in self._begun]
        marker: dict[str, str] = {}

        def failed(error: BaseException) -> None:
            if code_of(error) in UNSUPPORTED or status_of(error) == 501:
                raise _Unsupported from error

        while True:
            try:
                page: Any = self._store.call(
                    "listing uploads",
                    lambda s3: s3.list_multipart_uploads(Bucket=self._store.bucket, Prefix=self._store.prefix, **marker),  # type: ignore[arg-type]  # noqa: B023
                    failed,
                )
            except (_Unsupported, AccessDenied):  # an unpublished upload costs money, not correctness
                return found
            for entry in page.get("Uploads", ()):
                if "/" not in entry["Key"].removeprefix(self._store.prefix):
                    found.append((entry["Key"], entry["UploadId"]))
            if not page.get("IsTruncated"):
                return found
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    # inside

    def _put(self, name: str, data: bytes, condition: dict[str, str], probing: bool = False) -> str:
        """PutObject under a condition; returns the ETag. Raises ClaimLost where the condition does not hold.

        A failed try may have been done, with only its answer lost: then the condition fails on the next one, although we hold the object.
        """
        extra = dict(condition)
        if self._checksums:
            extra["ChecksumCRC32"] = _encoded(zlib.crc32(data))
        doubtful = False

        def failed(error: BaseException) -> None:
            nonlocal doubtful
            if condition and (code_of(error) in PRECONDITION or code_of(error) in ABSENT):
                raise _Refused from error
            if probing and (code_of(error) in UNSUPPORTED or status_of(error) == 501):
                raise _Unsupported from error
            doubtful = doubtful or reached_store(error)

        try:
            answer = self._store.call(
                f"writing {self._store.key(name)}",
                lambda s3: s3.put_object(Bucket=self._store.bucket, Key=self._store.key(name), Body=data, **extra),  # type: ignore[arg-type]
                failed,
            )
        except _Refused as error:
            found = self.read(name) if doubtful else None
            if found is not None and found[0] == data:
                return found[1]
            raise self._lost(name) from error
        return answer["ETag"]

    def _lost(self, name: str) -> ClaimLost:
        return ClaimLost(f"{self.uri}: {name} was changed by another worker, which owns this output now; this one stops")


class _Refused(Exception):
    """A condition does not hold."""


class _NoUpload(Exception):
    """The upload, or the object, is not there."""


class _Unsupported(Exception):
    """The store does not know this kind of request."""


def _encoded(crc: int) -> str:
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def _completed(part: Part) -> dict[str, Any]:
    etag, _, crc = part.etag.partition(";")
    return {"PartNumber": part.number, "ETag": etag} | ({"ChecksumCRC32": crc} if crc else {})
