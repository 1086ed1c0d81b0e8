"""Builds the images with buildah, over a Debian made by debootstrap, and starts them: no container engine, no registry.

    python tools/image_check.py                     operator, planner, worker, whose CUDA libraries take several GB and some minutes
    python tools/image_check.py --only operator     a minute; planner likewise
    python tools/image_check.py --only worker-llama-cpp    the worker's, and llama.cpp beside it, which measures a GGUF file there

Starts what is built as a kubelet would: the image's own user, environment and entry, a read-only root, a writable /tmp. How it is built and
unpacked is in images.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from images import CheckError, Image, build, install_tools, make_base, remove, scratch_folder, unpacked
from processes import free_ports
from setup import step

USER = 65532
START_SECONDS = 30.0
CACHES = {
    "HOME": "/tmp",
    "XDG_CACHE_HOME": "/tmp/cache",
    "HF_HOME": "/tmp/huggingface",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/inductor",
    "TRITON_CACHE_DIR": "/tmp/triton",
}
"""Where a worker writes beside its output: in a pod a volume is mounted there."""
KERNELS = """
import os, platform, time
from kompressor_worker import processor
from kompressor_worker.kernels import build, prebuilt
began = time.monotonic()
loaded = build.library()._name
took = time.monotonic() - began
brought = platform.machine() == "x86_64" and prebuilt.V3 <= processor.features()
assert loaded.startswith(str(prebuilt.FOLDER)) == brought, loaded
assert build.build().exists()
print(f"{os.path.basename(loaded)} loaded in {took:.2f} s, others compiled")
"""
"""What the image brought along is what is loaded, wherever the CPU can run it."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the images with buildah, start them, check what they are.")
    parser.add_argument("--only", choices=list(CHECKS), help="one of them; the worker's takes several GB and minutes")
    parser.add_argument("--keep", action="store_true", help="leave the images in the cache folder's store (buildah --root ...)")
    options = parser.parse_args()
    try:
        install_tools()
        for target, check in CHECKS.items():
            if options.only != target and (options.only or target in SUITES):
                continue
            base = make_base(*([SUITES[target]] if target in SUITES else []))
            with step(f"building the {target}'s image"):
                build(target, base)
            with unpacked(target) as image, scratch_folder() as scratch, step(f"starting the {target}"):
                check(image, scratch)
            if not options.keep:
                remove(target)
    except (CheckError, subprocess.SubprocessError) as error:
        print(f"image_check: {error}", file=sys.stderr)
        return 1
    return 0


def check_operator(image: Image, scratch: Path) -> None:
    """Serves its liveness probe while no API server is there, ends on SIGTERM, has neither torch nor the worker, is not root."""
    check_user(image, scratch)
    check_lacks(image, scratch, "torch", "gguf", "kompressor_worker", "boto3", "pip")
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
    version = image.run(*image.entry, "--version", scratch=scratch)
    torch = image.run("python3", "-c", "import torch; print(torch.__version__, torch.version.cuda)", scratch=scratch, extra=CACHES)
    kernels = image.run("python3", "-c", KERNELS, scratch=scratch, extra=CACHES)
    print(f"    {version}, torch {torch}, kernels {kernels}, as user {image.user}, {size(image)}", flush=True)


def check_llama_cpp(image: Image, scratch: Path) -> None:
    """A worker that compresses a model of the tests to GGUF and has llama.cpp measure it beside the original."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from corpus import Corpus
    from models import trained_model

    check_worker(image, scratch)
    shutil.copytree(trained_model("llama"), scratch / "source")
    for file in (scratch / "source").iterdir():  # of the one who trained it, and the image's user is another
        file.chmod(0o644)
    (scratch / "held-out.txt").write_text("\n\n".join(Corpus(0).text(1_000_003, characters=40_000).splitlines()))
    spec = {
        "model": {"source": {"uri": "file:///tmp/source"}},
        "output": {"uri": "file:///tmp/out", "format": "gguf"},
        "passes": [{"rtn": {"scheme": "Q4_K_M"}}],
        "evaluation": {
            "dataset": {"uri": "file:///tmp/held-out.txt"}, "samples": 8, "sequenceLength": 128, "packing": True,
            "runtime": {"engine": "llama.cpp", "prompt": 32, "generate": 16, "batch": [1]},
        },
    }  # fmt: skip
    job = {"apiVersion": "kompressor.io/v1alpha1", "kind": "CompressionJob", "metadata": {"name": "j"}, "spec": spec}
    (scratch / "job.json").write_text(json.dumps(job))
    image.run(*image.entry, "run", "/tmp/job.json", scratch=scratch, extra=CACHES)
    measured = json.loads((scratch / "out" / "kompressor.json").read_text())["runtime"]
    print(f"    llama.cpp there: {json.dumps(measured)[:300]}", flush=True)


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


CHECKS = {"operator": check_operator, "planner": check_planner, "worker": check_worker, "worker-llama-cpp": check_llama_cpp}
SUITES = {"worker-llama-cpp": "trixie"}
"""Its library wants a younger glibc than the base of the others has."""


if __name__ == "__main__":
    sys.exit(main())
