"""From headers to ModelLayout: every tensor of the source finds its unit and its stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kompressor_worker.architectures import FAMILIES, Dimensions, family_of, text_config
from kompressor_worker.by_shape import arrange_by_shape
from kompressor_worker.checkpoint import Checkpoint, read_checkpoint
from kompressor_worker.encodings import decoded_dtype, source_tensors
from kompressor_worker.errors import CorruptSource
from kompressor_worker.family import Experts, Family, Group
from kompressor_worker.layout import Kind, LinearLayout, ModelLayout, SourceTensor, StageLayout, UnitLayout
from kompressor_worker.stacked import unstacked
from kompressor_worker.stages import linear_layout, other_units, plain_stages
from kompressor_worker.storage import Source

__all__ = ["Arrangement", "arranged", "read_layout"]

PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
"""Where the decoder is in a file: alone; in a model that also sees, by old and new names; saved without a head."""
REMEDY = "upload config.json and all shards of one version"


def read_layout(source: Source) -> ModelLayout:
    """The layout of the checkpoint at `source`, from its listing, config.json, index and headers.

    Raises UserError (not a checkpoint that can be compressed: pickles, GGUF, already quantised), CorruptSource (broken:
    truncated, missing or overlapping tensors, shapes that contradict config.json), and what storage raises.
    """
    checkpoint = read_checkpoint(source)
    return arranged(checkpoint, source_tensors(checkpoint.config, checkpoint.tensors))


def arranged(checkpoint: Checkpoint, tensors: Mapping[str, SourceTensor]) -> ModelLayout:
    """The layout of a checkpoint whose tensors are known as the model sees them. Raises UserError, CorruptSource."""
    config = checkpoint.config
    name = family_of(config)
    warnings = list(checkpoint.warnings)
    if name is not None:
        tied = tied_embeddings(config, FAMILIES[name].defaults)
        tensors = unstacked(FAMILIES[name], Dimensions(FAMILIES[name], config), tensors)
        units = Arrangement(FAMILIES[name], config, tensors, tied, warnings).units()
    else:
        units = arrange_by_shape(config, tensors, warnings)
        headless = not any(x.kind == "head" for unit in units for stage in unit.stages for x in stage.linears)
        tied = tied_embeddings(config, {"tie_word_embeddings": headless})
    warnings += stacked_warning(units)
    placed = [tensor.name for unit in units for stage in unit.stages for tensor in stage.tensors]
    assert sorted(placed) == sorted(tensors), "every tensor is in exactly one stage"
    return ModelLayout(
        config=config,
        source_config=config,
        dtype=decoded_dtype(config, checkpoint.tensors),
        family=name,
        units=tuple(units),
        other_files=checkpoint.other_files,
        source_digest=checkpoint.digest,
        tied_embeddings=tied,
        warnings=tuple(warnings),
        file_sizes=dict(checkpoint.file_sizes),
    )


def stacked_warning(units: Sequence[UnitLayout]) -> list[str]:
    """Says so where much of the model is in stacked matrices (experts in one tensor), which no pass takes."""
    tensors = [tensor for unit in units for stage in unit.stages for tensor in stage.tensors]
    stacked = [tensor for tensor in tensors if len(tensor.shape) == 3]
    share = sum(t.nbytes for t in stacked) / max(1, sum(t.nbytes for t in tensors))
    if share < 0.1:
        return []
    more = f" and {len(stacked) - 1} more" if len(stacked) > 1 else ""
    return [f"{stacked[0].name}{more}, stacked matrices with {share:.0%} of all weights, stay exact"]


def tied_embeddings(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding: what config.json says, outermost first, else the default."""
    for place in (config, text_config(config), defaults):
        if "tie_word_embeddings" in place:
            return bool(place["tie_word_embeddings"])
    return False


