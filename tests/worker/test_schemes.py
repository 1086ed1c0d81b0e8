"""What the pass rtn takes and what it refuses, from headers alone: no torch in here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from kompressor_worker.errors import UserError
from kompressor_worker.formats.gguf_mixes import MIXES
from kompressor_worker.layout import LinearLayout, ModelLayout, SourceTensor, StageLayout, UnitLayout
from kompressor_worker.passes import build_passes
from kompressor_worker.passes.rtn import Rtn, RtnParams
from kompressor_worker.schemes import COMPRESSED_TENSORS, GGUF, SCHEMES, Scheme

HIDDEN, KV, WIDE = 256, 128, 512


def layout_of(linears: Iterable[LinearLayout], *, tied: bool = False, config: Mapping[str, Any] | None = None) -> ModelLayout:
    stages = tuple(StageLayout(x.name, (SourceTensor(x.weight, x.dtype, x.shape, ()),), (x,)) for x in linears)
    norm = StageLayout("norm", (SourceTensor("model.norm.weight", "BF16", (HIDDEN,), ()),))
    return ModelLayout(config or {}, "BF16", None, (UnitLayout("all", (*stages, norm)),), (), "digest", tied)


def attention(layer: int, *, rows: Mapping[str, int] | None = None, columns: int = HIDDEN) -> list[LinearLayout]:
    sizes = {"q": HIDDEN, "k": KV, "v": KV} | dict(rows or {})
    at = f"model.layers.{layer}.self_attn"
    qkv = [LinearLayout(f"{at}.{x}_proj", (sizes[x], columns), "BF16", "linear", f"{at}.qkv", f"{at}.qkv") for x in "qkv"]
    return [*qkv, LinearLayout(f"{at}.o_proj", (HIDDEN, HIDDEN), "BF16")]


def feed_forward(at: str, *, wide: int = WIDE, fused: str | None = None) -> list[LinearLayout]:
    shared = f"{at}.gate_up"
    both = [LinearLayout(f"{at}.{x}_proj", (wide, HIDDEN), "BF16", "linear", fused or shared, shared) for x in ("gate", "up")]
    return [*both, LinearLayout(f"{at}.down_proj", (HIDDEN, wide), "BF16", "linear", fused)]


def llama(*, tied: bool = False) -> ModelLayout:
    linears = [LinearLayout("model.embed_tokens", (1000, HIDDEN), "BF16", "embedding")]
    for layer in range(2):
        linears += [*attention(layer), *feed_forward(f"model.layers.{layer}.mlp")]
    return layout_of(linears if tied else [*linears, LinearLayout("lm_head", (1000, HIDDEN), "BF16", "head")], tied=tied)


def mixture(*, wide: int = WIDE) -> ModelLayout:
    linears = attention(0)
    linears.append(LinearLayout("model.layers.0.mlp.gate", (4, HIDDEN), "BF16", "router"))
    for expert in range(4):
        linears += feed_forward(f"model.layers.0.mlp.experts.{expert}", wide=wide, fused="model.layers.0.mlp.experts")
    return layout_of(linears)


def assign(layout: ModelLayout, *entries: Mapping[str, Any]) -> dict[str, Scheme]:
    taken: dict[str, Scheme] = {}
    for p in build_passes([{"rtn": entry} for entry in entries]):
        taken |= p.assign(layout, taken)
    return taken


def refusal(layout: ModelLayout, *entries: Mapping[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        assign(layout, *entries)
    return str(caught.value)


@pytest.mark.parametrize("scheme", COMPRESSED_TENSORS)
def test_takes_every_linear_and_leaves_the_rest_exact(scheme: str) -> None:
    found = assign(llama(), {"scheme": scheme})
    assert set(found) == {x.name for x in llama().linears() if x.kind == "linear"}
    assert set(found.values()) == {SCHEMES[scheme]}
    if scheme.startswith("W8A8_STATIC"):
        message = refusal(mixture(), {"scheme": scheme})
        assert f"model.layers.0.mlp.experts.0.gate_proj: no loader reads routed experts in {scheme}" in message
    else:
        assert "model.layers.0.mlp.gate" not in assign(mixture(), {"scheme": scheme})


def test_steps_of_floats_are_not_searched() -> None:
    assert "rtn: observer mse with scheme FP8_DYNAMIC" in refusal(llama(), {"scheme": "FP8_DYNAMIC", "observer": "mse"})


def test_schemes_of_the_parameters_are_the_schemes() -> None:
    """Of GGUF's types those that nobody asks for are what rows get that are no whole blocks; the others are mixes by their own names."""
    names = RtnParams.model_json_schema()["properties"]["scheme"]["enum"]
    assert names[: len(COMPRESSED_TENSORS)] == list(COMPRESSED_TENSORS)
    assert {*names} == {*COMPRESSED_TENSORS, *MIXES}
    assert {*GGUF} - {*MIXES} == {"Q5_0", "Q5_1", "IQ4_NL", "MXFP4_GGUF"}


