"""The original and the result served by an engine, in turns where there is memory for both: what a request waits, and what it takes.

All requests of a round come at the same moment, with prompts out of the evaluation data. A round's time to first token is the mean over its
requests, its latency ends with the last token of all, its rate counts tokens from when every request has its first. Rounds are compared by
their medians: noise of a machine is one-sided.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

from kompressor_api.runtime import RuntimeSpec
from kompressor_worker.calibration import Rows
from kompressor_worker.processor import model_name
from kompressor_worker.runtime import Installed
from kompressor_worker.runtime.asked import needs
from kompressor_worker.runtime.engine_process import EngineProcess
from kompressor_worker.runtime.room import gpu_free, host_free

log = logging.getLogger(__name__)


@dataclass
class Side:
    """One of the two models."""

    name: str
    folder: Path
    weights: int
    """Bytes."""
    cache: int
    """Bytes of keys and values that all requests of a round need."""
    rounds: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """By batch size."""
    memory: int = 0


def timed(
    sides: Sequence[Side],
    runtime: RuntimeSpec,
    prompts: Sequence[Sequence[int]],
    installed: Installed,
    environ: Mapping[str, str],
    folder: Path,
    stop: threading.Event,
) -> dict[str, Any]:
    """The report's `runtime` but for costs. Raises EngineFailed, Terminated."""
    deadline, arguments = time.monotonic() + runtime.timeout_seconds, installed.arguments
    gpu, engine = gpu_free(), installed.engine
    rooms = [*([] if gpu is None else [gpu]), *([host_free()] if gpu is None or engine.on_host else [])]
    together = sum(needs(engine, side.weights, side.cache) for side in sides) <= min(rooms)
    log.info("measuring with %s: original and result %s", installed.engine.name, "in turns" if together else "one after the other")
    said: dict[str, Any] = {}
    for group in [list(sides)] if together else [[side] for side in sides]:
        with ExitStack() as running:
            loaded = []
            for side in group:
                process = running.enter_context(EngineProcess(installed, side.name, folder, environ, stop, deadline))
                loaded.append(_Loaded(side, process, runtime, prompts))
                said = loaded[-1].load(arguments)
            _rounds(loaded, runtime)
            for one in loaded:
                one.end()
    found = {
        "engine": said["engine"],
        "device": said["device"] or model_name(),
        "memoryOf": "GPU" if said["device"] else "host",
        **runtime.model_dump(by_alias=True, include={"prompt", "generate", "batch", "rounds"}),
        "inTurns": together,
        **({"arguments": dict(arguments)} if arguments else {}),
    }
    return found | {when: _figures(side) for when, side in zip(("before", "after"), sides, strict=True)}


@dataclass
class _Loaded:
    side: Side
    process: EngineProcess
    runtime: RuntimeSpec
    prompts: Sequence[Sequence[int]]
    _other: int = 0
    """Bytes of the GPU beside what its torch says: context, libraries, graphs."""

    def load(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """With a round of each batch size, so that all is compiled and every buffer there."""
        free = gpu_free()
        said = self.process.ask(
            "loading",
            model=str(self.side.folder),
            tokens=self.runtime.tokens,
            requests=max(self.runtime.batch),
            kvBytes=self.side.cache,
            arguments=dict(arguments),
        )
        for batch in self.runtime.batch:
            self.round(batch)
        now = self.process.ask("looking at the memory of", memory=True)["nowBytes"]
        left = gpu_free()
        self._other = max(0, free - left - now) if free is not None and left is not None else 0
        return said

    def round(self, batch: int) -> dict[str, Any]:
        prompts = [list(prompt) for prompt in self.prompts[:batch]]
        return self.process.ask("serving", prompts=prompts, generate=self.runtime.generate)

    def end(self) -> None:
        self.side.memory = self._other + int(self.process.ask("looking at the memory of", memory=True)["peakBytes"])


def _rounds(loaded: Sequence[_Loaded], runtime: RuntimeSpec) -> None:
    """Each round turns the order, so that what changes with time falls on both."""
    for number in range(runtime.rounds):
        for batch in runtime.batch:
            for one in loaded if number % 2 == 0 else reversed(loaded):
                one.side.rounds.setdefault(batch, []).append(one.round(batch))


def _figures(side: Side) -> dict[str, Any]:
    batches = []
    for batch, rounds in side.rounds.items():
        batches.append(
            {
                "batch": batch,
                "firstToken": digits(median(fmean(one["firstToken"]) for one in rounds)),
                "latency": digits(median(one["seconds"] for one in rounds)),
                "tokensPerSecond": digits(median(one["decodeTokens"] / max(1e-9, one["decodeSeconds"]) for one in rounds)),
            }
        )
    return {"weightBytes": side.weights, "peakBytes": side.memory, "batches": batches}


def with_costs(found: Mapping[str, Any], price: float | None) -> dict[str, Any]:
    """Of a million generated tokens, prompts included: what a server costs that does nothing else. Nothing without a price an hour."""
    if price is None:
        return dict(found)

    def priced(each: Mapping[str, Any]) -> dict[str, Any]:
        rate = each["batch"] * found["generate"] / each["latency"]
        return {**each, "costPerMillionTokens": digits(price / (3600 * rate) * 1e6)}

    sides = {when: {**found[when], "batches": [priced(each) for each in found[when]["batches"]]} for when in ("before", "after")}
    return {**found, **sides, "pricePerHour": price}


def prompts_of(rows: Rows, runtime: RuntimeSpec) -> list[list[int]]:
    """The evaluation data's tokens one after the other, from the start again where they do not suffice."""
    stream = cycle([int(token) for row in rows.tokens for token in row.tolist()])
    return [list(islice(stream, runtime.prompt)) for _ in range(max(runtime.batch))]


def digits(value: float) -> float:
    return float(f"{value:.5g}")
