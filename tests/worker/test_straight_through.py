"""Fake quantisation that gradients pass through: the bytes that come of it, its gradients, and those of whole blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_decoder import LENGTHS, layout_of, saved
from torch import Tensor

from kompressor_worker import grid, kernels
from kompressor_worker.batch import Batch
from kompressor_worker.decoder import Decoder
from kompressor_worker.decoder_block import Block
from kompressor_worker.formats.compressed_tensors import decode, named_tensors
from kompressor_worker.forward import Published
from kompressor_worker.layout import LinearLayout
from kompressor_worker.schemes import COMPRESSED_TENSORS, SCHEMES, Scheme
from kompressor_worker.straight_through import FakeQuantized, Learning, fake_kv

GIVEN: dict[str, dict[str, Tensor]] = {
    "int8_tensor": {"input_scale": torch.tensor([0.02]).bfloat16()},
    "int8_tensor_asym": {"input_scale": torch.tensor([0.02]).bfloat16(), "input_zero_point": torch.tensor([17], dtype=torch.int8)},
    "fp8_tensor": {"input_scale": torch.tensor([0.005]).bfloat16()},
    "fp4_local": {"input_global_scale": torch.tensor([1000.0])},
}


def scheme_named(name: str) -> Scheme:
    return SCHEMES[name].with_group_size(32) if SCHEMES[name].strategy == "group" and SCHEMES[name].choosable_groups else SCHEMES[name]


def rounded(name: str, shape: tuple[int, int] = (96, 160), seed: int = 0) -> tuple[LinearLayout, Scheme, Tensor, dict[str, Tensor]]:
    """A weight, and the tensors that `rtn` makes of it."""
    torch.manual_seed(seed)
    scheme, linear = scheme_named(name), LinearLayout("layer", shape, "BF16")
    weight = (torch.randn(shape) * torch.linspace(0.01, 0.5, shape[1])).bfloat16()
    most = weight.abs().max().float().reshape(1)
    shared = {"tensor": most, "tensor_group": grid.global_scale(most)}.get(scheme.strategy)
    made = kernels.quantize(weight, scheme, shared)
    tensors = named_tensors("layer", shape, scheme, made.codes, made.scale, made.zero_point, shared)
    return linear, scheme, weight, tensors | {f"layer.{suffix}": tensor for suffix, tensor in GIVEN.get(scheme.inputs, {}).items()}


@pytest.mark.parametrize("name", COMPRESSED_TENSORS)
def test_what_is_encoded_decodes_to_what_the_forward_saw(name: str) -> None:
    """Bit for bit: at once it is what round to nearest has written, and after both the weights and the steps have moved."""
    linear, scheme, weight, tensors = rounded(name)
    fake = FakeQuantized(linear, scheme, tensors)
    again = fake.encode(weight).tensors
    assert again.keys() == tensors.keys()
    for each, tensor in tensors.items():
        assert torch.equal(again[each].view(torch.uint8), tensor.view(torch.uint8)), each
    moved = weight.float() + torch.randn(weight.shape) * 0.05
    if fake.stretch is not None:
        fake.stretch.data.normal_(std=0.2)
    for source in (moved, moved.bfloat16()):
        seen = fake.weight(source)
        assert seen.dtype is torch.bfloat16
        assert torch.equal(decode("layer", fake.encode(source, weight).tensors, scheme, torch.bfloat16), seen)


@pytest.mark.parametrize("name", COMPRESSED_TENSORS)
def test_gradients_are_those_of_rounding_taken_for_the_identity(name: str) -> None:
    """Against autograd of the same formula with the rounding's error detached."""
    linear, scheme, weight, tensors = rounded(name)
    fake = FakeQuantized(linear, scheme, tensors)
    w = (weight.float() * 1.5).requires_grad_()
    upstream = torch.randn(w.shape)
    (fake.weight(w).float() * upstream).sum().backward()

    found, height, width = fake.grid(), *scheme.tile(linear.shape)
    ours = w.detach().clone().requires_grad_()
    step = found.step.clone().requires_grad_()

    def wide(tiles: Tensor) -> Tensor:
        return tiles.repeat_interleave(height, 0)[: w.shape[0]].repeat_interleave(width, 1)[:, : w.shape[1]]

    codes = ours / wide(step) + (0 if found.zero_point is None else wide(found.zero_point.float()))
    low, high = (a + b for a, b in zip(grid.integer_range(scheme), (-0.5, 0.5), strict=True))
    if scheme.type == "float":
        low, high = (-464.0, 464.0) if scheme.bits == 8 else (-7.0, 7.0)
    clipped = codes.clamp(low, high)
    values = grid.quantize(ours.detach(), found, scheme).float()
    (((clipped + (values - clipped).detach() - (codes - ours / wide(step)).detach()) * wide(step)) * upstream).sum().backward()
    assert w.grad is not None and ours.grad is not None and step.grad is not None
    torch.testing.assert_close(w.grad, ours.grad, rtol=1e-2, atol=1e-2)  # upstream of a result in bf16
    assert 0 < int((w.grad == 0).sum()) < w.numel() / 2, "nothing was clipped, or too much"
    if fake.stretch is not None:
        assert fake.stretch.grad is not None
        torch.testing.assert_close(fake.stretch.grad, step.grad * fake.scale, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.inputs != "none"])