def test_group_size() -> None:
    assert assign(llama(), {"scheme": "W4A16", "groupSize": 32})["model.layers.0.mlp.up_proj"].group_size == 32
    channel = assign(llama(), {"scheme": "W4A16_ASYM", "groupSize": -1})["model.layers.0.mlp.up_proj"]
    assert (channel.strategy, channel.group_size) == ("channel", None)
    assert assign(llama(), {"scheme": "W8A16", "groupSize": 64})["model.layers.0.mlp.up_proj"].strategy == "group"


def test_targets_and_ignore() -> None:
    found = assign(
        llama(),
        {"scheme": "W4A16", "targets": ["re:.*mlp"], "ignore": ["re:.*layers.1.mlp.down_proj$"]},
        {"scheme": "W8A8", "targets": ["model.layers.1.mlp.down_proj", "lm_head"]},
        {"scheme": "FP8_DYNAMIC"},
    )
    assert found["model.layers.0.mlp.down_proj"].name == "W4A16"
    assert found["model.layers.1.mlp.down_proj"].name == "W8A8"
    assert found["lm_head"].name == "W8A8"
    assert found["model.layers.1.self_attn.k_proj"].name == "FP8_DYNAMIC"
    assert "model.embed_tokens" not in found


def test_what_is_exact_anyway_may_be_listed() -> None:
    usual = {"scheme": "W8A8", "ignore": ["lm_head", "model.embed_tokens", "re:.*norm$"]}
    assert len(assign(llama(), usual)) == 14
    assert len(assign(llama(tied=True), usual)) == 14
    assert len(assign(mixture(), {"scheme": "W8A8", "ignore": ["re:.*mlp.gate$"]})) == 16


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"scheme": "W4A16", "targets": ["model.layers.0.mlp.dwn_proj"]},
            "targets: 'model.layers.0.mlp.dwn_proj' matches no linear layer of this model; did you mean model.layers.0.mlp.down_proj?",
        ),
        (
            {"scheme": "W4A16", "targets": ["re:.*conv$"]},
            "targets: 're:.*conv$' matches no linear layer of this model; use a module name such as",
        ),
        ({"scheme": "W4A16", "targets": ["LlamaMLP"]}, '"re:.*down_proj$" or "Linear"'),
        ({"scheme": "W4A16", "ignore": ["re:.*conv$"]}, "ignore: 're:.*conv$' matches no linear layer"),
        ({"scheme": "W4A16", "ignore": ["Linear"]}, "leave no linear layer to quantise (16 in the model, 0 taken by earlier passes)"),
        ({"scheme": "W4A16", "targets": ["model.embed_tokens"]}, "model.embed_tokens is an embedding, which loaders want exact"),
        ({"scheme": "W8A8", "groupSize": 128}, "groupSize 128 with scheme W8A8, whose groups are fixed; leave groupSize out"),
        ({"scheme": "MXFP4", "groupSize": 32}, "groupSize 32 with scheme MXFP4"),
        (
            {"scheme": "W4A16", "groupSize": 96},
            "q_proj: 256 columns not divisible by groupSize 96; choose 128, 64, 32, or -1, or list it under ignore",
        ),
        (
            {"scheme": "W4A16", "ignore": ["re:.*q_proj$"]},
            "layers.0.self_attn.q_proj would be left exact, but model.layers.0.self_attn.v_proj, which loaders fuse with it, is quantised",
        ),
        (
            {"scheme": "W4A16", "targets": ["re:.*up_proj$"]},
            "model.layers.0.mlp.gate_proj would be left exact, but model.layers.0.mlp.up_proj",
        ),
    ],
)
def test_refusals(entry: Mapping[str, Any], message: str) -> None:
    assert message in refusal(llama(), entry)


def test_refuses_two_schemes_in_one_fused_group() -> None:
    entries = {"scheme": "W4A16", "targets": ["re:.*(q|k)_proj$"]}, {"scheme": "W8A8"}
    assert "v_proj would be left exact" in refusal(llama(), *entries)
    taken = {f"model.layers.{i}.self_attn.{x}_proj": SCHEMES["W4A16"] for i in range(2) for x in "qk"}
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj would be W4A16 by an earlier pass, but .*v_proj"):
        Rtn(RtnParams(scheme="W8A8")).assign(llama(), taken)


