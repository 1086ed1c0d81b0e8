"""Images built with buildah, over a Debian made by debootstrap, and unpacked: no container engine, no registry.

Needs root; installs buildah and debootstrap with apt-get where they are missing. The base is kept in the cache folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setup import ROOT, cache_directory, step

__all__ = ["CheckError", "Image", "build", "install_tools", "make_base", "remove", "scratch_folder", "unpacked"]

SUITE = "bookworm"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PIP_SETTINGS = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")

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


def make_base(suite: str = SUITE) -> str:
    """Name of an image: a minimal Debian with Python, made once."""
    archive, base = cache_directory() / f"base-{suite}.tar", f"localhost/base-{suite}:1"
    if not archive.exists():
        with step(f"debootstrap {suite}"), tempfile.TemporaryDirectory(dir=archive.parent) as folder:
            packages = "--include=python3,python3-venv,ca-certificates"
            subprocess.run(["debootstrap", "--variant=minbase", packages, suite, folder, *_mirror()], check=True, stdout=subprocess.DEVNULL)
            shutil.rmtree(Path(folder, "var/cache/apt/archives"))
            partial = archive.with_suffix(".part")
            subprocess.run(["tar", "-C", folder, "--numeric-owner", "-cf", partial, "."], check=True)
            partial.replace(archive)
    if not buildah("images", "--quiet", "--filter", f"reference={base}", check=False):
        with step(f"importing {base}"):
            container = buildah("from", "scratch")
            buildah("add", "--quiet", container, str(archive), "/")
            buildah("config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
            buildah("commit", "--quiet", "--rm", container, base)
    return base


def build(target: str, base: str) -> None:
    """`buildah bud` of one target over `base`, with this machine's settings of pip and its certificates; none of these stays in it."""
    arguments = [f"--build-arg={name}={os.environ[name]}" for name in PIP_SETTINGS if os.environ.get(name)]
    if configuration := _first(os.environ.get("PIP_CONFIG_FILE"), Path.home() / ".config/pip/pip.conf", "/etc/pip.conf"):
        arguments.append(f"--volume={configuration}:/etc/pip.conf:ro")
    bundles = [os.environ.get(name) for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")]
    if bundle := _first(*bundles, CERTIFICATES):
        arguments += [f"--volume={bundle}:{CERTIFICATES}:ro", f"--build-arg=PIP_CERT={CERTIFICATES}"]
    log = cache_directory() / f"image-{target}.log"
    bases = [f"--build-arg=BASE={base}", f"--build-arg=CUDA_BASE={base}"]
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


def remove(target: str) -> None:
    buildah("rmi", "--force", _name(target))


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