def test_inputs_are_those_of_the_evaluation_and_pass_gradients(name: str) -> None:
    linear, scheme, weight, tensors = rounded(name)
    fake, x = FakeQuantized(linear, scheme, tensors), torch.randn(7, linear.shape[1], requires_grad=True)
    decoded = {"layer.weight": decode("layer", tensors, scheme, torch.bfloat16)}
    published = Published(decoded, {"layer": scheme}, tensors)
    learning = Learning({"layer.weight": weight}, {"layer": fake})
    y = learning("layer", x)
    assert torch.equal(y, published("layer", x.detach()))
    upstream = torch.randn_like(y)
    (y * upstream).sum().backward()
    assert x.grad is not None
    inside = x.grad != 0
    torch.testing.assert_close(x.grad, (upstream @ decoded["layer.weight"].float()) * inside)
    assert bool(inside.any()) and bool(inside.all()) == (scheme.calibrated is None), "only a calibrated range clips"


def test_a_cache_of_keys_passes_gradients_within_its_range() -> None:
    x, scale = torch.randn(2, 3, 5, 8, requires_grad=True), torch.tensor([0.002, 0.004, 1.0]).view(3, 1, 1)
    y = fake_kv(x, scale)
    assert torch.equal(y, kernels.fake_quantize_kv(x.detach(), scale))
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (x.detach().abs() <= 448 * scale).float())


CASES = ("llama", "gemma2", "mixtral", "qwen2_moe", "deepseek_v3")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("together", [False, True])
def test_gradients_of_blocks_are_those_of_transformers(case: str, together: bool, tmp_path: Path) -> None:
    """Of every weight of a model, its embeddings' too, by the sum over its last hidden states, each weighed at random."""
    model: Any = saved(case, tmp_path)
    tokens = torch.randint(3, 120, (2, max(LENGTHS)))
    layout, decoder = layout_of(tmp_path), Decoder(layout_of(tmp_path), torch.device("cpu"))
    stored = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    learned = {name: tensor.requires_grad_() for name, tensor in stored.items()}
    batch = Batch((tokens.shape[1],) * 2, {"hidden": decoder.embed(learned["model.embed_tokens.weight"][tokens])})
    learning = Learning(learned, {})
    blocks = [Block(decoder, number, unit, together) for number, unit in enumerate(u for u in layout.units if ".layers." in u.name)]
    for block in blocks:
        for step in block.steps:
            block.advance(step, batch, learned, learning)
    upstream = torch.randn(batch.state["hidden"].shape)
    (decoder.norm(batch.state["hidden"], learned["model.norm.weight"]) * upstream).sum().backward()
    ours = {name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for name, tensor in learned.items()}
    for block in blocks:
        ours |= as_transformers_names_them(block, ours)

    (model.model(input_ids=tokens, use_cache=False).last_hidden_state * upstream).sum().backward()
    theirs = {name: parameter.grad for name, parameter in model.named_parameters() if name != "lm_head.weight"}
    assert len(theirs) > 20 and theirs.keys() <= ours.keys()
    for name, gradient in theirs.items():
        error = float((ours[name] - gradient).norm() / gradient.norm())
        assert error < 1e-3, f"{name}: {error}"


def as_transformers_names_them(block: Block, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a mixture: its router, and all experts of a layer in one tensor."""
    experts = sorted({e.number: e for step in block.steps for e in step.experts}.values(), key=lambda e: e.number)
    if not experts:
        return {}
    gate_up = torch.stack([torch.cat([gradients[x.weight] for x in e.gate_up]) for e in experts])
    down = torch.stack([gradients[e.down.weight] for e in experts])
    at = f"{block.prefix}mlp"
    return {
        f"{at}.gate.weight": gradients[f"{block.router}.weight"],
        f"{at}.experts.gate_up_proj": gate_up,
        f"{at}.experts.down_proj": down,
    }
