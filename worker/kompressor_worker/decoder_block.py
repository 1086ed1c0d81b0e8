"""A decoder block as steps between its linears: what each group of linears gets as input, and what becomes of its output.

So statistics, compression and propagation take one forward: a step's input is measured, its weights are compressed, and only then its
output is computed, with what will be published. State between steps is a dict of tensors in the model's dtype, one a batch of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kompressor_worker import latent_attention
from kompressor_worker.attention import attend, rotate
from kompressor_worker.batch import Batch
from kompressor_worker.decoder import Decoder
from kompressor_worker.latent_attention import LatentAttention
from kompressor_worker.layout import LinearLayout, StageLayout, UnitLayout
from kompressor_worker.mixture import Routing, Rule
from kompressor_worker.parts import is_shared

MIXTURE = ("router", "shared_gate_up", "shared_down", "experts_in", "experts_out")
"""Steps of a mixture: they go by the positions that count, [tokens, ...]."""


class Linear(Protocol):
    dtype: torch.dtype
    """What it computes in."""

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """x [..., columns] W^T + b of this full module name, in `dtype`."""
        ...


Cache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""What happens to keys (after rotary) and values [rows, KV heads, length, head_dim] on their way into the cache: nothing, or rounding."""


@dataclass(frozen=True)
class RoutedExpert:
    """One expert of a mixture, as this block's routing knows it."""

    number: int
    name: str
    """Full module name."""
    gate_up: tuple[LinearLayout, ...]
    down: LinearLayout


@dataclass(frozen=True)
class Step:
    """A group of linears that share their place in the block."""

    name: str
    """qkv (or latents, queries, keys_values), o, gate_up, down; router, shared_gate_up, shared_down, experts_in, experts_out."""
    layout: StageLayout
    """Its linears, and tensors."""
    stages: tuple[int, ...]
    """Numbers of the unit's stages that they are of."""
    experts: tuple[RoutedExpert, ...] = ()
    """For experts_in and experts_out: one, or all of them."""


