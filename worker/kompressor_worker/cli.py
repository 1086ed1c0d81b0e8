"""`kompressor run | plan | verify`: spec in, exit code out."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kompressor_api.names import ENV_MEMORY_PLAN, ExitCode, Reason, Role
from kompressor_worker.errors import GateFailed, KompressorError, OutOfMemory, Terminated
from kompressor_worker.job import Job, load_job

RUN = """\
Runs a CompressionJob manifest here, without a cluster: the same file that `kubectl apply` takes.

  kompressor run examples/quickstart.yaml
  SOURCE_AWS_ACCESS_KEY_ID=... OUTPUT_AWS_ACCESS_KEY_ID=... kompressor run job.yaml

A pass that measures activations (gptq, awq, smoothQuant, kvCache, static schemes) needs calibration; evaluation flows held-out rows through
the original and the result and says perplexity, KL divergence and top-1 agreement; drift compares activations on data from use:

  spec:
    model: {source: {uri: s3://models/llama-3-8b}}
    output: {uri: s3://models/llama-3-8b-w4a16}
    passes:
      - gptq: {scheme: W4A16, groupSize: 128}
    calibration:                       # field: plain text, messages: chats, tokens: token ids
      dataset: {uri: s3://data/chats.jsonl, messages: messages}
      samples: 512
      sequenceLength: 2048
    evaluation:
      dataset: {uri: s3://data/held-out.parquet, field: text}
      packing: true
      gates:                           # one that is not met: exit code 67, and nothing is published
        - {metric: perplexity, maxIncrease: 3%}
        - {metric: kl, maxKL: 0.05}
    drift:                             # a warning above the threshold, never a failure
      dataset: {uri: s3://data/requests/, messages: messages}

Credentials come from SOURCE_AWS_* and OUTPUT_AWS_* (and SOURCE_HF_TOKEN), for calibration data from DATA_AWS_*, for evaluation from
EVALUATION_AWS_*, for drift from DRIFT_AWS_*, else from the usual AWS chain. A run that was cut off goes on at its last committed block when
it is started again. Readers of the output see nothing until all of it is there; report.html in it says how good it is.

exit codes: 0 done, 64 the job cannot work as written, 65 corrupt source, 66 NaN or Inf, 67 gate failed, 71 out of memory,
            74 storage trouble (try again), 75 told to stop (start again to go on)
"""
PLAN = """\
Says what a job would do, from headers alone, in a second or two: sizes, memory, time, and every error that can be known now.

  kompressor plan job.yaml
  kompressor plan job.yaml --json | jq .outputBytes

For a job with calibration or evaluation it says what the activations take too: in memory, on disk, and how many multiply-adds the forwards,
the statistics, the passes and the evaluation are. Data is looked at, not read: DATA_*, EVALUATION_* and DRIFT_* credentials as in `run`.

  kompressor plan examples/calibrated.yaml
"""
VERIFY = """\
Reads a published result and checks it: every file and tensor there and as written (config.json and tokenizer too), shapes as the scheme
has them, scales finite. Exit code 65: something is missing or damaged, 66: NaN or Inf, 64: no result there.

Credentials come from OUTPUT_AWS_*, else SOURCE_AWS_*, else from the usual AWS chain.

  kompressor verify s3://models/llama-3-8b-w4a16 --endpoint http://127.0.0.1:7070
  kompressor verify ./out
"""


def main(argv: Sequence[str] | None = None) -> None:
    sys.exit(run_cli(argv))


def run_cli(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s" if args.in_cluster else "%(message)s",
        stream=sys.stderr,
    )
    for noisy in ("boto3", "botocore", "urllib3", "s3transfer", "httpx", "kubernetes"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except KompressorError as error:
        return failed(error, args)
    except MemoryError as error:
        return failed(OutOfMemory(f"the worker's memory is too small: {error or 'an allocation failed'}"), args)
    except (RuntimeError, OSError) as error:
        if lacks_memory(error):
            return failed(OutOfMemory(f"the worker's memory is too small: {str(error).splitlines()[0]}"), args)
        raise
    except KeyboardInterrupt:
        return failed(Terminated("interrupted"), args)


def lacks_memory(error: RuntimeError | OSError) -> bool:
    """torch says it in words, mmap in a number."""
    said = str(error).lower()
    return (isinstance(error, OSError) and error.errno == errno.ENOMEM) or "out of memory" in said or "can't allocate memory" in said


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="kompressor",
        description="Compress large language models from bucket to bucket, one block in memory.",
        epilog="The same manifests run in a cluster with `kubectl apply -f`. Try: kompressor plan examples/quickstart.yaml",
    )
    top.add_argument("--version", action="version", version=f"kompressor {version('kompressor')}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], int], short: str, text: str) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=short, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        p.add_argument("--json", action="store_true", help="print the result, or the error, as JSON on standard output")
        p.add_argument("-v", "--verbose", action="store_true", help="log more")
        p.set_defaults(command=function, in_cluster=False)
        return p

    run = command("run", run_command, "compress a model as a manifest says", RUN)
    run.add_argument("manifest", type=Path, help="a CompressionJob, YAML or JSON")
    run.add_argument("--in-cluster", action="store_true", help="report to the CompressionJob resource and the pod's termination log")
    plan = command("plan", plan_command, "say what a job would do", PLAN)
    plan.add_argument("manifest", type=Path, help="a CompressionJob, YAML or JSON")
    verify = command("verify", verify_command, "check a published result", VERIFY)
    verify.add_argument("uri", help="s3://bucket/prefix, pvc://claim/path, file:///path, or a path")
    verify.add_argument("--endpoint", help="URL of an S3-compatible server")
    verify.add_argument("--region", help="region of the bucket")
    return top


def run_command(args: argparse.Namespace) -> int:
    stop = threading.Event()
    for s in (signal.SIGTERM, signal.SIGINT):  # first of all: as a pod's first process we would not hear them otherwise
        signal.signal(s, lambda *_: stop.set())
    from kompressor_worker.progress import Listener, Progress
    from kompressor_worker.report import Resource, write_termination_message
    from kompressor_worker.run import run
    from kompressor_worker.terminal import Bar, Lines, is_interactive

    job = load_job(args.manifest, os.environ)
    refuse_file_uris(job, args.in_cluster)
    with ExitStack() as stack:
        listeners: list[Listener] = [stack.enter_context(Bar()) if is_interactive() else Lines()]
        resource = Resource(job.namespace, job.name) if args.in_cluster else None
        if resource:
            listeners.append(resource)
        result: dict[str, Any] | None = None
        try:
            summary = run(job, os.environ, Progress(listeners), stop, memory_plan())
            result = summary.result(job.spec.output.uri)
        except GateFailed as error:
            result = error.result
            raise
        finally:
            if resource:
                resource.close(result)
    if args.in_cluster:
        reason = Reason.ALREADY_COMPRESSED if summary.already else Reason.COMPLETED
        message = f"{result['sourceBytes']:,} bytes became {result['outputBytes']:,} ({result['ratio']})"
        write_termination_message({"reason": reason, "message": message, "exitCode": 0, "summary": result})
    show_result(result, summary.already, args.json)
    return int(ExitCode.DONE)


def plan_command(args: argparse.Namespace) -> int:
    from kompressor_worker.plan import make_plan
    from kompressor_worker.terminal import flow_rows, human, out, table

    job = load_job(args.manifest, os.environ)
    plan = make_plan(job, os.environ, memory_plan()).as_json()
    if args.json:
        print(json.dumps(plan, indent=2))
        return 0
    rows = {
        "model": f"{plan['family'] or 'unknown family'}, {plan['units']} units",
        "schemes": ", ".join(f"{k}: {n} linears" for k, n in plan["schemes"].items()) + f"; exact: {plan['exact']}",
        "size": f"{human(plan['sourceBytes'])} -> {human(plan['outputBytes'])} ({plan['ratio']}x smaller), {plan['shards']} shard(s)",
        "peak memory": human(plan["peakMemoryBytes"]),
        "time": "none" if plan["alreadyCompressed"] else f"about {plan['estimatedSeconds']:,} s: a few to start, then 300 MB/s of source",
        **flow_rows(plan),
        "output": "already holds this result" if plan["alreadyCompressed"] else "free",
    }
    out.print(table(f"plan of {job.name}", rows))
    for warning in plan["warnings"]:
        out.print(f"warning: {warning}")
    return 0


def verify_command(args: argparse.Namespace) -> int:
    from kompressor_worker.terminal import human, out, table
    from kompressor_worker.verify import verify

    checked = verify(args.uri, args.endpoint, args.region, as_source(os.environ))
    if args.json:
        print(json.dumps(checked, indent=2))
    else:
        rows = {
            "tensors": f"{checked['tensors']} read, {human(checked['bytes'])}",
            "quantised": f"{checked['quantizedLinears']} linears",
            "digests": f"{checked['digests']} agree with kompressor.json" if checked["digests"] else "none recorded",
            "scales": f"{checked['scales']} tensors, all finite",
        }
        out.print(table(f"{args.uri} is whole", rows))
    return 0


def as_source(environ: Mapping[str, str]) -> dict[str, str]:
    """A result is read with the keys that wrote it, where there are some."""
    output, source = Role.OUTPUT.env_prefix, Role.SOURCE.env_prefix
    written = {k.replace(output, source, 1): v for k, v in environ.items() if k.startswith(f"{output}AWS_") and v}
    kept = {k: v for k, v in environ.items() if not (written and k.startswith(f"{source}AWS_"))}
    return {**kept, **written}


def show_result(result: dict[str, Any], already: bool, as_json: bool) -> None:
    from kompressor_worker.publish import PAGE
    from kompressor_worker.terminal import human, measured_rows, out, table

    if as_json:
        print(json.dumps(result, indent=2))
        return
    rows = {
        "size": f"{human(result['sourceBytes'])} -> {human(result['outputBytes'])} ({result['ratio']})",
        "quantised": f"{result['quantizedTensors']} linears, relative weight error {result['relativeError']}",
        **measured_rows(result),
        "time": "none: the output already held this result" if already else f"{result['seconds']} s",
        "where": result["uri"],
        "report": f"{result['uri'].rstrip('/')}/{PAGE}",
    }
    out.print(table("done", rows))
    for warning in result.get("warnings", []):
        out.print(f"warning: {warning}")


def failed(error: KompressorError, args: argparse.Namespace) -> int:
    """One clear error: on the terminal, for programs (--json) and for the operator; with what was measured, where a gate was not met."""
    from kompressor_worker.report import write_termination_message
    from kompressor_worker.terminal import err, measured_rows, table

    said: dict[str, Any] = {"reason": error.reason, "message": str(error), "exitCode": int(error.exit_code)}
    measured = error.result if isinstance(error, GateFailed) else {}

    err.print(f"[bold red]{error.reason}[/]: ", end="")
    err.print(str(error), markup=False, highlight=False)
    if measured:
        err.print(table("measured", measured_rows(measured)))
    if args.json:
        print(json.dumps({"error": said} | ({"result": measured} if measured else {}), indent=2))
    if args.in_cluster:
        summary = {"summary": measured} if measured else {}
        write_termination_message(said | {"message": str(error)[:2500]} | summary)
    return int(error.exit_code)


def refuse_file_uris(job: Job, in_cluster: bool) -> None:
    from kompressor_worker.errors import UserError

    spec = job.spec
    uris = {"model.source.uri": spec.model.source.uri, "output.uri": spec.output.uri}
    uris |= {f"{sample.SECTION}.dataset.uri": sample.dataset.uri for sample in spec.datasets}
    for field, uri in uris.items():
        if in_cluster and uri.startswith("file://"):
            raise UserError(f"spec.{field}: {uri} is a pod's own disk in a cluster; use s3:// or pvc://")


def memory_plan() -> Any:
    """How much to hold, from what the operator says: each earlier out-of-memory makes it smaller."""
    from kompressor_worker.pipeline import Limits

    return Limits().smaller(int(os.environ.get(ENV_MEMORY_PLAN, "0")))
