"""A layout with other sizes: what passes that take heads, neurons, channels or blocks away leave, by the family's data alone. No torch.

config.json has one number for each size, so a size is the same in all blocks: no portable loader reads sizes by layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kompressor_api.names import Reason
from kompressor_worker.architectures import FAMILIES, Dimensions, text_config
from kompressor_worker.errors import UserError
from kompressor_worker.family import Family
from kompressor_worker.layout import LinearLayout, ModelLayout, SourceTensor, StageLayout, UnitLayout

__all__ = ["axes", "family_to_resize", "head_size", "loadable", "refuse_latent", "resized", "with_text"]

OF_ATTENTION = ("hidden_size", "num_attention_heads", "head_dim")
OF_HEADS = ("q_norm.weight", "k_norm.weight", "q_a_layernorm.weight", "kv_a_layernorm.weight")
"""Norms over a head's channels or a latent's, not over the hidden state's."""


def family_to_resize(layout: ModelLayout, by: str) -> Family:
    """The family of a model that the pass `by` can make smaller. Raises UserError that says why it cannot."""
    family, model_type = FAMILIES.get(layout.family or ""), text_config(layout.config).get("model_type")
    fitting = ", ".join(name for name, f in FAMILIES.items() if f.forward)
    if family is None or not family.forward:
        raise UserError(
            f"{by}: model_type {model_type!r} is not one whose function is known (known: {fitting}), so neither is what reads the part "
            f"that goes; leave {by} out",
            Reason.UNSUPPORTED_MODEL,
        )
    return family


def refuse_latent(layout: ModelLayout, family: Family, by: str) -> None:
    """Raises UserError where keys and values come out of a latent, which `by` knows nothing of."""
    if family.latent:
        raise UserError(
            f"{by}: model_type {text_config(layout.config).get('model_type')!r} makes its heads of latents with norms of their own, which "
            f"{by} does not reckon with; leave {by} out, or use pruneWidth or pruneLayers",
            Reason.UNSUPPORTED_MODEL,
        )


