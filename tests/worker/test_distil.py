"""Students trained from end to end in one process: they learn, they stop as they should, and what comes out is what was trained."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blockwise import kl, logits
from lessons import lesson, narrower, published, rows_of
from sources import folder_source

from independent import tensors_of
from kompressor_api.v1alpha1 import OutputSpec
from kompressor_worker.distil.lesson import TRAINED, Lesson, TrainingStep, finished
from kompressor_worker.distil.losses import Losses
from kompressor_worker.distil.optimizer import learning_rate
from kompressor_worker.distil.order import Order, shuffled
from kompressor_worker.distil.together import refuse_parallelism
from kompressor_worker.distil.train import train
from kompressor_worker.errors import BadNumerics, UserError
from kompressor_worker.passes.distil import DistilParams
from kompressor_worker.storage.locations import open_output
from models import trained_model

KIND = "llama_thin"
PARAMS = {"batch": 8, "learningRate": 1e-3, "steps": 40, "validationRows": 32}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without half of its neurons."""
    return narrower(KIND, tmp_path_factory.mktemp("narrow") / "model", 0.5)


@pytest.fixture(scope="module")
def rows() -> list[torch.Tensor]:
    return rows_of(KIND, 512, 64)


def held_out(rows: list[torch.Tensor]) -> torch.Tensor:
    numbers = Order.of(DistilParams.model_validate(PARAMS), len(rows), False).held_out()
    return torch.stack([rows[number] for number in numbers])


def test_a_narrower_student_comes_back(narrow: Path, rows: list[torch.Tensor], tmp_path: Path) -> None:
    told: list[TrainingStep] = []
    given = lesson(trained_model(KIND), narrow, tmp_path / "out", rows, PARAMS, tell=told.append)
    history = train(given)
    found = [each["kl"] for each in history.evaluations]
    assert found[-1] < 0.3 * found[0], found
    assert [step.step for step in told] == list(range(1, 41)) and history.tokens == told[-1].tokens == 40 * 8 * 63
    assert finished(given.output) == history == train(given)  # it is over: nothing is done again
    state = published(given)
    expected = {t.name: (t.shape, t.dtype) for unit in given.work.plan.stages for stage in unit for t in stage}
    assert {name: (tuple(t.shape), "BF16") for name, t in state.items() if t.dtype is torch.bfloat16} == expected
    reference = logits(trained_model(KIND), tensors_of(trained_model(KIND)), held_out(rows))
    # transformers runs what is published, in fp32: the same divergence as training saw
    assert kl(reference[:, :-1], logits(narrow, state, held_out(rows))[:, :-1]) == pytest.approx(min(found), rel=0.01)


def test_teaching_is_more_than_text(narrow: Path, rows: list[torch.Tensor], tmp_path: Path) -> None:
    """Distillation beats fine-tuning on the labels alone with the same tokens."""
    ends = {}
    for labels in (0.0, 1.0):
        params = PARAMS | {"divergence": {"labels": labels}}
        ends[labels] = train(lesson(trained_model(KIND), narrow, tmp_path / str(labels), rows, params)).evaluations[-1]
    assert ends[0.0]["kl"] < 0.8 * ends[1.0]["kl"], ends
    assert ends[0.0]["agreement"] > ends[1.0]["agreement"], ends


@pytest.mark.parametrize(
    "asked",
    [
        {"divergence": {"kind": "reverse"}},
        {"divergence": {"kind": "jensenShannon", "temperature": 2.0, "labels": 0.1}},
        {"hiddenStates": {"layers": 1}, "attentionOutputs": {"pairs": [[0, 0]], "weight": 0.5}},
        {"activationCheckpointing": True, "microBatch": 3, "schedule": "linear"},
    ],
    ids=["reverse", "jensen-shannon", "states", "checkpointing"],
)
def test_other_losses_teach_too(narrow: Path, rows: list[torch.Tensor], tmp_path: Path, asked: dict[str, Any]) -> None:
    history = train(lesson(trained_model(KIND), narrow, tmp_path / "out", rows, PARAMS | asked | {"steps": 20}))
    assert history.evaluations[-1]["kl"] < 0.6 * history.evaluations[0]["kl"], history.evaluations


def test_a_teacher_that_has_said_it_before(narrow: Path, rows: list[torch.Tensor], tmp_path: Path) -> None:
    """Its most likely tokens, written once; with nearly all of them the student learns as from the teacher itself."""
    params = PARAMS | {"steps": 12, "teacher": {"offline": {"topK": 256}}}
    place = open_output(OutputSpec(uri=f"file://{tmp_path}/logits"), {})
    ends = []
    for name, asked in (("online", params | {"teacher": {}}), ("offline", params), ("another", params | {"learningRate": 5e-4})):
        given = replace(lesson(trained_model(KIND), narrow, tmp_path / name, rows, asked), logits=lambda name: place.inner(name))
        ends.append(train(given))
        if name == "offline":
            (recording,) = (tmp_path / ".logits.kompressor/work").iterdir()
            before = {path.name: path.stat().st_mtime_ns for path in recording.rglob("*")}
    kl = [[each["kl"] for each in history.evaluations] for history in ends]
    assert kl[1][0] <= kl[0][0] and kl[1] == pytest.approx(kl[0], rel=0.03), kl
    assert kl[2][-1] < kl[2][0] and before == {path.name: path.stat().st_mtime_ns for path in recording.rglob("*")}


