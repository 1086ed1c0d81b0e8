"""Pruned linears stored by a bitmask: files that compressed-tensors' own functions take apart, sizes known before a weight is read."""

from __future__ import annotations

import json
import shutil
from ctypes import CDLL
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.config import SparsityCompressionConfig
from compressed_tensors.utils import unpack_bitmasks
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_calibrated import compress, job_of
from test_pruning import published

from independent import tensors_of
from kompressor_worker.cli import run_cli
from kompressor_worker.errors import OutputOccupied
from kompressor_worker.formats import bitmask
from kompressor_worker.formats.targets import matches
from kompressor_worker.job import load_job
from kompressor_worker.kernels import bitmask as eager
from kompressor_worker.kernels import build, compiled
from kompressor_worker.layout import LinearLayout
from kompressor_worker.plan import make_plan
from kompressor_worker.sparsity import Sparsity
from models import trained_model

BITMASK = {"sparseStorage": "bitmask"}
WORDS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@pytest.fixture(scope="module")
def lib() -> CDLL:
    if (found := build.library()) is None:
        pytest.skip("no C++ compiler on this machine")
    return found


def sparse(rows: int, columns: int, dtype: torch.dtype, share: float, seed: int) -> torch.Tensor:
    """With zeros, and some that are not to be taken for one: -0.0."""
    chance = torch.Generator().manual_seed(seed)
    weight = torch.randn((rows, columns), generator=chance).to(dtype)
    weight[torch.rand(weight.shape, generator=chance) < share] = 0.0
    weight[torch.rand(weight.shape, generator=chance) < 0.05] *= -0.0
    return weight


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(WORDS[tensor.dtype])


@settings(max_examples=150)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 70), dtype=st.sampled_from(list(WORDS)),
    share=st.sampled_from([0.0, 0.3, 0.5, 0.95, 1.0]), stored=st.floats(0, 1), seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_packed_alike_and_taken_apart_by_the_library(
    lib: CDLL, rows: int, columns: int, dtype: torch.dtype, share: float, stored: float, seed: int
) -> None:
    weight = sparse(rows, columns, dtype, share, seed)
    zeros = bits(weight) == 0
    values = weight.numel() - int(zeros.sum()) + round(stored * int(zeros.sum()))
    left, mask, offsets = compiled.pack_bitmask(lib, weight, values)
    assert len(left) == values
    for made, expected in zip((left, mask, offsets), eager.pack_bitmask(weight, values), strict=True):
        assert made.dtype is expected.dtype and torch.equal(made.view(torch.uint8), expected.view(torch.uint8))

    marked = unpack_bitmasks(mask, [rows, columns])
    dense = torch.zeros_like(weight)
    dense[marked] = left
    assert torch.equal(bits(dense), bits(weight))
    assert torch.equal(offsets, marked.sum(1).cumsum(0) - marked.sum(1))
    gone, there = ~marked.flatten(), zeros.flatten()
    assert not (gone & ~there).any() and int(gone.sum()) == weight.numel() - values
    assert gone.nonzero().flatten().tolist() == there.nonzero().flatten().tolist()[: int(gone.sum())], "not the first zeros"
    for unpack in (eager.unpack_bitmask, lambda *given: compiled.unpack_bitmask(lib, *given)):
        assert torch.equal(bits(unpack(left, mask, columns)), bits(weight))


def test_many_rows_on_many_threads(lib: CDLL) -> None:
    weight = sparse(700, 1027, torch.bfloat16, 0.5, seed=1)
    values = weight.numel() - int((bits(weight) == 0).sum()) + 12_345
    made = compiled.pack_bitmask(lib, weight, values)
    assert all(map(torch.equal, made, eager.pack_bitmask(weight, values)))
    assert torch.equal(bits(compiled.unpack_bitmask(lib, made[0], made[1], 1027)), bits(weight))


