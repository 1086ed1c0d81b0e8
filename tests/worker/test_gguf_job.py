"""Jobs whose result is a GGUF file: what the gguf library reads is what was encoded, what llama.cpp computes is what the job reported, and
a worker that is cut off makes the same bytes."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf.quants import dequantize
from nursery import Nursery
from test_calibrated import compress, job_of, rows_of
from test_calibrated import data as text
from test_calibrated_resume import data
from test_resume import files_of, refuse_other_bytes
from torch import Tensor

import jobs
from corpus import Corpus
from gguf_files import Request, llama_cpp
from independent import tensors_of
from kompressor_api.v1alpha1 import OutputSpec, SourceLocation
from kompressor_worker import kernels
from kompressor_worker.errors import CorruptSource, UserError
from kompressor_worker.expand import expand
from kompressor_worker.job import load_job
from kompressor_worker.plan import make_plan
from kompressor_worker.progress import Progress
from kompressor_worker.verify import verify
from models import save_tokenizer, train_tokenizer, trained_model

LOG_LIKELIHOOD = 0.003
"""Nats a token between llama.cpp, which also rounds what flows to 8 bits, and the job's report."""
LINEARS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
HEADS = {"attn_q": 8, "attn_k": 4}


def gguf_job(folder: Path, kind: str, passes: list[dict[str, Any]], output: Mapping[str, Any] | None = None, **spec: Any) -> Path:
    """Judged on a few rows."""
    spec |= {"output": {"uri": (folder / "out").as_uri(), "format": "gguf", **(output or {})}}
    return job_of(folder, kind, passes, evaluation={**text(folder, kind)["evaluation"], "samples": 16}, **spec)


def read(folder: Path) -> dict[str, tuple[str, Tensor]]:
    """Type and values of every tensor in a result's files, by its name there."""
    tensors = (t for file in sorted(folder.glob("*.gguf")) for t in gguf.GGUFReader(file).tensors)
    return {t.name: (t.tensor_type.name, torch.from_numpy(dequantize(t.data, t.tensor_type).copy())) for t in tensors}


