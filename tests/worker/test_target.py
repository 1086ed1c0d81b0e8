"""Which plan is chosen for a GPU: never one that does not fit, from headers alone, and the same whoever asks."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import header_only
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kompressor_api.hardware import GPUS, gpu_named
from kompressor_api.names import Reason
from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker.assignment import Assignment
from kompressor_worker.cli import run_cli
from kompressor_worker.errors import UserError
from kompressor_worker.layout import ModelLayout
from kompressor_worker.reading import read_layout
from kompressor_worker.storage.locations import open_source
from kompressor_worker.target.planner import TRIES, Fit, fit
from kompressor_worker.target.serving import Served
from models import trained_model

MODELS = {"llama-8b": header_only.LLAMA_3_8B, "llama-70b": header_only.LLAMA_3_70B, "mixtral": header_only.MIXTRAL_8X7B}
MEMORIES = {"llama-8b": (10, 12, 16, 24, 40), "llama-70b": (40, 48, 80, 140, 180), "mixtral": (24, 40, 80, 140)}
"""GiB of GPUs, from one that nothing fits to one that everything does."""
DATA = {"dataset": {"uri": "s3://data/rows"}}


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("headers")
    return {name: header_only.write(folder / name, config) for name, config in MODELS.items()}


@pytest.fixture(scope="module")
def layouts(headers: dict[str, Path]) -> dict[str, ModelLayout]:
    return {name: layout_of(folder) for name, folder in headers.items()}


def layout_of(folder: Path) -> ModelLayout:
    return read_layout(open_source(spec(folder).model.source, {}, threading.Event()))


def spec(folder: Path = Path("/model"), data: bool = True, **target: Any) -> CompressionJobSpec:
    return CompressionJobSpec.model_validate(
        {
            "model": {"source": {"uri": folder.as_uri()}},
            "output": {"uri": "s3://models/out"},
            "target": {"gpu": "RTX-4090", "context": 8192} | target,
            "evaluation": DATA,
            **({"calibration": DATA} if data else {}),
        }
    )


def of_memory(memory: int) -> dict[str, Any]:
    return {"gpu": None, "hardware": {"memory": str(memory), "computeCapability": "8.9", "bandwidth": "1008G"}}


def names(found: Fit) -> list[str]:
    return [row.name for row in found.ladder]


def test_real_sizes_come_out_as_the_arithmetic_says(layouts: dict[str, ModelLayout]) -> None:
    """Numbers worked out by hand from the published shapes."""
    rows = {row.name: row for row in fit(spec(gpu="L40S", context=32768, concurrency=2), layouts["llama-8b"]).rows}
    need = rows["16 bits"].need
    assert need is not None
    blocks = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336 + 2 * 4096)
    assert need.weights == 2 * (blocks + 2 * 128256 * 4096 + 4096) == 16_060_522_496
    assert need.kv == 2 * 32768 * 32 * 2 * 8 * 128 * 2, "requests x context x layers x k and v x heads x size x bytes"
    small = rows["W4A16, KV FP8"]
    assert small.need is not None and small.speed is not None
    assert small.need.kv * 2 == need.kv
    groups = (blocks - 32 * 2 * 4096) // 128  # a scale of two bytes each, beside half a byte a weight
    assert small.need.weights == pytest.approx((blocks - 32 * 2 * 4096) // 2 + 2 * groups + 4 * 128256 * 4096, rel=1e-4)
    per_request = (small.need.weights - 2 * 128256 * 4096) / 2 + small.need.kv / 2
    assert small.speed.bytes_per_token == pytest.approx(per_request, rel=1e-3), "all weights but the embeddings' rows, and one cache"
    assert small.speed.tokens_per_second == pytest.approx(864e9 / per_request, rel=1e-3)
    assert small.speed.cost_per_million(1.8) == pytest.approx(1.8 / 3600 / small.speed.tokens_per_second * 1e6)


def test_a_mixture_reads_only_the_experts_that_tokens_are_routed_to(layouts: dict[str, ModelLayout]) -> None:
    served = Served.of(Assignment.of(spec().model_copy(update={"passes": []}), layouts["mixtral"]))
    gpu = GPUS["H200"]
    experts = sum(size for size, _ in served.experts)
    assert experts == 32 * 8 * 3 * 4096 * 14336 * 2 and {share for _, share in served.experts} == {0.25}

    def weights(requests: int) -> float:
        return (served.speed(gpu, 1, requests).bytes_per_token - sum(c.read(1) for c in served.caches)) * requests

    assert weights(1) == pytest.approx(served.dense + experts / 4, rel=1e-6)
    assert weights(4) == pytest.approx(served.dense + experts * (1 - 0.75**4), rel=1e-6)
    assert weights(64) == pytest.approx(served.dense + experts, rel=1e-6)


def test_experts_that_go_weigh_nothing_and_are_not_read(layouts: dict[str, ModelLayout]) -> None:
    def served(*passes: Any) -> Served:
        return Served.of(Assignment.of(spec().model_copy(update={"passes": list(passes)}), layouts["mixtral"]))

    whole, half = served(), served({"pruneExperts": {"ratio": 0.5}})
    assert sum(size for size, _ in half.experts) * 2 == sum(size for size, _ in whole.experts)
    assert {share for _, share in half.experts} == {0.5} and half.operations == pytest.approx(whole.operations, rel=1e-4)
    found = fit(spec(context=32768), layouts["mixtral"])
    fewer = next(row for row in found.rows if row.name == "25% of the experts less, W4A16, KV FP8")
    assert found.ladder[0] == fewer, "nothing safer fits"


def test_windows_and_latent_vectors_are_counted_as_engines_keep_them(layouts: dict[str, ModelLayout]) -> None:
    plain = layouts["llama-8b"]
    made = [{"hybridAttention": {"window": 1024, "fullLayers": 8, "context": 32768}}]
    windowed = Served.of(Assignment.of(spec().model_copy(update={"passes": made}), plain))
    token = 2 * 8 * 128 * 2
    kept = -(-(1024 - 1 + 2048) // 16) * 16 + 16
    assert windowed.need(GPUS["RTX-4090"], 32768, 3).kv == 3 * token * (8 * 32768 + 24 * kept)
    latent = replace(plain, config={**plain.config, "kv_lora_rank": 512, "qk_rope_head_dim": 64})
    served = Served.of(replace(Assignment.of(spec().model_copy(update={"passes": []}), plain), layout=latent))
    assert served.need(GPUS["H200"], 4096, 1).kv == 32 * 4096 * (512 + 64) * 2


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("prefer", ["quality", "latency"])
def test_more_memory_never_costs_quality_or_speed(layouts: dict[str, ModelLayout], model: str, prefer: str) -> None:
    before: Fit | None = None
    for gib in MEMORIES[model]:
        found = fit(spec(context=16384, concurrency=2, prefer=prefer, **of_memory(gib << 30)), layouts[model])
        assert all(row.fits == bool(row.need and row.need.total <= gib << 30) for row in found.rows)
        assert all(row.fits and row.proved for row in found.ladder) and len(found.ladder) <= TRIES
        assert [row.loss for row in found.ladder] == sorted({row.loss for row in found.ladder}, reverse=True), (
            "each safer than the one before"
        )
        if before is not None and before.ladder:
            assert found.ladder, "what fitted goes on to fit"
            within = before.ladder[0].loss <= before.target.gate.limit
            if prefer == "quality" or not within:  # where nothing is within the limit, it is the safest plan that is chosen
                assert found.ladder[0].loss <= before.ladder[0].loss
            else:
                assert speed(found) >= 0.99 * speed(before)
        before = found
    assert before is not None and before.ladder


def speed(found: Fit) -> float:
    best = found.ladder[0].speed
    assert best is not None
    return best.tokens_per_second


@settings(max_examples=60, deadline=None)
@given(
    memory=st.integers(2_000, 200_000),
    context=st.integers(1, 131_072),
    concurrency=st.integers(1, 64),
    prefer=st.sampled_from(["quality", "latency"]),
    data=st.booleans(),
)
def test_what_is_chosen_fits_to_the_byte_and_is_chosen_again(memory: int, context: int, concurrency: int, prefer: str, data: bool) -> None:
    asked = spec(data=data, context=context, concurrency=concurrency, prefer=prefer, **of_memory(memory << 20))
    found = fit(asked, small_llama())
    for row in found.ladder:
        assigned = Assignment.of(asked.model_copy(update={"passes": list(row.passes)}), small_llama())
        assert row.need is not None
        if row.budget:  # which a survey may come to
            assert row.need.weights == row.budget >= assigned.plan.tensor_bytes
        else:
            assert row.need.weights == assigned.plan.tensor_bytes
        assert row.need.total <= memory << 20
    assert fit(asked, small_llama()).as_json() == found.as_json()
    if not found.ladder:
        assert min(row.need.total for row in found.rows if row.need) > memory << 20


@cache
def small_llama() -> ModelLayout:
    layout = layout_of(trained_model("llama"))
    return replace(layout, config={**layout.config, "max_position_embeddings": 131_072})


def test_an_fp8_cache_is_added_as_assigning_it_would(layouts: dict[str, ModelLayout]) -> None:
    """The shortcut that spares every second assignment."""
    layout = layouts["llama-8b"]
    for row in fit(spec(gpu="RTX-5090", context=32768), layout).rows:
        if row.served is not None:
            assert row.served == Served.of(Assignment.of(spec().model_copy(update={"passes": list(row.passes)}), layout)), row.name


def test_where_four_bits_fit_and_eight_do_not_the_rest_goes_to_what_needs_it(layouts: dict[str, ModelLayout]) -> None:
    """All memory that is left, and no more; a larger GPU is expected to lose less."""
    losses = []
    for gib in (9.0, 10.0, 11.0):
        memory = round(gib * 2**30)
        found = fit(spec(context=8192, **of_memory(memory)), layouts["llama-8b"])
        chosen = next(row for row in found.rows if row.name == "W4A16 and W8A16 by sensitivity")
        assert chosen.need is not None and chosen.need.total == memory and chosen.fits
        (params,) = chosen.passes[0].values()
        assert params == {"budget": {"bytes": chosen.need.weights}, "candidates": ["W4A16:128", "W8A16"]}
        losses.append(chosen.loss)
    assert 0.018 > losses[0] > losses[1] > losses[2] > 0.001
    assert not [row for row in fit(spec(gpu="H200"), layouts["llama-8b"]).rows if "sensitivity" in row.name], "where 8 bits fit"


def test_only_what_the_gpu_runs_and_the_data_allows(layouts: dict[str, ModelLayout]) -> None:
    def refused(**target: Any) -> dict[str, str]:
        return {row.name: row.refused for row in fit(spec(**target), layouts["llama-8b"]).rows if row.refused}

    old = refused(gpu="T4")
    assert "FP8_DYNAMIC needs compute capability 8.9, T4 has 7.5" in old["FP8"] and "W4A16" not in old
    assert all("compute capability" in old[name] for name in ("NVFP4", "MXFP4", "W4A16, KV FP8"))
    new = refused(gpu="B200")
    assert new.keys() == {"W8A8", "W8A8, KV FP8"} and "below 10.0, B200 has 10.0" in new["W8A8"]
    found = fit(spec(data=False), layouts["llama-8b"])
    assert {row.refused for row in found.rows if "KV FP8" in row.name} == {"needs calibration, which the job does not have"}
    assert next(row for row in found.rows if row.name == "W4A16").passes == ({"rtn": {"scheme": "W4A16", "groupSize": 128}},)


@pytest.mark.parametrize(("model", "requests"), [("llama-70b", 3), ("mixtral", 30)])
def test_each_way_out_that_is_named_works(layouts: dict[str, ModelLayout], model: str, requests: int) -> None:
    asked: dict[str, Any] = {"gpu": "RTX-4090", "context": 32768, "concurrency": requests, "maxPerplexityIncrease": "50%"}
    with pytest.raises(UserError) as caught:
        fit(spec(**asked), layouts[model]).refuse_if_nothing_fits()
    said = str(caught.value)
    assert caught.value.reason == Reason.DOES_NOT_FIT
    assert f"nothing fits RTX-4090 (25.8 GB) at context 32,768, concurrency {requests}: the smallest plan, " in said
    found = re.findall(r"with (context|concurrency) ([\d,]+)", said)
    for what, value in found:
        assert fit(spec(**asked | {what: int(value.replace(",", ""))}), layouts[model]).ladder
        assert not fit(spec(**asked | {what: int(value.replace(",", "")) + 1}), layouts[model]).ladder
    number, unit = re.search(r"on a GPU with ([\d.]+) (GB|MB)", said).groups()  # type: ignore[union-attr]
    memory = round(float(number) * 1.01 * {"GB": 1e9, "MB": 1e6}[unit])
    assert fit(spec(**asked | of_memory(memory)), layouts[model]).ladder


def test_what_is_most_likely_to_miss_is_not_begun(layouts: dict[str, ModelLayout]) -> None:
    asked = of_memory(10 << 30) | {"context": 16384}
    assert fit(spec(**asked, maxPerplexityIncrease="0.5%"), layouts["llama-8b"]).ladder
    found = fit(spec(**asked, maxPerplexityIncrease="0.1%", data=False), layouts["llama-8b"])
    with pytest.raises(UserError) as caught:
        found.refuse_if_nothing_fits()
    assert caught.value.reason == Reason.DOES_NOT_FIT and any(row.fits for row in found.rows)
    assert "the safest plan, W4A16, is expected to cost about 4 % perplexity, and maxPerplexityIncrease is 0.1 %" in str(caught.value)


@pytest.mark.parametrize(
    "target, says",
    [
        ({"gpu": "RTX-409"}, "gpu 'RTX-409' is not known; did you mean RTX-4090"),
        ({"hardware": {"memory": "24Gi", "computeCapability": "8.9", "bandwidth": "1T"}}, "either gpu or device (a name), hardware"),
        ({"gpu": None}, "either gpu or device (a name), hardware"),
    ],
)
def test_what_is_refused_with_the_spec(target: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        spec(**target)
    assert says in str(caught.value)


def test_names_as_people_write_them() -> None:
    assert {gpu_named(name).name for name in ("rtx 4090", "NVIDIA GeForce RTX 4090", "RTX-4090")} == {"RTX-4090"}
    assert gpu_named("nvidia_a100_80gb").name == "A100-80GB"


def test_fit_prints_the_table_and_ends_by_it(headers: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    uri = str(headers["llama-8b"])
    assert run_cli(["fit", uri, "--gpu", "RTX-4090", "--context", "65536", "--concurrency", "2", "--price-per-hour", "0.4"]) == 0
    printed, _ = capfd.readouterr()
    (chosen,) = [line for line in printed.splitlines() if line.lstrip().startswith(">")]
    assert "W8A16, KV FP8" in chosen and "yes" in chosen and "8.6 GB" in chosen
    assert "not here: NVFP4 and 1 more: NVFP4 needs compute capability 10.0, RTX-4090 has 8.9" in printed
    assert run_cli(["fit", uri, "--gpu", "T4", "--context", "8192", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["ladder"][0] == next(plan["plan"] for plan in told["plans"] if plan["fits"])
    wrong = {
        ("--gpu", "RTX-4099"): "did you mean RTX-4090",
        ("--gpu", "T4", "--context", "131073"): "131,073 is above the 131,072 tokens",
        ("--gpu", "T4", "--context", "131072", "--concurrency", "64"): "nothing fits T4",
        ("--memory", "24Gi"): "memory and bandwidth describe a device together",
        ("--memory", "24Gi", "--compute-capability", "8.9"): "hardware.bandwidth: Field required",
    }
    for arguments, says in wrong.items():
        assert run_cli(["fit", uri, *arguments]) == 64
        assert says in capfd.readouterr().err.replace("\n", " ")
