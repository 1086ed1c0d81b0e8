"""The whole path: kubectl apply on a real control plane, a worker pod, a real S3 server, and what comes out loaded by transformers."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from installation import Installed

import independent
import jobs
from calibrated_jobs import samples, write_data
from gguf_files import Request, llama_cpp
from kompressor_worker.cli import run_cli
from kompressor_worker.formats.readers import EXPERTS
from models import held_out_tokens, perplexity, trained_model
from waiting import PATIENCE

pytestmark = pytest.mark.cluster

SCHEMES = {
    # scheme: (parameters, perplexity may grow by this factor)
    "W8A8": ({}, 1.01),
    "W8A16": ({}, 1.01),
    "W4A16": ({"groupSize": 64}, 1.05),
    "W4A16_ASYM": ({"groupSize": 64}, 1.05),
    "FP8_DYNAMIC": ({}, 1.02),
    "FP8_BLOCK": ({}, 1.02),
    "MXFP4": ({}, 1.08),
    "NVFP4A16": ({}, 1.05),
}
CALIBRATED = [{"smoothQuant": {}}, {"gptq": {"scheme": "W8A8"}}, {"kvCache": {}}]


@pytest.fixture(scope="module")
def published(
    installed: Installed, trained_llama: Path, trained_moe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """All schemes of both models, applied at once; each is waited for and downloaded when a test asks."""
    for kind, folder in (("llama", trained_llama), ("qwen3_moe", trained_moe)):
        installed.bucket.upload(folder, kind)
        for scheme, (parameters, _) in SCHEMES.items():
            # without a pod of its own each that looks first: other tests have it
            installed.apply(name_of(kind, scheme), kind, [{"rtn": {"scheme": scheme, **parameters}}], preflight="Skip")
    folder = tmp_path_factory.mktemp("published")

    def get(kind: str, scheme: str) -> Path:
        name = name_of(kind, scheme)
        installed.wait(name, "Complete")
        if not (folder / name).exists():
            installed.bucket.download(name, folder / name)
        return folder / name

    return get


def name_of(kind: str, scheme: str) -> str:
    return f"{kind}-{scheme}".lower().replace("_", "-")


@cache
def exact_perplexity(kind: str) -> float:
    from transformers import AutoModelForCausalLM

    return perplexity(AutoModelForCausalLM.from_pretrained(trained_model(kind)), held_out_tokens(kind, rows=32))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_loads_with_the_expected_damage(
    published: Callable[..., Path], installed: Installed, kind: str, scheme: str, tmp_path: Path
) -> None:
    folder = published(kind, scheme)
    result = installed.status(name_of(kind, scheme))["result"]
    assert result["outputBytes"] < result["sourceBytes"]
    assert json.loads((folder / "kompressor.json").read_text())["result"]["tensorBytes"] == result["outputBytes"]
    unreadable = kind == "qwen3_moe" and scheme in EXPERTS
    assert any("experts" in w for w in result.get("warnings", [])) == unreadable
    if unreadable:  # by transformers: the compressed-tensors library expands it, tensor by tensor
        folder = independent.expand(folder, tmp_path / "plain")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    tokens, before = held_out_tokens(kind, rows=32), exact_perplexity(kind)
    # With asymmetric packed weights this version of transformers only loads when told to dequantise.
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if scheme == "W4A16_ASYM" and not unreadable else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **how)
    after = perplexity(model, tokens)
    with torch.inference_mode():
        assert torch.isfinite(model(input_ids=tokens[:2]).logits).all()
    print(f"{kind} {scheme}: perplexity {before:.4f} -> {after:.4f}")
    assert before * 0.995 < after < before * SCHEMES[scheme][1]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_weights_equal_an_independent_computation(published: Callable[..., Path], kind: str, scheme: str) -> None:
    """Bit for bit: what compressed-tensors reads from our file is what it computes from the original."""
    original = independent.tensors_of(trained_model(kind))
    count = 0
    for name, weight, config in independent.decompressed(published(kind, scheme)):
        together = [name]
        if scheme == "NVFP4A16":  # the global scale is shared by what loaders fuse
            at, _, last = name.rpartition(".")
            together = next((["q_proj", "k_proj", "v_proj"] for x in ("q_proj", "k_proj", "v_proj") if x == last), [last])
            together = ["gate_proj", "up_proj"] if last in ("gate_proj", "up_proj") else together
            together = [f"{at}.{x}" for x in together]
        shared = independent.global_scale([original[f"{x}.weight"] for x in together]) if scheme == "NVFP4A16" else None
        assert torch.equal(weight, independent.rounded(original[f"{name}.weight"], config.weights, shared)), name
        count += 1
    assert count == {"llama": 28, "qwen3_moe": 112}[kind]


def test_status_tells_the_story(published: Callable[..., Path], installed: Installed) -> None:
    published("llama", "W4A16")
    status = installed.status("llama-w4a16")
    conditions = {c["type"]: c for c in status["conditions"]}
    assert conditions["Ready"]["status"] == conditions["Complete"]["status"] == "True"
    assert not {"Reconciling", "Stalled"} & set(conditions)
    assert status["progress"]["percent"] == 100
    assert status["observedGeneration"] == 1
    log = installed.cluster.kubectl("logs", f"job/{status['jobName']}")
    assert "finished unit" in log


def test_a_result_that_is_there_already_needs_no_worker(published: Callable[..., Path], installed: Installed) -> None:
    """Another job, the same source, passes and output: the preflight finds the result, and no worker is ever asked for."""
    published("llama", "W4A16")
    before = installed.bucket.files("llama-w4a16")
    same = {"uri": installed.bucket.uri("llama-w4a16"), "endpoint": installed.bucket.server.endpoint, "credentialsSecret": "models-s3"}
    installed.apply("already", "llama", [{"rtn": {"scheme": "W4A16", "groupSize": 64}}], output=same)
    status = installed.wait("already", "Complete")
    conditions = {c["type"]: c for c in status["conditions"]}
    assert conditions["Complete"]["reason"] == "AlreadyCompressed" and conditions["Validated"]["status"] == "True"
    assert status["result"]["resultDigest"] == installed.status("llama-w4a16")["result"]["resultDigest"]
    assert installed.steps("already") == ["preflight"] and installed.bucket.files("llama-w4a16") == before


@pytest.fixture(scope="module")
def data(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`calibration` and `evaluation` of a spec, in the bucket, for a Secret of their own."""
    server = installed.bucket.server
    keys = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
    installed.cluster.kubectl("create", "secret", "generic", "data-s3", *(f"--from-literal={k}={v}" for k, v in keys.items()))
    folder = tmp_path_factory.mktemp("data")
    files = write_data(folder, "llama", rows=16)
    installed.bucket.upload(folder, "data")
    uris = {section: installed.bucket.uri(f"data/{file.name}") for section, file in files.items()}
    return samples(uris, rows=16, endpoint=server.endpoint, credentialsSecret="data-s3")


