"""A decoder that is trained: the steps of decoder_block.py over weights that gradients reach.

So families, mixtures, windows, latent attention, rounded inputs and an FP8 cache are what evaluation and loaders compute. Weights are fp32
masters; what the forward sees of them is rounded to the model's dtype first, on the grid of its scheme where a linear is quantised, and the
gradient passes by the rounding. That is what is published, so the published model is the trained one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kompressor_worker import kernels
from kompressor_worker.batch import Batch
from kompressor_worker.decoder import Decoder
from kompressor_worker.decoder_block import Block, Cache
from kompressor_worker.gguf_straight_through import FakeBlocks
from kompressor_worker.layout import UnitLayout

if TYPE_CHECKING:
    from kompressor_worker.straight_through import Fake

T = TypeVar("T")


@dataclass(frozen=True)
class Seen:
    """What of a model's forward losses look at."""

    hidden: Tensor
    """[n, width] of the positions asked for, behind the final norm."""
    head: Tensor
    """[vocabulary, width]."""
    blocks: Mapping[int, Tensor]
    """By layer: what the block puts out, [n, width]."""
    attentions: Mapping[int, Tensor]
    """By layer: what its attention adds to the hidden states."""


@dataclass(frozen=True)
class Wanted:
    """What is to be seen, by layer."""

    blocks: frozenset[int] = frozenset()
    attentions: frozenset[int] = frozenset()


class Rounded(torch.autograd.Function):
    """x as a tensor of `dtype` holds it, in x's own; the gradient passes by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype == dtype:
        return x
    passed: Tensor = Rounded.apply(x, dtype)  # type: ignore[no-untyped-call]
    return passed


class RoundedLinear(torch.autograd.Function):
    """x W^T with W as `dtype` holds it. Nothing but x and the master is kept for the backward, which rounds once more: a copy of every
    weight would be as large as the masters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtype = dtype
        return F.linear(x, weight.to(dtype).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        by_x = gradient @ weight.to(ctx.dtype).to(x.dtype) if ctx.needs_input_grad[0] else None
        by_weight = None
        if ctx.needs_input_grad[1]:
            by_weight = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype)
        return by_x, by_weight, None


def computing_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What products and hidden states are in while a model of `dtype` is trained."""
    return dtype if dtype is torch.bfloat16 and kernels.fast_bf16(device) else torch.float32


class Parameters(nn.Module):
    """Tensors by full name, as parameters and buffers of a module, whose names have no dots."""

    def __init__(self, tensors: Mapping[str, Tensor], trained: bool) -> None:
        """Masters in fp32 where they are `trained`; else the tensors as they are."""
        super().__init__()
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        """As they are stored."""
        self._places = {name: name.replace(".", "/") for name in tensors}
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                self.register_parameter(self._places[name], nn.Parameter(tensor.float() if trained else tensor, requires_grad=trained))
            else:
                self.register_buffer(self._places[name], tensor)

    def __getitem__(self, name: str) -> Tensor:
        found: Tensor = getattr(self, self._places[name])
        return found

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> Sequence[str]:
        return list(self._places)

    def forward(self) -> None:
        raise AssertionError("holds tensors alone")


class Projection:
    """A block's linears, for `Block.advance`."""

    def __init__(self, block: TrainedBlock, dtype: torch.dtype) -> None:
        self.block, self.dtype = block, dtype
        self.called: set[str] = set()

    def __call__(self, name: str, x: Tensor) -> Tensor:
        self.called.add(name)
        tensors, weight = self.block.tensors, f"{name}.weight"
        if (fake := self.block.fakes.get(name)) is not None:
            from kompressor_worker.straight_through import fake_input

            x = fake_input(name, x.to(self.dtype), fake.scheme, fake.inputs)
            y = F.linear(x, fake.weight(tensors[weight]).to(self.dtype))
        else:
            y = RoundedLinear.apply(x.to(self.dtype), tensors[weight], tensors.dtypes[weight])  # type: ignore[no-untyped-call]
        bias = f"{name}.bias"
        return y + rounded(tensors[bias], tensors.dtypes[bias]).to(self.dtype) if bias in tensors else y


