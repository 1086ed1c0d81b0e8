"""`gptq`: against the paper's own procedure in fp64, read by the compressed-tensors library; and better than rounding to nearest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from blockwise import compressed, kl, logits

from independent import rounded, tensors_of
from kompressor_worker import kernels
from kompressor_worker.block import Site, Stage
from kompressor_worker.errors import BadNumerics
from kompressor_worker.formats.compressed_tensors import decode, quantization_config
from kompressor_worker.layout import LinearLayout, ModelLayout, StageLayout, UnitLayout
from kompressor_worker.passes import build_passes
from kompressor_worker.statistics import Statistics
from models import held_out_tokens, token_rows

ROWS, COLUMNS = 48, 128


def linear(name: str, rows: int = ROWS) -> LinearLayout:
    return LinearLayout(f"model.layers.0.self_attn.{name}", (rows, COLUMNS), "BF16")


def inputs() -> torch.Tensor:
    """[rows, columns], correlated, of very different magnitudes."""
    torch.manual_seed(0)
    return torch.randn(512, COLUMNS) @ torch.randn(COLUMNS, COLUMNS) * torch.logspace(-1, 1, COLUMNS)[torch.randperm(COLUMNS)]


def stage_of(x: torch.Tensor | None, *linears: LinearLayout) -> Stage:
    torch.manual_seed(1)
    weights = {each.weight: torch.randn(each.shape).to(torch.bfloat16) for each in linears}
    statistics = Statistics(COLUMNS, {"hessian", "range", "histogram"})
    if x is not None:
        statistics.add(x)
    site = Site("qkv", linears, tuple(weights), statistics)
    return Stage(StageLayout("model.layers.0.self_attn.qkv", (), linears), weights, sites=(site,))


def applied(params: dict[str, Any], stage: Stage) -> Stage:
    (gptq,) = build_passes([{"gptq": params}])
    layout = ModelLayout({}, "BF16", None, (UnitLayout("model.layers.0", (stage.layout,)),), (), "")
    stage.schemes = gptq.assign(layout, {})
    gptq.apply(stage)
    return stage


def by_the_book(weight: torch.Tensor, h: torch.Tensor, args: Any, columns: list[int]) -> torch.Tensor:
    """Optimal brain quantisation column by column, the inverse Hessian shrunk each time; each group on the grid of the original weights.

    Every rounding is the library's, of a whole weight, of which one column is taken."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    groups = weight.float().reshape(len(weight), -1, args.group_size or COLUMNS)
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    scale = scale.to(torch.bfloat16).float()
    work, inverse = weight.double(), torch.linalg.inv(h.double())
    result = torch.empty_like(work)
    for done, j in enumerate(columns):
        result[:, j] = fake_quantize(work.float(), scale, zero_point, args)[:, j].double()
        left = columns[done + 1 :]
        error = (work[:, j] - result[:, j]) / inverse[j, j]
        work[:, left] -= error[:, None] * inverse[j, left]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return result


@pytest.mark.parametrize("order", ["static", "none"])
@pytest.mark.parametrize(("scheme", "group"), [("W4A16_ASYM", 32), ("W4A16", -1), ("W3A16", 64), ("W8A8", None), ("FP8_DYNAMIC", None)])
def test_as_the_paper_has_it(scheme: str, group: int | None, order: str) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    params = {"scheme": scheme, "actOrder": order, "dampening": 0.02, "observer": "minmax"} | ({"groupSize": group} if group else {})
    q = linear("q_proj")
    stage = applied(params, stage_of(inputs(), q))
    made, weight = stage.encoded[q.name], stage.weights[q.weight]
    config = QuantizationConfig.model_validate(quantization_config([q], stage.schemes))
    args = config.config_groups["group_0"].weights
    h = stage.sites[0].statistics.hessian
    assert h is not None
    damped = h + 0.02 * h.diagonal().mean() * torch.eye(COLUMNS)
    columns = h.diagonal().argsort(descending=True).tolist() if order == "static" else list(range(COLUMNS))
    got = decode(q.name, made.tensors, stage.schemes[q.name], torch.float32)

    def loss(w: torch.Tensor) -> float:
        d = w.double() - weight.double()
        return float(((d @ h.double()) * d).sum())

    plain = rounded(weight, args, None)
    assert loss(got) < (0.6 if order == "static" else 0.75) * loss(plain)
    assert made.squared_error == pytest.approx(float((got.double() - weight.double()).square().sum()), rel=1e-6)
    assert (args.actorder is not None) == (order == "static" and group not in (None, -1))
    if order == "static" or group in (None, -1):  # else the grids follow the weights as they change
        wanted = by_the_book(weight, damped, args, columns)
        assert (got - wanted).abs().gt(1e-6).float().mean() < 0.01, "a rounding that was a tie in fp64"
        assert loss(got) == pytest.approx(loss(wanted), rel=0.01)
        return
    scales = made.tensors[f"{q.name}.weight_scale"]
    assert torch.equal(scales[:, 0], own_scale(weight[:, : args.group_size], args))
    assert not torch.equal(scales[:, 1], own_scale(weight[:, args.group_size : 2 * args.group_size], args))


