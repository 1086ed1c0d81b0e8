"""Adaptive bits: the schemes that lose least for what the model may weigh, by measured sensitivity.

A survey of the source measures what each candidate costs each group of linears that loaders hold as one (`scheme_costs`); an integer
program chooses (`scheme_choice`); a second survey runs whole plans, the program's and others within the budget (`scheme_plans`), of which
the one of least KL stays (`plan_trials`); GPTQ or rounding to nearest encodes, as the passes of these names do. Why so:
docs/decisions/0031-adaptive-bits.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from kompressor_api.quantity import parse
from kompressor_api.v1alpha1 import Model
from kompressor_worker.dropping import block_numbers
from kompressor_worker.errors import UserError
from kompressor_worker.passes import Pass, gptq, rtn
from kompressor_worker.passes.asked_scheme import ends_of
from kompressor_worker.passes.linear_params import fitted, scheme_named
from kompressor_worker.passes.result_bytes import stored_bytes, tensor_bytes
from kompressor_worker.passes.scheme_choice import (
    Candidate,
    SchemeGroup,
    filled,
    groups_of,
    largest,
    shared_by_experts,
    smallest,
    sweep,
    total,
    weight_of,
    within,
)
from kompressor_worker.passes.scheme_params import AutoSchemeParams
from kompressor_worker.passes.scheme_plans import KINDS, PLANS, Plan, named, plans
from kompressor_worker.passes.selection import choose, held_as_one, refuse_split
from kompressor_worker.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from kompressor_worker.block import Stage
    from kompressor_worker.layout import LinearLayout, ModelLayout
    from kompressor_worker.passes.surveyor import Surveyor

RIDDEN = 16
"""Blocks at most of which an error is followed to the logits, evenly spread."""
CLEAR = 0.95
"""One of the next best plans stands in only where its KL is below this share of the others': the rows of a trial tell no less apart."""
THOROUGH = 8
"""Of these, at most, in which all candidates are encoded and tried."""
RIDING = 2
"""Calibration rows that a block is tried on and that go on to the logits, at least; as many more as share a batch with them."""
GROUPS = 4
"""Of linears in a dense block: q/k/v, o, gate/up, down."""
OVER = 1.05
"""A group is encoded in the largest candidate that weighs no more than this of its share of the budget: what larger ones cost can hardly be
told from how activations are rounded, and what the smaller ones cost is what a choice is about."""


