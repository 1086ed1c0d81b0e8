"""Each family of GGUF in each type: trained models, all types in one file, which llama.cpp reads as the job reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_calibrated import compress
from test_gguf_job import gguf_job, judged, read

TYPES = {
    "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_S": "Q5_K", "Q4_K_S": "Q4_K", "Q3_K_S": "Q3_K", "Q2_K": "Q2_K", "Q4_0": "Q4_0", "MXFP4": "MXFP4",
}  # fmt: skip
"""What is asked for, and the type that most matrices get by it."""
ATTENTION, FFN = "self_attn", "(mlp|block_sparse_moe)"
PLACES = [(layer, module) for layer in range(4) for module in (ATTENTION, FFN)]
NAMES = {ATTENTION: ("attn_q", "attn_qkv"), FFN: ("ffn_gate", "ffn_gate_exps", "ffn_up")}
FEEDS_ERRORS_FORWARD = ("Q6_K", "Q4_0", "Q3_K_S", "Q2_K")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3", "phi3"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_all_types_in_one_file(tmp_path: Path, kind: str) -> None:
    """Types go round from family to family, so that each comes in attention and in the FFN."""
    passes: list[dict[str, Any]] = []
    expected: dict[tuple[int, str], str] = {}
    for number, (layer, module) in enumerate(PLACES):
        asked = [*TYPES][(FAMILIES.index(kind) + number) % len(TYPES)]
        passes.append(
            {"gptq" if asked in FEEDS_ERRORS_FORWARD else "rtn": {"scheme": asked, "targets": [rf"re:.*layers\.{layer}\.{module}\."]}}
        )
        expected[layer, module] = TYPES[asked]
    job = gguf_job(tmp_path, kind, [*passes, {"rtn": {"scheme": "F16"}}])
    report = compress(job)
    found = {name: kind for name, (kind, _) in read(tmp_path / "out").items()}
    for (layer, module), type_name in expected.items():
        names = (f"blk.{layer}.{name}.weight" for name in NAMES[module])
        assert found[next(name for name in names if name in found)] == type_name, (layer, module)
    assert found["token_embd.weight"] == "F16"
    judged(next((tmp_path / "out").glob("*.gguf")), job, report)
