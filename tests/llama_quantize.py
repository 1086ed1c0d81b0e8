"""llama.cpp's own quantiser, as a process: `python tests/llama_quantize.py SOURCE.gguf OUT.gguf Q4_K_M [--importance FILE.npz] [--pure]`.

FILE.npz: fp32 [columns] by GGUF tensor name, what llama.cpp calls an importance matrix; a stack of experts has one row each, flattened.
Prints the seconds that it took.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

FILE_TYPES = {
    "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16,
    "Q5_K_M": 17, "Q6_K": 18, "BF16": 32, "MXFP4_MOE": 38,
}  # fmt: skip
"""llama.cpp's `llama_ftype`."""


def quantize(source: Path, out: Path, mix: str, importance: Path | None, pure: bool, threads: int) -> float:
    """Seconds. Raises RuntimeError."""
    import numpy
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, library = get_ffi(), get_lib()
    params = ffi.new("llama_model_quantize_params *", library.llama_model_quantize_default_params())
    params.ftype, params.nthread, params.pure = FILE_TYPES[mix], threads, pure
    alive = []
    if importance is not None:
        found = dict(numpy.load(importance))
        entries = ffi.new("struct llama_model_imatrix_data[]", len(found) + 1)
        for entry, (name, values) in zip(entries, found.items(), strict=False):
            flat = numpy.ascontiguousarray(values, dtype=numpy.float32).reshape(-1)
            alive += [flat, ffi.new("char[]", name.encode()), ffi.from_buffer("float[]", flat)]
            entry.name, entry.data, entry.size = alive[-2], alive[-1], flat.size
        params.imatrix = ffi.cast("struct llama_model_imatrix_data *", entries)
        alive.append(entries)
    began = time.monotonic()
    if library.llama_model_quantize(str(source).encode(), str(out).encode(), params):
        raise RuntimeError(f"llama.cpp could not make {mix} of {source}")
    return time.monotonic() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("mix", choices=FILE_TYPES)
    parser.add_argument("--importance", type=Path)
    parser.add_argument("--pure", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    print(quantize(options.source, options.out, options.mix, options.importance, options.pure, options.threads))
