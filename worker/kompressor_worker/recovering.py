"""A block tuned as a whole: gradients of its output's error, a few rows at a time, by what calibration rows have become before it.

The error is a position's squared distance from the original's output, as a share of that output's square: what reads it normalises it, so
every position counts alike, however loud. Behind the last block it is the divergence of the logits (`ending`). Some rows are held out: they
say what has become better, so data that was learned by heart is not taken for it, and the best that they have seen is what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from kompressor_worker.batch import Batch
from kompressor_worker.block_work import PartWork, size_of
from kompressor_worker.decoder import Decoder
from kompressor_worker.decoder_block import Block
from kompressor_worker.ending import Ending
from kompressor_worker.errors import BadNumerics
from kompressor_worker.forward import Projection
from kompressor_worker.passes.recover import RecoverParams
from kompressor_worker.tuning import Learned

MICRO_TOKENS = 2048
"""Positions that go forward and backward together, or one row: what of a block has to be kept for the backward is of these."""
HELD_OUT = 1 / 8
"""Share of the rows that only judge."""
MOST_HELD_OUT = 32
LOOKS = 10
"""How many times they judge."""
WARM_UP = 0.05
"""Share of the steps in which rates rise."""


class Rows:
    """What flows into the block, and what shall come out of it."""

    def __init__(self, batches: Sequence[Batch], inputs: Sequence[Tensor], aims: Sequence[Tensor]) -> None:
        """`inputs` and `aims` [rows, length, hidden] by batch."""
        self._inputs, self._aims = inputs, aims
        self._places = [
            (number, row, length)
            for number, batch in enumerate(batches)
            for row, length in enumerate(batch.lengths)
            if not (batch.excluded and batch.excluded[row])
        ]

    def __len__(self) -> int:
        return len(self._places)

    def tokens(self, chosen: Sequence[int]) -> int:
        return sum(self._places[n][2] for n in chosen)

    def pieces(self, chosen: Sequence[int]) -> Iterator[tuple[Batch, Tensor]]:
        """So many together as fit into MICRO_TOKENS: a batch at the block's input, and its aims [positions, hidden], padding left out."""
        piece: list[int] = []
        for n in sorted(chosen, key=lambda n: (self._places[n][2], n)):
            if piece and self._places[n][2] * (len(piece) + 1) > MICRO_TOKENS:
                yield self._piece(piece)
                piece = []
            piece.append(n)
        if piece:
            yield self._piece(piece)

    def _piece(self, chosen: Sequence[int]) -> tuple[Batch, Tensor]:
        places = [self._places[n] for n in chosen]
        hidden = self._inputs[places[0][0]].new_zeros(len(places), max(length for _, _, length in places), self._inputs[0].shape[-1])
        for at, (number, row, length) in enumerate(places):
            hidden[at, :length] = self._inputs[number][row, :length]
        aims = torch.cat([self._aims[number][row, :length] for number, row, length in places])
        return Batch(tuple(length for _, _, length in places), {"hidden": hidden}), aims


@dataclass(frozen=True)
class Judge:
    """Of what a block puts out."""

    turn: Callable[[Tensor], Tensor]
    """Brings aims [positions, hidden] into the basis of the result."""
    ending: Ending | None = None
    """Behind the last block."""

    def __call__(self, said: Tensor, aims: Tensor) -> Tensor:
        """Sum over positions, fp32, of what a block says instead of its aims, each [positions, hidden] in its own basis: of the divergence
        behind the last one, of squared errors as shares behind all others."""
        if self.ending is not None:
            return self.ending.divergence(said, aims)
        aims = self.turn(aims).float()
        errors = (said.float() - aims).square().sum(-1) / aims.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        return errors.sum()


