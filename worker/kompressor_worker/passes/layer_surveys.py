"""What passes that treat layers unlike measure of the source: how much each block does, the linear maps that stand in for runs of blocks,
and what a sliding window costs each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from kompressor_worker.architectures import text_config
from kompressor_worker.errors import BadNumerics, UserError
from kompressor_worker.evaluate import BlockError
from kompressor_worker.passes.surveyor import SeenBlock, Surveyed, Surveyor
from kompressor_worker.passes.variants import Variants

if TYPE_CHECKING:
    from kompressor_worker.batch import Batch
    from kompressor_worker.layout import ModelLayout

DAMPENING = 0.01
"""Share of the mean diagonal that pulls a map towards the identity."""


class Influence(Surveyor):
    """1 - mean cosine of a block's input and output."""

    whole_block = False

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.tensors = {"scores": torch.zeros(layers, dtype=torch.float64)}

    def block(self, seen: SeenBlock) -> None:
        total, count = 0.0, 0
        for batch in range(len(seen.before)):
            cosine = F.cosine_similarity(seen.positions(seen.before, batch), seen.positions(seen.after, batch), dim=-1)
            total, count = total + float(cosine.double().sum()), count + len(cosine)
        if not count:
            raise BadNumerics(f"{seen.prefix[:-1]}: no calibration row is left to measure it with; calibrate with other data")
        self.tensors["scores"][seen.layer] = 1.0 - total / count


class ByLayer(Surveyor):
    """KL of the logits where one layer differs, for each of some layers."""

    reads_head = True

    def __init__(self, layers: Sequence[int], samples: int) -> None:
        """`layers`: which differ, one after the other. `samples`: calibration rows that their KL is measured on."""
        super().__init__()
        self._layers, self._samples = tuple(layers), samples
        self._variants = Variants(self.tensors, max(self._layers, default=-1) + 1)

    def begin(self, model: Surveyed) -> None:
        self._model = model
        self._variants.begin(model, self._samples)

    def head(self, first: int, rows: Tensor, norm: Tensor) -> None:
        self._variants.head(first, rows, norm)

    def _kl(self) -> list[float]:
        return list(self._variants.divergences().values())


class Divergence(ByLayer):
    """KL of the logits without a block, for every block: its variant begins as a copy of the rows at its input, and skips it."""

    def __init__(self, layers: int, samples: int) -> None:
        super().__init__(range(layers), samples)

    def block(self, seen: SeenBlock) -> None:
        self._variants.forward(seen)
        self._variants.start(seen.layer, seen.before)

    def found(self) -> dict[str, Tensor]:
        return {"scores": torch.tensor(self._kl(), dtype=torch.float64)}


class Windows(ByLayer):
    """What a sliding window costs each layer that has none: the error of its block's output on all rows, and, where `samples` are wanted,
    the KL of the logits with a window in this layer alone."""

    def __init__(self, windowed: ModelLayout, layers: Sequence[int], samples: int, window: int) -> None:
        """`windowed`: the source with windows everywhere. `layers`: that have none yet."""
        super().__init__(layers, samples)
        self._windowed, self._window = windowed, window
        self.reads_head = samples > 0
        self.tensors["blockError"] = torch.zeros(int(text_config(windowed.config)["num_hidden_layers"]), dtype=torch.float64)

    def begin(self, model: Surveyed) -> None:
        super().begin(model)
        longest = max(max(batch.lengths) for batch in model.batches)
        if longest <= self._window:
            raise UserError(
                f"hybridAttention: the longest calibration row has {longest} tokens, none beyond a window of {self._window}; give longer "
                "documents, or set calibration.packing"
            )

    def block(self, seen: SeenBlock) -> None:
        self._variants.forward(seen)
        if seen.layer not in self._layers:
            return
        rows = [replace(batch, state={"hidden": hidden}) for batch, hidden in zip(self._model.batches, seen.before, strict=True)]
        seen.forward(rows, self._windowed)
        error = BlockError()
        hidden = [batch.state["hidden"] for batch in rows]
        for number in range(len(rows)):
            error.add(seen.positions(seen.after, number), seen.positions(hidden, number))
        self._variants.start(seen.layer, hidden)
        self.tensors["blockError"][seen.layer] = error.value

    def found(self) -> dict[str, Tensor]:
        scores = {"blockError": self.tensors["blockError"].clone()}
        if self.reads_head:
            scores["divergence"] = torch.zeros_like(scores["blockError"])
            scores["divergence"][list(self._layers)] = torch.tensor(self._kl(), dtype=torch.float64)
        return scores


class WindowSets(Surveyor):
    """KL of the logits with full attention in some sets of layers, and a window in all others. `found`: layers int64 [sets, n], kl fp64
    [sets]."""

    reads_head = True

    def __init__(
        self, windowed: ModelLayout, layers: Sequence[int], sets: Sequence[Sequence[int]], gone: Sequence[int], samples: int
    ) -> None:
        """`windowed`: the source with windows everywhere. `layers`: that there is a choice for; `gone`: that the result lacks."""
        super().__init__()
        self._windowed, self._layers, self._sets, self._gone, self._samples = windowed, layers, sets, gone, samples
        self._variants = Variants(self.tensors, len(sets))

    def begin(self, model: Surveyed) -> None:
        self._variants.begin(model, self._samples)

    def block(self, seen: SeenBlock) -> None:
        if not self._variants.started:
            for number in range(len(self._sets)):
                self._variants.start(number, seen.before)

        def through(number: int, rows: Sequence[Batch]) -> None:
            if seen.layer not in self._gone:
                narrow = seen.layer in self._layers and seen.layer not in self._sets[number]
                seen.forward(rows, self._windowed if narrow else None)

        self._variants.forward(seen, through)

    def head(self, first: int, rows: Tensor, norm: Tensor) -> None:
        self._variants.head(first, rows, norm)

    def found(self) -> dict[str, Tensor]:
        kl = torch.tensor(list(self._variants.divergences().values()), dtype=torch.float64)
        return {"layers": torch.tensor(self._sets), "kl": kl}


class Maps(Surveyor):
    """T of least |M T + Y - L| for each run of blocks; by the block before it, counted in the source."""

    whole_block = False

    def __init__(self, runs: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self._runs = {last: first - 1 for first, last in runs}
        self._before: dict[int, list[tuple[Tensor, Tensor]]] = {}
        """By the same block: (M, Y) a batch, until the run's end."""

    @property
    def resting(self) -> bool:
        return not self._before

    def block(self, seen: SeenBlock) -> None:
        if seen.layer in self._runs.values():
            self._before[seen.layer] = [(after - middle, middle) for middle, after in zip(seen.middle, seen.after, strict=True)]
        if (start := self._runs.get(seen.layer)) is None:
            return
        hidden = seen.after[0].shape[-1]
        gram = torch.zeros(hidden, hidden, device=seen.after[0].device)
        missing = torch.zeros_like(gram)
        for number, (made, stream) in enumerate(self._before.pop(start)):
            valid = seen.valid[number]
            m, y = (x.flatten(0, 1).float() if valid is None else x[valid].float() for x in (made, stream))
            gram += m.T @ m
            missing += m.T @ (seen.positions(seen.after, number) - y - m)
        gram.diagonal().add_(DAMPENING * gram.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(gram)
        if int(failed) or not bool(missing.isfinite().all()):
            raise BadNumerics(
                f"{seen.prefix[:-1]}: the linear map in place of the blocks before cannot be solved for; use more calibration samples, or "
                "correction: none"
            )
        self.tensors[str(start)] = torch.eye(hidden, device=gram.device) + torch.cholesky_solve(missing, factor)
