"""What all pods of a node share: its services, its table of images, its stock of addresses and devices."""

import re
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path

from agent.client import Client
from agent.events import Events
from agent.images import ImageTable
from agent.lifecycle import Backoff
from agent.names import Names
from agent.processes import NodeFacts


class Stock:
    """Things lent to pods by uid: addresses, device numbers."""

    def __init__(self, things: list[str]) -> None:
        self._free = list(things)
        self._lent: dict[str, list[str]] = {}
        self._lock = threading.Lock()

    def lend(self, uid: str, count: int) -> list[str] | None:
        """`count` of them, the longest unused first; None if there are not as many."""
        with self._lock:
            if uid not in self._lent:
                if count > len(self._free):
                    return None
                self._lent[uid] = [self._free.pop(0) for _ in range(count)]
            return self._lent[uid]

    def claim(self, uid: str, things: list[str]) -> None:
        """Those that a pod of an earlier agent holds already."""
        with self._lock:
            self._free = [thing for thing in self._free if thing not in things]
            self._lent[uid] = things

    def take_back(self, uid: str) -> None:
        with self._lock:
            self._free += self._lent.pop(uid, [])

    @property
    def free(self) -> int:
        return len(self._free)


@dataclass(frozen=True)
class Context:
    client: Client
    facts: NodeFacts
    images: ImageTable
    root: Path
    backoff: Backoff
    events: Events
    names: Names
    addresses: Stock
    gpus: Stock | None
    memory: tuple[str, str]
    """how limits are enforced: (kind, parent cgroup)"""
    leash: int
    """reading end of a pipe that closes with the agent"""
    leaving: threading.Event
    """set when the agent ends in order: pods are no longer looked after"""


def pod_addresses(node: str) -> list[str]:
    """Loopback addresses for a node's pods: `node-7` has 127.107.0.0/20 to itself; a name without number, one by chance."""
    number = re.search(r"(\d+)$", node)
    network = 100 + (int(number[1]) if number else zlib.crc32(node.encode())) % 150
    return [f"127.{network}.{high}.{low}" for high in range(16) for low in range(1, 255)]
