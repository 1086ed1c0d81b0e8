"""podTemplate over the operator's template: by Kubernetes' own merge keys, judged by kubectl; the operator's own stays on top."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kcj_builders import PASSES, SETTINGS, UID, kcj

import binaries
from kompressor_api import names
from kompressor_operator import manifests
from kompressor_operator.manifests import Attempt
from kompressor_operator.observed import Manifest
from kompressor_operator.planner import preflight_job
from kompressor_operator.pod_template import CONTAINER_KEYS, POD_KEYS, merge
from kompressor_operator.validation import problems_of, told

KEYS = POD_KEYS | CONTAINER_KEYS
BASE: Manifest = {
    "metadata": {"labels": {"a": "1", "b": "2"}},
    "spec": {
        "securityContext": {"runAsUser": 1, "fsGroup": 2},
        "nodeSelector": {"zone": "x", "disk": "ssd"},
        "tolerations": [{"operator": "Exists"}],
        "imagePullSecrets": [{"name": "pull"}],
        "topologySpreadConstraints": [{"topologyKey": "zone", "maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule"}],
        "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["one"]}],
        "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}, {"name": "scratch", "emptyDir": {}}],
        "containers": [
            {
                "name": "worker",
                "image": "worker:1",
                "args": ["a", "b"],
                "env": [{"name": "HOME", "value": "/h"}, {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
                "envFrom": [{"prefix": "A_", "secretRef": {"name": "a"}}],
                "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "scratch", "mountPath": "/cache"}],
                "ports": [{"containerPort": 80, "name": "http"}],
                "resources": {"limits": {"memory": "1Gi", "cpu": "1"}},
                "securityContext": {"capabilities": {"drop": ["ALL"]}, "runAsNonRoot": True},
            }
        ],
    },
}
WORDS = st.sampled_from(["one", "two", "three"])


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({}, optional=fields)


def keyed(key: str, values: list[Any], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A list of entries that differ in this key."""
    entry = st.fixed_dictionaries({key: st.sampled_from(values)}, optional=fields)
    return st.lists(entry, max_size=3, unique_by=lambda one: str(one[key]))


