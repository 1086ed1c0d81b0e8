"""Scales for a KV cache in FP8: half the memory a token, so twice the context or twice the batch.

A runtime stores keys (after their norm and rotary embedding) and values as E4M3 codes of x / scale, one scale a layer for each of the
two, or one a KV head, and multiplies back when it reads. The scale maps the largest magnitude that calibration saw to 448, the largest
code; what is larger saturates. Names, shapes and dtype are those that compressed-tensors' hooks, transformers and vLLM read: `k_scale` and
`v_scale` of the attention module, [1] or [KV heads, 1, 1].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from kompressor_api.names import Reason
from kompressor_api.v1alpha1 import Model
from kompressor_worker.architectures import FAMILIES, text_config
from kompressor_worker.errors import BadNumerics, UserError
from kompressor_worker.layout import LinearLayout, ModelLayout, SourceTensor, StageLayout
from kompressor_worker.passes import Pass
from kompressor_worker.schemes import SCHEMES

if TYPE_CHECKING:
    import torch

    from kompressor_worker.block import KvStatistics, Stage

KINDS = ("k", "v")


class KvCacheParams(Model):
    """Calibrated scales for a KV cache in FP8 (E4M3); the weights are left to other passes."""

    scheme: Literal["FP8"] = Field(default="FP8", description="What keys and values are stored as: FP8 (E4M3).")
    strategy: Literal["tensor", "head"] = Field(
        default="tensor",
        description="What shares a scale: tensor (a layer's keys, and its values), or head (those of each KV head).",
    )


class KvCache(Pass):
    """The pass `kvCache`."""

    Params: ClassVar[type[Model]] = KvCacheParams
    kv = True

    def __init__(self, params: KvCacheParams) -> None:
        self.params = params

    def prepare(self, layout: ModelLayout) -> ModelLayout:
        """Adds each layer's two scales to the stage of its output projection. Raises UserError."""
        refuse(layout)
        units = []
        for unit in layout.units:
            stages = tuple(self._with_scales(stage, layout) for stage in unit.stages)
            units.append(replace(unit, stages=stages))
        return replace(layout, units=tuple(units), kv_cache=self.params.strategy)

    def apply(self, stage: Stage) -> None:
        """Puts the scales into `stage.weights`, at the stage that has `kv`. Raises BadNumerics."""
        from kompressor_worker.tensors import DTYPES

        for output in output_projections(stage.layout):
            for kind in KINDS:
                name = scale_name(output, kind)
                scale = scale_of(stage.kv[kind], self.params.strategy, DTYPES[output.dtype])
                if not bool(scale.isfinite().all()):
                    raise BadNumerics(f"{name}: the {kind}s of this layer overflow; look for corrupted weights in it or before it")
                stage.weights[name] = scale

    def _with_scales(self, stage: StageLayout, layout: ModelLayout) -> StageLayout:
        there = {t.name for t in stage.tensors}
        added = []
        for output in output_projections(stage):
            shape = (1,) if self.params.strategy == "tensor" else (kv_heads(output, layout), 1, 1)
            # in fp32: two of bf16 would leave what comes after them in the file, W4A16's int64 shapes, unaligned
            added += [SourceTensor(scale_name(output, kind), "F32", shape, (), "made") for kind in KINDS]
        if twice := [t.name for t in added if t.name in there]:
            raise UserError(f"{twice[0]}: the layer has this scale already; use kvCache once")
        return replace(stage, tensors=(*stage.tensors, *added))


def refuse(layout: ModelLayout) -> None:
    """Raises UserError for models whose cache has no keys and values as these scales mean them."""
    config = text_config(layout.config)
    family = FAMILIES.get(layout.family or "")
    if config.get("kv_lora_rank") or (family is not None and family.latent):
        raise UserError(
            f"kvCache: the model (kv_lora_rank {config.get('kv_lora_rank')!r}) caches latent vectors, not keys and values, and has no "
            "k_scale and v_scale; leave kvCache out",
            Reason.UNSUPPORTED_MODEL,
        )
    if layout.family is None:
        raise UserError(
            f"kvCache: model_type {config.get('model_type')!r} is not known (known: {', '.join(FAMILIES)}), so neither is which module "
            "has the scales; leave kvCache out",
            Reason.UNSUPPORTED_MODEL,
        )
    names = {t.name for stage in layout.stages() for t in stage.tensors if t.encoding != "made"}
    if theirs := next((name for name in names if name.endswith(tuple(f".{kind}_scale" for kind in KINDS))), None):
        raise UserError(f"{theirs}: the checkpoint brings scales of its own; start from one without, or leave kvCache out")


def output_projections(stage: StageLayout) -> Iterator[LinearLayout]:
    """The attention's output projection, in the one stage of a block that has it."""
    return (x for x in stage.linears if x.name.endswith(".self_attn.o_proj"))


def scale_name(output: LinearLayout, kind: str) -> str:
    return f"{output.name.rpartition('.')[0]}.{kind}_scale"


def kv_heads(output: LinearLayout, layout: ModelLayout) -> int:
    """How many KV heads the layer of this output projection [hidden, heads * head size] has, by what its weights are."""
    module = output.name.rpartition(".")[0]
    linears = {x.name: x for x in layout.linears()}
    heads = text_config(layout.config).get("num_attention_heads") or FAMILIES[layout.family or ""].defaults.get("num_attention_heads")
    if type(heads) is not int or heads < 1 or output.shape[1] % heads:
        raise UserError(f"config.json: num_attention_heads {heads!r} does not fit {output.weight} {list(output.shape)}; correct it")
    size = output.shape[1] // heads
    if (key := linears.get(f"{module}.k_proj")) is not None:
        return key.shape[0] // size
    return (linears[f"{module}.qkv_proj"].shape[0] // size - heads) // 2


def scale_of(seen: KvStatistics, strategy: Literal["tensor", "head"], dtype: torch.dtype) -> torch.Tensor:
    """[1] or [KV heads, 1, 1], fp32 on the CPU: largest magnitude / 448, rounded to `dtype`, in which loaders may hold it; never 0."""
    from kompressor_worker import grid

    largest = seen.largest.cpu()
    largest = largest.amax().reshape(1) if strategy == "tensor" else largest.reshape(-1, 1, 1)
    return grid.grid_of_range(-largest, largest, SCHEMES["FP8"], dtype).scale
