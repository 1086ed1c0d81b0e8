"""The parameters of `autoScheme`: a budget, and what linears may become. No torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, StringConstraints, field_validator, model_validator

from kompressor_api.fields import Count, Number
from kompressor_api.pod import Quantity
from kompressor_api.v1alpha1 import Model
from kompressor_worker.passes import gptq, rtn
from kompressor_worker.passes.linear_params import TargetParams
from kompressor_worker.passes.scheme_choice import Candidate
from kompressor_worker.passes.scheme_plans import PLANS
from kompressor_worker.schemes import Scheme

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
    samples: Count = Field(
        default=16,
        ge=0,
        le=4096,
        description=(
            f"Calibration rows on which a second survey tries at most {PLANS} whole plans within the budget; the best stays. 0: none; what "
            "costs of single groups say."
        ),
    )
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
