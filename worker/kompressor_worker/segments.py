"""Where a list of passes is cut: behind every pass that tunes what those before it have made of a block. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kompressor_worker.errors import UserError
from kompressor_worker.parts import name_of
from kompressor_worker.passes import Pass
from kompressor_worker.passes.recover import Recover
from kompressor_worker.passes.structured import StructuredPass


@dataclass(frozen=True)
class Segment:
    """Passes that a block goes through at once, from its input to its output."""

    passes: tuple[Pass, ...]
    recover: Recover | None = None
    """What tunes the block behind them; None: nothing, for this is the last one."""


def segments_of(passes: Sequence[Pass]) -> tuple[Segment, ...]:
    """The last one may be empty, and is the only one where nothing is tuned."""
    found: list[Segment] = []
    run: list[Pass] = []
    for p in passes:
        if isinstance(p, Recover):
            found.append(Segment(tuple(run), p))
            run = []
        else:
            run.append(p)
    return (*found, Segment(tuple(run)))


def refuse_order(passes: Sequence[Pass]) -> None:
    """Raises UserError where what is tuned would be changed in shape or basis afterwards, or nothing has changed since it was tuned."""
    tuned = next((number for number, p in enumerate(passes) if p.recovers), None)
    for number, p in enumerate(passes):
        if tuned is None or number <= tuned:
            continue
        name, before = name_of(p), passes[number - 1]
        if p.transforms or p.reduces or isinstance(p, StructuredPass):
            raise UserError(f"passes[{number}].{name}: changes blocks that passes[{tuned}] has tuned; put {name} before it")
        if p.recovers and (before.recovers or before.kv):
            raise UserError(
                f"passes[{number}].{name}: nothing has been compressed since passes[{number - 1}]; leave it out, or raise its steps"
            )
