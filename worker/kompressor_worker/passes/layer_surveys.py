"""What `pruneLayers` measures of the source: how much each block does, and the linear maps that stand in for runs of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from kompressor_worker.errors import BadNumerics
from kompressor_worker.evaluate import LogitComparison, Scored, scored
from kompressor_worker.passes.surveyor import SeenBlock, Surveyed, Surveyor

if TYPE_CHECKING:
    from kompressor_worker.batch import Batch

DAMPENING = 0.01
"""Share of the mean diagonal that pulls a map towards the identity."""


class Influence(Surveyor):
    """1 - mean cosine of a block's input and output."""

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


class Divergence(Surveyor):
    """KL of the logits without a block, for every block: its variant begins as a copy of the rows at its input, and skips it."""

    reads_head = True

    def __init__(self, layers: int, samples: int) -> None:
        super().__init__()
        self._layers, self._samples = layers, samples
        self._comparisons: list[LogitComparison] = []
        self._hidden: list[list[Tensor]] = []

    def begin(self, model: Surveyed) -> None:
        self._model = model
        count, self._batches = 0, 0
        for batch in model.batches:
            self._batches, count = self._batches + 1, count + len(batch.lengths)
            if count >= self._samples:
                break

    def block(self, seen: SeenBlock) -> None:
        for layer in range(seen.layer):
            rows = [self._batch(layer, number) for number in range(self._batches)]
            seen.forward(rows)
            for number, batch in enumerate(rows):
                self.tensors[f"{layer}/{number}"] = batch.state["hidden"]
        for number in range(self._batches):
            self.tensors[f"{seen.layer}/{number}"] = seen.before[number]

    def _batch(self, layer: int, number: int) -> Batch:
        return replace(self._model.batches[number], state={"hidden": self.tensors[f"{layer}/{number}"]})

    def head(self, first: int, rows: Tensor, norm: Tensor) -> None:
        if not self._comparisons:
            self._compare(norm)
        rows = rows.to(self._model.device)
        original, *variants = self._hidden
        for comparison, variant in zip(self._comparisons, variants, strict=True):
            start = 0
            for a, b in zip(original, variant, strict=True):
                comparison.add(a, b, rows, offset=first, start=start)
                start += len(a)

    def _compare(self, norm: Tensor) -> None:
        model, parts, before = self._model, list[Scored](), 0
        for batch, tokens in zip(model.batches[: self._batches], model.tokens, strict=False):
            lengths = [0 if out else n for n, out in zip(batch.lengths, batch.excluded or (False,) * len(batch.lengths), strict=True)]
            part = scored(tokens, torch.tensor(lengths))
            parts.append(Scored(part.keep, part.targets, part.rows + before))
            before += len(batch.lengths)
        norm = norm.to(model.device)

        def last(states: Sequence[Tensor]) -> list[Tensor]:
            return [model.norm(s[p.keep], norm) for s, p in zip(states, parts, strict=True)]

        self._hidden = [last([batch.state["hidden"] for batch in model.batches[: self._batches]])]
        self._hidden += [last([self.tensors[f"{n}/{b}"] for b in range(self._batches)]) for n in range(self._layers)]
        targets, belongs = torch.cat([p.targets for p in parts]), torch.cat([p.rows for p in parts])
        self._comparisons = [LogitComparison(targets, belongs, model.vocabulary, softcap=model.softcap) for _ in range(self._layers)]

    def found(self) -> dict[str, Tensor]:
        kl = [comparison.result().summary()["kl"] for comparison in self._comparisons]
        return {"scores": torch.tensor(kl, dtype=torch.float64)}


class Maps(Surveyor):
    """T of least |M T + Y - L| for each run of blocks; by the block before it, counted in the source."""

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