def head_size(layout: ModelLayout, family: Family, by: str) -> int:
    """Channels of an attention head. Raises UserError."""
    config = {**family.defaults, **text_config(layout.config)}
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if type(heads) is not int or heads < 1 or type(hidden) is not int:
        raise UserError(f"{by}: config.json says num_attention_heads {heads!r}, hidden_size {hidden!r}; correct it")
    return int(config.get("head_dim") or hidden // heads)


def with_text(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with `changes` where the decoder's part of it is."""
    inner = config.get("text_config")
    return {**config, "text_config": {**inner, **changes}} if isinstance(inner, dict) else {**config, **changes}


def resized(layout: ModelLayout, changes: Mapping[str, Any]) -> ModelLayout:
    """The layout with `changes` in config.json, and every tensor and linear in the shape that follows from them."""
    family = FAMILIES[layout.family or ""]
    config = with_text(layout.config, changes)
    shapes = Shapes(family, Dimensions(family, layout.config), Dimensions(family, config))
    units = tuple(
        u if u.dropped or not of_the_decoder(u) else replace(u, stages=tuple(shapes.stage(u, s) for s in u.stages)) for u in layout.units
    )
    return replace(layout, units=units, config=config)


def loadable(layout: ModelLayout) -> ModelLayout:
    """Under another model_type, where loaders do not take these sizes under the source's own. Raises UserError where there is none."""
    family = FAMILIES.get(layout.family or "")
    text, source = ({**(family.defaults if family else {}), **text_config(c)} for c in (layout.config, layout.source_config))
    same = all(text.get(size) == source.get(size) for size in OF_ATTENTION)
    if family is None or same or text["model_type"] not in family.model_types[:1]:
        return layout
    hidden, heads, head = (int(text[size]) for size in OF_ATTENTION)
    if family.whole_heads and hidden % heads:
        reason = f"transformers refuses a {text['model_type']} whose hidden_size is no multiple of num_attention_heads"
    elif family.derived_head and hidden // heads != head and "TransformersForCausalLM" not in (layout.config.get("architectures") or ()):
        reason = f"vLLM takes hidden_size over num_attention_heads for the head size of a {text['model_type']}, whatever head_dim says"
    else:
        return layout
    other = family.stand_in
    if other is None or (unable := next((key for key in other.without if text.get(key)), None)):
        beside = f", nor does a {other.model_type}, which has no {unable}" if other else ""
        raise UserError(
            f"passes: would leave hidden_size {hidden} and {heads} heads of {head} channels, which not all loaders take: {reason}{beside}; "
            "ask for other counts, or leave pruneHeads or pruneHidden out"
        )
    changes: dict[str, Any] = {"model_type": other.model_type, **other.says}
    if other.windowed:
        changes["sliding_window"] = text.get("max_position_embeddings") or 4096
        changes["layer_types"] = ["full_attention"] * int(text["num_hidden_layers"])
    return replace(layout, config=with_text(layout.config, changes))


def of_the_decoder(unit: UnitLayout) -> bool:
    """A vision tower may have modules of the same names, and sizes of its own."""
    return unit.name == "head" or any(stage.linears for stage in unit.stages)


def axes(family: Family, unit: UnitLayout) -> dict[str, tuple[str, ...]]:
    """By full tensor name: what its axes are, in names of Dimensions; a tensor of which that is not known is left out."""
    sizes = Sizes(family)
    return {t.name: found for stage in unit.stages for t in stage.tensors if (found := sizes.of(unit, t, kinds_of(stage)))}


def kinds_of(stage: StageLayout) -> dict[str, str]:
    return {linear.name: linear.kind for linear in stage.linears}


class Sizes:
    """What the axes of a family's tensors are."""

    def __init__(self, family: Family) -> None:
        groups = (*family.attention, *(g for other in family.attention_without.values() for g in other), *family.feed_forward)
        self._linears = {x.name: (x.rows, x.columns) for group in groups for x in group.linears}
        experts = family.experts
        self._correction = experts.correction if experts else ""
        self._expert = re.compile(r"(?!)")
        if experts is not None:
            self._linears[experts.router] = ("experts", "hidden")
            self._linears |= {x.name: (x.rows, x.columns) for group in experts.shared for x in group.linears}
            self._linears |= {experts.shared_gate: ("one", "hidden")} if experts.shared_gate else {}
            for group in experts.groups:
                self._linears |= {f"{experts.expert}.{x.name}": (x.rows, x.columns) for x in group.linears}
            pattern = re.escape(experts.expert).replace(re.escape("{expert}"), r"\d+")
            self._expert, self._form = re.compile(rf"{pattern}(?=\.)"), experts.expert

    def of(self, unit: UnitLayout, tensor: SourceTensor, kinds: Mapping[str, str]) -> tuple[str, ...] | None:
        """Names in Dimensions, one an axis; None: it is none that the family's data describes. `kinds`: of its stage's linears."""
        if tensor.name == f"{unit.name}.{self._correction}":
            return ("experts",)
        module, _, what = tensor.name.rpartition(".")
        names = self._module(unit, module, kinds.get(module))
        if names is None or (what == "weight" and len(tensor.shape) == len(names)):
            return names
        return names[:1] if what == "bias" else None

    def _module(self, unit: UnitLayout, module: str, kind: str | None) -> tuple[str, ...] | None:
        """A linear's rows and columns, or a norm's channels."""
        if kind in ("embedding", "head"):
            return ("vocab", "hidden")
        inside = module.removeprefix(f"{unit.name}.")
        if found := self._linears.get(self._expert.sub(lambda _: self._form, inside)):
            return found
        norm = inside.rpartition(".")[2].endswith("norm") and not f"{inside}.weight".endswith(OF_HEADS)
        return ("hidden",) if norm else None


class Shapes:
    """Of every tensor, once sizes change."""

    def __init__(self, family: Family, before: Dimensions, after: Dimensions) -> None:
        self._sizes, self._before, self._after = Sizes(family), before, after

    def stage(self, unit: UnitLayout, stage: StageLayout) -> StageLayout:
        tensors = tuple(self._tensor(unit, t, kinds_of(stage)) for t in stage.tensors)
        shapes = {t.name: t.result_shape for t in tensors}
        return replace(stage, tensors=tensors, linears=tuple(self._linear(x, shapes) for x in stage.linears))

    def _linear(self, linear: LinearLayout, shapes: Mapping[str, tuple[int, ...]]) -> LinearLayout:
        rows, columns = shapes.get(linear.weight, linear.shape)
        return replace(linear, shape=(rows, columns))

    def _tensor(self, unit: UnitLayout, tensor: SourceTensor, kinds: Mapping[str, str]) -> SourceTensor:
        names = self._sizes.of(unit, tensor, kinds)
        if names is None:
            return tensor
        shape = tuple(self._size(name, old) for name, old in zip(names, tensor.result_shape, strict=True))
        return tensor if shape == tensor.result_shape else replace(tensor, reduced=shape)

    def _size(self, name: str, old: int) -> int:
        """A size that config.json says otherwise than before; what it says nothing of stays."""
        size = self._after[name]
        return old if size is None or size == self._before[name] else size
