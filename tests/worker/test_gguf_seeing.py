"""Models that also see, as GGUF files: the decoder's, as if it had been a checkpoint by itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_calibrated import compress
from test_gguf_job import gguf_job, judged, read

import jobs
from independent import tensors_of
from kompressor_worker.formats.gguf_architectures import decoder_of
from kompressor_worker.layout import ModelLayout
from models import trained_model

PASSES: list[dict[str, Any]] = [{"gptq": {"scheme": "Q4_0"}}]
VISION = {"vision_tower.encoder.layers.0.fc.weight": (64, 32), "multi_modal_projector.mm_input_projection_weight": (32, 256)}


def seeing(folder: Path, inside: str, tower: str) -> Path:
    """The trained Gemma 3 inside of a model that also sees."""
    source = trained_model("gemma3")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {inside + name.removeprefix("model."): tensor for name, tensor in tensors_of(source).items()}
    tensors |= {tower + name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in VISION.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((source / "config.json").read_text())
    outer = {key: text.pop(key) for key in ("eos_token_id", "bos_token_id", "dtype") if key in text}
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {},
        **outer,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the decoder by itself."""
    folder = tmp_path_factory.mktemp("alone")
    compress(gguf_job(folder, "gemma3", PASSES, {"name": "small.gguf"}))
    return folder / "out" / "small.gguf"


@pytest.mark.parametrize(("inside", "tower"), [("language_model.model.", ""), ("model.language_model.", "model.")])
def test_its_decoder_is_the_same_file(alone: Path, tmp_path: Path, inside: str, tower: str) -> None:
    """Under the names of older files and of newer ones. What it sees with is left out, and not read."""
    job = gguf_job(tmp_path, "gemma3", PASSES, {"name": "small.gguf"})
    body = json.loads(job.read_text())
    body["spec"]["model"]["source"]["uri"] = seeing(tmp_path / "source", inside, tower).as_uri()
    report = compress(jobs.write(job, body))
    assert (tmp_path / "out" / "small.gguf").read_bytes() == alone.read_bytes()
    judged(tmp_path / "out" / "small.gguf", job, report)
    (warning,) = [w for w in report["warnings"] if w.startswith("left out: multi_modal_projector, vision_tower, 20.5 kB: ")]
    assert "--mmproj" in warning and not [name for name in read(tmp_path / "out") if "vision" in name or "mm" in name]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gemma3_text"


def test_a_config_that_says_little() -> None:
    """As the hub has it of Gemma 3 with 4 billion parameters: the rest is what transformers takes then."""
    said = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34, "sliding_window": 1024}
    said["rope_scaling"] = {"factor": 8.0, "rope_type": "linear"}  # type: ignore[assignment]
    found = decoder_of(ModelLayout(said, "BF16", "gemma3", (), (), "", tied_embeddings=True, source_config=said))
    assert (found.heads, found.kv_heads, found.head_dim, found.context, found.text["vocab_size"]) == (8, 4, 256, 131_072, 262_208)
    assert found.windows == tuple(None if (layer + 1) % 6 == 0 else 1024 for layer in range(34))
    assert (found.rotary.kind, found.rotary.theta, found.rotary.local_theta) == ("linear", 1e6, 1e4)
    assert found.rotary.keys()["SCALING_FACTOR"] == 8.0