class Recovery:
    """Of one block."""

    def __init__(
        self,
        params: RecoverParams,
        block: Block,
        part: PartWork,
        rows: Rows,
        decoder: Decoder,
        judge: Judge,
        heard: Callable[[float], None],
        seed: int,
    ) -> None:
        """`part`: all of the block, as passes have left it. `heard` hears of multiply-adds, and may raise. `seed`: beside that of
        `params`."""
        self.params, self.block, self.rows, self.decoder, self.judge, self.heard = params, block, rows, decoder, judge, heard
        self._size = sum(size_of(step.layout) for step in block.steps)
        linears = [x for step in block.steps for x in step.layout.linears]
        dtype = Projection.as_a_runtime({}, decoder.dtype, decoder.device).dtype
        self.learned = Learned(part, linears, exact_in(block, part), dtype)
        self._chance = torch.Generator().manual_seed((params.seed << 20) + seed)
        order = torch.randperm(len(rows), generator=self._chance).tolist()
        held_out = max(1, min(int(len(rows) * HELD_OUT), MOST_HELD_OUT))
        self._judges, self._taught = order[:held_out], order[held_out:] or order
        self._queue: list[int] = []

    def run(self, before: Mapping[str, Tensor]) -> dict[str, Any]:
        """Puts the best that was found into the part; what there is to say of it. `before`: weights of pruned linears as they were.

        `errorBefore` and `errorAfter`: mean squares of the output's error on the rows that judge, as shares of the output's; `steps`;
        `bestStep`, 0 where nothing was better than before; `stopped`: the step at which the loss was no number any more, if it came to
        that. Raises BadNumerics."""
        with deterministic(self.decoder.device):
            first = self._judged()
            if not isfinite(first):
                raise BadNumerics(
                    f"{self.block.prefix[:-1]}: the output of the compressed block overflows, or that of the original; look for corrupted "
                    "weights in it or before it"
                )
            least, best, best_at, stopped = first, None, 0, None
            for step in range(self.params.steps if first else 0):
                if not isfinite(self._step(step)):
                    stopped = step
                    break
                if (step + 1) * LOOKS // self.params.steps > step * LOOKS // self.params.steps and (error := self._judged()) < least:
                    least, best, best_at = error, self.learned.state(), step + 1
        if best is not None:
            self.learned.put(best, before)
        said = {"errorBefore": first, "errorAfter": least, "steps": self.params.steps, "bestStep": best_at}
        return said if stopped is None else {**said, "stopped": stopped}

    def _step(self, step: int) -> float:
        chosen = self._next()
        tokens, loss = self.rows.tokens(chosen), 0.0
        for batch, aims in self.rows.pieces(chosen):
            error = self._error(batch, aims, as_published=False) / tokens
            error.backward()  # type: ignore[no-untyped-call]
            loss += float(error.detach())
            self.heard(2.0 * self._size * len(aims))
        if isfinite(loss):
            steps = self.params.steps
            share = min(1.0, (step + 1) / max(1.0, WARM_UP * steps)) * (1 - step / steps)
            self.learned.move((share * self.params.learning_rate, share * (self.params.rounding_rate or min(1.0, 2 / steps))))
        return loss

    def _next(self) -> list[int]:
        """Rows in a random order, all of them before one comes again."""
        count = min(self.params.batch_rows, len(self._taught))
        while len(self._queue) < count:
            self._queue += [self._taught[n] for n in torch.randperm(len(self._taught), generator=self._chance).tolist()]
        chosen, self._queue = self._queue[:count], self._queue[count:]
        return chosen

    @torch.no_grad()
    def _judged(self) -> float:
        errors = [float(self._error(batch, aims, as_published=True)) for batch, aims in self.rows.pieces(self._judges)]
        return sum(errors) / self.rows.tokens(self._judges)

    def _hear(self, _: Tensor) -> None:
        """In the midst of a backward, which takes long, too."""
        self.heard(0)

    def _error(self, batch: Batch, aims: Tensor, as_published: bool) -> Tensor:
        """fp32 scalar, over the positions of these rows."""
        linear = self.learned.linear(as_published)
        for step in self.block.steps:
            self.block.advance(step, batch, linear.weights, linear)
            for value in batch.state.values():
                if value.requires_grad:
                    value.register_hook(self._hear)  # type: ignore[no-untyped-call]
            self.heard(size_of(step.layout) * len(aims))
        hidden = batch.state["hidden"]
        valid = batch.valid(hidden.shape[1], hidden.device)
        return self.judge(hidden.flatten(0, 1) if valid is None else hidden[valid], aims)


def exact_in(block: Block, part: PartWork) -> set[str]:
    """Names of tensors that no loader has in another form than the source's: what decides the routing."""
    experts = block.decoder.family.experts
    if experts is None or not block.router:
        return set()
    modules = tuple(f"{name}." for name in (block.router, block.shared_gate) if name)
    return {name for name in part.weights if name.startswith(modules) or (experts.correction and name == block.prefix + experts.correction)}


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """On a GPU sums are taken in the same order every time, where there is a way to: a job that was cut off makes the same bytes again."""
    if device.type != "cuda":
        yield
        return
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)
