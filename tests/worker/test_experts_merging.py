"""One expert of several: clusters, neurons matched, weights averaged, router rows joined; and what few tokens say of an expert."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kompressor_worker.layout import LinearLayout
from kompressor_worker.passes.expert_surveys import importance, keep, sketch
from kompressor_worker.passes.merging import Average, agglomerated, clusters, joined

WIDTH, HIDDEN = 24, 16


def linears(name: str, fused: bool = False) -> tuple[LinearLayout, ...]:
    rows = [("gate_up_proj", 2 * WIDTH)] if fused else [("gate_proj", WIDTH), ("up_proj", WIDTH)]
    before = (LinearLayout(f"{name}.{which}", (count, HIDDEN), "F32") for which, count in rows)
    return (*before, LinearLayout(f"{name}.down_proj", (HIDDEN, WIDTH), "F32"))


def expert(name: str, seed: int, fused: bool = False) -> dict[str, Tensor]:
    """With biases everywhere."""
    chance = torch.Generator().manual_seed(seed)
    found = {}
    for linear in linears(name, fused):
        found[linear.weight] = torch.randn(linear.shape, generator=chance)
        found[f"{linear.name}.bias"] = torch.randn(linear.shape[0], generator=chance)
    return found


def output(name: str, weights: dict[str, Tensor], x: Tensor, fused: bool = False) -> Tensor:
    def said(which: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.{which}.weight"], weights[f"{name}.{which}.bias"])

    gate, up = said("gate_up_proj", x).chunk(2, -1) if fused else (said("gate_proj", x), said("up_proj", x))
    return said("down_proj", F.silu(gate) * up)


def permuted(weights: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """The same function, its neurons in another order."""

    def turned(name: str, tensor: Tensor) -> Tensor:
        if "down_proj" in name:
            return tensor[:, order] if tensor.dim() == 2 else tensor
        return tensor.unflatten(0, (-1, WIDTH))[:, order].flatten(0, 1)

    return {name: turned(name, tensor) for name, tensor in weights.items()}


@pytest.mark.parametrize("fused", [False, True])
def test_the_same_neurons_in_another_order_are_one_expert(fused: bool) -> None:
    """Three copies with noise far below a neuron's size, each in its own order: their average is the one that all of them were."""
    original, x = expert("e", 0, fused), torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(9))
    average = Average()
    for seed in range(3):
        order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(seed)) if seed else torch.arange(WIDTH)
        noise = expert("e", 10 + seed, fused)
        copy = {name: t + 1e-3 * noise[name] for name, t in original.items()}
        average.add(linears("e", fused), permuted(copy, order), 5)
    made = average.result(linears("e", fused), original)
    assert made.keys() == original.keys() and all(made[name].shape == t.shape for name, t in original.items())
    torch.testing.assert_close(output("e", made, x, fused), output("e", original, x, fused), rtol=0, atol=0.5)
    assert not torch.allclose(output("e", original, x, fused), torch.zeros(()), atol=5)


def test_averaged_by_tokens() -> None:
    """Of two experts alike but for their size; and nobody's tokens mean equal shares."""
    one = {name: t for name, t in expert("e", 0).items() if name.endswith("weight")}
    for tokens, factor in (((3, 1), 1.5), ((0, 7), 3.0), ((0, 0), 2.0)):
        average = Average()
        for scale, count in zip((1.0, 3.0), tokens, strict=True):
            average.add(linears("e"), {name: scale * t for name, t in one.items()}, count)
        for name, tensor in average.result(linears("e"), one).items():
            torch.testing.assert_close(tensor, factor * one[name], rtol=1e-4, atol=1e-4)


def test_what_is_held_does_not_grow_with_the_members() -> None:
    average, held = Average(), []
    for seed in range(6):
        average.add(linears("e"), expert("e", seed), 1)
        kept = [t for value in vars(average).values() if isinstance(value, list) for t in value if t is not None]
        held.append(sum(t.untyped_storage().nbytes() for t in kept))
    assert len(set(held)) == 1 and held[0] < 3 * sum(t.nbytes for t in expert("e", 0).values())


def test_clusters_lose_least_when_their_mean_stands_for_them() -> None:
    """Against every way to make four clusters of six outputs, where they are plain to see; and as few as there are groups allow."""
    chance = torch.Generator().manual_seed(1)
    centres = 4 * torch.randn(3, 8, generator=chance)
    outputs = torch.stack([centres[n % 3] + 0.3 * torch.randn(8, generator=chance) for n in range(6)])
    tokens = torch.tensor([5.0, 1.0, 0.0, 2.0, 9.0, 4.0])
    found = clusters(outputs @ outputs.T, tokens, 3, 1)
    assert found == [[0, 3], [4, 1], [5, 2]], "by the most frequent member's number, that one first"

    def lost(parts: list[list[int]]) -> float:
        total = 0.0
        for members in parts:
            weight = tokens[members][:, None] + 1
            total += float((weight * (outputs[members] - (weight * outputs[members]).sum(0) / weight.sum()).square()).sum())
        return total

    ways = [[[n for n in range(6) if w[n] == c] for c in range(3)] for w in itertools.product(range(3), repeat=6) if len(set(w)) == 3]
    assert lost(found) == pytest.approx(min(map(lost, ways)))
    assert all({member // 3 for member in members} in ({0}, {1}) for members in clusters(outputs @ outputs.T, tokens, 4, 2))
    assert agglomerated(outputs @ outputs.T, tokens, 6) == [[n] for n in range(6)]


def test_router_rows_are_joined_by_tokens() -> None:
    rows = joined([[2, 0], [1]], torch.tensor([1.0, 0.0, 3.0]))
    assert rows.tolist() == [[0.25, 0.0, 0.75], [0.0, 1.0, 0.0]]


def test_few_tokens_neither_save_nor_doom_an_expert() -> None:
    tokens = torch.tensor([100.0, 100.0, 2.0, 2.0, 0.0])
    contributed = tokens * torch.tensor([1.0, 3.0, 40.0, 0.01, 9.0])
    plain, shrunk = importance(tokens, contributed, 0), importance(tokens, contributed, 20)
    assert plain.tolist() == pytest.approx([1.0, 3.0, 40.0, 0.01, 0.0]) and shrunk[:2].tolist() == pytest.approx([1.0, 3.0])
    mean = (1 + 3 + 40 + 0.01) / 4
    assert shrunk[2:].tolist() == pytest.approx([(80 + 18 * mean) / 20, (0.02 + 18 * mean) / 20, 0.0])
    assert importance(tokens, None, 20).tolist() == pytest.approx((tokens / 204).tolist())
    assert keep(shrunk, tokens, 2, 1) == [2, 3] and keep(plain, tokens, 3, 1) == [0, 1, 2]
    assert keep(torch.tensor([1.0, 9.0, 8.0, 7.0]), torch.ones(4), 2, 2) == [1, 2], "one of each group"


def test_products_of_outputs_are_seen_through_projections() -> None:
    chance = torch.Generator().manual_seed(2)
    outputs = torch.randn(6, 256, 1024, generator=chance) + torch.randn(1, 256, 1024, generator=chance)
    seen, whole = (outputs @ sketch(1024)).flatten(1), outputs.flatten(1)
    torch.testing.assert_close(seen @ seen.T, whole @ whole.T, rtol=0.03, atol=0)
    assert torch.equal(sketch(96), torch.eye(96))
