"""Official release binaries of the control plane, Helm and the S3 server, verified against their published checksums.

Only the standard library: this runs before any environment exists. Every failure is a `ReleaseError`; the caller builds
from source instead, where go.sum does the verifying.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import platform
import shutil
import socket
import tarfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["HOSTS", "Release", "ReleaseError", "fetch", "release"]

CONNECT_SECONDS = 3.0
READ_SECONDS = 30.0

HOSTS: Mapping[str, str] = {
    "kubernetes": "https://dl.k8s.io/release",
    "helm": "https://get.helm.sh",
    "etcd": "https://github.com/etcd-io/etcd/releases/download",
    "versitygw": "https://github.com/versity/versitygw/releases/download",
}


class ReleaseError(Exception):
    """A release could not be had: the host is away, it answered with an error, or the checksum differs."""


@dataclass(frozen=True)
class Release:
    """Where one binary is published. `member` is its name inside the archive, None for a bare binary."""

    url: str
    checksum_url: str
    member: str | None = None


def release(name: str, version: str, hosts: Mapping[str, str] = HOSTS) -> Release:
    """The release of `name` (`kube-apiserver`, `helm` ...) at `version` (`v1.36.3`) for this machine."""
    if platform.system() != "Linux":
        raise ReleaseError(f"no control plane is published for {platform.system()}")
    arch = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine())
    if arch is None:
        raise ReleaseError(f"{name} is not published for {platform.machine()}")
    if name == "helm":
        url = f"{hosts['helm']}/helm-{version}-linux-{arch}.tar.gz"
        return Release(url, f"{url}.sha256sum", "helm")
    if name == "etcd":
        folder = f"{hosts['etcd']}/{version}"
        return Release(f"{folder}/etcd-{version}-linux-{arch}.tar.gz", f"{folder}/SHA256SUMS", "etcd")
    if name == "versitygw":
        folder = f"{hosts['versitygw']}/{version}"
        machine = "x86_64" if arch == "amd64" else arch
        return Release(f"{folder}/versitygw_{version}_Linux_{machine}.tar.gz", f"{folder}/checksums.txt", "versitygw")
    url = f"{hosts['kubernetes']}/{version}/bin/linux/{arch}/{name}"
    return Release(url, f"{url}.sha256")


def fetch(source: Release, destination: Path) -> None:
    """Downloads one binary to `destination` (executable), or raises ReleaseError and leaves nothing there."""
    _probe(source.url)
    try:
        expected = _published_checksum(_read(source.checksum_url).decode(errors="replace"), source)
        content = _read(source.url)
    except (OSError, http.client.HTTPException) as error:
        raise ReleaseError(f"{source.url}: {error}") from error
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected:
        raise ReleaseError(f"{source.url}: sha256 is {actual}, {source.checksum_url} says {expected}")
    partial = destination.with_name(destination.name + ".part")
    try:
        with partial.open("wb") as out:
            if source.member is None:
                out.write(content)
            else:
                _extract(content, source, out)
        partial.chmod(0o755)
        partial.replace(destination)
    finally:
        partial.unlink(missing_ok=True)


def _extract(archive: bytes, source: Release, out: io.BufferedWriter) -> None:
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            for member in tar:
                # Only the one regular file is read, by its base name: no path of the archive touches the disk.
                if member.isfile() and Path(member.name).name == source.member:
                    content = tar.extractfile(member)
                    assert content is not None
                    shutil.copyfileobj(content, out)
                    return
    except (tarfile.TarError, EOFError) as error:
        raise ReleaseError(f"{source.url}: not a readable archive ({error})") from error
    raise ReleaseError(f"{source.url}: the archive has no {source.member}")


def _published_checksum(text: str, source: Release) -> str:
    """A `.sha256` file holds the bare digest; `SHA256SUMS`-like files hold `digest  name` lines."""
    file = source.url.rsplit("/", 1)[-1]
    for line in text.splitlines():
        words = line.split()
        if words and (len(words) == 1 or words[-1].lstrip("*") == file) and len(words[0]) == 64:
            return words[0].lower()
    raise ReleaseError(f"{source.checksum_url}: no sha256 of {file} in it")


def _read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=READ_SECONDS) as response:
        content: bytes = response.read()
    return content


def _probe(url: str) -> None:
    """Is the host (or the proxy to it) there at all? Bounded by CONNECT_SECONDS, name lookup included."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"//{proxy}")
    address = (parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443))
    failure: list[OSError] = [TimeoutError(f"no answer in {CONNECT_SECONDS:.0f} s")]

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=CONNECT_SECONDS).close()
            failure.clear()
        except OSError as error:
            failure[:] = [error]

    # A resolver that does not answer blocks for longer than any socket timeout, hence the thread.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if failure:
        raise ReleaseError(f"{host} is out of reach ({failure[0]})")
