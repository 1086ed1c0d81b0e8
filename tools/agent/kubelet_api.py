"""The part of the kubelet's HTTPS API that `kubectl logs` needs.

    GET /containerLogs/<namespace>/<pod>/<container>   follow, previous, tailLines, timestamps, limitBytes, since...
    GET /pods   GET /healthz                           anything else is answered 501

Callers show a certificate of the client CA: the API server's own.
"""

import json
import logging
import select
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from agent.logs import LogQuery, read
from agent.pods import Pods
from agent.runs import Run

log = logging.getLogger(__name__)


class Refused(Exception):
    """An HTTP status and what to say."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class LogServer(ThreadingHTTPServer):
    """Serves on an address of the node; `port` 0 takes a free one."""

    daemon_threads = True

    def __init__(self, address: str, port: int, certificate: Path, key: Path, client_authority: str) -> None:
        super().__init__((address, port), _Handler)
        self.pods: Pods | None = None
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(certificate, key)
        self._tls.load_verify_locations(cadata=client_authority)
        self._tls.verify_mode = ssl.CERT_REQUIRED

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def serve(self, pods: Pods) -> None:
        """In the background."""
        self.pods = pods
        threading.Thread(target=self.serve_forever, name="kubelet-api", daemon=True).start()

    def finish_request(self, request: Any, client_address: Any) -> None:
        # In the connection's own thread: a caller that stalls in the handshake holds up nobody else.
        request.settimeout(10)
        try:
            secured = self._tls.wrap_socket(request, server_side=True)
        except OSError as error:
            log.info("connection from %s refused: %s", client_address, error)
            return
        secured.settimeout(None)
        with secured:
            super().finish_request(secured, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LogServer

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        try:
            match [part for part in parts.path.split("/") if part]:
                case ["healthz"]:
                    self._whole(200, "text/plain", b"ok")
                case ["pods"]:
                    items = self.server.pods.described() if self.server.pods else []
                    body = {"kind": "PodList", "apiVersion": "v1", "items": items}
                    self._whole(200, "application/json", json.dumps(body).encode())
                case ["containerLogs", namespace, pod, container]:
                    self._logs(namespace, pod, container, dict(parse_qsl(parts.query)))
                case _:
                    raise Refused(501, f"{parts.path} is not served by the node agent, which serves logs only")
        except Refused as refused:
            self._whole(refused.code, "text/plain", str(refused).encode())
        except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
            self.close_connection = True

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    def _whole(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _logs(self, namespace: str, pod: str, container: str, query: dict[str, str]) -> None:
        run = self._run(namespace, pod, container, query.get("previous") in ("true", "1"))
        try:
            wanted = LogQuery.parse(query, time.time())
        except ValueError as error:
            raise Refused(400, f"logs of container {container}: {error}") from error
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for text in read(run.folder / "log", wanted, lambda: run.running):
            if text:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
            elif select.select([self.connection], [], [], 0)[0]:
                self.close_connection = True  # nobody speaks here but to hang up
                return
        self.wfile.write(b"0\r\n\r\n")

    def _run(self, namespace: str, pod: str, container: str, previous: bool) -> Run:
        worker = self.server.pods.find(namespace, pod) if self.server.pods else None
        if worker is None:
            raise Refused(404, f'pod "{pod}" not found in namespace "{namespace}" on this node')
        found = next((item for item in worker.containers if item.name == container), None)
        if found is None:
            raise Refused(404, f'container "{container}" not found in pod "{pod}"')
        if previous and found.previous is None:
            raise Refused(400, f'previous terminated container "{container}" in pod "{pod}" not found')
        run = found.previous if previous else found.run
        if run is None:
            reason = found.waiting[0] if found.waiting else "ContainerCreating"
            raise Refused(400, f'container "{container}" in pod "{pod}" is waiting to start: {reason}')
        return run
