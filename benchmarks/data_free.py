"""Throughput and memory of data-free quantisation: file to file beside `cp` and llm-compressor, S3 to S3 beside boto3.

    python benchmarks/data_free.py                     # about 1.2 GB, all figures; some minutes
    python benchmarks/data_free.py --no-peer --rounds 3

Everything runs in turn, round by round, on the same files; the table has medians. Ours is timed from the validated spec to the publish,
llm-compressor from the call of `model_free_ptq` to its return, both without imports. Only ratios of one run mean anything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import checkpoint  # noqa: E402
from jobs import Bucket, manifest  # noqa: E402
from s3 import S3Server  # noqa: E402
from setup import cache_directory, other_python  # noqa: E402

SCHEMES = {"FP8_DYNAMIC": {}, "FP8_BLOCK": {}, "W8A8": {}, "W4A16": {"groupSize": 128}}
PEER = """
import json, sys, time
from llmcompressor import model_free_ptq
source, out, scheme = sys.argv[1:]
began = time.monotonic()
model_free_ptq(model_stub=source, save_directory=out, scheme=scheme, ignore=["lm_head", "model.embed_tokens"], device="cpu")
print(json.dumps({"seconds": time.monotonic() - began}))
"""


def child(job_file: str) -> None:
    """One job in this process: seconds, and memory above that of the idle worker after its imports."""
    import threading

    import torch

    import kompressor_worker.stream
    from kompressor_worker import kernels
    from kompressor_worker.job import load_job
    from kompressor_worker.progress import Progress
    from kompressor_worker.run import run

    assert kompressor_worker.stream
    kernels.nonfinite(torch.ones(8))  # compiled and loaded
    job = load_job(Path(job_file), os.environ)
    if job.spec.output.endpoint:
        import boto3

        boto3.client("s3", region_name="us-east-1")
    idle = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    summary = run(job, os.environ, Progress(), threading.Event())
    print(json.dumps({"seconds": summary.seconds, "idle": idle, "peak": memory("VmHWM") - idle}))


def memory(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def measure(command: list[str], environ: dict[str, str] | None = None) -> dict[str, Any]:
    done = subprocess.run(command, env={**os.environ, **(environ or {})}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


class Bench:
    def __init__(self, work: Path, bucket: Bucket, source: Path) -> None:
        self.work, self.bucket, self.source = work, bucket, source
        self.out = work / "out"

    def fresh(self) -> Path:
        """Nothing there, and nothing of an earlier run still on its way to the disk: the kernel would slow down whoever writes next."""
        shutil.rmtree(self.out, ignore_errors=True)
        os.sync()
        return self.out

    def ours(self, scheme: str, source: Path | None = None) -> dict[str, Any]:
        job = manifest((source or self.source).as_uri(), self.fresh().as_uri(), [{"rtn": {"scheme": scheme, **SCHEMES[scheme]}}])
        return self._run(job)

    def ours_s3(self, scheme: str) -> dict[str, Any]:
        self._empty("out")
        self.fresh()
        endpoint = self.bucket.server.endpoint
        passes = [{"rtn": {"scheme": scheme, **SCHEMES[scheme]}}]
        return self._run(manifest(self.bucket.uri("source"), self.bucket.uri("out"), passes, endpoint))

    def _run(self, job: dict[str, Any]) -> dict[str, Any]:
        file = self.work / "job.json"
        file.write_text(json.dumps(job))
        return measure([sys.executable, __file__, "--child", str(file)], self.bucket.environ)

    def cp(self) -> dict[str, Any]:
        self.fresh()
        began = time.monotonic()
        subprocess.run(["cp", "-r", str(self.source), str(self.out)], check=True)
        return {"seconds": time.monotonic() - began}

    def boto3(self, scheme: str) -> dict[str, Any]:
        """The same bytes down and up with boto3's own transfer manager, through a folder."""
        assert scheme
        client = self.bucket.server.client()
        names = [n for n in self.bucket.names("source") if n.endswith(".safetensors")]
        results = [n for n in self.bucket.names("out") if n.endswith(".safetensors")]
        folder = self.fresh()
        folder.mkdir()
        for n in results:
            client.download_file(self.bucket.name, f"out/{n}", str(folder / f"result-{n}"))
        began = time.monotonic()
        for n in names:
            client.download_file(self.bucket.name, f"source/{n}", str(folder / n))
        for n in results:
            client.upload_file(str(folder / f"result-{n}"), self.bucket.name, f"copy/{n}")
        seconds = time.monotonic() - began
        self._empty("copy")
        return {"seconds": seconds}

    def peer(self, python: Path, scheme: str) -> dict[str, Any]:
        return measure([str(python), "-c", PEER, str(self.source), str(self.fresh()), scheme], {"HF_HUB_OFFLINE": "1"})

    def _empty(self, prefix: str) -> None:
        client = self.bucket.server.client()
        for n in self.bucket.names(prefix):
            client.delete_object(Bucket=self.bucket.name, Key=f"{prefix}/{n}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="some of %(default)s")
    parser.add_argument("--no-peer", action="store_true", help="without llm-compressor (its environment takes 4 GB and a minute)")
    parser.add_argument("--no-s3", action="store_true")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    python = None if options.no_peer else other_python("peer")
    base = cache_directory() / "benchmarks"
    source = checkpoint.make(base / f"llama-{options.layers}", options.layers)
    size = sum(f.stat().st_size for f in source.iterdir())
    block = 2 * (2 * 1536 * 1536 + 2 * 1536 * 384 + 3 * 1536 * 4096 + 2 * 1536)
    schemes = options.schemes.split(",")
    with tempfile.TemporaryDirectory(dir=base) as folder, S3Server(Path(folder) / "s3") as server:
        server.client().create_bucket(Bucket="bench")
        bench = Bench(Path(folder), Bucket(server, "bench"), source)
        if not options.no_s3:
            bench.bucket.upload(source, "source")
        figures = throughput(bench, schemes, options.rounds, python, not options.no_s3)
        depths = {n: bench.ours("W4A16", checkpoint.make(base / f"llama-{n}", n))["peak"] for n in (4, 24)}
    show(figures, size, block, depths)
    if options.json:
        options.json.write_text(json.dumps({"bytes": size, "block": block, "figures": figures, "peakAtDepth": depths}, indent=2))


def throughput(bench: Bench, schemes: list[str], rounds: int, python: Path | None, with_s3: bool) -> dict[str, Any]:
    """Medians by scheme; within a round everything runs in turn."""
    figures: dict[str, Any] = {}
    for scheme in schemes:
        runs: dict[str, Callable[[], dict[str, Any]]] = {"cp": bench.cp, "file": lambda s=scheme: bench.ours(s)}  # type: ignore[misc]
        if python:
            runs["peer"] = lambda s=scheme: bench.peer(python, s)  # type: ignore[misc]
        if with_s3:
            runs["s3"] = lambda s=scheme: bench.ours_s3(s)  # type: ignore[misc]
            runs["boto3"] = lambda s=scheme: bench.boto3(s)  # type: ignore[misc]
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, function in runs.items():
                rows[name].append(function())
        figures[scheme] = {name: median(r["seconds"] for r in row) for name, row in rows.items()}
        figures[scheme]["peak"] = max(r["peak"] for r in rows["file"])
        figures[scheme]["idle"] = max(r["idle"] for r in rows["file"])
        print(f"{scheme}: {figures[scheme]}", file=sys.stderr, flush=True)
    return figures


def show(figures: dict[str, Any], size: int, block: int, depths: dict[int, int]) -> None:
    table = Table(title=f"{size / 1e9:.2f} GB of source, {os.cpu_count()} cores; seconds (medians), and speed as a ratio")
    columns = "scheme,ours,MB/s,cp,of cp,llm-compressor,times it,S3 to S3,boto3 down+up,of boto3,peak MB,limit MB"
    for column in columns.split(","):
        table.add_column(column, justify="right")
    limit = 3 * block + 300e6
    for scheme, f in figures.items():
        peer = [f"{f['peer']:.2f}", f"{f['peer'] / f['file']:.1f}x"] if "peer" in f else ["-", "-"]
        s3 = [f"{f['s3']:.2f}", f"{f['boto3']:.2f}", f"{f['boto3'] / f['s3']:.2f}"] if "s3" in f else ["-"] * 3
        table.add_row(
            scheme, f"{f['file']:.2f}", f"{size / f['file'] / 1e6:.0f}", f"{f['cp']:.2f}", f"{f['cp'] / f['file']:.2f}", *peer, *s3,
            f"{f['peak'] / 1e6:.0f}", f"{limit / 1e6:.0f}",
        )  # fmt: skip
    Console(width=160).print(table)
    print("peak memory above the idle worker: " + ", ".join(f"{n} layers {p / 1e6:.0f} MB" for n, p in depths.items()))


if __name__ == "__main__":
    main()
