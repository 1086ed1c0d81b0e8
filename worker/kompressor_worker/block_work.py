"""A decoder block on its way through the engine, the streams that flow through it, and how much work that is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor

from kompressor_worker.activations import Activations
from kompressor_worker.batch import Batch
from kompressor_worker.block import Encoded, Pruned
from kompressor_worker.decoder_block import Block
from kompressor_worker.ending import Ending
from kompressor_worker.evaluate import BlockError
from kompressor_worker.forward import KvObserver
from kompressor_worker.layout import StageLayout, UnitLayout
from kompressor_worker.passes import Pass
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
    """A stage as it will be published."""

    weights: dict[str, Tensor]
    """What is not encoded, by full name."""
    encoded: dict[str, Encoded]
    schemes: dict[str, Scheme]
    pruned: dict[str, Pruned] = field(default_factory=dict)


@dataclass
class PartWork:
    """A part of a block on its way; it ends with it."""

    weights: dict[str, Tensor]
    """Full names; also those of the block's norms. Passes change them."""
    schemes: dict[str, Scheme]
    current: dict[str, Tensor]
    """The weights as they are now, decoded where they are encoded: what propagates."""
    encoded: dict[str, Encoded] = field(default_factory=dict)
    pruned: dict[str, Pruned] = field(default_factory=dict)

    def take_up(self) -> None:
        """What passes changed without encoding it propagates from now on."""
        encoded = {f"{name}.weight" for name in self.encoded}
        self.current |= {name: tensor for name, tensor in self.weights.items() if name not in encoded}

    def published(self) -> dict[str, Tensor]:
        """Its tensors as the files hold them, by name."""
        return {**self.weights, **{name: tensor for e in self.encoded.values() for name, tensor in e.tensors.items()}}

    def of(self, stage: StageLayout) -> Finished:
        linears, names = {x.name for x in stage.linears}, {t.name for t in stage.tensors}
        names -= {f"{name}.weight" for name in self.encoded}
        plain = {name: tensor for name, tensor in self.weights.items() if name in names}
        encoded = {name: e for name, e in self.encoded.items() if name in linears}
        pruned = {name: p for name, p in self.pruned.items() if name in linears}
        return Finished(plain, encoded, self.schemes, pruned)


@dataclass
class BlockWork:
    """A block on its way: what lasts from one part to the next."""

    block: Block
    observer: KvObserver
    notes: dict[str, Any] = field(default_factory=dict)
    drift: dict[str, Any] = field(default_factory=dict)
    reduced: dict[str, Any] = field(default_factory=dict)
    expert_tokens: list[int] = field(default_factory=list)
    """In a mixture, where something is measured: calibration tokens routed to each expert."""
    unrouted: frozenset[int] = frozenset()
    """Experts that are measured on all tokens, since too few are routed to them."""
    ending: Ending | None = None
    """Where it is tuned, and the last one: what reads its output."""

    def count(self, tokens: Mapping[int, int], least: int) -> None:
        """`tokens` that each expert gets; those with fewer than `least` are measured on all."""
        self.expert_tokens = [tokens[number] for number in sorted(tokens)]
        self.unrouted = frozenset(number for number, count in tokens.items() if count < least)

    def note(self, stage: str, notes: Mapping[str, Any]) -> None:
        """Those of a mixture's experts are told together."""
        self.notes[stage] = joined(self.notes[stage], notes) if stage in self.notes else dict(notes)

    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if any(self.expert_tokens):
            found["expertTokens"] = self.expert_tokens
        if self.unrouted:
            found["expertsOnAllTokens"] = sorted(self.unrouted)
        return found | {name: said for name, said in (("notes", self.notes), ("reduced", self.reduced), ("drift", self.drift)) if said}


def joined(a: Any, b: Any) -> Any:
    """Two notes of the same form: names are put together, lists go on, and of two numbers the larger one counts."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return {**a, **{key: joined(a[key], value) if key in a else value for key, value in b.items()}}
    if isinstance(a, list) and isinstance(b, list):
        return [*a, *b]
    return max(a, b) if isinstance(a, int | float) and isinstance(b, int | float) else b


def size_of_unit(unit: UnitLayout) -> int:
    return sum(size_of(stage) for stage in unit.stages)


def size_of(layout: StageLayout) -> int:
    """Elements of its linears' weights."""
    return sum(prod(x.shape) for x in layout.linears)


def columns_of(layout: StageLayout) -> int:
    return max(x.shape[1] for x in layout.linears)


def expected_work(streams: Streams, passes: Sequence[Pass], block: Block, unit: UnitLayout) -> float:
    """Of a block and what flows through it, in multiply-adds: a forward through a step is one a weight and token, a product with a Hessian
    one a weight and column. `passes`: none where the block is done already."""
    tokens = sum(t.numel() for stream in streams.all() for t in stream.tokens)
    expected: float = sum(size_of(step.layout) for step in block.steps) * tokens
    expected += sum(p.products for p in passes) * sum(size_of(step.layout) * columns_of(step.layout) for step in block.steps)
    if streams.calibration is not None:
        tokens = sum(t.numel() for t in streams.calibration.tokens)
        expected += 3 * size_of_unit(unit) * tokens / max(1, streams.calibration.rows) * sum(p.tuned_rows for p in passes)
        if any(p.reduces for p in passes):
            expected += size_of_unit(unit.as_stored()) * tokens
        if any(p.whole_block for p in passes):
            expected += sum(size_of(step.layout) for step in block.steps[:-1]) * tokens
    return expected


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
