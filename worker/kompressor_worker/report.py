"""What the cluster is told: progress and result on the resource, and a summary in the pod's termination message."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kompressor_api.names import ENV_TERMINATION_LOG, GROUP, PLURAL, TERMINATION_LOG, VERSION, WORKER_FIELD_MANAGER
from kompressor_worker.progress import Snapshot

log = logging.getLogger(__name__)

TERMINATION_BYTES = 4096
INTERVAL_SECONDS = 10.0


class Resource:
    """The CompressionJob that this worker may patch: `status.progress` and `status.result`, nothing else.

    Progress is best effort: it is sent from a thread of its own, the latest snapshot at most every ten seconds, and an API server that does
    not answer never disturbs the work.
    """

    def __init__(self, namespace: str, name: str, interval: float = INTERVAL_SECONDS) -> None:
        self._namespace, self._name = namespace, name
        self._interval = interval
        self._latest: Snapshot | None = None
        self._wake = threading.Event()
        self._closed = False
        self._client: Any = None
        self._thread = threading.Thread(target=self._send, name="status", daemon=True)
        self._thread.start()

    def __call__(self, snapshot: Snapshot) -> None:
        self._latest = snapshot
        self._wake.set()

    def close(self, result: Mapping[str, Any] | None) -> None:
        """Sends the last word: the latest progress, and the result if there is one (of a gate that was not met: what was measured)."""
        self._closed = True
        self._wake.set()
        self._thread.join(timeout=30)
        status: dict[str, Any] = {}
        if self._latest:
            status["progress"] = self._latest.status()
        if result is not None:
            status["result"] = dict(result)
            if "uri" in result:  # published
                status["progress"] = {**status.get("progress", {}), "percent": 100, "etaSeconds": 0}
        if status:
            self._patch(status, attempts=5)

    def _send(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._closed:
                return
            if self._latest:
                self._patch({"progress": self._latest.status()}, attempts=1)
            deadline = time.monotonic() + self._interval
            while not self._closed and (left := deadline - time.monotonic()) > 0:
                time.sleep(min(0.2, left))

    def _patch(self, status: Mapping[str, Any], attempts: int) -> None:
        for attempt in range(attempts):
            try:
                self._call({"status": status})
                return
            except Exception as error:  # the API server's trouble is not the job's
                log.warning("status.%s was not written: %s", "/".join(status), str(error).splitlines()[0])
                if attempt + 1 < attempts:
                    time.sleep(min(5.0, 0.5 * 2**attempt))

    def _call(self, body: Mapping[str, Any]) -> None:
        if self._client is None:
            from kubernetes import client, config

            config.load_incluster_config()  # type: ignore[no-untyped-call]
            self._client = client.CustomObjectsApi()
        self._client.patch_namespaced_custom_object_status(
            GROUP,
            VERSION,
            self._namespace,
            PLURAL,
            self._name,
            dict(body),
            field_manager=WORKER_FIELD_MANAGER,
            _content_type="application/merge-patch+json",
            _request_timeout=(5, 15),
        )


def write_termination_message(message: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> None:
    """Leaves a summary for the operator where the kubelet looks for it; at most 4,096 bytes. Outside a pod there is no such file."""
    path = Path(environ.get(ENV_TERMINATION_LOG, TERMINATION_LOG))
    if not path.exists():
        return
    text = json.dumps(message)
    if len(text) > TERMINATION_BYTES:
        shorter = {**message, "message": str(message.get("message", ""))[:1500]}
        warnings = list((message.get("summary") or {}).get("warnings") or ())
        while len(text := json.dumps(shorter)) > TERMINATION_BYTES and warnings:
            warnings.pop()  # kompressor.json has all of them
            shorter["summary"] = {**message["summary"], "warnings": list(warnings)}
    try:
        path.write_text(text)
    except OSError as error:
        log.warning("%s: the termination message was not written: %s", path, error.strerror)