def test_refuses_to_split_experts() -> None:
    message = refusal(mixture(), {"scheme": "W4A16", "ignore": ["re:.*experts.3.down_proj"]})
    assert "model.layers.0.mlp.experts.3.down_proj would be left exact" in message
    assert "router of a mixture of experts" in refusal(mixture(), {"scheme": "W8A8", "targets": ["model.layers.0.mlp.gate"]})
    assert len(assign(mixture(), {"scheme": "W4A16", "targets": ["re:.*experts"]})) == 12


def test_a_tied_head_cannot_be_targeted() -> None:
    assert "tied to the embeddings" in refusal(llama(tied=True), {"scheme": "W8A8", "targets": ["lm_head"]})


@pytest.mark.parametrize(
    ("scheme", "shape", "message"),
    [
        ("MXFP4", (64, 48), "a.0.b: 48 columns not divisible by MXFP4's groups of 32"),
        ("NVFP4A16", (64, 24), "a.0.b: 24 columns not divisible by NVFP4A16's groups of 16"),
        ("W4A16", (64, 100), "a.0.b: 100 columns not divisible by groupSize 128; choose -1, or list it under ignore"),
        ("W8A16", (64, 30), "a.0.b: 30 columns do not fill the 32-bit words of W8A16 (multiples of 4 do)"),
        ("W4A16_ASYM", (63, 128), "the zero points of 63 rows do not fill the 32-bit words of W4A16_ASYM (multiples of 8 do)"),
        ("FP8_BLOCK", (64, 192), "a.0.b: 192 columns not divisible by FP8_BLOCK's 128"),
        ("W8A8", (0, 128), "a.0.b: weight [0, 128] is empty"),
    ],
)
def test_refuses_shapes(scheme: str, shape: tuple[int, int], message: str) -> None:
    layout = layout_of([LinearLayout("a.0.b", shape, "BF16")])
    assert message in refusal(layout, {"scheme": scheme})


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC"])
def test_takes_odd_shapes_where_nothing_is_packed(scheme: str) -> None:
    assert assign(layout_of([LinearLayout("a.0.b", (7, 13), "BF16")]), {"scheme": scheme})


def test_blocks_and_what_follows_them() -> None:
    """As vLLM: the rows of every member but the last of a fused matrix, and of all an expert's."""
    assert assign(layout_of(attention(0, rows={"v": 100})), {"scheme": "FP8_BLOCK"})
    message = refusal(layout_of(attention(0, rows={"k": 64})), {"scheme": "FP8_BLOCK"})
    assert "model.layers.0.self_attn.k_proj: 64 rows not divisible by FP8_BLOCK's 128, and loaders put more rows after them" in message
    assert "experts.0.gate_proj: 320 rows not divisible" in refusal(mixture(wide=320), {"scheme": "FP8_BLOCK", "targets": ["re:.*experts"]})
    config = {"num_attention_heads": 4, "num_key_value_heads": 1}
    phi3 = LinearLayout("model.layers.0.self_attn.qkv_proj", (4 * 64 + 2 * 64, 256), "BF16")
    assert "qkv_proj: 64 rows not divisible" in refusal(layout_of([phi3], config=config), {"scheme": "FP8_BLOCK"})
    gate_up = LinearLayout("model.layers.0.mlp.gate_up_proj", (640, 256), "BF16")
    assert "gate_up_proj: 320 rows not divisible" in refusal(layout_of([gate_up]), {"scheme": "FP8_BLOCK"})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"scheme": "W4A61"}, "scheme: Input should be"),
        ({"scheme": "W4A16", "groupsize": 64}, "'groupsize' is not a parameter; did you mean groupSize?"),
        ({"scheme": "W4A16", "groupSize": 0}, "a group has at least one column; use -1 for one scale a channel"),
        ({"scheme": "W4A16", "groupSize": -2}, "groupSize: Input should be greater than or equal to -1"),
        ({"scheme": "W4A16", "groupSize": True}, "groupSize: Input should be a valid integer (got True)"),
        ({"scheme": "W8A8_STATIC", "inputPercentile": "99"}, "inputPercentile: Input should be a valid number (got '99')"),
        ({"scheme": "W4A16", "ignore": ["re:(open"]}, "'re:(open' is not a regular expression"),
        ({"scheme": "W4A16", "targets": []}, "targets: List should have at least 1 item"),
        ({}, "scheme: Field required"),
    ],
)
def test_parameters(entry: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_passes([{"rtn": entry}])
    assert str(caught.value).startswith("passes[0].rtn: ")
    assert message in str(caught.value)


def test_every_parameter_is_described_and_bounded() -> None:
    for name, schema in RtnParams.model_json_schema()["properties"].items():
        assert len(schema["description"]) > 40, name
        if schema.get("type") == "array":
            assert schema["maxItems"] <= 1024
            assert schema["items"]["maxLength"] <= 512


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; from kompressor_worker.passes.rtn import Rtn, RtnParams; import kompressor_worker.formats.compressed_tensors;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
