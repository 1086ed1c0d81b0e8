"""GGUF files written whole, out of a checkpoint in memory, by the plan alone; and what llama.cpp says of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kompressor_worker.formats.gguf_form import formed
from kompressor_worker.formats.gguf_tokenizer import TokenizerMetadata
from kompressor_worker.shards import OutputPlan

if TYPE_CHECKING:
    import torch

__all__ = ["Request", "llama_cpp", "no_tokenizer", "write_whole"]


def no_tokenizer() -> TokenizerMetadata:
    """For models whose tokens are numbers only."""
    import gguf

    return TokenizerMetadata({"tokenizer.ggml.model": gguf.gguf_writer.GGUFValue("none", gguf.GGUFValueType.STRING)})


def write_whole(plan: OutputPlan, values: Mapping[str, torch.Tensor], folder: Path) -> list[Path]:
    """The plan's files, of the tensors as the model has them; what is in no tensor stays zero."""
    import torch

    files = [bytearray(shard.size) for shard in plan.shards]
    for shard, data in zip(plan.shards, files, strict=True):
        data[: len(shard.header)] = shard.header
    parts = [
        (t, formed(values[t.name], t.form).view(torch.uint8).numpy().tobytes()) for unit in plan.stages for s in unit for t in s if t.form
    ]
    for t, data in (*parts, *plan.constants):
        assert len(data) == t.stop - t.start, t
        at = len(plan.shards[t.shard].header) + t.start
        files[t.shard][at : at + len(data)] = data
    paths = [folder / shard.name for shard in plan.shards]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    return paths


@dataclass(frozen=True)
class Request:
    model: Path
    tokens: Sequence[int] = ()
    texts: Sequence[str] = ()


def llama_cpp(requests: Sequence[Request], work: Path) -> list[tuple[Any, list[list[int]]]]:
    """Logits [tokens, vocabulary] (None without tokens) and ids of each text, by request."""
    asked = [{"model": str(r.model), "tokens": list(r.tokens), "texts": list(r.texts)} for r in requests]
    import numpy

    (work / "requests.json").write_text(json.dumps(asked))
    script = Path(__file__).with_name("llama_cpp_logits.py")
    done = subprocess.run([sys.executable, str(script), str(work / "requests.json"), str(work)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = []
    for number, request in enumerate(requests):
        ids = json.loads((work / f"{number}.json").read_text())["ids"]
        answers.append((numpy.load(work / f"{number}.npy") if request.tokens else None, ids))
    return answers
