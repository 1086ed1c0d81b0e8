"""Settings, refusals, probes, logs, and the names that others rely on."""

from __future__ import annotations

import asyncio
import http.client
import io
import itertools
import json
import logging
import os
import runpy
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp
import kopf
import pytest
from kcj_builders import NOW

import kompressor_operator
from kompressor_api import names
from kompressor_operator.cluster import ROUTES, ApiError, Cluster
from kompressor_operator.health import Health, Watchdog, serve_probes
from kompressor_operator.logs import JsonFormatter
from kompressor_operator.main import kopf_settings
from kompressor_operator.object_meta import stamp
from kompressor_operator.refusals import conflict, refusal
from kompressor_operator.settings import SettingError, Settings

ROOT = Path(__file__).resolve().parents[2]
IMAGE = {"KOMPRESSOR_WORKER_IMAGE": "worker:1"}


def test_settings_come_from_the_environment() -> None:
    found = Settings.from_env(
        IMAGE
        | {
            "KOMPRESSOR_NAMESPACES": "a, b,",
            "KOMPRESSOR_WORKER_ENV": '{"A": "b"}',
            "KOMPRESSOR_RELIST_SECONDS": "1.5",
            "KOMPRESSOR_CONCURRENCY": "3",
            "KOMPRESSOR_LOG_LEVEL": "debug",
            "KOMPRESSOR_HEALTH_PORT": "0",
            "KOMPRESSOR_WORKER_IMAGE_PULL_SECRETS": "",
        }
    )
    assert found.namespaces == ("a", "b") and found.worker_env == {"A": "b"}
    assert (found.relist_seconds, found.concurrency, found.log_level, found.health_port) == (1.5, 3, "DEBUG", 0)
    assert found.worker_image_pull_secrets == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"KOMPRESSOR_CONCURRENCY": "many"},
        {"KOMPRESSOR_CONCURRENCY": "0"},
        {"KOMPRESSOR_WATCH_SECONDS": "1.5"},
        {"KOMPRESSOR_RELIST_SECONDS": "-1"},
        {"KOMPRESSOR_WORKER_ENV": "A=b"},
        {"KOMPRESSOR_WORKER_ENV": "[]"},
        {"KOMPRESSOR_WORKER_ENV": '{"A": 1}'},
        {"KOMPRESSOR_WORKER_RESOURCES": '{"limit": {"cpu": 1}}'},
        {"KOMPRESSOR_WORKER_RESOURCES": '{"limits": {"memory": "24GB"}}'},
        {"KOMPRESSOR_WORKER_SCRATCH_SIZE": "20K"},
        {"KOMPRESSOR_WORKER_IMAGE_PULL_POLICY": "Sometimes"},
        {"KOMPRESSOR_LOG_LEVEL": "chatty"},
        {"KOMPRESSOR_WORKER_IMAGE": ""},
    ],
)
def test_an_unusable_setting_is_named_with_its_value(wrong: dict[str, str]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(SettingError, match=name) as error:
        Settings.from_env(IMAGE | wrong)
    assert value in str(error.value)


def test_without_an_image_it_says_so_and_exits() -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KOMPRESSOR_")}
    done = subprocess.run([sys.executable, "-m", "kompressor_operator"], env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "KOMPRESSOR_WORKER_IMAGE is not set" in done.stderr


@pytest.mark.parametrize(
    ("kind", "status", "message", "expected"),
    [
        ("Job", 422, "spec.template.spec.containers[0].resources: Invalid value", ("InvalidSpec", True)),
        ("Job", 400, 'strict decoding error: unknown field "spec.x"', ("InvalidSpec", True)),
        ("Job", 403, 'jobs.batch "x" is forbidden: exceeded quota: jobs', ("QuotaExceeded", False)),
        ("Job", 400, 'admission webhook "p" denied the request: no', ("Forbidden", False)),
        ("ConfigMap", 422, "[]: Too long: may not be more than 1048576 bytes", ("InvalidSpec", True)),
        ("Role", 422, 'admission webhook "p" denied the request: no', ("Forbidden", False)),
        ("Role", 403, "user cannot create roles", ("Forbidden", False)),
        ("Role", 403, "unable to create new content in namespace x because it is being terminated", None),
        ("Job", 500, "etcd", None),
        ("Job", 429, "too many", None),
        ("Job", 0, "no answer", None),
    ],
)
def test_what_a_refused_creation_means(kind: str, status: int, message: str, expected: tuple[str, bool] | None) -> None:
    found = refusal(kind, "x", status, message)
    assert (found and (found.reason, found.final)) == expected
    if found:
        assert message in found.message
        verdict = found.verdict(NOW)
        assert verdict.validated is not found.final
        assert verdict.facts == ({"completionTime": stamp(NOW)} if found.final else {})


def test_a_name_conflict_names_the_object_and_the_remedy() -> None:
    found = conflict("Job", "team", "llama-1")
    assert found.reason == "NameConflict" and not found.final
    assert "kubectl -n team delete job llama-1" in found.message


def test_a_watch_that_owes_something_for_too_long_is_dead() -> None:
    now = 0.0
    dog = Watchdog(stale_seconds=100, clock=lambda: now)
    owed = frozenset({("jobs", ("team", "a"), 5)})
    assert dog.overdue(owed, answered=0) is None
    now = 90
    assert dog.overdue(owed, answered=80) is None
    now = 101
    assert dog.overdue(owed, answered=80) == ("jobs", ("team", "a"), 5)
    assert dog.overdue(frozenset(), answered=80) is None


def test_an_api_server_that_is_away_is_not_the_watchs_fault() -> None:
    now = 0.0
    dog = Watchdog(stale_seconds=100, clock=lambda: now)
    owed = frozenset({("jobs", ("team", "a"), 5)})
    dog.overdue(owed, answered=0)
    now = 1000
    assert dog.overdue(owed, answered=10) is None
    now = 1050
    assert dog.overdue(owed, answered=1050) is None  # counted from its return
    now = 1160
    assert dog.overdue(owed, answered=1150)


async def test_probes() -> None:
    problem = ""
    health = Health(lambda: problem)
    runner, port = await serve_probes(health, "127.0.0.1", 0)

    async def get(path: str) -> tuple[int, str]:
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as answer:
            return answer.status, await answer.text()

    try:
        assert await get("/healthz") == (200, "ok")
        assert (await get("/readyz"))[0] == 503
        health.ready = True
        assert (await get("/readyz"))[0] == 200
        problem = "a reconcile worker is gone"
        assert await get("/healthz") == (500, problem)
    finally:
        await runner.cleanup()


def test_logs_are_one_json_object_a_line() -> None:
    try:
        raise ValueError("x\ny")
    except ValueError:
        record = logging.LogRecord("n", logging.WARNING, "", 1, "hello %s", ("you",), sys.exc_info())
    record.detail = "more"
    line = JsonFormatter().format(record)
    entry: dict[str, Any] = json.loads(line)
    assert "\n" not in line and entry["message"] == "hello you" and entry["level"] == "warning"
    assert entry["detail"] == "more" and "ValueError" in entry["exception"]


def test_the_operator_has_no_route_to_secrets_and_only_one_file_imports_the_client() -> None:
    assert "Secret" not in ROUTES
    folder = Path(kompressor_operator.__file__).parent
    importing = [p.name for p in folder.glob("*.py") if "\nfrom kubernetes" in p.read_text() or "\nimport kubernetes" in p.read_text()]
    assert importing == ["cluster.py"]


def test_kopf_watches_only_what_is_ours_writes_nothing_and_cannot_stay_dead() -> None:
    settings = Settings(worker_image="worker:1")
    wanted = kopf_settings(settings)
    selectors = wanted.watching.label_selectors
    assert selectors["batch", "v1", "jobs"] == selectors["", "v1", "pods"] == names.LABEL_JOB_UID, "filtered by the server"
    assert not wanted.posting.enabled and wanted.peering.standalone and wanted.scanning.disabled
    assert wanted.watching.server_timeout == settings.watch_seconds < (wanted.watching.client_timeout or 0)
    assert wanted.networking.request_timeout == settings.request_seconds
    assert wanted.queueing.worker_limit, "ten thousand jobs are not ten thousand tasks at once"
    pauses = list(itertools.islice(iter(wanted.networking.error_backoffs), 1000))  # type: ignore[arg-type]
    assert len(pauses) == 1000 and max(pauses) <= 5, "an API server that is away is waited for, and found soon after its return"


def test_kopf_remembers_nothing_about_objects() -> None:
    stored = kopf_settings(Settings(worker_image="worker:1")).persistence
    body: Any = {"metadata": {"annotations": {}}, "spec": {"passes": []}, "status": {}}
    assert stored.diffbase_storage.build(body=body) == {} and stored.diffbase_storage.fetch(body=body) is None
    assert stored.progress_storage.fetch(key=kopf.HandlerId("x"), body=body) is None
    assert stored.progress_storage.clear(essence=kopf.BodyEssence(body)) == body


def test_kopf_is_only_wired_in_main() -> None:
    folder = Path(kompressor_operator.__file__).parent
    assert [p.name for p in folder.glob("*.py") if "import kopf" in p.read_text()] == ["main.py"]
    assert not any(word in (folder / "main.py").read_text() for word in ("on.timer", "on.daemon", "on.create", "on.delete", "on.update"))


def test_a_connection_that_is_cut_does_not_end_the_drain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What urllib does not wrap: it is raised while an answer is awaited or read."""
    troubles = [ConnectionResetError("reset"), http.client.IncompleteRead(b""), urllib.error.URLError("refused")]

    def urlopen(*_: object, **__: object) -> io.BytesIO:
        if troubles:
            raise troubles.pop()
        return io.BytesIO(b'{"items": []}')

    for name in ("KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT", "NAMESPACE", "DEPLOYMENT"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(ssl, "create_default_context", lambda **_: None)
    monkeypatch.setattr(Path, "read_text", lambda _: "token")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    runpy.run_path(str(ROOT / "charts" / "kompressor" / "files" / "drain.py"))
    said = capsys.readouterr().out
    assert said.count("again: ") == 3 and "no CompressionJob is left" in said


@pytest.mark.parametrize(("exempt", "through"), [("", True), ("api.internal", False)])
async def test_a_proxy_of_the_environment_is_used_and_read_once(
    exempt: str, through: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[0])  # all of it: closing on unread bytes is a reset
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    config = {
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": "https://api.internal:6443"}}],
        "users": [{"name": "u", "user": {"token": "secret"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        for name, value in {
            "KUBECONFIG": str(tmp_path / "kubeconfig"),
            "https_proxy": f"http://127.0.0.1:{port}",
            "no_proxy": exempt,
        }.items():
            monkeypatch.setenv(name, value)
        async with await Cluster.connect(5, pool=1) as cluster:
            monkeypatch.delenv("https_proxy")
            for _ in range(2):
                with pytest.raises(ApiError):
                    await cluster.get("Pod", "a", "b")
    assert set(asked) == ({b"CONNECT api.internal:6443 HTTP/1.1"} if through else set())
    assert len(asked) >= 2 * through  # a client may try again
