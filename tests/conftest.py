"""Fixtures that several suites share: small real checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "worker")]  # models.py, corpus.py, families.py: also used by the demo, so not a package


@pytest.fixture(scope="session")
def trained_llama() -> Path:
    """A Llama trained on a synthetic language, as `save_pretrained` writes it; read-only, shared by all tests."""
    from models import trained_model

    return trained_model("llama")


@pytest.fixture(scope="session")
def trained_moe() -> Path:
    """A Qwen3-MoE of 8 experts, trained like `trained_llama`; read-only."""
    from models import trained_model

    return trained_model("qwen3_moe")
