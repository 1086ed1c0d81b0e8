"""A training's event file, read by TensorBoard itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from kompressor_worker.distil.lesson import History
from kompressor_worker.event_files import event_file


def test_tensorboard_reads_every_point(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curve = [{"step": n, "loss": 2.0 / n, "divergence": 1.0 / n, "learningRate": 1e-4, "gradientNorm": 0.5} for n in range(1, 31)]
    evaluations = [
        {"step": 0, "kl": 0.5, "crossEntropy": 2.0, "agreement": 0.8},
        {"step": 30, "kl": 0.25, "crossEntropy": 1.9, "agreement": 0.9},
    ]
    history = History(30, 1000, 60.0, 30, "", curve, evaluations, [1])
    ((name, data),) = event_file(history).items()
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(data)
    found = EventAccumulator(str((tmp_path / name).parent), size_guidance={"scalars": 0})
    found.Reload()
    losses = found.Scalars("training/loss")
    assert [event.step for event in losses] == [*range(1, 31)]
    assert [event.value for event in losses] == pytest.approx([point["loss"] for point in curve])
    assert losses[-1].wall_time == pytest.approx(60.0)
    assert [(event.step, event.value) for event in found.Scalars("heldOut/kl")] == [(0, 0.5), (30, 0.25)]