class Block:
    """One decoder block: its steps, and its function over them."""

    def __init__(self, decoder: Decoder, layer: int, unit: UnitLayout, together: bool = False, routed_as: Decoder | None = None) -> None:
        """`together`: a mixture's experts in two steps, each with all of them and the first one with the router, instead of two for each
        expert. `routed_as`: of a model that sends a token to another number of experts."""
        self.decoder, self.layer = decoder, layer
        self.prefix = f"{unit.name}."
        self.steps = tuple(steps_of(unit, together))
        self.experts = len({expert.number for step in self.steps for expert in step.experts})
        self._routed_as = routed_as or decoder
        before = "pre_feedforward_layernorm" if decoder.family.post_norms else "post_attention_layernorm"
        norms = {"qkv": "input_layernorm"} | dict.fromkeys(("gate_up", "router", "experts_in", "shared_gate_up"), before)
        self.norms = norms if decoder.family.pre_norms else {}
        self.latent = LatentAttention(decoder, self.prefix) if decoder.family.latent else None
        if self.latent is not None:
            self.norms |= {"latents": "input_layernorm", **latent_attention.NORMS}
        self._after = (
            {"o": "post_attention_layernorm", "down": "post_feedforward_layernorm", "experts_out": "post_feedforward_layernorm"}
            if decoder.family.post_norms
            else {}
        )
        self.router = self.prefix + decoder.family.experts.router if decoder.family.experts and self.experts else ""
        self.shared_gate = self.prefix + decoder.family.experts.shared_gate if decoder.family.experts and self.experts else ""

    # ---- the function

    def inputs(
        self, step: Step, batch: Batch, weights: Mapping[str, Tensor], linear: Linear | None = None, unrouted: Collection[int] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """(site, what the step's linears get of it), [n, columns] in the model's dtype: the positions that count. Experts in `unrouted` get
        all of them instead of those that are routed there; `linear` then has their weights."""
        if step.name in MIXTURE:
            yield from self._mixture_inputs(step, batch, weights, linear, unrouted)
            return
        x = self._input(step, batch, weights)
        valid = batch.valid(x.shape[1], x.device)
        yield step.layout.name, x.flatten(0, 1) if valid is None else x[valid]

    def advance(self, step: Step, batch: Batch, weights: Mapping[str, Tensor], linear: Linear, cache: Cache | None = None) -> None:
        """The step's outputs, up to the input of the next one."""
        if step.name in MIXTURE:
            self._advance_mixture(step, batch, weights, linear)
            return
        x = self._input(step, batch, weights).to(linear.dtype)
        state, dtype = batch.state, self.decoder.dtype
        match step.name:
            case "qkv":
                state["attention"] = self._attention(x, linear, cache, weights).to(dtype)
            case "latents" | "queries" | "keys_values":
                assert self.latent is not None
                self.latent.advance(step, x, state, x.shape[1], self.layer, linear)
            case "gate_up":
                state["product"] = self._gated(step.layout.linears, x, linear).to(dtype)
            case "o":
                self._add(step.name, batch, linear(step.layout.linears[0].name, x), weights)
                del state["attention"]
            case "down":
                self._add(step.name, batch, linear(step.layout.linears[0].name, x), weights)
                del state["product"]

    def _input(self, step: Step, batch: Batch, weights: Mapping[str, Tensor]) -> Tensor:
        """[rows, length, columns], in the model's dtype."""
        if step.name == "o":
            return batch.state["attention"]
        if step.name == "down":
            return batch.state["product"]
        if self.latent is not None and step.name in latent_attention.NORMS:
            return self.latent.input(step, batch.state, weights)
        x = batch.state["hidden"]
        if (norm := self.norms.get(step.name)) is None:
            return x
        return self.decoder.norm(x, weights[f"{self.prefix}{norm}.weight"]).to(self.decoder.dtype)

    def _add(self, step: str, batch: Batch, y: Tensor, weights: Mapping[str, Tensor]) -> None:
        if name := self._after.get(step):
            y = self.decoder.norm(y, weights[f"{self.prefix}{name}.weight"])
        batch.state["hidden"] = (batch.state["hidden"].float() + y).to(self.decoder.dtype)

    def _attention(self, x: Tensor, linear: Linear, cache: Cache | None, weights: Mapping[str, Tensor]) -> Tensor:
        d = self.decoder
        rows, length, _ = x.shape
        sizes = [d.heads * d.head_dim, d.kv_heads * d.head_dim, d.kv_heads * d.head_dim]
        names = [linear_layout.name for linear_layout in self.steps[0].layout.linears]
        parts = torch.split(linear(names[0], x), sizes, dim=-1) if len(names) == 1 else [linear(name, x) for name in names]
        norms = [weights.get(f"{self.prefix}self_attn.{kind}_norm.weight") for kind in "qkv"]

        def normed(parts: Iterable[Tensor]) -> list[Tensor]:
            return [part if norm is None else d.norm(part, norm) for part, norm in zip(parts, norms, strict=True)]

        whole = d.family.whole_norms
        by_head = [x.reshape(rows, length, -1, d.head_dim).transpose(1, 2) for x in (normed(parts) if whole else parts)]
        q, k, v = by_head if whole else normed(by_head)
        cos, sin = d.positions(length, self.layer)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        if cache is not None:
            k, v = cache(k, v)
        return attend(q, k, v, d.scale, d.window(self.layer), d.softcap)

    def _gated(self, linears: tuple[LinearLayout, ...], x: Tensor, linear: Linear) -> Tensor:
        if len(linears) == 1:
            gate, up = linear(linears[0].name, x).chunk(2, dim=-1)
            return self.decoder.activate(gate, up)
        return self.decoder.activate(linear(linears[0].name, x), linear(linears[1].name, x))

    # ---- the mixture

    def _mixture_inputs(
        self, step: Step, batch: Batch, weights: Mapping[str, Tensor], linear: Linear | None, unrouted: Collection[int]
    ) -> Iterator[tuple[str, Tensor]]:
        x = self._normed(batch, weights)
        match step.name:
            case "shared_gate_up":
                yield step.layout.name, x
            case "shared_down":
                yield step.layout.name, batch.state["shared_product"]
            case "router":
                yield self.router, x
            case "experts_in":
                routing = self._route(batch, weights)
                if len(step.stages) > len(step.experts):
                    yield self.router, x
                for expert in step.experts:
                    yield expert.name, x if expert.number in unrouted else x[routing.of_expert(expert.number)[0]]
            case "experts_out":
                for expert, rows in self._parts(step, batch):
                    if expert.number in unrouted:
                        assert linear is not None, "unrouted tokens take the expert's weights"
                        yield expert.name, self._gated(expert.gate_up, x.to(linear.dtype), linear).to(self.decoder.dtype)
                    else:
                        yield expert.name, batch.state["product"][rows]

    def _advance_mixture(self, step: Step, batch: Batch, weights: Mapping[str, Tensor], linear: Linear) -> None:
        """Every step adds to the same sum, which joins the hidden states behind the last one."""
        state, dtype = batch.state, self.decoder.dtype
        x = self._normed(batch, weights)
        match step.name:
            case "router":
                self._route(batch, weights)
            case "shared_gate_up":
                state["shared_product"] = self._gated(step.layout.linears, x.to(linear.dtype), linear).to(dtype)
                if (gate := weights.get(f"{self.shared_gate}.weight")) is not None:
                    state["shared_gate"] = torch.sigmoid(x.float() @ gate.float().T)
            case "shared_down":
                y = linear(step.layout.linears[0].name, state.pop("shared_product").to(linear.dtype))
                self._mixed(batch).add_(y * state.pop("shared_gate") if "shared_gate" in state else y)
            case "experts_in":
                routing = self._route(batch, weights)
                tokens = [routing.of_expert(expert.number)[0] for expert in step.experts]
                width = step.experts[0].down.shape[1]
                product = x.new_empty(sum(map(len, tokens)), width)
                for (expert, rows), at in zip(self._parts(step, batch), tokens, strict=True):
                    if not len(at):
                        continue
                    product[rows] = self._gated(expert.gate_up, x[at].to(linear.dtype), linear).to(dtype)
                state["product"] = product
            case "experts_out":
                self._experts_out(step, batch, linear)
        if step is self.steps[-1]:
            self._join(batch, weights)

    def _normed(self, batch: Batch, weights: Mapping[str, Tensor]) -> Tensor:
        """What the mixture reads, [tokens, hidden] of the positions that count, in the model's dtype; kept in the state."""
        if "normed" not in batch.state:
            norm = weights[f"{self.prefix}{self.norms['router']}.weight"]
            x = self.decoder.norm(batch.state["hidden"], norm).to(self.decoder.dtype)
            valid = batch.valid(x.shape[1], x.device)
            batch.state["normed"] = x.flatten(0, 1) if valid is None else x[valid]
        return batch.state["normed"]

    def _route(self, batch: Batch, weights: Mapping[str, Tensor]) -> Routing:
        """Which experts each token goes to; kept in the state, so that all steps go by the same answer."""
        if "experts" not in batch.state:
            experts = self.decoder.family.experts
            assert experts is not None
            logits = self._normed(batch, weights).float() @ weights[f"{self.router}.weight"].float().T
            correction = weights.get(self.prefix + experts.correction) if experts.correction else None
            batch.state |= Routing.choose(logits, Rule.of(experts.scoring, self._routed_as.config), correction).state()
        return Routing.of(batch.state)

    def _parts(self, step: Step, batch: Batch) -> Iterator[tuple[RoutedExpert, slice]]:
        """Where each of the step's experts has its tokens in `product`."""
        routing, start = Routing.of(batch.state), 0
        for expert in step.experts:
            count = len(routing.of_expert(expert.number)[0])
            yield expert, slice(start, start + count)
            start += count

    def _mixed(self, batch: Batch) -> Tensor:
        """fp32 [tokens, hidden]: the sum of what has been said so far, changed in place."""
        if "mixed" not in batch.state:
            batch.state["mixed"] = torch.zeros_like(batch.state["normed"], dtype=torch.float32)
        return batch.state["mixed"]

    def _experts_out(self, step: Step, batch: Batch, linear: Linear) -> None:
        out, product, routing = self._mixed(batch), batch.state.pop("product"), Routing.of(batch.state)
        for expert, rows in self._parts(step, batch):
            tokens, gates = routing.of_expert(expert.number)
            if len(tokens):
                out.index_add_(0, tokens, linear(expert.down.name, product[rows].to(linear.dtype)) * gates[:, None])

    def _join(self, batch: Batch, weights: Mapping[str, Tensor]) -> None:
        out, hidden = self._mixed(batch), batch.state["hidden"]
        if (valid := batch.valid(hidden.shape[1], hidden.device)) is not None:
            whole = out.new_zeros(hidden.shape)
            whole[valid] = out
            out = whole
        self._add("experts_out", batch, out.view(hidden.shape), weights)
        for name in ("normed", "experts", "gates", "mixed"):
            del batch.state[name]


def steps_of(unit: UnitLayout, together: bool) -> list[Step]:
    """A block's stages with linears, in the order of its function. A shared expert's are behind the router, for it reads what the experts
    read."""
    found: list[Step] = []
    routers: list[Step] = []
    beside: list[Step] = []
    experts: list[tuple[int, RoutedExpert]] = []
    for number, stage in enumerate(unit.stages):
        name = stage.name.rpartition(".")[2]
        if stage.expert is not None:
            if unit.stored or not stage.dropped:
                *gate_up, down = stage.linears
                experts.append((number, RoutedExpert(stage.expert if unit.stored else int(name), stage.name, tuple(gate_up), down)))
        elif any(x.kind == "router" for x in stage.linears):
            routers.append(Step("router", stage, (number,)))
        elif stage.linears:
            (beside if is_shared(stage) else found).append(Step(name, stage, (number,)))
    if not experts:
        return found
    (router,) = routers
    base = router.layout.name.rpartition(".")[0]
    ins, outs = [], []
    for bunch in [experts] if together else [[each] for each in experts]:
        numbers, routed = tuple(number for number, _ in bunch), tuple(expert for _, expert in bunch)
        with_router = (*router.stages, *numbers) if together else numbers
        tensors = tuple(t for number in with_router for t in unit.stages[number].tensors)
        linears = tuple(x for expert in routed for x in expert.gate_up)
        ins.append(Step("experts_in", StageLayout(f"{base}.gate_up", tensors, linears), with_router, routed))
        outs.append(Step("experts_out", StageLayout(f"{base}.down", (), tuple(x.down for x in routed)), numbers, routed))
    if together:
        return [*found, *ins, *beside, *outs]
    return [*found, router, *beside, *(step for pair in zip(ins, outs, strict=True) for step in pair)]
