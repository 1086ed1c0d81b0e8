"""Fewer attention heads: whole groups of query heads go with the keys and values that they share, the same number in all blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator

from kompressor_api.fields import Count, Number
from kompressor_api.names import Reason
from kompressor_api.v1alpha1 import Model
from kompressor_worker.architectures import text_config
from kompressor_worker.errors import UserError
from kompressor_worker.layout import ModelLayout
from kompressor_worker.passes.structured import RATIO, CorrectedParams, StructuredPass, count_kept
from kompressor_worker.resizing import family_to_resize, head_size, refuse_latent, resized

if TYPE_CHECKING:
    from kompressor_worker.block import Reduction


class PruneHeadsParams(CorrectedParams):
    """Takes attention heads away, those that the calibration data misses least: KV heads with all query heads that share them."""

    ratio: Number | None = RATIO
    kv_heads: Count | None = Field(default=None, ge=1, description="KV heads that stay in every block. Either this or ratio.")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.ratio is None) == (self.kv_heads is None):
            raise ValueError("give either ratio, such as 0.25, or kvHeads, the KV heads that stay")
        return self


class PruneHeads(StructuredPass):
    """The pass `pruneHeads`."""

    Params: ClassVar[type[Model]] = PruneHeadsParams
    reduces = frozenset({"o"})
    name = "pruneHeads"
    sizes = ("num_attention_heads",)

    def __init__(self, params: PruneHeadsParams) -> None:
        self.params = params
        self._kept = 0

    def prepare(self, layout: ModelLayout) -> ModelLayout:
        """Fewer rows of q, k and v, fewer columns of o; `head_dim` is written out, for it follows from the others no longer. Raises
        UserError."""
        self.refuse_late(layout)
        family = family_to_resize(layout, self.name)
        refuse_latent(layout, family, self.name)
        if family.whole_norms:
            raise UserError(
                f"{self.name}: a {text_config(layout.config)['model_type']} has norms over all heads together, which change "
                f"with those that go; leave {self.name} out",
                Reason.UNSUPPORTED_MODEL,
            )
        config = {**family.defaults, **text_config(layout.config)}
        size, heads = head_size(layout, family, self.name), int(config["num_attention_heads"])
        groups = config.get("num_key_value_heads") or heads
        if type(groups) is not int or heads % groups:
            raise UserError(f"{self.name}: config.json says num_key_value_heads {groups!r} for {heads} heads; correct it")
        self._kept = count_kept(self.name, "num_key_value_heads", groups, self.params.ratio, self.params.kv_heads)
        changes = {"num_attention_heads": heads // groups * self._kept, "num_key_value_heads": self._kept, "head_dim": size}
        return resized(layout, changes)

    def reduce(self, reduction: Reduction) -> None:
        """Raises BadNumerics."""
        import torch

        from kompressor_worker.passes.reduction import keep_rows, remove

        size, groups, columns = reduction.head_size, reduction.kv_heads, reduction.site.statistics.columns
        channels = columns // groups  # of all the query heads that share a KV head
        queries = remove(reduction, self.name, channels, self._kept, self.params.correction == "leastSquares")
        kept = queries.view(-1, channels)[:, :1] // channels
        keys = (kept * size + torch.arange(size, device=kept.device)).flatten()
        if len(reduction.producers) == 1:  # q, k and v in one weight, in this order
            keep_rows(reduction.weights, reduction.producers[0], [queries, columns + keys, columns + groups * size + keys])
            return
        for producer, rows in zip(reduction.producers, (queries, keys, keys), strict=True):
            keep_rows(reduction.weights, producer, [rows])
