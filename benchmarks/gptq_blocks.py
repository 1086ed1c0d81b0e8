"""GPTQ on blocks of Llama 3 8B's shape: seconds a block, peak memory, and which share of the time arithmetic alone would take.

    python benchmarks/gptq_blocks.py --device cuda                     # 128 rows of 2048 tokens, W4A16 in groups of 128
    python benchmarks/gptq_blocks.py --device cpu --hidden 512 --ffn 1024 --samples 4 --length 64

Whole jobs from file to file on random weights (hidden 4096, FFN 14336, 32 heads, 8 KV heads): one with a single block, to compile what is
compiled at first use, the same again, and one with several. What a block takes is the difference of these two by the number of blocks more,
so embeddings, head and publishing do not count, and reading and writing as far as they are not hidden. Arithmetic is at the rates of
matrix products measured in the same run: forward and x^T x in whichever of bf16 and fp32 is faster, factorisation and column loop in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools"), str(ROOT / "tests")]

import torch  # noqa: E402

import checkpoint  # noqa: E402
from data_free import memory  # noqa: E402
from jobs import manifest  # noqa: E402
from limits import Machine, operations  # noqa: E402
from setup import cache_directory  # noqa: E402

PRODUCTS = {"cpu": 2 * 2048**3, "cuda": 2 * 8192**3}
"""Operations of the matrix product that a rate is measured with."""


@dataclass(frozen=True)
class Shape:
    hidden: int = 4096
    ffn: int = 14336
    vocabulary: int = 32000
    samples: int = 128
    length: int = 2048
    blocks: int = 3
    """In the longer of the two jobs."""


def measure(shape: Shape, machine: Machine, folder: Path) -> dict[str, Any]:
    """Checkpoints, rows and results go to `folder`. Seconds, bytes, and shares of the time by part of the arithmetic."""
    rates = {name: machine.rate(name, PRODUCTS[machine.device.type]) for name in ("float32", "bfloat16")}
    sources = {n: checkpoint.make(folder / f"{n}-blocks", n, shape.hidden, shape.ffn, shape.vocabulary) for n in (1, shape.blocks)}
    ids = torch.randint(3, shape.vocabulary, (shape.samples, shape.length), generator=torch.Generator().manual_seed(0))
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"ids": row}) + "\n" for row in ids.tolist()))
    one_job(shape, machine, sources[1], rows, folder / "out")
    short, _ = one_job(shape, machine, sources[1], rows, folder / "out")
    long, peak = one_job(shape, machine, sources[shape.blocks], rows, folder / "out")
    seconds = (long - short) / (shape.blocks - 1)
    config = json.loads((sources[1] / "config.json").read_text())
    parts = {
        part: count / (rates["float32"] if part in ("factors", "loops") else max(rates.values()))
        for part, count in operations(config, shape.samples * shape.length, shape.length).items()
    }
    return {
        "device": machine.name, "rates": rates, "secondsABlock": seconds, "wholeJob": long, "peak": peak, "floor": sum(parts.values()),
        "shares": {part: floor / seconds for part, floor in parts.items()},
    }  # fmt: skip


def one_job(shape: Shape, machine: Machine, source: Path, rows: Path, out: Path) -> tuple[float, int]:
    """Seconds from the spec to the publish, and the most memory: of a GPU that its tensors took, else above this process before."""
    from kompressor_worker.flow import compute_device
    from kompressor_worker.job import load_job
    from kompressor_worker.progress import Progress
    from kompressor_worker.run import run

    found = compute_device().type
    assert found == machine.device.type, f"the worker would compute on {found}; set CUDA_VISIBLE_DEVICES= to have it compute on the CPU"
    job = manifest(source.as_uri(), out.as_uri(), [{"gptq": {"scheme": "W4A16", "groupSize": 128}}])
    dataset = {"uri": rows.as_uri(), "tokens": "ids"}
    job["spec"]["calibration"] = {"dataset": dataset, "samples": shape.samples, "sequenceLength": shape.length}
    file = rows.with_name("job.json")
    file.write_text(json.dumps(job))
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    idle = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    if found == "cuda":
        torch.cuda.reset_peak_memory_stats()
    summary = run(load_job(file, os.environ), os.environ, Progress(), threading.Event())
    return summary.seconds, torch.cuda.max_memory_allocated() if found == "cuda" else memory("VmHWM") - idle


def report(shape: Shape, machine: Machine) -> dict[str, Any]:
    base = cache_directory() / "benchmarks"
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base) as folder:
        found = measure(shape, machine, Path(folder))
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in found["rates"].items())
    print(f"\nGPTQ W4A16, {shape}, on {found['device']}; products: {rates}\n")
    parts = list(found["shares"])
    print(f"| s a block | arithmetic, s | of it | peak GB | {' | '.join(f'{part}, share' for part in parts)} |")
    print("|---" * (4 + len(parts)) + "|")
    shares = " | ".join(f"{found['shares'][part]:.3f}" for part in parts)
    seconds, floor = found["secondsABlock"], found["floor"]
    print(f"| {seconds:.2f} | {floor:.2f} | {seconds / floor:.2f} | {found['peak'] / 1e9:.2f} | {shares} |", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    for name, value in vars(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    shape = replace(Shape(), **{name: getattr(options, name) for name in vars(Shape())})
    found = report(shape, Machine(torch.device(options.device)))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
