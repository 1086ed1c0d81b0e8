"""Makes the virtual environment `.venv` from locks/dev.lock, with uv; needs nothing but a Python 3.11 or newer.

`python3 tools/setup.py` is what `make venv` calls. It prints each step and its time, and does nothing when nothing changed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from older_glibc import older

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
UV_VERSION = "0.13.9"
NEEDS_NEW_GLIBC = "llama_cpp_py_sync"
"""A package whose wheels are built for a glibc that not every machine has."""

CERTIFICATES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
"""Where a system has those that it trusts, such as a company's own."""


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("KOMPRESSOR_CACHE") or Path(base) / "kompressor")


@contextmanager
def step(what: str) -> Iterator[None]:
    print(f"==> {what}", flush=True)
    began = time.monotonic()
    yield
    print(f"    {what}: {time.monotonic() - began:.1f} s", flush=True)


def find_uv() -> Path:
    """uv from the PATH, or from the cache, installed there by pip."""
    if found := shutil.which("uv"):
        return Path(found)
    home = cache_directory() / f"uv-{UV_VERSION}"
    uv = home / "bin" / "uv"
    if not uv.exists():
        with step("installing uv"):
            try:
                subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
            except subprocess.CalledProcessError:
                sys.exit(f"{sys.executable} cannot make virtual environments; install its venv module (Debian: python3-venv)")
            pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, f"uv=={UV_VERSION}"], check=True)
    return uv


def uv_environment() -> dict[str, str]:
    """uv trusts what the system does, as pip does, unless told otherwise: by itself it knows public authorities alone."""
    return ({"UV_SYSTEM_CERTS": "1"} if any(map(os.path.exists, CERTIFICATES)) else {}) | dict(os.environ)


def make_environment(venv: Path, lock: Path, project: bool) -> Path:
    """A virtual environment with exactly what the lock names; returns its python."""
    python = venv / "bin" / "python"
    inputs = lock.read_bytes() + ((ROOT / "pyproject.toml").read_bytes() if project else b"") + str(venv).encode()
    stamp, digest = venv / ".ready", hashlib.sha256(inputs).hexdigest()
    if stamp.exists() and stamp.read_text() == digest and python.exists():
        return python
    uv, run = find_uv(), partial(subprocess.run, check=True, env=uv_environment())
    with step(f"Python packages into {venv.name} ({lock.name})"):
        if not python.exists():
            run([uv, "venv", "--quiet", "--python", sys.executable, str(venv)])
        run([uv, "pip", "sync", "--quiet", "--python", str(python), str(lock)])
        if project:
            run([uv, "pip", "install", "--quiet", "--python", str(python), "--no-deps", "--editable", str(ROOT)])
            for package in venv.glob(f"lib/python*/site-packages/{NEEDS_NEW_GLIBC}"):
                older(package)
    stamp.write_text(digest)
    return python


def other_python(name: str) -> Path:
    """The python of an environment in the cache for a tool whose pins exclude ours: `vllm`, `peer` (llm-compressor) or `trl`."""
    lock = ROOT / "locks" / f"{name}.lock"
    home = cache_directory() / f"{name}-{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"
    return make_environment(home, lock, project=False)


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - this file is what an older Python is told by
        sys.exit(f"Python {sys.version.split()[0]} is too old; Kompressor needs 3.11 or newer (make PYTHON=python3.12 ...)")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--with-binaries", action="store_true", help="find or build the control plane too, beside the packages")
    parser.add_argument("--with-vllm", action="store_true", help="make vLLM's environment too, in the cache")
    options = parser.parse_args()
    builder = subprocess.Popen([sys.executable, ROOT / "tools" / "binaries.py"]) if options.with_binaries else None
    make_environment(VENV, ROOT / "locks" / "dev.lock", project=True)
    if options.with_vllm:
        other_python("vllm")
    if builder and builder.wait():
        sys.exit("the control plane could not be found or built, see above")


if __name__ == "__main__":
    main()
