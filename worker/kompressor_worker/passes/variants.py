"""Calibration rows that go on from some block with something changed there, beside the source's own, up to the KL of their logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kompressor_worker.batch import Batch
from kompressor_worker.evaluate import LogitComparison, Scored, scored
from kompressor_worker.layout import ModelLayout
from kompressor_worker.passes.surveyor import SeenBlock, Surveyed
from kompressor_worker.schemes import Scheme


class Variants:
    """Their hidden states are among a surveyor's `tensors`, as `<variant>/<batch>`, so that they are saved and restored with it."""

    def __init__(self, tensors: dict[str, Tensor], count: int, wide: ModelLayout | None = None) -> None:
        """`count`: of the variants that there will be, numbered from 0. `wide`: the source with activations in fp32; then its own rows go
        along once more in that, and the variants leave from them and are compared with them. How bf16 rounds in two runs that differ
        by little differs more than they do."""
        self._tensors, self._count, self._wide = tensors, count, wide
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

    def at(self, seen: SeenBlock) -> SeenBlock:
        """The block as the variants meet it: with `wide` the source's rows in fp32, once through it, in place of the calibration's."""
        if (wide := self._wide) is None:
            return seen
        names = [f"source/{number}" for number in range(self.batches)]
        before = [self._tensors.get(name, hidden.float()) for name, hidden in zip(names, seen.before, strict=False)]
        rows = [replace(b, state={"hidden": h}) for b, h in zip(self._model.batches, before, strict=False)]

        def forward(rows: Sequence[Batch], model: ModelLayout | None = None, schemes: Mapping[str, Scheme] | None = None) -> None:
            seen.forward(rows, model or wide, schemes)

        forward(rows)
        after = [batch.state["hidden"] for batch in rows]
        self._tensors.update(zip(names, after, strict=True))
        return replace(seen, before=before, after=after, forward=forward)

    def start(self, variant: int, hidden: Sequence[Tensor]) -> None:
        """Hidden states [rows, length, hidden] by batch, where it leaves the source's way."""
        for number in range(self.batches):
            self._tensors[f"{variant}/{number}"] = hidden[number]

    @property
    def started(self) -> list[int]:
        return [variant for variant in range(self._count) if f"{variant}/0" in self._tensors]

    def forward(self, seen: SeenBlock, through: Callable[[int, Sequence[Batch]], None] | None = None) -> None:
        """All that have started, through a block of the source; `through` takes a variant's rows instead, where it has a way of its own."""
        for variant in self.started:
            rows = [self._batch(variant, number) for number in range(self.batches)]
            if through is None:
                seen.forward(rows)
            else:
                through(variant, rows)
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

        source = [self._tensors[f"source/{b}"] if self._wide else model.batches[b].state["hidden"] for b in range(self.batches)]
        self._original = last(source)
        targets, belongs = torch.cat([p.targets for p in parts]), torch.cat([p.rows for p in parts])
        for variant in self.started:
            self._hidden[variant] = last([self._tensors[f"{variant}/{b}"] for b in range(self.batches)])
            self._comparisons[variant] = LogitComparison(targets, belongs, model.vocabulary, softcap=model.softcap)

    def divergences(self) -> dict[int, float]:
        """By variant: KL of its logits from the source's, nats a token."""
        return {variant: float(comparison.result().summary()["kl"]) for variant, comparison in self._comparisons.items()}
