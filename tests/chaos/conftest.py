"""One control plane with one node for all of chaos; each test, or each point of it, has a namespace, an operator and a proxy of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "operator"), str(HERE.parents[1] / "tools")]  # no packages in tests/

from observer import Observer  # noqa: E402
from operator_nursery import Nursery  # noqa: E402
from proxy import Proxies  # noqa: E402
from scene import Theatre  # noqa: E402
from stage import Stage  # noqa: E402


@pytest.fixture(scope="session")
def theatre(tmp_path_factory: pytest.TempPathFactory, kstatus_judge: Path) -> Iterator[Theatre]:
    """Everything that scenes are made of; at its end no operator lives and no pod of a job runs."""
    from binaries import BinaryError

    stage = Stage(tmp_path_factory.mktemp("chaos"))
    try:
        stage.cluster.start()
    except BinaryError as error:
        pytest.skip(f"no control plane: {error}")
    try:
        stage.install()
        with (
            Nursery(stage.root) as nursery,
            Proxies(stage.cluster.server, stage.cluster.ca) as proxies,
            Observer(stage, kstatus_judge) as observer,
        ):
            theatre = Theatre(stage, nursery, proxies, observer)
            yield theatre
            theatre.ended()
    finally:
        stage.cluster.stop()