def test_contradictions_are_refused(lib: CDLL) -> None:
    weight = sparse(5, 12, torch.bfloat16, 0.5, seed=2)
    zeros = int((bits(weight) == 0).sum())
    left, mask, _ = eager.pack_bitmask(weight, weight.numel() - zeros)
    beside = mask.clone()
    beside[0, 1] |= 0x80  # column 15 of 12
    for pack, unpack in (
        (eager.pack_bitmask, eager.unpack_bitmask),
        (lambda *x: compiled.pack_bitmask(lib, *x), lambda *x: compiled.unpack_bitmask(lib, *x)),
    ):
        with pytest.raises(ValueError, match=rf"^{zeros} zeros, {zeros + 1} are to be left out$"):
            pack(weight, weight.numel() - zeros - 1)
        for damaged in ((left[:-1], mask), (torch.cat([left, left[:1]]), mask), (left, beside)):
            with pytest.raises(ValueError, match="the bitmask marks"):
                unpack(*damaged, 12)


def decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """All weights, those behind a bitmask by the library's unpacking."""
    stored = tensors_of(folder)
    for name in [n.removesuffix(".bitmask") for n in stored if n.endswith(".bitmask")]:
        values, mask, offsets, shape = (stored.pop(f"{name}.{part}") for part in ("compressed", "bitmask", "row_offsets", "shape"))
        marked = unpack_bitmasks(mask, shape.tolist())
        assert offsets.tolist() == [0, *marked.sum(1).cumsum(0).tolist()[:-1]]
        weight = torch.zeros(shape.tolist(), dtype=values.dtype)
        weight[marked] = values
        stored[f"{name}.weight"] = weight
    return stored


PASSES: dict[str, list[dict[str, Any]]] = {
    "wanda 0.7 of every row": [{"wanda": {"sparsity": 0.7}}],  # 256 columns: 179 and not 179.2
    "sparseGPT 2:4, folded": [{"smoothQuant": {}}, {"sparseGPT": {"pattern": "2:4"}}],
    "pruned, then folded": [{"wanda": {"pattern": "1:4"}}, {"smoothQuant": {}}],
    "some quantised": [{"sparseGPT": {"sparsity": 0.5}}, {"gptq": {"scheme": "W4A16", "groupSize": 64, "targets": ["re:.*mlp"]}}],
}


