"""Blocks tuned in the stream: on every kind of block and behind every kind of loss, cut off, stopped, led astray, and refused.

How much comes back on trained models is in test_recover_quality.py.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import smaller
import test_structured_families
import torch
from nursery import Nursery
from test_calibrated_resume import data
from test_resume import files_of, refuse_other_bytes
from test_structured_families import compress, require_function, token_rows
from test_structured_resume import cut_off

import jobs
from independent import tensors_of
from kompressor_worker.cli import run_cli
from kompressor_worker.errors import UserError
from kompressor_worker.job import load_job
from kompressor_worker.plan import make_plan
from kompressor_worker.recovering import Recovery
from kompressor_worker.tuning import Plain

Passes = list[dict[str, Any]]
STEPS = 10
RECOVER: dict[str, Any] = {"recover": {"steps": STEPS, "batchRows": 6, "learningRate": 0.005}}
SHAPE = {**test_structured_families.SHAPE, "num_hidden_layers": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    **test_structured_families.FAMILIES,
    "qwen2_moe": {"mlp_only_layers": [1]},
    "qwen3_moe": {"mlp_only_layers": [1], "decoder_sparse_step": 1},
}
W2, W4 = ({"scheme": scheme, "groupSize": 32} for scheme in ("W2A16", "W4A16"))
WIDTH, HEADS = {"pruneWidth": {"ratio": 0.5, "multiple": 32}}, {"pruneHeads": {"kvHeads": 2}}
HALF = {"sparseGPT": {"pattern": "2:4"}}
CASES: dict[str, tuple[str, Passes]] = {
    "width, heads": ("llama", [WIDTH, HEADS, RECOVER]),
    "width, then 4 bits": ("qwen2", [WIDTH, RECOVER, {"gptq": W4}, RECOVER]),
    "channels": ("phi3", [{"pruneHidden": {"hiddenSize": 96}}, RECOVER]),
    "layers, with maps": ("qwen3", [{"pruneLayers": {"layers": 2}}, RECOVER]),
    "layers, without": ("gemma2", [{"pruneLayers": {"layers": 2}}, RECOVER]),
    "2 bits, a cache": ("llama", [{"rtn": W2}, RECOVER, {"kvCache": {}}]),
    "2 bits with zero points": ("qwen2", [{"gptq": {**W2, "scheme": "W2A16_ASYM"}}, RECOVER]),
    "scales folded, zeros": ("llama", [{"smoothQuant": {}}, HALF, {"rtn": {"scheme": "W8A8"}}, RECOVER]),
    "experts go": ("qwen3_moe", [{"pruneExperts": {"experts": 2}}, RECOVER]),
    "experts join, 2 bits": ("mixtral", [{"mergeExperts": {"experts": 2}}, {"rtn": W2}, RECOVER]),
    "some of them": ("qwen2_moe", [{"rtn": {**W2, "targets": ["re:.*experts.*"]}}, RECOVER]),
}


def model_of(family: str, folder: Path) -> Path:
    return smaller.lively(families.tiny_model(family, **{**SHAPE, **FAMILIES[family]}), folder / "source")


@pytest.mark.parametrize("case", CASES)
def test_what_comes_out_is_no_farther_and_what_was_reported(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published files are the function that the report speaks of; no block is worse than before on rows that have not taught it, and
    some are better, though the weights are random and so are the tokens."""
    monkeypatch.setattr(test_structured_families, "ROWS", 64)
    family, passes = CASES[case]
    source = model_of(family, tmp_path)
    report = compress(source, tmp_path, passes)
    if "2 bits" not in case and case != "some of them":
        require_function(source, tmp_path / "out", report, 1e-4)
    times, better = sum(entry is RECOVER for entry in passes), 0
    for block in report["blocks"]:
        said = block["notes"][block["name"]]["recover"]
        assert len(said) == times and all(each["errorAfter"] <= each["errorBefore"] and each["steps"] == STEPS for each in said)
        better += any(each["errorAfter"] < each["errorBefore"] and each["bestStep"] > 0 for each in said)
    assert better


