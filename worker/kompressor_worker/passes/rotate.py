"""QuaRot's rotations (Ashkboos et al. 2024, arXiv 2404.00456) that merge into the weights: outliers spread over all channels, nothing to do
at run time.

R1 turns the residual stream: embeddings and whatever is added to the stream are multiplied by it, whatever reads the stream by its inverse.
The norms in between must have no weights of their own, so those are folded into their readers first. R2 turns the values of every head, the
same for all of them: rows of v, columns of o. The function stays the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from kompressor_api.fields import Count
from kompressor_api.names import Reason
from kompressor_api.v1alpha1 import Model
from kompressor_worker.architectures import FAMILIES, Dimensions, family_of, text_config
from kompressor_worker.errors import UserError
from kompressor_worker.family import Family
from kompressor_worker.layout import DTYPE_BYTES, LinearLayout, ModelLayout, StageLayout, UnitLayout
from kompressor_worker.passes import Pass
from kompressor_worker.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from kompressor_worker.passes.rotation import Rotation


class RotateParams(Model):
    """Spreads outliers: rotates hidden states and values by Hadamard matrices merged into the weights. Before quantising."""

    seed: Count = Field(
        default=0, ge=0, le=2**31 - 1, description="Of the random signs, and of the random blocks where no Hadamard matrix fits."
    )


class Rotate(Pass):
    """The pass `rotate`."""

    Params: ClassVar[type[Model]] = RotateParams
    transforms = True

    def __init__(self, params: RotateParams) -> None:
        self.params = params
        self._merged: Merged | None = None

    def prepare(self, layout: ModelLayout) -> ModelLayout:
        """Unties tied embeddings: the final norm's weight goes into the head alone. Raises UserError for models that cannot be rotated."""
        family = rotatable(layout)
        kinds = {linear.kind: linear for linear in layout.linears()}
        if "head" not in kinds:
            if not layout.tied_embeddings:
                raise UserError(
                    "rotate: the model has no head that its final norm could be folded into; leave rotate out", Reason.UNSUPPORTED_MODEL
                )
            layout = untied(layout, kinds["embedding"])
        sizes = Dimensions(family, layout.config)
        heads, queries = text_config(layout.config).get("num_attention_heads"), sizes["q"]
        hidden = kinds["embedding"].shape[1]
        if not heads or not queries or not sizes["kv"]:
            raise UserError("rotate: config.json does not say num_attention_heads; add it", Reason.UNSUPPORTED_MODEL)
        for linear in layout.linears():
            if linear.pruned is not None:
                raise UserError(f"rotate: {linear.name} is pruned by an earlier pass, and a rotation fills its zeros; put rotate first")
        self._merged = Merged(family, hidden, queries // heads, self.params.seed)
        return replace(layout, rotated=True)

    def assign(self, layout: ModelLayout, taken: Mapping[str, Scheme]) -> dict[str, Scheme]:
        """Nothing. Raises UserError after a pass that quantises: rotation comes before everything else."""
        if taken:
            raise UserError(f"rotate: {next(iter(taken))} is quantised by an earlier pass; put rotate first")
        return {}

    def transform(self, layout: UnitLayout, weights: dict[str, torch.Tensor]) -> None:
        """A decoder block, or the final norm."""
        assert self._merged is not None, "prepare comes first"
        if any(linear.kind == "linear" for stage in layout.stages for linear in stage.linears):
            self._merged.block(f"{layout.name}.", weights)
            return
        for name in [tensor.name for stage in layout.stages for tensor in stage.tensors if tensor.name.endswith("norm.weight")]:
            if name in weights:
                weights[name] = self._merged.silent(weights[name])

    def transform_rows(self, name: str, rows: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        assert self._merged is not None, "prepare comes first"
        return self._merged.stream.rows(rows) if norm is None else self._merged.read(rows, norm)

    def turn(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self._merged is not None, "prepare comes first"
        return self._merged.stream.rows(hidden)


class Merged:
    """The two rotations of one model, and how weights take them in."""

    def __init__(self, family: Family, hidden: int, head: int, seed: int) -> None:
        """`head`: channels of a head."""
        self.family, self.hidden, self.head, self.seed = family, hidden, head, seed
        self._rotations: tuple[Rotation, Rotation] | None = None

    @property
    def stream(self) -> Rotation:
        """R1 [hidden, hidden]"""
        return self._made()[0]

    @property
    def value(self) -> Rotation:
        """R2 [head, head]"""
        return self._made()[1]

    def _made(self) -> tuple[Rotation, Rotation]:
        if self._rotations is None:
            from kompressor_worker.passes.rotation import Rotation

            self._rotations = Rotation(self.hidden, self.seed), Rotation(self.head, self.seed)
        return self._rotations

    def read(self, weight: torch.Tensor, norm: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W diag(norm) R1 of W [out, hidden] behind a norm with this stored weight; in `dtype`, or W's."""
        return self.stream.rows(weight, norm.double() + self.family.norm_offset, dtype)

    def silent(self, norm: torch.Tensor) -> torch.Tensor:
        """The norm's stored weight once it is folded: the model multiplies by 1."""
        import torch

        return torch.full_like(norm, 1.0 - self.family.norm_offset)

    def block(self, prefix: str, weights: dict[str, torch.Tensor]) -> None:
        """Changes those of a block's weights that are there (full names, `prefix` before each); its norms always are."""
        inputs, outputs = self.family.attention
        producer, out = f"{prefix}{inputs.linears[-1].name}", f"{prefix}{outputs.linears[0].name}"
        dtypes = {name: weights[f"{name}.weight"].dtype for name in (producer, out) if f"{name}.weight" in weights}
        if dtypes:
            self._values(producer, out, weights)
        self._readers(f"{prefix}input_layernorm.weight", [f"{prefix}{x.name}" for x in inputs.linears], weights, dtypes)
        readers, writers = self._feed_forward(prefix, weights)
        self._readers(f"{prefix}post_attention_layernorm.weight", readers, weights, {})
        for name in (out, *writers):
            if f"{name}.weight" in weights:
                weights[f"{name}.weight"] = self.stream.columns(weights[f"{name}.weight"], dtypes.get(name))
            if (bias := weights.get(f"{name}.bias")) is not None:
                weights[f"{name}.bias"] = self.stream.rows(bias)

    def _feed_forward(self, prefix: str, weights: Mapping[str, torch.Tensor]) -> tuple[list[str], list[str]]:
        """Modules that read the norm before the feed-forward, and modules that write into the stream; dense, and in a mixture."""
        experts, pairs = self.family.experts, [self.family.feed_forward] if self.family.feed_forward else []
        readers: list[str] = []
        writers: list[str] = []
        if experts is not None:
            readers += [f"{prefix}{module}" for module in (experts.router, experts.shared_gate) if module]
            pairs += [experts.shared] if experts.shared else []
            form = re.compile(re.escape(f"{prefix}{experts.expert}.").replace(re.escape("{expert}"), r"(?:\w+\.)?\d+"))
            for place in dict.fromkeys(found[0] for name in weights if (found := form.match(name))):
                first, last = experts.groups
                readers += [f"{place}{x.name}" for x in first.linears]
                writers += [f"{place}{x.name}" for x in last.linears]
        for first, last in pairs:
            readers += [f"{prefix}{x.name}" for x in first.linears]
            writers += [f"{prefix}{x.name}" for x in last.linears]
        return readers, writers

    def _readers(self, norm: str, modules: list[str], weights: dict[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
        for module in (m for m in modules if f"{m}.weight" in weights):
            weights[f"{module}.weight"] = self.read(weights[f"{module}.weight"], weights[norm], dtypes.get(module))
        weights[norm] = self.silent(weights[norm])

    def _values(self, producer: str, reader: str, weights: dict[str, torch.Tensor]) -> None:
        """Rows and bias of v, in fused weights the last ones, and columns of o: head by head. Leaves both weights in fp64, since R1 has yet
        to come and they are to be rounded once."""
        weight, out = weights[f"{producer}.weight"].double(), weights[f"{reader}.weight"].double()
        fused = len(self.family.attention[0].linears) == 1  # q, k and v: q has as many rows as o columns, k as many as v
        values = (len(weight) - out.shape[1]) // 2 if fused else len(weight)
        by_head = weight[-values:].T.reshape(-1, self.head)
        weight[-values:] = self.value.rows(by_head).view(-1, values).T
        weights[f"{producer}.weight"] = weight
        if (bias := weights.get(f"{producer}.bias")) is not None:
            turned = self.value.rows(bias[-values:].view(-1, self.head)).view(-1)
            weights[f"{producer}.bias"] = self._with_last(bias, turned)
        weights[f"{reader}.weight"] = self.value.rows(out.view(-1, self.head)).view(out.shape)

    def _with_last(self, whole: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        changed = whole.clone()
        changed[-len(last) :] = last
        return changed


def rotatable(layout: ModelLayout) -> Family:
    """The family of a model whose residual stream can be rotated. Raises UserError that says why it cannot."""
    family = FAMILIES.get(layout.family or "")
    model_type = text_config(layout.config).get("model_type")
    fitting = ", ".join(name for name, f in FAMILIES.items() if _rotates(f))
    if family is None:
        reason = "is not a known family, so it is not known what reads the residual stream"
    elif family.post_norms:
        reason = "has norms behind attention and feed-forward, whose weights cannot be folded"
    elif family.latent:
        reason = "has norms on the latents that its heads are made of, between which no rotation merges"
    elif not _rotates(family):
        reason = "stores its experts stacked"
    elif text_config(layout.config) is not layout.config:
        reason = "also sees or hears, and what it sees enters the residual stream unrotated"
    elif layout.family != family_of(layout.source_config):
        reason = "has other tensor names behind hybridAttention, which a rotation does not know: rotate it in a job of its own before"
    else:
        return family
    raise UserError(f"rotate: model_type {model_type!r} {reason}; leave rotate out (it works for {fitting})", Reason.UNSUPPORTED_MODEL)


def _rotates(family: Family) -> bool:
    return not family.post_norms and not family.latent and not (family.experts is not None and family.experts.stacked)


def untied(layout: ModelLayout, embedding: LinearLayout) -> ModelLayout:
    """The layout with a head of its own, made of the embeddings' stored tensors."""
    source = next(t for stage in layout.stages() for t in stage.tensors if t.name == embedding.weight)
    head = replace(source, name="lm_head.weight")
    stage = StageLayout("lm_head", (head,), (LinearLayout("lm_head", embedding.shape, embedding.dtype, "head"),))
    units = tuple(replace(u, stages=(*u.stages, stage)) if u.name == "head" else u for u in layout.units)
    size = prod(head.result_shape) * DTYPE_BYTES[head.dtype]
    warning = f"rotate: the head was tied to the embeddings and is now a tensor of its own, {size} bytes more"
    return replace(
        layout,
        units=units,
        config={**layout.config, "tie_word_embeddings": False},
        tied_embeddings=False,
        warnings=(*layout.warnings, warning),
    )
