"""Schemes whose inputs have a calibrated scale: the numbers against compressed-tensors', and transformers computing with what we wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from published import Published, publish
from sources import folder_source
from test_kv_cache import TOKENS, load, logits
from test_rtn import library_schemes
from torch import Tensor

from independent import decompressed, tensors_of
from kompressor_worker.block import Site, Stage
from kompressor_worker.errors import BadNumerics, UserError
from kompressor_worker.formats.compressed_tensors import quantization_config
from kompressor_worker.formats.readers import reader_warnings
from kompressor_worker.layout import LinearLayout, StageLayout
from kompressor_worker.passes import build_passes
from kompressor_worker.passes.inputs import InputParams, input_tensors, needed_statistics
from kompressor_worker.reading import read_layout
from kompressor_worker.schemes import COMPRESSED_TENSORS, SCHEMES, Scheme
from kompressor_worker.statistics import Statistics

STATIC = [name for name, scheme in SCHEMES.items() if scheme.calibrated is not None]
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
WIDE = {"range", "histogram"}


def made(inputs: Sequence[Tensor], linears: Sequence[LinearLayout], scheme: Scheme, **params: Any) -> dict[str, dict[str, Tensor]]:
    """The input tensors of `linears`, the n-th of which (or all, if there is one input) gets inputs[n]."""
    sites = []
    for number, x in enumerate(inputs):
        statistics = Statistics(x.shape[1], WIDE)
        statistics.add(x)
        sites.append(Site(f"s{number}", tuple(linears if len(inputs) == 1 else [linears[number]]), (), statistics))
    stage = Stage(StageLayout("stage", (), tuple(linears)), {}, sites=tuple(sites))
    return input_tensors(stage, {x.name: scheme for x in linears}, InputParams.model_validate(params))


@pytest.mark.parametrize("name", STATIC)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    power=st.integers(-14, 3),
    shift=st.sampled_from([0.0, 3.0, -3.0]),
    dtype=st.sampled_from(list(NAMES)),
    zero=st.booleans(),
)
def test_scales_equal_compressed_tensors(name: str, seed: int, power: int, shift: float, dtype: torch.dtype, zero: bool) -> None:
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = SCHEMES[name]
    x = (torch.randn(20, 7, generator=torch.Generator().manual_seed(seed)) + shift) * 10.0**power * (not zero)
    x = x.to(dtype)
    ours = made([x], [LinearLayout("m", (4, 7), NAMES[dtype])], scheme)["m"]
    args = library_schemes(scheme)[0].input_activations
    low, high = x.float().aminmax()
    if scheme.inputs == "fp4_local":
        assert ours.keys() == {"m.input_global_scale"}
        assert torch.equal(ours["m.input_global_scale"], generate_gparam(low, high))
        return
    scale, zero_point = calculate_qparams(low, high, args)
    scale = scale.to(dtype)
    scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale.float()).to(dtype)
    assert torch.equal(ours["m.input_scale"], scale)
    assert ours["m.input_scale"].dtype is dtype
    assert ("m.input_zero_point" in ours) == (not args.symmetric)
    if not args.symmetric and not zero:
        assert torch.equal(ours["m.input_zero_point"], zero_point.to(torch.int8))


def test_experts_share_a_scale() -> None:
    """One for the inputs of all gates and ups, one for those of all downs, whatever each expert has seen; none seen by one of them."""
    linears = [
        LinearLayout(f"b.experts.{e}.{n}", (8, 8), "BF16", fused="b.experts", shared=None if n == "down" else f"b.{e}")
        for e in range(3)
        for n in ("gate", "down")
    ]
    inputs = [torch.randn(9, 8) * (1 + i) for i in range(4)] + [torch.zeros(0, 8), torch.randn(9, 8)]
    for name in ("FP8", "NVFP4"):
        found = made(inputs, linears, SCHEMES[name])
        for kind, seen in (("gate", inputs[0::2]), ("down", inputs[1::2])):
            (alone,) = made([torch.cat(list(seen))], [LinearLayout("m", (8, 8), "BF16")], SCHEMES[name])["m"].values()
            for e in range(3):
                (shared,) = found[f"b.experts.{e}.{kind}"].values()
                assert torch.equal(shared, alone)
    observed = made(inputs, linears, SCHEMES["FP8"], inputObserver="mse")
    assert len({t.item() for e in range(3) for t in observed[f"b.experts.{e}.down"].values()}) == 1


def test_what_cannot_be_made() -> None:
    linear, scheme = LinearLayout("m", (4, 8), "F16"), SCHEMES["W8A8_STATIC"]
    with pytest.raises(UserError, match="m: no calibration row reached it, so W8A8_STATIC has nothing"):
        made([torch.zeros(0, 8)], [linear], scheme)
    with pytest.raises(BadNumerics, match="the scale overflows F16"):
        made([torch.full((2, 8), 1e9)], [linear], scheme)
    stale = Statistics(8, WIDE)
    stale.add(torch.randn(3, 8))
    stale.divide(torch.full((8,), 2.0))
    stage = Stage(StageLayout("stage", (), (linear,)), {}, sites=(Site("s", (linear,), (), stale),))
    input_tensors(stage, {"m": scheme}, InputParams())  # the range was divided too
    with pytest.raises(AssertionError, match="has changed since"):
        input_tensors(stage, {"m": scheme}, InputParams(input_observer="mse"))


def test_what_is_declared() -> None:
    for name, scheme in COMPRESSED_TENSORS.items():
        (built,) = build_passes([{"rtn": {"scheme": name, "inputObserver": "mse"}}])
        assert built.statistics == needed_statistics(scheme, InputParams(input_observer="mse"))
        assert bool(built.statistics) == (name in STATIC)
    assert needed_statistics(SCHEMES["FP8"], InputParams()) == {"range"}
    assert needed_statistics(SCHEMES["FP8"], InputParams(input_observer="entropy")) == {"histogram"}
    assert needed_statistics(SCHEMES["NVFP4"], InputParams(input_observer="entropy")) == {"range"}


def test_order_of_columns_is_said() -> None:
    from dataclasses import replace

    from compressed_tensors.quantization import QuantizationConfig

    config = quantization_config([LinearLayout("x", (8, 128), "BF16")], {"x": replace(SCHEMES["W4A16"], actorder=True)})
    parsed = QuantizationConfig.model_validate(config).config_groups["group_0"].weights
    assert config["config_groups"]["group_0"]["weights"]["actorder"] == "static"
    assert parsed.actorder in ("static", "weight")


class Rounding:
    """A plain model that computes as the published one should: decompressed weights, inputs rounded before every quantised linear."""

    def __init__(self, published: Published, source: Path, inputs: str) -> None:
        self.model, self.inputs = load(source), inputs
        stored = tensors_of(published.folder)
        modules = dict(self.model.named_modules())
        state = self.model.state_dict()
        for name, weight, scheme in decompressed(published.folder):
            if f"{name}.weight" in state:  # experts are stacked in memory
                state[f"{name}.weight"].copy_(weight)
                scale = stored.get(f"{name}.input_scale", stored.get(f"{name}.input_global_scale"))
                zero_point = stored.get(f"{name}.input_zero_point")
                modules[name].register_forward_pre_hook(self.hook(scale, zero_point, scheme.input_activations))

    def hook(self, scale: Tensor | None, zero_point: Tensor | None, args: Any) -> Any:
        assert scale is not None

        def rounded(module: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            (x,) = inputs
            if self.inputs == "fp8_tensor":
                return ((x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale,)
            if self.inputs == "fp4_local":
                return (local(x, scale, args),)
            shift = 0 if zero_point is None else zero_point.to(x.dtype)
            return (((x / scale + shift).clamp(-128, 127).round() - shift) * scale,)

        return rounded


def local(x: Tensor, global_scale: Tensor, args: Any) -> Tensor:
    """NVFP4 activations by the library, group by group."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    groups = x.unflatten(-1, (-1, 16))
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=global_scale)
    return fake_quantize(x, scale, zero_point, args, global_scale=global_scale)


