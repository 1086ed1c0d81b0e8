"""Linears of the source encoded as the stream will encode them, in some candidate: for the surveys of `autoScheme`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kompressor_worker.block import Encoded, Site, Stage
from kompressor_worker.formats.stored import decode
from kompressor_worker.layout import LinearLayout, StageLayout
from kompressor_worker.passes.auto_scheme import encoder
from kompressor_worker.passes.linear_params import fitted
from kompressor_worker.passes.surveyor import SeenExpert
from kompressor_worker.schemes import Scheme
from kompressor_worker.statistics import Statistics

if TYPE_CHECKING:
    from kompressor_worker.statistics import Statistic


def encode(
    algorithm: str, linears: Sequence[LinearLayout], weights: Mapping[str, Tensor], scheme: Scheme, sites: Sequence[Site] = ()
) -> dict[str, Encoded]:
    """By linear. Raises BadNumerics."""
    shaped = [_shaped(x, weights) for x in linears]
    stage = Stage(StageLayout(shaped[0].name, (), tuple(shaped)), {x.weight: weights[x.weight] for x in shaped}, sites=tuple(sites))
    made = encoder(algorithm, scheme.name)
    made.take(stored_in(scheme, linears, weights))
    made.apply(stage)
    return stage.encoded


def stored_in(scheme: Scheme, linears: Sequence[LinearLayout], weights: Mapping[str, Tensor]) -> dict[str, Scheme]:
    """By linear. The source's columns may be more than the result's, and not divisible by what these are divided by."""
    if scheme.group_size is not None and scheme.choosable_groups:
        scheme = scheme.with_group_size(math.gcd(scheme.group_size, *(weights[x.weight].shape[1] for x in linears)))
    return {x.name: fitted(scheme, weights[x.weight].shape[1]) for x in linears}


def _shaped(linear: LinearLayout, weights: Mapping[str, Tensor]) -> LinearLayout:
    """As the source has it."""
    rows, columns = weights[linear.weight].shape
    return LinearLayout(linear.name, (rows, columns), linear.dtype, linear.kind, linear.fused, linear.shared)


def decoded(
    algorithm: str, linears: Sequence[LinearLayout], weights: Mapping[str, Tensor], scheme: Scheme, sites: Sequence[Site]
) -> dict[str, Tensor]:
    """By full name, what a reader makes of these weights. Raises BadNumerics."""
    made = encode(algorithm, linears, weights, scheme, sites)
    schemes = stored_in(scheme, linears, weights)
    return {f"{name}.weight": as_read(name, x.tensors, weights[f"{name}.weight"], schemes[name]) for name, x in made.items()}


def as_read(name: str, tensors: Mapping[str, Tensor], before: Tensor, scheme: Scheme) -> Tensor:
    """What a reader makes of the tensors of this linear, stored in this scheme; `before`: the weight as it was."""
    return decode(name, tensors, scheme, before.dtype).to(before.device)


def expert_sites(seen: SeenExpert, linears: Sequence[LinearLayout], statistics: Collection[Statistic]) -> list[Site]:
    """Inputs of an expert's linears (gate, up, down), measured on its tokens; on the sample where there are none."""
    if not statistics:
        return []
    inputs = torch.cat([part.inputs for part in seen.routed]) if seen.routed else seen.sample
    sites = []
    for members, x in ((tuple(linears[:-1]), inputs), ((linears[-1],), seen.products(inputs))):
        measured = Statistics(x.shape[1], frozenset(statistics))
        measured.add(x)
        sites.append(Site(members[0].name, members, (), measured))
    return sites