@pytest.mark.parametrize("case", PASSES)
def test_smaller_by_what_the_plan_says_and_the_same_weights(case: str, tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir(), (tmp_path / "sparse").mkdir()
    with_zeros = compress(job_of(tmp_path / "dense", "llama", PASSES[case]))
    job = job_of(tmp_path / "sparse", "llama", PASSES[case], output={"uri": (tmp_path / "sparse/out").as_uri(), **BITMASK})
    plan = make_plan(load_job(job, {}), {}).as_json()
    report = compress(job)
    folder = tmp_path / "sparse/out"
    stored = tensors_of(folder)
    assert sum(t.nbytes for t in stored.values()) == plan["outputBytes"] == report["result"]["tensorBytes"]
    saved = with_zeros["result"]["tensorBytes"] - report["result"]["tensorBytes"]
    assert saved == plan["bitmaskSavedBytes"] == report["result"]["bitmaskSavedBytes"] > 0
    assert len(list(folder.glob("*.safetensors"))) == 1, "not aligned"
    linears = [n.removesuffix(".bitmask") for n in stored if n.endswith(".bitmask")]
    assert linears and set(linears) == set(report["pruned"]) - set(report["linears"])
    assert len(linears) == plan["bitmaskLinears"] == report["result"]["bitmaskLinears"]

    plain, dense = decompressed(folder), published(tmp_path / "dense/out")
    assert plain.keys() == dense.keys()
    assert all(torch.equal(plain[n].view(torch.uint8), dense[n].view(torch.uint8)) for n in dense)
    assert report["evaluation"] == with_zeros["evaluation"]
    assert run_cli(["verify", str(folder)]) == 0


def test_readers_refuse_what_they_cannot_read(tmp_path: Path) -> None:
    """Without the group that it does not know, transformers loads random weights; vLLM refuses sparsity_config.targets."""
    passes = [{"magnitude": {"sparsity": 0.5, "ignore": ["re:.*q_proj"]}}]
    report = compress(job_of(tmp_path, "llama", passes, output={"uri": (tmp_path / "out").as_uri(), **BITMASK}))
    assert any("by a bitmask, which vLLM and transformers do not load" in w and "kompressor expand" in w for w in report["warnings"])
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    with pytest.raises(ValueError, match="run_kompressor_expand_first"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    sparsity = SparsityCompressionConfig.get_value_from_registry("sparse-bitmask")(**config["sparsity_config"])
    for name in published(trained_model("llama")):
        linear = name.removesuffix(".weight")
        assert any(matches(target, linear) for target in sparsity.targets) == (linear in report["pruned"]), linear


def test_the_dense_result_of_a_job_is_not_the_other(tmp_path: Path) -> None:
    passes = [{"magnitude": {"sparsity": 0.5}}]
    compress(job_of(tmp_path, "llama", passes))
    with pytest.raises(OutputOccupied, match="whose sparseStorage is None, this job's is bitmask"):
        compress(job_of(tmp_path, "llama", passes, output={"uri": (tmp_path / "out").as_uri(), **BITMASK}))


def test_more_zeros_than_asked_for(tmp_path: Path) -> None:
    """A source with zeros of its own: the plan knows nothing of them, and the file has the size that it says."""
    source = shutil.copytree(trained_model("llama"), tmp_path / "source")
    tensors = tensors_of(source)
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    weight[::2] = 0.0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    body = json.loads(job_of(tmp_path, "llama", [{"magnitude": {"sparsity": 0.3}}]).read_text())
    body["spec"]["model"]["source"]["uri"] = source.as_uri()
    body["spec"]["output"] |= BITMASK
    (tmp_path / "job.json").write_text(json.dumps(body))
    plan = make_plan(load_job(tmp_path / "job.json", {}), {}).as_json()
    report = compress(tmp_path / "job.json")
    entry = report["pruned"]["model.layers.1.mlp.up_proj"]
    assert entry["zeros"] >= weight.numel() // 2 > round(0.3 * weight.numel()) and report["result"]["tensorBytes"] == plan["outputBytes"]
    assert torch.equal(decompressed(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"], weight), "its own zeros were enough"


def test_only_where_it_saves_something() -> None:
    def values(shape: tuple[int, int], sparsity: Sparsity, dtype: str = "BF16") -> int | None:
        return bitmask.values_of(LinearLayout("x", shape, dtype, pruned=sparsity))

    assert values((4096, 4096), Sparsity.of_pattern("2:4")) == 4096 * 2048
    assert values((4096, 4096), Sparsity(0.06)) is None, "the bits are a sixteenth of the weight"
    assert values((4096, 4096), Sparsity(0.06), "F32") is not None
    assert values((3, 7), Sparsity(0.5)) is None
    assert values((64, 129), Sparsity(0.3)) == -(-(64 * 129 - round(0.3 * 64 * 129)) // 8) * 8
    assert bitmask.values_of(LinearLayout("x", (64, 64), "BF16")) is None


@pytest.mark.parametrize(
    ("passes", "why"),
    [
        ([{"rtn": {"scheme": "W8A16"}}], "nothing is pruned"),
        ([{"magnitude": {"pattern": "2:4"}}, {"rtn": {"scheme": "W8A16"}}], "what is pruned is quantised too, and stored so"),
        ([{"magnitude": {"sparsity": 0.05}}], "it would save nothing"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_it_says_where_it_changes_nothing(passes: list[dict[str, Any]], why: str, tmp_path: Path) -> None:
    job = job_of(tmp_path, "llama", passes, output={"uri": (tmp_path / "out").as_uri(), **BITMASK})
    assert f"output.sparseStorage: bitmask changes nothing here: {why}" in make_plan(load_job(job, {}), {}).as_json()["warnings"]
