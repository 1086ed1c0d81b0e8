"""From apply to the first child Job, and API requests per job: `python benchmarks/apply_latency.py [jobs]`.

On a control plane and a node of its own, one job every 0.4 s, each with a worker that ends at once. The clock starts when the request is
sent and stops when a watch of ours shows the Job. Exit code 1 above p50 0.3 s, p99 1 s or 12 requests a job.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import quantiles

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests"), str(ROOT / "tests" / "operator"), str(ROOT / "crds"), str(ROOT / "operator")]

from stage import SUCCEED, Api, Stage, eventually  # noqa: E402

from kompressor_api import names  # noqa: E402

P50, P99, REQUESTS = 0.3, 1.0, 12


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    stage = Stage(Path(tempfile.mkdtemp(prefix="kompressor-latency-")))
    with stage.cluster:
        stage.install()
        stage.enter_namespace()
        seen: dict[str, float] = {}
        with stage.operator() as operator:
            threading.Thread(target=watch, args=(stage, seen), daemon=True).start()
            time.sleep(2)
            sent: dict[str, float] = {}
            for number in range(count):
                began = time.monotonic()
                sent[stage.play(SUCCEED, name=f"play-{number}", ttlSecondsAfterFinished=3600)] = began
                time.sleep(0.4)
            for number in range(count):
                name = stage.until("Completed", f"play-{number}", 60)["jobName"]
                eventually(lambda job=name: "ttlSecondsAfterFinished" in stage.get("jobs", job)["spec"])
            operator.stop()
        made = json.loads(operator.said("stopping")[0]["detail"])
    delays = sorted(seen[uid] - began for uid, began in sent.items())
    cuts = quantiles(delays, n=100, method="inclusive")
    requests = sum(made.values()) / count
    told = {"jobs": count, "p50_s": cuts[49], "p90_s": cuts[89], "p99_s": cuts[98], "max_s": delays[-1], "requests_per_job": requests}
    print(json.dumps({k: round(v, 3) for k, v in told.items()} | {"load": os.getloadavg()[0], "requests": made}))
    return 0 if cuts[49] < P50 and cuts[98] < P99 and requests <= REQUESTS + 0.2 else 1


def watch(stage: Stage, seen: dict[str, float]) -> None:
    """Note when the first Job of each CompressionJob appears."""
    for event in Api(stage.cluster).watch(stage.path("jobs") + f"?watch=1&labelSelector={names.LABEL_JOB_UID}"):
        seen.setdefault(event["object"]["metadata"]["labels"][names.LABEL_JOB_UID], time.monotonic())


if __name__ == "__main__":
    sys.exit(main())
