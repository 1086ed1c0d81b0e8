"""Algorithms: one file each, one line in REGISTRY.

A pass is configured by its `Params` (pydantic, camelCase, extra forbidden; the CRD is generated from it, so this module
and the pass modules import torch lazily). It first assigns schemes from headers alone, which is where every impossible
request is refused; then it is applied to each materialised stage.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ValidationError

from kompressor_api.datasets import CalibrationSpec, Sample
from kompressor_api.v1alpha1 import Model
from kompressor_worker.errors import UserError
from kompressor_worker.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from kompressor_worker.block import Reduction, Stage
    from kompressor_worker.layout import ModelLayout, UnitLayout
    from kompressor_worker.passes.surveyor import Surveyor
    from kompressor_worker.statistics import Statistic

REGISTRY: dict[str, str] = {
    "rtn": "kompressor_worker.passes.rtn:Rtn",
    "gptq": "kompressor_worker.passes.gptq:Gptq",
    "awq": "kompressor_worker.passes.awq:Awq",
    "smoothQuant": "kompressor_worker.passes.smooth_quant:SmoothQuant",
    "autoScheme": "kompressor_worker.passes.auto_scheme:AutoScheme",
    "kvCache": "kompressor_worker.passes.kv_cache:KvCache",
    "rotate": "kompressor_worker.passes.rotate:Rotate",
    "magnitude": "kompressor_worker.passes.magnitude:Magnitude",
    "wanda": "kompressor_worker.passes.wanda:Wanda",
    "sparseGPT": "kompressor_worker.passes.sparse_gpt:SparseGpt",
    "pruneHeads": "kompressor_worker.passes.prune_heads:PruneHeads",
    "pruneWidth": "kompressor_worker.passes.prune_width:PruneWidth",
    "pruneHidden": "kompressor_worker.passes.prune_hidden:PruneHidden",
    "pruneLayers": "kompressor_worker.passes.prune_layers:PruneLayers",
    "pruneExperts": "kompressor_worker.passes.prune_experts:PruneExperts",
    "mergeExperts": "kompressor_worker.passes.merge_experts:MergeExperts",
    "hybridAttention": "kompressor_worker.passes.hybrid_attention:HybridAttention",
    "distil": "kompressor_worker.passes.distil:Distil",
    "recover": "kompressor_worker.passes.recover:Recover",
}
"""Name in the spec to `module:class`, imported when asked for."""


class Pass:
    """One entry of `spec.passes`. First it speaks about headers (`prepare`, `assign`: every impossible request is refused there), then
    the stream brings it what it declares here."""

    Params: ClassVar[type[Model]]
    statistics: frozenset[Statistic] = frozenset()
    """What it wants measured of every input; none: no forward is run for it."""
    welcomes: frozenset[Statistic] = frozenset()
    """What it makes use of for a GGUF file where there is calibration data, and does without elsewhere."""
    kv: bool = False
    """Whether it wants keys and values measured; then it is applied after all others, to what the published weights make of them."""
    whole_block: bool = False
    """Whether it needs the statistics of all stages of a block before the first weight changes, since it folds scales across stages."""
    folds: bool = False
    """Whether it changes weights outside of the stage that it is applied to (a norm's, in front of it), so that all of a block stays in
    memory until its last stage is done; `whole_block` says as much."""
    transforms: bool = False
    """Whether it changes weights before anything is measured (`transform`, `transform_rows`)."""
    prunes: bool = False
    """Whether it sets weights to zero, which it has marked in the layout (`LinearLayout.pruned`)."""
    reduces: frozenset[str] = frozenset()
    """The steps (o, down, experts_out) whose input columns it takes away (`reduce`), before anything is measured for the other passes."""
    surveys: int = 0
    """How many times the calibration rows go through the whole source before it can decide what to do (`surveyor`, `decide`)."""
    survey_repeats: int = 0
    """How many times more its surveyor takes them through each block."""
    shortest_row: int = 0
    """Tokens that a calibration row must have for what it measures to be there."""
    surveys_whole_blocks: bool = False
    """Whether its surveyors want all weights of a block at once (`Surveyor.whole_block`): for estimates."""
    survey_hessians: bool = False
    """Whether a survey measures the Hessians of all inputs in a block, but for those of routed experts."""
    corrects: bool = False
    """Whether it wants calibration rows to go through the original too, beside those that go through what comes out (`Reduction.cross`)."""
    recovers: bool = False
    """Whether it tunes whole blocks as the passes before have left them (segments.py)."""
    tuned_rows: int = 0
    """How many rows it takes forward and backward through each block, in all: for estimates."""
    section: str = ""
    """Under which name the report has what it has decided (`described`); none: beside the shape, where that changes."""
    once: bool = False
    """Whether a job has at most one of it."""
    trains: bool = False
    """Whether its work comes behind the stream: the model that the passes before it have made is trained (`distilling`)."""
    products: float = 0.0
    """How many products of a weight [out, in] with its Hessian [in, in] encoding it takes: for estimates of time, and progress."""

    def __init__(self, params: Any) -> None: ...

    @property
    def measures(self) -> bool:
        """Whether it needs calibration data."""
        return bool(self.statistics or self.kv or self.reduces or self.surveys or self.recovers)

    @property
    def reads_calibration(self) -> bool:
        """Whether it reads the calibration's dataset without measuring anything on it."""
        return False

    def trained_on(self, calibration: CalibrationSpec | None) -> Sample | None:
        """What a pass that trains reads. Raises UserError where there is nothing."""
        return None

    def surveyor(self, source: ModelLayout) -> Surveyor:
        """Measures what the pass has to decide next; called once for each of its `surveys`."""
        raise NotImplementedError

    def survey_rows(self, layers: int) -> float:
        """How many rows beside the calibration's its surveys take through an average block of so many: for estimates."""
        return 0.0

    def survey_held(self, layers: int) -> int:
        """How many rows beside the calibration's a survey of it holds at once, at most."""
        return 0

    def decide(self, found: Mapping[str, torch.Tensor]) -> None:
        """Takes in what its surveyor has found, after each survey, and again on a restart."""

    def described(self) -> dict[str, Any]:
        """What the report says of what it has decided for the whole model."""
        return {}

    def prepare(self, layout: ModelLayout) -> ModelLayout:
        """The layout as this pass leaves it: tensors added or made smaller, the config changed. Raises UserError. Called twice where there
        is a survey: before it to refuse what is impossible and to plan sizes, and after it."""
        return layout

    def assign(self, layout: ModelLayout, taken: Mapping[str, Scheme]) -> dict[str, Scheme]:
        """Linear name to scheme for the linears that this pass quantises, those in `taken` (by earlier passes) left out. Headers only.
        Raises UserError."""
        return {}

    def settle(self, layout: ModelLayout, schemes: Mapping[str, Scheme]) -> Mapping[str, Scheme]:
        """Once every pass has assigned: the schemes of the whole model, where this one's depend on what the others do. `layout` is the
        result's. Raises UserError."""
        return schemes

    def outlook(self) -> dict[str, Any]:
        """What `plan` says of what only a survey can decide."""
        return {}

    def transform(self, layout: UnitLayout, weights: dict[str, torch.Tensor]) -> None:
        """Changes weights in place (full names), before anything is measured: those of a part of the block (parts.py), and with each part
        the block's norms, as stored or as the pass before has left them. Of experts that are dropped too."""

    def transform_rows(self, name: str, rows: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        """The same for a slice of rows of the embeddings or the head. `norm`: for the head, the final norm as this pass finds it."""
        return rows

    def turn(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [positions, hidden] of the original in the basis that this pass gives the residual stream."""
        return hidden

    def turn_output(self, linear: str, output: torch.Tensor) -> torch.Tensor:
        """The same of what a linear (its name in the result) adds to the stream, where the pass changes that."""
        return self.turn(output)

    def reduce(self, reduction: Reduction) -> None:
        """Takes input columns of one linear away, and the rows that make them. Raises BadNumerics."""

    def apply(self, stage: Stage) -> None:
        """Works on one stage: fills `stage.encoded` for the linears in `assign`'s answer, or changes `stage.weights` and with them the
        statistics. Raises BadNumerics."""


def pass_class(name: str) -> type[Pass]:
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known passes: {', '.join(REGISTRY)}"
        raise UserError(f"passes: {name!r} is not a pass; {hint}")
    module, _, attribute = REGISTRY[name].partition(":")
    cls: type[Pass] = getattr(import_module(module), attribute)
    return cls


def build_passes(entries: Sequence[Mapping[str, Any]], weighted: bool = False) -> list[Pass]:
    """The passes of a spec, in order; `weighted`: whether they get what they welcome. Raises UserError that names the entry, the key and
    its nearest neighbour."""
    passes: list[Pass] = []
    for i, entry in enumerate(entries):
        ((name, params),) = entry.items()
        cls = pass_class(name)
        try:
            passes.append(cls(cls.Params.model_validate(params)))
        except ValidationError as error:
            raise UserError(f"passes[{i}].{name}: {explain(error, cls.Params)}") from error
        if weighted:
            passes[-1].statistics |= passes[-1].welcomes
        if cls.once and (first := next((j for j, p in enumerate(passes[:-1]) if isinstance(p, cls)), None)) is not None:
            raise UserError(f"passes[{i}].{name}: there is one at passes[{first}] already, and a job has one at most; join them")
        if i and passes[-2].trains:
            raise UserError(
                f"passes[{i}].{name}: comes behind {next(iter(entries[i - 1]))}, whose training has to see what all others make of the "
                "model; put it last"
            )
    return passes


def explain(error: ValidationError, model: type[Model]) -> str:
    """A pydantic error in one line: every wrong key with its nearest neighbour, every wrong value with what was
    expected."""
    known = [f.alias or n for n, f in model.model_fields.items()]
    lines = []
    for e in error.errors():
        where = ".".join(str(p) for p in e["loc"])
        if e["type"] == "extra_forbidden":
            near = difflib.get_close_matches(where, known, n=1)
            lines.append(f"{where!r} is not a parameter; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"))
        else:
            place = f"{where}: " if where else ""  # of all parameters together, which say enough themselves
            value = f" (got {e['input']!r})" if where else ""
            lines.append(f"{place}{e['msg'].removeprefix('Value error, ')}{value}")
    return "; ".join(lines)
