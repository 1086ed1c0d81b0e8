"""Two replicas and a real Lease: one works; whatever becomes of it, the other takes over within twenty seconds."""

from __future__ import annotations

import json
import signal
import time
import uuid
from collections.abc import Iterator

import pytest
from stage import SUCCEED, SYSTEM, Operator, Stage, eventually
from test_stage_deletion import scrape

pytestmark = pytest.mark.cluster

TAKE_OVER = 20.0


@pytest.fixture
def replica(stage: Stage) -> Iterator[dict[str, str]]:
    """Settings of operators that agree by one Lease, and the right to it as the chart gives it."""
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": "lease-of-tests", "namespace": SYSTEM}}
    rule = {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]}
    subject = {"kind": "Group", "apiGroup": "rbac.authorization.k8s.io", "name": f"system:serviceaccounts:{SYSTEM}"}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "lease-of-tests"}
    binding = role | {"kind": "RoleBinding", "roleRef": reference, "subjects": [subject]}
    stage.cluster.apply(role | {"kind": "Role", "rules": [rule]}, binding)
    yield {"lease_namespace": SYSTEM, "lease_name": f"operator-{uuid.uuid4().hex[:6]}"}


def written(operator: Operator) -> float:
    """Requests by which it changed something, but its Lease."""
    made = scrape(operator).get("kompressor_api_requests_total", {})
    return sum(count for labels, count in made.items() if not labels.endswith(("GET", "LIST")) and "/Lease/" not in labels)


def started(stage: Stage, name: str, since: float) -> float:
    """Seconds until the Job of a new CompressionJob is there."""
    uid = stage.play(SUCCEED, name=name)
    eventually(lambda: stage.jobs(uid))
    return time.monotonic() - since


def test_the_other_takes_over_whatever_becomes_of_the_first(stage: Stage, replica: dict[str, str]) -> None:
    with stage.operator_process(**replica) as one:
        assert eventually(lambda: one.said("leading as")) and eventually(lambda: one.said("watching"))
        with stage.operator_process(**replica) as two:
            uid = stage.play(SUCCEED, name="first")
            stage.until("Completed", "first")
            assert len(stage.jobs(uid)) == 1 and written(two) == 0 and not two.said("leading as") and two.ready()
            assert scrape(one)["kompressor_leader"] == {"": 1} and scrape(two)["kompressor_leader"] == {"": 0}

            killed = time.monotonic()
            one.stop(signal.SIGKILL)
            after_kill = started(stage, "killed", killed)

            with stage.operator_process(**replica) as three:
                stopped = time.monotonic()
                two.process.send_signal(signal.SIGTERM)
                assert two.process.wait(60) == 0
                after_stop = started(stage, "stopped", stopped)
                stage.until("Completed", "stopped")
                eventually(lambda: stage.events("stopped")[-1] == "Completed")  # the last that it writes

                with stage.operator_process(**replica) as four:
                    before = written(three)
                    frozen = time.monotonic()
                    three.process.send_signal(signal.SIGSTOP)
                    after_freeze = started(stage, "frozen", frozen)
                    stage.until("Completed", "frozen")
                    three.process.send_signal(signal.SIGCONT)
                    assert three.process.wait(60) == 1, "it does not stand by with what it believed to know"
                    made = three.said("stopping")[0]["detail"]
                    assert "Lease" in three.entries[-1]["message"] and before == counted(made), made
                    assert four.process.poll() is None and [e for e in four.entries if e["level"] == "error"] == []
    print(f"take-over after SIGKILL {after_kill:.1f} s, SIGTERM {after_stop:.1f} s, SIGSTOP {after_freeze:.1f} s")
    assert max(after_kill, after_freeze) < TAKE_OVER and after_stop < TAKE_OVER / 2


def counted(detail: str) -> float:
    """The same of an operator that has ended, from its last words."""
    made: dict[str, int] = json.loads(detail)
    return sum(count for what, count in made.items() if not what.startswith(("GET", "LIST")) and not what.endswith("Lease"))
