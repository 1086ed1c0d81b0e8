"""`kompressor run | plan | fit | verify | expand | clean`: spec in, exit code out."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kompressor_worker import logs
from kompressor_worker.commands import clean_command, expand_command, plan_command, run_command, train_command, verify_command
from kompressor_worker.errors import GateFailed, KompressorError, OutOfMemory, Terminated
from kompressor_worker.fit_command import FIT, add_arguments, fit_command

log = logging.getLogger(__name__)

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
      runtime: {engine: vllm}          # both served before anything is published; KOMPRESSOR_VLLM_PYTHON: a Python that has vLLM
                                       # (llama.cpp, KOMPRESSOR_LLAMA_CPP_PYTHON: for output.format gguf)
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
CLEAN = """\
Removes what a job has left at its output: unfinished work (uploads, journal, activations), and with --job what the job of that uid has
published too, file by file as kompressor.json lists it. Whatever else is there stays. A bucket with versions keeps the old ones.

Credentials come from OUTPUT_AWS_*, else from the usual AWS chain.

  kompressor clean s3://models/llama-3-8b-w4a16
  kompressor clean s3://models/llama-3-8b-w4a16 --job $(kubectl get kcj llama-w4a16 -o jsonpath={.metadata.uid})
"""
VERIFY = """\
Reads a published result and checks it: every file and tensor there and as written (config.json and tokenizer too), shapes as the scheme
has them, scales finite. Exit code 65: something is missing or damaged, 66: NaN or Inf, 64: no result there.

Credentials come from OUTPUT_AWS_*, else SOURCE_AWS_*, else from the usual AWS chain.

  kompressor verify s3://models/llama-3-8b-w4a16 --endpoint http://127.0.0.1:7070
  kompressor verify ./out
"""
EXPAND = """\
Turns one of our results back into a plain checkpoint in the model's own dtype: quantised linears decoded, linears stored by a bitmask with
their zeros, scales of inputs and of a KV cache left out, config.json without quantization_config, tokenizer and other files as they are.

  kompressor expand s3://models/llama-3-8b-sparse s3://models/llama-3-8b-sparse-dense
  kompressor expand pvc://models/llama-w4a16 ./plain
  kompressor expand ./out ./plain && vllm serve ./plain

What output.sparseStorage: bitmask has stored small in the bucket is so made ready for vLLM, byte for byte as output.sparseStorage: dense
would have written it. A result in W4A16 or FP8 expands to what its readers compute with: for tools that read plain checkpoints alone.

Memory holds some tensors of one block, whatever the size of the model. Nothing can be seen at OUT until all of it is there; cut off, the
same command goes on where it was. Every tensor is held to the digest that was written with it.

Credentials come from SOURCE_AWS_* (and SOURCE_HF_TOKEN) for URI and from OUTPUT_AWS_* for OUT, else from the usual AWS chain.

exit codes: 0 done, 64 not one of our results or not finished, 65 damaged, 74 storage trouble (try again), 75 told to stop (start again)
"""


def main(argv: Sequence[str] | None = None) -> None:
    try:
        code = run_cli(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        if not reader_is_gone():  # another pipe, or a connection
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still writes when it ends
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def reader_is_gone() -> bool:
    """Whether nobody reads standard output any more, such as `head` that has seen enough."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def run_cli(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    logs.configure(args.verbose, args.in_cluster)
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

    def place(p: argparse.ArgumentParser, words: str, **options: Any) -> None:
        p.add_argument("uri", help=words, **options)
        p.add_argument("--endpoint", help="URL of an S3-compatible server")
        p.add_argument("--region", help="region of the bucket")

    run = command("run", run_command, "compress a model as a manifest says", RUN)
    plan = command("plan", plan_command, "say what a job would do", PLAN)
    for p in (run, plan):
        p.add_argument("manifest", type=Path, help="a CompressionJob, YAML or JSON")
    run.add_argument("--in-cluster", action="store_true", help="report to the CompressionJob resource and the pod's termination log")
    plan.add_argument("--in-cluster", action="store_true", help="report to the pod's termination log")
    train = commands.add_parser("train")  # not for people: `run` starts it
    train.add_argument("manifest", type=Path)
    train.add_argument("--in-cluster", action="store_true")
    train.set_defaults(command=train_command, json=False, verbose=False)
    fit = command("fit", fit_command, "say which plans fit a GPU", FIT)
    place(fit, "the model: s3://bucket/prefix, hf://owner/name, pvc://claim/path, file:///path, or a path")
    add_arguments(fit)
    verify = command("verify", verify_command, "check a published result", VERIFY)
    place(verify, "s3://bucket/prefix, pvc://claim/path, file:///path, or a path")
    expand = command("expand", expand_command, "turn a result back into a plain checkpoint", EXPAND)
    place(expand, "the result: s3://bucket/prefix, hf://owner/name, pvc://claim/path, file:///path, or a path")
    expand.add_argument("out", metavar="OUT", help="where the plain checkpoint goes: s3://, pvc://, file://, or a path")
    expand.add_argument("--output-endpoint", metavar="URL", help="of OUT's S3-compatible server. Default: --endpoint")
    expand.add_argument("--output-region", metavar="REGION", help="of OUT's bucket. Default: --region")
    clean = command("clean", clean_command, "remove what a job has left at its output", CLEAN)
    place(clean, "s3://bucket/prefix, pvc://claim/path, file:///path, or a path", nargs="?")
    clean.add_argument("--job", metavar="UID", help="remove what the job of this uid has published too")
    clean.add_argument("--in-cluster", action="store_true", help="output and job from the environment; report to the pod's termination log")
    return top


def failed(error: KompressorError, args: argparse.Namespace) -> int:
    """One clear error: on the terminal, for programs (--json) and for the operator; with what was measured, where a gate was not met."""
    said: dict[str, Any] = {"reason": error.reason, "message": str(error), "exitCode": int(error.exit_code)}
    measured = error.result if isinstance(error, GateFailed) else {}
    if args.in_cluster:
        from kompressor_worker.report import write_termination_message

        fields = {"reason": str(error.reason), "exitCode": int(error.exit_code), "result": measured or None}
        log.error("%s", error, extra=fields)
        write_termination_message(said | {"message": str(error)[:2500]} | ({"summary": measured} if measured else {}))
    else:
        show(error, measured)
    if args.json:
        print(json.dumps({"error": said} | ({"result": measured} if measured else {}), indent=2))
    return int(error.exit_code)


def show(error: KompressorError, measured: Mapping[str, Any]) -> None:
    from kompressor_worker.terminal import err, measured_rows, table

    err.print(f"[bold red]{error.reason}[/]: ", end="")
    err.print(str(error), markup=False, highlight=False)
    if measured:
        err.print(table("measured", measured_rows(measured)))
