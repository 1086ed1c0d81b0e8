"""Readiness, liveness and startup probes: one thread each, for the life of one run."""

import enum
import http.client
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from agent.client import Object
from agent.runs import TOOLS


class Outcome(enum.Enum):
    """PASSED and FAILED cross a threshold; FAILING is a failure that does not, yet."""

    PASSED = "passed"
    FAILING = "failing"
    FAILED = "failed"


# kind, outcome, what was seen
Report = Callable[[str, Outcome, str], None]
KINDS = {"startupProbe": "Startup", "readinessProbe": "Readiness", "livenessProbe": "Liveness"}


class Prober:
    """Calls `report` whenever a threshold is crossed, and for every failure. `gate` opens when startup is over."""

    def __init__(self, kind: str, container: Object, pod_ip: str, run: Path, gate: Callable[[], bool], report: Report) -> None:
        self._kind = kind
        self._probe = container[kind]
        self._target = (container, pod_ip, run)
        self._gate = gate
        self._report = report
        self._stopped = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name=self._kind, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        probe = self._probe
        period = probe.get("periodSeconds", 10)
        wanted, tolerated = probe.get("successThreshold", 1), probe.get("failureThreshold", 3)
        held, successes, failures = False, 0, 0
        self._stopped.wait(probe.get("initialDelaySeconds", 0))
        while not self._stopped.is_set():
            if self._kind != "startupProbe" and not self._gate():
                self._stopped.wait(0.1)
                continue
            works, seen = check(probe, *self._target)
            successes, failures = (successes + 1, 0) if works else (0, failures + 1)
            if self._stopped.is_set():
                return
            if works and not held and successes >= wanted:
                held = True
                self._report(self._kind, Outcome.PASSED, seen)
                if self._kind == "startupProbe":
                    return
            elif not works:
                over = failures >= tolerated
                held = held and not over
                self._report(self._kind, Outcome.FAILED if over else Outcome.FAILING, seen)
                if over and self._kind != "readinessProbe":
                    return  # the container is about to be killed
            self._stopped.wait(period)


def check(probe: Object, container: Object, pod_ip: str, run: Path) -> tuple[bool, str]:
    """One look: (it works, what was seen)."""
    seconds = probe.get("timeoutSeconds", 1)
    try:
        if "httpGet" in probe:
            return _http(probe["httpGet"], container, pod_ip, seconds)
        if "tcpSocket" in probe:
            place = probe["tcpSocket"]
            with socket.create_connection((place.get("host") or pod_ip, port(place["port"], container)), seconds):
                return True, ""
        if "exec" in probe:
            return execute(run, probe["exec"]["command"], seconds)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return False, str(error)
    return False, "gRPC probes are not served by the node agent; use httpGet, tcpSocket or exec"


def execute(run: Path, command: list[str], seconds: float) -> tuple[bool, str]:
    """A command in the container of `run`: (exit code was 0, its output)."""
    argv = [sys.executable, "-S", "-s", "-m", "agent.enter", str(run), *command]
    try:
        done = subprocess.run(argv, cwd=TOOLS, capture_output=True, timeout=seconds, env={}, check=False)
    except subprocess.TimeoutExpired:
        return False, f"command timed out: {command!r} timed out after {seconds}s"
    return done.returncode == 0, (done.stdout + done.stderr).decode(errors="replace")[-10240:]


def port(wanted: int | str, container: Object) -> int:
    """A number, or the container port of that name."""
    if isinstance(wanted, int) or wanted.isdigit():
        return int(wanted)
    for item in container.get("ports") or []:
        if item.get("name") == wanted:
            return int(item["containerPort"])
    raise ValueError(f'couldn\'t find port: "{wanted}" in container {container["name"]}')


def _http(get: Object, container: Object, pod_ip: str, seconds: float) -> tuple[bool, str]:
    host, number = get.get("host") or pod_ip, port(get["port"], container)
    secure = get.get("scheme", "HTTP").upper() == "HTTPS"
    connection = (
        http.client.HTTPSConnection(host, number, timeout=seconds, context=ssl._create_unverified_context())
        if secure
        else http.client.HTTPConnection(host, number, timeout=seconds)
    )
    headers = {"User-Agent": "kube-probe/1.36", "Accept": "*/*"}
    headers |= {item["name"]: item["value"] for item in get.get("httpHeaders") or []}
    try:
        connection.request("GET", get.get("path") or "/", headers=headers)
        answer = connection.getresponse()
        answer.read(10240)
    except OSError as error:
        where = f"{'https' if secure else 'http'}://{host}:{number}{get.get('path') or '/'}"
        return False, f'Get "{where}": {error}'
    finally:
        connection.close()
    if 200 <= answer.status < 400:
        return True, ""
    return False, f"HTTP probe failed with statuscode: {answer.status}"
