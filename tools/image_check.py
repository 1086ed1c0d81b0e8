"""Builds the images with buildah, over a Debian made by debootstrap, and starts them: no container engine, no registry.

    python tools/image_check.py                     all three; the worker's CUDA libraries take several GB and some minutes
    python tools/image_check.py --only operator     a minute; planner likewise

Starts what is built as a kubelet would: the image's own user, environment and entry, a read-only root, a writable /tmp.
Needs root; installs buildah and debootstrap with apt-get where they are missing. The base is kept in the cache folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import free_ports
from setup import ROOT, cache_directory, step

BASE = "localhost/base:1"
SUITE = "bookworm"
USER = 65532
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PIP_SETTINGS = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")
START_SECONDS = 30.0
KERNELS = """
import os, platform, time
from kompressor_worker.kernels import build, prebuilt
began = time.monotonic()
loaded = build.library()._name
took = time.monotonic() - began
brought = platform.machine() == "x86_64" and prebuilt.V3 <= prebuilt.cpu_features()
assert loaded.startswith(str(prebuilt.FOLDER)) == brought, loaded
assert build.build().exists()
print(f"{os.path.basename(loaded)} loaded in {took:.2f} s, others compiled")
"""
"""What the image brought along is what is loaded, wherever the CPU can run it."""

# A mount namespace of its own, so that nothing is left mounted however this ends; chroot's user is the image's.
ENTER = """
set -e
mount --bind "$1" "$1"
mount --bind "$2" "$1/tmp"
mount --rbind /dev "$1/dev"
mount -t proc proc "$1/proc"
shift 2
root=$1 user=$2
shift 2
mount -o remount,bind,ro "$root"
exec chroot --userspec="$user" "$root" "$@"
"""


class CheckError(Exception):
    """An image cannot be built here, or is not as it should be; the message says what to do."""


@dataclass(frozen=True)
class Image:
    """A built image, unpacked at `root`."""

    name: str
    root: Path
    user: str
    environ: dict[str, str]
    entry: list[str]

    def start(self, command: list[str], scratch: Path, extra: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """The command in the image, with `scratch` as its /tmp and nothing else writable."""
        environ = [f"{name}={value}" for name, value in (self.environ | (extra or {})).items()]
        enter = ["unshare", "--mount", "--propagation", "private", "sh", "-c", ENTER, "enter"]
        arguments = [str(self.root), str(scratch), str(self.root), self.user, "env", "-i", *environ, *command]
        return subprocess.Popen([*enter, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, *command: str, scratch: Path, extra: dict[str, str] | None = None) -> str:
        """What the command prints; raises CheckError if it fails."""
        process = self.start(list(command), scratch, extra)
        output, _ = process.communicate(timeout=300)
        if process.returncode != 0:
            raise CheckError(f"{self.name}: {' '.join(command)} ended with {process.returncode}:\n{output}")
        return output.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the images with buildah, start them, check what they are.")
    parser.add_argument("--only", choices=list(CHECKS), help="one of the three; the worker's takes several GB and minutes")
    parser.add_argument("--keep", action="store_true", help="leave the images in the cache folder's store (buildah --root ...)")
    options = parser.parse_args()
    try:
        install_tools()
        make_base()
        for target, check in CHECKS.items():
            if options.only not in (None, target):
                continue
            with step(f"building the {target}'s image"):
                build(target)
            with unpacked(target) as image, scratch_folder() as scratch, step(f"starting the {target}"):
                check(image, scratch)
            if not options.keep:
                buildah("rmi", "--force", _name(target))
    except (CheckError, subprocess.SubprocessError) as error:
        print(f"image_check: {error}", file=sys.stderr)
        return 1
    return 0


def install_tools() -> None:
    missing = [tool for tool in ("buildah", "debootstrap") if shutil.which(tool) is None]
    if os.geteuid() != 0:
        raise CheckError("images are built without a container engine here, which takes root; run it with sudo")
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise CheckError(f"{' and '.join(missing)} not found; install them with this system's package manager")
    with step(f"installing {' and '.join(missing)}"):
        quiet = {"stdout": subprocess.DEVNULL, "env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}}
        subprocess.run(["apt-get", "update", "-qq"], check=True, **quiet)  # type: ignore[call-overload]
        install = ["apt-get", "install", "-qq", "--yes", "--no-install-recommends", *missing]
        subprocess.run(install, check=True, **quiet)  # type: ignore[call-overload]


def make_base() -> None:
    """localhost/base:1: a minimal Debian with Python, made once."""
    archive = cache_directory() / f"base-{SUITE}.tar"
    if not archive.exists():
        with step(f"debootstrap {SUITE}"), tempfile.TemporaryDirectory(dir=archive.parent) as folder:
            packages = "--include=python3,python3-venv,ca-certificates"
            subprocess.run(["debootstrap", "--variant=minbase", packages, SUITE, folder, *_mirror()], check=True, stdout=subprocess.DEVNULL)
            shutil.rmtree(Path(folder, "var/cache/apt/archives"))
            partial = archive.with_suffix(".part")
            subprocess.run(["tar", "-C", folder, "--numeric-owner", "-cf", partial, "."], check=True)
            partial.replace(archive)
    if not buildah("images", "--quiet", "--filter", f"reference={BASE}", check=False):
        with step(f"importing {BASE}"):
            container = buildah("from", "scratch")
            buildah("add", "--quiet", container, str(archive), "/")
            buildah("config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
            buildah("commit", "--quiet", "--rm", container, BASE)


def build(target: str) -> None:
    """`buildah bud` of one target, with this machine's settings of pip and its certificates, none of which stays in the image."""
    arguments = [f"--build-arg={name}={os.environ[name]}" for name in PIP_SETTINGS if os.environ.get(name)]
    if configuration := _first(os.environ.get("PIP_CONFIG_FILE"), Path.home() / ".config/pip/pip.conf", "/etc/pip.conf"):
        arguments.append(f"--volume={configuration}:/etc/pip.conf:ro")
    bundles = [os.environ.get(name) for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")]
    if bundle := _first(*bundles, CERTIFICATES):
        arguments += [f"--volume={bundle}:{CERTIFICATES}:ro", f"--build-arg=PIP_CERT={CERTIFICATES}"]
    log = cache_directory() / f"image-{target}.log"
    bases = [f"--build-arg=BASE={BASE}", f"--build-arg=CUDA_BASE={BASE}"]
    command = [*_buildah(), "bud", "--target", target, "--tag", _name(target), "--format", "oci", *bases, *arguments, str(ROOT)]
    with log.open("w") as output:
        code = subprocess.run(command, env=_environ(), stdout=output, stderr=subprocess.STDOUT).returncode
    if code != 0:
        raise CheckError(f"building the {target}'s image failed ({log}):\n" + "\n".join(log.read_text().splitlines()[-20:]))


@contextmanager
def unpacked(target: str) -> Iterator[Image]:
    container = buildah("from", "--pull-never", _name(target))
    try:
        config: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", _name(target)))["OCIv1"]["config"]
        environ = dict(entry.split("=", 1) for entry in config.get("Env", []))
        root = Path(buildah("mount", container))
        yield Image(_name(target), root, config.get("User", ""), environ, config.get("Entrypoint") or [])
    finally:
        buildah("rm", container)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Becomes /tmp in the image: the only place that its user may write to."""
    with tempfile.TemporaryDirectory(prefix="kompressor-image-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder


def check_operator(image: Image, scratch: Path) -> None:
    """Serves its liveness probe while no API server is there, ends on SIGTERM, has neither torch nor the worker, is not root."""
    check_user(image, scratch)
    check_lacks(image, scratch, "torch", "kompressor_worker", "boto3", "pip")
    health, nobody = free_ports(2)
    cluster = {"clusters": [{"name": "c", "cluster": {"server": f"https://127.0.0.1:{nobody}"}}], "current-context": "c"}
    cluster |= {"contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}], "users": [{"name": "u", "user": {"token": "t"}}]}
    (scratch / "kubeconfig").write_text(json.dumps({"apiVersion": "v1", "kind": "Config", **cluster}))
    settings = {"KUBECONFIG": "/tmp/kubeconfig", "KOMPRESSOR_WORKER_IMAGE": "worker", "KOMPRESSOR_HEALTH_PORT": str(health)}
    process = image.start(image.entry, scratch, settings)
    try:
        seconds = _answers(f"http://127.0.0.1:{health}/healthz", process)
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=20)
    expect(process.returncode == 0, f"the operator ended with {process.returncode} on SIGTERM:\n{output}")
    print(f"    the operator answers its liveness probe after {seconds:.1f} s, as user {image.user}, {size(image)}", flush=True)


def check_planner(image: Image, scratch: Path) -> None:
    """Plans a job and cleans up after none, as a pod of the preflight does; has neither torch nor the operator, is not root."""
    check_user(image, scratch)
    check_lacks(image, scratch, "torch", "transformers", "kubernetes", "rich", "kompressor_operator", "pip")
    write_checkpoint(scratch / "source")
    source, output = {"uri": "file:///tmp/source"}, {"uri": "file:///tmp/out"}
    spec = {"model": {"source": source}, "output": output, "passes": [{"rtn": {"scheme": "W4A16", "groupSize": 32}}]}
    job = {"apiVersion": "kompressor.io/v1alpha1", "kind": "CompressionJob", "metadata": {"name": "j"}, "spec": spec}
    (scratch / "job.json").write_text(json.dumps(job))
    began = time.monotonic()
    plan = json.loads(image.run(*image.entry, "plan", "/tmp/job.json", "--json", scratch=scratch))
    seconds = time.monotonic() - began
    expect(plan["schemes"] == {"W4A16": 1} and plan["outputBytes"] < plan["sourceBytes"], f"{image.name} plans {plan}")
    image.run(*image.entry, "clean", "/tmp/out", scratch=scratch)
    print(f"    the planner answers after {seconds:.1f} s, as user {image.user}, {size(image)}", flush=True)


def write_checkpoint(folder: Path) -> None:
    """A linear of zeros, as safetensors."""
    folder.mkdir()
    shape, size = [256, 256], 256 * 256 * 2
    header = json.dumps({"model.layers.0.mlp.up_proj.weight": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    (folder / "config.json").write_text(json.dumps({"model_type": "check", "hidden_size": 256, "num_hidden_layers": 1, "vocab_size": 8}))


def check_lacks(image: Image, scratch: Path, *modules: str) -> None:
    for module in modules:
        found = image.run("python3", "-c", f"import importlib.util as u; print(u.find_spec({module!r}) is not None)", scratch=scratch)
        expect(found == "False", f"{image.name} has {module}, which it must not have")


def check_worker(image: Image, scratch: Path) -> None:
    """Prints its version, has torch, brings its kernels along and can compile them with its own compiler, is not root."""
    check_user(image, scratch)
    home = {"HOME": "/tmp", "XDG_CACHE_HOME": "/tmp/cache"}
    version = image.run(*image.entry, "--version", scratch=scratch)
    torch = image.run("python3", "-c", "import torch; print(torch.__version__, torch.version.cuda)", scratch=scratch, extra=home)
    kernels = image.run("python3", "-c", KERNELS, scratch=scratch, extra=home)
    print(f"    {version}, torch {torch}, kernels {kernels}, as user {image.user}, {size(image)}", flush=True)


def check_user(image: Image, scratch: Path) -> None:
    uid = image.run("id", "-u", scratch=scratch)
    expect(uid == str(USER) and image.user.split(":")[0] == uid, f"{image.name} runs as {uid} ({image.user}), not as {USER}")
    written = subprocess.run(["find", image.root, "-xdev", "-user", str(USER), "-type", "f"], capture_output=True, text=True, check=True)
    expect(not written.stdout, f"{image.name}: its user owns files that it could change: {written.stdout[:200]}")


def size(image: Image) -> str:
    used = subprocess.run(["du", "-sm", image.root], capture_output=True, text=True, check=True).stdout.split()[0]
    return f"{used} MB unpacked"


def expect(true: bool, otherwise: str) -> None:
    if not true:
        raise CheckError(otherwise)


def buildah(*arguments: str, check: bool = True) -> str:
    done = subprocess.run([*_buildah(), *arguments], env=_environ(), capture_output=True, text=True)
    if check and done.returncode != 0:
        raise CheckError(f"buildah {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _buildah() -> list[str]:
    """With a store of its own, so that no image of the user's is touched."""
    store = cache_directory() / "buildah"
    return ["buildah", "--root", str(store / "root"), "--runroot", str(store / "run")]


def _environ() -> dict[str, str]:
    """buildah takes overlay where it works, else vfs; chroot needs no rights beyond root's."""
    return os.environ | {"BUILDAH_ISOLATION": "chroot"}


def _name(target: str) -> str:
    return f"localhost/kompressor-{target}:check"


def _mirror() -> list[str]:
    """The mirror that this machine's apt uses, if that is Debian's; else debootstrap's own default."""
    if shutil.which("apt-get") is None:
        return []
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Origin: Debian"]
    found = subprocess.run(asked, capture_output=True, text=True).stdout.split()
    return found[:1]


def _first(*paths: str | Path | None) -> Path | None:
    return next((Path(path) for path in paths if path and Path(path).is_file()), None)


def _answers(url: str, process: subprocess.Popen[str]) -> float:
    """Seconds until the URL answers 200."""
    began = time.monotonic()
    while time.monotonic() - began < START_SECONDS and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return time.monotonic() - began
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    process.terminate()
    raise CheckError(f"{url} does not answer:\n{process.communicate(timeout=20)[0]}")


CHECKS = {"operator": check_operator, "planner": check_planner, "worker": check_worker}


if __name__ == "__main__":
    sys.exit(main())
