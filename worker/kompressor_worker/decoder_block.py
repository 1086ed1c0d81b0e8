"""A decoder block as steps between its linears: what each group of linears gets as input, and what becomes of its output.

So statistics, compression and propagation take one forward: a step's input is measured, its weights are compressed, and only then its
output is computed, with what will be published. State between steps is a dict of tensors in the model's dtype, one a batch of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


class Linear(Protocol):
    dtype: torch.dtype
    """What it computes in."""

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """x [..., columns] W^T + b of this full module name, in `dtype`."""
        ...


Cache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""What happens to keys (after rotary) and values [rows, KV heads, length, head_dim] on their way into the cache: nothing, or rounding."""


@dataclass(frozen=True)
class Step:
    """A group of linears that share their place in the block."""

    name: str
    """qkv, o, gate_up, down; experts_in, shared_gate_up, shared_down, experts_out; latents, queries, keys_values in place of qkv."""
    layout: StageLayout
    """Its linears (in a mixture those of all experts), and tensors."""


class Block:
    """One decoder block: its steps, and its function over them."""

    def __init__(self, decoder: Decoder, layer: int, unit: UnitLayout) -> None:
        self.decoder, self.layer = decoder, layer
        self.prefix = f"{unit.name}."
        self.steps = tuple(steps_of(unit))
        self._sparse = any(step.name == "experts_in" for step in self.steps)
        before = "pre_feedforward_layernorm" if decoder.family.post_norms else "post_attention_layernorm"
        self.norms = {"qkv": "input_layernorm", "gate_up": before, "experts_in": before, "shared_gate_up": before}
        self.latent = LatentAttention(decoder, self.prefix) if decoder.family.latent else None
        if self.latent is not None:
            self.norms |= {"latents": "input_layernorm", **latent_attention.NORMS}
        self._after = (
            {"o": "post_attention_layernorm", "down": "post_feedforward_layernorm", "experts_out": "post_feedforward_layernorm"}
            if decoder.family.post_norms
            else {}
        )
        self.router = unit.name + "." + decoder.family.experts.router if decoder.family.experts and self._sparse else ""
        self.shared_gate = self.prefix + decoder.family.experts.shared_gate if decoder.family.experts and self._sparse else ""

    # ---- the function

    def inputs(self, step: Step, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By site, what the step's linears get, [n, columns] in the model's dtype: the positions that count."""
        x = self._input(step, batch, weights)
        if step.name == "experts_in":
            routing = self._route(batch, x, weights)
            return {self.router: x} | {self.expert(e): x[rows] for e, rows in routing.tokens_by_expert()}
        if step.name == "experts_out":
            return {self.expert(e): x[rows] for e, rows in Routing.of(batch.state).rows_by_expert()}
        valid = batch.valid(x.shape[1], x.device)
        return {step.layout.name: x.flatten(0, 1) if valid is None else x[valid]}

    def advance(self, step: Step, batch: Batch, weights: Mapping[str, Tensor], linear: Linear, cache: Cache | None = None) -> None:
        """The step's outputs, up to the input of the next one."""
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
            case "shared_gate_up":
                state["shared_product"] = self._gated(step.layout.linears, x, linear).to(dtype)
                if (gate := weights.get(f"{self.shared_gate}.weight")) is not None:
                    state["shared_gate"] = torch.sigmoid(x.float() @ gate.float().T)
            case "shared_down":
                y = linear(step.layout.linears[0].name, x)
                state["shared"] = (y * state.pop("shared_gate") if "shared_gate" in state else y).to(dtype)
                del state["shared_product"]
            case "experts_in":
                state["product"] = self._experts_in(step, x, batch, weights, linear).to(dtype)
            case "o":
                self._add(step, batch, linear(step.layout.linears[0].name, x), weights)
                del state["attention"]
            case "down":
                self._add(step, batch, linear(step.layout.linears[0].name, x), weights)
                del state["product"]
            case "experts_out":
                y = self._experts_out(step, x, batch, linear)
                self._add(step, batch, y + state.pop("shared") if "shared" in state else y, weights)
                for name in ("product", "experts", "gates"):
                    del state[name]

    def _input(self, step: Step, batch: Batch, weights: Mapping[str, Tensor]) -> Tensor:
        """[rows, length, columns]; in a mixture [tokens, columns] of the positions that count. In the model's dtype."""
        if step.name == "o":
            return batch.state["attention"]
        if step.name == "shared_down":
            return batch.state["shared_product"]
        if self.latent is not None and step.name in latent_attention.NORMS:
            return self.latent.input(step, batch.state, weights)
        if step.name in ("down", "experts_out"):
            return batch.state["product"]
        x = self.decoder.norm(batch.state["hidden"], weights[f"{self.prefix}{self.norms[step.name]}.weight"]).to(self.decoder.dtype)
        if step.name != "experts_in":
            return x
        valid = batch.valid(x.shape[1], x.device)
        return x.flatten(0, 1) if valid is None else x[valid]

    def _add(self, step: Step, batch: Batch, y: Tensor, weights: Mapping[str, Tensor]) -> None:
        if name := self._after.get(step.name):
            y = self.decoder.norm(y, weights[f"{self.prefix}{name}.weight"])
        batch.state["hidden"] = (batch.state["hidden"].float() + y).to(self.decoder.dtype)

    def _attention(self, x: Tensor, linear: Linear, cache: Cache | None, weights: Mapping[str, Tensor]) -> Tensor:
        d = self.decoder
        rows, length, _ = x.shape
        sizes = [d.heads * d.head_dim, d.kv_heads * d.head_dim, d.kv_heads * d.head_dim]
        names = [linear_layout.name for linear_layout in self.steps[0].layout.linears]
        parts = torch.split(linear(names[0], x), sizes, dim=-1) if len(names) == 1 else [linear(name, x) for name in names]
        q, k, v = (part.reshape(rows, length, -1, d.head_dim).transpose(1, 2) for part in parts)
        if (norm := weights.get(f"{self.prefix}self_attn.q_norm.weight")) is not None:
            q, k = d.norm(q, norm), d.norm(k, weights[f"{self.prefix}self_attn.k_norm.weight"])
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

    def _route(self, batch: Batch, x: Tensor, weights: Mapping[str, Tensor]) -> Routing:
        """Which experts each token goes to; kept in the state, so that both steps go by the same answer."""
        if "experts" not in batch.state:
            logits = x.float() @ weights[f"{self.router}.weight"].float().T
            experts = self.decoder.family.experts
            assert experts is not None
            correction = weights.get(self.prefix + experts.correction) if experts.correction else None
            batch.state |= Routing.choose(logits, Rule.of(experts.scoring, self.decoder.config), correction).state()
        return Routing.of(batch.state)

    def _experts_in(self, step: Step, x: Tensor, batch: Batch, weights: Mapping[str, Tensor], linear: Linear) -> Tensor:
        routing = self._route(batch, x, weights)
        pairs = expert_linears(step.layout.linears, 2)
        width = step.layout.linears[0].shape[0]
        product = x.new_empty(routing.assignments, width)
        for (expert, tokens), (_, rows) in zip(routing.tokens_by_expert(), routing.rows_by_expert(), strict=True):
            product[rows] = self._gated(pairs[expert], x[tokens], linear)
        return product

    def _experts_out(self, step: Step, x: Tensor, batch: Batch, linear: Linear) -> Tensor:
        routing, hidden = Routing.of(batch.state), batch.state["hidden"]
        downs = expert_linears(step.layout.linears, 1)
        out = x.new_zeros(len(routing.experts), hidden.shape[-1], dtype=torch.float32)
        gates = routing.gates_by_expert()
        for (expert, tokens), (_, rows) in zip(routing.tokens_by_expert(), routing.rows_by_expert(), strict=True):
            out.index_add_(0, tokens, linear(downs[expert][0].name, x[rows]) * gates[rows, None])
        valid = batch.valid(hidden.shape[1], hidden.device)
        if valid is None:
            return out.view(hidden.shape)
        whole = out.new_zeros(hidden.shape)
        whole[valid] = out
        return whole

    def expert(self, number: int) -> str:
        experts = self.decoder.family.experts
        assert experts is not None
        return self.prefix + experts.expert.format(expert=number)


def steps_of(unit: UnitLayout) -> list[Step]:
    """A block's stages with linears, in the order of its function. A mixture's experts are two steps, each with all of them; a shared
    expert's are between the two, for it reads what the experts read."""
    found: list[Step] = []
    experts: list[StageLayout] = []
    beside: list[Step] = []
    for stage in unit.stages:
        name = stage.name.rpartition(".")[2]
        if any(x.kind == "router" for x in stage.linears) or name.isdecimal():
            experts.append(stage)
        elif stage.linears:
            (beside if name.startswith("shared_") else found).append(Step(name, stage))
    if experts:
        router, *each = experts
        tensors = tuple(t for stage in experts for t in stage.tensors)
        ins = tuple(x for stage in each for x in stage.linears[:-1])
        outs = tuple(stage.linears[-1] for stage in each)
        base = router.name.rpartition(".")[0]
        found += [
            Step("experts_in", StageLayout(f"{base}.gate_up", tensors, ins)),
            *beside,
            Step("experts_out", StageLayout(f"{base}.down", (), outs)),
        ]
    return found


def expert_linears(linears: tuple[LinearLayout, ...], each: int) -> list[tuple[LinearLayout, ...]]:
    """Those of one expert after the other."""
    return [linears[i : i + each] for i in range(0, len(linears), each)]
