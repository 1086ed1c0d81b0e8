"""`kompressor fit`: which plans there are for a model on a GPU, from headers alone."""

from __future__ import annotations

import argparse
import json
import os
import threading
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from kompressor_api.hardware import ENGINES
from kompressor_api.names import ExitCode
from kompressor_api.target import TargetSpec
from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker.errors import UserError
from kompressor_worker.gguf_result import prepared
from kompressor_worker.reading import read_layout
from kompressor_worker.storage.locations import open_source
from kompressor_worker.target.planner import Fit, fit, longest_context

FIT = """\
Says which plans there are to serve a model on one GPU or edge device: what each takes of its memory, whether that fits, and how fast a
roofline predicts it to be. From config.json and headers alone, in seconds, without a GPU.

  kompressor fit hf://meta-llama/Llama-3.1-8B-Instruct --gpu RTX-4090 --context 32768
  kompressor fit s3://models/qwen3-30b-a3b --gpu L40S --context 40960 --concurrency 8 --price-per-hour 0.90
  kompressor fit ./model --memory 16Gi --compute-capability 8.9 --bandwidth 672G --context 8192
  kompressor fit ./model --gpu T4 --context 8192 --json | jq '.plans[] | select(.fits)'
  kompressor fit ./model --device Raspberry-Pi-5-8GB --context 8192
  kompressor fit ./model --memory 4Gi --bandwidth 50G --context 8192

Plans go from the safest to the boldest. > is what a job with spec.target would carry out; where the measured loss is too large it goes on
with those marked 2 and 3. They are chosen among what the GPU runs (in vLLM; in llama.cpp, which devices have, its mixes of GGUF types),
what this model's passes take, and what calibration allows (--data-free: none). `expected` is by how much perplexity usually rises, a class
to order plans by and no promise; `tokens/s` is what the memory's bandwidth allows to all requests together, each at its full context: no
server reaches it.

What is counted: the result's tensors to the byte; keys and values of --concurrency requests of --context tokens; the largest step of a
prefill; 1.5 GiB for driver, libraries and graphs (llama.cpp: 128 MiB); and what stays free: 8 % of a GPU's memory, what a device's system
keeps, nothing of --memory without --compute-capability.

exit codes: 0 something fits, 64 nothing does (it says what would), or the model or the GPU is not known
"""


WIDTH = 132
"""Columns that the table takes; a narrower terminal folds its lines."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--gpu", help="name of the GPU, such as RTX-4090, L40S or H100")
    command.add_argument("--device", help="name of an edge device with llama.cpp, such as Raspberry-Pi-5-8GB or Apple-M4-16GB")
    command.add_argument("--memory", metavar="SIZE", help="another GPU's memory, such as 24Gi, or what llama.cpp may take of a device's")
    command.add_argument("--compute-capability", metavar="X.Y", help="another GPU's CUDA compute capability, such as 8.9")
    command.add_argument("--bandwidth", metavar="RATE", help="bytes a second of its memory, such as 1008G")
    command.add_argument("--engine", choices=tuple(ENGINES), help="Default: vllm on a GPU, else llama.cpp")
    command.add_argument("--context", type=int, metavar="TOKENS", help="tokens of the longest request. Default: all that the model takes")
    command.add_argument("--concurrency", type=int, metavar="N", help="requests of that length at a time. Default: 1")
    command.add_argument("--prefer", choices=("quality", "latency"), help="the safest plan that fits, or the fastest. Default: quality")
    command.add_argument("--max-perplexity-increase", metavar="PERCENT", help="what a plan may be expected to cost. Default: 2%%")
    command.add_argument("--price-per-hour", type=float, metavar="PRICE", help="of the GPU: adds what a million tokens cost")
    command.add_argument("--data-free", action="store_true", help="without calibration data")


def fit_command(args: argparse.Namespace) -> int:
    from kompressor_worker.verify import wanted_source  # with torch, which `kompressor plan` does without

    location = wanted_source(args.uri, args.endpoint, args.region)
    source = open_source(location, os.environ, threading.Event())
    layout = read_layout(source)
    context = args.context if args.context is not None else longest_context(layout)
    if context is None:
        raise UserError("--context: config.json does not say how many tokens the model takes; give a number")
    spec = asked(args, location.model_dump(by_alias=True, exclude_none=True), context)
    found = fit(spec, prepared(spec.output, source, layout))
    if args.json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        show(found, args.uri)
    found.refuse_if_nothing_fits()
    return int(ExitCode.DONE)


def asked(args: argparse.Namespace, location: Mapping[str, Any], context: int) -> CompressionJobSpec:
    """The spec of a job with this target, whose data nobody looks at. Raises UserError."""
    described = {"memory": args.memory, "computeCapability": args.compute_capability, "bandwidth": args.bandwidth}
    given = {name: value for name, value in described.items() if value is not None}
    target = {
        "gpu": args.gpu,
        "device": args.device,
        "engine": args.engine,
        **({"hardware": given or None} if args.compute_capability is not None else given),
        "context": context,
        "concurrency": args.concurrency,
        "prefer": args.prefer,
        "maxPerplexityIncrease": args.max_perplexity_increase,
        "pricePerHour": args.price_per_hour,
    }
    data = {"dataset": {"uri": "s3://data/none"}}
    target = {name: value for name, value in target.items() if value is not None}
    spec = {
        "model": {"source": dict(location)},
        "target": target,
        "evaluation": data,
        **({} if args.data_free else {"calibration": data}),
    }
    try:
        output = {"uri": "s3://nowhere/result", "format": TargetSpec.model_validate(target).format}
        return CompressionJobSpec.model_validate(spec | {"output": output})
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise UserError("; ".join(lines)) from error


def show(found: Fit, uri: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from kompressor_worker.terminal import human, out

    wide = Console(width=max(out.width, WIDTH), soft_wrap=True)

    target, on = found.target, found.on
    title = f"{uri} on {on.name} ({human(on.memory)}), context {target.context:,}, concurrency {target.requests}"
    t = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    t.add_column("")
    t.add_column("plan", no_wrap=True)
    priced = target.price_per_hour is not None
    for head in ("weights", "KV cache", "total", "fits", "tokens/s", "read/token", *(["cost/M"] if priced else []), "expected"):
        t.add_column(head, justify="right", no_wrap=True)
    marks = {row.name: ">" if i == 0 else str(i + 1) for i, row in enumerate(found.ladder)}
    for row in found.rows:
        if row.need is None or row.speed is None:
            continue
        cost = [f"{row.speed.cost_per_million(target.price_per_hour):.3g}"] if target.price_per_hour is not None else []
        t.add_row(
            marks.get(row.name, ""),
            row.name,
            human(row.need.weights),
            human(row.need.kv),
            human(row.need.total),
            "yes" if row.fits else "no",
            f"{row.speed.tokens_per_second:,.0f}",
            human(row.speed.bytes_per_token),
            *cost,
            f"+{100 * row.loss:.3g} %",
        )
    wide.print(t)
    refused: dict[str, list[str]] = {}
    for row in found.rows:
        if row.refused:
            refused.setdefault(row.refused, []).append(row.name)
    for why, names in refused.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        wide.print(f"not here: {names[0]}{more}: {why}", highlight=False, markup=False)
