"""Evaluation against a model of other layers and names than the result's: that of a student which is a checkpoint of its own.

The original's rows go through it first, by themselves. Its last hidden states and its head are kept, and meet the result's at its own head.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kompressor_worker.activations import Activations, Spill
from kompressor_worker.block_work import Streams
from kompressor_worker.calibrated import Engine
from kompressor_worker.calibrated_units import Calibrated
from kompressor_worker.calibration import Rows
from kompressor_worker.decoder import Decoder
from kompressor_worker.distil.lesson import StoredModel
from kompressor_worker.errors import Terminated
from kompressor_worker.last_hidden import LastHidden
from kompressor_worker.layout import UnitLayout
from kompressor_worker.matrix_units import FinalNorm, MatrixUnits
from kompressor_worker.pipeline import Limits, Load, Prefetcher
from kompressor_worker.shards import plan_output
from kompressor_worker.snapshots import Snapshots
from kompressor_worker.storage import Output
from kompressor_worker.stream import Step, Work
from kompressor_worker.tensors import decode
from kompressor_worker.trained_units import Evaluated, TrainedMatrices
from kompressor_worker.unit_kinds import final_norm, kind_of

__all__ = ["Apart", "Original"]


@dataclass(frozen=True)
class Original:
    """What the original makes of the evaluation's rows."""

    hidden: Sequence[Tensor]
    """[rows, length, hidden] a batch, behind its last norm."""
    head: Tensor
    """[vocabulary, hidden]."""

    @classmethod
    def of(cls, model: StoredModel, rows: Rows, output: Output, limits: Limits, device: torch.device, stop: threading.Event) -> Original:
        """Raises Terminated, BadNumerics, and what storage raises."""
        layout = model.layout
        decoder = Decoder(layout, device)
        stream = Activations.of("original", rows.tokens, decoder.dtype, int(decoder.config.hidden_size), Spill(limits.activations), device)
        streams = Streams(original=stream)
        work = Work(layout, (), {}, plan_output(layout, {}), limits)
        units = Calibrated(work, Engine(decoder, (), {}, streams), Snapshots(streams, output, limits.snapshot_seconds, work))

        def step(nbytes: int) -> None:
            if stop.is_set():
                raise Terminated("told to stop; what was trained is kept")

        kept: dict[str, Tensor] = {}
        loads = [load for number, unit in enumerate(layout.units) for load in loads_of(units, number, unit)]
        with Prefetcher(model.source, loads, limits) as prefetched:
            incoming = iter(prefetched)
            for number, unit in enumerate(layout.units):
                match kind_of(unit):
                    case "embeddings":
                        units.replay(number, incoming, step)
                    case "block":
                        units.engine.pass_by(units.place(number), unit, units.reader(incoming), step)
                    case "head":
                        for tensor in (t for stage in unit.stages for t in stage.tensors):
                            kept[tensor.name] = decode(tensor, next(incoming).views).clone()
            matrices = {x.weight: x.kind for unit in layout.units for stage in unit.stages for x in stage.linears}
            if not any(matrices.get(name) == "head" for name in kept):
                kept |= tied(model, matrices, limits)
        heads = {name: tensor for name, tensor in kept.items() if matrices.get(name) in ("head", "embedding")}
        norm = final_norm({name: tensor for name, tensor in kept.items() if name not in heads}).to(device)
        hidden = [decoder.norm(batch.state["hidden"], norm).to(decoder.dtype) for batch in stream.batches]
        return cls(hidden, next(iter(heads.values())).to(device))


def loads_of(units: Calibrated, number: int, unit: UnitLayout) -> list[Load]:
    match kind_of(unit):
        case "embeddings" | "block":
            return list(units.loads(number))
        case "head":
            return [Load(tuple((s, 0, s.nbytes) for s in t.stored)) for stage in unit.stages for t in stage.tensors]
    return []


def tied(model: StoredModel, matrices: Mapping[str, str], limits: Limits) -> dict[str, Tensor]:
    """The embeddings, where they are the head."""
    found = [t for stage in model.layout.stages() for t in stage.tensors if matrices.get(t.name) == "embedding"]
    loads = [Load(tuple((s, 0, s.nbytes) for s in t.stored)) for t in found]
    with Prefetcher(model.source, loads, limits) as prefetched:
        return {t.name: decode(t, loaded.views).clone() for t, loaded in zip(found, prefetched, strict=True)}


class Met(LastHidden):
    """The result's last hidden states beside those of the original, which are there already."""

    def __init__(self, original: Original, engine: Engine, changed: Tensor, nbytes: int, tell: Callable[[int], None]) -> None:
        super().__init__(engine, changed, changed, nbytes, tell, original.hidden)
        self._head = original.head

    def add(self, offset: int, original: Tensor, compressed: Tensor) -> None:
        super().add(offset, self._head[offset : offset + len(compressed)], compressed)


@dataclass(frozen=True)
class ApartMatrices(TrainedMatrices):
    """The head meets what is kept of the original."""

    original: Original

    @property
    def comparing(self) -> bool:
        return True

    def _last_hidden(self, norm: FinalNorm, nbytes: int, step: Step) -> LastHidden:
        return Met(self.original, self.engine, final_norm(norm.changed), nbytes, step)


@dataclass
class Apart(Evaluated):
    """Units that are evaluated so."""

    original: Original

    def matrices(self) -> MatrixUnits:
        return ApartMatrices(self.work, self.engine, self.trained, self.original)
