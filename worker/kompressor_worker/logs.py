"""A worker's log: for people at a terminal, and in a cluster one JSON object a line for whoever collects them."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

FIELDS = ("unit", "reason", "exitCode", "result")
"""What a record may say beside its message (`extra=`)."""
NOISY = ("boto3", "botocore", "urllib3", "s3transfer", "httpx", "httpx2", "kubernetes", "gguf")


class JsonFormatter(logging.Formatter):
    """time, level, message; FIELDS and exception where there are any."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        entry |= {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def configure(verbose: bool, in_cluster: bool) -> None:
    """All of it to standard error; of libraries what they warn of."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if in_cluster else logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
