"""Every kind of decoder can be trained: gradients reach all of it, and checkpoints of it are whole on every kind of storage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import tiny_model
from lessons import lesson, noisy, published, rows_of
from places import Place

from independent import tensors_of
from kompressor_worker.distil.checkpoints import Checkpoints
from kompressor_worker.distil.lesson import Group, History
from kompressor_worker.distil.together import Together
from kompressor_worker.distil.train import train
from kompressor_worker.errors import ClaimLost, UserError


@pytest.mark.parametrize("family", ["qwen2", "smollm3", "gemma2", "gemma3", "olmo3", "phi3", "mixtral", "qwen2_moe", "deepseek_v3"])
def test_families(family: str, tmp_path: Path) -> None:
    teacher = tiny_model(family)
    student = noisy(teacher, tmp_path / "student")
    how = {"learningRate": 2e-4, "schedule": "constant", "warmup": 0.0, "activationCheckpointing": True}
    params = {"batch": 8, "steps": 10, "validationRows": 8, "evaluateEvery": 5, **how}
    given = lesson(teacher, student, tmp_path / "out", rows_of("random", 64, 24), params)
    found = [each["kl"] for each in train(given).evaluations]
    assert min(found) < 0.9 * found[0], found
    tensors, before = published(given), tensors_of(student)
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == {name: (t.dtype, t.shape) for name, t in before.items()}
    same = [name for name, tensor in tensors.items() if torch.equal(tensor, before[name])]
    assert all(name.endswith(("e_score_correction_bias", "norm.weight", "bias")) for name in same), same


def test_checkpoints(place: Place) -> None:
    alone, of = Together(Group(), torch.device("cpu")), {"student": "a", "rows": [0, 8]}

    def state(fill: float) -> dict[str, torch.Tensor]:
        return {"weight/a": torch.full((5, 3), fill), "step/a": torch.tensor(fill), "exp_avg/b": torch.full((0, 4), fill)}

    first = Checkpoints(place.output(), alone, of)
    history = History(steps=1, curve=[{"step": 1, "loss": 2.5}])
    first.save(state(1), history, best=True)
    first.save(state(2), replace(history, steps=2), best=False)
    second = Checkpoints(place.output(), alone, of)
    assert (second.manifest.history.steps, second.manifest.history.curve) == (2, history.curve)
    for saved, fill in ((second.manifest.last, 2), (second.manifest.best, 1)):
        assert saved is not None
        held = state(0)
        second.load(held, saved)
        assert all(torch.equal(held[name], value) for name, value in state(fill).items())
    second.save(state(3), replace(history, steps=3), best=True)
    assert all(place.output().read(name) is None for name in first.manifest.last.objects if first.manifest.last)  # no two are kept
    with pytest.raises(ClaimLost):  # another leader goes on here
        first.save(state(4), replace(history, steps=3), best=True)
    held = state(0)
    third = Checkpoints(place.output(), alone, of)
    assert third.manifest.last is not None and third.manifest.last.step == 3
    third.load(held, third.manifest.last)
    assert torch.equal(held["weight/a"], state(3)["weight/a"])
    with pytest.raises(UserError, match="a training is here whose student was a, this one's is b"):
        Checkpoints(place.output(), alone, {**of, "student": "b"})
