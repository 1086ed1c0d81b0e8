"""What `kompressor run`, `plan`, `verify`, `expand` and `clean` do; each raises what kompressor_worker.errors names."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kompressor_api.names import ENV_MEMORY_PLAN, TRAINING_PASS, ExitCode, Reason, Role
from kompressor_api.training import PLACES, training_locations
from kompressor_api.worker import trains
from kompressor_worker.errors import GateFailed, KompressorError, UserError
from kompressor_worker.job import Job, load_job
from kompressor_worker.storage.locations import open_output

if TYPE_CHECKING:
    from kompressor_worker.training_process import Together

log = logging.getLogger(__name__)


def run_command(args: argparse.Namespace) -> int:
    stop = told_to_stop()
    from kompressor_worker.progress import Listener, Progress
    from kompressor_worker.report import Resource
    from kompressor_worker.run import run
    from kompressor_worker.terminal import Bar, Lines, is_interactive

    job = load_job(args.manifest, os.environ)
    refuse_file_uris(job, args.in_cluster)
    with ExitStack() as stack:
        together: Together | None = None
        if trains(job.spec.passes):
            from kompressor_worker.distil.group import Gathering
            from kompressor_worker.training_process import Together, command, follow, group_of

            if not (group := group_of(job, os.environ)).leads:
                follow(group, command(args.manifest, args.in_cluster), job, os.environ, stop)
                return int(ExitCode.DONE)
            if group.size > 1:
                together = Together(stack.enter_context(Gathering(group)), command(args.manifest, args.in_cluster))
        listeners: list[Listener] = [stack.enter_context(Bar()) if is_interactive() else Lines()]
        resource = Resource(job.namespace, job.name) if args.in_cluster else None
        if resource:
            listeners.append(resource)
        result: dict[str, Any] | None = None
        try:
            summary = run(job, os.environ, Progress(listeners), stop, memory_plan(), together)
            if together is not None:
                together.gathering.over()
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
        report({"reason": reason, "message": message, "exitCode": 0, "summary": result})
        return int(ExitCode.DONE)
    show_result(result, summary.already, args.json)
    return int(ExitCode.DONE)


def train_command(args: argparse.Namespace) -> int:
    """What the processes do that train together; `run` starts them."""
    from kompressor_worker.distil.launching import Member
    from kompressor_worker.training_process import train_in_group

    try:
        with Member() as member:
            train_in_group(load_job(args.manifest, os.environ), os.environ, member, memory_plan())
    except KompressorError as error:  # whoever started it has been told
        log.debug("%s", error)
        return int(error.exit_code)
    return int(ExitCode.DONE)


def plan_command(args: argparse.Namespace) -> int:
    stop = told_to_stop() if args.in_cluster else None
    from kompressor_worker.plan import make_plan

    job = load_job(args.manifest, os.environ)
    refuse_file_uris(job, args.in_cluster)
    found = make_plan(job, os.environ, memory_plan(), stop)
    if found.scratch and not args.in_cluster:  # there the worker's volume is another one
        from kompressor_worker.runtime.checkpoints import refuse_without_scratch

        refuse_without_scratch(found.scratch)
    plan = found.as_json()
    if args.in_cluster:
        for warning in plan["warnings"]:
            log.warning("%s", warning)
        report(found.message(job.spec.output.uri))
    if args.json:
        print(json.dumps(plan, indent=2))
    if args.in_cluster or args.json:
        return int(ExitCode.DONE)

    from kompressor_worker.terminal import bitmask_rows, flow_rows, human, out, shape_rows, table, training_rows

    rows = {
        "model": f"{plan['family'] or 'unknown family'}, {plan['units']} units",
        "schemes": ", ".join([*(f"{k}: {n} linears" for k, n in plan["schemes"].items()), f"exact: {plan['exact']}"]),
        **({"pruned": ", ".join(f"{k}: {n} linears" for k, n in plan["pruned"].items())} if "pruned" in plan else {}),
        **bitmask_rows(plan),
        **shape_rows(plan),
        "size": f"{human(plan['sourceBytes'])} -> {human(plan['outputBytes'])} ({plan['ratio']}x smaller), {plan['shards']} shard(s)",
        "peak memory": human(plan["peakMemoryBytes"]) + (f", {human(gpu)} on the GPU" if (gpu := plan.get("gpuMemoryBytes")) else ""),
        "time": "none" if plan["alreadyCompressed"] else f"about {plan['estimatedSeconds']:,} s: a few to start, then 300 MB/s of source",
        **flow_rows(plan),
        **training_rows(plan),
        **({"copies": f"{human(plan['scratchBytes'])} in the folder of temporary files, to be served"} if plan.get("scratchBytes") else {}),
        "output": "already holds this result" if plan["alreadyCompressed"] else "free",
    }
    out.print(table(f"plan of {job.name}", rows))
    if found.target is not None:
        from kompressor_worker.fit_command import show

        show(found.target, job.spec.model.source.uri)
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


def expand_command(args: argparse.Namespace) -> int:
    stop = told_to_stop()
    from kompressor_api.v1alpha1 import refuse_overlap
    from kompressor_worker.clean import wanted_output
    from kompressor_worker.expand import expand
    from kompressor_worker.progress import Listener, Progress
    from kompressor_worker.terminal import Bar, Lines, human, is_interactive, out, table
    from kompressor_worker.verify import wanted_source

    source = wanted_source(args.uri, args.endpoint, args.region)
    output = wanted_output(args.out, args.output_endpoint or args.endpoint, args.output_region or args.region)
    try:
        refuse_overlap(source, output)
    except ValueError as error:
        raise UserError(str(error)) from error
    with ExitStack() as stack:
        listeners: list[Listener] = [stack.enter_context(Bar()) if is_interactive() else Lines()]
        done = expand(source, output, os.environ, Progress(listeners), stop, memory_plan())
    if args.json:
        print(json.dumps(done.as_json(), indent=2))
        return int(ExitCode.DONE)
    rows = {
        "size": f"{human(done.source_bytes)} -> {human(done.output_bytes)}",
        "decoded": f"{done.linears} linears",
        "time": "none: the output already held this checkpoint" if done.already else f"{done.seconds:.0f} s",
        "where": done.uri,
    }
    out.print(table("expanded", rows))
    return int(ExitCode.DONE)


def clean_command(args: argparse.Namespace) -> int:
    stop = told_to_stop()
    from kompressor_worker.clean import clean, ordered_output, wanted_output

    output, uid = ordered_output(os.environ) if args.in_cluster else (wanted_output(args.uri, args.endpoint, args.region), args.job)
    cleaned = clean(open_output(output, os.environ, stop), uid)
    if args.in_cluster:
        report({"reason": Reason.CLEANED_UP, "message": cleaned.message, "exitCode": 0})
    elif args.json:
        print(json.dumps(asdict(cleaned), indent=2))
    else:
        print(cleaned.message)
    return int(ExitCode.DONE)


def told_to_stop() -> threading.Event:
    """Set by SIGTERM and SIGINT. First of all: as a pod's first process we would not hear them otherwise."""
    stop = threading.Event()
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, lambda *_: stop.set())
    return stop


