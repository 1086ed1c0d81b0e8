"""How much smaller in shape a result is: sizes of config.json, parameters and operations, before and after. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from kompressor_worker.architectures import EXPERT_COUNTS, text_config
from kompressor_worker.layout import ModelLayout, SourceTensor, UnitLayout
from kompressor_worker.passes import Pass

SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    *EXPERT_COUNTS,
    "num_experts_per_tok",
)


def reshaped(layout: ModelLayout) -> bool:
    return any(unit.dropped for unit in layout.units) or any(t.reduced is not None for stage in layout.stages() for t in stage.tensors)


def structure(layout: ModelLayout) -> dict[str, Any]:
    """What `plan` and the report say of it, [before, after] each; empty where the shape stays. Operations are multiply-adds of linears and
    the head for one token, all experts that it is routed to; attention's scores, which grow with the context, are not among them."""
    if not reshaped(layout):
        return {}
    before, after = (text_config(config) for config in (layout.source_config, layout.config))
    sizes = {name: [before.get(name), after.get(name)] for name in SIZES if before.get(name) != after.get(name)}
    kept = [replace(unit, stages=tuple(s for s in unit.stages if not s.dropped)) for unit in layout.units if not unit.dropped]
    return {
        "sizes": sizes,
        "parameters": [
            sum({t.stored[0].name: prod(t.shape) for t in tensors(layout.units)}.values()),  # a head that rotate unties is the embeddings
            sum(prod(t.result_shape) for t in tensors(kept)),
        ],
        "multiplyAddsPerToken": [
            round(operations([unit.as_stored() for unit in layout.units], before)),
            round(operations(kept, after)),
        ],
    }


def between(source: ModelLayout, result: ModelLayout) -> dict[str, Any]:
    """The same of two models of which one was not made of the other."""
    before, after = text_config(source.config), text_config(result.config)
    kept = [unit for unit in result.units if not unit.dropped]
    return {
        "sizes": {name: [before.get(name), after.get(name)] for name in SIZES if before.get(name) != after.get(name)},
        "parameters": [sum(prod(t.shape) for t in tensors(source.units)), sum(prod(t.result_shape) for t in tensors(kept))],
        "multiplyAddsPerToken": [round(operations(source.units, before)), round(operations(kept, after))],
    }


def section(layout: ModelLayout, passes: Mapping[str, Pass], blocks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The report's: `structure`'s answer, what passes have to say of their choice, and by block what went and what that cost."""
    found = structure(layout)
    if not found:
        return {}
    chosen = {name: said for name, p in passes.items() if (said := p.described())}
    reduced = {name: block["reduced"] for name, block in blocks.items() if "reduced" in block}
    return {**found, **({"passes": chosen} if chosen else {}), **({"blocks": reduced} if reduced else {})}


def tensors(units: Iterable[UnitLayout]) -> list[SourceTensor]:
    """Those that the source has."""
    return [t for unit in units for stage in unit.stages for t in stage.tensors if t.stored]


def operations(units: Iterable[UnitLayout], config: Mapping[str, Any]) -> float:
    """Embeddings count where there is no other head."""
    units = list(units)
    matrices = {x.kind: x for unit in units for stage in unit.stages for x in stage.linears if x.kind in ("embedding", "head")}
    total = float(prod(matrices["embedding"].shape)) if "head" not in matrices and "embedding" in matrices else 0.0
    for unit in units:
        linears = [x for stage in unit.stages for x in stage.linears if x.kind != "embedding"]
        experts = next((x.shape[0] for x in linears if x.kind == "router"), 1)
        routed = min(1.0, int(config.get("num_experts_per_tok") or 1) / experts)
        total += sum(prod(x.shape) * (routed if ".experts." in x.name else 1.0) for x in linears)
    return total
