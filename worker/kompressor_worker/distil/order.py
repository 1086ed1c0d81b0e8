"""Which rows a step trains on, and which of them this process: a function of the step alone.

So nothing of the data's order has to be kept: a process that starts anew, and a group of another size, go on with the very rows that come
next. Each epoch has an order of its own: a Feistel network (Luby and Rackoff 1988) over the smallest even number of bits that counts the
rows, walked on where it leaves their range (cycle walking, Black and Rogaway 2002), so that no order is ever written down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from kompressor_api.names import Reason
from kompressor_worker.errors import UserError
from kompressor_worker.passes.distil import DistilParams

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROUNDS = 4
MICRO_TOKENS = 4096
"""Of a process at a time, where nothing else is asked for."""
MOST_HELD_OUT = 8
"""At most one of so many rows is held out."""


def shuffled(place: int, count: int, seed: int, epoch: int) -> int:
    """Which of `count` rows is at this place of an epoch."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for turn in range(ROUNDS):
            word = right.to_bytes(8, "little") + epoch.to_bytes(8, "little") + bytes([turn])
            left, right = right, left ^ (xxhash.xxh64_intdigest(word, seed) & mask)
        place = (left << half) | right
        if place < count:
            return place


HELD_OUT = (1 << 64) - 1
"""In place of an epoch: the order in which rows are held out, so that they are of all parts of a dataset."""


@dataclass(frozen=True)
class Order:
    """Of all rows, some are held out; the others are trained on."""

    apart: int
    """How many are held out."""
    count: int
    """How many are trained on."""
    batch: int
    steps: int
    seed: int

    @classmethod
    def of(cls, params: DistilParams, rows: int, held_out_apart: bool) -> Order:
        """Of so many rows. `held_out_apart`: evaluations have rows of their own. Raises UserError: fewer than a step takes."""
        apart = 0 if held_out_apart else min(params.validation_rows, rows // MOST_HELD_OUT)
        count = rows - apart
        if count < params.batch:
            held = f" ({apart} of {rows} are held out for evaluation)" if apart else ""
            raise UserError(
                f"distil: the dataset has {count} rows of {params.sequence_length} tokens to train on{held}, and a step takes batch "
                f"{params.batch}; give more data, or set a smaller batch or sequenceLength",
                Reason.BAD_DATA,
            )
        return cls(apart, count, params.batch, params.steps or max(1, int(count * params.epochs) // params.batch), params.seed)

    def rows(self, step: int) -> list[int]:
        """Numbers of the rows of a step, counted from 0."""
        places = range(step * self.batch, (step + 1) * self.batch)
        drawn = (shuffled(place % self.count, self.count, self.seed, place // self.count) for place in places)
        return [self._row(self.apart + place) for place in drawn]

    def held_out(self) -> list[int]:
        """Numbers of those that are never trained on."""
        return [self._row(place) for place in range(self.apart)]

    def _row(self, place: int) -> int:
        return shuffled(place, self.apart + self.count, self.seed, HELD_OUT) if self.apart else place


@dataclass(frozen=True)
class Micro:
    """Rows that one process takes at a time."""

    tokens: Tensor
    """int64 [rows, longest], filled up with zeros."""
    lengths: tuple[int, ...]
    at: Tensor
    """bool [rows, longest]: positions with a next token; none where the process has no row of its own left and only keeps step."""
    targets: Tensor
    """int64 [n]: those next tokens."""
    numbers: tuple[int, ...] = ()
    """Of its rows."""


def micros(numbers: Sequence[int], rows: Sequence[Tensor], size: int, rank: int, world: int, device: torch.device) -> list[Micro]:
    """This process's share of the rows with these numbers, `size` at a time: as many of them on every process."""
    mine = list(numbers[rank::world])
    count = math.ceil(math.ceil(len(numbers) / world) / size)
    parts = [mine[i * size : (i + 1) * size] for i in range(count)]
    return [batched([rows[n] for n in part], part, device) if part else idle(rows[numbers[0]], device) for part in parts]


def batched(rows: Sequence[Tensor], numbers: Sequence[int], device: torch.device) -> Micro:
    import torch

    from kompressor_worker.evaluate import scored

    tokens = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    found = scored(tokens, torch.tensor([len(row) for row in rows]))
    lengths = tuple(len(row) for row in rows)
    return Micro(tokens.to(device), lengths, found.keep.to(device), found.targets.to(device), tuple(numbers))


def idle(row: Tensor, device: torch.device) -> Micro:
    """A little of some row, of which nothing counts."""
    import torch

    tokens = row[None, :2].to(device)
    nothing = torch.zeros_like(tokens, dtype=torch.bool)
    return Micro(tokens, (tokens.shape[1],), nothing, tokens[nothing])


def micro_rows(params: DistilParams) -> int:
    return params.micro_batch or max(1, MICRO_TOKENS // params.sequence_length)
