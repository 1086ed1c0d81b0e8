"""The table tests need nothing. The others share one real control plane with one node, whose worker image is an actor (stage.py)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tools")]  # no packages in tests/

from operator_nursery import Nursery  # noqa: E402
from stage import Operator, Stage  # noqa: E402


@pytest.fixture(scope="session")
def bare_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Always a cluster of our own: these tests end API servers, and bring their own worker image."""
    from binaries import BinaryError

    stage = Stage(tmp_path_factory.mktemp("stage"))
    try:
        stage.cluster.start()
    except BinaryError as error:
        pytest.skip(f"no control plane: {error}")
    try:
        stage.install()
        with Nursery(stage.root) as stage.nursery:
            yield stage
    finally:
        stage.cluster.stop()


@pytest.fixture
def stage(bare_stage: Stage) -> Iterator[Stage]:
    """The cluster with a fresh namespace in which the restricted Pod Security Standard is enforced."""
    bare_stage.enter_namespace()
    yield bare_stage
    bare_stage.leave_namespace()


@pytest.fixture
def operator(stage: Stage) -> Iterator[Operator]:
    """The real operator as a process of its own, forked ready, with the chart's role and no more; in the namespace of the test."""
    with stage.operator() as running:
        yield running
