"""A real S3 server (versitygw over a folder) on loopback, with its own credentials.

    with S3Server(root) as s3:
        s3.client().create_bucket(Bucket="models")      # or os.environ | s3.environ, which boto3 and the AWS CLI read

`$KOMPRESSOR_TEST_S3` names an existing endpoint to be used instead, with `AWS_ACCESS_KEY_ID` and
`AWS_SECRET_ACCESS_KEY` from the environment; then nothing is started.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import binaries
from processes import Process, StartError, free_port, spawn, wait_until

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["S3Server"]

HEALTH = "/.kompressor-health"
"""No valid bucket begins with a dot, so the path hides nothing."""


class S3Server:
    """`endpoint`, `access_key`, `secret_key`, `region`, `ca` (None for plain HTTP) and `environ` are set by `start`.

    `root` holds the buckets (as folders), the log and the certificates. `tls` serves HTTPS with a certificate of an
    authority of its own. `keep` lets the server outlive this process; `process` is what to stop it by.
    """

    def __init__(self, root: Path, *, tls: bool = False, keep: bool = False) -> None:
        self.root = root
        self.tls = tls
        self.keep = keep
        self.endpoint = ""
        self.access_key = ""
        self.secret_key = ""
        self.region = "us-east-1"
        self.ca: Path | None = None
        self.process: Process | None = None

    @property
    def environ(self) -> dict[str, str]:
        """What boto3, the AWS CLI and the worker read from the environment."""
        environ = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
        }
        return environ | ({"AWS_CA_BUNDLE": str(self.ca)} if self.ca else {})

    def client(self) -> S3Client:
        """A boto3 client with exactly these credentials, whatever the environment holds."""
        import boto3

        session = boto3.session.Session(self.access_key, self.secret_key, region_name=self.region)
        return session.client("s3", endpoint_url=self.endpoint, verify=str(self.ca) if self.ca else None)

    def start(self) -> S3Server:
        """Raises StartError where the server does not answer, BinaryError where there is none to start."""
        if given := os.environ.get("KOMPRESSOR_TEST_S3"):
            self._use(given)
            return self
        self.access_key = "K" + secrets.token_hex(8).upper()
        self.secret_key = secrets.token_urlsafe(24)
        for attempt in range(3):
            try:
                self._start()
                return self
            except StartError:
                self.stop()
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def stop(self, grace: float = 3.0) -> None:
        """Ends the server; the buckets' folder stays."""
        if self.process is not None:
            self.process.stop(grace)
            self.process = None

    def __enter__(self) -> S3Server:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self.keep:
            self.stop()

    def _use(self, endpoint: str) -> None:
        missing = [name for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if not os.environ.get(name)]
        if missing:
            raise StartError(f"KOMPRESSOR_TEST_S3={endpoint}: {' and '.join(missing)} not set; export the credentials too")
        self.endpoint = endpoint
        self.access_key, self.secret_key = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
        self.region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or self.region
        bundle = os.environ.get("AWS_CA_BUNDLE")
        self.ca = Path(bundle) if bundle else None

    def _start(self) -> None:
        gateway = binaries.paths(["versitygw"])["versitygw"]
        buckets = self.root / "buckets"
        buckets.mkdir(parents=True, exist_ok=True)
        port = free_port()
        command: list[str | Path] = [gateway, "--quiet", "--keep-alive", "--health", HEALTH]
        command += ["--port", f"127.0.0.1:{port}", "--region", self.region]
        if self.tls:
            self.ca, serving = _certificates(self.root / "tls")
            command += ["--cert", serving[0], "--key", serving[1]]
        command += ["posix", *_metadata(self.root), buckets]
        # The keys go by environment: a command line is readable by everyone on the machine.
        environ = os.environ | {"ROOT_ACCESS_KEY": self.access_key, "ROOT_SECRET_KEY": self.secret_key}
        self.process = spawn("versitygw", command, log=self.root / "versitygw.log", environ=environ, keep=self.keep)
        self.endpoint = f"{'https' if self.tls else 'http'}://127.0.0.1:{port}"
        wait_until(self._answers, what=f"S3 at {self.endpoint}", seconds=20, needs=[self.process])

    def _answers(self) -> bool:
        context = ssl.create_default_context(cafile=str(self.ca)) if self.ca else None
        try:
            with urllib.request.urlopen(self.endpoint + HEALTH, timeout=1, context=context):
                return True
        except (OSError, urllib.error.URLError):
            return False


def _certificates(folder: Path) -> tuple[Path, tuple[Path, Path]]:
    # Imported here: plain HTTP needs no package outside the standard library.
    from certificates import Authority

    authority = Authority(folder / "ca", "kompressor-s3")
    pair = authority.issue(folder / "serving", "s3", names=["localhost"], addresses=["127.0.0.1"])
    return authority.certificate, (pair.certificate, pair.key)


def _metadata(root: Path) -> list[str | Path]:
    """ETags and checksums live in extended attributes; where the file system has none, in a folder beside."""
    try:
        os.setxattr(root, "user.kompressor", b"1")
        os.removexattr(root, "user.kompressor")
    except OSError:
        sidecar = root / "metadata"
        sidecar.mkdir(exist_ok=True)
        return ["--sidecar", sidecar]
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description="Run an S3 server on loopback until Ctrl-C.")
    parser.add_argument("root", type=Path, nargs="?", default=binaries.cache_root() / "s3", help="where the buckets live")
    parser.add_argument("--tls", action="store_true", help="serve HTTPS; AWS_CA_BUNDLE is printed with the rest")
    arguments = parser.parse_args()
    try:
        with S3Server(arguments.root, tls=arguments.tls) as s3:
            for name, value in s3.environ.items():
                print(f"export {name}={value}", flush=True)
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            while s3.process is None or s3.process.alive:
                time.sleep(0.5)
            print(f"error: the server ended:\n{s3.process.tail()}", file=sys.stderr)
    except KeyboardInterrupt:
        return 0
    except (StartError, binaries.BinaryError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
