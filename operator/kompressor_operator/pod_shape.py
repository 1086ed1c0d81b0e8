"""What all pods of ours have in common: the `restricted` Pod Security Standard, and last words in the termination message. Pure.

A numeric user that is not root, no capabilities, a root file system that cannot be written.
"""

from __future__ import annotations

from collections.abc import Sequence

from kompressor_api import names
from kompressor_operator.observed import Manifest
from kompressor_operator.settings import Settings

USER = 65532


def pod_spec(settings: Settings, service_account: str, container: Manifest, volumes: Sequence[Manifest], *, token: bool) -> Manifest:
    """`token`: whether it talks to the API server."""
    spec: Manifest = {
        "restartPolicy": "Never",
        "serviceAccountName": service_account,
        "automountServiceAccountToken": token,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,  # a claim is writable for it
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": list(volumes),
    }
    if settings.worker_image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.worker_image_pull_secrets]
    return spec


def container(
    settings: Settings,
    image: str,
    command: Sequence[str],
    env: Sequence[Manifest],
    mounts: Sequence[Manifest],
    env_from: Sequence[Manifest],
) -> Manifest:
    """Without resources."""
    made: Manifest = {
        "name": names.WORKER_CONTAINER,
        "image": image,
        "command": list(command),
        "env": list(env),
        "volumeMounts": list(mounts),
        "terminationMessagePath": names.TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    if settings.worker_image_pull_policy:
        made["imagePullPolicy"] = settings.worker_image_pull_policy
    if env_from:
        made["envFrom"] = list(env_from)
    return made
