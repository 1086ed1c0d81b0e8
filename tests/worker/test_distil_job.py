"""Jobs whose last pass trains, as whole jobs: what is published loads elsewhere, and says what the job says of it."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from untrained import STEPS, untrain

import jobs
from calibrated_jobs import evaluation_rows, samples, write_data
from kompressor_worker import plan
from kompressor_worker.errors import CorruptSource, NoSpaceLeft, UserError
from kompressor_worker.job import load_job
from kompressor_worker.plan import make_plan
from kompressor_worker.progress import Progress, Snapshot
from kompressor_worker.run import Summary, run
from kompressor_worker.storage.files import FileOutput
from kompressor_worker.training_estimate import BLOCK_SECONDS
from models import perplexity

DISTIL = {"distil": {"sequenceLength": 128, "batch": 8, "validationRows": 4}}
STUDENTS: dict[str, list[dict[str, Any]]] = {
    "narrower": [{"pruneWidth": {"ratio": 0.25}}],
    "shallower": [{"pruneLayers": {"layers": 3}}],
    "2:4": [{"sparseGPT": {"pattern": "2:4"}}],
    "gptq": [{"gptq": {"scheme": "W4A16", "groupSize": 64}}, {"kvCache": {"scheme": "FP8"}}],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {section: path.as_uri() for section, path in write_data(tmp_path_factory.mktemp("data"), "llama", 32).items()}


def job_of(folder: Path, source: Path, data: Mapping[str, str], passes: Sequence[Mapping[str, Any]], out: str = "out") -> Path:
    body = jobs.manifest(source.as_uri(), (folder / out).as_uri(), passes)
    body["spec"] |= samples(dict(data), 16)
    return jobs.write(folder / f"{out}.json", body)


def done(job: Path, seen: list[Snapshot] | None = None) -> Summary:
    return run(load_job(job, {}), {}, Progress([] if seen is None else [seen.append]), threading.Event())


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_student_that_is_left_as_it_is(
    kind: str, trained_llama: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three phases, and no training: what is published is, byte for byte, what the same passes publish by themselves."""
    untrain(monkeypatch)
    seen: list[Snapshot] = []
    summary = done(job_of(tmp_path, trained_llama, data, [*STUDENTS[kind], DISTIL]), seen)
    alone = done(job_of(tmp_path, trained_llama, data, STUDENTS[kind], "alone"))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    assert summary.report["evaluation"] == alone.report["evaluation"] == summary.report["distillation"]["before"]
    assert summary.report["distillation"]["recovered"]["kl"] == 0
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert [s.percent for s in seen] == sorted(s.percent for s in seen), "back again"
    assert [s.step.step for s in seen if s.step is not None] == [*range(1, STEPS + 1)]
    assert done(tmp_path / "out.json").already


