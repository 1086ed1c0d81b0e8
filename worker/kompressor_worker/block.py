"""What a pass works on: the materialised tensors of one stage, and what has become of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kompressor_worker.layout import LinearLayout, StageLayout
from kompressor_worker.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from kompressor_worker.statistics import Statistics


@dataclass(frozen=True)
class Encoded:
    """A quantised linear, as the file will hold it."""

    tensors: dict[str, torch.Tensor]
    """Full tensor name (`<linear>.weight_packed` ...) to contiguous CPU tensor."""
    squared_error: float
    """Sum over all elements of (dequantised - original)^2, fp64."""
    squared_norm: float
    """Sum over all elements of original^2, fp64."""
    saturated: int = 0
    """Elements that met the end of the grid though a finer value existed; 0 where the scheme cannot clip."""


@dataclass(frozen=True)
class Pruned:
    """A linear with weights set to zero, before any quantisation."""

    zeros: int
    squared_error: float
    """Sum over all elements of (pruned - original)^2, fp64."""
    squared_norm: float
    """Sum over all elements of original^2, fp64."""


@dataclass(frozen=True)
class Fold:
    """Where the inverse of an input scale goes, so that the function stays the same: the norm before, or the rows of the linear before."""

    tensor: str
    """Full name of the norm's weight [columns], or of the producing linear's weight [rows, ...]; that one's bias is scaled with it."""
    offset: float = 0.0
    """What the model adds to the norm's stored weight: 1 for Gemma, whose stored w means 1 + w."""
    rows: tuple[int, ...] | None = None
    """None: a norm. Else, for each input column, the producer's row that makes it. Columns with the same row (a KV channel shared by its
    query heads) must get the same scale."""


@dataclass
class Site:
    """An input that one or more linears share, and what was measured of it."""

    name: str
    linears: tuple[LinearLayout, ...]
    """Those that may be quantised; none for a router."""
    readers: tuple[str, ...]
    """Full names of all weights whose columns are this input: `linears`, and for the norm before a mixture its router and every expert."""
    statistics: Statistics
    fold: Fold | None = None
    children: tuple[Site, ...] = ()
    """Sites with rows of this same input (the tokens routed to one expert): a scale on this one is a scale on them."""
    beside: tuple[LinearLayout, ...] = ()
    """Linears of another step that read this input too (a shared expert's); also where their own site is no child."""
    same_as: str = ""
    """Name of the site with this very input that has the fold: a scale on that one is a scale on this."""


@dataclass
class KvStatistics:
    """Of the keys (after norm and rotary) and values that the cache would hold in one layer."""

    largest: torch.Tensor
    """fp32 [KV heads]: largest magnitude."""
    histogram: torch.Tensor | None = None
    """int64 [KV heads, 65536]: counts of bf16 bit patterns (statistics.bf16_histogram)."""


@dataclass
class Reduction:
    """A linear whose input columns are to become fewer, and whoever makes these columns."""

    step: str
    """o, down, experts_out or shared_down."""
    site: Site
    """Its one linear is the one that reads; its statistics hold the Hessian."""
    producers: tuple[LinearLayout, ...]
    """Linears whose rows make the columns: q, k and v, or gate and up; or all of them in one weight, in this order."""
    weights: dict[str, torch.Tensor]
    """Of the whole block, by full name; the pass puts smaller ones in place of those that it changes."""
    head_size: int
    kv_heads: int
    heard: Callable[[], None]
    notes: dict[str, Any] = field(default_factory=dict)
    """What is to be said of it in the report, by linear."""
    kept: torch.Tensor | None = None
    """int64, ascending: the columns that stay; None: all."""
    cross: torch.Tensor | None = None
    """fp32 [out, columns]: sum over positions of y^T x, y what the linear is wanted to say to the input x: what the original says to its
    own, in the basis of what comes out. Only for passes that correct (`Pass.corrects`)."""
    wanted_square: float = 0.0
    """Sum of y^2."""


@dataclass
class Stage:
    layout: StageLayout
    weights: dict[str, torch.Tensor]
    """Decoded source tensors by full name; with calibration those of a part of the block and its norms, and of the whole block where a pass
    folds scales (`Pass.folds`). A pass that encodes a linear leaves its weight here; the stream drops it afterwards."""
    schemes: dict[str, Scheme] = field(default_factory=dict)
    """Linear name to scheme, decided from headers before the stream began."""
    encoded: dict[str, Encoded] = field(default_factory=dict)
    """Linear name to its encoding."""
    pruned: dict[str, Pruned] = field(default_factory=dict)
    """By linear name: what passes that prune have done to it."""
    sites: tuple[Site, ...] = ()
    """The inputs of this stage's linears with their statistics; empty without calibration."""
    kv: dict[str, KvStatistics] = field(default_factory=dict)
    """"k" and "v", in the stage of the attention's output projection."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What passes want said of this stage in the report, by pass name."""
    heard: Callable[[], None] = lambda: None
    """Passes call it between two pieces of long work; it raises Terminated when it is time to stop."""

    def statistics_of(self, linear: str) -> Statistics:
        """Of this linear's input; by full module name."""
        return next(site.statistics for site in self.sites if any(x.name == linear for x in site.linears))
