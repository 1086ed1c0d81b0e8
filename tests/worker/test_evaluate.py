"""The comparison of two models' logits, slice by slice, against a plain fp64 log_softmax of all of them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kompressor_worker import evaluate
from kompressor_worker.errors import BadNumerics
from kompressor_worker.evaluate import BlockError, LogitComparison, bootstrap_ratio, scored


def plain(h: Tensor, head: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """fp64 logits [T, V]."""
    z = h.double() @ head.double().T + (0 if bias is None else bias.double())
    z = z * scale
    return z if softcap is None else torch.tanh(z / softcap) * softcap


def cut(size: int, parts: list[int]) -> list[slice]:
    edges = sorted({0, size, *(p % size for p in parts)})
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    tokens=st.integers(1, 40),
    vocabulary=st.integers(2, 150),
    parts=st.lists(st.integers(0, 1000), max_size=4),
    size=st.sampled_from([0.1, 3.0, 60.0]),
    noise=st.sampled_from([0.0, 0.05, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    options=st.sampled_from([{}, {"softcap": 30.0}, {"scale": 0.25}, {"softcap": 5.0, "scale": 3.0}]),
    with_bias=st.booleans(),
    same_head=st.booleans(),
)
def test_equals_plain_fp64(
    seed: int, tokens: int, vocabulary: int, parts: list[int], size: float, noise: float, dtype: torch.dtype,
    options: dict[str, Any], with_bias: bool, same_head: bool,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    hidden = 24
    h = (torch.randn(tokens, hidden) * size).to(dtype)
    c = (h.float() + noise * size * torch.randn(tokens, hidden)).to(dtype)
    head = (torch.randn(vocabulary, hidden) / hidden**0.5).to(dtype)
    other = head if same_head else (head.float() * 1.02 + 0.01).to(dtype)
    bias = torch.randn(vocabulary).to(dtype) if with_bias else None
    targets, rows = torch.randint(vocabulary, (tokens,)), torch.randint(3, (tokens,))

    comparison = LogitComparison(targets, rows, vocabulary, scratch_bytes=16 << 10, **options)
    assert comparison._tile(hidden)[0] < 40, "tiles are to be smaller than the whole"
    for s in reversed(cut(vocabulary, parts)):
        for t in cut(tokens, parts):
            comparison.add(
                h[t], c[t], head[s], None if same_head else other[s],
                offset=s.start, start=t.start, bias=None if bias is None else bias[s], compressed_bias=None if bias is None else bias[s],
            )  # fmt: skip
    found = comparison.result()

    arguments = bias, options.get("scale", 1.0), options.get("softcap")
    p = plain(h, head, *arguments).log_softmax(dim=1)
    q = plain(c, other, *arguments).log_softmax(dim=1)
    kl = (p.exp() * (p - q)).sum(dim=1)
    picked = torch.arange(tokens), targets
    largest = max(1.0, float(plain(h, head, *arguments).abs().max()), float(plain(c, other, *arguments).abs().max()))
    near = 4e-6 * largest
    for row, count in zip(sorted(set(rows.tolist())), range(len(found.tokens)), strict=True):
        mine = rows == row
        assert found.tokens[count] == mine.sum()
        assert math.isclose(found.kl[count], kl[mine].mean(), abs_tol=near)
        assert math.isclose(found.loss_before[count], -p[picked][mine].mean(), abs_tol=near)
        assert math.isclose(found.loss_after[count], -q[picked][mine].mean(), abs_tol=near)
    clear = (p.topk(2).values.diff().abs().min(dim=1).values > near) & (q.topk(2).values.diff().abs().min(dim=1).values > near)
    if clear.all():
        assert math.isclose(found.summary()["topOneAgreement"], float((p.argmax(1) == q.argmax(1)).double().mean()), abs_tol=1e-6)
    if noise == 0 and same_head:
        assert (found.kl == 0).all() and found.summary()["perplexityIncrease"] == 0


def small(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    h, head = torch.randn(50, 16).to(dtype), torch.randn(64, 16).to(dtype)
    return h, (h.float() + 0.1 * torch.randn(50, 16)).to(dtype), head, torch.randint(64, (50,))


def test_goes_on_from_a_saved_state_with_the_same_bits() -> None:
    h, c, head, targets = small()
    rows = torch.arange(50) // 10
    whole = LogitComparison(targets, rows, 64)
    for low in range(0, 64, 16):
        whole.add(h, c, head[low : low + 16], offset=low)
    first, second = LogitComparison(targets, rows, 64), LogitComparison(targets, rows, 64)
    for low in (0, 16):
        first.add(h, c, head[low : low + 16], offset=low)
    second.load({k: v.clone() for k, v in first.state().items()})
    for low in (32, 48):
        second.add(h, c, head[low : low + 16], offset=low)
    assert all(torch.equal(v, second.state()[k]) for k, v in whole.state().items())
    assert whole.result().summary() == second.result().summary()


@pytest.mark.parametrize("given", [[0, 32, 32], [0]])
def test_a_missing_or_doubled_slice_is_noticed(given: list[int]) -> None:
    h, c, head, targets = small()
    comparison = LogitComparison(targets, torch.zeros(50, dtype=torch.int64), 64)
    for low in given:
        comparison.add(h, c, head[low : low + 32], offset=low)
    with pytest.raises(AssertionError, match="of 64 rows"):
        comparison.result()


def test_logits_that_are_not_finite_end_the_job() -> None:
    h, c, head, targets = small()
    c[17, 3] = math.nan
    comparison = LogitComparison(targets, torch.arange(50) // 10, 64)
    comparison.add(h, c, head, offset=0)
    with pytest.raises(BadNumerics, match=r"row 1: logits of the compressed model .* 1 of 50"):
        comparison.result()


def test_every_token_but_a_rows_first_is_scored_by_the_state_before_it() -> None:
    tokens = torch.tensor([[5, 6, 7, 8], [1, 2, 0, 0], [9, 0, 0, 0]])
    found = scored(tokens, torch.tensor([4, 2, 1]))
    assert found.keep.tolist() == [[True, True, True, False], [True, False, False, False], [False] * 4]
    assert found.targets.tolist() == [6, 7, 8, 2]
    assert found.rows.tolist() == [0, 0, 0, 1]
    assert scored(tokens).targets.tolist() == [6, 7, 8, 2, 0, 0, 0, 0, 0]


def test_totals_weigh_tokens_not_rows() -> None:
    rows = torch.tensor([0, 0, 0, 2])
    loss = torch.tensor([1.0, 1.0, 1.0, 5.0])
    found = evaluate.Evaluation.of(rows, loss, loss, loss + math.log(1.5), torch.tensor([True, True, False, False])).summary()
    assert found == {
        "rows": 2, "tokens": 4, "kl": 2.0, "perplexityBefore": round(math.exp(2), 5), "perplexityAfter": round(1.5 * math.exp(2), 4),
        "perplexityIncrease": 0.5, "topOneAgreement": 0.5,
    }  # fmt: skip


def test_bootstrap_is_paired() -> None:
    """Rows differ a hundredfold, the ratio of each hardly: only drawing the same rows for both sees how sure it is."""
    torch.manual_seed(0)
    b = torch.exp(2 * torch.randn(64))
    a = b * (0.9 + 0.01 * torch.randn(64))
    ratio, low, high = bootstrap_ratio(a, b, draws=2000, seed=1)
    assert low < ratio < high and low > 0.88 and high < 0.92
    assert bootstrap_ratio(a, b, 2000, 1) == (ratio, low, high)
    assert bootstrap_ratio(a, b.flip(0), 2000, 1)[2] > 1.1


def test_block_error_is_that_of_all_rows_together() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2000, 8).bfloat16()
    y = (x.float() * 1.03 + 0.01).bfloat16()
    error = BlockError()
    for row, other in zip(x, y, strict=True):
        error.add(row, other)
    plainly = float((y.double() - x.double()).norm() / x.double().norm())
    assert math.isclose(error.value, plainly, rel_tol=1e-5)
