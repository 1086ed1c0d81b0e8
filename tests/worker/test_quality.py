"""Every algorithm pays: real jobs on a trained model, and on plants of what each algorithm is for, beside the same without it.

Judged by KL from the source on 16,384 held-out tokens, at the upper end of the 95 % interval of the ratio. And each claim is made a second
time with its search or update switched off: then it must fail, or it would prove nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from plants import SPIKING, loud_channels, principal_axes, spiking_tokens
from quality import Laboratory, Passes, require_ratio

from calibrated_jobs import write_data
from kompressor_worker import kernels, observers
from kompressor_worker.passes import awq, clipping, rotation, scale_search
from kompressor_worker.passes.smooth_quant import SmoothQuant
from models import held_out_tokens, token_rows, trained_model

ROWS, LENGTH = 128, 128
"""Of the held-out tokens."""
W3 = {"scheme": "W3A16", "groupSize": 128}
W4 = {"scheme": "W4A16", "groupSize": 128}
W4_CHANNEL = {"scheme": "W4A16", "groupSize": -1}
W8A8 = {"scheme": "W8A8"}
STATIC = {"scheme": "W8A8_STATIC"}
MSE = {"observer": "mse"}

Patch = pytest.MonkeyPatch


class Unturned:
    """A rotation that turns nothing."""

    def __init__(self, size: int, seed: int) -> None: ...

    def rows(self, x: torch.Tensor, scale: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return (x.double() if scale is None else x.double() * scale).to(dtype or x.dtype)

    def columns(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return x.to(dtype or x.dtype)


def no_update(patch: Patch) -> None:
    """The column loop passes no error on."""
    loop = kernels.gptq
    patch.setattr(kernels, "gptq", lambda weight, inverse, *rest, **more: loop(weight, torch.eye(len(inverse)), *rest, **more))


def no_clipping(patch: Patch) -> None:
    patch.setattr(awq, "CLIP_RATIOS", (1.0,))


def no_scale(patch: Patch) -> None:
    patch.setattr(scale_search, "best_scaling", lambda *_: None)


def no_smoothing(patch: Patch) -> None:
    patch.setattr(SmoothQuant, "_scale", lambda _, __, site: torch.ones_like(site.statistics.largest))


def no_rotation(patch: Patch) -> None:
    patch.setattr(rotation, "Rotation", Unturned)


def no_range_search(patch: Patch) -> None:
    patch.setattr(observers, "_search", lambda cost, whole, start=None: whole)


def no_weight_search(patch: Patch) -> None:
    patch.setattr(clipping, "best_shares", lambda weight, scheme, *_: torch.ones(scheme.scale_shape(tuple(weight.shape))))


@dataclass(frozen=True)
class Claim:
    """`passes` on a model (`plain` or a plant) leave less than `below` of the KL that `than` leaves; not so once `off` has been called."""

    model: str
    passes: Passes
    than: Passes
    off: Callable[[Patch], None]
    below: float = 1.0


CLAIMS = {
    "gptq W3 g128": Claim("plain", [{"gptq": W3}], [{"rtn": W3 | MSE}], no_update, below=0.9),  # on the same grids
    "gptq W4 channel": Claim("plain", [{"gptq": W4_CHANNEL}], [{"rtn": W4_CHANNEL | MSE}], no_update, below=0.9),
    "awq W3 g128": Claim("plain", [{"awq": W3}], [{"rtn": W3}], no_clipping, below=0.9),
    "awq W4 channel": Claim("plain", [{"awq": W4_CHANNEL}], [{"rtn": W4_CHANNEL}], no_clipping, below=0.9),
    "awq scales": Claim("loud", [{"awq": W4_CHANNEL | {"clip": False}}], [{"rtn": W4_CHANNEL}], no_scale),
    "smoothQuant": Claim("loud", [{"smoothQuant": {}}, {"rtn": W8A8}], [{"rtn": W8A8}], no_smoothing),
    "rotate W4": Claim("learned axes", [{"rotate": {}}, {"rtn": W4}], [{"rtn": W4}], no_rotation),
    "rotate W8A8": Claim("axes", [{"rotate": {}}, {"rtn": STATIC}], [{"rtn": STATIC}], no_rotation),
    "mse inputs": Claim("spikes", [{"rtn": STATIC | {"inputObserver": "mse"}}], [{"rtn": STATIC}], no_range_search),
    "entropy inputs": Claim("spikes", [{"rtn": STATIC | {"inputObserver": "entropy"}}], [{"rtn": STATIC}], no_range_search),
    "mse weights": Claim("plain", [{"rtn": W4_CHANNEL | MSE}], [{"rtn": W4_CHANNEL}], no_weight_search),
}


@pytest.fixture(scope="module")
def models(trained_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tokenizers import Tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("plants"), Tokenizer.from_file(str(trained_llama / "tokenizer.json"))
    learned, seen = trained_model("llama_learned"), token_rows(trained_llama, 0, seed=5, rows=16, length=LENGTH)
    return {
        "plain": trained_llama,
        "learned": learned,  # the same language and tokenizer
        "loud": loud_channels(trained_llama, folder / "loud"),
        "axes": principal_axes(trained_llama, folder / "axes", seen),
        "learned axes": principal_axes(learned, folder / "learned", seen),
        "spikes": spiking_tokens(trained_llama, folder / "spikes", [tokenizer.token_to_id(character) for character in SPIKING]),
    }


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    """Calibrated with text in which every eighth story ends with a character that no held-out text has."""
    folder = tmp_path_factory.mktemp("quality")
    calibration = write_data(folder, "llama")["calibration"]
    stories = [json.loads(line)["text"] for line in calibration.read_text().splitlines()]
    for number in range(0, len(stories), 8):
        stories[number] += SPIKING[number // 8 % len(SPIKING)]
    calibration.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    return Laboratory(folder, calibration, held_out_tokens("llama", ROWS, LENGTH))


def hold(claim: Claim, models: dict[str, Path], laboratory: Laboratory) -> None:
    source = models[claim.model]
    require_ratio(laboratory.divergence(source, claim.passes), laboratory.baseline(source, claim.than), claim.below)


def test_plants_preserve_the_function(models: dict[str, Path], laboratory: Laboratory) -> None:
    assert laboratory.held_out.numel() >= 16_000
    plain = laboratory.original(models["plain"])
    assert torch.equal(laboratory.original(models["loud"]), plain)
    assert torch.equal(laboratory.original(models["spikes"]), plain)
    for source, plant in (("plain", "axes"), ("learned", "learned axes")):
        p, q = laboratory.original(models[source]), laboratory.original(models[plant])
        assert float((p.exp() * (p - q)).sum(-1).mean()) < 5e-5, "more than bf16 costs"


@pytest.mark.parametrize("name", CLAIMS)
def test_the_algorithm_pays(name: str, models: dict[str, Path], laboratory: Laboratory) -> None:
    hold(CLAIMS[name], models, laboratory)


@pytest.mark.parametrize("name", CLAIMS)
def test_and_switched_off_it_does_not(name: str, models: dict[str, Path], laboratory: Laboratory, monkeypatch: Patch) -> None:
    claim = CLAIMS[name]
    laboratory.baseline(models[claim.model], claim.than)  # before anything is off
    claim.off(monkeypatch)
    with pytest.raises(AssertionError, match=f"allowed is less than {claim.below}"):
        hold(claim, models, laboratory)
