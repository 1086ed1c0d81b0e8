"""The steps of the demo, inside the virtual environment: once without a cluster, once with everything."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from cluster_access import Cluster
from local_cluster import LocalCluster
from processes import free_port
from s3 import S3Server
from setup import ROOT, VENV, step

sys.path.insert(0, str(ROOT / "tests"))

EXAMPLE = ROOT / "examples" / "quickstart.yaml"
NAMESPACE = "kompressor-system"
GENERATE = """
import sys, warnings
warnings.filterwarnings("ignore")
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.set_verbosity_error(); logging.disable_progress_bar()
for name in sys.argv[1:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    prompt = tokenizer("Every summer", return_tensors="pt")
    line = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)[0]
    print("   ", tokenizer.decode(line, skip_special_tokens=True).replace("\\n", " "))
"""


def trained_model() -> Path:
    with step("a small Llama, trained here once and kept in the cache"):
        from models import trained_model as train

        return train("llama")


def local() -> None:
    """The same manifest without a cluster, its locations replaced by folders: nothing but Python is there yet."""
    model = trained_model()
    with tempfile.TemporaryDirectory() as folder:
        job = load_example()
        job["spec"]["model"]["source"] = {"uri": model.as_uri()}
        job["spec"]["output"] = {"uri": Path(folder, "out").as_uri()}
        manifest = Path(folder, "job.json")
        manifest.write_text(json.dumps(job))
        with step("kompressor run examples/quickstart.yaml, from folder to folder"):
            run([str(VENV / "bin" / "kompressor"), "run", str(manifest)])
        with step("transformers loads it and writes a line"):
            generate(Path(folder, "out"))


def cluster(keep: bool) -> None:
    model = trained_model()
    root = Path(tempfile.mkdtemp(prefix="kompressor-demo-"))
    # One image name each, as in the chart; on this machine all are the virtual environment.
    version = subprocess.run([VENV / "bin" / "kompressor", "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    images = {
        f"kompressor/{part}:{version}": {"path": [str(VENV / "bin")], "keep": [str(ROOT)]} for part in ("operator", "planner", "worker")
    }
    with step("an S3 server"):
        server = S3Server(root / "s3", keep=keep).start()
    with step("etcd, API server, controller manager, scheduler, one node"):
        machine = LocalCluster(nodes=1, images=images, keep=keep, log=lambda line: print(f"    {line}", flush=True)).start()
    if server.process:
        machine.adopt(server.process)
    try:
        demonstrate(machine, server, model, root)
    finally:
        if keep:
            print(f'\nIt is still up:  eval "$({sys.executable} tools/local_cluster.py env)"; kubectl get kcj')
            print(f"End it with:     {sys.executable} tools/local_cluster.py down; rm -rf {root}")
        else:
            with step("taking everything down"):
                machine.stop()
                shutil.rmtree(root, ignore_errors=True)


def demonstrate(machine: Cluster, server: S3Server, model: Path, root: Path) -> None:
    with step("helm install kompressor charts/kompressor"):
        # Pods share this machine's ports here, and 8080 may be somebody's.
        flags = ["-n", NAMESPACE, "--create-namespace", "--wait", "--set", f"healthPort={free_port()}"]
        machine.helm("install", "kompressor", str(ROOT / "charts" / "kompressor"), *flags)
    with step("the model into the bucket s3://models"):
        client = server.client()
        client.create_bucket(Bucket="models")
        prefix = load_example()["spec"]["model"]["source"]["uri"].removeprefix("s3://models/")
        for file in sorted(model.iterdir()):
            client.upload_file(str(file), "models", f"{prefix}/{file.name}")
        keys = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
        machine.kubectl("create", "secret", "generic", "models-s3", *(f"--from-literal={k}={v}" for k, v in keys.items()))
    manifest = root / "quickstart.yaml"
    manifest.write_text(EXAMPLE.read_text().replace(example_endpoint(), server.endpoint))
    name = load_example()["metadata"]["name"]
    with step("kubectl apply -f examples/quickstart.yaml; kubectl get kcj -w"):
        environ = {**os.environ, **machine.environ}
        print(machine.kubectl("apply", "-f", str(manifest)).strip(), flush=True)
        watch = subprocess.Popen(["kubectl", "get", "kcj", name, "-w"], env=environ)
        try:
            machine.kubectl("wait", f"kcj/{name}", "--for=condition=Complete", "--timeout=120s")
        finally:
            watch.terminate()
            watch.wait()
    resource = json.loads(machine.kubectl("get", "kcj", name, "-o", "json"))
    result = resource["status"]["result"]
    with step("kompressor verify, then transformers loads the result: a line of the original, a line of the compressed one"):
        out = load_example()["spec"]["output"]["uri"]
        run([str(VENV / "bin" / "kompressor"), "verify", out, "--endpoint", server.endpoint], server.environ)
        generate(model, download(server, out, root / "result"))
    print(f"\n    before {result['sourceBytes']:>12,} bytes\n    after  {result['outputBytes']:>12,} bytes   {result['ratio']} smaller")
    print(f"    relative weight error {result['relativeError']}, {result['quantizedTensors']} linears quantised")


def download(server: S3Server, uri: str, folder: Path) -> Path:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    client = server.client()
    folder.mkdir()
    for entry in client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]:
        client.download_file(bucket, entry["Key"], str(folder / Path(entry["Key"]).name))
    return folder


def generate(*models: Path) -> None:
    """A line from each; the libraries' own progress bars are shown only when something went wrong."""
    done = subprocess.run([sys.executable, "-c", GENERATE, *map(str, models)], capture_output=True, text=True, check=False)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(done.stderr)


def load_example() -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    return job


def example_endpoint() -> str:
    endpoint: str = load_example()["spec"]["model"]["source"]["endpoint"]
    return endpoint


def run(command: list[str], environ: dict[str, str] | None = None) -> None:
    subprocess.run(command, env={**os.environ, **(environ or {})}, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=["local", "cluster"])
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    if options.which == "local":
        local()
    else:
        cluster(options.keep)


if __name__ == "__main__":
    main()
