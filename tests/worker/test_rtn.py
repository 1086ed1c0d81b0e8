"""Round to nearest against compressed-tensors, an independent computation: bit for bit, on whatever finite values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kompressor_worker import grid
from kompressor_worker.block import Stage
from kompressor_worker.errors import BadNumerics
from kompressor_worker.formats import packing
from kompressor_worker.formats.compressed_tensors import decode, named_tensors
from kompressor_worker.kernels import eager
from kompressor_worker.layout import LinearLayout, SourceTensor, StageLayout
from kompressor_worker.passes.rtn import Rtn, RtnParams
from kompressor_worker.schemes import COMPRESSED_TENSORS, SCHEMES, Scheme

quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALL = [
    *COMPRESSED_TENSORS.values(),
    SCHEMES["W4A16"].with_group_size(-1),
    SCHEMES["W4A16_ASYM"].with_group_size(-1),
    SCHEMES["W8A16"].with_group_size(32),
    SCHEMES["W3A16"].with_group_size(-1),
]


@st.composite
def weights(draw: st.DrawFn, *, columns: tuple[int, ...] = (128, 256, 384), limit: float = 1e37) -> torch.Tensor:
    """Finite weights: bell-shaped ones with odd rows (zeros, one sign, ties, denormals, huge), or any bits at all."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.integers(9, 150)), draw(st.sampled_from(columns))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        word = torch.int32 if dtype is torch.float32 else torch.int16
        bits = torch.randint(torch.iinfo(word).min, torch.iinfo(word).max, shape, dtype=word, generator=generator)
        values = bits.view(dtype)
        return torch.where(values.isfinite() & (values.float().abs() < limit), values, 0)
    values = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-12, 4))
    for row, kind in enumerate(draw(st.lists(st.integers(0, 6), max_size=shape[0]))):
        if kind == 0:
            values[row] = 0
        elif kind == 1:
            values[row] = values[row].abs()
        elif kind == 2:
            values[row, : shape[1] // 2] = 0
        elif kind == 3:
            values[row] = torch.randint(-16, 17, (shape[1],), generator=generator) / 2  # ties
        elif kind == 4:
            values[row] *= 1e-36
        elif kind == 5:
            values[row, ::3] = -0.0
        else:
            values[row] = values[row, 0]
    top = torch.finfo(dtype).max if dtype is torch.float16 else limit
    return values.clamp(-top, top).to(dtype)


def library_schemes(scheme: Scheme):  # type: ignore[no-untyped-def]
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    from kompressor_worker.formats.compressed_tensors import quantization_config

    config = quantization_config([LinearLayout("x", (1, 1), "BF16")], {"x": scheme})
    parsed = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    return parsed, BaseCompressor.get_value_from_registry(scheme.format)


def library(weight: torch.Tensor, scheme: Scheme, shared: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The tensors of a linear by compressed-tensors on fp32 input, its scales rounded to the dtype they are stored in first."""
    from compressed_tensors.quantization.utils import calculate_qparams

    parsed, compressor = library_schemes(scheme)
    source = weight.float()
    height, width = scheme.tile(tuple(weight.shape))
    padded = torch.nn.functional.pad(source, (0, -source.shape[1] % width, 0, -source.shape[0] % height))
    tiles = padded.unfold(0, height, height).unfold(1, width, width).flatten(2)
    global_scale = shared if scheme.strategy == "tensor_group" else None
    scale, zero_point = calculate_qparams(tiles.amin(-1), tiles.amax(-1), parsed.weights, global_scale=global_scale)
    if parsed.weights.scale_dtype is None:
        scale = scale.to(weight.dtype).float()
        scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
    state = {"weight": source, "weight_scale": scale}
    if not scheme.symmetric:
        state["weight_zero_point"] = zero_point
    if global_scale is not None:
        state["weight_global_scale"] = global_scale
    if scheme.strategy == "tensor":
        state["weight_scale"] = scale.reshape(1)
    made: dict[str, torch.Tensor] = compressor.compress(state, parsed)
    if parsed.weights.scale_dtype is None:
        made["weight_scale"] = made["weight_scale"].to(weight.dtype)
    return made


def shared_scale(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor | None:
    if scheme.strategy == "tensor":
        return weight.float().abs().max().reshape(1)
    if scheme.strategy != "tensor_group":
        return None
    from compressed_tensors.quantization.utils import generate_gparam

    ours = grid.global_scale(weight.float().abs().max())
    assert torch.equal(ours, generate_gparam(*weight.float().aminmax()))
    return ours


def same_bytes(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    # a clone, since a single element may come with any strides
    theirs = theirs.clone(memory_format=torch.contiguous_format)
    return torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("scheme", ALL, ids=lambda s: f"{s.name}-{s.group_size}")
@quick
@given(weight=weights())
def test_equals_compressed_tensors_bit_for_bit(scheme: Scheme, weight: torch.Tensor) -> None:
    shared = shared_scale(weight, scheme)
    made = eager.quantize(weight, scheme, shared)
    shape = weight.shape[0], weight.shape[1]
    ours = {
        name.removeprefix("m."): tensor
        for name, tensor in named_tensors("m", shape, scheme, made.codes, made.scale, made.zero_point, shared).items()
    }
    theirs = library(weight, scheme, shared)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert same_bytes(tensor, theirs[name]), name

    parsed, compressor = library_schemes(scheme)
    read = compressor.decompress(theirs, parsed)["weight"]
    decoded = decode("m", {f"m.{name}": tensor for name, tensor in ours.items()}, scheme, read.dtype)
    assert torch.equal(decoded, read)


@pytest.mark.parametrize(
    "scheme", [SCHEMES["W4A16"].with_group_size(-1), SCHEMES["W8A16"], SCHEMES["W8A8"], SCHEMES["FP8_DYNAMIC"]], ids=str
)
@quick
@given(weight=weights(columns=(1, 7, 13, 33, 100)))
def test_columns_that_fill_no_word(scheme: Scheme, weight: torch.Tensor) -> None:
    made, theirs = eager.quantize(weight, scheme), library(weight, scheme, None)
    assert same_bytes(made.codes, theirs["weight_packed" if scheme.choosable_groups else "weight"])
    assert same_bytes(made.scale, theirs["weight_scale"])


def test_a_scale_that_underflows_only_when_stored() -> None:
    weight = torch.full((2, 128), 1e-7, dtype=torch.float16)
    for scheme in ALL:
        made = eager.quantize(weight, scheme, shared_scale(weight, scheme))
        assert made.scale.to(torch.float32).ne(0).all() or scheme.format == "mxfp4-pack-quantized", scheme.name
        assert made.squared_error <= made.squared_norm * 1.0001


def test_mx_exponents_over_all_magnitudes() -> None:
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    bits = torch.arange(0, 0x7F800000, 0x10001, dtype=torch.int32)
    amax = torch.cat([bits.view(torch.float32), *(torch.tensor([2.0**e, 1.75 * 2.0**e]) for e in range(-126, 127))])
    theirs = generate_mx_scales(amax).clamp(0, 255).round().to(torch.uint8)
    assert torch.equal(grid.mx_exponent(amax), theirs)
    exponents = torch.arange(256).to(torch.uint8)
    assert torch.equal(grid.mx_scale(exponents), torch.tensor([2.0**e if e < 128 else torch.inf for e in range(-127, 129)]))


@quick
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 70), st.integers(2, 8), st.sampled_from([0, 1]))
def test_packing_equals_the_library_and_comes_back(seed: int, rows: int, columns: int, bits: int, dim: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = packing.pack_int32(codes, bits, dim)  # type: ignore[arg-type]
    assert torch.equal(packed, pack_to_int32(codes, bits, dim))  # type: ignore[arg-type]
    assert torch.equal(packing.unpack_int32(packed, bits, codes.shape[dim], dim), codes)  # type: ignore[arg-type]


def stage_of(weights: dict[str, torch.Tensor], shared: str | None = None, dtype: str = "BF16") -> Stage:
    linears = tuple(LinearLayout(n, (w.shape[0], w.shape[1]), dtype, "linear", shared, shared) for n, w in weights.items())
    tensors = tuple(SourceTensor(x.weight, dtype, x.shape, ()) for x in linears)
    return Stage(StageLayout("stage", tensors, linears), {f"{n}.weight": w for n, w in weights.items()})


def applied(stage: Stage, **params: object) -> Stage:
    from test_schemes import layout_of

    rtn = Rtn(RtnParams.model_validate(params))
    stage.schemes |= rtn.assign(layout_of(stage.layout.linears), {})
    rtn.apply(stage)
    return stage


def test_apply_encodes_and_measures() -> None:
    weight = torch.randn(64, 256).bfloat16()
    stage = applied(stage_of({"m.0.down": weight}), scheme="W4A16", groupSize=64)
    encoded = stage.encoded["m.0.down"]
    assert set(encoded.tensors) == {f"m.0.down.{x}" for x in ("weight_packed", "weight_scale", "weight_shape")}
    assert torch.equal(stage.weights["m.0.down.weight"], weight)
    difference = decode("m.0.down", encoded.tensors, stage.schemes["m.0.down"], torch.float32) - weight.float()
    assert encoded.squared_error == pytest.approx(float(difference.double().square().sum()), rel=1e-9)
    assert encoded.squared_norm == pytest.approx(float(weight.double().square().sum()), rel=1e-9)


def test_nvfp4_shares_one_global_scale_among_the_fused() -> None:
    three = {f"m.0.{x}": torch.randn(32, 64).bfloat16() * size for x, size in (("q", 1), ("k", 10), ("v", 0.1))}
    tensors = {n: e.tensors[f"{n}.weight_global_scale"] for n, e in applied(stage_of(three, "m.0.qkv"), scheme="NVFP4A16").encoded.items()}
    largest = max(float(w.abs().max()) for w in three.values())
    assert all(torch.equal(t, grid.global_scale(torch.tensor(largest))) for t in tensors.values())
    alone = applied(stage_of(three), scheme="NVFP4A16").encoded
    assert len({float(e.tensors[f"{n}.weight_global_scale"]) for n, e in alone.items()}) == 3


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16", "FP8_BLOCK"])
def test_names_the_tensor_that_is_not_finite(scheme: str) -> None:
    weight = torch.randn(128, 128).bfloat16()
    weight[3, 5], weight[100, 1] = torch.nan, -torch.inf
    with pytest.raises(BadNumerics, match=r"m\.0\.down\.weight: 2 of 16384 values are NaN or Inf"):
        applied(stage_of({"m.0.down": weight}), scheme=scheme)


@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "MXFP4"])
def test_names_the_tensor_whose_range_no_scale_covers(scheme: str) -> None:
    weight = torch.full((8, 128), 3e38)
    weight[:, 1::2] *= -1
    with pytest.raises(BadNumerics, match=r"m\.0\.down\.weight: its values span too wide a range for .*, a scale overflows"):
        applied(stage_of({"m.0.down": weight}, dtype="F32"), scheme=scheme)


@pytest.mark.parametrize("scheme", ["W3A16", "W4A16", "W4A16_ASYM", "W8A8"])
def test_a_searched_range_is_the_best_of_all_shares(scheme: str) -> None:
    """Tile by tile, against plain fp64 rounding at every share of the range; nowhere worse than the range itself."""
    weight = torch.randn(200, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[3] = 0
    linear = LinearLayout("m", (200, 256), "BF16")
    layout = StageLayout("m", (SourceTensor("m.weight", "BF16", (200, 256), ()),), (linear,))
    stage = Stage(layout, {"m.weight": weight})
    passed = Rtn(RtnParams(scheme=scheme, observer="mse"))
    passed._assigned = {"m": SCHEMES[scheme]}
    passed.apply(stage)
    found = SCHEMES[scheme]
    columns = found.group_size or 256
    tiles = weight.double().unflatten(1, (-1, columns))
    ours = (decode("m", stage.encoded["m"].tensors, found, torch.float32).double().unflatten(1, (-1, columns)) - tiles).square().sum(-1)
    low, high = tiles.amin(-1).clamp(max=0), tiles.amax(-1).clamp(min=0)
    bottom, top = -(1 << found.bits - 1), (1 << found.bits - 1) - 1
    errors = []
    for share in torch.arange(21, 41) / 40:
        scale = (torch.maximum(-low, high) / (top + 0.5) if found.symmetric else (high - low) / (top - bottom)) * share
        zero_point = 0 if found.symmetric else (bottom - low * share / scale).nan_to_num().round()[..., None]
        scale = scale.bfloat16().double().clamp(min=1e-9)[..., None]
        errors.append((((tiles / scale + zero_point).round().clamp(bottom, top) - zero_point) * scale - tiles).square().sum(-1))
    best = torch.stack(errors).amin(0)
    assert (ours <= best * 1.01 + 1e-6).float().mean() > 0.99  # but for zero points that fp32 and fp64 round to either side
    assert stage.encoded["m"].squared_error == pytest.approx(float(ours.sum()), rel=1e-4)
    if scheme in ("W3A16", "W4A16"):
        assert ours.sum() < 0.9 * errors[-1].sum()
