"""SparseGPT's loop, and zeros that GPTQ's keeps: against their references and the paper's algorithm in fp64."""

from __future__ import annotations

from ctypes import CDLL
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import layer, of_range

from kompressor_worker import grid, kernels
from kompressor_worker.block import Site, Stage
from kompressor_worker.kernels import build, column_loop, compiled, pruning
from kompressor_worker.layout import LinearLayout, ModelLayout, StageLayout, UnitLayout
from kompressor_worker.passes import build_passes
from kompressor_worker.passes.hessian import Factor
from kompressor_worker.schemes import SCHEMES, Scheme
from kompressor_worker.sparsity import Sparsity
from kompressor_worker.statistics import Statistics

SPARSITIES = [Sparsity(0.5), Sparsity(0.95), *map(Sparsity.of_pattern, ("2:4", "4:8", "1:3", "11:13"))]


def textbook(weight: torch.Tensor, factor: torch.Tensor, goes: torch.Tensor) -> torch.Tensor:
    """What is left in fp64 of the weights that stay, by the paper's update without blocks, once it is known which go."""
    work, u = weight.double(), factor.double()
    for j in range(work.shape[1]):
        error = torch.where(goes[:, j], work[:, j] / u[j, j], 0.0)
        work[:, j + 1 :] -= error[:, None] * u[j, j + 1 :]
    return work.masked_fill(goes, 0.0)


@pytest.mark.parametrize("sparsity", SPARSITIES, ids=str)
@pytest.mark.parametrize("shape", [(1, 312), (50, 312), (131, 624)])
def test_what_is_left_is_the_papers(sparsity: Sparsity, shape: tuple[int, int]) -> None:
    weight, factor, _ = layer(*shape, seed=sum(shape))
    kept, loss = kernels.prune(weight, factor, sparsity)
    goes = kept == 0
    assert int(goes.sum()) == sparsity.zeros(shape)
    if sparsity.of:
        assert (goes.view(shape[0], -1, sparsity.of).sum(-1) == sparsity.of - sparsity.keep).all()
    expected = textbook(weight, factor, goes)
    assert ((kept - expected).abs().max() / expected.abs().max()) < 1e-5
    # the loss is what the (dampened) squared output error has grown by
    hessian = torch.linalg.inv(factor.double().T @ factor.double())
    change = kept.double() - weight.double()
    assert loss == pytest.approx(float(((change @ hessian) * change).sum()), rel=1e-3)
    plain = weight.masked_fill(goes, 0.0).double() - weight.double()
    assert loss < float(((plain @ hessian) * plain).sum()) or shape[0] == 1


