"""What `kompressor plan` takes, as the preflight's pod runs it: `python benchmarks/preflight.py [rounds]`.

A calibrated job with source, data and output on a volume, then in a bucket of a real S3 server; nothing that computes can be imported, as
in the planner's image. Beside it, in turns: its libraries imported and one request, without which no planner could do; and importing
torch. Seconds of CPU, so that what else the machine does counts little. Exit code 1 where it takes two seconds or more.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow
from pyarrow import parquet

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("tools", "tests", "tests/worker", "worker", "crds")]

import families  # noqa: E402
from test_plan_in_cluster import ABSENT  # noqa: E402

import jobs  # noqa: E402
from s3 import S3Server  # noqa: E402

WANTED = 2.0
PLANNER = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
from kompressor_worker.cli import main
main()
"""
BARE = """
import sys
import pyarrow.parquet, pydantic
if sys.argv[1:]:
    import boto3
    boto3.client("s3", endpoint_url=sys.argv[1], region_name="us-east-1").list_buckets()
"""


def cpu_seconds(code: str, *arguments: str, **environ: str) -> float:
    before = os.times()
    subprocess.run([sys.executable, "-c", code, *arguments], env={**os.environ, **environ}, check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def job(path: Path, place: dict[str, Any], base: str) -> str:
    body = jobs.manifest("s3://a/b", "s3://c/d", [{"gptq": {"scheme": "W8A16"}}])
    source, data, out = ({"uri": f"{base}/{name}", **place} for name in ("source", "data.parquet", "out"))
    sample = {"dataset": {**data, "tokens": "ids"}, "samples": 32, "sequenceLength": 64}
    body["spec"] |= {"model": {"source": source}, "output": out, "calibration": sample}
    return str(jobs.write(path, body))


def main() -> int:
    rounds = int(sys.argv[1]) if sys.argv[1:] else 5
    print("| from | planner, CPU s | its libraries and a request | of that (median) | importing torch |\n|---|---|---|---|---|")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        claim = Path(folder) / "claims" / "models"
        claim.mkdir(parents=True)
        shutil.copytree(families.tiny_model("llama"), claim / "source")
        parquet.write_table(pyarrow.table({"ids": [[5, 6, 7, 8] * 16] * 64}), claim / "data.parquet")
        with S3Server(Path(folder) / "s3") as server:
            server.client().create_bucket(Bucket="models")
            bucket = jobs.Bucket(server, "models")
            bucket.upload(claim / "source", "source")
            server.client().upload_file(str(claim / "data.parquet"), "models", "data.parquet")
            keys = {name.removeprefix("SOURCE_"): value for name, value in bucket.environ.items() if name.startswith("SOURCE_")}
            volume = {"KOMPRESSOR_CLAIM_DIRECTORY": str(claim.parent)}
            for name, place, base, environ, least in (
                ("a volume", {}, "pvc://models", volume, ()),
                ("S3", {"endpoint": server.endpoint}, "s3://models", bucket.environ, (server.endpoint,)),
            ):
                path = job(Path(folder) / "job.json", place, base)
                took = [
                    (
                        cpu_seconds(PLANNER, "plan", path, "--in-cluster", **environ),
                        cpu_seconds(BARE, *least, **keys),
                        cpu_seconds("import torch"),
                    )
                    for _ in range(rounds)
                ]
                ours, bare, torch = (sorted(times) for times in zip(*took, strict=True))
                ratio = median(one / other for one, other, _ in took)
                print(f"| {name} | {median(ours):.2f} | {median(bare):.2f} | {ratio:.2f} | {median(torch):.2f} |", flush=True)
                worst = max(worst, median(ours))
    return 0 if worst < WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
