"""Structured pruning: how much smaller and faster the result is, beside what its shapes predict.

    python benchmarks/structured.py                                              # hidden 1024, 6 blocks, 512 tokens, fp32
    python benchmarks/structured.py --hidden 256 --ffn 1024 --layers 2 --length 64 --rounds 2

A Llama-shaped checkpoint of random weights goes through real jobs, one pass alone and all together. Source and results are then run by
transformers on the CPU in turn, each once a round; a result's time is set against the source's of the same round, and the median is shown.
Predicted are parameters from what the job announces, and time as multiply-adds: of the linears and the head for each token, and of
attention's scores and values for each pair of a token and one before it.
"""

from __future__ import annotations

import argparse
import json
import statistics
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
from jobs import manifest  # noqa: E402
from limits import Machine  # noqa: E402
from setup import cache_directory  # noqa: E402


@dataclass(frozen=True)
class Shape:
    hidden: int = 1024
    ffn: int = 4096
    layers: int = 6
    vocabulary: int = 8192
    length: int = 512
    """Tokens of the row that is timed."""
    samples: int = 4
    """Rows of the calibration, a quarter as long."""
    rounds: int = 9


def recipes(shape: Shape) -> dict[str, list[dict[str, Any]]]:
    """Half of the heads; a quarter of the rest."""
    heads: dict[str, Any] = {"pruneHeads": {"ratio": 0.5}}
    width = {"pruneWidth": {"ratio": 0.25, "multiple": 64}}
    hidden = {"pruneHidden": {"ratio": 0.25, "multiple": 64}}
    layers = {"pruneLayers": {"layers": shape.layers - max(1, shape.layers // 4)}}
    found = {next(iter(one)): [one] for one in (heads, width, hidden, layers)}
    return {**found, "all four": [layers, heads, width, hidden]}


def compress(source: Path, rows: Path, out: Path, passes: list[dict[str, Any]], shape: Shape) -> None:
    from kompressor_worker.job import load_job
    from kompressor_worker.progress import Progress
    from kompressor_worker.run import run

    job = manifest(source.as_uri(), out.as_uri(), passes)
    dataset = {"uri": rows.as_uri(), "tokens": "ids"}
    job["spec"]["calibration"] = {"dataset": dataset, "samples": shape.samples, "sequenceLength": shape.length // 4}
    file = rows.with_name(f"{out.name}.json")
    file.write_text(json.dumps(job))
    run(load_job(file, {}), {}, Progress(), threading.Event())


def multiply_adds(model: Any, length: int) -> float:
    """Of one row: every linear at every token, and attention up to it."""
    linears = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    config = model.config
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * (length + 1)  # scores and values, half of each
    return float(length * (linears + attention))


def measure(shape: Shape, machine: Machine, folder: Path) -> dict[str, dict[str, float]]:
    """By recipe: parameters, predicted and measured time, each as a share of the source's."""
    from transformers import AutoModelForCausalLM

    source = checkpoint.make(folder / "source", shape.layers, shape.hidden, shape.ffn, shape.vocabulary)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, shape.vocabulary, (shape.samples, shape.length // 4), generator=generator)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"ids": row}) + "\n" for row in ids.tolist()))
    wanted = recipes(shape)
    for number, passes in enumerate(wanted.values()):
        compress(source, rows, folder / f"out{number}", passes, shape)
    folders = {"source": source, **{name: folder / f"out{number}" for number, name in enumerate(wanted)}}
    models = {name: AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval() for name, place in folders.items()}
    row = torch.randint(3, shape.vocabulary, (1, shape.length), generator=generator)

    def seconds(model: Any) -> float:
        return machine.seconds(lambda: model(input_ids=row, use_cache=False))

    with torch.inference_mode():
        taken = [{name: seconds(model) for name, model in models.items()} for _ in range(1 + shape.rounds)][1:]
    base = models["source"]
    return {
        name: {
            "parameters": model.num_parameters() / base.num_parameters(),
            "predicted": multiply_adds(model, shape.length) / multiply_adds(base, shape.length),
            "measured": statistics.median(once[name] / once["source"] for once in taken),
        }
        for name, model in models.items()
        if model is not base
    }


def report(shape: Shape) -> dict[str, dict[str, float]]:
    machine = Machine(torch.device("cpu"))
    base = cache_directory() / "benchmarks"
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base) as folder:
        found = measure(shape, machine, Path(folder))
    print(f"\n{shape}, on {machine.name}; shares of the source's\n")
    print("| recipe | parameters | multiply-adds, predicted | time, measured |\n|---|---|---|---|")
    for name, shares in found.items():
        print(f"| {name} | {shares['parameters']:.3f} | {shares['predicted']:.3f} | {shares['measured']:.3f} |", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in vars(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    found = report(replace(Shape(), **{name: getattr(options, name) for name in vars(Shape())}))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
