"""Builders of the operator's table tests, and kstatus itself, built once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from binaries import BinaryError
from kstatus import kstatus_judge as build

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "operator")]


@pytest.fixture(scope="session")
def kstatus_judge() -> Path:
    try:
        return build()
    except BinaryError as error:
        pytest.skip(f"no kstatus: {error}")
