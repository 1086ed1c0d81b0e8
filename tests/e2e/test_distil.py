"""A job that trains, through the real control plane: preflight, student, training, result, and what the resource says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from installation import Installed

from calibrated_jobs import samples, write_data
from models import held_out_tokens, perplexity

pytestmark = pytest.mark.cluster


def test_a_student_is_trained_and_published(installed: Installed, trained_llama: Path, tmp_path: Path) -> None:
    """Its data is reached with a Secret that only the pass names."""
    from transformers import AutoModelForCausalLM

    server = installed.bucket.server
    keys = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
    installed.cluster.kubectl("create", "secret", "generic", "training-s3", *(f"--from-literal={k}={v}" for k, v in keys.items()))
    (tmp_path / "data").mkdir()
    files = write_data(tmp_path / "data", "llama", rows=24)
    installed.bucket.upload(trained_llama, "llama")
    installed.bucket.upload(tmp_path / "data", "data")
    uris = {section: installed.bucket.uri(f"data/{file.name}") for section, file in files.items()}
    spec = samples(uris, rows=16, endpoint=server.endpoint, credentialsSecret="models-s3")
    dataset = {"uri": uris["calibration"], "endpoint": server.endpoint, "credentialsSecret": "training-s3"}
    distil = {"dataset": dataset, "sequenceLength": 128, "batch": 4, "steps": 6, "learningRate": 0.0001, "validationRows": 2}
    installed.apply("distilled", "llama", [{"pruneWidth": {"ratio": 0.5}}, {"distil": distil}], **spec)
    status = installed.wait("distilled", "Complete")
    assert installed.steps("distilled") == ["compress", "preflight"]
    assert status["plan"]["trainingSteps"] == status["result"]["trainingSteps"] == 6
    assert status["progress"]["percent"] == 100 and status["progress"].get("step") is None, "that is over"
    result = status["result"]
    assert float(result["perplexityAfter"]) < float(result["perplexityBeforeTraining"])
    assert float(result["klRecovered"].removesuffix("%")) > 0
    folder = installed.bucket.download("distilled", tmp_path / "made")
    report = json.loads((folder / "kompressor.json").read_text())
    assert len(report["distillation"]["curve"]) == 6 and not (folder / ".kompressor").exists()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert perplexity(model, held_out_tokens("llama", rows=16)) < 2 * float(result["perplexityAfter"]), "rows that begin otherwise"