class AutoScheme(Pass):
    """The pass `autoScheme`."""

    Params: ClassVar[type[Model]] = AutoSchemeParams
    surveys_whole_blocks = True
    once = True
    section = "autoScheme"

    def __init__(self, params: AutoSchemeParams) -> None:
        self.params = params
        self.surveys = 2 if params.samples else 1
        self.candidates = [Candidate.of(name) for name in params.candidates]
        self._encoder = encoder(params.algorithm, next(c.scheme.name for c in self.candidates if c.scheme is not None))
        self.statistics = self._encoder.statistics
        self.welcomes = self._encoder.welcomes
        self.products = self._encoder.products
        self.survey_hessians = "hessian" in self.statistics
        self._groups: list[SchemeGroup] = []
        self._layers: list[int] = []
        """Of the groups, counted from 0."""
        self._linears: list[LinearLayout] = []
        self._ends: dict[str, Scheme] = {}
        """Embeddings and head of a GGUF file, which no survey tries."""
        self._budget = 0
        """Bytes of the groups."""
        self._others = 0
        """Bytes of all else."""
        self._found: dict[str, list[Any]] = {}
        """`scheme_costs.SchemeCosts.found`, and `plan_trials.PlanTrials.found`, as lists."""

    # ---- from headers

    def assign(self, layout: ModelLayout, taken: Mapping[str, Scheme]) -> dict[str, Scheme]:
        """Claims its linears, in the smallest candidate of each; `settle` says what they get. Raises UserError."""
        self._refuse_dropped(layout)
        if layout.file_format == "gguf":
            self._for_gguf(layout, taken)
        self._linears = choose(layout, taken, self.params.targets, self.params.ignore, "choose schemes for")
        if head := next((linear.name for linear in self._linears if linear.kind == "head"), None):
            raise UserError(f"autoScheme: {head} is the head, which no survey tries; quantise it by an rtn of its own before")
        refuse_split(held_as_one(layout), {linear.name for linear in self._linears}, taken)
        self._groups = groups_of(layout, self._linears, self.candidates, self.params.experts == "single")
        blocks = [{x.name for stage in layout.units[number].stages for x in stage.linears} for number in block_numbers(layout)]
        self._layers = [next(i for i, names in enumerate(blocks) if group.linears[0].name in names) for group in self._groups]
        return self._schemes(filled(self._groups, 0)) | self._ends

    def _for_gguf(self, layout: ModelLayout, taken: Mapping[str, Scheme]) -> None:
        if self.params.experts == "single":
            raise UserError("autoScheme: experts: single, and a GGUF file has one type for all experts of a layer; choose layer")
        self.candidates = [
            x if x.scheme is None else replace(x, scheme=scheme_named(x.scheme.name, layout.file_format)) for x in self.candidates
        ]
        self._ends = ends_of(layout, taken, self.params.ignore)

    def settle(self, layout: ModelLayout, schemes: Mapping[str, Scheme]) -> Mapping[str, Scheme]:
        """What was chosen; before the survey, what there is room for. Raises UserError where the budget is too small."""
        mine = {linear.name for linear in self._linears}
        others = {name: scheme for name, scheme in schemes.items() if name not in mine}
        self._others = tensor_bytes(layout, others) - sum(stored_bytes(linear, None) for linear in self._linears)
        self._budget = self._room()
        variants = self._variants()
        possible = [v for v in variants if smallest(v) <= self._budget]
        if not possible:
            raise self._too_small(min(map(smallest, variants)))
        chosen = self._chosen() if self._found else filled(max(possible, key=largest), self._budget)
        assert weight_of(self._groups, chosen) <= self._budget, "chosen within another budget"
        return others | self._encoder.take(self._schemes(chosen) | self._ends)

    def _schemes(self, chosen: list[int]) -> dict[str, Scheme]:
        pairs = zip(self._groups, (self.candidates[c].scheme for c in chosen), strict=True)
        return {x.name: fitted(scheme, x.shape[1]) for group, scheme in pairs if scheme is not None for x in group.linears}

    def _chosen(self) -> list[int]:
        """Candidates by group: of the plans that were tried the one of least KL, of equals the first; else the program's."""
        chosen: list[int] = self._found["plans"][min(range(len(self._found.get("kl", [0.0]))), key=self._rank)]
        return chosen

    def _rank(self, plan: int) -> float:
        kl = self._found["kl"][plan] if "kl" in self._found else 0.0
        if kl != kl:  # not a number
            return math.inf
        return float(kl / CLEAR) if KINDS[self._found["kinds"][plan]] == "next best" else float(kl)

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
        if self._found:
            from kompressor_worker.passes.plan_trials import PlanTrials

            return PlanTrials(source, self._groups, self.candidates, self._found["plans"], self.params.algorithm, self.params.samples)
        from kompressor_worker.passes.scheme_costs import SchemeCosts

        return SchemeCosts(source, self._groups, self.candidates, self._nearest(), self.params.algorithm, self._decided)

    def _nearest(self) -> list[int]:
        """By group, the candidate that it is encoded in: the largest within its share of the budget that loses something, else the smallest
        that does."""
        share, found = self._budget / sum(group.weights for group in self._groups), []
        for group in self._groups:
            possible = {c: size for c, size in enumerate(group.nbytes) if size is not None}
            lossy = {c: size for c, size in possible.items() if self.candidates[c].scheme is not None} or possible
            within = {c: size for c, size in lossy.items() if size <= OVER * share * group.weights}
            found.append(max(within, key=lambda c: (within[c], -c)) if within else min(lossy, key=lambda c: (lossy[c], c)))
        return found

    def survey_rows(self, layers: int) -> float:
        """Each group of a block tried, in some in all candidates; rows that go on to the end, from the middle on average; and those of
        whole plans, all the way."""
        tried = 1 + min(RIDDEN, layers) / 2 + len(self.candidates) * min(THOROUGH, layers) / max(1, layers)
        return float(RIDING * GROUPS * tried + PLANS * self.params.samples)

    def survey_held(self, layers: int) -> int:
        """In fp32, and those of the source beside them."""
        return 2 * max(RIDING * (1 + GROUPS * min(RIDDEN, layers)), (1 + PLANS) * self.params.samples)

    def _decided(self, costs: list[dict[int, float]]) -> tuple[list[Plan], list[tuple[int, float]]]:
        """Plans, the program's first, and what choices for other budgets would weigh and cost."""
        variants = self._variants()
        return plans(costs, variants, self._layers, self._budget), sweep(costs, self._groups, variants)

    def decide(self, found: Mapping[str, torch.Tensor]) -> None:
        self._found = {**self._found, **{name: tensor.tolist() for name, tensor in found.items()}}

    # ---- the stream

    def apply(self, stage: Stage) -> None:
        self._encoder.apply(stage)

    def described(self) -> dict[str, Any]:
        """What was chosen and why, by group; sizes are those of the whole result."""
        chosen, costs = self._chosen(), self._found["costs"]
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
            "plans": self._tried(measured),
            "sweep": [[int(size) + self._others, _digits(cost)] for size, cost in self._found["sweep"]],
            "groups": groups,
        }

    def _tried(self, costs: list[dict[int, float]]) -> list[dict[str, Any]]:
        """Whole plans, and of those that were tried the KL on calibration rows."""
        found = []
        for number, (kind, chosen) in enumerate(zip(self._found["kinds"], self._found["plans"], strict=True)):
            plan = Plan(KINDS[kind], tuple(chosen))
            said = {
                "name": named(plan, self._groups, self._layers, self.candidates),
                "bytes": weight_of(self._groups, chosen) + self._others,
                "predictedKl": _digits(total(costs, chosen)),
            }
            found.append(said | ({"kl": _digits(self._found["kl"][number])} if "kl" in self._found else {}))
        return found


def encoder(algorithm: str, scheme: str) -> gptq.Gptq | rtn.Rtn:
    """The pass of this name with its defaults; which schemes it makes it is told by `take`."""
    scheme = scheme.removesuffix("_GGUF")
    if algorithm == "gptq":
        return gptq.Gptq(gptq.GptqParams.model_validate({"scheme": scheme}))
    return rtn.Rtn(rtn.RtnParams.model_validate({"scheme": scheme}))


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
