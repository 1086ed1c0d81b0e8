"""Operators that start at once: one process that has imported everything forks them. What is forked is a process of its own, to be killed.

    with Nursery(folder) as nursery:
        with nursery.operator(stage, proxy, relist_seconds="2") as running:     # a stage.Operator; its settings by name
            ...
            running.stop(signal.SIGKILL)
        clock = Clock(folder / "clock")                                        # the machine's, as this operator sees it; `clock.set(3600)`
        running = nursery.start(stage, proxy, clock)                           # without waiting; ended with `running.stop()`

`proxy` may be None: then it asks the API server itself. How an operator starts by itself, and with which code it exits, is tested with
`Stage.operator_process` and in tests/e2e.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stage import ROOT, Operator, Stage, eventually

from fork_server import ForkServer

if TYPE_CHECKING:
    from proxy import Proxy

__all__ = ["Clock", "Nursery"]

PROGRAM = """
import asyncio
from datetime import timedelta
from pathlib import Path
from kompressor_operator import logs
from kompressor_operator.leader import LeaseLost
from kompressor_operator.main import listen, serve as operate
from kompressor_operator.server_clock import utc_now
from kompressor_operator.settings import Settings
import kubernetes.aio.client.rest, kopf._core.reactor.running, aiohttp.web, aiohttp.resolver

def live(order):
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0), os.dup2(2, 1)
    os.environ.clear(), os.environ.update(order["environ"])
    settings, clock = Settings.from_env(os.environ), Path(order["clock"])
    logs.configure(settings.log_level)
    async def run():
        stop = asyncio.Event()
        listen(stop)
        await operate(settings, stop, lambda: utc_now() + timedelta(seconds=float(clock.read_text())))
    try:
        asyncio.run(run())
    except LeaseLost:
        return 1
    return 0

def child(order):
    code = 1
    try:
        code = live(order)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)

serve(child)
"""


class Clock:
    """What an operator is told as the machine's time: that, and some seconds. It may be set while operators run."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.set(0.0)

    def set(self, offset: float) -> None:
        partial = self.file.with_suffix(".part")
        partial.write_text(str(offset))
        partial.replace(self.file)


class Forked:
    """As much of subprocess.Popen as `Operator` uses. Its exit code is known to nobody."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.pidfd_open(pid)
        weakref.finalize(self, os.close, self._fd)  # with the last who asks: hundreds of operators live in one run of the tests

    def poll(self) -> int | None:
        return 0 if self._ended(0) else None

    def wait(self, timeout: float) -> int:
        if not self._ended(timeout):
            raise subprocess.TimeoutExpired("operator", timeout)
        return 0

    def send_signal(self, number: signal.Signals) -> None:
        signal.pidfd_send_signal(self._fd, number)

    def _ended(self, seconds: float) -> bool:
        """Not by select(), which takes no descriptor above 1023."""
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        return bool(poller.poll(1000 * seconds))


class Nursery(ForkServer):
    """Keeps logs, kubeconfigs and clocks in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._calm = Clock(folder / "clock")
        super().__init__(PROGRAM, {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("crds", "operator"))})

    def start(self, stage: Stage, proxy: Proxy | None = None, clock: Clock | None = None, **settings: str) -> Operator:
        """An operator for the stage's namespace; it is not ready yet."""
        name = uuid.uuid4().hex[:8]
        environ = stage.environ(**settings)
        if proxy is not None:
            token = json.loads(Path(environ["KUBECONFIG"]).read_text())["users"][0]["user"]["token"]
            environ["KUBECONFIG"] = str(proxy.kubeconfig(token, self._folder / f"{name}.kubeconfig"))
        log = self._folder / f"operator-{name}.log"
        log.touch()
        order = {"environ": environ, "log": str(log), "clock": str((clock or self._calm).file)}
        return Operator(Forked(self.fork(order)), log)

    @contextmanager
    def operator(
        self, stage: Stage, proxy: Proxy | None = None, clock: Clock | None = None, *, ready: bool = True, **settings: str
    ) -> Iterator[Operator]:
        """Starts one and waits until it is ready, unless told not to; ends it with SIGTERM, unless it has ended."""
        running = self.start(stage, proxy, clock, **settings)
        try:
            eventually(running.ready if ready else running.port)
            yield running
        finally:
            if running.process.poll() is None:
                running.stop()
            print(running.log.read_text())
