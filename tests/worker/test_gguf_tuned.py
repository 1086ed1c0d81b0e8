"""GGUF files of models that were tuned: block by block before and behind the rounding, and trained from end to end as they are rounded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_calibrated import compress
from test_distil_job import smaller_llama
from test_gguf_job import gguf_job, judged, read

from kompressor_worker.verify import verify
from models import trained_model

NARROW = {"pruneWidth": {"ratio": 0.25, "multiple": 32}}
RECOVER = {"recover": {"steps": 40}}
Passes = Sequence[dict[str, Any]]


def lost(folder: Path, kind: str, passes: Passes, **changes: Any) -> float:
    """KL, which llama.cpp has with the file too."""
    folder.mkdir()
    job = gguf_job(folder, kind, list(passes), {"name": "small.gguf"}, **changes)
    report = compress(job)
    judged(folder / "out" / "small.gguf", job, report)
    return float(report["evaluation"]["kl"])


def test_recovered_before_it_is_quantised(tmp_path: Path) -> None:
    """Narrower blocks are tuned as they are; the file has what that has made of them, in Q4_0."""
    rounded = {"rtn": {"scheme": "Q4_0"}}
    alone, tuned = (lost(tmp_path / name, "llama_thin", [NARROW, *way, rounded]) for name, way in (("alone", []), ("tuned", [RECOVER])))
    assert tuned < 0.9 * alone


@pytest.mark.parametrize(("kind", "scheme"), [("llama", "Q3_K"), ("llama_thin", "IQ4_NL"), ("llama_thin", "F16")])
def test_recovered_once_it_is_quantised(tmp_path: Path, kind: str, scheme: str) -> None:
    """Codes are chosen anew on the scales that were found; in F16 there are none, and weights learn as they are. Rows of 64 columns are no
    block of Q3_K, and get IQ4_NL."""
    rounded = {"rtn": {"scheme": "Q3_K" if scheme == "IQ4_NL" else scheme}}
    passes = [NARROW, rounded] if scheme == "F16" else [rounded]
    alone, tuned = lost(tmp_path / "alone", kind, passes), lost(tmp_path / "tuned", kind, [*passes, RECOVER])
    assert tuned < (0.95 if scheme == "F16" else 0.9) * alone
    files = [read(tmp_path / name / "out") for name in ("alone", "tuned")]
    kinds = [{name: kind for name, (kind, _) in file.items()} for file in files]
    assert kinds[0] == kinds[1] and kinds[0]["blk.0.ffn_up.weight"] == scheme


DISTIL = {"sequenceLength": 128, "batch": 8, "steps": 30, "learningRate": 1e-3, "validationRows": 8}


@pytest.mark.parametrize(
    ("kind", "passes"), [("llama_thin", [NARROW, {"rtn": {"scheme": "Q2_K"}}]), ("gemma3", [NARROW, {"rtn": {"scheme": "Q2_K"}}])]
)
def test_trained_as_it_is_rounded(tmp_path: Path, kind: str, passes: Passes) -> None:
    """Less is lost than without, and llama.cpp says what the job has measured. Embeddings and head are trained in their types too."""
    alone, trained = lost(tmp_path / "alone", kind, passes), lost(tmp_path / "trained", kind, [*passes, {"distil": DISTIL}])
    assert trained < 0.8 * alone
    files = [read(tmp_path / name / "out") for name in ("alone", "trained")]
    assert {name: kind for name, (kind, _) in files[0].items()} == {name: kind for name, (kind, _) in files[1].items()}
    reports = [json.loads((tmp_path / name / "out" / "kompressor.json").read_text()) for name in ("alone", "trained")]
    assert reports[1]["distillation"]["bestStep"] > 0
    assert {n: entry["scheme"] for n, entry in reports[0]["linears"].items()} == {n: e["scheme"] for n, e in reports[1]["linears"].items()}
    verify((tmp_path / "trained" / "out").as_uri(), None, None, {})


def test_a_student_that_is_a_checkpoint(tmp_path: Path) -> None:
    """Of other widths and layers than the job's model, with which what llama.cpp says of the file is compared."""
    small = smaller_llama(tmp_path / "small", trained_model("llama"))
    asked = {**DISTIL, "steps": 4, "student": {"source": {"uri": small.as_uri()}}}
    assert lost(tmp_path / "job", "llama", [{"rtn": {"scheme": "Q8_0"}}, {"distil": asked}]) > 1
