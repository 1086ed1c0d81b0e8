"""llama.cpp as an engine: the driver with the real library, over files that the gguf library writes; which results it is asked to serve."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file

import jobs
from calibrated_jobs import samples, write_data
from kompressor_api.v1alpha1 import Result
from kompressor_worker.distillation import open_models
from kompressor_worker.errors import EngineFailed, EngineMissing, Terminated, UserError
from kompressor_worker.job import load_job
from kompressor_worker.plan import make_plan
from kompressor_worker.progress import Progress
from kompressor_worker.run import run
from kompressor_worker.runtime import ENGINES, Installed, find_engine
from kompressor_worker.runtime import llama_cpp_driver as driver
from kompressor_worker.runtime.engine_process import EngineProcess
from kompressor_worker.runtime.original_gguf import plan_original, write_original
from models import trained_model

HIDDEN, WIDTH, LAYERS, HEADS, VOCABULARY = 256, 1024, 2, 4, 16384
"""Large enough that the weights outweigh the few MB by which two processes' mapped libraries differ."""
PROMPT, GENERATE = 24, 8
ONE_THREAD = {"n_threads": 1, "n_threads_batch": 1}
"""Several would wait for each other on cores that other tests take."""
ENVIRON = {**os.environ, "KOMPRESSOR_ENGINE_ARGUMENTS": json.dumps(ONE_THREAD)}


