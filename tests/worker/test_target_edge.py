"""A target without a GPU: what llama.cpp takes of a device, which GGUF mix is chosen for it, and what is refused."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import header_only
import pytest
from families import tiny_model
from llama_cpp_memory import asked_for, write_shapes

import jobs
from calibrated_jobs import samples, write_data
from kompressor_api.hardware import DEVICES, device_named
from kompressor_api.names import Reason
from kompressor_api.quantity import parse
from kompressor_api.v1alpha1 import CompressionJobSpec, Result
from kompressor_worker.assignment import Assignment
from kompressor_worker.cli import run_cli
from kompressor_worker.errors import UserError
from kompressor_worker.gguf_result import prepared
from kompressor_worker.job import load_job
from kompressor_worker.layout import ModelLayout
from kompressor_worker.plan import make_plan
from kompressor_worker.progress import Progress
from kompressor_worker.reading import read_layout
from kompressor_worker.run import run
from kompressor_worker.storage.locations import open_source
from kompressor_worker.target.planner import fit
from kompressor_worker.target.serving import Served
from kompressor_worker.target.weighing import Row
from models import trained_model

DATA = {"dataset": {"uri": "s3://data/rows"}}
DEVICE = DEVICES["Apple-M4-Max-64GB"]
COMPLETE = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0}
"""What a GGUF file's metadata want beside shapes."""
REAL = {"llama-8b": header_only.LLAMA_3_8B, "mixtral": header_only.MIXTRAL_8X7B}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelLayout]:
    """Of real sizes, with the tokenizer of a small model."""
    folder = tmp_path_factory.mktemp("headers")
    small = spec(trained_model("llama"))
    source = open_source(small.model.source, {}, threading.Event())
    tokenizer = prepared(small.output, source, read_layout(source)).tokenizer
    found = {name: layout_of(header_only.write(folder / name, config | COMPLETE)) for name, config in REAL.items()}
    return {name: replace(layout, file_format="gguf", tokenizer=tokenizer) for name, layout in found.items()}


def layout_of(folder: Path) -> ModelLayout:
    return read_layout(open_source(spec(folder).model.source, {}, threading.Event()))


def spec(folder: Path = Path("/model"), data: bool = True, output: Mapping[str, Any] | None = None, **target: Any) -> CompressionJobSpec:
    asked = {"device": "Raspberry-Pi-5-8GB", "context": 8192} | target
    return CompressionJobSpec.model_validate(
        {
            "model": {"source": {"uri": folder.as_uri()}},
            "output": {"uri": "s3://models/out", "format": "gguf"} | dict(output or {}),
            "target": {name: value for name, value in asked.items() if value is not None},
            "evaluation": DATA,
            **({"calibration": DATA} if data else {}),
        }
    )


def plain(layout: ModelLayout) -> Served:
    return Served.of(Assignment.of(spec().model_copy(update={"passes": []}), layout))


@pytest.mark.parametrize(("model", "context", "requests"), [("llama-8b", 8192, 1), ("llama-8b", 4096, 4), ("mixtral", 8192, 1)])
def test_memory_of_real_sizes_is_what_llama_cpp_asks_for(model: str, context: int, requests: int, tmp_path: Path) -> None:
    """llama.cpp reckons for itself, without allocating anything."""
    served = plain(layout_of(header_only.write(tmp_path / "model", REAL[model])))
    asked, need = asked_for(write_shapes(tmp_path / "model.gguf", REAL[model]), context, requests), served.need(DEVICE, context, requests)
    assert need.kv == asked["kv"]
    assert need.activations == pytest.approx(asked["compute"], rel=0.01)


def test_windows_are_kept_as_llama_cpp_keeps_them(tmp_path: Path) -> None:
    """Of a window, what a step of prefill and the window itself take, in whole 256 tokens."""
    layout = layout_of(tiny_model("gemma3", num_hidden_layers=7, sliding_window=1024, max_position_embeddings=8192, vocab_size=2048))
    asked, need = asked_for(write_shapes(tmp_path / "model.gguf", layout.config), 4096, 2), plain(layout).need(DEVICE, 4096, 2)
    assert need.kv == asked["kv"]
    assert need.activations >= asked["compute"], "less where a small vocabulary's logits find room in what was there before"


