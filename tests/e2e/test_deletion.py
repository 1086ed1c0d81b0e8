"""deletionPolicy Delete with the real `kompressor clean` and a real S3 server: what is the job's goes, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from installation import Installed

import jobs
from waiting import PATIENCE, eventually

pytestmark = pytest.mark.cluster


def test_deleted_when_complete_and_in_the_middle_nothing_of_it_stays(installed: Installed, deep: Path) -> None:
    bucket, cluster = installed.bucket, installed.cluster
    bucket.upload(deep, "source")
    for name in ("whole", "half"):
        bucket.server.client().put_object(Bucket=bucket.name, Key=f"{name}-beside/theirs.txt", Body=b"1")
    installed.apply("whole", "source", jobs.RTN_W4, preflight="Skip", deletionPolicy="Delete")
    installed.wait("whole", "Complete")
    assert "config.json" in bucket.names("whole")
    bucket.server.client().put_object(Bucket=bucket.name, Key="whole/theirs.txt", Body=b"2")
    installed.apply("half", "source", jobs.RTN_W4, preflight="Skip", deletionPolicy="Delete")
    eventually(lambda: "model.layers.5" in installed.log("half"))
    cluster.kubectl("delete", "kcj", "whole", "half", "--wait=true", f"--timeout={PATIENCE:.0f}s")
    assert bucket.names("whole") == ["theirs.txt"] and bucket.names("half") == [] and bucket.uploads("half") == []
    assert bucket.names("whole-beside") == bucket.names("half-beside") == ["theirs.txt"], "a prefix that only begins alike"
    assert bucket.names("source"), "and the source is nobody's to delete"
