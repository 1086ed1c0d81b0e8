"""What of a block is in memory at once: attention; the feed-forward, or the router, a shared expert, and then each expert. No torch.

A part is loaded, compressed, evaluated, written and dropped before the next one is read, so a block's memory is that of its largest part,
however many experts it has. Some passes need more of it at once (docs/decisions/0027-expert-at-a-time.md).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from kompressor_worker.layout import ModelLayout, StageLayout, UnitLayout
from kompressor_worker.passes import REGISTRY, Pass
from kompressor_worker.report_sections import size
from kompressor_worker.schemes import Scheme

__all__ = ["Part", "held", "is_shared", "mixture_warnings", "parts_of", "plain", "together", "whole_block"]


@dataclass(frozen=True)
class Part:
    stages: tuple[int, ...]
    """Numbers of the block's stages, which follow each other."""

    def of(self, unit: UnitLayout) -> tuple[StageLayout, ...]:
        return tuple(unit.stages[number] for number in self.stages)


def held(passes: Iterable[Pass]) -> str | None:
    """The name of a pass that needs whole blocks; None: there is none."""
    return next((name_of(p) for p in passes if p.folds or p.whole_block or p.recovers), None)


def together(unit: UnitLayout, schemes: Mapping[str, Scheme]) -> Scheme | None:
    """The scheme whose static input scale a mixture's experts share, so that all of them are measured before the first is finished."""
    routed = (x.name for stage in unit.stages if stage.expert is not None and not stage.dropped for x in stage.linears)
    return next((schemes[name] for name in routed if name in schemes and schemes[name].calibrated is not None), None)


def parts_of(unit: UnitLayout, passes: Collection[Pass] = (), schemes: Mapping[str, Scheme] | None = None) -> tuple[Part, ...]:
    """The parts of a decoder block, in the order of its stages. Small tensors that no linear has (norms) belong to the first."""
    if held(passes):
        return whole_block(unit)
    joined = together(unit, schemes or {}) is not None
    runs: list[tuple[str, list[int]]] = []
    for number, stage in enumerate(unit.stages):
        place = place_of(unit, stage, joined)
        if runs and (not place or runs[-1][0] in ("", place)):
            runs[-1] = (place or runs[-1][0], [*runs[-1][1], number])
        else:
            runs.append((place, [number]))
    return tuple(Part(tuple(numbers)) for _, numbers in runs)


def whole_block(unit: UnitLayout) -> tuple[Part, ...]:
    return (Part(tuple(range(len(unit.stages)))),)


def place_of(unit: UnitLayout, stage: StageLayout, joined: bool) -> str:
    """Stages of the same place make a part; nothing: a stage without linears, which goes with its neighbour."""
    if not stage.linears:
        return ""
    if stage.name.startswith(f"{unit.name}.self_attn."):
        return "attention"
    router, shared = any(x.kind == "router" for x in stage.linears), is_shared(stage)
    if joined and (router or shared or stage.expert is not None):
        return "mixture"
    return "router" if router else "shared" if shared else "feed_forward" if stage.expert is None else f"expert {stage.name}"


def is_shared(stage: StageLayout) -> bool:
    """Whether it is of an expert that all tokens go to."""
    return stage.name.rpartition(".")[2].startswith("shared_")


def plain(unit: UnitLayout) -> Sequence[StageLayout]:
    """The stages without linears: norms, which all parts go by."""
    return [stage for stage in unit.stages if not stage.linears]


def mixture_warnings(layout: ModelLayout, passes: Collection[Pass], schemes: Mapping[str, Scheme]) -> list[str]:
    """What makes a mixture hold all its experts at once, where activations flow."""
    mixtures = [unit for unit in layout.units if any(stage.expert is not None for stage in unit.stages)]
    if not mixtures:
        return []
    largest = max(mixtures, key=lambda unit: unit.source_bytes)
    all_of_them = f"all {sum(stage.expert is not None for stage in largest.stages)} experts of a block are in memory at once"
    stored = f"{size(largest.source_bytes)} as stored"
    found = []
    if (name := next((name_of(p) for p in passes if p.recovers), None)) is not None:
        found.append(f"{name}: a block is tuned as a whole, so {all_of_them} ({stored}); leave it out where memory is short")
    elif (name := held(passes)) is not None:
        found.append(f"{name}: scales are folded across a block, so {all_of_them} ({stored}); leave it out where memory is short")
    elif (scheme := next(filter(None, (together(unit, schemes) for unit in mixtures)), None)) is not None:
        found.append(
            f"{scheme.name}: a mixture's experts share a static input scale, so {all_of_them} ({stored}); choose a scheme that takes its "
            "inputs as they come, such as FP8_DYNAMIC, where memory is short"
        )
    if (surveying := next((p for p in passes if p.surveys_whole_blocks), None)) is not None:
        found.append(f"{name_of(surveying)}: its survey tries changes of a whole block, so {all_of_them} ({stored})")
    return found


def name_of(p: Pass) -> str:
    """As it stands in the spec."""
    place = f"{type(p).__module__}:{type(p).__qualname__}"
    return next((name for name, known in REGISTRY.items() if known == place), place)
