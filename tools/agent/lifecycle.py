"""Pure: which of a pod's containers to start now, which to restart later, and whether the pod has run its course."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from agent.records import Container


@dataclass(frozen=True)
class Backoff:
    """Seconds. The kubelet has 10 and 300; a test wants 1."""

    start: float = 1.0
    most: float = 300.0

    def delay(self, times: int) -> float:
        """Before try `times` (1 is the second try)."""
        return min(self.start * 2.0 ** max(0, times - 1), self.most)


@dataclass
class Step:
    """`backing_off` holds (container, seconds). `finished`: no container will run again."""

    start: list[Container] = field(default_factory=list)
    backing_off: list[tuple[Container, float]] = field(default_factory=list)
    wake_at: float = float("inf")
    finished: bool = False


def decide(policy: str, containers: Sequence[Container], now: float, backoff: Backoff) -> Step:
    """What the kubelet does: init containers one after the other, then all others; ended ones again if the policy says."""
    step = Step()
    apps = [container for container in containers if not container.init]
    begun = any(container.run for container in apps)
    for container in containers:
        if not container.init:
            continue
        if container.sidecar:
            if not container.running:
                _queue(step, container, now, backoff)
            if not (container.running and container.started) and not begun:
                return step
        elif container.run is None:
            _queue(step, container, now, backoff)
            return step
        elif container.running:
            return step
        elif container.run.state.exit_code:
            step.finished = policy == "Never"
            if not step.finished:
                _queue(step, container, now, backoff)
            return step
    for container in apps:
        if container.run is None or (not container.running and _again(policy, container)):
            _queue(step, container, now, backoff)
    step.finished = all(c.run and not c.running and not _again(policy, c) for c in apps)
    return step


def _again(policy: str, container: Container) -> bool:
    assert container.run is not None
    return policy == "Always" or (policy == "OnFailure" and bool(container.run.state.exit_code))


def _queue(step: Step, container: Container, now: float, backoff: Backoff) -> None:
    """Now, or when its back-off is over. The first restart is immediate, as the kubelet's is."""
    at = container.retry_at
    if container.run is not None and container.tries == 0:
        crashes = container.run.attempt + 1 - container.forgiven
        delay = backoff.delay(crashes - 1) if crashes > 1 else 0.0
        at = max(at, container.run.state.finished_at + delay)
        if at > now:
            step.backing_off.append((container, delay))
    if at <= now:
        step.start.append(container)
    else:
        step.wake_at = min(step.wake_at, at)
