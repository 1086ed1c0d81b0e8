"""GGUF's tensor types, ours beside llama.cpp's own quantiser: squared error and weights a second of a core, with importance and without.

    python benchmarks/gguf_kernels.py

Both on the same bell-shaped weights, some of which stick out, on as many threads, by turns; seconds are those of all cores together, best
of some rounds, so that what else runs on the machine counts little. llama.cpp's library is that of the dev extra; it takes fp32, ours bf16,
and rows are split among threads as `llama-quantize` does. Prints Markdown. The error is weighted with the importance where that is given.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "worker"), str(ROOT / "crds")]

import torch  # noqa: E402

from kompressor_worker import kernels  # noqa: E402
from kompressor_worker.formats.gguf_types import TYPES, row_bytes  # noqa: E402

NAMES = [name for name, kind in TYPES.items() if kind.planes]


class LlamaCpp:
    """ggml's `ggml_quantize_chunk`, which works on rows of fp32."""

    def __init__(self, threads: int) -> None:
        found = find_spec("llama_cpp_py_sync")
        assert found is not None and found.origin is not None, "llama-cpp-py-sync is not installed: pip install .[dev]"
        self._call = ctypes.CDLL(str(Path(found.origin).with_name("libggml-base.so.0"))).ggml_quantize_chunk
        self._call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
        self._pool = ThreadPoolExecutor(threads)
        self._threads = threads

    def quantize(self, weight: torch.Tensor, importance: torch.Tensor | None, name: str) -> torch.Tensor:
        rows, columns = weight.shape
        data, each = torch.empty((rows, row_bytes(name, columns)), dtype=torch.uint8), -(-rows // self._threads)

        def part(first: int) -> None:
            by = None if importance is None else importance.data_ptr()
            self._call(TYPES[name].number, weight.data_ptr(), data.data_ptr(), first * columns, min(each, rows - first), columns, by)

        list(self._pool.map(part, range(0, rows, each)))
        return data


def best(work: Callable[[], torch.Tensor], rounds: int) -> tuple[torch.Tensor, float]:
    seconds, made = [], work()
    for _ in range(rounds):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return made, min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    spread = torch.distributions.StudentT(4.0).sample((options.rows, options.columns))
    weight, importance = (spread * 0.02).bfloat16(), torch.randn(options.columns).exp()
    source, peer = weight.float(), LlamaCpp(options.threads)
    print("| type | importance | error, ours / llama.cpp | ours, M/s | llama.cpp, M/s | time, ours / llama.cpp |\n" + "|---" * 6 + "|")
    for name in NAMES:
        for given in (None, importance):
            ours, ours_seconds = best(lambda n=name, g=given: kernels.gguf_quantize(weight, n, g)[0], options.rounds)  # type: ignore[misc]
            theirs, seconds = best(lambda n=name, g=given: peer.quantize(source, g, n), options.rounds)  # type: ignore[misc]
            errors = []
            for data in (ours, theirs):
                off = kernels.gguf_dequantize(data, name, options.columns, torch.float32) - source
                errors.append(float((off.double().square() * (1.0 if given is None else given)).sum()))
            speed = [weight.numel() / 1e6 / taken for taken in (ours_seconds, seconds)]
            how = "none" if given is None else "by column"
            print(
                f"| {name} | {how} | {errors[0] / errors[1]:.3f} | {speed[0]:.0f} | {speed[1]:.0f} | {ours_seconds / seconds:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
