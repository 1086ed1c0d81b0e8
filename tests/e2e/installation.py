"""A cluster with the chart installed, as the tests of whole jobs see it."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jobs
from cluster_access import Cluster, CommandError
from jobs import Bucket
from processes import free_port
from s3 import S3Server

__all__ = ["Installed", "installation", "kernels_of_the_image"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Installed:
    """A cluster with the chart installed, a bucket and the secret for it."""

    cluster: Cluster
    bucket: Bucket

    def apply(self, name: str, source: str, passes: list[dict[str, Any]], **spec: Any) -> None:
        body = jobs.manifest(self.bucket.uri(source), self.bucket.uri(name), passes, self.bucket.server.endpoint)
        body["metadata"] = {"name": name, "namespace": "default"}
        body["spec"]["model"]["source"], body["spec"]["output"] = self.place(source), self.place(name)
        if not passes:  # a recipe or a target gives them
            del body["spec"]["passes"]
        # One core asked for each: as many workers at once as there are cores.
        body["spec"] |= {"worker": {"resources": {"requests": {"cpu": "900m"}}}, **spec}
        self.cluster.apply(body)

    def place(self, name: str) -> dict[str, Any]:
        """This folder of the bucket, as a spec says it."""
        return {"uri": self.bucket.uri(name), "endpoint": self.bucket.server.endpoint, "credentialsSecret": "models-s3"}

    def wait(self, name: str, condition: str, seconds: int = 300) -> dict[str, Any]:
        try:
            self.cluster.kubectl("wait", f"kcj/{name}", f"--for=condition={condition}", f"--timeout={seconds}s", timeout=seconds + 10)
        except CommandError as error:
            raise AssertionError(json.dumps(self.status(name), indent=1)) from error
        return self.status(name)

    def steps(self, name: str) -> list[str]:
        """What its child Jobs are for."""
        uid = self.cluster.get("kcj", name)["metadata"]["uid"]
        found = self.cluster.get("jobs", "-l", f"kompressor.io/job-uid={uid}")["items"]
        return sorted(job["metadata"]["labels"]["kompressor.io/step"] for job in found)

    def log(self, name: str) -> str:
        """What its workers have said; nothing while there is no container."""
        try:
            return self.cluster.kubectl("logs", "-l", f"app.kubernetes.io/instance={name}", "--tail=-1")
        except CommandError:
            return ""

    def status(self, name: str) -> dict[str, Any]:
        status: dict[str, Any] = self.cluster.get("kcj", name)["status"]
        return status


@contextmanager
def kernels_of_the_image() -> Iterator[Path]:
    """Compiled, as an image brings them along: no pod begins by compiling."""
    from kompressor_worker.kernels import build

    with tempfile.TemporaryDirectory(prefix="kompressor-image-") as folder:
        library = build.build()
        kept = Path(folder) / "kernels" / library.name
        kept.parent.mkdir()
        shutil.copy(library, kept)
        for path in (kept, kept.parent, Path(folder)):
            path.chmod(0o755)
        yield Path(folder)


@contextmanager
def installation(cluster: Cluster, s3: S3Server, kernels: Path) -> Iterator[Installed]:
    image = {
        "path": [str(Path(sys.executable).parent)],
        "keep": [str(ROOT), str(kernels)],
        "env": {"KOMPRESSOR_CACHE": str(kernels)},
        "user": 65532,
        "group": 65532,
    }
    cluster.add_images({f"kompressor/{part}:0.1.0": image for part in ("operator", "planner", "worker")})
    flags = ["-n", "kompressor-system", "--create-namespace", "--wait", "--set", f"healthPort={free_port()}"]
    cluster.helm("install", "kompressor", str(ROOT / "charts" / "kompressor"), *flags)
    bucket = Bucket(s3, f"e2e-{uuid.uuid4().hex[:8]}")
    s3.client().create_bucket(Bucket=bucket.name)
    keys = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
    cluster.kubectl("create", "secret", "generic", "models-s3", *(f"--from-literal={k}={v}" for k, v in keys.items()))
    yield Installed(cluster, bucket)
    cluster.kubectl("delete", "kcj", "--all", "--wait=true")
    cluster.kubectl("delete", "secret", "models-s3")
    cluster.helm("uninstall", "kompressor", "-n", "kompressor-system", "--wait")