class Arrangement:
    """The units of a known family: takes tensors out of `left` by its data, refuses what is missing or misshapen."""

    def __init__(
        self,
        family: Family,
        config: Mapping[str, Any],
        tensors: Mapping[str, SourceTensor],
        tied: bool,
        warnings: list[str],
    ) -> None:
        self.family = family
        self.config = config
        self.text = text_config(config)
        self.sizes = Dimensions(family, config)
        self.left = dict(tensors)
        self.tied = tied
        self.warnings = warnings
        self.prefix = next((p for p in PREFIXES if any(n.startswith(f"{p}layers.") for n in tensors)), PREFIXES[0])
        self.names: dict[int, list[str]] = {}
        for name in tensors:
            number, dot, _ = name.removeprefix(f"{self.prefix}layers.").partition(".")
            if dot and number.isdecimal():
                self.names.setdefault(int(number), []).append(name)

    def units(self) -> list[UnitLayout]:
        """Raises CorruptSource, UserError."""
        blocks = [self.block(layer) for layer in range(self.layers())]
        embedding = self.matrix(f"{self.prefix}embed_tokens", "vocab", "hidden", "embedding")
        head = self.head()
        extra = [n for n in self.left if n.startswith(f"{self.prefix}layers.")]
        if extra:
            self.warnings.append(f"{extra[0]} and {len(extra) - 1} more are beyond num_hidden_layers {len(blocks)}; kept as they are")
        return [UnitLayout("embeddings", (embedding,)), *blocks, head, *other_units(self.left.values())]

    def layers(self) -> int:
        layers = self.sizes["layers"]
        if layers is None:
            raise CorruptSource(f"config.json: num_hidden_layers {self.text.get('num_hidden_layers')!r}; {REMEDY}")
        return layers

    def block(self, layer: int) -> UnitLayout:
        name = f"{self.prefix}layers.{layer}"
        present = self.names.get(layer)
        if present is None:
            raise CorruptSource(f"{name}: no tensor of it, though config.json says num_hidden_layers {self.layers()}; {REMEDY}")
        stages = [self.group(name, group) for group in self.family.attention_of(self.text)]
        if self.family.experts is not None and self.family.sparse(self.text, layer):
            stages += self.experts(name, self.family.experts)
        else:
            stages += [self.group(name, group) for group in self.family.feed_forward]
        rest = [self.left.pop(n) for n in present if n in self.left]
        self.refuse_strays(name, rest)
        return UnitLayout(name, (*plain_stages(f"{name}.norms", rest), *stages))

    def group(self, block: str, group: Group) -> StageLayout:
        key = f"{block}.{group.name}" if len(group.linears) > 1 and group.fused else None
        tensors, linears = self.linears(f"{block}.", group, fused=key, shared=key)
        return StageLayout(f"{block}.{group.name}", tuple(tensors), tuple(linears))

    def linears(self, prefix: str, group: Group, fused: str | None, shared: str | None) -> tuple[list[SourceTensor], list[LinearLayout]]:
        tensors: list[SourceTensor] = []
        linears: list[LinearLayout] = []
        for linear in group.linears:
            weight = self.take(f"{prefix}{linear.name}.weight", linear.rows, linear.columns)
            tensors += [weight, *self.take_bias(f"{prefix}{linear.name}.bias")]
            linears.append(replace(linear_layout(weight, "linear", fused, shared), absorbed=linear.absorbed))
        return tensors, linears

    def experts(self, block: str, experts: Experts) -> list[StageLayout]:
        """The router, the shared expert, then expert by expert, or the stacked parameters one by one."""
        router = self.matrix(f"{block}.{experts.router}", "experts", "hidden", "router")
        if experts.correction:
            router = replace(router, tensors=(*router.tensors, self.take(f"{block}.{experts.correction}", "experts")))
        stages = [router]
        stages += self.shared(block, experts)
        for parameter, shape in experts.stacked:
            name = f"{block}.{parameter}"
            stages.append(StageLayout(name, (self.take(name, *shape), *self.take_bias(f"{name}_bias"))))
        if experts.groups:
            number = stages[0].linears[0].shape[0]
            stages += [self.expert(block, experts, expert) for expert in range(number)]
        return stages

    def shared(self, block: str, experts: Experts) -> list[StageLayout]:
        """Of the expert that all tokens go to; its gate, which stays exact, comes with what reads the same input."""
        if self.sizes["shared_ffn"] is None:
            return []
        stages = [self.group(block, group) for group in experts.shared]
        if stages and experts.shared_gate:
            gate = self.take(f"{block}.{experts.shared_gate}.weight", "one", "hidden")
            stages[0] = replace(stages[0], tensors=(*stages[0].tensors, gate))
        return stages

    def expert(self, block: str, experts: Experts, expert: int) -> StageLayout:
        name = f"{block}.{experts.expert.format(expert=expert)}"
        fused = f"{block}.{experts.expert.format(expert='').rstrip('.')}"
        tensors: list[SourceTensor] = []
        linears: list[LinearLayout] = []
        for group in experts.groups:
            shared = f"{name}.{group.name}" if len(group.linears) > 1 else None
            held, found = self.linears(f"{name}.", group, fused, shared)
            tensors += held
            linears += found
        return StageLayout(name, tuple(tensors), tuple(linears), expert)

    def refuse_strays(self, block: str, rest: list[SourceTensor]) -> None:
        """Experts that no router row leads to would be left as they are, unseen."""
        experts = self.family.experts
        place = f"{block}.{experts.expert.format(expert='')}" if experts and experts.groups else None
        if place and (over := next((t.name for t in rest if t.name.startswith(place)), None)):
            raise CorruptSource(f"{over}: the router has no row for this expert; {REMEDY}")

    def head(self) -> UnitLayout:
        norms = [self.left.pop(n) for n in list(self.left) if n.startswith(f"{self.prefix}norm.")]
        if not norms:
            raise CorruptSource(f"{self.prefix}norm.weight is missing; {REMEDY}")
        stages = plain_stages(f"{self.prefix}norm", norms)
        inside = f"{self.prefix.removesuffix('model.')}lm_head"
        name = inside if f"{inside}.weight" in self.left else "lm_head"
        architectures = self.config.get("architectures")
        generates = not isinstance(architectures, list) or any(
            str(a).endswith(("ForCausalLM", "ForConditionalGeneration")) for a in architectures
        )
        if f"{name}.weight" in self.left or (generates and not self.tied):
            stages.append(self.matrix(name, "vocab", "hidden", "head"))
        return UnitLayout("head", tuple(stages))

    def matrix(self, name: str, rows: str, columns: str, kind: Kind) -> StageLayout:
        weight = self.take(f"{name}.weight", rows, columns)
        return StageLayout(name, (weight, *self.take_bias(f"{name}.bias")), (linear_layout(weight, kind),))

    def take(self, name: str, *shape: str) -> SourceTensor:
        """The tensor, no longer among those left, its shape checked against config.json where that says something."""
        tensor = self.left.pop(name, None)
        if tensor is None:
            raise CorruptSource(f"{name} is missing, which {self.text.get('model_type')} has; {REMEDY}")
        expected = [self.sizes[size] for size in shape]
        if len(tensor.shape) != len(shape) or any(e not in (None, s) for e, s in zip(expected, tensor.shape, strict=True)):
            wanted = ", ".join(f"{what}={size or '?'}" for what, size in zip(shape, expected, strict=True))
            raise CorruptSource(f"{name}: shape {list(tensor.shape)}, but config.json says [{wanted}]; {REMEDY}")
        return tensor

    def take_bias(self, name: str) -> list[SourceTensor]:
        bias = self.left.pop(name, None)
        return [] if bias is None else [bias]
