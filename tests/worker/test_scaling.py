"""`smoothQuant` and `awq`: scales that leave the function as it is, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from blockwise import compressed, kl, layout_of, logits, prepared
from families import tiny_model

from independent import tensors_of
from kompressor_api.v1alpha1 import Model
from kompressor_worker.block import Fold, Site, Stage
from kompressor_worker.errors import UserError
from kompressor_worker.layout import LinearLayout, StageLayout
from kompressor_worker.passes import Pass, build_passes
from kompressor_worker.passes.awq import Awq, brief
from kompressor_worker.passes.folding import divide_input
from kompressor_worker.statistics import Statistics

FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "phi3",
    "gemma2",
    "gemma3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
]
EXPERTS = ("mlp.gate", "mlp.experts.gate_proj", "mlp.experts.up_proj")
BESIDE = (*EXPERTS, "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", "self_attn.kv_a_layernorm", "self_attn.kv_b_proj")
TOKENS = torch.arange(192).view(4, 48) * 7 % 128
SMOOTH = [{"smoothQuant": {"alpha": 0.6}}]
AWQ = [{"awq": {"scheme": "W4A16", "groupSize": 32, "grid": 4}}]


class Probe(Pass):
    """What is measured of every input, as the pass behind the others finds it, with all experts at once."""

    folds = True
    Params: ClassVar[type[Model]] = Model
    statistics = frozenset({"hessian", "norms", "range", "magnitude"})

    def __init__(self, whole_block: bool = False) -> None:
        self.found: dict[str, Statistics] = {}
        self.whole_block = whole_block

    def apply(self, stage: Stage) -> None:
        for site in stage.sites:
            self.found[f"{stage.layout.name} {site.name}"] = site.statistics


def uneven(folder: Path) -> dict[str, torch.Tensor]:
    """The folder's state with norms and biases that differ from channel to channel."""
    torch.manual_seed(2)
    return {name: t + torch.rand_like(t).pow(4) * 4 if t.dim() == 1 else t for name, t in tensors_of(folder).items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names below the layers, without numbers, of what differs."""
    names = (n for n in before if not torch.equal(before[n], after[n]))
    return {".".join(part for part in n.split(".")[2:] if not part.isdigit()) for n in names}


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """AWQ stops before it rounds."""
    monkeypatch.setattr(Awq, "_clip", lambda *_: None)


@pytest.mark.usefixtures("unrounded")
@pytest.mark.parametrize("entries", [SMOOTH, AWQ], ids=["smoothQuant", "awq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_and_the_statistics_stay_right(family: str, entries: list[dict[str, Any]]) -> None:
    folder = tiny_model(family, dtype="float32")
    before = uneven(folder)
    whole = entries is AWQ
    carried, measured = Probe(whole), Probe(whole)
    after = compressed(folder, entries, TOKENS, before, after=[carried]).state
    reference = logits(folder, before, TOKENS)
    assert (logits(folder, after, TOKENS) - reference).abs().max() < 1e-4 * reference.abs().max()

    compressed(folder, [], TOKENS, after, after=[measured])
    for name, statistics in carried.found.items():
        fresh = measured.found[name]
        for kind in ("hessian", "squares", "low", "high", "magnitude"):
            if (found := getattr(fresh, kind)) is not None:
                torch.testing.assert_close(getattr(statistics, kind), found, rtol=2e-3, atol=2e-4 * float(found.abs().max()))

    moved = changed(before, after)
    feed = "pre_feedforward_layernorm" if family.startswith("gemma") else "post_attention_layernorm"
    expected = {"input_layernorm.weight", f"{feed}.weight"}
    linears = {
        "phi3": ("self_attn.qkv_proj", "mlp.gate_up_proj"),
        "mixtral": ("self_attn.q_proj", "block_sparse_moe.gate", "block_sparse_moe.experts.w1", "block_sparse_moe.experts.w3"),
        "qwen2_moe": ("self_attn.k_proj", *EXPERTS, "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate"),
        "qwen3_moe": ("self_attn.k_proj", *EXPERTS, "mlp.gate_proj"),
        "deepseek_v2": ("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa", *BESIDE, "mlp.gate_proj"),
        "deepseek_v3": ("self_attn.q_a_proj", "self_attn.q_a_layernorm", "self_attn.q_b_proj", *BESIDE, "mlp.up_proj"),
    }.get(family, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"))
    expected |= {f"{name}.weight" for name in linears}
    outputs = {"self_attn.o_proj.weight", "mlp.down_proj.weight", "block_sparse_moe.experts.w2.weight", "mlp.experts.down_proj.weight"}
    assert moved >= expected
    assert bool(moved & outputs) == whole
    assert not whole or "self_attn.o_proj.weight" in moved


def test_what_an_earlier_pass_has_quantised_is_not_scaled() -> None:
    layout = layout_of(tiny_model("llama"))
    with pytest.raises(UserError, match="put smoothQuant before the passes that quantise"):
        prepared(layout, [{"rtn": {"scheme": "W8A8"}}, *SMOOTH])
    attention = {"rtn": {"scheme": "W8A16", "targets": ["re:.*self_attn.[qkv]_proj"]}}
    made = compressed(tiny_model("llama"), [attention, *AWQ], TOKENS)
    notes = made.records[0]["notes"]["model.layers.0.self_attn.o"]["awq"]["left"]
    assert notes == {"model.layers.0.self_attn.o": "model.layers.0.self_attn.v_proj.weight is quantised by an earlier pass"}


def test_sites_without_a_norm_are_named() -> None:
    made = compressed(tiny_model("llama"), SMOOTH, TOKENS)
    left = {name: list(notes["smoothQuant"]["left"]) for name, notes in made.records[0]["notes"].items()}
    assert left == {name: [name] for name in ("model.layers.0.self_attn.o", "model.layers.0.mlp.down")}


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_rounding_of_the_norm_is_made_good_by_its_readers(offset: float) -> None:
    torch.manual_seed(0)
    weights = {
        "norm.weight": torch.cat([torch.randn(62), torch.tensor([-offset, -offset + 1e-3])]).to(torch.bfloat16),
        "q.weight": torch.randn(8, 64),
    }
    x = torch.randn(64, dtype=torch.float64)
    before = (x * (weights["norm.weight"].double() + offset)) @ weights["q.weight"].double().T
    site = Site("qkv", (), ("q.weight",), Statistics(64, ()), Fold("norm.weight", offset))
    divide_input(weights, site, torch.rand(64) * 5 + 0.1)
    after = (x * (weights["norm.weight"].double() + offset)) @ weights["q.weight"].double().T
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert weights["norm.weight"].dtype is torch.bfloat16


def test_a_scale_behind_an_encoded_producer_reaches_its_encoding() -> None:
    """v and up are encoded before the scales of o and down are known: they are close to the original only if they take them too."""
    folder = tiny_model("llama", dtype="float32")
    before = uneven(folder)
    for layer in ("model.layers.0.", "model.layers.1."):
        loud = torch.arange(3, 64, 9)
        before[f"{layer}self_attn.v_proj.weight"][loud] *= 16  # the first of two KV heads, read by the first two of four query heads
        before[f"{layer}self_attn.o_proj.weight"][:, torch.cat([loud, loud + 64])] /= 16
        before[f"{layer}mlp.up_proj.weight"][loud] *= 16
        before[f"{layer}mlp.down_proj.weight"][:, loud] /= 16
    made = compressed(folder, [{"awq": {"scheme": "W8A16", "grid": 4}}], TOKENS, before)
    scaled = {site for notes in made.records[1]["notes"].values() for site in notes["awq"].get("scaled", {})}
    assert {"model.layers.1.self_attn.o", "model.layers.1.mlp.down"} <= scaled
    reference = logits(folder, before, TOKENS)
    assert kl(reference, logits(folder, made.state, TOKENS)) < 1e-4


def test_the_scale_is_the_papers() -> None:
    """max|x|^alpha / max|w|^(1 - alpha), w over all readers but the router; children take it too; channels without input are left."""
    torch.manual_seed(0)
    x = torch.randn(100, 16) * torch.logspace(-2, 2, 16)
    x[:, 3] = 0
    names = ("gate", "e.0", "e.1")
    weights = {f"{name}.weight": torch.randn(8, 16) * 100.0 ** (name == "gate") for name in names} | {"norm.weight": torch.ones(16)}
    largest = torch.maximum(weights["e.0.weight"].abs().amax(0), weights["e.1.weight"].abs().amax(0)).double()
    expected = x.double().abs().amax(0) ** 0.7 / largest**0.3
    expected[3] = 1.0

    def site(name: str, rows: torch.Tensor, linears: tuple[LinearLayout, ...], children: tuple[Site, ...] = ()) -> Site:
        statistics = Statistics(16, {"range"})
        statistics.add(rows)
        return Site(name, linears, tuple(f"{n}.weight" for n in names), statistics, Fold("norm.weight") if children else None, children)

    children = tuple(site(n, x[at::2], (LinearLayout(n, (8, 16), "F32"),)) for at, n in enumerate(("e.0", "e.1")))
    before, high = dict(weights), children[1].statistics.largest.clone()
    (smooth,) = build_passes([{"smoothQuant": {"alpha": 0.7}}])
    stage = Stage(StageLayout("mlp.gate_up", ()), weights, sites=(site("gate", x, (), children), *children))
    smooth.apply(stage)
    torch.testing.assert_close(1 / weights["norm.weight"].double(), expected, rtol=1e-5, atol=0)
    for name in names:
        torch.testing.assert_close(
            (weights[f"{name}.weight"] / before[f"{name}.weight"]).double(), expected.expand(8, 16), rtol=1e-5, atol=0
        )
    torch.testing.assert_close((high / children[1].statistics.largest).nan_to_num(1.0).double(), expected, rtol=1e-5, atol=0)
    assert not stage.notes


def test_many_experts_are_reported_in_few_words() -> None:
    notes = {f"experts.{e}": {"ratio": 0.5, "duo": False, "loss": 0.5} for e in range(20)}
    left = {"experts.20": "no scale lowers the error", "experts.21": "no scale lowers the error"}
    assert brief({"scaled": notes, "left": left}) == {"left": {"no scale lowers the error": 2}, "scaled": {"sites": 20, "loss": 0.5}}
    assert brief({"left": left}) == {"left": left}
