"""Students that are trained as they are rounded, and published so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from blockwise import kl, logits
from lessons import lesson, published, rows_of

from calibrated_jobs import samples, write_data
from independent import tensors_of
from jobs import manifest, write
from kompressor_worker.cli import run_cli
from kompressor_worker.distil.order import Order
from kompressor_worker.distil.train import train
from kompressor_worker.formats.compressed_tensors import decode
from kompressor_worker.sparsity import Sparsity
from models import trained_model

KIND = "llama_thin"
PARAMS = {"batch": 8, "learningRate": 1e-3, "steps": 24, "validationRows": 32}


@pytest.fixture(scope="module")
def rows() -> list[torch.Tensor]:
    return rows_of(KIND, 256, 64)


def student(folder: Path, passes: Sequence[dict[str, Any]], *, calibrated: bool = False) -> Path:
    """What a whole job makes of the trained model."""
    job = manifest(f"file://{trained_model(KIND)}", f"file://{folder / 'student'}", passes)
    if calibrated:
        data = write_data(folder, KIND, rows=8)
        job["spec"]["calibration"] = samples({"calibration": f"file://{data['calibration']}"}, rows=8)["calibration"]
    assert run_cli(["run", str(write(folder / "job.json", job))]) == 0
    return folder / "student"


def test_three_bits_as_published(rows: list[torch.Tensor], tmp_path: Path) -> None:
    """transformers, with the weights that a reader decodes, diverges by what training has measured."""
    made = student(tmp_path, [{"rtn": {"scheme": "W3A16", "groupSize": 32}}])
    given = lesson(trained_model(KIND), made, tmp_path / "out", rows, PARAMS)
    history = train(given)
    found = [each["kl"] for each in history.evaluations]
    assert min(found) < 0.6 * found[0], found
    tensors = published(given)
    assert {name: (str(t.dtype), tuple(t.shape)) for name, t in tensors.items()} == {
        name: (str(t.dtype), tuple(t.shape)) for name, t in tensors_of(made).items()
    }
    schemes = given.work.schemes
    state = {name: t for name, t in tensors.items() if name.rpartition(".")[0] not in schemes}
    state |= {f"{name}.weight": decode(name, tensors, scheme, torch.bfloat16) for name, scheme in schemes.items()}
    order = Order.of(given.params, len(rows), False)
    source, held = trained_model(KIND), torch.stack([rows[number] for number in order.held_out()])
    reference = logits(source, tensors_of(source), held)
    assert kl(reference[:, :-1], logits(source, state, held)[:, :-1]) == pytest.approx(min(found), rel=0.01)
    scale = "model.layers.0.mlp.up_proj.weight_scale"
    assert not torch.equal(tensors[scale], tensors_of(made)[scale])  # steps are learned


@pytest.mark.parametrize(
    "passes",
    [
        [{"rtn": {"scheme": "W8A8", "targets": ["re:.*mlp.*"]}}, {"rtn": {"scheme": "MXFP4"}}],
        [{"rtn": {"scheme": "NVFP4"}}, {"kvCache": {"scheme": "FP8"}}],
    ],
    ids=["int8-mxfp4", "nvfp4-kv"],
)
def test_schemes(rows: list[torch.Tensor], tmp_path: Path, passes: list[dict[str, Any]]) -> None:
    made = student(tmp_path, passes, calibrated=True)
    given = lesson(trained_model(KIND), made, tmp_path / "out", rows, PARAMS | {"learningRate": 3e-4})
    found = [each["kl"] for each in train(given).evaluations]
    assert min(found) < 0.9 * found[0], found
    tensors, before = published(given), tensors_of(made)
    assert {name: t.dtype for name, t in tensors.items()} == {name: t.dtype for name, t in before.items()}
    measured = [name for name in before if (".input_" in name and "norm" not in name) or name.endswith(("k_scale", "v_scale"))]
    assert all(torch.equal(tensors[name], before[name]) for name in measured)
    assert len(measured) == (14 + 4 if "NVFP4" in str(passes) else 0)


def test_zeros_stay(rows: list[torch.Tensor], tmp_path: Path) -> None:
    """2:4, plain."""
    made = student(tmp_path, [{"magnitude": {"pattern": "2:4"}}])
    given = lesson(trained_model(KIND), made, tmp_path / "out", rows, PARAMS, pruned=Sparsity.of_pattern("2:4"))
    found = [each["kl"] for each in train(given).evaluations]
    assert min(found) < 0.4 * found[0], found
    tensors, before = published(given), tensors_of(made)
    linears = [name for name in before if "_proj." in name]
    assert len(linears) == 14 and all(torch.equal(tensors[name] == 0, before[name] == 0) for name in linears)
    assert not any(torch.equal(tensors[name], before[name]) for name in linears)