CONTAINER = {
    "image": WORDS,
    "args": st.lists(WORDS, min_size=1, max_size=2),
    "env": keyed("name", ["HOME", "NEW", "OTHER"], value=WORDS),
    "envFrom": st.just([{"prefix": "B_", "secretRef": {"name": "b"}}]),
    "volumeMounts": keyed("mountPath", ["/tmp", "/cache", "/data"], name=WORDS, readOnly=st.just(True)),
    "ports": keyed("containerPort", [80, 81], name=WORDS),
    "resources": some(limits=some(memory=st.sampled_from(["2Gi", None]), cpu=st.just("2")), requests=some(memory=st.just("1Gi"))),
    "securityContext": some(runAsNonRoot=st.sampled_from([False, None]), capabilities=some(add=st.just(["CHOWN"]))),
}
OVERLAYS = some(
    metadata=some(labels=some(a=st.sampled_from(["9", None]), c=WORDS), annotations=some(note=WORDS)),
    spec=some(
        priorityClassName=WORDS,
        securityContext=some(runAsUser=st.sampled_from([5, None])),
        nodeSelector=some(zone=WORDS, disk=st.none()),
        tolerations=st.just([{"key": "gpu", "operator": "Exists"}]),
        affinity=st.just({"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}),
        imagePullSecrets=keyed("name", ["pull", "more"]),
        hostAliases=keyed("ip", ["10.0.0.1", "10.0.0.2"], hostnames=st.lists(WORDS, min_size=1, max_size=1)),
        topologySpreadConstraints=keyed("topologyKey", ["zone", "rack"], maxSkew=st.just(2)),
        volumes=keyed("name", ["tmp", "scratch", "more"], emptyDir=some(sizeLimit=st.just("2Gi"), medium=st.just("Memory"))),
        containers=keyed("name", ["worker", "side"], **CONTAINER),
        initContainers=keyed("name", ["first", "second"], **CONTAINER),
    ),
)


def normal(value: Any) -> Any:
    """Lists with a merge key by that key, for their order says nothing here; what is empty, which typed output leaves out or adds, away."""
    if isinstance(value, dict):
        found = {name: entries(name, part) for name, part in value.items()}
        return {name: part for name, part in found.items() if part not in (None, {}, [], "")}
    return [normal(part) for part in value] if isinstance(value, list) else value


def entries(name: str, value: Any) -> Any:
    if name in KEYS and isinstance(value, list):
        return {one[KEYS[name]]: normal(one) for one in value}
    return normal(value)


@pytest.fixture(scope="module")
def kubectl() -> str:
    try:
        return str(binaries.paths(["kubectl"])["kubectl"])
    except binaries.BinaryError as error:
        pytest.skip(f"no kubectl: {error}")


@given(overlay=OVERLAYS)
@settings(max_examples=25, deadline=None)
def test_it_merges_as_kubernetes_does(kubectl: str, overlay: Manifest) -> None:
    """kubectl applies the strategic merge patch by the merge keys that the API's own types declare."""
    there = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": BASE}
    patch = json.dumps({"template": overlay})
    command = [kubectl, "patch", "--local", "-f", "-", "--type", "strategic", "-p", patch, "-o", "json"]
    done = subprocess.run(command, input=json.dumps(there), capture_output=True, text=True, check=True)
    before = json.dumps(BASE)
    assert normal(merge(BASE, overlay)) == normal(json.loads(done.stdout)["template"])
    assert json.dumps(BASE) == before


def test_another_source_replaces_the_old_one() -> None:
    """What a strategic merge leaves side by side, and the API server then refuses."""
    claim = {"name": "scratch", "persistentVolumeClaim": {"claimName": "cache"}}
    held = {"name": "POD", "value": "mine"}
    made = merge(BASE, {"spec": {"volumes": [claim], "containers": [{"name": "worker", "env": [held]}]}})["spec"]
    assert made["volumes"][1] == claim and made["volumes"][0] == BASE["spec"]["volumes"][0]
    assert made["containers"][0]["env"] == [{"name": "HOME", "value": "/h"}, held]


def test_null_takes_a_field_away() -> None:
    made = merge(BASE, {"spec": {"nodeSelector": {"disk": None}, "containers": [{"name": "worker", "args": None}]}})["spec"]
    assert made["nodeSelector"] == {"zone": "x"} and "args" not in made["containers"][0]


# ---- the operator's own


HOSTILE: Manifest = {
    "metadata": {"labels": {names.LABEL_JOB_UID: "other", names.LABEL_STEP: "cleanup", "team": "ml"}, "annotations": {"note": "x"}},
    "spec": {
        "restartPolicy": "OnFailure",
        "automountServiceAccountToken": False,
        "serviceAccountName": "theirs",
        "serviceAccount": "ignored",
        "volumes": [{"name": "job", "emptyDir": {}}],
        "containers": [
            {
                "name": "worker",
                "command": ["sh"],
                "args": ["-c", "true"],
                "terminationMessagePath": "/elsewhere",
                "env": [
                    {"name": names.ENV_POD_UID, "value": "forged"},
                    {"name": names.ENV_MEMORY_PLAN, "value": "2"},
                    {"name": "WHO", "value": "$(POD_NAME)"},
                ],
                "envFrom": [{"configMapRef": {"name": "more"}}],
                "volumeMounts": [{"name": "tmp", "mountPath": names.JOB_DIRECTORY}],
            }
        ],
    },
}


def test_what_the_operator_relies_on_stays_its_own() -> None:
    job = kcj(worker={"podTemplate": HOSTILE, "serviceAccountName": "mine"})
    plain, body = (manifests.worker_job(one, Attempt(), SETTINGS)["spec"]["template"] for one in (kcj(), job))
    pod, worker, theirs = body["spec"], body["spec"]["containers"][0], plain["spec"]["containers"][0]
    for name in ("command", "terminationMessagePath", "terminationMessagePolicy"):
        assert worker[name] == theirs[name]
    assert "args" not in worker and pod["restartPolicy"] == "Never" and pod["automountServiceAccountToken"] is True
    assert body["metadata"]["labels"] == plain["metadata"]["labels"] | {"team": "ml"} and body["metadata"]["annotations"] == {"note": "x"}
    env = [entry["name"] for entry in worker["env"]]
    assert names.ENV_MEMORY_PLAN not in env and env.index("POD_NAME") < env.index("WHO")
    assert next(e for e in worker["env"] if e["name"] == names.ENV_POD_UID)["valueFrom"]["fieldRef"]
    assert next(v for v in pod["volumes"] if v["name"] == "job")["configMap"]
    assert next(m for m in worker["volumeMounts"] if m["mountPath"] == names.JOB_DIRECTORY)["name"] == "job"
    assert worker["envFrom"] == [{"configMapRef": {"name": "more"}}, *theirs["envFrom"]], "the credentials' Secrets too"
    assert pod["serviceAccountName"] == "theirs" and "serviceAccount" not in pod
    assert manifests.role_binding(job)["subjects"][0]["name"] == "theirs"
    assert "ServiceAccount" not in {child["kind"] for child in manifests.supports(job)}


def test_a_podtemplate_does_not_move_where_results_go() -> None:
    """An admission policy that looks at spec.output would be told about another place than the one that is written."""
    elsewhere = {"persistentVolumeClaim": {"claimName": "elsewhere"}}
    claim = f"{names.CLAIM_DIRECTORY}/results"
    moved = dict.fromkeys(("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", names.ENV_CLAIM_DIRECTORY, names.ENV_CA_DIRECTORY), "elsewhere")
    moved["SOURCE_AWS_ACCESS_KEY_ID"] = "theirs"
    container = {
        "name": "worker",
        "env": [{"name": name, "value": value} for name, value in moved.items()],
        "envFrom": [{"configMapRef": {"name": "more"}}],
        "volumeMounts": [{"name": "x", "mountPath": path} for path in (claim, f"{claim}/", f"{claim}/llama", f"/{claim}/./a", "/more")],
    }
    template = {"spec": {"volumes": [{"name": name, **elsewhere} for name in ("claim-0", "ca-output", "x")], "containers": [container]}}
    output = {"uri": "pvc://results/llama", "caBundle": {"configMap": "ca"}}
    job = kcj(worker={"podTemplate": template}, output=output)
    admins = replace(SETTINGS, worker_env={"AWS_ENDPOINT_URL": "https://store"})
    pod = manifests.worker_job(job, Attempt(), admins)["spec"]["template"]["spec"]
    (worker,), volumes = pod["containers"], {one["name"]: one for one in pod["volumes"]}
    env = {one["name"]: one for one in worker["env"]}
    assert [env[name]["value"] for name in moved if name != "SOURCE_AWS_ACCESS_KEY_ID"] == ["https://store", "", "", ""]
    assert env["SOURCE_AWS_ACCESS_KEY_ID"]["valueFrom"]["secretKeyRef"] and len(env) == len(worker["env"])
    assert volumes["claim-0"]["persistentVolumeClaim"] == {"claimName": "results"} and volumes["ca-output"]["configMap"]["name"] == "ca"
    assert len(volumes) == len(pod["volumes"]) and volumes["x"] == {"name": "x", **elsewhere}
    assert [one["mountPath"] for one in worker["volumeMounts"] if one["name"] == "x"] == ["/more"]
    assert {"name": "claim-0", "mountPath": claim} in worker["volumeMounts"]


def test_an_attempt_keeps_the_image_that_podtemplate_gave_the_one_before() -> None:
    job = kcj(worker={"podTemplate": {"spec": {"containers": [{"name": "worker", "image": "theirs:2"}]}}})

    def image(attempt: Attempt) -> str:
        return str(manifests.worker_job(job, attempt, SETTINGS)["spec"]["template"]["spec"]["containers"][0]["image"])

    assert image(Attempt()) == "theirs:2" and image(Attempt(2, image="theirs:1")) == "theirs:1"


def test_the_preflight_takes_identity_and_network_but_not_where_gpus_are() -> None:
    template = {
        "metadata": {"labels": {"azure.workload.identity/use": "true", names.QUEUE_LABEL: "gpu"}},
        "spec": {
            "serviceAccountName": "mine",
            "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["store"]}],
            "nodeSelector": {"gpu": "h100"},
            "runtimeClassName": "nvidia",
            "priorityClassName": "high",
            "volumes": [{"name": "big", "persistentVolumeClaim": {"claimName": "big"}}],
            "initContainers": [{"name": "first", "image": "x"}],
            "containers": [
                {
                    "name": "worker",
                    "image": "worker:gpu",
                    "env": [{"name": "HTTPS_PROXY", "value": "http://proxy"}],
                    "resources": {"limits": {"nvidia.com/gpu": 1}},
                    "volumeMounts": [{"name": "big", "mountPath": "/big"}],
                },
                {"name": "side", "image": "y"},
            ],
        },
    }
    worker = {"podTemplate": template, "resources": {"limits": {"nvidia.com/gpu": 8}}, "tolerations": [{"operator": "Exists"}]}
    job = kcj(worker=worker, queueName="gpu", ttlSecondsAfterFinished=60, output={"uri": "pvc://results/x"})
    body = preflight_job(job, SETTINGS)
    pod, marks = body["spec"]["template"]["spec"], body["spec"]["template"]["metadata"]["labels"]
    (container,) = pod["containers"]
    assert not {"nodeSelector", "runtimeClassName", "priorityClassName", "initContainers"} & set(pod)
    assert container["resources"]["limits"] == {"memory": "1Gi"} and container["image"] == "worker:gpu", (
        "an image of theirs holds for it too"
    )
    slim = preflight_job(job, replace(SETTINGS, planner_image="slim:1"))
    assert slim["spec"]["template"]["spec"]["containers"][0]["image"] == "slim:1"
    assert container["command"] == ["kompressor", "plan", "/etc/kompressor/job/job.json", "--in-cluster"]
    assert pod["serviceAccountName"] == "mine" and pod["hostAliases"] and pod["tolerations"] == [{"operator": "Exists"}]
    assert {"name": "HTTPS_PROXY", "value": "http://proxy"} in container["env"]
    assert marks["azure.workload.identity/use"] == "true" and marks[names.LABEL_STEP] == "preflight" and marks[names.LABEL_JOB_UID] == UID
    for labels in (marks, body["metadata"]["labels"]):
        assert names.QUEUE_LABEL not in labels and names.LABEL_ATTEMPT not in labels
    assert "suspend" not in body["spec"] and body["spec"]["ttlSecondsAfterFinished"] == 3600
    assert pod["automountServiceAccountToken"] is False
    claim = next(m for m in container["volumeMounts"] if m["mountPath"].endswith("/results"))
    assert claim["readOnly"] is True, "it only looks"
    codes = [rule["onExitCodes"]["values"] for rule in body["spec"]["podFailurePolicy"]["rules"][1:]]
    assert codes == [[75, 76], [64, 65, 66, 67]], "there is no smaller plan of a plan: out of memory counts"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ({"containers": []}, "spec.worker.podTemplate.containers: unknown field; a pod template has metadata and spec"),
        ({"metadata": {"name": "x"}}, "spec.worker.podTemplate.metadata.name: cannot be set"),
        ({"spec": {"containers": {"name": "worker"}}}, "spec.worker.podTemplate.spec.containers: is not a list"),
        ({"spec": {"containers": None}}, "spec.worker.podTemplate.spec.containers: is not a list"),
        ({"spec": {"volumes": [{"emptyDir": {}}]}}, "spec.worker.podTemplate.spec.volumes[0]: has no name"),
        ({"spec": {"containers": [{"name": "worker", "env": ["X=1"]}]}}, "spec.worker.podTemplate.spec.containers[0].env[0]: has no name"),
        ({"spec": "x"}, "spec.worker.podTemplate.spec: is not an object"),
    ],
)
def test_what_the_api_server_would_never_see_is_refused_before(template: Manifest, said: str) -> None:
    job = kcj(worker={"podTemplate": template})
    assert said in told(problems_of(job.spec, PASSES))


def test_a_podtemplate_of_nothing_changes_nothing() -> None:
    for template in ({}, {"metadata": None, "spec": None}, {"spec": {}}):
        assert problems_of(kcj(worker={"podTemplate": template}).spec, PASSES) == []
        with_it, without = (manifests.worker_job(kcj(worker=w), Attempt(), SETTINGS) for w in ({"podTemplate": template}, {}))
        assert with_it == without
