"""One JSON object a line, for whoever collects logs."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

FIELDS = ("namespace", "job", "uid", "reason", "attempt")
"""What a line is about, each as a field of its own."""


class JsonFormatter(logging.Formatter):
    """time, level, logger, message; what it is about, detail and exception where there are any."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}
        if detail := getattr(record, "detail", None):
            entry["detail"] = str(detail)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def configure(level: str) -> None:
    """To stderr, everything; Kopf, which logs every event that it hands on, only where it warns, or with DEBUG."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("kopf").setLevel(logging.DEBUG if level == "DEBUG" else logging.WARNING)
