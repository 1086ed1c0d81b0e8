"""Trainings that are killed, stopped and shared out: the loss curve goes on as if nothing had been."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from families import tiny_model
from lessons import narrower, noisy, stored
from trainees import Run, Trainees

from kompressor_api.v1alpha1 import OutputSpec
from kompressor_worker.distil.lesson import trained_object
from kompressor_worker.storage.locations import open_output
from models import trained_model

KIND = "llama_thin"
ROWS = (KIND, 256, 64)
PARAMS = {"batch": 8, "learningRate": 1e-3, "steps": 24, "validationRows": 16, "checkpointEvery": 0, "evaluateEvery": 8}


@pytest.fixture(scope="module")
def trainees() -> Iterator[Trainees]:
    with Trainees() as ready:
        yield ready


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return narrower(KIND, tmp_path_factory.mktemp("narrow") / "model", 0.5)


class Place:
    """Where one training is, run after run."""

    def __init__(self, trainees: Trainees, student: Path, folder: Path) -> None:
        self.trainees, self.student, self.folder = trainees, student, folder

    def begin(self, size: int = 1, source: Path | None = None, rows: Sequence[Any] = ROWS, **asked: Any) -> Run:
        teacher, out = source or trained_model(KIND), self.folder / "out"
        return self.trainees.train(teacher, self.student, out, rows, PARAMS | asked, self.folder / "logs", size)

    def result(self) -> list[bytes]:
        output = open_output(OutputSpec(uri=f"file://{self.folder / 'out'}"), {})
        return [found[0] for unit in range(len(stored(self.student).layout.units)) if (found := output.read(trained_object(unit)))]


@pytest.fixture(scope="module")
def undisturbed(trainees: Trainees, narrow: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, float], list[bytes]]:
    place = Place(trainees, narrow, tmp_path_factory.mktemp("undisturbed"))
    run = place.begin()
    assert run.wait() == [0], run.logs[0].read_text()
    return run.losses(), place.result()


def test_killed_at_random_moments(
    trainees: Trainees, narrow: Path, undisturbed: tuple[dict[int, float], list[bytes]], tmp_path: Path
) -> None:
    place, drawn, seen = Place(trainees, narrow, tmp_path), random.Random(4), dict[int, float]()
    for step in sorted(drawn.sample(range(1, 24), 10)):
        run = place.begin()
        run.wait_for_step(step)
        run.kill()
        seen |= run.losses()
    run = place.begin()
    assert run.wait() == [0], run.logs[0].read_text()
    assert seen | run.losses() == undisturbed[0]
    assert place.result() == undisturbed[1]
    (history,) = run.said("history")
    assert [each["step"] for each in history["curve"]] == list(range(1, 25)) and history["steps"] == 24


def test_four_processes_and_one_go_the_same_way(
    trainees: Trainees, narrow: Path, undisturbed: tuple[dict[int, float], list[bytes]], tmp_path: Path
) -> None:
    """Stopped in the middle, by a signal to one of them; the other half is done by three, which no tensor is cut evenly for."""
    place = Place(trainees, narrow, tmp_path)
    run = place.begin(4)
    run.wait_for_step(10)
    run.terminate(2)
    assert run.wait() == [75, 75, 75, 75], run.logs[0].read_text()
    seen = run.losses()
    assert max(seen) < 24
    run = place.begin(3)
    assert run.wait() == [0, 0, 0], run.logs[0].read_text()
    seen |= run.losses()
    assert sorted(seen) == list(range(1, 25))
    assert max(abs(seen[step] - loss) for step, loss in undisturbed[0].items()) < 1e-3
    (history,) = run.said("history")
    assert history["processes"] == [4, 3] and len(place.result()) == len(undisturbed[1])
    once = sum(stored(model).layout.source_bytes for model in (trained_model(KIND), narrow))
    assert [run.said("read", rank) for rank in range(3)] == [[once], [0], [0]], "each tensor is read once by all of them together"


def test_experts_without_a_token(trainees: Trainees, tmp_path: Path) -> None:
    """Rows of three tokens reach other experts in one process than in the other; the teacher's logits are written by both, and read."""
    teacher = tiny_model("qwen2_moe")
    asked = {"batch": 2, "steps": 6, "sequenceLength": 3, "evaluateEvery": 3, "teacher": {"offline": {"topK": 127}}}
    curves = []
    for size in (1, 2):
        place = Place(trainees, noisy(teacher, tmp_path / f"student-{size}"), tmp_path / str(size))
        run = place.begin(size, teacher, ("random", 48, 3), **asked)
        assert run.wait() == [0] * size, "\n".join(log.read_text() for log in run.logs)
        curves.append(list(run.losses().values()))
    assert len(curves[0]) == 6 and curves[1] == pytest.approx(curves[0], abs=1e-3)