def test_every_mix_weighs_what_it_will_and_the_largest_that_fits_is_chosen(layouts: dict[str, ModelLayout]) -> None:
    found = fit(spec(), layouts["llama-8b"])
    for row in found.rows:
        if row.need is not None:
            assigned = Assignment.of(spec().model_copy(update={"passes": list(row.passes)}), layouts["llama-8b"])
            assert row.need.weights == assigned.plan.tensor_bytes, row.name
            assert row.fits == (row.need.total <= 8 << 30)
    plain = [row for row in found.rows if row.candidate.reduction is None and row.need is not None]
    weights = [row.need.weights for row in plain if row.need]
    assert weights == sorted(weights, reverse=True), "the safer the larger"
    chosen = found.ladder[0]
    assert chosen == next(row for row in plain if row.fits) and chosen.need is not None and chosen.speed is not None
    assert chosen.need.reserve == 1 << 29 and chosen.need.overhead == 128 << 20
    read = chosen.need.weights - row_bytes(layouts["llama-8b"], chosen) + chosen.need.kv
    assert chosen.speed.tokens_per_second == pytest.approx(17.1e9 / read, rel=1e-3), "all weights but the embeddings', and the cache"


def row_bytes(layout: ModelLayout, row: Row) -> int:
    assigned = Assignment.of(spec().model_copy(update={"passes": list(row.passes)}), layout)
    return sum(t.stop - t.start for stage in assigned.plan.stages[0] for t in stage)


def test_more_memory_costs_neither_quality_nor_a_plan(layouts: dict[str, ModelLayout]) -> None:
    losses = []
    for memory in ("5Gi", "6Gi", "8Gi", "12Gi", "24Gi"):
        found = fit(spec(device=None, memory=memory, bandwidth="50G", maxPerplexityIncrease="50%"), layouts["llama-8b"])
        assert found.ladder and found.ladder[0].need is not None
        assert found.ladder[0].need.reserve == 0 and found.ladder[0].need.total <= parse(memory)
        losses.append(found.ladder[0].loss)
    assert losses == sorted(losses, reverse=True) and losses[-1] == 0 < losses[-2] < losses[0]


def test_what_does_not_fit_says_what_would(layouts: dict[str, ModelLayout]) -> None:
    asked: dict[str, Any] = {"device": None, "memory": "3500Mi", "bandwidth": "50G", "context": 32768, "maxPerplexityIncrease": "100%"}
    with pytest.raises(UserError) as caught:
        fit(spec(**asked), layouts["llama-8b"]).refuse_if_nothing_fits()
    said = str(caught.value)
    assert caught.value.reason == Reason.DOES_NOT_FIT and "nothing fits a device of 3500Mi" in said
    (context,) = re.findall(r"with context ([\d,]+)", said)
    assert fit(spec(**asked | {"context": int(context.replace(",", ""))}), layouts["llama-8b"]).ladder
    gigabytes = float(re.findall(r"on a device with ([\d.]+) GB", said)[0])
    assert fit(spec(**asked | {"memory": str(round(1.01e9 * gigabytes))}), layouts["llama-8b"]).ladder