def paired(weight: Tensor, heads: int) -> Tensor:
    """Rows of a head, half a head apart in the file of the source, side by side."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def rounded(weight: Tensor, kind: str) -> Tensor:
    return kernels.gguf_dequantize(kernels.gguf_quantize(weight, kind)[0], kind, weight.shape[1], torch.float32)


def test_llama(tmp_path: Path) -> None:
    """Without data: every tensor of the file, and what llama.cpp makes of them beside transformers' arithmetic in the job's evaluation."""
    job = without_data(gguf_job(tmp_path, "llama", [{"rtn": {"scheme": "Q4_K", "ignore": ["lm_head"]}}], {"name": "small.gguf"}))
    report = compress(job)
    assert [file.name for file in (tmp_path / "out").glob("*.gguf")] == ["small.gguf"]
    assert report["result"]["quantizedLinears"] == 4 * 7 + 1
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    found, source = read(tmp_path / "out"), tensors_of(trained_model("llama"))
    for layer in range(4):
        for theirs, name in LINEARS.items():
            expected = rounded(source.pop(f"model.layers.{layer}.{theirs}.weight"), "Q4_K")
            kind, values = found.pop(f"blk.{layer}.{name}.weight")
            assert kind == "Q4_K" and torch.equal(values, paired(expected, HEADS[name]) if name in HEADS else expected), name
        for theirs, name in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")):
            kind, values = found.pop(f"blk.{layer}.{name}.weight")
            assert kind == "F32" and torch.equal(values, source.pop(f"model.layers.{layer}.{theirs}.weight").float())
    kind, values = found.pop("token_embd.weight")
    assert kind == "Q4_K" and torch.equal(values, rounded(source.pop("model.embed_tokens.weight"), "Q4_K"))
    for theirs, name, kind in (("lm_head", "output", "BF16"), ("model.norm", "output_norm", "F32")):
        assert found[f"{name}.weight"][0] == kind and torch.equal(found.pop(f"{name}.weight")[1], source.pop(f"{theirs}.weight").float())
    assert not found and not source
    judged(tmp_path / "out" / "small.gguf", job, report)


def without_data(job: Path) -> Path:
    body = json.loads(job.read_text())
    del body["spec"]["calibration"]
    return jobs.write(job, body)


def test_data_says_which_errors_count(tmp_path: Path) -> None:
    """Rounded to nearest in the mix that llama.cpp calls Q2_K: weighted with what the layers are given, less is lost."""
    lost = []
    for folder, prepared in ((tmp_path / "blind", without_data), (tmp_path / "seeing", lambda job: job)):
        folder.mkdir()
        lost.append(compress(prepared(gguf_job(folder, "qwen3", [{"rtn": {"scheme": "Q2_K"}}])))["evaluation"]["kl"])
        kinds = {name: kind for name, (kind, _) in read(folder / "out").items()}
        asked = ("blk.0.attn_v.weight", "blk.0.attn_q.weight", "blk.3.ffn_down.weight", "token_embd.weight")
        assert [kinds[name] for name in asked] == ["Q3_K", "Q2_K", "Q3_K", "Q6_K"]
    assert lost[1] < 0.97 * lost[0]


@pytest.mark.parametrize("kind", ["llama_learned", "qwen3_moe"])
def test_types_by_tensor_under_a_budget(kind: str, tmp_path: Path) -> None:
    """Types that `autoScheme` chooses: within the bytes of Q4_K everywhere, and where columns fit its blocks less is lost."""
    lost, beside = {}, kind == "llama_learned"
    asked = {"budget": {"bits": 4.5 if beside else 5.2}, "candidates": ["Q3_K", "Q4_K", "Q6_K"], "samples": 0}
    uniform = {"uniform": {"gptq": {"scheme": "Q4_K", "ignore": ["lm_head"]}}} if beside else {}
    for name, entry in (uniform | {"chosen": {"autoScheme": asked}}).items():
        (tmp_path / name).mkdir()
        job = gguf_job(tmp_path / name, kind, [entry], {"name": "small.gguf"})
        report = compress(job)
        lost[name] = report["evaluation"]["kl"]
    kinds = {name: kind for name, (kind, _) in read(tmp_path / "chosen" / "out").items() if name.endswith("weight") and "norm" not in name}
    assert kinds.pop("token_embd.weight") == kinds.pop("output.weight") == "Q6_K"
    assert len(set(kinds.values()) & {"Q3_K", "Q4_K", "Q6_K"}) > 1
    assert report["autoScheme"]["bytes"] <= report["autoScheme"]["budgetBytes"]
    assert report["autoScheme"]["bytes"] == report["result"]["tensorBytes"]
    judged(tmp_path / "chosen" / "out" / "small.gguf", job, report)
    assert not beside or lost["chosen"] < lost["uniform"]


def judged(file: Path, job: Path, report: Mapping[str, Any]) -> None:
    rows = rows_of(job)
    answers = llama_cpp([Request(file, row.tolist()) for row in rows], job.parent)
    logits = torch.stack([torch.from_numpy(found) for found, _ in answers])[:, :-1]
    measured = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
    assert abs(measured - math.log(report["evaluation"]["perplexityAfter"])) < LOG_LIKELIHOOD
    assert report["evaluation"]["kl"] > 0


@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        ("llama", [{"rotate": {}}, {"gptq": {"scheme": "Q4_0"}}]),
        ("llama", [{"pruneLayers": {"layers": 1}}, {"rtn": {"scheme": "Q6_K"}}]),
        ("qwen3_moe", [{"pruneExperts": {"experts": 6}}, {"rtn": {"scheme": "MXFP4"}}]),
    ],
)
def test_composed(tmp_path: Path, kind: str, passes: list[dict[str, Any]]) -> None:
    """What other passes have made of the model."""
    job = gguf_job(tmp_path, kind, passes)
    report = compress(job)
    judged(next((tmp_path / "out").glob("*.gguf")), job, report)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A mixture in Q8_0 behind smoothing, in several files: their folder, the job, its report."""
    folder = tmp_path_factory.mktemp("mixture")
    job = gguf_job(folder, "qwen3_moe", [{"smoothQuant": {}}, {"gptq": {"scheme": "Q8_0"}}], {"maxFileBytes": 1 << 20})
    return folder / "out", job, compress(job)


def test_mixture(mixture: tuple[Path, Path, dict[str, Any]]) -> None:
    """Stacks of experts, made expert by expert; the first of the files names the others."""
    folder, job, report = mixture
    files = sorted(file.name for file in folder.glob("*.gguf"))
    assert len(files) > 2 and files[0] == f"model-Q8_0-00001-of-{len(files):05d}.gguf"
    assert not (folder / "model.safetensors.index.json").exists()
    found = read(folder)
    gates = found["blk.0.ffn_gate_exps.weight"]
    assert gates[0] == "Q8_0" and gates[1].shape == (8, 128, 256)
    assert found["blk.0.ffn_gate_inp.weight"][0] == "F32"
    whole = {name for name, entry in report["linears"].items() if entry["scheme"] == "Q8_0"}
    assert {"model.embed_tokens", "lm_head", "model.layers.3.mlp.experts.7.down_proj"} <= whole
    judged(folder / files[0], job, report)


