"""A decoder block on its way through the engine, the streams that flow through it, and how much work that is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor

from kompressor_worker.activations import Activations
from kompressor_worker.batch import Batch
from kompressor_worker.block import Encoded, Pruned
from kompressor_worker.decoder_block import Block
from kompressor_worker.evaluate import BlockError
from kompressor_worker.forward import KvObserver
from kompressor_worker.layout import StageLayout, UnitLayout
from kompressor_worker.schemes import Scheme


@dataclass(frozen=True)
class Place:
    """Which block it is, counted from 0: in the source, and in the result, which may have fewer."""

    source: int
    result: int


@dataclass
class Streams:
    """Who flows through the blocks; absent: None."""

    calibration: Activations | None = None
    original: Activations | None = None
    """Evaluation rows through the original model."""
    compressed: Activations | None = None
    """The same rows through the compressed one."""
    deployment: Activations | None = None
    """Rows as deployment sees them, beside the calibration's: for drift."""
    reference: Activations | None = None
    """The calibration rows through the original model, for passes that correct against it."""

    def all(self) -> list[Activations]:
        return [s for s in (self.calibration, self.original, self.compressed, self.deployment, self.reference) if s is not None]

    def of_the_original(self) -> list[Activations]:
        return [s for s in (self.original, self.reference) if s is not None]

    def through_compressed(self) -> list[Activations]:
        """Those that flow with published weights, but unrounded inputs."""
        return [s for s in (self.calibration, self.deployment) if s is not None]


@dataclass
class Finished:
    """A block as it will be published, and what there is to say of it."""

    weights: dict[str, Tensor]
    """What is not encoded, by full name."""
    encoded: dict[str, Encoded]
    schemes: dict[str, Scheme]
    pruned: dict[str, Pruned] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


@dataclass
class BlockWork:
    """A block on its way."""

    block: Block
    finished: Finished
    current: dict[str, Tensor]
    """The weights as they are now, decoded where they are encoded: what propagates."""
    observer: KvObserver
    notes: dict[str, Any] = field(default_factory=dict)
    drift: dict[str, Any] = field(default_factory=dict)
    reduced: dict[str, Any] = field(default_factory=dict)
    expert_tokens: list[int] = field(default_factory=list)
    """In a mixture, where something is measured: calibration tokens routed to each expert."""

    def take_up(self) -> None:
        """What passes changed without encoding it propagates from now on."""
        encoded = {f"{name}.weight" for name in self.finished.encoded}
        self.current |= {name: tensor for name, tensor in self.finished.weights.items() if name not in encoded}


def size_of_unit(unit: UnitLayout) -> int:
    return sum(size_of(stage) for stage in unit.stages)


def size_of(layout: StageLayout) -> int:
    """Elements of its linears' weights."""
    return sum(prod(x.shape) for x in layout.linears)


def columns_of(layout: StageLayout) -> int:
    return max(x.shape[1] for x in layout.linears)


def batch_tokens(batch: Batch) -> int:
    return len(batch.lengths) * max(batch.lengths)


def output_error(original: Activations, compressed: Activations, turned: Callable[[Tensor], Tensor]) -> float:
    """Relative error of the hidden states over all positions that count; `turned` brings the original's into the compressed one's basis."""
    error = BlockError()
    for a, b in zip(original.batches, compressed.batches, strict=True):
        h, c = a.state["hidden"], b.state["hidden"]
        valid = a.valid(h.shape[1], h.device)
        h, c = (h.flatten(0, 1), c.flatten(0, 1)) if valid is None else (h[valid], c[valid])
        error.add(turned(h), c)
    return error.value