def test_a_calibrated_job_says_what_it_measured(installed: Installed, data: dict[str, Any], trained_llama: Path) -> None:
    installed.bucket.upload(trained_llama, "llama")
    gates = [{"metric": "perplexity", "maxIncrease": "2%"}, {"metric": "kl", "maxKL": 0.05}]
    installed.apply("calibrated", "llama", CALIBRATED, **data | {"evaluation": data["evaluation"] | {"gates": gates}})
    status = installed.wait("calibrated", "Complete")
    assert installed.steps("calibrated") == ["compress", "preflight"]
    assert status["plan"]["outputBytes"] == status["result"]["outputBytes"], "as the preflight said"
    assert {c["type"]: c["reason"] for c in status["conditions"]}["Complete"] == "Completed"
    assert status["progress"]["percent"] == 100
    files = installed.bucket.files("calibrated")
    assert "report.html" in files and not [name for name in files if name.startswith(".kompressor/")]
    report, result = json.loads(files["kompressor.json"]), status["result"]
    for name in ("perplexityBefore", "perplexityAfter", "kl"):
        assert float(result[name]) == pytest.approx(report["evaluation"][name], rel=1e-3), name
    agreement = float(result["topOneAgreement"].removesuffix("%")) / 100
    assert agreement == pytest.approx(report["evaluation"]["topOneAgreement"], rel=1e-3)
    assert report["evaluation"]["tokens"] == 16 * 127
    assert 0 < float(result["kl"]) < 0.05 and 0.9 < agreement <= 1
    assert result["calibrationDigest"] == report["data"]["calibration"]["digest"]
    assert [gate["met"] for gate in report["gates"]] == [True, True]