class TrainedBlock(nn.Module):
    """One decoder block."""

    def __init__(
        self,
        decoder: Decoder,
        layer: int,
        unit: UnitLayout,
        tensors: Mapping[str, Tensor],
        fakes: Mapping[str, Fake] | None = None,
        cache: Cache | None = None,
        kept: Mapping[str, Tensor] | None = None,
        trained: bool = True,
    ) -> None:
        """`tensors`: as they are decoded, by full name; `fakes` by linear; `cache`: what becomes of keys and values; `kept`: tensors beside
        those of the forward, which are published as they are."""
        super().__init__()
        self.block = Block(decoder, layer, unit, together=True)
        self.tensors = Parameters(tensors, trained)
        self.fakes = dict(fakes or {})
        self.grids = nn.ModuleList(self.fakes.values())
        self.cache, self.kept = cache, dict(kept or {})
        self.checkpointing = False
        self._linears = [x.name for stage in unit.stages for x in stage.linears if x.kind == "linear"]

    def forward(self, hidden: Tensor, lengths: tuple[int, ...], attention: bool) -> tuple[Tensor, Tensor | None]:
        """Hidden states [rows, length, width] behind the block, and what its attention adds to them, if that is asked for."""
        if self.checkpointing and torch.is_grad_enabled():
            made: tuple[Tensor, Tensor | None] = checkpoint(self._run, hidden, lengths, attention, use_reentrant=False)
            return made
        return self._run(hidden, lengths, attention)

    def _run(self, hidden: Tensor, lengths: tuple[int, ...], attention: bool) -> tuple[Tensor, Tensor | None]:
        plain = {f"{name}.weight" for name in self._linears}
        small = {name: self.tensors[name] for name in self.tensors.names() if name not in plain}
        weights = {name: rounded(x, self.tensors.dtypes[name]) if x.is_floating_point() else x for name, x in small.items()}
        project = Projection(self, hidden.dtype)
        batch, added = Batch(lengths, {"hidden": hidden}), None
        for step in self.block.steps:
            before = batch.state["hidden"] if attention and step.name == "o" else None
            self.block.advance(step, batch, weights, project, self.cache if step.name == "qkv" else None)
            if before is not None:
                added = batch.state["hidden"] - before
        after = batch.state["hidden"]
        if torch.is_grad_enabled() and (silent := [name for name in self._linears if name not in project.called]):
            # experts without a token on this process: others have gradients of theirs, and all must have some to sum them up
            after = after + sum(project(name, after.new_zeros(0, self.tensors[f"{name}.weight"].shape[1])).sum() for name in silent)
        return after, added


class TrainedModel(nn.Module):
    """A decoder from token ids to what losses look at."""

    def __init__(
        self, decoder: Decoder, blocks: Sequence[TrainedBlock], outside: Mapping[str, Tensor], names: Outside, trained: bool = True
    ) -> None:
        """`outside` of the blocks: embeddings, final norm and head, by full name."""
        super().__init__()
        self.decoder, self.names = decoder, names
        self.blocks = nn.ModuleList(blocks)
        self.outside = Parameters(outside, trained)
        self.fakes: dict[str, Fake] = {}
        self.grids = nn.ModuleList()
        self.alike: nn.Module | None = None
        """What compares its states with the teacher's, where that has weights of its own."""

    def quantise(self, fakes: Mapping[str, Fake]) -> None:
        """Head, embeddings or both, by linear."""
        self.fakes |= fakes
        self.grids.extend(fakes.values())

    def forward(self, tokens: Tensor, lengths: tuple[int, ...], at: Tensor, wanted: Wanted, then: Callable[[Seen], T]) -> T:
        """What `then` makes of token ids int64 [rows, length], seen at the positions `at` bool [rows, length]. It is called in here, for a
        sharded head is whole no longer."""
        hidden = self._embedded(tokens)
        blocks, attentions = dict[int, Tensor](), dict[int, Tensor]()
        for layer, block in enumerate(self.blocks):
            hidden, added = block(hidden, lengths, layer in wanted.attentions)
            if layer in wanted.blocks:
                blocks[layer] = hidden[at]
            if added is not None:
                attentions[layer] = added[at]
        norm, head = self.outside[self.names.norm], self.head(hidden.dtype)
        last = self.decoder.norm(hidden[at], rounded(norm, self.outside.dtypes[self.names.norm])).to(hidden.dtype)
        return then(Seen(last, head, blocks, attentions))

    def _embedded(self, tokens: Tensor) -> Tensor:
        name = self.names.embeddings
        rows, dtype = F.embedding(tokens, self.outside[name]), self.outside.dtypes[name]
        fake = self.fakes.get(name.removesuffix(".weight"))
        if isinstance(fake, FakeBlocks):  # no other format quantises embeddings
            rows = fake.weight(rows.flatten(0, 1), tokens.flatten()).view_as(rows).to(rows.dtype)
        else:
            rows = rounded(rows, dtype)
        return self.decoder.embed(rows.to(dtype) if self.decoder.family.scaled_embeddings else rows)  # as the factor is rounded too

    def head(self, dtype: torch.dtype) -> Tensor:
        """For products in this dtype; as it is where the loss rounds it to that itself, and needs no copy in fp32."""
        name = f"{self.names.head}.weight"
        if (fake := self.fakes.get(self.names.head)) is not None:
            return fake.weight(self.outside[name]).to(self.decoder.dtype)
        return self.outside[name] if self.outside.dtypes[name] == dtype else rounded(self.outside[name], self.outside.dtypes[name])


@dataclass(frozen=True)
class Outside:
    """Full names of what is outside of the blocks."""

    embeddings: str
    """The weight's."""
    norm: str
    head: str
    """The linear's; the embeddings' where these are the head."""

    @property
    def tied(self) -> bool:
        return self.embeddings == f"{self.head}.weight"

    @property
    def all(self) -> frozenset[str]:
        """Of tensors."""
        return frozenset((self.embeddings, self.norm, f"{self.head}.weight"))
