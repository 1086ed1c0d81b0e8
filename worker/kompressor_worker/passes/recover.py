"""Recovery: a block's weights, or their rounding and scales, tuned until it says again what the original says.

After whatever the passes before have done to a block, gradients of its output's error on the calibration rows tune it as a whole, one block
in memory at a time: the rows come as the compressed blocks before have made them, the aim is the original's output of the same rows. What
is encoded keeps its format and has its rounding chosen anew, as AutoRound does (Cheng et al. 2023, arXiv 2309.05516); all else that is no
router learns as in any training, and zeros stay zeros. Where this happens in the stream: `segments`, `recovering`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from kompressor_api.fields import Count, Number
from kompressor_api.v1alpha1 import Model
from kompressor_worker.errors import UserError
from kompressor_worker.layout import ModelLayout
from kompressor_worker.passes import Pass
from kompressor_worker.schemes import Scheme


class RecoverParams(Model):
    """Tunes each block, as the passes before left it, until its output on the calibration data is the original's as far as it goes; several
    times in a list."""

    steps: Count = Field(default=200, ge=1, le=100_000, description="Updates of a block.")
    batch_rows: Count = Field(default=8, ge=1, le=4096, description="Calibration rows that an update goes by.")
    learning_rate: Number = Field(
        default=0.015,
        gt=0.0,
        le=1.0,
        description="How far the first updates move weights, as a share of their tensor's root mean square; falls to 0 in a line.",
    )
    rounding_rate: Number | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description=(
            "How far the first updates move a weight on its grid, in steps of it, and a step, as a share of it. Default: 2 / steps."
        ),
    )
    seed: Count = Field(default=0, ge=0, le=4_294_967_295, description="Which rows come together.")


class Recover(Pass):
    """The pass `recover`."""

    Params: ClassVar[type[Model]] = RecoverParams
    recovers = True
    corrects = True

    def __init__(self, params: RecoverParams) -> None:
        self.params = params

    @property
    def tuned_rows(self) -> int:  # type: ignore[override]
        return self.params.steps * self.params.batch_rows

    def assign(self, layout: ModelLayout, taken: Mapping[str, Scheme]) -> dict[str, Scheme]:
        """Nothing. Raises UserError where no pass before it has lost anything."""
        if not taken and layout.config == layout.source_config and not any(x.pruned for x in layout.linears()):
            raise UserError(
                "recover: no pass before it prunes or quantises, so there is nothing to recover; put it behind the one whose loss it is to "
                "make good"
            )
        return {}
