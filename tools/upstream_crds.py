"""Brings CRDs of other projects, for the tests to apply: files of their Go modules, pinned and checksummed by upstream_crds/go.mod."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from go_toolchain import BinaryError, Log, cache_root, go_command, go_environment, one_at_a_time

__all__ = ["CRDS", "upstream_crd"]

MODULE = Path(__file__).with_name("upstream_crds")
PROMETHEUS = "github.com/prometheus-operator/prometheus-operator"
FLUX = "github.com/fluxcd/kustomize-controller"
CRDS: Mapping[str, tuple[str, str]] = {
    "servicemonitors": (PROMETHEUS, "example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml"),
    "prometheusrules": (PROMETHEUS, "example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml"),
    "kustomizations": (FLUX, "config/crd/bases/kustomize.toolkit.fluxcd.io_kustomizations.yaml"),
}
"""Plural of the resource -> module, and the file in it."""


def upstream_crd(plural: str, log: Log = print) -> Path:
    """The CustomResourceDefinition's YAML, in the cache. Raises BinaryError where its module cannot be had."""
    module, file = CRDS[plural]
    digest = hashlib.sha256(b"\0".join(part.read_bytes() for part in sorted(MODULE.iterdir()))).hexdigest()[:12]
    cached = cache_root() / "crds" / digest / Path(file).name
    if not cached.exists():
        with one_at_a_time(cached.parent.with_suffix(".lock"), log):
            if not cached.exists():
                log(f"taking the CRD of {plural} from {module} (once)")
                _copy(_downloaded(module, go_command(log)) / file, cached)
    return cached


def _downloaded(module: str, go: str) -> Path:
    """The folder of the pinned version, verified against go.sum by Go itself."""
    command = [go, "mod", "download", "-json", module]
    done = subprocess.run(command, cwd=MODULE, env=go_environment(MODULE), capture_output=True, text=True)
    told = json.loads(done.stdout) if done.stdout.strip() else {}
    if done.returncode != 0 or not told.get("Dir"):
        said = told.get("Error") or done.stderr.strip()
        raise BinaryError(f"{module}: `go mod download` failed; the modules that {MODULE}/go.mod names must be in reach of GOPROXY\n{said}")
    return Path(told["Dir"])


def _copy(source: Path, target: Path) -> None:
    """Into a file beside it, then one rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".copy-", delete=False) as fresh, source.open("rb") as content:
        shutil.copyfileobj(content, fresh)
    Path(fresh.name).replace(target)


if __name__ == "__main__":
    try:
        print(*map(upstream_crd, CRDS), sep="\n")
    except BinaryError as error:
        sys.exit(f"error: {error}")
