"""Reading from a hub: `hf://owner/name[/folder]` is a model, `hf://datasets/owner/name[/folder or file]` a dataset, pinned to one commit.

The requests are made here, because a range has to be received in place, resumed where it broke off, and stopped on SIGTERM, with the
certificates of its own location. Of huggingface_hub its constants are read; the rest of it takes half a second to import, which `kompressor
plan` would pay in every preflight, so it is asked only for a token that a login has left.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import certifi
import urllib3
from huggingface_hub import constants

from kompressor_worker.errors import AccessDenied, CorruptSource, KompressorError, NotFound, StorageError, UserError
from kompressor_worker.storage import WORK, ObjectInfo
from kompressor_worker.storage.body import fill, receive
from kompressor_worker.storage.endpoints import endpoint_of
from kompressor_worker.storage.locations import Place
from kompressor_worker.storage.patience import Patience

CONNECTIONS = 32
_REDIRECTS = 5


class HubSource:
    """A repository (or a folder or one file of it) at one commit, found out here.

    Raises UserError, NotFound, AccessDenied, StorageError."""

    def __init__(self, place: Place, revision: str | None, environ: Mapping[str, str], patience: Patience) -> None:
        self.uri = place.uri
        parts = [part for part in (place.authority, *place.path.split("/")) if part]
        self._type = "dataset" if parts[0] == "datasets" else "model"
        if self._type == "dataset":
            parts = parts[1:]
        self.repository, self._folder = "/".join(parts[:2]), "".join(f"{part}/" for part in parts[2:])
        self._place = place
        self._patience = patience
        self._endpoint = (endpoint_of(place, environ, "HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        token = place.credentials.get("HF_TOKEN") or environ.get("HF_TOKEN") or _left_by_a_login()
        self._headers = {"user-agent": "kompressor", "accept-encoding": "identity"}
        if token is not None:
            self._headers["authorization"] = f"Bearer {token}"
        self._pool = _connect(self._endpoint, place, environ, patience)
        self._addresses: dict[str, str] = {}
        """Where a file was last redirected to; such addresses are signed and run out."""
        self._lock = threading.Lock()
        wanted = revision or "main"
        address = f"{self._endpoint}/api/{self._type}s/{self.repository}/revision/{quote(wanted, safe='')}?blobs=true"
        self._info = self._ask(address, wanted)
        self.revision: str = self._info["sha"]
        """The commit; everything is read from it, whatever happens to the branch."""
        self._listed = self._files()

    def list(self) -> dict[str, ObjectInfo]:
        if not self._listed:
            raise NotFound(
                f"{self.uri}: no files at commit {self.revision}; give the folder that holds {self._place.holds}", self._place.missing
            )
        return dict(self._listed)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        info = self._entry(name)
        buffer = bytearray((info.size if stop is None else stop) - start)
        self.read_into(name, start, memoryview(buffer))
        if len(buffer) == info.size and not _matches(buffer, info.etag):
            raise CorruptSource(f"{self.uri}: {name} has not the digest {info.etag} that the hub lists; start again")
        return bytes(buffer)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        buffer = buffer.cast("B")
        stop, size = start + len(buffer), self._entry(name).size
        if stop > size:
            raise CorruptSource(
                f"{self.uri}: {name} ends at byte {size}, but bytes up to {stop} are wanted; it is truncated, upload it again"
            )

        def given_up(cause: BaseException, done: int, attempts: int) -> KompressorError:
            return self._failed(f"reading {name} at byte {start + done}", cause, attempts)

        fill(buffer, lambda done: self._open(name, start + done, stop), self._patience, given_up)

    def path(self, name: str) -> None:
        return None

    def _entry(self, name: str) -> ObjectInfo:
        info = self._listed.get(name)
        if info is None:
            raise NotFound(f"{self.uri}: no file {name} at commit {self.revision}; check {self._place.field}", self._place.missing)
        return info

    def _files(self) -> dict[str, ObjectInfo]:
        entries = {str(entry["rfilename"]): entry for entry in self._info.get("siblings", ())}
        if (file := self._folder.removesuffix("/")) in entries:  # the address is that of one file
            self._folder = file[: file.rfind("/") + 1]
            entries = {file: entries[file]}
        found: dict[str, ObjectInfo] = {}
        for name, entry in entries.items():
            inside = name.removeprefix(self._folder)
            if name.startswith(self._folder) and not inside.startswith(WORK):
                lfs = entry.get("lfs") or {}
                found[inside] = ObjectInfo(inside, int(entry["size"]), lfs.get("sha256") or entry["blobId"])
        return found

    def _ask(self, url: str, revision: str) -> dict[str, Any]:
        what = f"looking up revision {revision} of {self.repository}"
        raw = self._request(url, {}, what)
        size = int(raw.headers.get("content-length", -1))
        text = bytearray(max(size, 0))
        count, problem = receive(raw, memoryview(text)) if size >= 0 else (0, None)
        if size < 0:
            text = bytearray(raw.read())
        elif problem is not None or count < size:
            raise self._failed(what, problem or EOFError(), 1)
        answer: dict[str, Any] = json.loads(text)
        return answer

    def _open(self, name: str, start: int, stop: int) -> Any:
        """A response whose body is the bytes [start, stop)."""
        owned = f"{'datasets/' if self._type == 'dataset' else ''}{self.repository}"
        url = f"{self._endpoint}/{owned}/resolve/{self.revision}/{quote(self._folder + name)}"
        raw = self._request(url, {"range": f"bytes={start}-{stop - 1}"}, f"reading {name}")
        sent = int(raw.headers.get("content-length", stop - start))
        if (raw.status != 206 and start) or sent < stop - start:
            raw.close()
            raise StorageError(f"{self.uri}: {self._endpoint} does not honour Range for {name}, which streaming needs")
        return raw

    def _request(self, url: str, headers: Mapping[str, str], what: str) -> Any:
        """A good answer, its body not yet read. Signed addresses of redirects are used again until they are refused."""
        failures = 0
        while True:
            with self._lock:
                address = self._addresses.get(url, url)
            try:
                raw = self._follow(url, address, headers)
                if raw.status in (200, 206):
                    return raw
                raw.drain_conn()
                raw.release_conn()
                if address != url and raw.status < 500:  # the signature ran out; once more from the start
                    with self._lock:
                        self._addresses.pop(url, None)
                    continue
                cause: Exception = _Answer(raw)
                if raw.status < 500 and raw.status not in (408, 425, 429):
                    raise self._refused(raw, what)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                cause = error
            failures += 1
            if failures >= self._patience.attempts or _untrusted(cause):
                raise self._failed(what, cause, failures) from cause
            self._patience.pause(failures, cause)

    def _follow(self, url: str, address: str, headers: Mapping[str, str]) -> Any:
        home = urlsplit(self._endpoint).netloc
        for _ in range(_REDIRECTS + 1):
            own = self._headers if urlsplit(address).netloc == home else {"accept-encoding": "identity"}  # no token for a CDN
            raw = self._pool.request("GET", address, headers={**own, **headers}, redirect=False, retries=False, preload_content=False)
            if raw.status not in (301, 302, 303, 307, 308):
                return raw
            address = urljoin(address, raw.headers["location"])
            raw.drain_conn()
            raw.release_conn()
            with self._lock:
                self._addresses[url] = address
        raise urllib3.exceptions.HTTPError(f"more than {_REDIRECTS} redirects")

    def _refused(self, raw: Any, what: str) -> KompressorError:
        code, message = raw.headers.get("x-error-code", ""), raw.headers.get("x-error-message", "")
        said = f"HTTP {raw.status}" + (f", {code}" if code else "") + (f", {message}" if message else "")
        where = f"{self.uri}: {what} at {self._endpoint}"
        if code == "GatedRepo" or raw.status == 403:
            return AccessDenied(f"{where} was denied ({said}); accept the model's terms there and give an HF_TOKEN that may read it")
        if raw.status == 401:  # also the answer for a repository that does not exist
            return AccessDenied(f"{where} was denied ({said}); check the name, and HF_TOKEN in {self._place.credentials_source}")
        if code == "RevisionNotFound":
            return NotFound(f"{where}: no such revision ({said}); correct {self._place.field}.revision", self._place.missing)
        if raw.status in (404, 410):
            remedy = "check the name (a dataset's begins with hf://datasets/), and HF_TOKEN if the repository is private"
            return NotFound(f"{where}: not found ({said}); {remedy}", self._place.missing)
        if raw.status == 416:
            return CorruptSource(f"{where}: shorter than the hub lists ({said}); start again")
        return StorageError(f"{where} failed ({said})")

    def _failed(self, what: str, cause: BaseException, attempts: int) -> KompressorError:
        if _untrusted(cause):
            return UserError(
                f"{self.uri}: the certificate of {self._endpoint} is not trusted ({cause}); "
                f"give its authority as {self._place.field}.caBundle"
            )
        return StorageError(
            f"{self.uri}: {what} at {self._endpoint} failed after {attempts} attempts: {type(cause).__name__}: {cause}; "
            "check that the hub is up and reachable from the worker"
        )


class _Answer(Exception):
    """A hub that is in trouble, in its own words."""

    def __init__(self, raw: Any) -> None:
        super().__init__(f"HTTP {raw.status} {raw.headers.get('x-error-message', raw.reason)}")


def _left_by_a_login() -> str | None:
    """The token of `hf auth login` or of a CI's identity, unless HF_HUB_DISABLE_IMPLICIT_TOKEN says not to use it."""
    given = any(os.environ.get(name) for name in ("HF_OIDC_RESOURCE", "HUGGING_FACE_HUB_TOKEN")) or Path(constants.HF_TOKEN_PATH).exists()
    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN or not given:
        return None
    from huggingface_hub import get_token

    token: str | None = get_token()
    return token


def _untrusted(cause: BaseException) -> bool:
    return "CERTIFICATE_VERIFY_FAILED" in str(cause)


def _matches(data: bytearray, etag: str) -> bool:
    """LFS files are listed with their SHA-256, the others with git's blob id."""
    if len(etag) == 64:
        return hashlib.sha256(data).hexdigest() == etag
    if len(etag) == 40:
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == etag
    return True


def _connect(endpoint: str, place: Place, environ: Mapping[str, str], patience: Patience) -> urllib3.PoolManager:
    bundle = place.ca_bundle or environ.get("REQUESTS_CA_BUNDLE") or environ.get("SSL_CERT_FILE") or certifi.where()
    options: dict[str, Any] = {
        "maxsize": CONNECTIONS,
        "timeout": urllib3.Timeout(connect=patience.connect_timeout, read=patience.timeout),
        "ca_certs": os.fspath(bundle),
        "cert_reqs": "CERT_REQUIRED",
    }
    url = urlsplit(endpoint)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        return urllib3.ProxyManager(proxy, **options)
    return urllib3.PoolManager(**options)
