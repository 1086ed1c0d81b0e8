"""Pods that train together: they meet, begin together, and end together."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from kompressor_worker.distil.group import Gathering, GroupSettings, follow, free_port, known, met
from kompressor_worker.distil.lesson import TrainingStep
from kompressor_worker.errors import GroupIncomplete, KompressorError, PeerLost

MEMBER = str(Path(__file__).with_name("group_member.py"))


def command(steps: int, fails: int = -1) -> list[str]:
    return [sys.executable, MEMBER, str(steps), str(fails)]


class Pods:
    """Two of them, in threads; how each ends."""

    def __init__(self, steps: int, fails: int = -1, processes: int = 1) -> None:
        self.settings = GroupSettings(2, processes, 0, "localhost", free_port("localhost"), 60)
        self.told: list[TrainingStep] = []
        self.stop = threading.Event()
        self._command = command(steps, fails)

    def lead(self) -> None:
        with Gathering(self.settings) as gathering:
            gathering.train(self._command, self.told.append, self.stop)

    def follow(self) -> None:
        follow(replace(self.settings, index=1), self._command, threading.Event(), lambda: False)

    def ends(self, meanwhile: Callable[[], None] = lambda: None) -> list[str]:
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(self.follow), pool.submit(self.lead)]
            meanwhile()
            errors = [future.exception() for future in reversed(running)]
        assert all(error is None or isinstance(error, KompressorError) for error in errors), errors
        return [str(error.reason) if isinstance(error, KompressorError) else "Done" for error in errors]

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while len(self.told) < step:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_they_train_together() -> None:
    pods = Pods(steps=5, processes=2)
    assert pods.ends() == ["Done", "Done"]
    assert [(step.step, step.loss) for step in pods.told] == [(n, 0 + 1 + 2 + 3) for n in range(1, 6)]


def test_one_ends_of_its_own_and_the_others_lose_it() -> None:
    assert Pods(steps=1000, fails=1).ends() == ["PeerLost", "LossNotFinite"]


def test_one_is_killed() -> None:
    pods = Pods(steps=10_000)

    def kill() -> None:
        pods.wait_for_step(3)
        os.kill(int(pods.told[0].tokens_per_second), signal.SIGKILL)

    assert pods.ends(kill) == ["OutOfMemory", "PeerLost"]


def test_all_stop_when_one_is_told_to() -> None:
    pods = Pods(steps=10_000)

    def stop() -> None:
        pods.wait_for_step(3)
        pods.stop.set()

    assert pods.ends(stop) == ["Terminated", "Terminated"]


def test_those_that_do_not_come() -> None:
    settings = GroupSettings(3, 1, 0, "localhost", free_port("localhost"), 0.2)
    with Gathering(settings) as gathering, pytest.raises(GroupIncomplete, match=r"pods 1, 2 of 3 did not come within 0\.2 s"):
        gathering.train(command(1), lambda step: None, threading.Event())
    other = replace(settings, index=1, port=free_port("localhost"))
    with pytest.raises(GroupIncomplete, match="no leader at localhost:"):
        follow(other, command(1), threading.Event(), lambda: False)
    follow(other, command(1), threading.Event(), lambda: True)  # it is over, and the leader is gone


@pytest.mark.parametrize("there", [{1, 2, 3}, {2, 3}, {3}])
def test_a_leader_that_does_not_come_is_one_failure(there: set[int]) -> None:
    """Of the first that is there, whichever that is."""

    def ends(index: int) -> type[KompressorError]:
        settings = GroupSettings(4, 1, index, "llama-1-0.llama", free_port("localhost"), 0.2)
        with pytest.raises(KompressorError) as caught:
            met(settings, threading.Event(), lambda: False, lambda host: host in {f"llama-1-{n}.llama" for n in there})
        return type(caught.value)

    assert [ends(index) for index in sorted(there)] == [GroupIncomplete, *[PeerLost] * (len(there) - 1)]
    assert GroupSettings(4, 1, 2, "localhost").host(1) == "" and not known("") and not known("nobody.invalid") and known("localhost")


def test_one_that_comes_late_does_not_train_by_itself() -> None:
    """It was started again, and the others have begun with the one that it was before."""
    pods = Pods(steps=1)
    with Gathering(pods.settings) as gathering:
        assert gathering._store is not None
        gathering._store.set("begin", '{"port": 1, "pods": {"1": "another"}}')
        with pytest.raises(KompressorError, match="the others have begun without this pod"):
            pods.follow()
        gathering.over()
        pods.follow()


def test_settings() -> None:
    environ: Mapping[str, str] = {
        "KOMPRESSOR_PODS": "4",
        "KOMPRESSOR_PROCESSES_PER_POD": "8",
        "KOMPRESSOR_LEADER": "job-0.job",
        "JOB_COMPLETION_INDEX": "3",
    }
    found = GroupSettings.of(environ)
    assert found == GroupSettings(4, 8, 3, "job-0.job", 29500, 1800) and found.size == 32 and not found.leads
    assert found.ranks(5).environ(1)["RANK"] == "25" and GroupSettings.of({}) == GroupSettings()