def test_micro_batches_and_checkpointing_change_nothing(narrow: Path, rows: list[torch.Tensor], tmp_path: Path) -> None:
    ways: list[dict[str, Any]] = [{"microBatch": 8}, {"microBatch": 3}, {"microBatch": 8, "activationCheckpointing": True}]
    curves = []
    for way in ways:
        params = PARAMS | way | {"steps": 6}
        history = train(lesson(trained_model(KIND), narrow, tmp_path / str(len(curves)), rows, params))
        curves.append([each["loss"] for each in history.curve])
    assert curves[1] == pytest.approx(curves[0], abs=1e-3) and curves[2] == curves[0]


def test_the_best_student_is_kept_and_training_stops_early(narrow: Path, rows: list[torch.Tensor], tmp_path: Path) -> None:
    """A learning rate that soon does harm."""
    params = PARAMS | {"learningRate": 0.2, "warmup": 0.0, "evaluateEvery": 2, "patience": 2, "gradientClip": 0}
    given = lesson(trained_model(KIND), narrow, tmp_path / "out", rows, params)
    history = train(given)
    assert history.best_step == 0 and history.steps == 4 and "2 evaluations" in history.stopped
    state, before = published(given), tensors_of(narrow)
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_a_loss_that_is_not_a_number(narrow: Path, rows: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training stops with a reason of its own; its last good checkpoint stays."""
    real, calls = Losses.__call__, Counter[str]()

    def poisoned(self: Losses, micro: Any) -> Any:
        calls["losses"] += 1
        loss, measured = real(self, micro)
        return (loss * math.nan, replace(measured, loss=math.nan)) if calls["losses"] == 8 else (loss, measured)

    monkeypatch.setattr(Losses, "__call__", poisoned)
    given = lesson(trained_model(KIND), narrow, tmp_path / "out", rows, PARAMS | {"steps": 12, "checkpointEvery": 0})
    with pytest.raises(
        BadNumerics, match=r"step 8 of 12; its last good checkpoint, behind step 7, is kept\. Set a smaller learningRate"
    ) as caught:
        train(given)
    assert caught.value.reason == "LossNotFinite" and caught.value.exit_code == 66
    monkeypatch.undo()
    assert train(given).steps == 12


def test_the_order_of_rows() -> None:
    """Every row once an epoch, in another order each, whatever there are; and by the step alone."""
    for count in (1, 2, 7, 64, 1000):
        epochs = [[shuffled(place, count, 5, epoch) for place in range(count)] for epoch in range(2)]
        assert all(sorted(order) == list(range(count)) for order in epochs)
        assert count < 64 or epochs[0] != epochs[1]
    order = Order.of(DistilParams(batch=6, validation_rows=4, epochs=1.5), 40, False)
    assert (len(order.held_out()), order.count, order.steps) == (4, 36, 9)
    drawn = Counter(row for step in range(order.steps) for row in order.rows(step))
    assert {*drawn, *order.held_out()} == set(range(40)) and len(drawn) == 36 and sum(drawn.values()) == 54 and max(drawn.values()) == 2


def test_schedules() -> None:
    for schedule, middle, end in (("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)):
        params = DistilParams.model_validate({"learningRate": 0.5, "warmup": 0.1, "floor": 0.1, "schedule": schedule})
        rates = [learning_rate(params, step, 111) / 0.5 for step in range(111)]
        assert rates[0] == pytest.approx(1 / 13) and rates[12] == 1.0 == max(rates)
        assert rates[61] == pytest.approx(middle) and rates[-1] == pytest.approx(end)


def test_what_is_refused(narrow: Path, rows: list[torch.Tensor], tmp_path: Path) -> None:
    def given(**asked: Any) -> Lesson:
        return lesson(trained_model(KIND), narrow, tmp_path / "out", rows[:16], PARAMS | asked)

    with pytest.raises(
        UserError, match=r"14 rows of 64 tokens to train on .2 of 16 are held out for evaluation., and a step takes batch 15"
    ):
        train(given(batch=15))
    with pytest.raises(UserError, match=r"hiddenStates: there is no pair \[2, 0\]: the student has layers 0 to 1"):
        train(given(hiddenStates={"pairs": [[2, 0]]}))
    with pytest.raises(UserError, match="9 processes and 8 rows in a step"):
        refuse_parallelism(given().student, 8, 9)
    with pytest.raises(UserError, match=r"40 processes cannot share model.layers.0.self_attn.k_proj.weight of 32 rows"):
        refuse_parallelism(given().student, 64, 40)
    assert given().output.read(f"{TRAINED}done.json") is None and folder_source(narrow).reads == 0
