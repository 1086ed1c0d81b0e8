"""Multipart uploads to the final keys: nobody sees an object before its upload is complete."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from kompressor_worker.errors import AccessDenied, ClaimLost, StorageError, UploadLost
from kompressor_worker.storage import WORK, Part
from kompressor_worker.storage.body import Chunks
from kompressor_worker.storage.s3 import S3Store
from kompressor_worker.storage.s3_errors import ABSENT, UNSUPPORTED, code_of, status_of

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


class Uploads:
    """Uploads of one output. Errors as in S3Store.call."""

    def __init__(self, store: S3Store) -> None:
        self.checksums = True
        """Whether the store takes CRC-32 headers."""
        self._store = store
        self._begun: set[tuple[str, str]] = set()

    def begin(self, name: str) -> str:
        extra: dict[str, Any] = {"ChecksumAlgorithm": "CRC32"} if self.checksums else {}
        answer = self._store.call(
            f"starting the upload of {self._store.key(name)}",
            lambda s3: s3.create_multipart_upload(Bucket=self._store.bucket, Key=self._store.key(name), **extra),
        )
        upload = answer["UploadId"]
        self._begun.add((name, upload))
        return upload

    def exists(self, name: str, upload: str, parts: Sequence[Part]) -> bool:
        """Whether the upload is there with these parts, sizes and ETags alike."""
        found: dict[int, tuple[int, str]] = {}
        marker = 0
        while True:
            try:
                page = self._store.call(
                    f"looking at the upload of {self._store.key(name)}",
                    partial(self._page_of_parts, name=name, upload=upload, marker=marker),
                    _no_upload,
                )
            except _NoUpload:
                return False
            found |= {part["PartNumber"]: (part["Size"], part["ETag"]) for part in page.get("Parts", ())}
            if not page.get("IsTruncated"):
                return all(found.get(part.number) == (part.size, part.etag.split(";")[0]) for part in parts)
            marker = page["NextPartNumberMarker"]

    def _page_of_parts(self, s3: S3Client, name: str, upload: str, marker: int) -> Any:
        return s3.list_parts(Bucket=self._store.bucket, Key=self._store.key(name), UploadId=upload, PartNumberMarker=marker)

    def write(self, name: str, upload: str, number: int, offset: int, chunks: Sequence[memoryview]) -> Part:
        """Sends one part straight from its chunks. Raises ClaimLost when the upload has gone."""
        body: Any = Chunks(chunks)  # a file to boto3, if not to its type stubs
        crc = encoded(body.crc32()) if self.checksums else ""
        extra: dict[str, Any] = {"ChecksumCRC32": crc} if crc else {}

        def send(s3: S3Client) -> str:
            body.seek(0)
            return s3.upload_part(
                Bucket=self._store.bucket,
                Key=self._store.key(name),
                UploadId=upload,
                PartNumber=number,
                Body=body,
                ContentLength=len(body),
                **extra,
            )["ETag"]

        def failed(error: BaseException) -> None:
            if code_of(error) == "NoSuchUpload":
                raise ClaimLost(
                    f"{self._store.place.uri}: the upload of {name} is gone: another worker owns this output and ended it, or a "
                    "lifecycle rule of the bucket did; the next worker finds out and does it again"
                ) from error

        etag = self._store.call(f"writing part {number} of {self._store.key(name)}", send, failed)
        return Part(number, offset, len(body), f"{etag};{crc}" if crc else etag)

    def complete(self, name: str, upload: str, parts: Sequence[Part]) -> None:
        """Ends an upload of at least one part. One that ended before is fine where the object has the size of the parts."""
        size = sum(part.size for part in parts)
        listed: Any = {"Parts": [_completed(part) for part in sorted(parts, key=lambda part: part.number)]}
        gone = False
        try:
            self._store.call(
                f"completing {self._store.key(name)}",
                lambda s3: s3.complete_multipart_upload(
                    Bucket=self._store.bucket, Key=self._store.key(name), UploadId=upload, MultipartUpload=listed
                ),
                _no_upload,
            )
        except _NoUpload:
            gone = True
        found = self._store.size(name)
        if found != size:
            holds = "is not there" if found is None else f"holds {found}"
            text = f"{self._store.place.uri}: {name} should hold {size} bytes after its upload, but {holds}"
            if gone:
                raise UploadLost(f"{text} and its upload is gone; the next worker makes it again")
            raise StorageError(f"{text}; start again")
        self._begun.discard((name, upload))

    def abort(self, name: str, upload: str) -> None:
        with contextlib.suppress(_NoUpload):
            self._store.call(
                f"aborting the upload of {self._store.key(name)}",
                lambda s3: s3.abort_multipart_upload(Bucket=self._store.bucket, Key=self._store.key(name), UploadId=upload),
                _no_upload,
            )
        self._begun.discard((name, upload))

    def leftovers(self) -> list[tuple[str, str]]:
        """(name, upload) of what was begun here and not ended, also by workers before this one.

        Theirs straight below the prefix, and among its working objects, only: deeper keys may be another output's."""
        found = set(self._begun)
        marker: dict[str, Any] = {}
        while True:
            try:
                page = self._store.call("listing uploads", partial(self._page_of_uploads, **marker), _unsupported)
            except (_Unsupported, AccessDenied):  # an upload that is left costs money, not correctness
                return sorted(found)
            names = [(entry["Key"].removeprefix(self._store.prefix), entry["UploadId"]) for entry in page.get("Uploads", ())]
            found.update((name, upload) for name, upload in names if "/" not in name or name.startswith(WORK))
            if not page.get("IsTruncated"):
                return sorted(found)
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _page_of_uploads(self, s3: S3Client, **marker: Any) -> Any:
        return s3.list_multipart_uploads(Bucket=self._store.bucket, Prefix=self._store.prefix, **marker)


class _NoUpload(Exception):
    """The upload is not there."""


class _Unsupported(Exception):
    """The store does not list uploads."""


def _no_upload(error: BaseException) -> None:
    if code_of(error) == "NoSuchUpload" or code_of(error) in ABSENT:
        raise _NoUpload from error


def _unsupported(error: BaseException) -> None:
    if code_of(error) in UNSUPPORTED or status_of(error) == 501:
        raise _Unsupported from error


def encoded(crc: int) -> str:
    """A CRC-32 as S3 writes it."""
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def _completed(part: Part) -> dict[str, Any]:
    etag, _, crc = part.etag.partition(";")
    return {"PartNumber": part.number, "ETag": etag} | ({"ChecksumCRC32": crc} if crc else {})
