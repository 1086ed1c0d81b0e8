"""A layout without some of its blocks, or of its experts: those that stay are counted anew, and so is all that config.json says layer by
layer. No torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kompressor_worker.architectures import text_config
from kompressor_worker.errors import UserError
from kompressor_worker.family import Family
from kompressor_worker.layout import LinearLayout, ModelLayout, SourceTensor, StageLayout, UnitLayout
from kompressor_worker.resizing import with_text

__all__ = ["block_numbers", "depth_config", "is_block", "kept_layers", "layer_types", "mixtures", "renamed", "with_experts", "without"]

DROPPED = "dropped.layers"
"""In place of a block's prefix where the result does not have it: no name of the result's can be the same."""
GONE = "gone"
"""Before the number of an expert that the result does not have."""


def block_numbers(layout: ModelLayout) -> list[int]:
    """Numbers of the units that are decoder blocks and stay."""
    return [number for number, unit in enumerate(layout.units) if is_block(unit) and not unit.dropped]


def kept_layers(layout: ModelLayout) -> list[int]:
    """Of the decoder blocks, counted in the source, those that stay."""
    return [layer for layer, unit in enumerate(filter(is_block, layout.units)) if not unit.dropped]


def without(layout: ModelLayout, gone: Collection[int]) -> ModelLayout:
    """`gone` counts blocks from 0. They stay in the layout as dropped, for the original's activations flow through them."""
    units, stays = list(layout.units), 0
    for layer, number in enumerate(block_numbers(layout)):
        unit = units[number]
        prefix, _, old = unit.name.rpartition(".")
        if layer in gone:
            units[number] = replace(_placed(unit, f"{DROPPED}.{old}"), dropped=True)
        else:
            units[number] = _placed(unit, f"{prefix}.{stays}")
            stays += 1
    return replace(layout, units=tuple(units))


def mixtures(layout: ModelLayout) -> dict[int, int]:
    """Numbers of the units that have experts, and their block's, counted from 0 in the source."""
    blocks = [n for n, unit in enumerate(layout.units) if is_block(unit)]
    return {n: layer for layer, n in enumerate(blocks) if any(stage.expert is not None for stage in layout.units[n].stages)}


def with_experts(layout: ModelLayout, clusters: Mapping[int, Sequence[Sequence[int]]]) -> ModelLayout:
    """By block: which experts (numbers in the source) become one, in the order of the result's. A cluster's last member has its place, and
    those before it stand before it, dropped; an expert of no cluster is dropped behind all. The original still flows through them."""
    units = list(layout.units)
    for number, layer in mixtures(layout).items():
        unit = units[number]
        if unit.dropped or layer not in clusters:
            continue
        by_number = {stage.expert: stage for stage in unit.stages if stage.expert is not None}
        stages = [stage for stage in unit.stages if stage.expert is None]
        for new, members in enumerate(clusters[layer]):
            *others, last = (by_number.pop(member) for member in members)
            stages += [*map(_gone, others), _numbered(last, str(new))]
        units[number] = replace(unit, stages=(*stages, *map(_gone, by_number.values())))
    return replace(layout, units=tuple(units))


def _gone(stage: StageLayout) -> StageLayout:
    return replace(_numbered(stage, f"{GONE}.{stage.expert}"), dropped=True)


def _numbered(stage: StageLayout, number: str) -> StageLayout:
    return _moved(stage, stage.name, f"{stage.name.rpartition('.')[0]}.{number}")


def depth_config(config: Mapping[str, Any], family: Family, kept: Sequence[int]) -> dict[str, Any]:
    """config.json for the blocks `kept`, counted in `config`'s own: lists by layer, and rules that go by a layer's number."""
    text = text_config(config)
    layers = int(text["num_hidden_layers"])
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    kinds = {k: v for k, v in text.items() if k.endswith("layer_types") and isinstance(v, list) and len(v) == layers}
    if "layer_types" not in kinds and (rule := layer_types(text, family, layers)) is not None:
        kinds["layer_types"] = rule
    if (rotated := no_rope_layers(text, family, layers)) is not None:
        kinds["no_rope_layers"] = rotated
    changes |= {key: [value[layer] for layer in kept] for key, value in kinds.items()}
    if type(first := text.get("max_window_layers")) is int:
        changes["max_window_layers"] = sum(layer < first for layer in kept)
    if family.experts is not None and family.feed_forward:
        changes |= dense_layers(text, family, [new for new, layer in enumerate(kept) if not family.sparse(text, layer)])
    return with_text(config, changes)


def dense_layers(text: Mapping[str, Any], family: Family, dense: list[int]) -> dict[str, Any]:
    """How config.json says which layers have no experts: a list, or the number of those at the beginning. Raises UserError."""
    if "first_k_dense_replace" not in {**family.defaults, **text}:
        return {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    if dense != list(range(len(dense))):
        raise UserError(
            f"pruneLayers: layers without experts would be {dense}, and a {text.get('model_type')!r} can have them at the beginning only; "
            "leave pruneLayers out"
        )
    return {"first_k_dense_replace": len(dense), **({"moe_layer_freq": 1} if "moe_layer_freq" in text else {})}


def layer_types(text: Mapping[str, Any], family: Family, layers: int) -> list[str] | None:
    """What the family's own rule makes of a config.json that does not list the kinds of attention; None: it has no such rule."""
    every = text.get("sliding_window_pattern") or text.get("_sliding_window_pattern") or family.full_attention_every
    if not family.full_attention_every or type(every) is not int:
        return None
    return ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)]


def no_rope_layers(text: Mapping[str, Any], family: Family, layers: int) -> list[int] | None:
    """1 for each layer with a rotary embedding, as config.json or the family's own rule has it; None: all have one."""
    if not family.no_rotary_every:
        return None
    every = text.get("no_rope_layer_interval") or family.no_rotary_every
    return text.get("no_rope_layers") or [int((layer + 1) % every != 0) for layer in range(layers)]


def is_block(unit: UnitLayout) -> bool:
    return any(x.kind in ("linear", "router") for stage in unit.stages for x in stage.linears)


def _placed(unit: UnitLayout, name: str) -> UnitLayout:
    return replace(unit, name=name, stages=tuple(_moved(stage, unit.name, name) for stage in unit.stages))


def renamed(unit: UnitLayout, new: Callable[[str], str]) -> UnitLayout:
    """The unit with other names of tensors, linears and stages."""
    return replace(unit, stages=tuple(_renamed(stage, new) for stage in unit.stages))


def _moved(stage: StageLayout, old: str, name: str) -> StageLayout:
    """With `name` in place of `old` where names begin with it."""

    def new(text: str) -> str:
        return f"{name}.{text.removeprefix(f'{old}.')}" if text.startswith(f"{old}.") else name if text == old else text

    return _renamed(stage, new)


def _renamed(stage: StageLayout, new: Callable[[str], str]) -> StageLayout:

    def tensor(t: SourceTensor) -> SourceTensor:
        return replace(t, name=new(t.name))

    def linear(x: LinearLayout) -> LinearLayout:
        return replace(x, name=new(x.name), fused=new(x.fused) if x.fused else None, shared=new(x.shared) if x.shared else None)

    return replace(stage, name=new(stage.name), tensors=tuple(map(tensor, stage.tensors)), linears=tuple(map(linear, stage.linears)))
