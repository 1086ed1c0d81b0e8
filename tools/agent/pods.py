"""The pods bound to this node: one list, then a watch, then again whenever the watch breaks."""

import logging
import threading
import time

from agent.client import ApiError, ApiUnavailable, Object
from agent.context import Context
from agent.home import stop_strangers
from agent.pod import PodWorker

log = logging.getLogger(__name__)
_PATH = "/api/v1/pods"
_SLOWEST_RETRY_SECONDS = 5.0


class Pods:
    """Keeps one worker for every pod."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._workers: dict[str, PodWorker] = {}
        self._lock = threading.Lock()
        self._selector = f"spec.nodeName={context.facts.name}"

    def follow(self) -> None:
        """For ever."""
        pause = 0.2
        while True:
            try:
                version = self._list()
                pause = 0.2
                while True:
                    version = self._watch(version)
            except (ApiUnavailable, ApiError) as error:
                log.info("pods: %s; listing again in %.1f s", error, pause)
            except Exception:
                log.exception("pods: unexpected; listing again in %.1f s", pause)
            time.sleep(pause)
            pause = min(2 * pause, _SLOWEST_RETRY_SECONDS)

    def find(self, namespace: str, name: str) -> PodWorker | None:
        """The worker of the newest pod of that name."""
        with self._lock:
            found = [w for w in self._workers.values() if _names(w.describe()) == (namespace, name)]
        return max(found, key=lambda worker: str(worker.describe()["metadata"]["creationTimestamp"]), default=None)

    def described(self) -> list[Object]:
        with self._lock:
            return [worker.describe() for worker in self._workers.values()]

    def _list(self) -> str:
        answer = self._context.client.get(_PATH, fieldSelector=self._selector)
        present = {pod["metadata"]["uid"]: pod for pod in answer["items"]}
        for pod in present.values():
            self._take(pod)
        with self._lock:
            lost = [worker for uid, worker in self._workers.items() if uid not in present]
        for worker in lost:
            worker.forget()
        stop_strangers(self._context.root, set(present))
        return str(answer["metadata"]["resourceVersion"])

    def _watch(self, version: str) -> str:
        """The version reached when the server ended the watch; ApiError 410 when it is too old to go on from."""
        for event in self._context.client.watch(_PATH, fieldSelector=self._selector, resourceVersion=version):
            pod = event["object"]
            if event["type"] == "ERROR":
                raise ApiError(pod.get("code", 500), pod.get("reason", ""), pod.get("message", ""))
            version = pod["metadata"]["resourceVersion"]
            if event["type"] == "DELETED":
                with self._lock:
                    worker = self._workers.get(pod["metadata"]["uid"])
                if worker is not None:
                    worker.forget()
            elif event["type"] != "BOOKMARK":
                self._take(pod)
        return version

    def _take(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        with self._lock:
            self._workers = {known: worker for known, worker in self._workers.items() if not worker.finished}
            worker = self._workers.get(uid)
            if worker is None:
                worker = self._workers[uid] = PodWorker(self._context, pod)
                worker.start()
                return
        worker.update(pod)


def _names(pod: Object) -> tuple[str, str]:
    return pod["metadata"]["namespace"], pod["metadata"]["name"]
