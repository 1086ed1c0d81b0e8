"""What linears, and all tensors of a result, weigh in its files, from headers alone. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from kompressor_worker.formats.stored import planned_tensors
from kompressor_worker.layout import DTYPE_BYTES, LinearLayout, ModelLayout
from kompressor_worker.passes.linear_params import fitted
from kompressor_worker.schemes import Scheme
from kompressor_worker.shards import plan_output


def stored_bytes(linear: LinearLayout, scheme: Scheme | None) -> int:
    """In this scheme, or what its rows get in place of it; None: as it is."""
    if scheme is None:
        return prod(linear.shape) * DTYPE_BYTES[linear.dtype]
    return sum(t.nbytes for t in planned_tensors(linear.name, linear.shape, linear.dtype, fitted(scheme, linear.shape[1])))


def tensor_bytes(layout: ModelLayout, schemes: Mapping[str, Scheme]) -> int:
    """Of the whole result, headers and gaps left out."""
    if layout.file_format != "gguf":
        return plan_output(layout, schemes).tensor_bytes
    from kompressor_worker.formats.gguf_file import plan_gguf
    from kompressor_worker.formats.gguf_metadata import metadata_of

    assert layout.tokenizer is not None, "read before the passes prepare"
    return plan_gguf(layout, schemes, metadata_of(layout, layout.tokenizer, "model"), "model.gguf").tensor_bytes