def report(message: Mapping[str, Any]) -> None:
    """To the log, and to the operator by the pod's termination message."""
    from kompressor_worker.report import write_termination_message

    log.info("%s", message["message"], extra={"reason": str(message["reason"]), "exitCode": message["exitCode"]})
    write_termination_message(message)


def as_source(environ: Mapping[str, str]) -> dict[str, str]:
    """A result is read with the keys that wrote it, where there are some."""
    output, source = Role.OUTPUT.env_prefix, Role.SOURCE.env_prefix
    written = {k.replace(output, source, 1): v for k, v in environ.items() if k.startswith(f"{output}AWS_") and v}
    kept = {k: v for k, v in environ.items() if not (written and k.startswith(f"{source}AWS_"))}
    return {**kept, **written}


def show_result(result: dict[str, Any], already: bool, as_json: bool) -> None:
    from kompressor_worker.publish import PAGE
    from kompressor_worker.terminal import bitmask_rows, human, measured_rows, out, table

    if as_json:
        print(json.dumps(result, indent=2))
        return
    rows = {
        "size": f"{human(result['sourceBytes'])} -> {human(result['outputBytes'])} ({result['ratio']})",
        "quantised": f"{result['quantizedTensors']} linears, relative weight error {result['relativeError']}",
        **(
            {"pruned": f"{result['prunedTensors']} linears, {result['sparsity']} of their weights are zero"} if "sparsity" in result else {}
        ),
        **bitmask_rows(result),
        **measured_rows(result),
        "time": "none: the output already held this result" if already else f"{result['seconds']} s",
        "where": result["uri"],
        "report": f"{result['uri'].rstrip('/')}/{PAGE}",
    }
    out.print(table("done", rows))
    for warning in result.get("warnings", []):
        out.print(f"warning: {warning}")


def refuse_file_uris(job: Job, in_cluster: bool) -> None:
    spec = job.spec
    uris = {"model.source.uri": spec.model.source.uri, "output.uri": spec.output.uri}
    uris |= {f"{sample.SECTION}.dataset.uri": sample.dataset.uri for sample in spec.datasets}
    places = training_locations(spec.passes)
    uris |= {f"passes[].{TRAINING_PASS}.{'.'.join(PLACES[role])}.uri": str(place["uri"]) for role, place in places}
    for field, uri in uris.items():
        if in_cluster and uri.startswith("file://"):
            raise UserError(f"spec.{field}: {uri} is a pod's own disk in a cluster; use s3:// or pvc://")


def memory_plan() -> Any:
    """How much to hold, from what the operator says: each earlier out-of-memory makes it smaller."""
    from kompressor_worker.pipeline import Limits

    return Limits().smaller(int(os.environ.get(ENV_MEMORY_PLAN, "0")))
