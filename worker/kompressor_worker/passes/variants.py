"""Calibration rows that go on from some block with something changed there, beside the source's own, up to the KL of their logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kompressor_worker.batch import Batch
from kompressor_worker.evaluate import LogitComparison, Scored, scored
from kompressor_worker.passes.surveyor import SeenBlock, Surveyed


class Variants:
    """Their hidden states are among a surveyor's `tensors`, as `<variant>/<batch>`, so that they are saved and restored with it."""

    def __init__(self, tensors: dict[str, Tensor], count: int) -> None:
        """`count`: of the variants that there will be, numbered from 0."""
        self._tensors, self._count = tensors, count
        self._comparisons: dict[int, LogitComparison] = {}
        self._hidden: dict[int, list[Tensor]] = {}
        self._original: list[Tensor] = []

    def begin(self, model: Surveyed, samples: int) -> None:
        """Each has the first `samples` calibration rows, and those that share a batch with them."""
        self._model = model
        rows, self.batches = 0, 0
        for batch in model.batches:
            if rows >= samples:
                break
            self.batches, rows = self.batches + 1, rows + len(batch.lengths)

    def start(self, variant: int, hidden: Sequence[Tensor]) -> None:
        """Hidden states [rows, length, hidden] by batch, where it leaves the source's way."""
        for number in range(self.batches):
            self._tensors[f"{variant}/{number}"] = hidden[number]

    @property
    def started(self) -> list[int]:
        return [variant for variant in range(self._count) if f"{variant}/0" in self._tensors]

    def forward(self, seen: SeenBlock) -> None:
        """All that have started, through a block of the source."""
        for variant in self.started:
            rows = [self._batch(variant, number) for number in range(self.batches)]
            seen.forward(rows)
            for number, batch in enumerate(rows):
                self._tensors[f"{variant}/{number}"] = batch.state["hidden"]

    def _batch(self, variant: int, number: int) -> Batch:
        return replace(self._model.batches[number], state={"hidden": self._tensors[f"{variant}/{number}"]})

    def head(self, first: int, rows: Tensor, norm: Tensor) -> None:
        """As `Surveyor.head`."""
        if not self._comparisons:
            self._compare(norm)
        rows = rows.to(self._model.device)
        for variant, comparison in self._comparisons.items():
            start = 0
            for a, b in zip(self._original, self._hidden[variant], strict=True):
                comparison.add(a, b, rows, offset=first, start=start)
                start += len(a)

    def _compare(self, norm: Tensor) -> None:
        model, parts, before = self._model, list[Scored](), 0
        for batch, tokens in zip(model.batches[: self.batches], model.tokens, strict=False):
            lengths = [0 if out else n for n, out in zip(batch.lengths, batch.excluded or (False,) * len(batch.lengths), strict=True)]
            part = scored(tokens, torch.tensor(lengths))
            parts.append(Scored(part.keep, part.targets, part.rows + before))
            before += len(batch.lengths)
        norm = norm.to(model.device)

        def last(states: Sequence[Tensor]) -> list[Tensor]:
            return [model.norm(s[p.keep], norm) for s, p in zip(states, parts, strict=True)]

        self._original = last([batch.state["hidden"] for batch in model.batches[: self.batches]])
        targets, belongs = torch.cat([p.targets for p in parts]), torch.cat([p.rows for p in parts])
        for variant in self.started:
            self._hidden[variant] = last([self._tensors[f"{variant}/{b}"] for b in range(self.batches)])
            self._comparisons[variant] = LogitComparison(targets, belongs, model.vocabulary, softcap=model.softcap)

    def divergences(self) -> dict[int, float]:
        """By variant: KL of its logits from the source's, nats a token."""
        return {variant: float(comparison.result().summary()["kl"]) for variant, comparison in self._comparisons.items()}
