"""`kompressor expand`: our results as plain checkpoints, equal to what compressed-tensors decompresses; all of it or nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_calibrated import TOLERANCE, compress, job_of, measured, rows_of
from test_plan_and_verify import flip_in
from test_pruning import published
from test_resume import files_of

import jobs
from independent import decompressed
from jobs import Bucket
from kompressor_api.v1alpha1 import OutputSpec, SourceLocation
from kompressor_worker.cli import run_cli
from kompressor_worker.errors import CorruptSource, Terminated
from kompressor_worker.expand import expand
from kompressor_worker.job import load_job
from kompressor_worker.pipeline import Limits
from kompressor_worker.progress import Progress, Snapshot
from kompressor_worker.run import run
from models import trained_model

W4 = {"scheme": "W4A16", "groupSize": 64}
SCHEMES = [
    *(("llama", scheme) for scheme in ("W8A8", "W8A16", "W4A16", "W4A16_ASYM", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4", "NVFP4A16")),
    *(("qwen3_moe", scheme) for scheme in ("W4A16", "FP8_DYNAMIC")),
]


def round_to(scheme: str, folder: Path, kind: str = "llama") -> Path:
    """A result without data; where it is."""
    body = jobs.manifest(trained_model(kind).as_uri(), (folder / "out").as_uri(), [{"rtn": {"scheme": scheme}}])
    run(load_job(jobs.write(folder / "job.json", body), {}), {}, Progress(), threading.Event())
    return folder / "out"


def is_plain(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that has everything that the model before compression had, in its shapes and dtype, and nothing else."""
    source, tensors = published(trained_model(kind)), published(folder)
    assert {n: (t.dtype, t.shape) for n, t in tensors.items()} == {n: (t.dtype, t.shape) for n, t in source.items()}
    before, after = files_of(trained_model(kind)), files_of(folder)
    assert json.loads(after["config.json"]) == json.loads(before["config.json"])
    carried = {n for n in before if "safetensors" not in n and n != "config.json"}
    assert carried and all(after[n] == before[n] for n in carried)
    return tensors


@pytest.mark.parametrize(("kind", "scheme"), SCHEMES)
def test_tensors_are_those_that_the_library_decompresses(kind: str, scheme: str, tmp_path: Path) -> None:
    result = round_to(scheme, tmp_path, kind)
    assert run_cli(["expand", str(result), str(tmp_path / "plain")]) == 0
    tensors, source = is_plain(tmp_path / "plain", kind), published(trained_model(kind))
    expected = {f"{name}.weight": weight for name, weight, _ in decompressed(result)}
    assert len(expected) == len(json.loads((result / "kompressor.json").read_text())["linears"])
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype) if name in expected else source[name]), name


CASES: dict[str, list[dict[str, Any]]] = {
    "rotate, gptq W4A16": [{"rotate": {}}, {"gptq": W4}],
    "rtn NVFP4A16": [{"rtn": {"scheme": "NVFP4A16"}}],
    "rtn MXFP4": [{"rtn": {"scheme": "MXFP4"}}],
    "rtn FP8_DYNAMIC, kvCache": [{"rtn": {"scheme": "FP8_DYNAMIC"}}, {"kvCache": {"strategy": "head"}}],
    "rtn W8A8_STATIC": [{"rtn": {"scheme": "W8A8_STATIC"}}],
    "sparseGPT 2:4, half of it gptq": [{"sparseGPT": {"pattern": "2:4"}}, {"gptq": {**W4, "targets": ["re:.*self_attn"]}}],
}


@pytest.mark.parametrize("case", CASES)
def test_as_good_as_the_job_said(case: str, tmp_path: Path) -> None:
    """In plain transformers, which knows nothing of compression any more."""
    job = job_of(tmp_path, "llama", CASES[case], output={"uri": (tmp_path / "out").as_uri(), "sparseStorage": "bitmask"})
    said = compress(job)["evaluation"]
    assert run_cli(["expand", str(tmp_path / "out"), str(tmp_path / "plain")]) == 0
    is_plain(tmp_path / "plain", "llama")
    assert measured(tmp_path / "plain", rows_of(job)) == pytest.approx(said["perplexityAfter"], rel=TOLERANCE)
    assert run_cli(["verify", str(tmp_path / "plain")]) == 0


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_bitmask_expands_to_the_bytes_of_the_dense_job(kind: str, tmp_path: Path) -> None:
    folders = {}
    for name, stored in (("dense", {}), ("bitmask", {"sparseStorage": "bitmask"})):
        folders[name] = tmp_path / name
        body = jobs.manifest(trained_model(kind).as_uri(), folders[name].as_uri(), [{"magnitude": {"sparsity": 0.3}}])
        body["spec"]["output"] |= stored
        run(load_job(jobs.write(tmp_path / "job.json", body), {}), {}, Progress(), threading.Event())
    assert run_cli(["expand", str(folders["bitmask"]), str(tmp_path / "plain")]) == 0
    dense, plain = files_of(folders["dense"]), files_of(tmp_path / "plain")
    assert dense.keys() == plain.keys()
    assert sorted(n for n in dense if dense[n] != plain[n]) == ["kompressor.json", "report.html"]


