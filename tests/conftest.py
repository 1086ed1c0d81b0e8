"""Fixtures that several suites share: small real checkpoints."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "worker")]  # models.py and families.py: the demo uses them too, so no package
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: tests, workers and agents share the cores

# Time says nothing on cores shared with a control plane. Failing examples are printed, so no database is needed.
settings.register_profile("shared cores", deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None, print_blob=True)
settings.load_profile("shared cores")


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


@pytest.fixture(scope="session")
def kstatus_judge() -> Path:
    """The program that tells what kstatus makes of a resource, built once."""
    from binaries import BinaryError
    from kstatus import kstatus_judge as build

    try:
        return build()
    except BinaryError as error:
        pytest.skip(f"no kstatus: {error}")