@pytest.mark.parametrize("params", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_what_no_activation_reaches_goes_first(params: dict[str, Any]) -> None:
    """A quarter of the columns: their weights cost nothing, however large, so fewer of the others have to go."""
    weight, _, x = layer(50, 64, 5)
    live = torch.arange(64) % 4 != 1
    x, weight = (x * live).float(), torch.where(live, weight, 100 * weight)
    linear = LinearLayout("m", (50, 64), "F32")
    stage = Stage(StageLayout("m", (), (linear,)), {"m.weight": weight.clone()})
    (sparse_gpt,) = build_passes([{"sparseGPT": params}])
    sparse_gpt.prepare(ModelLayout({}, "F32", None, (UnitLayout("m", (stage.layout,)),), (), ""))
    measured = Statistics(64, {"hessian"})
    measured.add(x)
    assert measured.hessian is not None
    stage.sites = (Site("s", (linear,), (), measured),)
    sparse_gpt.apply(stage)
    kept = stage.weights["m.weight"]
    assert (kept[:, ~live] == 0).all() and int((kept == 0).sum()) == 50 * 32
    factor = Factor.of(measured.hessian[live][:, live], 0.01, False, "s").inverse
    alone = textbook(weight[:, live], factor, kept[:, live] == 0)
    torch.testing.assert_close(kept[:, live].double(), alone, rtol=1e-3, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40), groups=st.integers(1, 9), pattern=st.sampled_from(["2:4", "4:8", "1:2", "3:32", "5:7", ""]),
    seed=st.integers(0, 2**31), ties=st.booleans(),
)  # fmt: skip
def test_compiled_equals_eager(rows: int, groups: int, pattern: str, seed: int, ties: bool) -> None:
    if (lib := build.library()) is None:
        pytest.skip("no C++ compiler on this machine")
    sparsity = Sparsity.of_pattern(pattern) if pattern else Sparsity(0.5)
    width = groups * (sparsity.of or 13)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    factor = torch.eye(width) + torch.randn(width, width, generator=generator).triu(1) * 0.05
    if ties:
        weight, factor = weight.round(), torch.eye(width)
    mask = None if pattern else (torch.rand(rows, width, generator=generator) < 0.5).to(torch.uint8)
    ours = compiled.prune_columns(lib, weight, factor, mask, sparsity.keep, sparsity.of)
    theirs = pruning.prune_columns(weight, factor, mask, sparsity.keep, sparsity.of)
    same = (ours[0] == 0) == (theirs[0] == 0)
    assert same.float().mean() > 0.999 or (not ties and (~same).sum() <= 2), "but for what the last bit of a sum decides"
    if bool(same.all()):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    scores=st.lists(st.integers(0, 3), min_size=24, max_size=24),
    count=st.integers(0, 24),
    pattern=st.sampled_from([(1, 2), (2, 4), (5, 8)]),
)
def test_so_many_go_whatever_is_equal(scores: list[int], count: int, pattern: tuple[int, int]) -> None:
    def smallest(values: torch.Tensor, count: int) -> list[int]:
        ranked = sorted(range(len(values)), key=lambda i: (float(values[i]), i))
        return sorted(ranked[:count])

    def chosen(mask: torch.Tensor) -> list[int]:
        return mask.nonzero().flatten().tolist()

    of_scores = torch.tensor(scores, dtype=torch.float32).view(3, 8)
    assert chosen(pruning.smallest_in_all(of_scores, count).flatten()) == smallest(of_scores.flatten(), count)
    for row, values in zip(pruning.smallest_in_rows(of_scores, count // 3), of_scores, strict=True):
        assert chosen(row) == smallest(values, count // 3)
    keep, of = pattern
    groups = pruning.smallest_in_groups(of_scores, keep, of).view(-1, of)
    for group, values in zip(groups, of_scores.view(-1, of), strict=True):
        assert chosen(group) == smallest(values, of - keep)


@pytest.mark.parametrize("scheme", [SCHEMES["W4A16"], SCHEMES["W4A16_ASYM"], SCHEMES["W8A8"], SCHEMES["FP8_DYNAMIC"]], ids=lambda s: s.name)
def test_zeros_stay_zero_through_gptq(lib: CDLL, scheme: Scheme) -> None:
    """Compiled and eager; and the others make good what the zeros cost: less than rounding what is left to nearest."""
    weight, factor, x = layer(70, 384, 3)
    pruned, _ = kernels.prune(weight, factor, Sparsity.of_pattern("2:4"))
    mask = pruned == 0
    found = of_range(pruned, scheme)
    codes, _ = kernels.gptq(pruned, factor, found, scheme, mask=mask)
    seen = grid.dequantize(codes, found, scheme)
    assert (seen[mask] == 0).all()
    free, _ = kernels.gptq(pruned, factor, found, scheme)
    assert (grid.dequantize(free, found, scheme)[mask] != 0).any() or scheme.bits == 4, "without the mask some would come back"
    tiles = torch.arange(384, dtype=torch.int32) // scheme.tile((70, 384))[1]
    steps = found.step.repeat_interleave(scheme.tile((70, 384))[0], 0)[:70]
    given_ones = pruned, factor, steps, found.zero_point, tiles, scheme.type == "float", scheme.bits, 128, mask.to(torch.uint8)
    assert (column_loop.gptq(*given_ones)[0].float() != codes.float()).float().mean() < 1e-2
    nearest = grid.dequantize(grid.quantize(pruned, found, scheme), found, scheme)

    def cost(made: torch.Tensor) -> float:
        return float((x @ (made.double() - pruned.double()).T).square().sum())

    assert cost(seen) < 0.95 * cost(nearest)


def test_zeros_stay_zero_where_the_groups_grids_are_made_on_the_way() -> None:
    weight, factor, _ = layer(33, 256, 4)
    mask = pruning.smallest_in_all(weight.abs(), 33 * 128)
    for scheme in (SCHEMES["W4A16"].with_group_size(64), SCHEMES["W4A16_ASYM"].with_group_size(64)):
        codes, found, _ = kernels.gptq_groups(weight.masked_fill(mask, 0.0), factor, scheme, torch.bfloat16, mask=mask)
        assert (grid.dequantize(codes, found, scheme)[mask] == 0).all()
