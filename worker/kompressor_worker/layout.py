"""What a checkpoint is made of, known from config.json and safetensors headers alone: no weight read, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from kompressor_worker.schemes import Scheme
from kompressor_worker.sparsity import Sparsity

if TYPE_CHECKING:
    from kompressor_worker.formats.gguf_tokenizer import TokenizerMetadata

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""safetensors dtype names and bytes an element."""

Encoding = Literal["plain", "fp8_block", "mxfp4", "quantized", "bitmask", "made"]
Kind = Literal["linear", "router", "embedding", "head"]
FileFormat = Literal["compressed-tensors", "gguf"]
KvStrategy = Literal["tensor", "head"]
"""Keys, and values, of a layer that share a scale in the cache: all of them, or those of a KV head."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a source file: absolute byte range [start, stop) in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class SourceTensor:
    """One tensor as the model sees it, decoded from one or more stored tensors.

    plain: stored = (tensor,).
    fp8_block: stored = (weight F8_E4M3 [out, in], weight_scale_inv [ceil(out/r), ceil(in/c)]), decoded to `dtype`.
    mxfp4 (gpt-oss): stored = (blocks U8 [E, rows, groups, 16], scales U8 [E, rows, groups]), decoded and transposed
    to [E, cols, rows].
    quantized, bitmask: one of our own results, in which a linear is stored as `scheme` (`formats.compressed_tensors`), or by the values
    that are left of it (`formats.bitmask`).
    made: stored = (); a pass puts it into the output, the source has none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: tuple[StoredTensor, ...]
    encoding: Encoding = "plain"
    block: tuple[int, int] = (128, 128)
    """Rows and columns that share a scale, for fp8_block."""
    scheme: Scheme | None = None
    """For quantized."""
    reduced: tuple[int, ...] | None = None
    """The shape that passes which take rows or columns away leave; None: `shape`."""

    @property
    def result_shape(self) -> tuple[int, ...]:
        return self.shape if self.reduced is None else self.reduced

    @property
    def source_bytes(self) -> int:
        return sum(t.nbytes for t in self.stored)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class LinearLayout:
    """A 2-D weight [out, in] that a pass may quantise."""

    name: str
    """Module name, such as model.layers.0.self_attn.q_proj; its weight is `name + ".weight"`."""
    shape: tuple[int, int]
    dtype: str
    kind: Kind = "linear"
    fused: str | None = None
    """Linears with the same key are one matrix in a loader (q/k/v; gate/up; an MoE layer's experts): same scheme."""
    shared: str | None = None
    """Linears with the same key share their NVFP4 global scale: q/k/v; gate/up, per expert."""
    absorbed: bool = False
    """Whether a loader learns the weight by running an identity through the linear, and multiplies it into another."""
    pruned: Sparsity | None = None
    """What a pass sets to zero in it; a pass that quantises it afterwards keeps these zeros."""
    bitmask: int | None = None
    """Values that are stored of it, beside a bitmask that says where they stand (`formats.bitmask`); None: all."""

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"


@dataclass(frozen=True)
class StageLayout:
    """Tensors that are loaded, compressed and written together: q/k/v; o; gate/up; down; one expert; plain ones. Experts may stand in any
    order."""

    name: str
    tensors: tuple[SourceTensor, ...]
    linears: tuple[LinearLayout, ...] = ()
    expert: int | None = None
    """For a routed expert: its number in the source's routing, the row of the router that leads to it."""
    dropped: bool = False
    """An expert that the result does not have; the original's activations flow through it all the same, and passes see it in
    `transform`."""

    @property
    def source_bytes(self) -> int:
        return sum(t.source_bytes for t in self.tensors)


@dataclass(frozen=True)
class UnitLayout:
    """What the journal commits at once: embeddings, a decoder block, final norm and head."""

    name: str
    stages: tuple[StageLayout, ...]
    dropped: bool = False
    """A block that the result does not have; the original's activations flow through it all the same."""
    stored: bool = False
    """Whether it stands for the block as the source has it (`as_stored`)."""

    @property
    def source_bytes(self) -> int:
        return sum(s.source_bytes for s in self.stages)

    def as_stored(self) -> UnitLayout:
        """With the linears' shapes of the source, under the names of the result; experts that are dropped are among them."""
        return replace(self.with_stored_shapes(), stored=True)

    def with_stored_shapes(self) -> UnitLayout:
        """The same without the experts that are dropped: with the result's routing."""
        return self.with_shapes({t.name: t.shape for stage in self.stages for t in stage.tensors})

    def with_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> UnitLayout:
        """With linears of other shapes, by the full names of their weights; those that are not named keep theirs."""

        def shaped(x: LinearLayout) -> LinearLayout:
            rows, columns = shapes.get(x.weight, x.shape)
            return replace(x, shape=(rows, columns))

        return replace(self, stages=tuple(replace(s, linears=tuple(map(shaped, s.linears))) for s in self.stages))


@dataclass(frozen=True)
class ModelLayout:
    config: Mapping[str, Any]
    """config.json as passes leave it."""
    dtype: str
    """What weights are stored or decoded in: BF16, F16 or F32."""
    family: str | None
    """Key of architectures.FAMILIES, or None: unknown decoder, laid out by tensor shape."""
    units: tuple[UnitLayout, ...]
    other_files: tuple[str, ...]
    """Files that are carried over as they are: tokenizer, generation config, licence ..."""
    source_digest: str
    """sha256: and hex digits, over names, sizes and ETags of all files that are read, config.json and the headers."""
    tied_embeddings: bool = False
    warnings: tuple[str, ...] = field(default=())
    file_sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes of all files of the source, by name."""
    kv_cache: KvStrategy | None = None
    """How the scales of an FP8 KV cache are shared; None: the cache is left as it is."""
    rotated: bool = False
    """Whether a pass has turned the residual stream."""
    windowed: bool = False
    """Whether a pass has given layers a sliding window."""
    source_config: Mapping[str, Any] = field(default_factory=dict)
    """config.json of the source."""
    file_format: FileFormat = "compressed-tensors"
    """Of the result; passes take schemes of it alone."""
    tokenizer: TokenizerMetadata | None = None
    """What a GGUF file says of it."""

    def stages(self) -> Iterator[StageLayout]:
        """Of the result: without those of blocks and experts that are dropped."""
        for unit in self.units:
            yield from () if unit.dropped else (stage for stage in unit.stages if not stage.dropped)

    def linears(self) -> Iterator[LinearLayout]:
        for stage in self.stages():
            yield from stage.linears

    @property
    def source_bytes(self) -> int:
        return sum(u.source_bytes for u in self.units)
