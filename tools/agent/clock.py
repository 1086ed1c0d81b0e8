"""Kubernetes timestamps to and from seconds since the epoch."""

from datetime import UTC, datetime


def timestamp(seconds: float) -> str:
    """RFC 3339 in whole seconds, as metav1.Time: 2026-01-02T03:04:05Z."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def micro_timestamp(seconds: float) -> str:
    """RFC 3339 in microseconds, as metav1.MicroTime."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def epoch(text: str) -> float:
    """Seconds since the epoch; nanoseconds are cut to microseconds."""
    return datetime.fromisoformat(text).timestamp()
