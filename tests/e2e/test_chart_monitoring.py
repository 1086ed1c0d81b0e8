"""What the chart renders for replicas that agree by a Lease, and for Prometheus and Grafana."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_chart_values import Manifest, of_kind, render, sets  # noqa: F401  (a fixture)

from kompressor_api.names import Reason
from kompressor_operator.cluster import ROUTES
from kompressor_operator.metrics import Metrics, Moment
from kompressor_operator.settings import Settings

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
ON = sets(
    metrics={"serviceMonitor": {"enabled": True, "labels": {"release": "mine"}}, "rules": {"enabled": True}, "dashboard": {"enabled": True}}
)
OF_A_TARGET = {"namespace", "service", "pod"}

Render = Callable[..., list[Manifest]]


def container_of(objects: list[Manifest]) -> Manifest:
    (deployment,) = of_kind(objects, "Deployment")
    found: Manifest = deployment["spec"]["template"]["spec"]["containers"][0]
    return found


def named(objects: list[Manifest], kind: str, suffix: str) -> list[Manifest]:
    return [one for one in of_kind(objects, kind) if one["metadata"]["name"].endswith(suffix)]


def test_replicas_agree_by_a_lease_that_they_may_write(render: Render) -> None:  # noqa: F811
    def settings(objects: list[Manifest]) -> Settings:
        return Settings.from_env({e["name"]: e["value"] for e in container_of(objects)["env"]})

    one, two = render("--set=replicas=1"), render("--set=replicas=2")
    assert settings(one).lease_namespace == "" and not named(one, "Role", "-lease"), "one alone asks nobody"
    assert (settings(two).lease_namespace, settings(two).lease_name) == ("system", "one-kompressor")
    (role,), (binding,) = named(two, "Role", "-lease"), named(two, "RoleBinding", "-lease")
    assert role["metadata"]["namespace"] == binding["metadata"]["namespace"] == "system"
    assert role["rules"] == [{"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"] and binding["subjects"][0]["name"] == "one-kompressor"
    assert "Lease" in ROUTES and not named(render("--set=replicas=2", "--set=rbac.create=false"), "Role", "-lease")


def test_images_and_memory_of_steps_reach_the_operator(render: Render) -> None:  # noqa: F811
    def settings(**values: Any) -> Settings:
        return Settings.from_env({e["name"]: e["value"] for e in container_of(render(*sets(**values)))["env"]})

    as_it_is = settings()
    assert as_it_is.planner_image == as_it_is.worker_image.replace("worker", "planner")
    assert (as_it_is.worker_gpu_resource, as_it_is.worker_shared_memory) == ("", "")
    digest = f"sha256:{'1' * 64}"
    given = settings(
        planner__image={"repository": "mine/plan", "digest": digest}, worker__gpuResource="amd.com/gpu", worker__sharedMemory="8Gi"
    )
    assert given.planner_image == f"mine/plan@{digest}"
    assert (given.worker_gpu_resource, given.worker_shared_memory) == ("amd.com/gpu", "8Gi")
    assert settings(planner__image__repository="").planner_image == "", "the worker's then, as the operator says"


def test_prometheus_finds_the_operator(render: Render) -> None:  # noqa: F811
    objects = render(*ON, "--set=healthPort=8090")
    (service,), (monitor,) = of_kind(objects, "Service"), of_kind(objects, "ServiceMonitor")
    pod = of_kind(objects, "Deployment")[0]["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= pod.items()
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["namespaceSelector"]["matchNames"] == [service["metadata"]["namespace"]]
    assert monitor["metadata"]["labels"]["release"] == "mine"
    (port,) = service["spec"]["ports"]
    assert port["targetPort"] in [p["name"] for p in container_of(objects)["ports"]] and port["port"] == 8090
    assert [e["port"] for e in monitor["spec"]["endpoints"]] == [port["name"]]
    for policy in of_kind(objects, "NetworkPolicy"):
        assert {"port": 8090, "protocol": "TCP"} in policy["spec"]["ingress"][0]["ports"], "or nobody can scrape"


def test_nothing_of_prometheus_unless_asked_for(render: Render) -> None:  # noqa: F811
    """Its kinds exist only where it is installed."""
    assert of_kind(render(), "ServiceMonitor", "PrometheusRule", "ConfigMap") == []


def served() -> dict[str, set[str]]:
    """Series that the operator serves, as its exposition says, with their labels, as docs/metrics.md says."""
    metrics = Metrics()
    metrics.add(Moment(lambda: 0, lambda: {("Complete", "Completed"): 1}, {("GET", "Job", 200): 1}, lambda: True, lambda: 0.0, dict))
    families = {family.name: family.type for family in text_string_to_metric_families(metrics.exposition("text/plain")[0].decode())}
    found: dict[str, set[str]] = {}
    for row in re.findall(r"^\| `(kompressor_\w+)` \| \w+ \| (.*?) \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE):
        name, labels = row[0], set(re.findall(r"`(\w+)`", row[1]))
        kind = families[name.removesuffix("_total")]
        found |= {f"{name}_bucket": labels | {"le"}} if kind == "histogram" else {name: labels}
    return found | {"up": set(), "process_resident_memory_bytes": set()}


def queries(objects: list[Manifest]) -> Iterator[str]:
    for rules in of_kind(objects, "PrometheusRule"):
        yield from (rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"])
    for board in named(objects, "ConfigMap", "-dashboard"):
        for panel in json.loads(board["data"]["kompressor.json"])["panels"]:
            yield from (target["expr"] for target in panel["targets"])


def test_every_query_asks_for_what_is_served(render: Render) -> None:  # noqa: F811
    known, asked = served(), set()
    every = list(queries(render(*ON)))
    assert len(every) > 20
    for query in every:
        assert "SELECTOR" not in query and query.count("(") == query.count(")"), query
        selectors = re.findall(r"(\w+)\{([^}]*)\}", query)
        assert selectors, query
        for name, matchers in selectors:
            used = {label for label, _, _ in re.findall(r"(\w+)\s*(=~|!=|!~|=)\s*\"([^\"]*)\"", matchers)}
            assert name in known and used <= known[name] | OF_A_TARGET, query
            assert 'namespace="system", service="one-kompressor-metrics"' in matchers, "another release's"
            asked.add(name)
            for labels in re.findall(r"by \(([^)]*)\)", query):
                assert {label.strip() for label in labels.split(",")} <= known[name], query
        words = set(re.findall(r"[a-z_]+(?=\s*\()", query)) - {"by"}
        assert words <= {"sum", "max", "absent", "increase", "rate", "histogram_quantile", "or", "and"}, words
    unseen = {name for name in known if name not in asked}
    assert unseen <= {"kompressor_api_request_seconds_bucket"}, "served, and never looked at"


def test_reasons_in_alerts_are_reasons(render: Render) -> None:  # noqa: F811
    (rules,) = of_kind(render(*ON), "PrometheusRule")
    alerts = {rule["alert"]: rule for group in rules["spec"]["groups"] for rule in group["rules"]}
    assert all(rule["annotations"].keys() == {"summary", "description"} for rule in alerts.values())
    target = {"namespace": "system", "service": "one-kompressor-metrics"}
    assert all(rule["labels"] == {"severity": rule["labels"]["severity"]} | target for rule in alerts.values()), "two releases, two alerts"
    held_up = re.search(r'reason=~"([^"]*)"', alerts["KompressorJobHeldUp"]["expr"])
    early = list(Reason)[list(Reason).index(Reason.IMAGE_PULL_FAILED) : list(Reason).index(Reason.COMPLETED)]
    assert held_up and held_up[1].split("|") == early, "all that something outside must change"