@pytest.mark.parametrize(
    "target, output, says",
    [
        ({}, {"format": "compressed-tensors"}, "llama.cpp on Raspberry-Pi-5-8GB serves gguf, and output.format is compressed-tensors; set"),
        (
            {"device": None, "gpu": "T4"},
            {},
            "vllm on T4 serves compressed-tensors, and output.format is gguf; set output.format",
        ),
        ({"device": "Raspberry-Pi-5-8G"}, {}, "device 'Raspberry-Pi-5-8G' is not known; did you mean Raspberry-Pi-5-8GB"),
        ({"gpu": "T4"}, {}, "give either gpu or device (a name), hardware (a GPU's) or memory and bandwidth (a device's)"),
        ({"bandwidth": "50G"}, {}, "memory and bandwidth describe a device together; give both"),
        ({"engine": "vllm"}, {}, "engine vllm serves on GPUs; give gpu or hardware, or engine: llama.cpp"),
    ],
)
def test_what_is_refused_with_the_spec(target: dict[str, Any], output: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        spec(output=output, **target)
    assert says in str(caught.value)


def test_devices_as_people_write_them_and_gpus_that_llama_cpp_serves() -> None:
    assert {device_named(name).name for name in ("raspberry pi 5 8gb", "Raspberry_Pi_5-8GB")} == {"Raspberry-Pi-5-8GB"}
    assert all(device.kept and device.kept < device.memory and device.engine == "llama.cpp" for device in DEVICES.values())
    target = spec(device=None, gpu="RTX-4090", engine="llama.cpp").target
    assert target is not None and (target.on.engine, target.on.kind, target.format) == ("llama.cpp", "GPU", "gguf")


def test_a_device_is_planned_made_and_measured(tmp_path: Path) -> None:
    """As much memory as one type takes, and no more: that one is made, and llama.cpp runs it."""
    data = samples({"evaluation": write_data(tmp_path, "llama", rows=2)["evaluation"].as_uri()}, rows=2)
    body = jobs.manifest(trained_model("llama").as_uri(), (tmp_path / "out").as_uri())
    del body["spec"]["passes"]
    body["spec"]["output"]["format"] = "gguf"
    body["spec"]["evaluation"] = data["evaluation"] | {"runtime": {"engine": "llama.cpp", "prompt": 16, "generate": 8, "rounds": 1}}
    body["spec"]["target"] = {"memory": "1Gi", "bandwidth": "50G", "context": 512, "maxPerplexityIncrease": "50%"}
    layout = make_plan(load_job(jobs.write(tmp_path / "job.json", body), {}), dict(os.environ)).layout
    wanted = next(row for row in fit(CompressionJobSpec.model_validate(body["spec"]), layout).rows if row.name == "Q6_K")
    assert wanted.need is not None
    body["spec"]["target"]["memory"] = str(wanted.need.total)
    job = load_job(jobs.write(tmp_path / "job.json", body), {})
    assert make_plan(job, dict(os.environ)).status()["target"]["name"] == "Q6_K"
    environ = {**os.environ, "KOMPRESSOR_ENGINE_ARGUMENTS": '{"n_threads": 1, "n_threads_batch": 1}'}
    result = Result.model_validate(run(job, environ, Progress(), threading.Event()).result("file:///x"))
    assert result.target is not None and result.target.plan == "Q6_K" and result.target.totalBytes == wanted.need.total
    assert result.runtime is not None and float(result.runtime.tokensPerSecondAfter or 0) > 0
    report = json.loads((tmp_path / "out" / "kompressor.json").read_text())
    assert report["target"]["need"]["weights"] == report["result"]["tensorBytes"] == wanted.need.weights
    assert [each["batch"] for each in report["target"]["predicted"]] == [1] and report["target"]["engine"] == "llama.cpp"
    assert (tmp_path / "out" / "model-Q6_K.gguf").exists()


def test_fit_prints_the_table_for_a_device(capfd: pytest.CaptureFixture[str]) -> None:
    uri = str(trained_model("llama"))
    assert run_cli(["fit", uri, "--device", "Phone-8GB", "--context", "512"]) == 0
    printed, _ = capfd.readouterr()
    (chosen,) = [line for line in printed.splitlines() if line.lstrip().startswith(">")]
    assert "16 bits" in chosen and "yes" in chosen and "on Phone-8GB (8.6 GB)" in printed
    assert run_cli(["fit", uri, "--memory", "200M", "--bandwidth", "10G", "--context", "512", "--json", "--data-free"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["engine"] == "llama.cpp" and len(told["plans"]) > 5
    assert run_cli(["fit", uri, "--gpu", "T4", "--engine", "llama.cpp", "--context", "512", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["engine"] == "llama.cpp"
    assert run_cli(["fit", uri, "--device", "Phone-9GB", "--context", "512"]) == 64
    assert "did you mean Phone-8GB" in capfd.readouterr().err.replace("\n", " ")