def own_scale(group: torch.Tensor, args: Any) -> torch.Tensor:
    from compressed_tensors.quantization.utils import calculate_qparams

    return calculate_qparams(group.float().amin(1), group.float().amax(1), args)[0].to(torch.bfloat16)


def test_one_factorisation_for_linears_that_share_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], kernels.inverse_factor
    monkeypatch.setattr(kernels, "inverse_factor", lambda h, *rest: calls.append(1) or original(h, *rest))
    q, k, v = linear("q_proj"), linear("k_proj", 16), linear("v_proj", 16)
    stage = applied({"scheme": "W4A16", "groupSize": 32}, stage_of(inputs(), q, k, v))
    assert set(stage.encoded) == {q.name, k.name, v.name} and len(calls) == 1
    assert not stage.notes


def test_a_static_input_scale_beside_it() -> None:
    q = linear("q_proj")
    stage = applied({"scheme": "W8A8_STATIC"}, stage_of(inputs().to(torch.bfloat16), q))
    scale = stage.encoded[q.name].tensors[f"{q.name}.input_scale"]
    assert float(scale) == pytest.approx(float(inputs().abs().max()) / 127.5, rel=0.01)


def nearest(stage: Stage, each: LinearLayout) -> torch.Tensor:
    from kompressor_worker.passes.encoding import round_to_nearest

    scheme = stage.schemes[each.name]
    return decode(each.name, round_to_nearest(each, stage.weights[each.weight], scheme).tensors, scheme, torch.float32)


@pytest.mark.parametrize("x", [None, torch.zeros(4, COLUMNS)])
def test_an_expert_without_tokens_is_rounded_to_nearest(x: torch.Tensor | None) -> None:
    q = linear("q_proj")
    stage = applied({"scheme": "W4A16", "groupSize": 32}, stage_of(x, q))
    assert torch.equal(decode(q.name, stage.encoded[q.name].tensors, stage.schemes[q.name], torch.float32), nearest(stage, q))
    rows = 0 if x is None else 4
    assert stage.notes["gptq"]["roundedToNearest"] == {q.name: f"none of {rows} rows of its input is other than zero"}


def test_dead_columns_are_rounded_to_nearest_and_touch_no_other() -> None:
    q, x = linear("q_proj"), inputs()
    x[:, 5] = 0
    stage = applied({"scheme": "W4A16", "groupSize": 32, "observer": "minmax"}, stage_of(x, q))
    got, plain = decode(q.name, stage.encoded[q.name].tensors, stage.schemes[q.name], torch.float32), nearest(stage, q)
    assert torch.equal(got[:, 5], plain[:, 5]) and not torch.equal(got[:, 6], plain[:, 6])
    assert stage.notes["gptq"]["deadColumns"] == {"qkv": 1}


def test_dampening_is_raised_until_the_factorisation_works() -> None:
    q, same = linear("q_proj"), torch.ones(64, COLUMNS)
    stage = applied({"scheme": "W4A16", "groupSize": 32, "dampening": 1e-8}, stage_of(same, q))
    assert 1e-8 < stage.notes["gptq"]["dampening"] <= 1e-5
    broken = stage_of(inputs(), q)
    h = broken.sites[0].statistics.hessian
    assert h is not None
    h[0, 1] = h[1, 0] = 1000 * h.max()
    with pytest.raises(BadNumerics, match="qkv: the Hessian of its input is not positive definite even with dampening 10"):
        applied({"scheme": "W4A16", "groupSize": 32}, broken)
    h[0, 1] = torch.nan
    with pytest.raises(BadNumerics, match=r"qkv: .*overflow"):
        applied({"scheme": "W4A16", "groupSize": 32}, broken)


@pytest.mark.parametrize("grid", [{"scheme": "W3A16", "groupSize": 64}, {"scheme": "W4A16", "groupSize": -1}])
def test_less_divergence_than_rounding_to_nearest(trained_llama: Path, grid: dict[str, Any]) -> None:
    calibration, held = token_rows(trained_llama, 0, 5, 32, 128), held_out_tokens("llama", 48, 128)
    reference = logits(trained_llama, tensors_of(trained_llama), held)
    runs = {
        "rtn": [{"rtn": grid}],
        "gptq": [{"gptq": grid}],
        "none": [{"gptq": grid | {"actOrder": "none"}}],
        "mse": [{"gptq": grid | {"observer": "mse"}}],
    }
    found = {
        name: kl(reference, logits(trained_llama, compressed(trained_llama, run, calibration).state, held)) for name, run in runs.items()
    }
    assert found["gptq"] < 0.5 * found["rtn"], found
    assert found["none"] < 0.5 * found["rtn"], found
    assert found["mse"] < 1.1 * found["gptq"], found