def test_from_bucket_to_bucket_cut_off_and_gone_on_with(bucket: Bucket, tmp_path: Path) -> None:
    """Told to stop after every unit: nothing can be seen until the end, and no unit is read twice."""
    bucket.upload(round_to("W4A16", tmp_path), "result")
    source = SourceLocation(uri=bucket.uri("result"), endpoint=bucket.server.endpoint)
    target = OutputSpec(uri=bucket.uri("plain"), endpoint=bucket.server.endpoint)
    begun: list[int] = []
    for _ in range(20):
        stop, heard = threading.Event(), list[Snapshot]()

        def listener(snapshot: Snapshot, stop: threading.Event = stop, heard: list[Snapshot] = heard) -> None:
            heard.append(snapshot)
            if heard[0].units_done < snapshot.units_done < snapshot.units_total:
                stop.set()

        try:
            done = expand(source, target, bucket.environ, Progress([listener]), stop, Limits(slice=4096, lookahead=1 << 16))
        except Terminated:
            begun.append(heard[0].units_done)
            assert not [n for n in bucket.names("plain") if not n.startswith(".kompressor/")], "readers see something"
        else:
            break
    assert len(begun) > 2 and begun == sorted(set(begun)), "a unit was done again"
    assert done.linears == 28 and not done.already
    assert run_cli(["expand", str(tmp_path / "out"), str(tmp_path / "plain")]) == 0
    cut, whole = bucket.files("plain"), files_of(tmp_path / "plain")
    assert cut.keys() == whole.keys() and bucket.uploads("plain") == []
    assert sorted(n for n in whole if cut[n] != whole[n]) == ["kompressor.json", "report.html"]
    assert expand(source, target, bucket.environ, Progress(), threading.Event()).already


def forget_the_report(folder: Path) -> None:
    (folder / "kompressor.json").unlink()


def lose_a_scale(folder: Path) -> None:
    report = json.loads((folder / "kompressor.json").read_text())
    del report["tensors"]["model.layers.0.mlp.up_proj.weight_scale"]
    (folder / "kompressor.json").write_text(json.dumps(report))


REFUSED: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "foreign": (forget_the_report, 64, "so this is no result of Kompressor; name the output.uri of a job that is Complete"),
    "unfinished": (
        lambda folder: (folder / "config.json").unlink(),
        64,
        "no config.json, so this is no result, or its job has not finished; let it finish first",
    ),
    "of two runs": (lose_a_scale, 65, "'model.layers.0.mlp.up_proj.weight_scale' is not in kompressor.json"),
    "a flipped bit": (lambda folder: flip_in(folder / "model.safetensors"), 65, "is not what was written"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), 65, "tokenizer.json is missing; upload the result again"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_a_whole_result_is_refused(what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    damage, code, says = REFUSED[what]
    result = round_to("W4A16", tmp_path)
    damage(result)
    assert run_cli(["expand", str(result), str(tmp_path / "plain")]) == code
    said = capfd.readouterr().err
    assert says in said and "Traceback" not in said
    assert not (tmp_path / "plain").exists()


def test_a_bitmask_that_contradicts_its_values_is_refused(tmp_path: Path) -> None:
    """Also where the digests agree with it: memory is never read beside the values."""
    from kompressor_worker.layout import SourceTensor, StoredTensor
    from kompressor_worker.tensors import decode

    parts = {"compressed": ("BF16", (3,), 6), "bitmask": ("U8", (2, 1), 2), "row_offsets": ("I64", (2,), 16), "shape": ("I64", (2,), 16)}
    stored = tuple(StoredTensor(f"x.{n}", dtype, shape, "f", 0, size) for n, (dtype, shape, size) in parts.items())
    views = {t.name: memoryview(bytearray(t.nbytes)) for t in stored}
    views["x.bitmask"][:] = b"\xff\xff"
    views["x.shape"][:] = torch.tensor([2, 8]).numpy().tobytes()
    with pytest.raises(CorruptSource, match=r"x\.weight: the bitmask marks 16 of 2 x 8 places.*for 3 values; upload the result again"):
        decode(SourceTensor("x.weight", "BF16", (2, 8), stored, "bitmask"), views)


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("out", "is the source itself"),
        ("out/plain", "lies inside the source"),
        (".", "lies inside the output"),
        ("taken", "that are not ours"),
    ],
)
def test_places_that_cannot_be_written(out: str, says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = round_to("W4A16", tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes.txt").write_text("mine")
    before = files_of(tmp_path)
    assert run_cli(["expand", str(result), str(tmp_path / out)]) == 64
    assert says in capfd.readouterr().err
    assert files_of(tmp_path) == before


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_cli(["expand", "--help"])
    said = capsys.readouterr().out
    assert "kompressor expand s3://" in said and "without quantization_config" in said and "goes on where it was" in said