def test_a_gguf_file_is_served_before_and_runs_after(
    installed: Installed, data: dict[str, Any], trained_llama: Path, tmp_path: Path
) -> None:
    """Measured with llama.cpp in the worker's pod; then llama.cpp reads the file alone, from a plain download."""
    installed.bucket.upload(trained_llama, "llama")
    runtime = {"engine": "llama.cpp", "prompt": 32, "generate": 8, "batch": [1, 2], "rounds": 1, "pricePerHour": 0.35}
    gates = [{"metric": "perplexity", "maxIncrease": "5%"}, {"metric": "memory", "maxMemory": "4Gi"}]
    output = {**installed.place("gguf"), "format": "gguf", "name": "small-Q4_K_M.gguf"}
    judged = data["evaluation"] | {"runtime": runtime, "gates": gates}
    installed.apply("gguf", "llama", [{"gptq": {"scheme": "Q4_K_M"}}], **data | {"evaluation": judged, "output": output})
    result = installed.wait("gguf", "Complete")["result"]
    assert result["runtime"]["engine"].startswith("llama.cpp") and float(result["runtime"]["costPerMillionTokensAfter"]) > 0
    (tmp_path / "small.gguf").write_bytes(installed.bucket.files("gguf")["small-Q4_K_M.gguf"])
    rows = held_out_tokens("llama", rows=8)
    said = llama_cpp([Request(tmp_path / "small.gguf", row.tolist()) for row in rows], tmp_path)
    logits = torch.stack([torch.from_numpy(found) for found, _ in said])[:, :-1].flatten(0, 1)
    found = math.exp(torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten()))
    from transformers import AutoModelForCausalLM

    assert 0.98 < found / perplexity(AutoModelForCausalLM.from_pretrained(trained_llama), rows) < 1.05


def test_a_gate_that_is_not_met_publishes_nothing(installed: Installed, data: dict[str, Any], trained_llama: Path) -> None:
    installed.bucket.upload(trained_llama, "llama")
    gates = [{"metric": "perplexity", "maxIncrease": "50%"}, {"metric": "kl", "maxKL": 0.00001}]
    installed.apply("gated", "llama", CALIBRATED, **data | {"evaluation": data["evaluation"] | {"gates": gates}})
    status = installed.wait("gated", "Failed")
    conditions = {c["type"]: c for c in status["conditions"]}
    assert conditions["Failed"]["reason"] == "GateFailed"
    assert conditions["Stalled"]["status"] == "True" and conditions["Ready"]["status"] == "False"
    said = re.search(r"mean KL divergence is (\S+) nats a token, allowed are 1e-05", conditions["Failed"]["message"])
    assert said and float(said[1]) > 1e-5, conditions["Failed"]["message"]
    assert "perplexity" not in said.string.partition("allowed are")[0]  # that gate is met
    kept = installed.bucket.files("gated")
    assert sorted(kept) == [".kompressor/kompressor.json", ".kompressor/report.html"]
    kl = json.loads(kept[".kompressor/kompressor.json"])["evaluation"]["kl"]
    assert kl == pytest.approx(float(said[1]), rel=1e-3)


def aimed(memory: int, **target: Any) -> dict[str, Any]:
    """A GPU of so many bytes for the small Llama: with the overhead that is assumed of any, hardly more than that."""
    return {"hardware": {"memory": str(memory), "computeCapability": "8.9", "bandwidth": "1008G"}, "context": 512, **target}