@pytest.mark.parametrize("name", STATIC)
def test_transformers_computes_with_it(name: str, tmp_path: Path) -> None:
    source = tiny_model("llama")
    published = publish(source, tmp_path / "out", [{"rtn": {"scheme": name}}], TOKENS)
    model = load(published.folder)
    held, stored = dict(model.named_parameters()), tensors_of(published.folder)
    asked = {n for n in stored if "proj.input_" in n}
    assert len(asked) == 14 * (2 if name.endswith("ASYM") else 1)
    for each in asked:
        assert torch.equal(held[each], stored[each]), each
    qkv, gate_up = [f"model.layers.1.self_attn.{n}_proj" for n in "qkv"], [f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up")]
    suffix = "input_global_scale" if name == "NVFP4" else "input_scale"
    for group in (qkv, gate_up):
        assert len({stored[f"{n}.{suffix}"].item() for n in group}) == 1
        if name in ("FP8", "NVFP4"):  # loaders would round all but one of them again
            assert len({stored[f"{n}.{'weight_global_scale' if name == 'NVFP4' else 'weight_scale'}"].item() for n in group}) == 1
    found = logits(model)
    assert found.isfinite().all()
    assert torch.equal(found, logits(Rounding(published, source, SCHEMES[name].inputs).model))
    exact = logits(load(source))
    assert (found - exact).norm() < (0.3 if name == "NVFP4" else 0.1) * exact.norm()


@pytest.mark.parametrize("name", ["FP8", "W3A16"])
def test_mixture_in_transformers(name: str, tmp_path: Path) -> None:
    source = tiny_model("qwen3_moe")
    published = publish(source, tmp_path / "out", [{"rtn": {"scheme": name}}], TOKENS)
    model = load(published.folder)
    found, exact = logits(model), logits(load(source))
    assert (found - exact).norm() < (0.15 if name == "FP8" else 0.6) * exact.norm()
    weights, state = {n: w for n, w, _ in decompressed(published.folder)}, model.state_dict()
    for expert in range(4):
        module = f"model.layers.1.mlp.experts.{expert}"
        both = torch.cat([weights[f"{module}.gate_proj"], weights[f"{module}.up_proj"]])
        assert torch.equal(state["model.layers.1.mlp.experts.gate_up_proj"][expert], both)
        assert torch.equal(state["model.layers.1.mlp.experts.down_proj"][expert], weights[f"{module}.down_proj"])
    shared = {n.rpartition("experts.")[2][2:]: set[float]() for n in published.tensors if ".experts." in n and n.endswith("input_scale")}
    for n, tensor in published.tensors.items():
        if ".experts." in n and n.endswith("input_scale"):
            shared[n.rpartition("experts.")[2][2:]].add(tensor.item())
    assert [len(v) for v in shared.values()] == ([1, 1, 1] if name == "FP8" else [])


def test_heads_are_refused() -> None:
    layout = read_layout(folder_source(tiny_model("llama")))
    (built,) = build_passes([{"rtn": {"scheme": "FP8", "targets": ["Linear", "lm_head"]}}])
    with pytest.raises(UserError, match="lm_head: FP8 needs its input measured, and the head's is not"):
        built.assign(layout, {})


@pytest.mark.parametrize(
    "passes",
    [[{"rtn": {"scheme": "W4A16", "ignore": ["re:.*experts"]}}], [{"rtn": {"scheme": "FP8", "ignore": ["re:.*experts"]}}], []],
    ids=str,
)
def test_exact_experts_are_warned_of_where_transformers_fails(passes: list[Any], tmp_path: Path) -> None:
    published = publish(tiny_model("qwen3_moe"), tmp_path / "out", [*passes, {"kvCache": {}}], TOKENS)
    warned = any("experts left exact" in line for line in reader_warnings(published.layout, published.schemes))
    try:
        load(published.folder)
    except RuntimeError:
        assert warned
    else:
        assert not warned
