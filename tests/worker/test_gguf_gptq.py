"""`gptq` on GGUF's grids: less error of the output than rounding to nearest, in bytes that the format's own library reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch

from kompressor_worker.block import Encoded, Site, Stage
from kompressor_worker.formats.gguf_types import row_bytes, type_of
from kompressor_worker.layout import LinearLayout, StageLayout
from kompressor_worker.passes import gguf_encoding
from kompressor_worker.passes.gguf_encoding import to_nearest
from kompressor_worker.passes.gptq import Gptq, GptqParams
from kompressor_worker.schemes import GGUF, Scheme
from kompressor_worker.sparsity import Sparsity
from kompressor_worker.statistics import Statistics
from models import token_rows

INTEGERS = [name for name, scheme in GGUF.items() if scheme.type == "int"]


def trained(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """A trained model's down_proj, as wide as a block of 256, and what it is fed with."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    linear, inputs = model.model.layers[1].mlp.down_proj, []
    linear.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, -2)))
    with torch.no_grad():
        model(token_rows(folder, 0, 5, 32, 128))
    return linear.weight.detach().bfloat16(), inputs[0]


@pytest.fixture(scope="module")
def case(trained_llama: Path) -> tuple[torch.Tensor, torch.Tensor]:
    return trained(trained_llama)


def stage_of(weight: torch.Tensor, x: torch.Tensor | None) -> tuple[Stage, LinearLayout]:
    linear, statistics = LinearLayout("model.layers.1.mlp.down_proj", tuple(weight.shape), "BF16"), Statistics(weight.shape[1], {"hessian"})
    if x is not None:
        statistics.add(x)
    site = Site("down", (linear,), (linear.weight,), statistics)
    return Stage(StageLayout("down", (), (linear,)), {linear.weight: weight}, sites=(site,)), linear


def applied(stage: Stage, linear: LinearLayout, scheme: Scheme, order: str = "static") -> Encoded:
    passed = Gptq(GptqParams(scheme="W4A16", act_order=order))
    assert not passed.take({linear.name: scheme})[linear.name].actorder
    passed.apply(stage)
    return stage.encoded[linear.name]


def read(encoded: Encoded, linear: LinearLayout, scheme: Scheme) -> torch.Tensor:
    (data,) = encoded.tensors.values()
    assert data.dtype is torch.uint8 and data.shape == (linear.shape[0], row_bytes(type_of(scheme).name, linear.shape[1]))
    return torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[type_of(scheme).name]))


@pytest.mark.parametrize("name", ["Q2_K", "Q4_0"])
def test_the_output_is_as_long_along_itself_as_it_was(
    case: tuple[torch.Tensor, torch.Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (weight, x), scheme = case, GGUF[name]
    stage, linear = stage_of(weight, x)
    before = weight.float() @ x.T

    def length() -> float:
        return float((before * (read(applied(stage, linear, scheme), linear, scheme) @ x.T)).sum() / before.square().sum())

    unbiased = length()
    monkeypatch.setattr(gguf_encoding, "_gain", lambda *given: 1.0)
    short = length()
    assert short < 1 and abs(unbiased - 1) < 0.1 * (1 - short) + 3e-4, (short, unbiased)


@pytest.mark.parametrize("name", INTEGERS)
def test_less_error_of_the_output(case: tuple[torch.Tensor, torch.Tensor], name: str) -> None:
    (weight, x), scheme = case, GGUF[name]
    stage, linear = stage_of(weight, x)
    diagonal = x.square().sum(0)

    def loss(made: Encoded) -> float:
        return float(((read(made, linear, scheme) - weight.float()) @ x.T).double().square().sum())

    plain, weighted = loss(to_nearest(linear, weight, scheme)), loss(to_nearest(linear, weight, scheme, diagonal))
    made = applied(stage, linear, scheme)
    found = {"weighted": weighted / plain, "static": loss(made) / weighted, "none": loss(applied(stage, linear, scheme, "none")) / weighted}
    assert found["static"] < 0.5 and found["none"] < 0.65, found
    assert found["weighted"] < (1.01 if name == "Q8_0" else 0.95), found
    off = (read(made, linear, scheme) - weight.float()).double().square().sum()
    assert made.squared_error == pytest.approx(float(off), rel=1e-6) and not stage.notes


def test_where_there_is_nothing_to_go_by(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, x = case
    stage, linear = stage_of(weight, None)
    made = applied(stage, linear, GGUF["Q4_K"])
    assert torch.equal(*(tensors[linear.weight] for tensors in (made.tensors, to_nearest(linear, weight, GGUF["Q4_K"]).tensors)))
    stage, linear = stage_of(weight, x)
    made, wanted = applied(stage, linear, GGUF["IQ4_NL"]), to_nearest(linear, weight, GGUF["IQ4_NL"], x.square().sum(0))
    assert stage.notes["gptq"]["roundedToNearest"] == {linear.name: "IQ4_NL's levels are no even steps"}
    assert (read(made, linear, GGUF["IQ4_NL"]) != read(wanted, linear, GGUF["IQ4_NL"])).float().mean() < 0.001  # importance in another sum


def test_zeros_of_a_pruned_weight_and_groups_of_one_value(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, x = case[0].clone(), case[1]
    weight[:, ::3], weight[:, 64:96], weight[:, 96:128] = 0, 0, 0.25
    for name in INTEGERS:
        stage, linear = stage_of(weight, x)
        linear = replace(linear, pruned=Sparsity(0.25))
        stage.sites = (replace(stage.sites[0], linears=(linear,)),)
        stage.layout = replace(stage.layout, linears=(linear,))
        made = read(applied(stage, linear, GGUF[name]), linear, GGUF[name])
        assert made.isfinite().all()
        if GGUF[name].symmetric:
            assert not made[weight == 0].any() and made[weight != 0].any()