def memory_for(folder: Path, plan: str) -> int:
    """Of the smallest GPU that this plan fits."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        given = ("--memory", "2G", "--compute-capability", "8.9", "--bandwidth", "1008G", "--context", "512", "--json")
        assert run_cli(["fit", str(folder), *given]) == 0
    row = next(row for row in json.loads(told.getvalue())["plans"] if row["plan"] == plan)
    return math.ceil((row["totalBytes"] - row["reserveBytes"]) / 0.92) + 4


def test_a_target_comes_from_bf16_to_what_fits(installed: Installed, data: dict[str, Any], trained_llama: Path, tmp_path: Path) -> None:
    """By `kubectl apply` alone; on a GPU that is a byte too small for every safer plan, and on one that none fits."""
    from transformers import AutoModelForCausalLM

    installed.bucket.upload(trained_llama, "llama")
    memory = memory_for(trained_llama, "W4A16, KV FP8")
    installed.apply("target", "llama", [], **data, target=aimed(memory, maxPerplexityIncrease="5%", pricePerHour=0.5))
    installed.apply("too-large", "llama", [], **data, target=aimed(memory, concurrency=4))
    status = installed.wait("target", "Complete")
    planned, result = status["plan"]["target"], status["result"]
    assert (planned["name"], planned["passes"]) == (
        "W4A16, KV FP8",
        ["gptq: {scheme: W4A16, groupSize: 128}", "kvCache: {scheme: FP8}"],
    )
    assert planned["totalBytes"] <= planned["memoryBytes"] == memory
    assert installed.steps("target") == ["compress", "preflight"] and status["plan"]["outputBytes"] == result["outputBytes"]
    assert planned["weightBytes"] == result["outputBytes"] < result["sourceBytes"] / 2
    assert result["target"]["plan"] == planned["name"] and [x.split(":")[1] for x in result["target"]["tries"]] == [" kept"]
    assert float(result["target"]["tokensPerSecond"]) > 0 and float(result["target"]["costPerMillionTokens"]) > 0
    folder = installed.bucket.download("target", tmp_path / "target")
    after, before = perplexity(AutoModelForCausalLM.from_pretrained(folder), held_out_tokens("llama")), exact_perplexity("llama")
    assert before * 0.995 < after < before * 1.05

    status = installed.wait("too-large", "Failed")
    conditions = {c["type"]: c for c in status["conditions"]}
    assert conditions["Validated"]["status"] == "False" and conditions["Failed"]["reason"] == "DoesNotFit"
    assert "it would fit with context" in conditions["Failed"]["message"] and "or on a GPU with" in conditions["Failed"]["message"]
    assert installed.steps("too-large") == ["preflight"], "no worker was ever asked for"


@pytest.mark.parametrize(
    ("name", "change", "reason", "word"),
    [
        ("no-bucket", {"model": {"source": {"uri": "s3://no-such-bucket/x"}}}, "SourceNotFound", "no-such-bucket"),
        ("wrong-group", {"passes": [{"rtn": {"scheme": "W4A16", "groupSize": 96}}]}, "InvalidSpec", "groupSize"),
    ],
)
def test_failures_are_told(installed: Installed, trained_llama: Path, name: str, change: dict[str, Any], reason: str, word: str) -> None:
    installed.bucket.upload(trained_llama, "llama")
    endpoint = {"endpoint": installed.bucket.server.endpoint, "credentialsSecret": "models-s3"}
    if "model" in change:
        change["model"]["source"] |= endpoint
    installed.apply(name, "llama", change.pop("passes", jobs.RTN_W4), **change)
    status = installed.wait(name, "Failed")
    conditions = {c["type"]: c for c in status["conditions"]}
    assert conditions["Failed"]["reason"] == reason
    assert conditions["Stalled"]["status"] == "True"
    assert conditions["Ready"]["status"] == "False"
    assert word in conditions["Failed"]["message"]
    assert conditions["Validated"]["status"] == "False" and installed.steps(name) == ["preflight"]
    assert installed.bucket.names(name) == []


def test_early_truth_and_deletion(installed: Installed, trained_llama: Path) -> None:
    """A missing secret and a missing image show while the job waits; deleting it takes its children along."""
    installed.bucket.upload(trained_llama, "llama")
    installed.apply("no-image", "llama", jobs.RTN_W4, worker={"image": "nowhere/worker:none"})
    body = jobs.manifest(installed.bucket.uri("llama"), installed.bucket.uri("x"), endpoint=installed.bucket.server.endpoint)
    body["metadata"] = {"name": "no-secret", "namespace": "default"}
    body["spec"]["output"]["credentialsSecret"] = "not-there"
    installed.cluster.apply(body)
    # The preflight runs in the planner's own image, so only the worker misses the image that the job names.
    both = ["compress", "preflight"]
    for name, reason, steps in (("no-image", "ImagePullFailed", both), ("no-secret", "SecretMissing", ["preflight"])):
        path = "{.status.conditions[?(@.type=='Ready')].reason}"
        installed.cluster.kubectl("wait", f"kcj/{name}", f"--for=jsonpath={path}={reason}", f"--timeout={PATIENCE:.0f}s")
        assert installed.steps(name) == steps
        selector = f"kompressor.io/job-uid={installed.cluster.get('kcj', name)['metadata']['uid']}"
        installed.cluster.kubectl("delete", "kcj", name, "--wait=true")
        installed.cluster.kubectl("wait", "job", "-l", selector, "--for=delete", f"--timeout={PATIENCE:.0f}s")
