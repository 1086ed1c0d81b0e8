"""Adaptive bits: the schemes that lose least for what the model may weigh, by measured sensitivity.

A survey of the source measures what each candidate costs each group of linears that loaders hold as one (`scheme_costs`); an integer
program chooses (`scheme_choice`); GPTQ or rounding to nearest encodes, as the passes of these names do. Why so:
docs/decisions/0031-adaptive-bits.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, StringConstraints, field_validator, model_validator

from kompressor_api.fields import Number
from kompressor_api.pod import Quantity
from kompressor_api.quantity import parse
from kompressor_api.v1alpha1 import Model
from kompressor_worker.dropping import block_numbers
from kompressor_worker.errors import UserError
from kompressor_worker.passes import Pass, gptq, rtn
from kompressor_worker.passes.linear_params import TargetParams
from kompressor_worker.passes.scheme_choice import (
    Candidate,
    SchemeGroup,
    best,
    filled,
    groups_of,
    largest,
    shared_by_experts,
    smallest,
    stored_bytes,
    sweep,
    total,
    weight_of,
    within,
)
from kompressor_worker.passes.selection import choose, refuse_split
from kompressor_worker.schemes import Scheme
from kompressor_worker.shards import plan_output

if TYPE_CHECKING:
    import torch

    from kompressor_worker.block import Stage
    from kompressor_worker.layout import LinearLayout, ModelLayout
    from kompressor_worker.passes.surveyor import Surveyor

RIDDEN = 16
"""Blocks at most of which an error is followed to the logits, evenly spread."""
RIDING = 2
"""Calibration rows that a block is tried on and that go on to the logits, at least; as many more as share a batch with them."""
GROUPS = 4
"""Of linears in a dense block: q/k/v, o, gate/up, down."""

CandidateName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]+(:(-1|[1-9][0-9]{0,4}))?$", max_length=64)]
ALGORITHMS: dict[str, tuple[str, ...]] = {"gptq": get_args(gptq.SchemeName), "rtn": get_args(rtn.SchemeName)}


class Budget(Model):
    """What the result may weigh: bits a weight, or bytes."""

    bits: Number | None = Field(
        default=None,
        gt=0.0,
        le=32.0,
        description="Mean bits of a target's weight with scales and zero points; 4.25, say. Either this or bytes.",
    )
    bytes: Quantity | None = Field(default=None, description="All tensors of the result, exact ones too; 12Gi, say. Either this or bits.")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.bits is None) == (self.bytes is None):
            raise ValueError("give either bits, such as 4.25, or bytes, such as 12Gi")
        return self


class AutoSchemeParams(TargetParams):
    """Chooses a scheme for each group of linears, by what a survey finds that it costs, within a budget."""

    budget: Budget = Field(description="What the result may weigh at most.")
    candidates: list[CandidateName] = Field(
        min_length=2,
        max_length=16,
        description=(
            "What linears may become where their shapes allow: schemes of the algorithm without calibrated scales, such as W4A16, or "
            "W4A16:32 in groups of 32; none: exact."
        ),
    )
    algorithm: Literal["gptq", "rtn"] = Field(default="gptq", description="What encodes: the pass of this name, with its defaults.")
    experts: Literal["layer", "model", "single"] = Field(
        default="layer",
        description=(
            "Which routed experts share a scheme. layer: all of a layer, which vLLM reads, and transformers 5 where layers happen to "
            "agree. model: all; both read that. single: none; transformers before 5 alone."
        ),
    )

    @field_validator("candidates")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        seen: dict[Scheme | None, str] = {}
        for name in names:
            scheme = Candidate.of(name).scheme
            if scheme in seen:
                raise ValueError(f"{name!r} is {seen[scheme]!r} once more; leave one of them out")
            seen[scheme] = name
        return names

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name in self.candidates:
            scheme = Candidate.of(name).scheme
            if scheme is not None and scheme.calibrated is not None:
                raise ValueError(f"candidate {name}: its activations have calibrated scales, which no survey tries; choose another")
            if scheme is not None and scheme.name not in ALGORITHMS[self.algorithm]:
                other = next((a for a, names in ALGORITHMS.items() if scheme.name in names), "")
                raise ValueError(f"candidate {name}: {self.algorithm} does not make it; choose algorithm: {other}, or leave it out")
        return self


class AutoScheme(Pass):
    """The pass `autoScheme`."""

    Params: ClassVar[type[Model]] = AutoSchemeParams
    surveys = 1
    surveys_whole_blocks = True
    once = True
    section = "autoScheme"

    def __init__(self, params: AutoSchemeParams) -> None:
        self.params = params
        self.candidates = [Candidate.of(name) for name in params.candidates]
        self._encoder = encoder(params.algorithm, next(c.scheme.name for c in self.candidates if c.scheme is not None))
        self.statistics = self._encoder.statistics
        self.products = self._encoder.products
        self.survey_hessians = "hessian" in self.statistics
        self._groups: list[SchemeGroup] = []
        self._linears: list[LinearLayout] = []
        self._budget = 0
        """Bytes of the groups."""
        self._others = 0
        """Bytes of all else."""
        self._found: dict[str, list[Any]] = {}
        """`scheme_costs.SchemeCosts.found`, as lists."""

    # ---- from headers

    def assign(self, layout: ModelLayout, taken: Mapping[str, Scheme]) -> dict[str, Scheme]:
        """Claims its linears, in the smallest candidate of each; `settle` says what they get. Raises UserError."""
        self._refuse_dropped(layout)
        self._linears = choose(layout, taken, self.params.targets, self.params.ignore, "choose schemes for")
        if head := next((linear.name for linear in self._linears if linear.kind == "head"), None):
            raise UserError(f"autoScheme: {head} is the head, which no survey tries; quantise it by an rtn of its own before")
        refuse_split(list(layout.linears()), {linear.name for linear in self._linears}, taken)
        self._groups = groups_of(layout, self._linears, self.candidates, self.params.experts == "single")
        return self._schemes(filled(self._groups, 0))

    def settle(self, layout: ModelLayout, schemes: Mapping[str, Scheme]) -> Mapping[str, Scheme]:
        """What was chosen; before the survey, what there is room for. Raises UserError where the budget is too small."""
        mine = {linear.name for linear in self._linears}
        others = {name: scheme for name, scheme in schemes.items() if name not in mine}
        self._others = plan_output(layout, others).tensor_bytes - sum(stored_bytes(linear, None) for linear in self._linears)
        self._budget = self._room()
        variants = self._variants()
        possible = [v for v in variants if smallest(v) <= self._budget]
        if not possible:
            raise self._too_small(min(map(smallest, variants)))
        chosen = self._found["choice"] if self._found else filled(max(possible, key=largest), self._budget)
        assert weight_of(self._groups, chosen) <= self._budget, "chosen within another budget"
        return others | self._encoder.take(self._schemes(chosen))

    def _schemes(self, chosen: list[int]) -> dict[str, Scheme]:
        pairs = zip(self._groups, (self.candidates[c].scheme for c in chosen), strict=True)
        return {linear.name: scheme for group, scheme in pairs if scheme is not None for linear in group.linears}

    def _room(self) -> int:
        """Bytes of the targeted linears at most."""
        budget = self.params.budget
        if budget.bits is not None:
            return int(budget.bits * sum(group.weights for group in self._groups) / 8)
        assert budget.bytes is not None
        return int(parse(budget.bytes)) - self._others

    def _variants(self) -> list[list[SchemeGroup]]:
        """The groups, with what each may become: more than one where all experts are to become the same."""
        if self.params.experts != "model" or not any(group.routed for group in self._groups):
            return [self._groups]
        found = [within(self._groups, candidate) for candidate in shared_by_experts(self.candidates, self._groups)]
        if not found:
            raise UserError(
                "autoScheme: no candidate fits the experts of every layer, and they are to have the same in all; add one that does, or set "
                "experts: layer"
            )
        return found

    def _too_small(self, least: int) -> UserError:
        weights = sum(group.weights for group in self._groups)
        if (bits := self.params.budget.bits) is not None:
            return UserError(
                f"autoScheme: a budget of {bits:g} bits a weight, and the smallest candidates take {8 * least / weights:.4f} with their "
                "scales; raise budget.bits, or add a smaller candidate"
            )
        return UserError(
            f"autoScheme: a budget of {self.params.budget.bytes} ({self._budget + self._others:,} bytes), and with the smallest candidates "
            f"the result takes {least + self._others:,}, {self._others:,} of them outside of the targeted linears; raise budget.bytes, add "
            "a smaller candidate, or widen targets"
        )

    def _refuse_dropped(self, layout: ModelLayout) -> None:
        """A group of all experts of a layer may have lost some: those that are left are like them."""
        single = self.params.experts == "single"
        what = "blocks" if any(unit.dropped for unit in layout.units) else ""
        if single and any(stage.dropped for unit in layout.units for stage in unit.stages):
            what = "experts"
        if what:
            raise UserError(
                f"autoScheme: a survey of the source decides, and an earlier pass takes {what} out of it; publish what the earlier passes "
                "make, and choose schemes in a job of its own"
            )

    def outlook(self) -> dict[str, Any]:
        """Bytes of the whole result."""
        variants = self._variants()
        most = min(self._budget, max(map(largest, variants)))
        return {
            "budgetBytes": self._budget + self._others,
            "mostBytes": most + self._others,
            "smallestBytes": min(map(smallest, variants)) + self._others,
            "largestBytes": max(map(largest, variants)) + self._others,
            "candidates": list(self.params.candidates),
        }

    # ---- the survey

    def surveyor(self, source: ModelLayout) -> Surveyor:
        from kompressor_worker.passes.scheme_costs import SchemeCosts

        layers, nearest = len(block_numbers(source)), self._nearest()
        return SchemeCosts(layers, self._groups, self.candidates, nearest, self.params.algorithm, self._decided)

    def _nearest(self) -> list[int]:
        """By group, the candidate that weighs most nearly as much as its share of the budget, and loses something."""
        share, found = self._budget / sum(group.weights for group in self._groups), []
        for group in self._groups:
            possible = {c: size for c, size in enumerate(group.nbytes) if size is not None}
            lossy = {c: size for c, size in possible.items() if self.candidates[c].scheme is not None} or possible
            found.append(min(lossy, key=lambda c: (abs(math.log(lossy[c] / (share * group.weights))), c)))
        return found

    def survey_rows(self, layers: int) -> float:
        """Each group of a block tried; and rows that go on to the end, from the middle on average."""
        return float(RIDING * GROUPS * (1 + min(RIDDEN, layers) / 2))

    def _decided(self, costs: list[dict[int, float]]) -> tuple[list[int], list[tuple[int, float]]]:
        """The choice, and what choices for other budgets would weigh and cost."""
        variants = self._variants()
        return best(costs, variants, self._budget), sweep(costs, self._groups, variants)

    def decide(self, found: Mapping[str, torch.Tensor]) -> None:
        self._found = {name: tensor.tolist() for name, tensor in found.items()}

    # ---- the stream

    def apply(self, stage: Stage) -> None:
        self._encoder.apply(stage)

    def described(self) -> dict[str, Any]:
        """What was chosen and why, by group; sizes are those of the whole result."""
        chosen, costs = self._found["choice"], self._found["costs"]
        groups = [
            {
                "name": group.name,
                "linears": len(group.linears),
                "scheme": self.candidates[c].name,
                "bytes": group.nbytes[c],
                "bits": _digits(8 * (group.nbytes[c] or 0) / group.weights),
                "costs": {x.name: _digits(v) for x, v, n in zip(self.candidates, cost, group.nbytes, strict=True) if n is not None},
            }
            for group, c, cost in zip(self._groups, chosen, costs, strict=True)
        ]
        measured = [{c: v for c, v in enumerate(cost) if v == v} for cost in costs]
        return {
            **self.outlook(),
            "bytes": weight_of(self._groups, chosen) + self._others,
            "predictedKl": _digits(total(measured, chosen)),
            "sweep": [[int(size) + self._others, _digits(cost)] for size, cost in self._found["sweep"]],
            "groups": groups,
        }


def encoder(algorithm: str, scheme: str) -> gptq.Gptq | rtn.Rtn:
    """The pass of this name with its defaults; which schemes it makes it is told by `take`."""
    if algorithm == "gptq":
        return gptq.Gptq(gptq.GptqParams.model_validate({"scheme": scheme}))
    return rtn.Rtn(rtn.RtnParams.model_validate({"scheme": scheme}))


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
