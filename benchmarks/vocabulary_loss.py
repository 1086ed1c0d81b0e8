"""The loss over the vocabulary beside plain torch: forward and backward, seconds and peak memory, each in a process of its own, in turn.

    python benchmarks/vocabulary_loss.py                                    # 2048 tokens, vocabulary 32,768, hidden 1024
    python benchmarks/vocabulary_loss.py --dtype bfloat16 --rounds 5

Plain torch is the textbook's formula under autograd: two products, two log_softmax, kl_div with its reductions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import kl_div  # noqa: E402

from data_free import measure, memory  # noqa: E402
from kompressor_worker.kernels.divergence import Divergence, TopK, distillation_loss, top_k_loss  # noqa: E402


@dataclass(frozen=True)
class Shape:
    tokens: int = 2048
    vocabulary: int = 32_768
    hidden: int = 1024
    dtype: str = "float32"
    rounds: int = 3


def given(shape: Shape) -> list[Tensor]:
    """Hidden states and head of student and teacher."""
    dtype, generator = getattr(torch, shape.dtype), torch.Generator().manual_seed(0)
    sizes = (shape.tokens, shape.vocabulary) * 2
    made = [(torch.randn(n, shape.hidden, generator=generator) * (1.0 if n == shape.tokens else 0.05)).to(dtype) for n in sizes]
    return [x.requires_grad_(place < 2) for place, x in enumerate(made)]


def ours(hidden: Tensor, head: Tensor, *teacher: Tensor) -> Tensor:
    return distillation_loss(hidden, head, *teacher, torch.full((len(hidden),), -100), Divergence()).total


def plain(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    log_p = (teacher_hidden @ teacher_head.T).float().log_softmax(-1)
    return kl_div((hidden @ head.T).float().log_softmax(-1), log_p, log_target=True, reduction="sum")


def child(name: str, shape: Shape) -> None:
    tensors = given(shape)
    works: dict[str, Callable[..., Tensor]] = {"ours": ours, "plain": plain}
    if name == "bins":
        top = TopK.of(*tensors[2:], 64)
        targets = torch.full((shape.tokens,), -100)
        works["bins"] = lambda hidden, head, *_: top_k_loss(hidden, head, top, targets, Divergence()).total
    small = [x[:16].detach().requires_grad_(x.requires_grad) for x in tensors]
    (ours if name != "plain" else plain)(*small).backward()  # kernels compiled, libraries loaded
    idle = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    seconds = []
    for _ in range(3):
        began = time.process_time()
        loss = works[name](*tensors)
        loss.backward()
        seconds.append((time.process_time() - began) / torch.get_num_threads())
        for x in tensors:
            x.grad = None
    print(json.dumps({"seconds": min(seconds), "peak": memory("VmHWM") - idle, "loss": loss.item()}))


def compared(shape: Shape) -> dict[str, Any]:
    """By name: seconds, peak and loss; and ours over plain torch, by the medians."""
    names = ("ours", "plain", "bins")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(shape.rounds):
        for name in names:
            runs[name].append(measure([sys.executable, __file__, "--child", name, json.dumps(asdict(shape))]))
    found = {name: {key: statistics.median(run[key] for run in runs[name]) for key in ("seconds", "peak", "loss")} for name in names}
    for name in ("ours", "bins"):
        found[name] |= {f"{key}OfPlain": found[name][key] / found["plain"][key] for key in ("seconds", "peak")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Shape(**json.loads(options.child[1])))
        return
    shape = replace(Shape(), **{name: getattr(options, name) for name in asdict(Shape())})
    print(f"{shape}, seconds by the CPU's clock over {torch.get_num_threads()} threads")
    for name, figures in compared(shape).items():
        print(name, {key: float(f"{value:.4g}") for key, value in figures.items()})


if __name__ == "__main__":
    main()