def write(folder: Path, kind: str) -> Path:
    """A llama of random weights, its matrices in one type."""
    folder.mkdir()
    file, random = gguf.GGUFWriter(folder / "model.gguf", "llama"), numpy.random.default_rng(3)
    file.add_block_count(LAYERS)
    file.add_context_length(512)
    file.add_embedding_length(HIDDEN)
    file.add_feed_forward_length(WIDTH)
    file.add_head_count(HEADS)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(VOCABULARY)
    file.add_tokenizer_model("no_vocab")
    quantised = gguf.GGMLQuantizationType[kind]

    def matrix(name: str, rows: int, columns: int) -> None:
        values = random.standard_normal((rows, columns), dtype=numpy.float32) / columns**0.5
        file.add_tensor(f"{name}.weight", gguf.quants.quantize(values, quantised), raw_dtype=quantised)

    for name in ("token_embd", "output"):
        matrix(name, VOCABULARY, HIDDEN)
    for i in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{i}.{name}", HIDDEN, HIDDEN)
        for name, rows, columns in (("ffn_gate", WIDTH, HIDDEN), ("ffn_up", WIDTH, HIDDEN), ("ffn_down", HIDDEN, WIDTH)):
            matrix(f"blk.{i}.{name}", rows, columns)
    for name in ("output_norm", *(f"blk.{i}.{norm}" for i in range(LAYERS) for norm in ("attn_norm", "ffn_norm"))):
        file.add_tensor(f"{name}.weight", numpy.ones(HIDDEN, numpy.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    return {kind: write(folder / kind, kind) for kind in ("F32", "Q8_0")}


def prompts(*lengths: int) -> list[list[int]]:
    return [[(7 * i + 13 * j) % VOCABULARY for j in range(length)] for i, length in enumerate(lengths)]


@contextmanager
def started(folder: Path, log: Path) -> Iterator[EngineProcess]:
    installed = find_engine(spec_of(log), {})
    assert installed is not None
    with EngineProcess(installed, "result", log, os.environ, threading.Event(), time.monotonic() + 60) as engine:
        yield engine


def spec_of(folder: Path) -> Any:
    return load_job(ordered(folder), {}).spec


def ordered(folder: Path, engine: str = "llama.cpp", format: str = "gguf", scheme: str = "Q4_K", **runtime: Any) -> Path:
    body = jobs.manifest(trained_model("llama").as_uri(), (folder / "out").as_uri(), [{"rtn": {"scheme": scheme}}])
    data = samples({"evaluation": write_data(folder, "llama", rows=2)["evaluation"].as_uri()}, rows=2)
    body["spec"]["evaluation"] = data["evaluation"] | {"runtime": {"engine": engine, "prompt": 16, "generate": 8, "rounds": 2} | runtime}
    body["spec"]["output"]["format"] = format
    return jobs.write(folder / "job.json", body)


def loaded(folder: Path, requests: int, **arguments: Any) -> dict[str, Any]:
    return {"model": str(folder), "tokens": PROMPT + GENERATE, "requests": requests, "kvBytes": 0, "arguments": ONE_THREAD | arguments}


def test_requests_are_timed_and_memory_is_that_of_the_type(folders: dict[str, Path], tmp_path: Path) -> None:
    peaks = {}
    for kind, folder in folders.items():
        with started(folder, tmp_path) as engine:
            said = engine.ask("loading", **loaded(folder, 4))
            assert said["engine"].startswith("llama.cpp b") and said["device"] == ""
            for requests in (1, 4):
                began = time.monotonic()
                found = engine.ask("serving", prompts=prompts(*[PROMPT] * requests), generate=GENERATE)
                took = time.monotonic() - began
                assert len(found["firstToken"]) == requests and found["decodeTokens"] == requests * (GENERATE - 1)
                assert all(0 < first <= found["seconds"] - found["decodeSeconds"] + 1e-6 for first in found["firstToken"])
                assert found["decodeSeconds"] < found["seconds"] <= took
            peaks[kind] = engine.ask("looking", memory=True)["peakBytes"]
    sizes = {kind: (folder / "model.gguf").stat().st_size for kind, folder in folders.items()}
    assert peaks["F32"] - peaks["Q8_0"] == pytest.approx(sizes["F32"] - sizes["Q8_0"], rel=0.25), "nothing but the weights differs"


def test_requests_together_say_what_each_says_alone(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts longer than a batch, of several lengths: positions, sequences and which row is asked for a token are all right."""
    served = driver.Served(loaded(folders["F32"], 3, n_batch=16, n_ubatch=16))
    asked = prompts(PROMPT, 5, 17)

    def said(which: list[list[int]]) -> list[list[int]]:
        answers: dict[int, list[int]] = {}
        step = served._step

        def heard(requests: list[driver.Request], live: list[driver.Request]) -> None:
            before = [one.made for one in requests]
            step(requests, live)
            for i, one in enumerate(requests):
                if one.made > before[i]:
                    answers.setdefault(i, []).extend(one.waiting)

        with monkeypatch.context() as patch:
            patch.setattr(served, "_step", heard)
            assert served.measure(which, GENERATE)["decodeTokens"] <= len(which) * (GENERATE - 1)
        return [answers[i] for i in range(len(which))]

    together = said(asked)
    assert [len(answer) for answer in together] == [GENERATE] * 3
    assert together == [said([prompt])[0] for prompt in asked]
    assert len({tuple(answer) for answer in together}) == 3, "another prompt, another answer"


def test_what_llama_cpp_says_of_a_file_that_it_does_not_load_is_in_the_message(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    whole = (folders["Q8_0"] / "model.gguf").read_bytes()
    (broken / "model.gguf").write_bytes(whole[: len(whole) // 2])
    with started(broken, tmp_path) as engine, pytest.raises(EngineFailed) as caught:
        engine.ask("loading", **loaded(broken, 1))
    assert "llama.cpp does not load model.gguf; its log ends: " in str(caught.value) and "not within the file bounds" in str(caught.value)
    with started(broken, tmp_path) as engine, pytest.raises(EngineFailed, match=r"threads is no field of llama_model_params"):
        engine.ask("loading", **loaded(folders["Q8_0"], 1, threads=2))


def test_threads_are_those_of_the_container(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    for said, expected in {"50000 100000": 1, f"{cores * 100000 + 1} 100000": cores, "max 100000": cores}.items():
        (tmp_path / "cpu.max").write_text(said + "\n")
        assert driver.threads(tmp_path) == expected
    assert driver.threads(tmp_path / "none") == cores


def test_a_job_serves_its_file_beside_the_original(tmp_path: Path) -> None:
    job = load_job(ordered(tmp_path, batch=[1, 3], pricePerHour=0.36), {})
    plan = make_plan(job, ENVIRON)
    summary = run(job, ENVIRON, Progress(), threading.Event())
    found = json.loads((tmp_path / "out" / "kompressor.json").read_text())["runtime"]
    assert found["engine"].startswith("llama.cpp b") and found["memoryOf"] == "host" and found["inTurns"]
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert found["after"]["weightBytes"] < file.stat().st_size < found["before"]["weightBytes"] < (plan.scratch or 0)
    for when in ("before", "after"):
        assert found[when]["peakBytes"] > found[when]["weightBytes"]
        for each in found[when]["batches"]:
            assert 0 < each["firstToken"] < each["latency"] and each["tokensPerSecond"] > 0
            assert each["costPerMillionTokens"] == pytest.approx(0.36 / 3600 * each["latency"] / (8 * each["batch"]) * 1e6, rel=1e-3)
    status = Result.model_validate(summary.result("file:///x")).runtime
    assert status is not None and status.batch == 3 and str(status.engine).startswith("llama.cpp b")
    assert "<h2>Serving</h2>" in (tmp_path / "out" / "report.html").read_text()


def test_the_original_is_written_as_it_is(tmp_path: Path) -> None:
    """Every number of the source, under llama.cpp's name; with what puts rows of q and k into order taken back."""
    spec = spec_of(tmp_path)
    original = open_models(spec, {}).original
    plan = plan_original(spec, original.layout)
    write_original(tmp_path / "original", original, plan, threading.Event())
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "original" / "original.gguf").tensors}
    source = load_file(trained_model("llama") / "model.safetensors")
    heads = original.layout.config["num_attention_heads"]

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        found = tensors[name]
        kind = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[found.tensor_type.name]
        return torch.from_numpy(found.data.copy()).view(kind).reshape(shape)

    alike = {"model.embed_tokens": "token_embd", "model.layers.1.mlp.down_proj": "blk.1.ffn_down", "model.norm": "output_norm"}
    for ours, theirs in alike.items():
        value = source[f"{ours}.weight"]
        assert torch.equal(read(f"{theirs}.weight", tuple(value.shape)).to(value.dtype), value), ours
    q = source["model.layers.0.self_attn.q_proj.weight"]
    paired = read("blk.0.attn_q.weight", tuple(q.shape)).unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    assert torch.equal(paired, q)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Terminated):
        write_original(tmp_path / "again", original, plan, stop)