def test_zeros_stay_and_all_else_moves(tmp_path: Path) -> None:
    """Two zeros of four neighbours, before and behind a pass that quantises; routers as they were."""
    source = families.tiny_model("qwen3_moe", **SHAPE)
    compress(source, tmp_path, [HALF, RECOVER])
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "kompressor.json").read_text())
    assert report["result"]["sparsity"] == pytest.approx(0.5)
    moved = 0
    for name, weight in after.items():
        if name.endswith("mlp.gate.weight"):
            assert torch.equal(weight, before[name]), name
        elif name.endswith("_proj.weight"):
            assert bool(((weight.view(-1, 4) != 0).sum(1) <= 2).all()), name
        elif ".layers." in name:
            moved += not torch.equal(weight, before[name])
    assert moved >= 8, "norms learn, too"
    (tmp_path / "quantised").mkdir()
    compress(source, tmp_path / "quantised", [HALF, {"rtn": {"scheme": "W8A8"}}, RECOVER])
    for name, codes in tensors_of(tmp_path / "quantised" / "out").items():
        if codes.dtype is torch.int8:
            assert bool(((codes.view(-1, 4) != 0).sum(1) <= 2).all()), name


ENDINGS: dict[str, tuple[str, Passes]] = {
    "turned": ("llama", [{"rotate": {}}, HALF]),
    "narrower, tied": ("qwen3", [{"pruneHidden": {"hiddenSize": 96}}]),
    "capped, the last block gone": ("gemma2", [{"pruneLayers": {"layers": 2}}]),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_the_last_block_is_judged_by_the_logits(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row, which teaches and judges: the error that is reported is the KL that transformers measures at all its positions."""
    monkeypatch.setattr(test_structured_families, "ROWS", 1)
    family, passes = ENDINGS[case]
    source = model_of(family, tmp_path)
    report = compress(source, tmp_path, [*passes, RECOVER])
    last = report["blocks"][-1]
    (said,) = last["notes"][last["name"]]["recover"]
    row = torch.tensor([[*token_rows(1)[0], 0]])  # one more, for what the last position says
    assert said["errorAfter"] < said["errorBefore"]
    assert said["errorAfter"] == pytest.approx(float(smaller.divergences(source, tmp_path / "out", row).mean()), rel=1e-3)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight thin blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("blocks")
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=512, tie_word_embeddings=False)).to(torch.bfloat16).save_pretrained(folder)
    return folder


PASSES: Passes = [HALF, RECOVER, {"gptq": {"scheme": "W4A16", "groupSize": 32, "ignore": ["re:.*down_proj"]}}, RECOVER]


def job(tmp_path: Path, model: Path, out: str, passes: Passes = PASSES, rows: int = 8) -> Path:
    body = jobs.manifest(model.as_uri(), (tmp_path / out).as_uri(), passes)
    for section, seed in (("calibration", 1), ("evaluation", 2)):
        dataset = {"uri": data(tmp_path / f"{section}.jsonl", rows, 24, seed), "tokens": "ids"}
        body["spec"][section] = {"dataset": dataset, "samples": rows, "sequenceLength": 24}
    return jobs.write(tmp_path / f"{out}.json", body)


def test_killed_it_goes_on_to_the_same_bytes(nursery: Nursery, blocks: Path, tmp_path: Path) -> None:
    code, said = nursery.run(job(tmp_path, blocks, "whole"))
    assert code == 0, said
    refuse_other_bytes(nursery, lambda out: job(tmp_path, blocks, out), 3, 0)


def test_blocks_that_are_gone_are_read_ahead_and_passed_over_on_a_restart(nursery: Nursery, blocks: Path, tmp_path: Path) -> None:
    """Many rows: commits leave blocks, so a restart takes the rows through them again, and reads what is behind them once more."""
    passes: Passes = [{"pruneLayers": {"layers": 5, "correction": "none"}}, {"recover": {"steps": 2, "batchRows": 4}}]
    whole = job(tmp_path, blocks, "whole", passes, rows=200)
    code, said = nursery.run(whole)
    assert code == 0, said
    wanted = files_of(tmp_path / "whole")
    cut = job(tmp_path, blocks, "cut", passes, rows=200)
    for at in (3, 7):
        cut_off(nursery, cut, lambda state, at=at: state.unit >= at)
    code, said = nursery.run(cut)
    assert code == 0 and "going on at unit" in said, said
    made = files_of(tmp_path / "cut")
    assert made.keys() == wanted.keys()
    assert [name for name in wanted if name != "report.html" and made[name] != wanted[name]] == []


@pytest.fixture
def own_signals() -> Iterator[None]:
    """A worker that runs here leaves the handlers as they were."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_sigterm_stops_it_inside_a_step(blocks: Path, tmp_path: Path, own_signals: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heard in the midst of a backward, after which nothing is learned any more."""
    hears, moves = Recovery._hear, Plain.move
    count = {"heard": 0, "moved": 0}

    def hear(self: Recovery, gradient: torch.Tensor) -> None:
        count["heard"] += 1
        if count["heard"] == 50:
            os.kill(os.getpid(), signal.SIGTERM)
            count["moved"] = 0
        hears(self, gradient)

    def move(self: Plain, rates: tuple[float, float]) -> None:
        count["moved"] += 1
        moves(self, rates)

    monkeypatch.setattr(Recovery, "_hear", hear)
    monkeypatch.setattr(Plain, "move", move)
    assert run_cli(["run", str(job(tmp_path, blocks, "out"))]) == 75
    assert count == {"heard": 50, "moved": 0}


def test_what_runs_away_is_left_where_it_was_best(blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the third look every weight becomes infinite: the best before it is what is published."""
    moves = Plain.move

    def move(self: Plain, rates: tuple[float, float]) -> None:
        moves(self, rates)
        if self._taken == 4:
            self.value.data.fill_(float("inf"))

    monkeypatch.setattr(Plain, "move", move)
    assert run_cli(["run", str(job(tmp_path, blocks, "out", [HALF, RECOVER]))]) == 0
    report = json.loads((tmp_path / "out" / "kompressor.json").read_text())
    said = [block["notes"][block["name"]]["recover"][0] for block in report["blocks"]]
    assert all(each["stopped"] == 4 and each["bestStep"] < 4 for each in said) and any(each["bestStep"] for each in said)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors_of(tmp_path / "out").values())


REFUSED: dict[str, tuple[Passes, str]] = {
    "the first": ([RECOVER, {"gptq": W4}], "recover: no pass before it prunes or quantises, so there is nothing to recover"),
    "nothing lost": ([{"rotate": {}}, RECOVER], "nothing to recover; put it behind the one whose loss"),
    "twice": ([WIDTH, RECOVER, RECOVER], r"passes\[2\].recover: nothing has been compressed since passes\[1\]; leave it out, or raise"),
    "a shape behind it": ([WIDTH, RECOVER, HEADS, RECOVER], r"passes\[2\].pruneHeads: changes blocks that passes\[1\] has tuned; put"),
    "a basis behind it": ([WIDTH, RECOVER, {"rotate": {}}], r"passes\[2\].rotate: changes blocks that passes\[1\] has tuned"),
    "no steps": ([WIDTH, {"recover": {"steps": 0}}], "steps: .*greater than or equal to 1"),
    "a word": ([WIDTH, {"recover": {"step": 1}}], "'step' is not a parameter; did you mean steps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_from_headers(case: str, tmp_path: Path) -> None:
    passes, said = REFUSED[case]
    path = job(tmp_path, families.tiny_model("llama", **SHAPE), "out", passes)
    with pytest.raises(UserError, match=said):
        make_plan(load_job(path, {}), {})


def test_it_needs_data_and_the_plan_knows_what_it_takes(tmp_path: Path) -> None:
    model = families.tiny_model("llama", **SHAPE)
    path = job(tmp_path, model, "out", [WIDTH, RECOVER])
    tuned, plain = (make_plan(load_job(p, {}), {}).as_json() for p in (path, job(tmp_path, model, "plain", [WIDTH])))
    weights = 3 * (2 * 128 * (256 + 128) + 3 * 128 * 128) + 128 * 128  # the head is met by the last block
    assert tuned["multiplyAdds"]["tuning"] == 3 * STEPS * 6 * 24 * weights and plain["multiplyAdds"]["tuning"] == 0
    assert tuned["peakMemoryBytes"] > plain["peakMemoryBytes"]
    body = json.loads(path.read_text())
    del body["spec"]["calibration"]
    path.write_text(json.dumps(body))
    with pytest.raises(UserError, match=r"passes\[0\].pruneWidth: measures activations"):
        make_plan(load_job(path, {}), {})
    body["spec"]["passes"] = [{"rtn": W2}, RECOVER]
    path.write_text(json.dumps(body))
    with pytest.raises(UserError, match=r"passes\[1\].recover: measures activations, .* or leave it out"):
        make_plan(load_job(path, {}), {})