def test_verified_by_ranges(mixture: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _, report = mixture
    seen = verify(str(folder), None, None, {})
    assert seen["tensors"] == seen["digests"] == len(report["tensors"]) and seen["quantizedLinears"] == len(report["linears"])
    with pytest.raises(UserError, match=r"a GGUF file, which llama\.cpp reads as it is"):
        expand(SourceLocation(uri=folder.as_uri()), OutputSpec(uri=(tmp_path / "x").as_uri()), {}, Progress(), threading.Event())
    number, start, stop, _ = report["gguf"]["places"]["model.layers.2.mlp.experts.5.up_proj.weight"]
    for at, says in (
        (stop - 1, r"experts\.5\.up_proj\.weight in .* is not what was written"),
        (20, r"the header of .* is not what was written"),
    ):
        damaged = files_of(folder)
        name = report["gguf"]["files"][number]["name"]
        damaged[name] = damaged[name][:at] + bytes([damaged[name][at] ^ 1]) + damaged[name][at + 1 :]
        copy = tmp_path / str(at)
        copy.mkdir()
        for each, content in damaged.items():
            (copy / each).write_bytes(content)
        with pytest.raises(CorruptSource, match=says):
            verify(str(copy), None, None, {})
    assert start < stop


def test_planned_to_the_byte(mixture: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _, report = mixture
    job = gguf_job(tmp_path, "qwen3_moe", [{"smoothQuant": {}}, {"gptq": {"scheme": "Q8_0"}}], {"maxFileBytes": 1 << 20})
    plan = make_plan(load_job(job, {}), {}).as_json()
    assert plan["outputBytes"] == report["result"]["tensorBytes"]
    assert plan["shards"] == len(list(folder.glob("*.gguf")))
    experts = 8 * 128 * 256 // 32 * 34
    assert experts < plan["scratchBytes"] < 2 * experts  # of a layer's three stacks, those that come after the first


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve thin blocks of four experts each, tied embeddings, and a tokenizer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 12, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True,
        "tie_word_embeddings": True,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("thin")
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, vocab_size=512)).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(train_tokenizer(Corpus(0), 512), folder)
    return folder


@pytest.mark.parametrize("rows", [0, 2, 150])
def test_killed_and_gone_on(nursery: Nursery, thin: Path, tmp_path: Path, rows: int) -> None:
    """Without data, from snapshots, and from blocks that are published already."""

    def job(out: str) -> Path:
        body = jobs.manifest(thin.as_uri(), (tmp_path / out).as_uri(), [{"rtn": {"scheme": "Q4_0"}}])
        body["spec"]["output"] |= {"format": "gguf", "maxFileBytes": 1 << 20}
        if rows:
            dataset = {"uri": data(tmp_path / f"evaluation-{rows}.jsonl", rows, 24, 2), "tokens": "ids"}
            body["spec"]["evaluation"] = {"dataset": dataset, "samples": rows, "sequenceLength": 24}
        return jobs.write(tmp_path / f"{out}.json", body)

    code, said = nursery.run(job("whole"))
    assert code == 0, said
    refuse_other_bytes(nursery, job, 6, rows)


Q4_K = {"rtn": {"scheme": "Q4_K"}}


@pytest.mark.parametrize(
    ("passes", "output", "says"),
    [
        ([{"rtn": {"scheme": "W4A16"}}], {}, "W4A16: no type of GGUF files"),
        ([Q4_K], {"format": "compressed-tensors"}, "Q4_K: a type of GGUF files alone; set output.format gguf"),
        ([{"rtn": {"scheme": "Q4_K", "groupSize": 32}}], {}, "groupSize 32 with scheme Q4_K, whose groups are fixed"),
        ([Q4_K, {"kvCache": {}}], {}, r"passes\[1\].kvCache: a GGUF file holds no scales of a cache"),
        (
            [{"gptq": {"scheme": "Q4_0"}}, {"distil": {}}], {},
            r"passes\[0\].gptq: passes\[1\].distil chooses the codes of a GGUF file by itself, .*; put rtn with this scheme in its place",
        ),
        ([Q4_K, {"recover": {}}, {"distil": {}}], {}, r"passes\[1\].recover: passes\[2\].distil rounds weights anew, .* or leave it out"),
        ([Q4_K], {"format": "compressed-tensors", "name": "a.gguf"}, "name and maxFileBytes are of GGUF; set format: gguf"),
        ([Q4_K], {"sparseStorage": "bitmask"}, "GGUF knows no sparseStorage: bitmask"),
        ([{"rtn": {"scheme": "Q8_0", "ignore": ["re:.*experts.3.up_proj"]}}], {}, r"experts\.3\.up_proj would be left exact, but"),
    ],
)  # fmt: skip
def test_refused_from_headers(tmp_path: Path, passes: list[dict[str, Any]], output: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_plan(load_job(gguf_job(tmp_path, "qwen3_moe", passes, output), {}), {})


def test_rows_that_are_no_whole_blocks(thin: Path, tmp_path: Path) -> None:
    """64 columns: llama.cpp takes Q5_0 where Q4_K was asked for, and so does the job, which says so."""
    body = jobs.manifest(thin.as_uri(), (tmp_path / "out").as_uri(), [Q4_K])
    body["spec"]["output"] |= {"format": "gguf"}
    report = compress(jobs.write(tmp_path / "job.json", body))
    assert report["linears"].pop("model.embed_tokens")["scheme"] == "Q8_0", "the head, too: in place of Q6_K"
    assert {entry["scheme"] for entry in report["linears"].values()} == {"Q5_0"}
    assert any("64 columns are no whole blocks of Q4_K, so they are in Q5_0" in warning for warning in report["warnings"])
