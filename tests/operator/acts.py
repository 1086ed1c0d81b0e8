"""What a worker on the stage does, as lines of shell."""

from __future__ import annotations

import json
from typing import Any

from kompressor_api import names

__all__ = ["GO_ON", "HELD", "SUCCEED", "report"]


def report(reason: str, message: str, code: int, **summary: Any) -> str:
    """A line of shell that ends as a worker does."""
    told = {"reason": reason, "message": message, "exitCode": code} | ({"summary": summary} if summary else {})
    return f"echo '{json.dumps(told)}' > /dev/termination-log; exit {code}"


SUCCEED = report("Completed", "4.0x smaller", 0, ratio="4.0x", outputBytes=25, sourceBytes=100)
HELD = (
    "S=/var/run/secrets/kubernetes.io/serviceaccount; held() { "
    'until curl -s --cacert $S/ca.crt -H "Authorization: Bearer $(cat $S/token)" '
    f"https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT/apis/{names.API_VERSION}/namespaces/$POD_NAMESPACE/{names.PLURAL}/$PLAY "
    '| grep -q "\\"unit\\": *\\"$1\\""; do sleep 0.2; done; }'
)
"""A line of shell after which `held CUE` waits until the test gives this cue (`Stage.cue`), however slow the machine is."""
GO_ON = "trap 'exit 75' TERM; echo acting; while :; do sleep 0.05; done"
"""Until SIGTERM, then as a worker that has committed its journal."""
