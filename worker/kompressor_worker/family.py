"""What is to be said of a family of decoders: linears, which of them share an input, experts, norms. architectures.py says it of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kompressor_worker.errors import CorruptSource

__all__ = ["Experts", "Family", "Group", "Linear", "Scoring", "StandIn"]


@dataclass(frozen=True)
class Linear:
    """A weight [rows, columns]; sizes are names in Dimensions, `+` adds them."""

    name: str
    rows: str
    columns: str
    absorbed: bool = False
    """Whether a loader multiplies it into what stands beside it: it learns the weight by running an identity through the linear."""


@dataclass(frozen=True)
class Group:
    """Linears that share an input: one stage."""

    name: str
    """Its last part says which step of the block it is (decoder_block.py)."""
    linears: tuple[Linear, ...]
    fused: bool = True
    """Whether a loader makes one matrix of them."""


@dataclass(frozen=True)
class Scoring:
    """How routers choose experts and weigh them."""

    sigmoid: bool = False
    """Of each logit by itself, instead of a softmax over all of them."""
    renormalise: bool | None = None
    """Whether the gates of the experts chosen are shares of one; None: as config.json's norm_topk_prob says."""
    best: int = 0
    """How many of a group's best scores say, summed, whether it is among the topk_group of n_group; 0: there are no groups."""
    grouped_by: tuple[str, ...] = ()
    """Values of config.json's topk_method that mean groups; none: there are always groups."""
    scaled: bool = False
    """Whether gates are multiplied by routed_scaling_factor."""


@dataclass(frozen=True)
class Experts:
    """The mixture in place of `Family.feed_forward` in a sparse layer."""

    router: str
    """Module, a linear [experts, hidden] that stays exact."""
    expert: str = ""
    """Module of one expert, `{expert}` its number; its groups' names hang below."""
    groups: tuple[Group, ...] = ()
    """Of one expert. Loaders fuse all experts of a layer."""
    stacked: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Experts fused in the file: parameter and its shape, no linear of its own."""
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Parameters that hold linears of all experts in some files (stacked.py), and the linears in each."""
    in_memory: str = ""
    """The router's module in files with such stacks, where it is called otherwise."""
    shared: tuple[Group, ...] = ()
    """Of an expert that every token goes to, beside those that it is routed to."""
    shared_gate: str = ""
    """Module, a linear [1, hidden] that stays exact: the shared expert's output is multiplied by the sigmoid of what it says."""
    correction: str = ""
    """Parameter [experts], exact too: added to the scores when experts are chosen, not in their gates."""
    scoring: Scoring = Scoring()


@dataclass(frozen=True)
class StandIn:
    """Another model_type, or another class of the same, with the same function and the same tensor names."""

    model_type: str
    says: Mapping[str, Any] = field(default_factory=dict)
    """What config.json says beside."""
    without: tuple[str, ...] = ()
    """What it cannot do, by keys of config.json that say so."""
    windowed: bool = False
    """Whether its class makes a mask for a sliding window even where no layer has one, so that config.json must name one."""


@dataclass(frozen=True)
class Family:
    model_types: tuple[str, ...]
    """`model_type` in config.json, or in its text_config."""
    attention: tuple[Group, ...]
    feed_forward: tuple[Group, ...] = ()
    experts: Experts | None = None
    attention_without: Mapping[str, tuple[Group, ...]] = field(default_factory=dict)
    """By key of config.json: the attention of a model where that is null."""
    latent: bool = False
    """Whether keys and values come out of a latent (latent_attention.py): that is what a runtime caches, and heads share it."""
    norm_offset: float = 0.0
    """What the model adds to a norm's stored weight."""
    post_norms: bool = False
    """Whether attention and feed-forward have a norm behind them too; the one before the feed-forward is then pre_feedforward_layernorm."""
    pre_norms: bool = True
    """Whether they have one before them."""
    whole_norms: bool = False
    """Whether the norms of queries and keys, where there are some, are over all heads together."""
    scaled_embeddings: bool = False
    """Whether embeddings are multiplied by the root of the hidden size."""
    full_attention_every: int = 0
    """Where config.json does not list them: one of so many layers has full attention, the others a sliding window; 0: all are alike."""
    no_rotary_every: int = 0
    """Where config.json does not list them (`no_rope_layers`, 0 for those without): one of so many layers has no rotary embedding."""
    whole_heads: bool = False
    """Whether transformers' config class refuses a hidden size that is no multiple of the number of heads, head_dim or not."""
    derived_head: bool = False
    """Whether vLLM takes the hidden size over the number of heads for a head's size, head_dim or not."""
    stand_in: StandIn | None = None
    """For sizes that loaders do not take for these reasons."""
    forward: bool = True
    """Whether decoder.py knows its function, so that it can be calibrated and evaluated."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What config.json may leave out because transformers' config class has another default than most."""

    def sparse(self, config: Mapping[str, Any], layer: int) -> bool:
        """Whether this layer has experts, by the keys of Qwen's mixtures and those of DeepSeek's; the others have neither. Raises
        CorruptSource."""
        text = {**self.defaults, **config}
        dense, step = text.get("mlp_only_layers") or (), text.get("decoder_sparse_step") or 1
        first, every = text.get("first_k_dense_replace") or 0, text.get("moe_layer_freq") or 1
        if not isinstance(dense, list | tuple) or any(type(number) is not int for number in (step, first, every)):
            raise CorruptSource(
                f"config.json: mlp_only_layers {dense!r}, decoder_sparse_step {step!r}, first_k_dense_replace {first!r} or "
                f"moe_layer_freq {every!r} is not what it should be; correct it"
            )
        if self.experts is None or layer in dense:
            return False
        return not self.feed_forward or ((layer + 1) % step == 0 and layer >= first and layer % every == 0)

    def attention_of(self, config: Mapping[str, Any]) -> tuple[Group, ...]:
        text = {**self.defaults, **config}
        return next((groups for key, groups in self.attention_without.items() if text.get(key) is None), self.attention)
