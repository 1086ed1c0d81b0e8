"""What is published beside the weights: config.json without another quantisation, the source's other files, large ones in pieces."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
from fault_server import FaultServer

import jobs
from jobs import Bucket
from kompressor_worker.cli import run_cli
from kompressor_worker.publish import CHUNK
from kompressor_worker.storage import staging

MANIFESTS = {
    "cut JSON": ("job.json", b'{"kind": "CompressionJob",', "is not JSON"),
    "no text": ("job.yaml", b"\xff\xfe\x00\x01", "is not text"),
    "bad YAML": ("job.yaml", b"kind: [CompressionJob", "is not YAML"),
    "a list": ("job.json", b"[1]", "is not a manifest"),
    "metadata": ("job.json", b'{"apiVersion": "kompressor.io/v1alpha1", "kind": "CompressionJob", "metadata": [1]}', "metadata"),
    "a number for a name": ("job.yaml", b'{apiVersion: kompressor.io/v1alpha1, kind: CompressionJob, metadata: {name: 7}}', "7"),
}  # fmt: skip


@pytest.mark.parametrize("case", MANIFESTS)
def test_what_is_no_manifest(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name, text, word = MANIFESTS[case]
    (tmp_path / name).write_bytes(text)
    for command in ("plan", "run"):
        assert run_cli([command, str(tmp_path / name)]) == 64
        said = capfd.readouterr().err
        assert "InvalidSpec" in said
        assert word in said
        assert name in said


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint with all that people put beside weights."""
    folder = tmp_path / "model"
    shutil.copytree(families.fp8_block_model(families.tiny_model("llama")), folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional").mkdir()
    (folder / "additional" / "template.jinja").write_text("{{ tools }}")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"old")
    (folder / "vectors.npy").write_bytes(bytes(range(256)) * (2 * CHUNK // 256) + b"the end")
    return folder


@pytest.mark.parametrize("where", ["file", "s3"])
def test_other_files(where: str, model: Path, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "s3":
        bucket.upload(model, "model")
        body = jobs.manifest(bucket.uri("model"), bucket.uri("out"), [{"rtn": {"scheme": "W8A16"}}], bucket.server.endpoint)
    else:
        body = jobs.manifest(model.as_uri(), (tmp_path / "out").as_uri(), [{"rtn": {"scheme": "W8A16"}}])
    for name, value in bucket.environ.items():
        monkeypatch.setenv(name, value)
    assert run_cli(["run", str(jobs.write(tmp_path / "job.json", body))]) == 0
    out = bucket.download("out", tmp_path / "out") if where == "s3" else tmp_path / "out"
    for name in ("chat_template.jinja", "additional/template.jinja", "generation_config.json", "vectors.npy"):
        assert (out / name).read_bytes() == (model / name).read_bytes(), name
    assert not (out / "pytorch_model.bin").exists()
    assert not (out / "original").exists()
    report = json.loads((out / "kompressor.json").read_text())
    assert set(report["files"]) == {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert run_cli(["verify", str(out)]) == 0
    if where == "s3":
        assert run_cli(["verify", bucket.uri("out"), "--endpoint", bucket.server.endpoint]) == 0


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("inner", [False, True])
def test_nothing_is_left_of_the_sources_quantisation(key: str, inner: bool, model: Path, tmp_path: Path) -> None:
    """FP8 in, INT8 out: a reader that found both descriptions would decode the weights a second time."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    described = config.pop("quantization_config")
    if inner:
        text = {k: config[k] for k in list(config) if k not in ("architectures", "model_type", "transformers_version")}
        config = {"architectures": config["architectures"], "model_type": "wrapped", "text_config": {**text, "model_type": "llama"}}
        config["text_config"][key] = described
    else:
        config[key] = described
    (model / "config.json").write_text(json.dumps(config))
    body = jobs.manifest(model.as_uri(), (tmp_path / "out").as_uri(), [{"rtn": {"scheme": "W8A16"}}])
    assert run_cli(["run", str(jobs.write(tmp_path / "job.json", body))]) == 0
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made["quantization_config"]["quant_method"] == "compressed-tensors"
    assert not {"quantization_config", "compression_config"} & set(made.get("text_config", {}))
    assert "compression_config" not in made


LAST = {
    "listing uploads": ("GET", "uploads&"),
    "aborting an upload": ("DELETE", "uploadId"),
    "listing working objects": ("GET", "prefix=out%2F.kompressor%2F"),
    "deleting them": ("DELETE", "units/00001"),
}  # fmt: skip


@pytest.mark.parametrize("request_", LAST)
def test_cut_off_while_clearing_up(request_: str, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is published, its worker is gone before all else is: the next one finds it done, and clears up."""
    bucket.upload(families.tiny_model("llama"), "model")
    client = bucket.server.client()
    client.create_multipart_upload(Bucket=bucket.name, Key="out/model.safetensors")  # of a worker that was killed before its first commit
    for name, value in {**bucket.environ, "KOMPRESSOR_STORAGE_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    with FaultServer(bucket.server.endpoint) as proxy:
        body = jobs.manifest(bucket.uri("model"), bucket.uri("out"), [{"rtn": {"scheme": "W8A16"}}], proxy.endpoint)
        job = jobs.write(tmp_path / "job.json", body)
        method, path = LAST[request_]
        proxy.inject("drop", method=method, path=path)
        assert run_cli(["run", str(job)]) == 74
        published = set(bucket.names("out"))
        assert "config.json" in published and ".kompressor/journal.json" in published
        assert run_cli(["run", str(job)]) == 0
    assert set(bucket.names("out")) == {name for name in published if not name.startswith(".kompressor/")}
    assert bucket.uploads("out") == []


def test_cut_off_while_clearing_up_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[Path] = []

    def rmtree(folder: Path) -> None:
        if removed:
            raise OSError("gone")
        removed.append(folder)
        shutil.rmtree(folder)

    body = jobs.manifest(families.tiny_model("llama").as_uri(), (tmp_path / "out").as_uri(), [{"rtn": {"scheme": "W8A16"}}])
    job = jobs.write(tmp_path / "job.json", body)
    with monkeypatch.context() as patched:
        patched.setattr(staging, "shutil", SimpleNamespace(rmtree=rmtree))
        assert run_cli(["run", str(job)]) != 0
    assert (tmp_path / ".out.kompressor").exists()
    assert run_cli(["run", str(job)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.json", "out"]


def test_memory_that_is_refused_is_said(tmp_path: Path) -> None:
    """A container's or a shell's limit on addresses: exit code 71, so that the next attempt holds less."""
    code = """
import mmap, sys
import kompressor_worker.pipeline as pipeline
from kompressor_worker.cli import run_cli
def refused(self, size):
    return mmap.mmap(-1, 1 << 62)
pipeline.Buffers.take = refused
sys.exit(run_cli(["run", sys.argv[1]]))
"""
    body = jobs.manifest(families.tiny_model("llama").as_uri(), (tmp_path / "out").as_uri(), [{"rtn": {"scheme": "W8A16"}}])
    job = jobs.write(tmp_path / "job.json", body)
    done = subprocess.run([sys.executable, "-c", code, str(job)], capture_output=True, text=True, check=False)
    assert done.returncode == 71, done.stderr
    assert "OutOfMemory" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
