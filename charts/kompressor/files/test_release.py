"""What `helm test` runs in the cluster: is the operator available, and does the API take a CompressionJob?"""

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
SECONDS = 60

JOB = {
    "apiVersion": "kompressor.io/v1alpha1",
    "kind": "CompressionJob",
    "metadata": {"name": "helm-test"},
    "spec": {
        "model": {"source": {"uri": "s3://models/source"}},
        "output": {"uri": "s3://models/output"},
        "passes": [{"rtn": {"scheme": "FP8_DYNAMIC"}}],
    },
}


def call(method: str, path: str, body: object = None) -> dict:
    token = Path(ACCOUNT, "token").read_text()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(SERVER + path, data, headers, method=method)
    context = ssl.create_default_context(cafile=f"{ACCOUNT}/ca.crt")
    with urllib.request.urlopen(request, context=context, timeout=10) as answer:
        return json.load(answer)


def available() -> None:
    path = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/{DEPLOYMENT}"
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        status = call("GET", path).get("status", {})
        if status.get("availableReplicas"):
            return
        time.sleep(2)
    sys.exit(f"deployment {DEPLOYMENT}: no available replica after {SECONDS} s; see kubectl -n {NAMESPACE} describe pods")


def accepted() -> None:
    path = f"/apis/kompressor.io/v1alpha1/namespaces/{NAMESPACE}/compressionjobs?dryRun=All"
    try:
        call("POST", path, JOB)
    except urllib.error.HTTPError as error:
        sys.exit(f"a CompressionJob is refused: {error.code} {error.read().decode()}")


available()
print(f"deployment {DEPLOYMENT} is available")
accepted()
print("the API takes a CompressionJob")
