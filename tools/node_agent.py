"""A node of a Kubernetes cluster on a machine with no container engine: its pods are processes of this machine.

    python tools/node_agent.py --kubeconfig F --name node-1 --address 127.0.1.1 --images images.json --root DIR

agent/__init__.py shows its parts, agent/images.py the table of images. Needs Linux with overlayfs, and root or user
namespaces. SIGTERM and SIGINT end the node's containers in order, then the agent. An agent that dies otherwise leaves
them running, and one started again on the same root takes them up, unless --kill-on-exit is given; --end ends what a
dead agent has left.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

from agent import memory
from agent.client import Client
from agent.context import Context, Stock, pod_addresses
from agent.contract import ProcessSpec
from agent.events import Events
from agent.home import stop_everything
from agent.images import ImageTable
from agent.kubelet_api import LogServer
from agent.lifecycle import Backoff
from agent.names import Names
from agent.node import Heartbeat, NodeSpec, machine_capacity
from agent.pods import Pods
from agent.processes import NodeFacts
from agent.quantity import parse
from agent.runs import Run

log = logging.getLogger("node-agent")
_GPU = "nvidia.com/gpu"
_LEAVING_GRACE_SECONDS = 5.0


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # a full pool of connections is no trouble
    os.umask(0o022)
    if options.end:
        stop_everything(options.root / "pods", _LEAVING_GRACE_SECONDS)
        return 0
    user_namespace = os.geteuid() != 0
    pods_folder = options.root / "pods"
    pods_folder.mkdir(parents=True, exist_ok=True)
    pods_folder.chmod(0o700)
    memory_way = memory.detect()
    trouble = _trial(pods_folder, user_namespace)
    if trouble:
        print(f"node agent {options.name}: this machine lets no pod have its own view of the file system: {trouble}\n"
              "Run it as root, or where unprivileged user namespaces and overlayfs are allowed.", file=sys.stderr)  # fmt: skip
        return 1
    log.info("memory limits by %s", memory_way[0])
    leash, held = os.pipe()
    os.set_inheritable(held, False)
    client = Client(options.kubeconfig)
    server = _log_server(options, client)
    capacity = machine_capacity() | options.capacity
    facts = NodeFacts(options.name, options.address, client.host, client.port, capacity, user_namespace, options.kill_on_exit)
    gpus = int(parse(capacity.get(_GPU, 0)))
    names = Names(client, options.names or options.root / "names", options.name)
    context = Context(
        client, facts, ImageTable(options.images), options.root, Backoff(options.backoff, options.backoff_most),
        Events(client, options.name), names, Stock(pod_addresses(options.name)),
        Stock([str(number) for number in range(gpus)]) if _GPU in capacity else None, memory_way, leash,
        threading.Event(),
    )  # fmt: skip
    spec = NodeSpec(options.name, options.address, capacity, options.labels, server.port if server else 0)
    heartbeat = Heartbeat(client, spec, options.renew_seconds)
    pods = Pods(context)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _leave(context))
    heartbeat.register()
    if server is not None:
        server.serve(pods)
    names.start()
    threading.Thread(target=heartbeat.run, name="heartbeat", daemon=True).start()
    pods.follow()
    return 0


def _leave(context: Context) -> None:
    context.leaving.set()
    stop_everything(context.root / "pods", _LEAVING_GRACE_SECONDS)
    stop_everything(context.root / "pods", 0.0)  # one that was just being started
    # At once, whatever the other threads are doing: all that matters is on disk.
    os._exit(0)


def _trial(folder: Path, user_namespace: bool) -> str:
    """Runs an empty container; why that failed, or nothing."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="trial-") as name:
        place = Path(name, "0")
        place.mkdir()
        spec = ProcessSpec(
            argv=["true"], env={"PATH": "/usr/bin:/bin"}, cwd="/", hostname="trial", hosts="", uid=0, gid=0, groups=[],
            lower="/", mounts=[], traversable=[], devices=[], read_only_root=False, no_new_privileges=False,
            capabilities=None, user_namespace=user_namespace, leashed=False,
        )  # fmt: skip
        run = Run.start(place, spec, -1)
        while run.running:
            threading.Event().wait(0.01)
            run.observe()
        return run.state.message or ("" if run.state.exit_code == 0 else f"exit code {run.state.exit_code}")


def _log_server(options: argparse.Namespace, client: Client) -> LogServer | None:
    folder = options.kubeconfig.parent
    certificate, key = options.serving_cert or folder / "serving.crt", options.serving_key or folder / "serving.key"
    authority = options.client_ca.read_text() if options.client_ca else (client.authority or b"").decode()
    if not (certificate.exists() and key.exists() and authority):
        log.warning("no %s: kubectl logs will not work for pods of this node; give --serving-cert", certificate)
        return None
    return LogServer(options.address, options.port, certificate, key, authority)


def _pairs(text: str) -> dict[str, str]:
    pairs = [item.partition("=") for item in text.split(",") if item]
    if not all(separator for _, separator, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}: give name=value, separated by commas")
    return {name: value for name, _, value in pairs}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kubeconfig", type=Path, required=True, help="credentials of system:node:NAME")
    add("--name", required=True, help="the node's name")
    add("--address", default="127.0.0.1", help="the node's address, on loopback, where it serves logs")
    add("--images", type=Path, required=True, help="JSON table of the images that it can run; read again at every start")
    add("--root", type=Path, required=True, help="folder for pods, their logs and volumes; kept between restarts")
    add("--names", type=Path, help="folder where this machine's nodes tell one another the host names of pods; under --root by default")
    add("--serving-cert", type=Path, help="certificate with which it serves logs; serving.crt beside the kubeconfig")
    add("--serving-key", type=Path, help="its key; serving.key beside the kubeconfig")
    add("--client-ca", type=Path, help="whose clients may ask for logs; the kubeconfig's authority")
    add("--port", type=int, default=0, help="where logs are served; a free one by default")
    add("--capacity", type=_pairs, default={}, help="such as cpu=8,memory=16Gi,nvidia.com/gpu=1; the machine's by default")
    add("--labels", type=_pairs, default={}, help="name=value,... for the node")
    add("--backoff", type=float, default=1.0, help="first wait in seconds after a crash or a failed pull (kubelet: 10)")
    add("--backoff-most", type=float, default=300.0, help="longest such wait")
    add("--renew-seconds", type=float, default=3.0, help="how often the node's lease is renewed")
    add("--kill-on-exit", action=argparse.BooleanOptionalAction, default=False, help="containers die with a killed agent too")
    add("--end", action="store_true", help="end the containers that an agent has left under --root, and nothing else")
    add("--log-level", default="INFO")
    options = parser.parse_args(arguments)
    options.root = options.root.resolve()
    return options


if __name__ == "__main__":
    sys.exit(main())
