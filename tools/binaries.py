"""Finds or makes the binaries of the local cluster: control plane, kubectl, Helm and the S3 server.

In this order: `$KUBEBUILDER_ASSETS`, the cache, official releases, a build from the modules pinned in `go.mod`. Only the standard library
is used, so that `python tools/binaries.py` runs beside the set-up of the Python environment, not after it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import releases
from go_toolchain import GO_MOD, BinaryError, Log, cache_root, go_command, go_environment, one_at_a_time

__all__ = [
    "TOOLS",
    "BinaryError",
    "Found",
    "Log",
    "cache_root",
    "module_version",
    "paths",
    "provide",
]


@dataclass(frozen=True)
class Tool:
    """One binary: the Go package that builds it and the module that gives its version."""

    package: str
    module: str

    @property
    def binary(self) -> str:
        """What Go calls it: the last element of the path that is not a major version (`server` for etcd)."""
        return next(part for part in reversed(self.package.split("/")) if not re.fullmatch(r"v\d+", part))


_K8S = "k8s.io/kubernetes"
TOOLS: Mapping[str, Tool] = {
    "versitygw": Tool("github.com/versity/versitygw/cmd/versitygw", "github.com/versity/versitygw"),
    "etcd": Tool("go.etcd.io/etcd/server/v3", "go.etcd.io/etcd/server/v3"),
    "kubectl": Tool(f"{_K8S}/cmd/kubectl", _K8S),
    "helm": Tool("helm.sh/helm/v3/cmd/helm", "helm.sh/helm/v3"),
    "kube-scheduler": Tool(f"{_K8S}/cmd/kube-scheduler", _K8S),
    "kube-controller-manager": Tool(f"{_K8S}/cmd/kube-controller-manager", _K8S),
    "kube-apiserver": Tool(f"{_K8S}/cmd/kube-apiserver", _K8S),
}


@dataclass(frozen=True)
class Found:
    """A binary, where it came from and how long that took (seconds)."""

    path: Path
    source: str
    seconds: float


def module_version(module: str) -> str:
    """The version of `module` that go.mod pins, e.g. `v1.36.3`."""
    match = re.search(rf"^\s*{re.escape(module)} (v\S+)", GO_MOD.read_text(), re.MULTILINE)
    if match is None:
        raise BinaryError(f"{GO_MOD}: no version of {module}; run `go get -tool {module}` in {GO_MOD.parent}")
    return match.group(1)


def bin_folder() -> Path:
    """Where this go.mod's binaries are cached; another go.mod never finds them."""
    digest = hashlib.sha256(GO_MOD.read_bytes()).hexdigest()[:12]
    return cache_root() / "bin" / f"k8s-{module_version(_K8S)}-{digest}"


def paths(names: Iterable[str] = TOOLS, *, log: Log = print) -> dict[str, Path]:
    """`provide`, for those who only want to start them."""
    return {name: found.path for name, found in provide(names, log=log).items()}


def provide(names: Iterable[str] = TOOLS, *, log: Log = print) -> dict[str, Found]:
    """Finds or makes each of `names`; `log` gets one line for each thing that takes time.

    Raises BinaryError where neither worked, with the remedy.
    """
    wanted = list(names)
    if unknown := [name for name in wanted if name not in TOOLS]:
        raise BinaryError(f"{', '.join(unknown)}: not a binary of the local cluster; choose from {', '.join(TOOLS)}")
    found = _present(wanted)
    missing = [name for name in wanted if name not in found]
    if not missing:
        return found
    with one_at_a_time(bin_folder().with_suffix(".lock"), log):
        found |= _present(missing)  # another process may have made them while we waited
        for make in (_download, _build):
            missing = [name for name in wanted if name not in found]
            if missing:
                found |= make(missing, log)
    return {name: found[name] for name in wanted}


def _present(names: Iterable[str]) -> dict[str, Found]:
    """What `$KUBEBUILDER_ASSETS` and the cache already hold."""
    folders = [("cache", bin_folder())]
    if assets := os.environ.get("KUBEBUILDER_ASSETS"):
        folders.insert(0, ("KUBEBUILDER_ASSETS", Path(assets).absolute()))
    found: dict[str, Found] = {}
    for source, folder in folders:
        for name in names:
            if name not in found and os.access(folder / name, os.X_OK):
                found[name] = Found(folder / name, source, 0.0)
    return found


