"""Inference engines that `spec.evaluation.runtime` can name: which Python has each, and the program that drives it.

An engine is one driver beside this file and one line in ENGINES. The driver is run by the engine's own Python, whose libraries may differ
from the worker's, and speaks lines of JSON (vllm_driver.py says which).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kompressor_api.names import WORKER_CONTAINER
from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker.errors import EngineMissing, UserError

HAS_IT = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
ARGUMENTS = "KOMPRESSOR_ENGINE_ARGUMENTS"
"""Variable of the environment: JSON, laid over what the engine is started with."""
LOOK_SECONDS = 60.0
"""For a Python to start and look for a package without importing it."""


@dataclass(frozen=True)
class Engine:
    name: str
    package: str
    """What its Python can import."""
    driver: str
    variable: str
    """Of the environment, that names its Python; without it the worker's own is looked at."""
    format: str
    """Of the results that it serves, as `output.format` has it."""
    beside: int
    """Bytes of memory that it takes beside weights and cache: libraries, graphs, activations. Assumed."""
    loading: float
    """Times the weights' bytes, while they are loaded. Assumed."""
    on_host: bool
    """Whether it may hold models in the host's memory though there is a GPU: which, nobody knows before it has loaded one."""

    @property
    def image(self) -> str:
        """Target of the Dockerfile that has it."""
        return f"worker-{self.name.replace('.', '-')}"


ENGINES: Mapping[str, Engine] = {
    "vllm": Engine("vllm", "vllm", "vllm_driver.py", "KOMPRESSOR_VLLM_PYTHON", "compressed-tensors", 2 << 30, 1.3, on_host=False),
    "llama.cpp": Engine(
        "llama.cpp", "llama_cpp_py_sync", "llama_cpp_driver.py", "KOMPRESSOR_LLAMA_CPP_PYTHON", "gguf", 512 << 20, 1.1, on_host=True
    ),
}


def engine_of(format: str) -> Engine:
    """The one that serves results of a format."""
    return next(engine for engine in ENGINES.values() if engine.format == format)


@dataclass(frozen=True)
class Installed:
    """An engine that is here."""

    engine: Engine
    python: Path
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def driver(self) -> Path:
        return Path(__file__).with_name(self.engine.driver)


def find_engine(spec: CompressionJobSpec, environ: Mapping[str, str]) -> Installed | None:
    """The engine that a job asks for; None where it asks for none. Nothing of it is imported. Raises EngineMissing,
    UserError."""
    if spec.evaluation is None or spec.evaluation.runtime is None:
        return None
    engine = ENGINES[spec.evaluation.runtime.engine]
    named, arguments = environ.get(engine.variable), engine_arguments(environ)
    remedy = (
        f"run it where {engine.name} is: the worker's image with it is `docker build --target {engine.image} .`, elsewhere "
        f"{engine.variable} names the Python that has it; or leave evaluation.runtime out"
    )
    if named is None:
        if find_spec(engine.package) is not None:
            return Installed(engine, Path(sys.executable), arguments)
        raise EngineMissing(
            f"evaluation.runtime: {engine.name} is not in {image_of(spec)}: {engine.variable} is not set, and {sys.executable} has no "
            f"{engine.package}; {remedy}"
        )
    if why := _lacks(named, engine.package):
        raise EngineMissing(f"evaluation.runtime: {engine.name} is not in {image_of(spec)}: {engine.variable}={named} {why}; {remedy}")
    return Installed(engine, Path(named), arguments)


def engine_arguments(environ: Mapping[str, str]) -> dict[str, Any]:
    """Raises UserError."""
    try:
        arguments = json.loads(environ.get(ARGUMENTS) or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise UserError(f'{ARGUMENTS}={environ[ARGUMENTS]}: is no JSON object; give one such as {{"max_num_batched_tokens": 2048}}')
    return arguments


def _lacks(python: str, package: str) -> str:
    """Why not; empty where it has the package."""
    try:
        done = subprocess.run([python, "-I", "-c", HAS_IT, package], capture_output=True, timeout=LOOK_SECONDS, check=False)
    except OSError as error:
        return f"cannot be run ({error.strerror})"
    except subprocess.TimeoutExpired:
        return f"does not start within {LOOK_SECONDS:.0f} s"
    return f"has no {package}" if done.returncode else ""


def image_of(spec: CompressionJobSpec) -> str:
    """Where the worker runs, for error messages."""
    template = (spec.worker.pod_template or {}).get("spec") or {}
    images = [one.get("image") for one in template.get("containers") or () if one.get("name") == WORKER_CONTAINER]
    image = next(filter(None, images), spec.worker.image)
    return f"image {image}" if image else "the worker's image"
