"""How long storage is waited for: attempts, backoff, one network timeout, and a way to stop waiting at once."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from kompressor_worker.errors import Terminated, UserError

ENV_TIMEOUT = "KOMPRESSOR_STORAGE_TIMEOUT"
ENV_ATTEMPTS = "KOMPRESSOR_STORAGE_ATTEMPTS"
CONNECT_TIMEOUT = 10.0
"""Seconds until a connection must stand; never more than the read timeout."""
FIRST_PAUSE = 0.2
LONGEST_PAUSE = 20.0
"""Seconds; between them the pause doubles with every attempt. Eight attempts wait 25 s in all, at most."""


@dataclass(frozen=True)
class Patience:
    """How often and how long. Requests are still made after `stop` is set, so that a last commit can go through; only waiting ends."""

    attempts: int = 8
    """Tries of one request, the first included."""
    timeout: float = 60.0
    """Seconds without a byte after which a connection is given up."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set on SIGTERM: a try that fails from then on is not made again, and pauses end at once."""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], stop: threading.Event | None = None) -> Patience:
        """Raises UserError when one of the variables is not a positive number."""
        return cls(
            attempts=int(_positive(environ, ENV_ATTEMPTS, 8)),
            timeout=_positive(environ, ENV_TIMEOUT, 60.0),
            stop=stop or threading.Event(),
        )

    @property
    def connect_timeout(self) -> float:
        return min(CONNECT_TIMEOUT, self.timeout)

    def pause(self, failures: int, cause: BaseException) -> None:
        """Waits before the next try, after `failures` (from 1) in a row. Half of the pause is random, so that many workers do not
        come back to a recovering store in step. Raises Terminated."""
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (failures - 1))
        if self.stop.wait(longest * (0.5 + random.random() / 2)):
            raise Terminated(f"told to stop while storage did not answer ({cause}); the journal holds what was committed") from cause


def _positive(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf") or (name == ENV_ATTEMPTS and value < 1):
        raise UserError(f"environment variable {name} is {text!r}; set a positive number, or remove it for the default {default:g}")
    return value
