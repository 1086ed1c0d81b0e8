"""A start that takes long, while another operator or the user changes what it was decided on."""

from __future__ import annotations

from typing import Any

import pytest
from kcj_builders import PASSES, SETTINGS, job_body

from kompressor_operator.decide import Decision
from kompressor_operator.manifests import Attempt
from kompressor_operator.observed import Manifest
from kompressor_operator.reconcile import Reconciler
from kompressor_operator.store import Store
from kompressor_operator.work import RetryLater

KEY = ("team", "llama")


class Slow:
    """An API server, while whose answers to one kind of creation the watch tells something."""

    def __init__(self, store: Store, kind: str, told: Manifest | None) -> None:
        self.store, self.kind, self.told = store, kind, told
        self.made: list[str] = []

    async def create(self, manifest: Manifest, strict: bool = False, dry_run: bool = False) -> Manifest:
        self.made.append(manifest["kind"])
        if manifest["kind"] == self.kind and self.told is not None:
            self.store.tell_resource(self.told)
        meta = manifest["metadata"] | {"uid": "child", "resourceVersion": "9", "creationTimestamp": "2026-01-02T03:04:05Z"}
        return manifest | {"metadata": meta}


async def start(kind: str, told: Manifest | None) -> list[str]:
    store = Store()
    store.tell_resource(job_body(version=5))
    cluster: Any = Slow(store, kind, told)
    try:
        await Reconciler(cluster, store, SETTINGS, PASSES, policies=(lambda view: Decision(start=Attempt()),)).reconcile(KEY)
    except RetryLater:
        assert "Job" not in cluster.made
        raise
    made: list[str] = cluster.made
    return made


async def test_a_start_that_was_overtaken_is_decided_anew() -> None:
    """By then the other's Job may be gone again, a suspended one in a queue, and its name free."""
    assert "Job" in await start("Role", None)
    with pytest.raises(RetryLater, match="has changed"):
        await start("Role", job_body(version=6))
    with pytest.raises(RetryLater, match="has changed"):
        await start("ConfigMap", job_body("another", 7))


async def test_an_echo_of_what_it_was_decided_on_is_no_change() -> None:
    assert "Job" in await start("Role", job_body(version=5))
