"""Jobs for tests: manifests, workers as real processes, buckets of a real S3 server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s3 import S3Server

RTN_W4 = [{"rtn": {"scheme": "W4A16", "groupSize": 64}}]


@dataclass(frozen=True)
class Bucket:
    """One bucket, with what tests do to it."""

    server: S3Server
    name: str

    def uri(self, prefix: str) -> str:
        return f"s3://{self.name}/{prefix}"

    def upload(self, folder: Path, prefix: str) -> None:
        client = self.server.client()
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            client.upload_file(str(file), self.name, f"{prefix}/{file.relative_to(folder)}")

    def names(self, prefix: str) -> list[str]:
        pages = self.server.client().get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=f"{prefix}/")
        return [o["Key"].removeprefix(f"{prefix}/") for page in pages for o in page.get("Contents", [])]

    def files(self, prefix: str) -> dict[str, bytes]:
        client = self.server.client()
        return {n: client.get_object(Bucket=self.name, Key=f"{prefix}/{n}")["Body"].read() for n in self.names(prefix)}

    def download(self, prefix: str, folder: Path) -> Path:
        for name, data in self.files(prefix).items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        return folder

    def uploads(self, prefix: str) -> list[str]:
        """Keys of multipart uploads that are neither completed nor aborted."""
        found = self.server.client().list_multipart_uploads(Bucket=self.name).get("Uploads", [])
        return [u["Key"] for u in found if u["Key"].startswith(f"{prefix}/")]

    @property
    def environ(self) -> dict[str, str]:
        """Credentials as the operator gives them to a worker."""
        keys = {"AWS_ACCESS_KEY_ID": self.server.access_key, "AWS_SECRET_ACCESS_KEY": self.server.secret_key}
        return {f"{role}_{k}": v for role in ("SOURCE", "OUTPUT", "DATA", "EVALUATION") for k, v in keys.items()}


def manifest(source: str, output: str, passes: Sequence[Mapping[str, Any]] = RTN_W4, endpoint: str | None = None) -> dict[str, Any]:
    extra = {"endpoint": endpoint} if endpoint else {}
    return {
        "apiVersion": "kompressor.io/v1alpha1",
        "kind": "CompressionJob",
        "metadata": {"name": "test", "namespace": "default", "uid": "11111111-2222-3333-4444-555555555555"},
        "spec": {"model": {"source": {"uri": source, **extra}}, "output": {"uri": output, **extra}, "passes": list(passes)},
    }


def write(path: Path, job: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(job))
    return path


def worker(job: Path, environ: Mapping[str, str] | None = None, command: str = "run") -> subprocess.Popen[str]:
    """A worker as a cluster would start it: a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "kompressor_worker", command, str(job)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(job: Path, environ: Mapping[str, str] | None = None, command: str = "run") -> tuple[int, str]:
    """Exit code and what it said on standard error."""
    process = worker(job, environ, command)
    _, said = process.communicate(timeout=300)
    return process.returncode, said