def test_each_engine_serves_its_format(tmp_path: Path) -> None:
    for engine, other, format, wanted, scheme in (
        ("llama.cpp", "vllm", "compressed-tensors", "gguf", "W8A16"),
        ("vllm", "llama.cpp", "gguf", "compressed-tensors", "Q4_K"),
    ):
        with pytest.raises(UserError) as caught:
            make_plan(load_job(ordered(tmp_path, engine, format, scheme), {}), ENVIRON)
        assert str(caught.value) == (
            f"evaluation.runtime.engine: {engine} serves {wanted}, and output.format is {format}; "
            f"choose {other}, or output.format: {wanted}"
        )
    assert not (tmp_path / ".out.kompressor").exists()


def test_an_image_without_it_is_told_which_has_it(tmp_path: Path) -> None:
    with pytest.raises(EngineMissing, match=r"KOMPRESSOR_LLAMA_CPP_PYTHON=/no/python cannot be run .* --target worker-llama-cpp \."):
        find_engine(spec_of(tmp_path), {"KOMPRESSOR_LLAMA_CPP_PYTHON": "/no/python"})
    assert {name: Installed(engine, Path("python")).driver.is_file() for name, engine in ENGINES.items()} == dict.fromkeys(ENGINES, True)
    assert [engine.image for engine in ENGINES.values()] == ["worker-vllm", "worker-llama-cpp"]
