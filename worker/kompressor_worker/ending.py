"""What comes behind the last block: the final norm and the head, of the model as it was and of the result.

There the tuning of a block can be judged by what counts, the divergence of the next token's distribution, at no more than two products with
the head. An error in the stream weighs by what the head makes of it at its own position: it is not the same directions everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kompressor_worker.decoder import Decoder
from kompressor_worker.kernels.divergence import Divergence, distillation_loss
from kompressor_worker.layout import ModelLayout, StageLayout


@dataclass(frozen=True)
class Reader:
    """Of one of both models."""

    decoder: Decoder
    norm: Tensor
    """The final one's weight [hidden]."""
    head: Tensor
    """[vocabulary, hidden]."""

    def normed(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        return self.decoder.norm(hidden, self.norm).to(dtype)


@dataclass(frozen=True)
class Ending:
    original: Reader
    result: Reader
    """Its head as it was, in the result's basis: should that be quantised, it is so behind the blocks."""

    dtype: torch.dtype
    """Of the products with the heads."""

    def divergence(self, said: Tensor, aims: Tensor) -> Tensor:
        """Sum over positions of KL(original || result), fp32, of what their last blocks put out, [positions, hidden], each in its own
        basis."""
        mine, theirs = self.result.normed(said, self.dtype), self.original.normed(aims, self.dtype)
        nothing = torch.full((len(said),), -1, dtype=torch.int64, device=said.device)
        given = mine, self.result.head, theirs, self.original.head, nothing, Divergence()
        caps = self.result.decoder.final_softcap, self.original.decoder.final_softcap
        return distillation_loss(*given, softcap=caps[0], teacher_softcap=caps[1]).total


FindEnding = Callable[[], Ending]
"""Reads it, once, behind all that is read of a block."""


def stages_of_ending(layout: ModelLayout) -> list[StageLayout]:
    """The final norm's and the head's: the embeddings' where these are the head."""
    head = next(unit for unit in layout.units if unit.name == "head")
    found = [stage for stage in head.stages if any(t.stored for t in stage.tensors)]
    if any(x.kind == "head" for stage in found for x in stage.linears):
        return found
    return found + [stage for unit in layout.units for stage in unit.stages if any(x.kind == "embedding" for x in stage.linears)]
