"""A Kubernetes cluster on loopback: real etcd, API server, controller manager and scheduler; nodes that run processes.

    with LocalCluster(nodes=1, images={"worker:dev": {"path": ["/venv/bin"]}}) as cluster:
        cluster.kubectl("apply", "-f", "job.yaml")

`provide()` is what tests and the demo call: it honours `CLUSTER=current`. `python tools/local_cluster.py up` starts one
that stays, for `status`, `env` and `down`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import binaries
from cluster_access import Cluster, ClusterError, CommandError, CurrentCluster, Images
from loopback_cluster import LocalCluster, Log
from processes import StartError

__all__ = ["Cluster", "ClusterError", "CommandError", "CurrentCluster", "LocalCluster", "StartError", "provide"]


def provide(*, nodes: int = 0, images: Images | None = None, root: Path | None = None, log: Log = print) -> Cluster:
    """The cluster of `CLUSTER=current`, else a local one; not started yet: use it in a `with`."""
    chosen = os.environ.get("CLUSTER", "")
    if chosen == "current":
        return CurrentCluster()
    if chosen not in ("", "local"):
        raise ClusterError(f"CLUSTER={chosen}: unknown; choose current or local")
    return LocalCluster(root, nodes=nodes, images=images, log=log)


def _up(arguments: argparse.Namespace) -> int:
    images = json.loads(arguments.images.read_text()) if arguments.images else {}
    began = time.monotonic()
    cluster = LocalCluster(nodes=arguments.nodes, images=images, keep=not arguments.foreground, log=_say).start()
    _say(f"up in {time.monotonic() - began:.1f} s: export KUBECONFIG={cluster.kubeconfig}")
    if arguments.foreground:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            while all(process.alive for process in cluster.processes.values()):
                time.sleep(0.5)
        except KeyboardInterrupt:
            return 0
        finally:
            dead = [f"{p.name} ended by itself:\n{p.tail()}" for p in cluster.processes.values() if not p.alive]
            cluster.stop()
        raise StartError("\n".join(dead))
    return 0


def _down(arguments: argparse.Namespace) -> int:
    cluster = LocalCluster.kept()
    if cluster is None:
        _say("no cluster is running")
        return 0
    cluster.stop()
    _say(f"down; the logs stay in {cluster.root / 'logs'}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    """Exit code 0 only if everything runs and the API server is ready."""
    cluster = LocalCluster.kept()
    if cluster is None:
        print("no cluster is running; `python tools/local_cluster.py up` starts one")
        return 1
    processes = cluster.everything
    for process in processes:
        print(f"{process.name:<24} {'running' if process.alive else 'ENDED':<8} pid {process.pid:<8} {process.log}")
    ready = cluster.ready()
    print(f"{cluster.server} is {'ready' if ready else 'NOT ready'}")
    return 0 if ready and all(process.alive for process in processes) else 1


def _env(arguments: argparse.Namespace) -> int:
    cluster = LocalCluster.kept()
    if cluster is None:
        raise ClusterError("no cluster is running; `python tools/local_cluster.py up` starts one")
    for name, value in cluster.environ.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="A Kubernetes cluster on loopback that stays until it is taken down.")
    commands = parser.add_subparsers(required=True, metavar="up|down|status|env")
    up = commands.add_parser("up", help="start it")
    up.add_argument("--nodes", type=int, default=1)
    up.add_argument("--images", type=Path, help="JSON table: image name -> what the nodes run for it")
    up.add_argument("--foreground", action="store_true", help="stay until Ctrl-C, then take it down")
    up.set_defaults(run=_up)
    for name, run, text in (
        ("down", _down, "end it"),
        ("status", _status, "what runs; exit code 0 if all of it does"),
        ("env", _env, 'for `eval "$(...)"`: KUBECONFIG and a PATH with its kubectl and helm'),
    ):
        commands.add_parser(name, help=text).set_defaults(run=run)
    arguments = parser.parse_args()
    try:
        code: int = arguments.run(arguments)
        return code
    except (ClusterError, StartError, binaries.BinaryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
