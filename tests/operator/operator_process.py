"""A running operator as a process of its own."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waiting import eventually

__all__ = ["Operator"]

Manifest = dict[str, Any]


@dataclass
class Operator:
    """A running operator process."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def entries(self) -> list[Manifest]:
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def said(self, text: str) -> list[Manifest]:
        return [entry for entry in self.entries if text in entry["message"]]

    def port(self) -> int:
        return int(eventually(lambda: self.said("probes on port"))[0]["message"].split()[-1])

    def ready(self) -> bool:
        return self.probe("/readyz") == 200

    def probe(self, path: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port(), timeout=30)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> float:
        """Returns the seconds that it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(60)
        return time.monotonic() - began
