"""Everything that can be wrong with a job or a checkpoint: one clear error, the right exit code, nothing published."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nursery import Nursery
from safetensors.torch import load_file, save_file

import jobs
from jobs import Bucket
from kompressor_worker.cli import run_cli

Said = tuple[int, str]
Run = Callable[..., Said]


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks in two shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("small")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="300KB")
    return folder


@pytest.fixture
def model(small: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    shutil.copytree(small, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def attempt(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a job from `model` to a folder, in this process."""

    def run(model: Path, passes: list[dict[str, Any]] = jobs.RTN_W4, change: Callable[[dict[str, Any]], None] | None = None) -> Said:
        body = jobs.manifest(model.as_uri(), (tmp_path / "out").as_uri(), passes)
        if change:
            change(body)
        code = run_cli(["run", str(jobs.write(tmp_path / "job.json", body))])
        return code, capfd.readouterr().err

    return run


def refused(said: Said, code: int, *words: str) -> None:
    assert said[0] == code, said[1]
    error = said[1].strip().splitlines()[-1]
    for word in words:
        assert word in error, f"{word!r} is not in: {error}"


def unpublished(tmp_path: Path) -> None:
    assert not (tmp_path / "out").exists(), "something was published"


def shard_with(model: Path, tensor: str) -> Path:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    return model / index["weight_map"][tensor]


def test_missing_shard(model: Path, attempt: Run, tmp_path: Path) -> None:
    victim = shard_with(model, "model.layers.1.mlp.up_proj.weight")
    victim.unlink()
    refused(attempt(model), 65, "CorruptSource", victim.name)
    unpublished(tmp_path)


def test_truncated_shard(model: Path, attempt: Run, tmp_path: Path) -> None:
    victim = shard_with(model, "model.layers.1.mlp.up_proj.weight")
    victim.write_bytes(victim.read_bytes()[:-100])
    refused(attempt(model), 65, "CorruptSource", victim.name, "truncated")
    unpublished(tmp_path)


def test_index_names_a_missing_tensor(model: Path, attempt: Run, tmp_path: Path) -> None:
    index = model / "model.safetensors.index.json"
    body = json.loads(index.read_text())
    body["weight_map"]["model.layers.1.mlp.extra.weight"] = body["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(body))
    refused(attempt(model), 65, "CorruptSource", "model.layers.1.mlp.extra.weight")
    unpublished(tmp_path)


def test_overlapping_offsets(model: Path, attempt: Run, tmp_path: Path) -> None:
    victim = shard_with(model, "model.layers.0.mlp.up_proj.weight")
    data = victim.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][0])
    first, second = header[names[0]], header[names[1]]
    size = second["data_offsets"][1] - second["data_offsets"][0]
    second["data_offsets"] = [first["data_offsets"][1] - 2, first["data_offsets"][1] - 2 + size]
    text = json.dumps(header).encode()
    victim.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refused(attempt(model), 65, "CorruptSource", victim.name, "overlap")
    unpublished(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC"])
def test_nan_or_inf(model: Path, attempt: Run, tmp_path: Path, tensor: str, value: float, scheme: str) -> None:
    victim = shard_with(model, tensor)
    tensors = load_file(victim)
    tensors[tensor].view(-1)[7] = value
    save_file(tensors, victim, metadata={"format": "pt"})
    refused(attempt(model, [{"rtn": {"scheme": scheme}}]), 66, "BadNumerics", tensor)
    unpublished(tmp_path)


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ([{"rtn": {"scheme": "W4A16", "groupSize": 96}}], ["96", "128", "groupSize"]),
        ([{"rtn": {"scheme": "W5A16"}}], ["W5A16", "W4A16"]),
        ([{"rtn": {"scheme": "W4A16", "grupSize": 64}}], ["grupSize", "groupSize"]),
        ([{"rnt": {"scheme": "W4A16"}}], ["rnt", "rtn"]),
        ([{"rtn": {"scheme": "W4A16", "targets": ["re:.*nothing.*"]}}], ["nothing"]),
        ([{"rtn": {"scheme": "W4A16", "groupSize": 64}, "extra": {}}], ["passes.0"]),
        ([], ["passes"]),
    ],
)
def test_impossible_passes(small: Path, attempt: Run, tmp_path: Path, passes: list[dict[str, Any]], words: list[str]) -> None:
    refused(attempt(small, passes), 64, "InvalidSpec", *words)
    unpublished(tmp_path)


