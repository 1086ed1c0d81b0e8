"""What metadata of any object says: whose it is, what it is for, when it was. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from kompressor_api import names
from kompressor_api.names import Step


def controller_uid(meta: Mapping[str, Any]) -> str:
    """The uid of the controlling owner, or nothing."""
    return next((str(o["uid"]) for o in meta.get("ownerReferences") or () if o.get("controller")), "")


def step_of(labels: Mapping[str, str]) -> Step:
    """What a child is for; those of older releases, without the label, compress."""
    told = labels.get(names.LABEL_STEP, "")
    return next((step for step in Step if step == told), Step.COMPRESS)


def owner_uid(meta: Mapping[str, Any]) -> str:
    """uid of the CompressionJob that a child belongs to: its controller; a clean-up Job outlives its owner and only names it in a label."""
    labels = meta.get("labels") or {}
    if step_of(labels) is Step.CLEANUP:
        return str(labels.get(names.LABEL_JOB_UID, ""))
    return controller_uid(meta)


def moment(text: str | None) -> datetime:
    """An RFC 3339 time stamp; the epoch where there is none."""
    return datetime.fromisoformat(text) if text else datetime.fromtimestamp(0, UTC)


def stamp(when: datetime) -> str:
    """RFC 3339 in UTC, to the second, as Kubernetes writes it."""
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def number(text: str | None, default: int) -> int:
    """A small number that we have once written into a label or annotation; a stranger may have changed it."""
    return int(text) if text and text.isascii() and text.isdigit() else default