def _download(names: list[str], log: Log) -> dict[str, Found]:
    """Official releases, until the first refusal: a machine cut off from one host is cut off from the others."""
    found: dict[str, Found] = {}
    folder = bin_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        began = time.monotonic()
        try:
            releases.fetch(releases.release(name, module_version(TOOLS[name].module)), folder / name)
        except releases.ReleaseError as error:
            log(f"official releases not used: {error}")
            break
        found[name] = Found(folder / name, "release", time.monotonic() - began)
        log(f"{name} downloaded in {found[name].seconds:.1f} s")
    return found


def _build(names: list[str], log: Log) -> dict[str, Found]:
    """`go install` of the pinned packages into a temporary folder, then one rename each."""
    go = go_command(log)
    folder = bin_folder()
    folder.mkdir(parents=True, exist_ok=True)
    log(f"building {', '.join(names)} with {go} (all of it takes about 11 min on 2 idle cores, once)")
    build_log = folder.with_suffix(".log")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as temporary, build_log.open("wb") as output:
        outputs = {name: Path(temporary) / TOOLS[name].binary for name in names}
        process = subprocess.Popen(
            [
                go,
                "install",
                "-trimpath",
                "-buildvcs=false",
                f"-ldflags={_ldflags()}",
                *(TOOLS[n].package for n in names),
            ],
            cwd=GO_MOD.parent,
            env=go_environment(Path(temporary)),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            seconds = _watch_build(process, outputs, log)
        finally:
            process.kill()  # interrupted: no build goes on behind the user's back
            process.wait()
        if process.returncode != 0:
            tail = "\n".join(build_log.read_text(errors="replace").splitlines()[-15:])
            raise BinaryError(
                f"{', '.join(names)}: `go install` failed (full log in {build_log}); put the binaries into a "
                f"folder and set KUBEBUILDER_ASSETS to it, or use an existing cluster with CLUSTER=current\n{tail}"
            )
        for name, built in outputs.items():
            built.replace(folder / name)
    return {name: Found(folder / name, "built", seconds[name]) for name in names}


def _watch_build(process: subprocess.Popen[bytes], outputs: Mapping[str, Path], log: Log) -> dict[str, float]:
    """Waits for the build; says when each binary appears, or once a minute that it is still at it."""
    began = spoke = time.monotonic()
    seconds: dict[str, float] = {}
    ended = False
    while not ended:
        ended = process.poll() is not None
        now = time.monotonic()
        for name, built in outputs.items():
            if name not in seconds and built.exists():
                seconds[name], spoke = now - began, now
                log(f"{name} built after {now - began:.0f} s")
        if now - spoke > 60:
            spoke = now
            log(f"still building ({len(seconds)} of {len(outputs)} done after {now - began:.0f} s)")
        time.sleep(0 if ended else 0.2)
    return seconds


def _ldflags() -> str:
    """Versions that a release stamps; without them the API server calls itself v0.0.0-master and Helm refuses it."""
    kubernetes = module_version(_K8S)
    major, minor = kubernetes.lstrip("v").split(".")[:2]
    values = {
        "k8s.io/component-base/version.gitVersion": kubernetes,
        "k8s.io/component-base/version.gitMajor": major,
        "k8s.io/component-base/version.gitMinor": minor,
        "k8s.io/client-go/pkg/version.gitVersion": kubernetes,
        "k8s.io/client-go/pkg/version.gitMajor": major,
        "k8s.io/client-go/pkg/version.gitMinor": minor,
        "helm.sh/helm/v3/internal/version.version": module_version(TOOLS["helm"].module),
        "main.Version": module_version(TOOLS["versitygw"].module).lstrip("v"),
    }
    return " ".join(["-s -w", *(f"-X {name}={value}" for name, value in values.items())])


def main() -> int:
    parser = argparse.ArgumentParser(description="Find or make the binaries of the local cluster.")
    parser.add_argument("names", nargs="*", help=f"default: all ({', '.join(TOOLS)})")
    arguments = parser.parse_args()
    began = time.monotonic()
    try:
        found = provide(arguments.names or TOOLS, log=lambda line: print(line, flush=True))
    except BinaryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, one in found.items():
        print(f"{name:<24} {one.source:<18} {one.seconds:6.1f} s  {one.path}")
    print(f"{len(found)} binaries in {time.monotonic() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