def test_misspelt_field(small: Path, attempt: Run, tmp_path: Path) -> None:
    refused(attempt(small, change=lambda b: b["spec"].update(retries={"limit": 1})), 64, "spec.retries", "did you mean retry?")
    unpublished(tmp_path)


def test_output_is_the_source(small: Path, attempt: Run) -> None:
    refused(attempt(small, change=lambda b: b["spec"]["output"].update(uri=small.as_uri() + "/")), 64, "is the source itself")


@pytest.mark.parametrize("inside", ["output", "source"])
def test_one_inside_the_other(model: Path, attempt: Run, tmp_path: Path, inside: str) -> None:
    """A result inside the source would become part of it, and the other way round."""
    outer, inner = model.as_uri(), model.as_uri() + "/w4"
    source, output = (outer, inner) if inside == "output" else (inner, outer)

    def change(body: dict[str, Any]) -> None:
        body["spec"]["model"]["source"]["uri"] = source
        body["spec"]["output"]["uri"] = output

    refused(attempt(model, change=change), 64, "lies inside")


def test_output_holds_something_else(small: Path, attempt: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused(attempt(small), 64, "OutputOccupied", "notes.txt")
    assert [p.name for p in out.iterdir()] == ["notes.txt"]


def test_output_holds_another_result(small: Path, attempt: Run, tmp_path: Path) -> None:
    assert attempt(small)[0] == 0
    before = (tmp_path / "out" / "config.json").read_bytes()
    refused(attempt(small, [{"rtn": {"scheme": "W8A8"}}]), 64, "OutputOccupied", "passes")
    assert (tmp_path / "out" / "config.json").read_bytes() == before
    assert attempt(small)[0] == 0, "the same job again is done at once"


def test_no_checkpoint_there(tmp_path: Path, attempt: Run) -> None:
    (tmp_path / "empty").mkdir()
    said = attempt(tmp_path / "empty")
    assert said[0] == 64, said
    refused(attempt(tmp_path / "nowhere"), 64, "SourceNotFound", "nowhere")


def test_missing_bucket_and_denied_credentials(nursery: Nursery, bucket: Bucket, small: Path, tmp_path: Path) -> None:
    endpoint = bucket.server.endpoint
    bucket.upload(small, "source")
    good = bucket.environ

    def said(source: str, output: str, environ: dict[str, str]) -> Said:
        job = jobs.write(tmp_path / "j.json", jobs.manifest(source, output, endpoint=endpoint))
        return nursery.run(job, environ)

    refused(said("s3://no-such-bucket-here/x", bucket.uri("out"), good), 64, "SourceNotFound", "no-such-bucket-here")
    refused(said(bucket.uri("source"), "s3://no-such-bucket-here/x", good), 64, "OutputNotFound", "no-such-bucket-here")
    wrong = {**good, "SOURCE_AWS_SECRET_ACCESS_KEY": "wrong"}
    refused(said(bucket.uri("source"), bucket.uri("out"), wrong), 64, "AccessDenied", "source")
    wrong = {**good, "OUTPUT_AWS_ACCESS_KEY_ID": "nobody"}
    refused(said(bucket.uri("source"), bucket.uri("out"), wrong), 64, "AccessDenied", "out")
    assert bucket.names("out") == []


def test_no_room_for_the_result_is_known_before_a_weight_is_read(small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root, and a kernel that lets it")
    try:
        job = jobs.write(tmp_path / "job.json", jobs.manifest(small.as_uri(), (disk / "a" / "out").as_uri(), jobs.RTN_W4))
        for command in ("plan", "run"):
            assert run_cli([command, str(job)]) == 74
            said = capfd.readouterr().err.strip().splitlines()[-1]
            assert "NoSpaceLeft" in said
            assert "are free; enlarge the volume" in said
        assert list(disk.iterdir()) == [], "it was known before anything was written"
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("command", ["plan", "run"])
def test_an_error_for_programs(tmp_path: Path, small: Path, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    job = jobs.write(tmp_path / "job.json", jobs.manifest(small.as_uri(), (tmp_path / "out").as_uri(), [{"rtn": {"scheme": "W5"}}]))
    assert run_cli([command, str(job), "--json"]) == 64
    error = json.loads(capfd.readouterr().out)["error"]
    assert error["reason"] == "InvalidSpec"
    assert error["exitCode"] == 64
    assert "W5" in error["message"]
