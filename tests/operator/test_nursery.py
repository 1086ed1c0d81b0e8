"""Operators that are forked: one run of the tests has thousands of them."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from operator_nursery import Forked

from fork_server import ForkServer

SLEEPERS = """
def child(order):
    import time
    time.sleep(600)

serve(child)
"""


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """All numbers that select() can take are in use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), max(hard, 2048)))
    with Path(os.devnull).open() as file:
        taken = [os.dup(file.fileno()) for _ in range(1024)]
        yield
        for number in taken:
            os.close(number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def test_an_operator_is_ended_after_a_thousand_and_leaves_no_descriptor(many_descriptors: None) -> None:
    with ForkServer(SLEEPERS, os.environ) as server:
        open_before = descriptors()
        forked = Forked(server.fork({}))
        assert forked.poll() is None and server.alive() == [forked.pid]
        forked.send_signal(signal.SIGKILL)
        assert forked.wait(60) == 0 == forked.poll() and server.alive() == []
        del forked
        assert descriptors() == open_before
