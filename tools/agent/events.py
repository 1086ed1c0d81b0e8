"""Events about pods and the node, as `kubectl describe` shows them; a repeated one is counted, not written again."""

import logging
import threading
import time

from agent.client import ApiError, ApiUnavailable, Client, Object
from agent.clock import timestamp

log = logging.getLogger(__name__)
_REMEMBERED = 1000


class Events:
    """Best effort, as everywhere: an event that cannot be written is dropped, and logged."""

    def __init__(self, client: Client, node: str) -> None:
        self._client = client
        self._node = node
        self._seen: dict[tuple[str, str, str], tuple[str, int]] = {}
        self._lock = threading.Lock()

    def pod(self, pod: Object, kind: str, reason: str, message: str) -> None:
        """`kind` is Normal or Warning."""
        meta = pod["metadata"]
        about = {"kind": "Pod", "apiVersion": "v1", "name": meta["name"], "namespace": meta["namespace"], "uid": meta["uid"]}
        self._emit(about, meta["namespace"], kind, reason, message)

    def node(self, kind: str, reason: str, message: str) -> None:
        about = {"kind": "Node", "apiVersion": "v1", "name": self._node, "uid": self._node}
        self._emit(about, "default", kind, reason, message)

    def _emit(self, about: Object, namespace: str, kind: str, reason: str, message: str) -> None:
        key, now = (about["uid"], reason, message), timestamp(time.time())
        path = f"/api/v1/namespaces/{namespace}/events"
        with self._lock:
            name, count = self._seen.get(key, (f"{about['name']}.{time.time_ns():x}", 0))
            if len(self._seen) >= _REMEMBERED:
                self._seen.pop(next(iter(self._seen)))
            self._seen[key] = (name, count + 1)
        try:
            if count:
                self._client.patch(f"{path}/{name}", {"count": count + 1, "lastTimestamp": now})
                return
            source = {"component": "kubelet", "host": self._node}
            body = {
                "metadata": {"name": name, "namespace": namespace}, "involvedObject": about, "type": kind, "reason": reason,
                "message": message[:1024], "source": source, "firstTimestamp": now, "lastTimestamp": now, "count": 1,
                "reportingComponent": "kubelet", "reportingInstance": self._node,
            }  # fmt: skip
            self._client.post(path, body)
        except (ApiError, ApiUnavailable) as error:
            log.info("event %s about %s dropped: %s", reason, about["name"], error)
