"""GGUF: what tensors are called, and which form each has in the file.

Names are the `gguf` library's own map from those in the files that hubs hold.
"""

from __future__ import annotations

import re

from kompressor_worker.formats.gguf_architectures import INSIDE, Decoder, unsupported
from kompressor_worker.formats.gguf_form import FLOATS, Form, formed

__all__ = ["FLOATS", "Form", "Names", "formed"]

EXPERT = re.compile(r".*\.(?P<layer>\d+)\.(?:mlp|block_sparse_moe)\.experts\.(?P<number>\d+)\.(?P<matrix>\w+)\.weight")
STACKS = {
    "gate_proj": "FFN_GATE_EXP", "up_proj": "FFN_UP_EXP", "down_proj": "FFN_DOWN_EXP",
    "w1": "FFN_GATE_EXP", "w3": "FFN_UP_EXP", "w2": "FFN_DOWN_EXP",
}  # fmt: skip
"""An expert's matrices, and the library's names of the stacks in which all experts of a layer lie."""
NOTHING = re.compile(r".*\.rotary_emb\.inv_freq|.*\.mlp\.shared_expert(_gate|\.\w+)\.weight")
"""Tensors of some old files that follow from config.json, and the zeros beside a Mixtral's experts, which windows bring (windows.py)."""


class Names:
    """Of one decoder's tensors."""

    def __init__(self, decoder: Decoder) -> None:
        import gguf

        self._decoder = decoder
        self._gguf = gguf
        self._map = gguf.get_tensor_name_map(gguf.MODEL_ARCH[decoder.architecture.names], decoder.layers)

    def form(self, name: str, shape: tuple[int, ...], dtype: str, router: bool = False) -> Form | None:
        """Of the tensor `name` as the model has it; `dtype`: F32, F16, BF16, or its type of blocks. None: the file does without. Raises
        UserError."""
        if NOTHING.fullmatch(name) or (name.endswith("lm_head.weight") and self._decoder.tied):
            return None
        if (found := EXPERT.fullmatch(name)) and found["matrix"] in STACKS:
            stack = self.constant(STACKS[found["matrix"]], int(found["layer"]))
            return Form(stack, dtype, expert=int(found["number"]))
        d, other = self._decoder, self._map.get_name(_prefixed(name), try_suffixes=(".weight", ".bias"))
        if other is None:
            raise unsupported(f"{name} has no name in llama.cpp's architecture {d.architecture.name}")
        module, _, what = other.rpartition(".")
        part = module.rpartition(".")[2]
        if what == "bias" and part not in d.architecture.biased:
            raise unsupported(f"{name}: llama.cpp's architecture {d.architecture.name} has no bias there")
        heads = {"attn_q": d.heads, "attn_k": d.kv_heads}.get(part, 0) if d.architecture.paired else 0
        if part.endswith("norm"):
            return Form(other, "F32", 0, d.family.norm_offset, d.query_factor if part == "attn_q_norm" else 1.0)
        return Form(other, "F32" if len(shape) < 2 or router else dtype, heads)

    def constant(self, tensor: str, layer: int | None = None) -> str:
        """In the file, of one of the library's MODEL_TENSOR."""
        name: str = self._gguf.TENSOR_NAMES[self._gguf.MODEL_TENSOR[tensor]]
        return f"{name.format(bid=layer)}.weight"


def _prefixed(name: str) -> str:
    """As in a file of the model with its head; files of the decoder alone leave that out, others have it inside of more."""
    name = INSIDE.sub("", name, count=1)
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