def test_what_is_published_loads_with_the_same_perplexity(
    trained_llama: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    untrain(monkeypatch)
    job = job_of(tmp_path, trained_llama, data, [{"pruneWidth": {"ratio": 0.25}}, {"rtn": {"scheme": "W8A8"}}, DISTIL])
    report = done(job).report
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert perplexity(model, evaluation_rows(job)) == pytest.approx(report["evaluation"]["perplexityAfter"], rel=5e-3)
    written = json.loads((tmp_path / "out" / "kompressor.json").read_text())
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Loss by step" in page and "Before training" in page
    assert all((tmp_path / "out" / name).is_file() for name in written["files"]) and any("tfevents" in name for name in written["files"])
    assert written["distillation"]["steps"] == STEPS and written["data"]["training"]["samples"] >= 8


def test_room_for_the_training_is_asked_for(
    trained_llama: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the disk where it is most: a student, and three checkpoints, since no step is better than none."""
    asked = {"steps": 2, "learningRate": 0.5, "evaluateEvery": 1, "checkpointEvery": 0}
    job = job_of(tmp_path, trained_llama, data, [{"pruneWidth": {"ratio": 0.25}}, {"distil": {**DISTIL["distil"], **asked}}])
    free, peak = 0, 0
    monkeypatch.setattr(FileOutput, "room", lambda output: free)
    with pytest.raises(NoSpaceLeft, match="enlarge the volume") as caught:
        make_plan(load_job(job, {}), {})
    needed = sum(
        int(found.replace(",", "")) for found in re.findall(r"takes ([\d,]+) bytes, the training ([\d,]+) beside", str(caught.value))[0]
    )
    free = needed - 1
    with pytest.raises(NoSpaceLeft):
        done(job)
    free = needed
    delete, publish = FileOutput.delete, FileOutput.publish

    def look() -> None:
        nonlocal peak
        peak = max(peak, sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))

    monkeypatch.setattr(FileOutput, "delete", lambda output, names: (look(), delete(output, names)))
    monkeypatch.setattr(FileOutput, "publish", lambda output, name, content: (look(), publish(output, name, content)))
    done(job)
    assert 0.95 * needed < peak < 1.02 * needed


def test_logits_written_down_once_for_two_students(trained_llama: Path, data: dict[str, str], tmp_path: Path) -> None:
    """Where the user says; and a training that makes nothing better publishes the student as it was, and says so."""
    place = tmp_path / "logits"
    offline = {"teacher": {"offline": {"topK": 16, "location": {"uri": place.as_uri()}}}, "steps": 2, "learningRate": 0.5}
    passes = [{"pruneWidth": {"ratio": 0.25}}, {"distil": {**DISTIL["distil"], **offline}}]
    report = done(job_of(tmp_path, trained_llama, data, passes, "one")).report
    assert report["distillation"]["bestStep"] == 0 and report["distillation"]["recovered"]["kl"] == 0
    assert any("no better" in warning and "set learningRate to 0.2, or" in warning for warning in report["warnings"])
    written = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    assert written
    done(job_of(tmp_path, trained_llama, data, [{"pruneWidth": {"ratio": 0.5}}, passes[1]], "two"))
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()} == written


def test_a_student_that_is_a_checkpoint(trained_llama: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other widths and fewer layers than the job's model, which it is evaluated against."""
    from transformers import AutoModelForCausalLM

    untrain(monkeypatch)
    small = smaller_llama(tmp_path / "small", trained_llama)
    student = {"distil": {**DISTIL["distil"], "student": {"source": {"uri": small.as_uri()}}}}
    job = job_of(tmp_path, trained_llama, data, [{"rtn": {"scheme": "W8A16"}}, student])
    report = done(job).report
    rows = evaluation_rows(job)
    original, made = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (trained_llama, tmp_path / "out"))
    assert perplexity(original, rows) == pytest.approx(report["evaluation"]["perplexityBefore"], rel=5e-3)
    assert perplexity(made, rows) == pytest.approx(report["evaluation"]["perplexityAfter"], rel=5e-3)
    assert report["source"]["uri"] == trained_llama.as_uri() and report["structure"]["sizes"]["num_hidden_layers"] == [4, 2]
    assert set(report["linears"]) and report["distillation"]["student"] == small.as_uri()


def smaller_llama(folder: Path, like: Path) -> Path:
    """Not trained, with the tokenizer of another."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=512, tie_word_embeddings=True)).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(like / name, folder / name)
    return folder


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a pass behind it": ([DISTIL, {"rtn": {"scheme": "W8A16"}}], r"passes\[1\].rtn: comes behind distil"),
    "two of them": ([DISTIL, DISTIL], r"passes\[1\].distil: there is one at passes\[0\]"),
    "a layer that is not there": (
        [{"pruneLayers": {"layers": 3}}, {"distil": {"hiddenStates": {"pairs": [[3, 3]]}}}],
        r"hiddenStates.pairs \[3, 3\]: the student has no layer 3",
    ),
    "more pairs than layers": ([{"distil": {"attentionOutputs": {"layers": 9}}}], "attentionOutputs.layers 9, and the student has 4"),
    "a size given twice": (
        [{"pruneLayers": {"layers": 3}}, {"distil": {"student": {"layers": 2}}}],
        "student asks for a size that the pass pruneLayers gives already",
    ),
    "a parameter that is none": ([{"distil": {"stepz": 3}}], "'stepz' is not a parameter; did you mean steps"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_requests_that_cannot_work(what: str, trained_llama: Path, data: dict[str, str], tmp_path: Path) -> None:
    passes, said = REFUSED[what]
    with pytest.raises(UserError, match=said):
        make_plan(load_job(job_of(tmp_path, trained_llama, data, passes), {}), {})


def test_nothing_to_train_on(trained_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"distil: nothing to train on; give distil.dataset, or spec.calibration.dataset"):
        make_plan(load_job(job_of(tmp_path, trained_llama, {}, [DISTIL]), {}), {})


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_others_that_speak_of_other_tokens(who: str, trained_llama: Path, data: dict[str, str], tmp_path: Path) -> None:
    """Named by both URIs: another vocabulary; the same size, and another token in it."""
    other = smaller_llama(tmp_path / "other", trained_llama)
    told = {"distil": {**DISTIL["distil"], who: {"source": {"uri": other.as_uri()}}}}
    job = load_job(job_of(tmp_path, trained_llama, data, [told]), {})
    make_plan(job, {})
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = "Ġbaker", "Ġold"
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=f"distil.{who} {other.as_uri()} has another tokenizer than {trained_llama.as_uri()}: token"):
        make_plan(job, {})
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 500}))
    with pytest.raises((UserError, CorruptSource), match="vocab"):
        make_plan(job, {})


def test_a_smaller_shape_is_the_pruning_passes(trained_llama: Path, data: dict[str, str], tmp_path: Path) -> None:
    student = {"layers": 3, "intermediateSize": 384, "hiddenSize": 192, "keyValueHeads": 2}
    job = job_of(tmp_path, trained_llama, data, [{"distil": {**DISTIL["distil"], "student": student, "steps": 10}}])
    plan = make_plan(load_job(job, {}), {}).as_json()
    assert plan["sizes"] == {
        "num_hidden_layers": [4, 3],
        "hidden_size": [256, 192],
        "intermediate_size": [512, 384],
        "num_attention_heads": [8, 4],
        "num_key_value_heads": [4, 2],
    }
    training = plan["training"]
    assert training["steps"] == 10 and not training["stepsAreEstimated"] and training["tokens"] == 10 * 8 * 128
    assert training["studentParameters"] == plan["parameters"][1] and training["teacherParameters"] == plan["parameters"][0]
    assert training["memoryBytes"] > 16 * training["studentParameters"]


def test_time_and_memory_go_by_the_machine_and_what_is_in_a_step(
    trained_llama: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 20_000
    beside = steps * 4 * BLOCK_SECONDS

    def estimate(fast: bool = False, **asked: Any) -> dict[str, Any]:
        monkeypatch.setattr(plan, "multiplies_bf16", lambda: fast)
        job = job_of(tmp_path, trained_llama, data, [{"distil": {**DISTIL["distil"], "steps": steps, **asked}}])
        found: dict[str, Any] = make_plan(load_job(job, {}), {}).as_json()["training"]
        return {**found, "products": found["seconds"] - beside}

    usual, larger, huge = estimate(), estimate(batch=16), estimate(batch=1024)
    faster = plan.BF16_CORE_RATE / plan.CORE_RATE
    assert usual["products"] == pytest.approx(faster * estimate(fast=True)["products"], rel=0.01), "the model is in bf16"
    assert larger["products"] == pytest.approx(2 * usual["products"], rel=0.01)
    kept = 4 * 34 * 256 * 4
    assert larger["memoryBytes"] - usual["memoryBytes"] == 8 * 128 * kept and huge["memoryBytes"] - larger["memoryBytes"] == 2048 * kept
    again = estimate(activationCheckpointing=True)
    assert again["products"] == pytest.approx(1.25 * usual["products"], rel=0.01), "the student's forward once more"
    assert again["memoryBytes"] < usual["memoryBytes"]
    many = estimate(batch=1024, microBatch=1024)
    assert many["memoryBytes"] - usual["memoryBytes"] < 1024 * 128 * kept / 3, "so much is computed again without being asked for"
