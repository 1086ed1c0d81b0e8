"""A pass may take minutes over one layer; told to stop, it stops after a piece of it, and the job goes on at its last commit."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blockwise import layout_of, prepared
from kernel_inputs import layer, of_range
from test_resume import files_of
from torch.utils._python_dispatch import TorchDispatchMode

import jobs
from independent import tensors_of
from kompressor_worker import grid, kernels
from kompressor_worker.activations import Activations, Spill
from kompressor_worker.block_work import Place, Streams
from kompressor_worker.calibrated import Engine
from kompressor_worker.cli import run_cli
from kompressor_worker.decoder import Decoder
from kompressor_worker.kernels import cholesky, pieces
from kompressor_worker.schemes import SCHEMES

SHARE = 0.1
"""Of the work on a block, what may pass unheard."""
W4 = {"scheme": "W4A16", "groupSize": 32}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks with an FFN as wide as wide ones are beside the rest."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("wide")
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128, tie_word_embeddings=False)).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 8e6)
    monkeypatch.setattr(pieces, "FEWEST", 8)
    monkeypatch.setattr(cholesky, "PANEL", 256)


class Meter(TorchDispatchMode):
    """Adds up what operations cost: products and factorisations in multiply-adds, the rest in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.work = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        first = made[0] if isinstance(made, tuple | list) else made
        if isinstance(first, torch.Tensor):
            self.work += cost(func.overloadpacket.__name__, first.numel(), [a for a in args if isinstance(a, torch.Tensor)])
        return made


def cost(name: str, elements: int, tensors: list[torch.Tensor]) -> float:
    match name:
        case "mm" | "bmm":
            return elements * tensors[0].shape[-1]
        case "addmm" | "addmm_":
            return elements * tensors[1].shape[-1]
        case "linalg_cholesky_ex":
            return elements * tensors[0].shape[-1] / 3
        case "linalg_solve_triangular":
            return elements * tensors[0].shape[-1] / 2
        case "gptq" | "gptq_groups":
            return elements * tensors[0].shape[-1] / 2
    return elements


@pytest.mark.parametrize(
    "entries",
    [
        [{"gptq": W4}],
        [{"gptq": W4 | {"actOrder": "none"}}],
        [{"gptq": {"scheme": "W8A8", "observer": "mse"}}],
        [{"smoothQuant": {}}, {"gptq": {"scheme": "W8A8"}}],
        [{"awq": W4}],
    ],
    ids=lambda entries: "+".join(name for entry in entries for name in entry),
)
def test_no_piece_is_long(entries: list[dict[str, Any]], wide: Path, small_pieces: None) -> None:
    layout, passes, schemes = prepared(layout_of(wide), entries)
    state, decoder = tensors_of(wide), Decoder(layout, torch.device("cpu"))
    tokens = torch.randint(3, 128, (2, 32), generator=torch.Generator().manual_seed(0))
    stream = Activations.of("calibration", list(tokens), decoder.dtype, 64, Spill(1 << 30), torch.device("cpu"))
    stream.embed(0, decoder.embed(state["model.embed_tokens.weight"]))
    unit = next(u for u in layout.units if ".layers." in u.name)
    heard = [0.0]
    with Meter() as meter:
        engine = Engine(decoder, passes, schemes, Streams(calibration=stream))
        written: list[int] = []
        engine.block(
            Place(0, 0),
            unit,
            lambda stage: {t.name: state[t.name] for t in stage.tensors},
            lambda number, _: written.append(number),
            lambda _: heard.append(meter.work),
        )
    assert written == list(range(len(unit.stages)))
    gaps = [after - before for before, after in zip(heard, [*heard[1:], meter.work], strict=True)]
    assert max(gaps) < SHARE * meter.work, f"{max(gaps) / meter.work:.0%} of the work in one piece"


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, factor, x = layer(100, 300, 3)
    hessian = (x.T @ x).float()
    scheme = SCHEMES["W4A16_ASYM"]
    found = of_range(weight, scheme)
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())

    def results() -> tuple[list[torch.Tensor], torch.Tensor, Counter[str]]:
        calls = Counter[str]()
        codes, _ = kernels.gptq(weight, factor, found, scheme, None, lambda: calls.update(["given"]))
        ours, spans, _ = kernels.gptq_groups(weight, factor, scheme, torch.bfloat16, lambda: calls.update(["groups"]))
        inverse = kernels.inverse_factor(hessian.clone(), lambda: calls.update(["factor"]))
        assert inverse is not None and spans.zero_point is not None
        return [codes, ours, spans.scale, spans.zero_point], inverse, calls

    whole, inverse, _ = results()
    monkeypatch.setattr(pieces, "PIECE", 1.0)
    monkeypatch.setattr(pieces, "FEWEST", 16)
    monkeypatch.setattr(cholesky, "PANEL", 64)
    cut, same, calls = results()
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))
    assert torch.allclose(inverse, same, rtol=1e-4, atol=1e-5 * float(inverse.abs().max()))
    assert calls["given"] == calls["groups"] == 7 and calls["factor"] > 20


@pytest.fixture
def own_signals() -> Iterator[None]:
    """A worker that runs here leaves the handlers as they were."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def job(folder: Path, model: Path, out: str) -> Path:
    chance = random.Random(1)
    lines = (json.dumps({"ids": [chance.randrange(3, 128) for _ in range(32)]}) for _ in range(2))
    if not (folder / "rows.jsonl").exists():
        (folder / "rows.jsonl").write_text("\n".join(lines))
    body = jobs.manifest(model.as_uri(), (folder / out).as_uri(), [{"awq": W4}])
    dataset = {"uri": (folder / "rows.jsonl").as_uri(), "tokens": "ids"}
    body["spec"]["calibration"] = {"dataset": dataset, "samples": 2, "sequenceLength": 32}
    return jobs.write(folder / f"{out}.json", body)


def test_sigterm_inside_a_search(
    wide: Path, tmp_path: Path, own_signals: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each call of `quantize` is one candidate of the search, tried on one weight: once the signal has come there is not another one."""
    calls = 0
    rounding = grid.quantize
    at: int | None = None

    def quantize(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return rounding(*args)

    monkeypatch.setattr(grid, "quantize", quantize)
    assert run_cli(["run", str(job(tmp_path, wide, "whole"))]) == 0
    whole, at, calls = calls, calls * 3 // 4, 0  # inside the second block
    cut = job(tmp_path, wide, "cut")
    assert run_cli(["run", str(cut)]) == 75
    assert calls == at < whole
    caplog.clear()
    with caplog.at_level("INFO"):
        assert run_cli(["run", str(cut)]) == 0
    assert "going on at unit 2 of" in caplog.text
    assert {n: d for n, d in files_of(tmp_path / "cut").items() if n != "report.html"} == {
        n: d for n, d in files_of(tmp_path / "whole").items() if n != "report.html"
    }
