"""How clients put a CompressionJob into a cluster, and what they are told."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from kompressor_api import names
from local_cluster import Cluster

Job = dict[str, Any]

RAW: dict[str, Any] = {"_preload_content": False}
"""The client drops the body of a 201 that answers a patch; so the body is read here."""


@dataclass(frozen=True)
class Answer:
    """What the API server said to one request: the object, or why not."""

    object: Job
    refusal: str


class Server:
    """One cluster as one user, and the ways in which clients put a CompressionJob into it."""

    def __init__(self, cluster: Cluster, headers: dict[str, str] | None = None) -> None:
        self.cluster = cluster
        connection = config.new_client_from_config(str(cluster.kubeconfig))
        for name, value in (headers or {}).items():
            connection.set_default_header(name, value)
        self.api = client.CustomObjectsApi(connection)

    def create(self, job: Job, *, validation: str = "Strict", keep: bool = False) -> Answer:
        """`validation`: Strict is kubectl's, Ignore that of older clients and Helm. A dry run, unless `keep`."""
        options: dict[str, Any] = {"field_validation": validation, **RAW} | ({} if keep else {"dry_run": "All"})
        return _answer(lambda: self.api.create_namespaced_custom_object(*_place(job), job, **options))

    def apply(self, job: Job) -> Answer:
        """Server-side apply, as a dry run."""
        options: dict[str, Any] = {"field_manager": "tester", "dry_run": "All", "force": True, **RAW}
        options["_content_type"] = "application/apply-patch+yaml"
        return _answer(lambda: self.api.patch_namespaced_custom_object(*_place(job), _name(job), job, **options))

    def replace(self, job: Job) -> Answer:
        """A PUT of the whole object, as a dry run."""
        version = {"resourceVersion": self.get(job)["metadata"]["resourceVersion"]}
        body = job | {"metadata": job["metadata"] | version}
        arguments = (*_place(job), _name(job), body)
        return _answer(lambda: self.api.replace_namespaced_custom_object(*arguments, dry_run="All", **RAW))

    def patch(self, job: Job, change: Job, *, status: bool = False) -> Answer:
        """A merge patch, as `kubectl patch --type merge`."""
        call = self.api.patch_namespaced_custom_object_status if status else self.api.patch_namespaced_custom_object
        options: dict[str, Any] = {"_content_type": "application/merge-patch+json", **RAW}
        return _answer(lambda: call(*_place(job), _name(job), change, **options))

    def get(self, job: Job) -> Job:
        found: Any = self.api.get_namespaced_custom_object(*_place(job), _name(job))
        return dict(found)

    def delete(self, job: Job) -> None:
        self.api.delete_namespaced_custom_object(*_place(job), _name(job))

    def as_account(self, namespace: str, account: str, *, pod: str) -> Server:
        """The same API server, as a service account whose token is bound to `pod`, or with an empty one to none."""
        headers = {
            "Impersonate-User": f"system:serviceaccount:{namespace}:{account}",
            "Impersonate-Group": f"system:serviceaccounts:{namespace}",
        }
        bound = {"Impersonate-Extra-authentication.kubernetes.io%2fpod-name": pod} if pod else {}
        return Server(self.cluster, headers | bound)

    def grant(self, namespace: str, account: str, verbs: str, resources: str, subject: str = "") -> None:
        """Lets a service account (or `subject`, namespace:name) do `verbs` to `resources`, both with commas."""
        role = ("-n", namespace, f"--verb={verbs}", f"--resource={resources}")
        self.cluster.kubectl("create", "role", account, *role)
        who = f"--serviceaccount={subject or f'{namespace}:{account}'}"
        self.cluster.kubectl("create", "rolebinding", account, "-n", namespace, f"--role={account}", who)


def _place(job: Job) -> tuple[str, str, str, str]:
    return names.GROUP, names.VERSION, job["metadata"]["namespace"], names.PLURAL


def _name(job: Job) -> str:
    name: str = job["metadata"]["name"]
    return name


def _answer(call: Any) -> Answer:
    try:
        return Answer(json.loads(call().data), "")
    except ApiException as error:
        return Answer({}, f"{error.status} {error.body}")


def manifest(namespace: str, name: str = "job", **spec: Any) -> Job:
    """A good CompressionJob; `spec` replaces whole fields, None removes one."""
    fields: dict[str, Any] = {
        "model": {"source": {"uri": "s3://models/llama"}},
        "output": {"uri": "s3://models/llama-w4a16"},
        "passes": [{"rtn": {"scheme": "W4A16", "groupSize": 128}}],
    }
    fields |= spec
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {key: value for key, value in fields.items() if value is not None},
    }
