"""Does a worker's peak memory grow with the number of experts? GPTQ W4A16 and evaluation on mixtures that differ in nothing else.

    python benchmarks/expert_memory.py                      # five minutes on 2 cores
    python benchmarks/expert_memory.py --hidden 256 --experts 8 64

Qwen3-MoE of two layers, random weights, two experts a token, 32 rows of 128 tokens; what is read ahead is kept small, so that it is no
part of it. The peak is the process's resident set (VmHWM), all of Python and torch in it. A block's bytes say what all experts at once
would take. Exit code 1 where the largest peak is more than 1.1 of the smallest.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests")]

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import jobs  # noqa: E402
from kompressor_api.names import ENV_MEMORY_PLAN  # noqa: E402

PASSES = [{"gptq": {"scheme": "W4A16", "groupSize": 64}}]
ROWS, LENGTH, VOCABULARY = 32, 128, 512
BOUND = 1.1


def mixture(folder: Path, experts: int, hidden: int, ffn: int) -> int:
    """Writes the model; bytes of a block."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
        vocab_size=VOCABULARY, num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=ffn, decoder_sparse_step=1,
        tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(p.nbytes for p in model.model.layers[0].parameters())


def peak(work: Path) -> tuple[int, float]:
    """Bytes and seconds of a worker on `work`/model."""
    chance = random.Random(1)
    body = jobs.manifest((work / "model").as_uri(), (work / "out").as_uri(), PASSES)
    for section in ("calibration", "evaluation"):
        path = work / f"{section}.jsonl"
        path.write_text("\n".join(json.dumps({"ids": [chance.randrange(3, VOCABULARY) for _ in range(LENGTH)]}) for _ in range(ROWS)))
        body["spec"][section] = {"dataset": {"uri": path.as_uri(), "tokens": "ids"}, "samples": ROWS, "sequenceLength": LENGTH}
    began, most = time.monotonic(), 0
    process = jobs.worker(jobs.write(work / "job.json", body), {ENV_MEMORY_PLAN: "2"})
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):
            most = max(most, int(found[1]) * 1024)
        time.sleep(0.02)
    words = process.communicate()[1]
    assert process.returncode == 0, words
    return most, time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=1024)
    options = parser.parse_args()
    lines: list[dict[str, Any]] = []
    for experts in options.experts:
        with tempfile.TemporaryDirectory(prefix="kompressor-experts-") as folder:
            block = mixture(Path(folder) / "model", experts, options.hidden, options.ffn)
            most, seconds = peak(Path(folder))
        lines.append({"experts": experts, "blockBytes": block, "peakBytes": most, "seconds": round(seconds, 1)})
        print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
    table = Table(title=f"hidden {options.hidden}, {options.ffn} neurons an expert")
    for column in ("experts", "a block, MB", "peak, MB", "s"):
        table.add_column(column, justify="right")
    for line in lines:
        table.add_row(*(f"{value:,.0f}" for value in (line["experts"], line["blockBytes"] / 1e6, line["peakBytes"] / 1e6, line["seconds"])))
    Console(width=100).print(table)
    peaks = [line["peakBytes"] for line in lines]
    print(f"largest peak / smallest: {max(peaks) / min(peaks):.3f} (wanted: {BOUND} at most)")
    return int(max(peaks) > BOUND * min(peaks))


if __name__ == "__main__":
    sys.exit(main())
