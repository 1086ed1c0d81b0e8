"""How a job's units are worked on: tensor by tensor, or with activations flowing through the blocks."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version

import torch

from kompressor_worker import kernels
from kompressor_worker.activations import Activations, Spill
from kompressor_worker.assignment import Assignment
from kompressor_worker.block_work import Streams
from kompressor_worker.calibrated import Engine
from kompressor_worker.calibrated_units import Calibrated
from kompressor_worker.calibration import Rows
from kompressor_worker.decoder import Decoder
from kompressor_worker.distil.lesson import StoredModel
from kompressor_worker.evaluated_apart import Apart, Original
from kompressor_worker.journal import Journal
from kompressor_worker.kernels import build
from kompressor_worker.layout import ModelLayout
from kompressor_worker.pipeline import Limits
from kompressor_worker.processor import model_name
from kompressor_worker.shards import plan_output
from kompressor_worker.snapshots import Snapshots
from kompressor_worker.storage import Output
from kompressor_worker.stream import Work
from kompressor_worker.survey import Survey
from kompressor_worker.trained_units import Evaluated, Trained


def calibrated(work: Work, output: Output, rows: Mapping[str, Rows], least_tokens: int = 0) -> Calibrated:
    """`rows` by section of the spec: calibration, drift, evaluation. `least_tokens`: experts with fewer are measured on all. Raises
    UserError for a decoder that cannot be run."""
    engine = _engine(work, rows, least_tokens)
    return Calibrated(work, engine, Snapshots(engine.streams, output, work.limits.snapshot_seconds, work))


def evaluated(work: Work, output: Output, rows: Mapping[str, Rows], trained: Trained) -> Evaluated:
    """The same where all tensors are there already."""
    engine = _engine(work, {section: found for section, found in rows.items() if section == "evaluation"}, 0)
    return Evaluated(work, engine, Snapshots(engine.streams, output, work.limits.snapshot_seconds, work), trained)


def evaluated_apart(work: Work, output: Output, rows: Rows, trained: Trained, original: StoredModel, stop: threading.Event) -> Apart:
    """The same beside an original of other layers than the result's."""
    seen = Original.of(original, rows, output, work.limits, compute_device(), stop)
    engine = _engine(work, {"evaluation": rows}, 0)
    engine.streams.original = None
    return Apart(work, engine, Snapshots(engine.streams, output, work.limits.snapshot_seconds, work), trained, seen)


def _engine(work: Work, rows: Mapping[str, Rows], least_tokens: int) -> Engine:
    device = compute_device()
    decoder = Decoder(work.layout, device)
    source = decoder if work.layout.config == work.layout.source_config else Decoder(as_it_was(work.layout), device)
    spill = Spill(work.limits.activations)

    def stream(name: str, section: str, flows: Decoder = decoder) -> Activations | None:
        found = rows.get(section)
        if found is None:
            return None
        return Activations.of(name, found.tokens, decoder.dtype, int(flows.config.hidden_size), spill, device)

    streams = Streams(
        calibration=stream("calibration", "calibration"),
        original=stream("original", "evaluation", source),
        compressed=stream("compressed", "evaluation"),
        deployment=stream("deployment", "drift"),
        reference=stream("reference", "calibration", source) if any(p.corrects for p in work.passes) else None,
    )
    return Engine(decoder, work.passes, work.schemes, streams, source, least_tokens)


def surveyed(number: int, assigned: Assignment, journal: Journal, rows: Mapping[str, Rows], limits: Limits) -> Survey:
    """One of a job's surveys."""
    source, device = assigned.source, compute_device()
    decoder = Decoder(source, device)
    spill = Spill(limits.activations)
    stream = Activations.of("calibration", rows["calibration"].tokens, decoder.dtype, int(decoder.config.hidden_size), spill, device)
    streams = Streams(calibration=stream)
    work = Work(source, (), {}, plan_output(source, {}), limits)
    units = Calibrated(work, Engine(decoder, (), {}, streams), Snapshots(streams, journal.output, limits.snapshot_seconds, work))
    return Survey(number, units, assigned.passes, journal)


def as_it_was(layout: ModelLayout) -> ModelLayout:
    return replace(layout, config=layout.source_config)


def compute_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_fingerprint() -> str:
    """On what the same bytes come out again: kind of device, libraries, threads."""
    if torch.cuda.is_available():
        kind = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        products = "bf16" if kernels.fast_bf16(compute_device()) else "fp32"
        kind = f"{model_name()}, {torch.get_num_threads()} threads, products in {products}"
    return f"{kind}, torch {version('torch')}, kernels {os.environ.get('KOMPRESSOR_KERNELS') or build.source_digest()}"
