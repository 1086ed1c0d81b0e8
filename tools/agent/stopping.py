"""Stopping a container: preStop, SIGTERM to its first process, SIGKILL to all when the grace is over."""

import threading

from agent import probes
from agent.client import Object
from agent.records import Container, Stopping
from agent.runs import Run


def begin(container: Container, grace: float, now: float, pod_ip: str) -> None:
    """Starts the stop, or moves on one that is under way; a later, shorter grace shortens it. Call again at its deadline."""
    if container.run is None:
        return
    if container.stopping is None:
        container.stopping = Stopping(now + grace)
        hook = (container.spec.get("lifecycle") or {}).get("preStop")
        if hook and grace > 0:
            arguments = (container.run, container.spec, hook, grace, pod_ip)
            threading.Thread(target=_ask, args=arguments, daemon=True).start()
        else:
            container.run.terminate()
    container.stopping.deadline = min(container.stopping.deadline, now + grace)
    if now >= container.stopping.deadline and not container.stopping.killed:
        container.stopping.killed = True
        container.run.kill()


def _ask(run: Run, spec: Object, hook: Object, grace: float, pod_ip: str) -> None:
    """The hook counts against the grace; whether it works or not, SIGTERM follows."""
    if "sleep" in hook:
        threading.Event().wait(min(grace, hook["sleep"].get("seconds", 0)))
    else:
        probes.check({**hook, "timeoutSeconds": grace}, spec, pod_ip, run.folder)
    run.terminate()
