"""What runs before an uninstall that takes the CRD away: every CompressionJob is deleted while there is an operator.

Those with deletionPolicy Delete have a finalizer that only the operator takes off; without it the CRD would hang in its deletion for ever.
"""

import http.client
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
SERVER = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
NAMESPACE = os.environ["NAMESPACE"]
DEPLOYMENT = os.environ["DEPLOYMENT"]
JOBS = "/apis/kompressor.io/v1alpha1/compressionjobs"
SECONDS = 270
"""Helm waits for 300 at most, unless told otherwise; then nobody hears what is wrong."""


def call(method: str, path: str) -> dict:
    token = Path(ACCOUNT, "token").read_text()
    request = urllib.request.Request(SERVER + path, headers={"Authorization": f"Bearer {token}"}, method=method)
    context = ssl.create_default_context(cafile=f"{ACCOUNT}/ca.crt")
    try:
        with urllib.request.urlopen(request, context=context, timeout=10) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return {}
        raise


def remaining() -> list[dict]:
    return [item["metadata"] for item in call("GET", JOBS).get("items", [])]


def served() -> bool:
    """Is an operator wanted at all? One that restarts comes back."""
    return bool(call("GET", f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/{DEPLOYMENT}").get("spec", {}).get("replicas"))


def fail(jobs: list[dict], why: str) -> None:
    named = ", ".join(f"{meta['namespace']}/{meta['name']}" for meta in jobs[:10])
    sys.exit(
        f"{len(jobs)} CompressionJobs are still there ({named}): {why}. Uninstall again after that. To leave their output where it is: "
        f'kubectl -n <namespace> patch kcj <name> --type=merge -p \'{{"metadata": {{"finalizers": null}}}}\''
    )


deadline = time.monotonic() + SECONDS
while True:
    try:
        jobs = remaining()
        if not jobs:
            break
        for meta in jobs:
            if "deletionTimestamp" not in meta:
                print(f"deleting {meta['namespace']}/{meta['name']}", flush=True)
                call("DELETE", f"/apis/kompressor.io/v1alpha1/namespaces/{meta['namespace']}/compressionjobs/{meta['name']}")
        held = [meta for meta in remaining() if meta.get("finalizers")]
        if held and not served():
            fail(held, f"no operator cleans up: kubectl -n {NAMESPACE} scale deployment {DEPLOYMENT} --replicas=1")
    except (OSError, http.client.HTTPException) as error:  # a connection that is cut while it is read is no URLError
        print(f"again: {error}", flush=True)
    if time.monotonic() > deadline:
        fail(remaining(), "the operator is still cleaning up; kubectl get kcj,jobs,events -A says what it waits for")
    time.sleep(1)
print("no CompressionJob is left")
