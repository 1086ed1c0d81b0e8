"""What a machine can do at most, measured beside what runs on it: bytes copied a second, operations of matrix products a second."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Machine:
    """A CPU with some threads, or a GPU."""

    device: torch.device

    @property
    def name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
        return f"{model}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"

    def seconds(self, work: Callable[[], Any]) -> float:
        """From the call to when its results are there."""
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def yardstick(self, limit: str, size: int) -> tuple[Callable[[], Any], float]:
        """Something that runs at the limit, and how much of it there is. "copy": between two places that are in use already, bytes read and
        written, of `size` bytes read; else a dtype: a square matrix product of about `size` operations."""
        if limit == "copy":
            source, target = (torch.zeros(max(size, 1), dtype=torch.uint8, device=self.device) for _ in range(2))
            return lambda: target.copy_(source), 2.0 * source.nbytes
        side = max(64, round((size / 2) ** (1 / 3) / 64) * 64)
        a = torch.randn(side, side, device=self.device).to(getattr(torch, limit))
        return lambda: torch.mm(a, a), 2.0 * side**3

    def rate(self, limit: str, size: int, rounds: int = 3) -> float:
        """Bytes or operations a second; the best of some rounds after one that does not count."""
        work, amount = self.yardstick(limit, size)
        return amount / min([self.seconds(work) for _ in range(1 + rounds)][1:])


def operations(config: dict[str, Any], tokens: int, length: int) -> dict[str, float]:
    """What GPTQ has to compute of one block, in floating point operations, by part: of a dense Llama or Qwen, or a mixture like Qwen3's.

    One forward, the triangle of x^T x and its factorisation (Cholesky and a triangular inverse) once for all linears that share an input,
    a column loop for each. An expert sees the tokens that are routed to it, all alike often.
    """
    hidden, experts = config["hidden_size"], config.get("num_experts", 1)
    ffn = config["moe_intermediate_size"] if experts > 1 else config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    seen = tokens * config["num_experts_per_tok"] / experts if experts > 1 else tokens
    attention = [(hidden, queries + 2 * kv, tokens, 1), (queries, hidden, tokens, 1)]
    sites = [*attention, (hidden, 2 * ffn, seen, experts), (ffn, hidden, seen, experts)]  # columns, rows, tokens, how many there are
    return {
        "linears": 2.0 * sum(n * count * columns * rows for columns, rows, n, count in sites),
        "attention": 2.0 * tokens * length * queries,  # two products, causal
        "gram": 1.0 * sum(n * count * columns**2 for columns, _, n, count in sites),
        "factors": 1.0 * sum(count * columns**3 for columns, _, _, count in sites),
        "loops": 1.0 * sum(count * rows * columns**2 for columns, rows, _, count in sites),
    }
