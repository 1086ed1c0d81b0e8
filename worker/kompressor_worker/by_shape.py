"""A decoder of no known family, laid out by tensor shape: enough for passes that need no data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from kompressor_api.names import Reason
from kompressor_worker.architectures import FAMILIES, text_config
from kompressor_worker.errors import UserError
from kompressor_worker.layout import Kind, SourceTensor, StageLayout, UnitLayout
from kompressor_worker.stages import linear_layout, other_units, plain_stages

__all__ = ["arrange_by_shape"]

BLOCK = re.compile(r"((?:[^.]+\.)*?)(\d+)\.")
"""The first number in a name counts the blocks."""
SENSES = re.compile(r"vision|visual|image|audio|speech")
EMBEDDING = re.compile(r"embed|\bwte\b|\bwpe\b")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)$")
NOT_LINEAR = re.compile(r"embed|norm|router|conv|lora|rotary|(^|\.)(gate|wg|ln_\w+|shared_expert_gate|head)$")
"""Matrices inside a block that are looked up, normalise, route or convolve: left exact."""
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Families that keep weights as [in, out] in a module that is no linear: scales would lie along the wrong side."""


def arrange_by_shape(config: Mapping[str, Any], tensors: Mapping[str, SourceTensor], warnings: list[str]) -> list[UnitLayout]:
    """Embeddings, numbered blocks with every linear in a stage of its own, the rest.

    Raises UserError where there are no blocks."""
    model_type = text_config(config).get("model_type")
    if model_type in TRANSPOSED:
        raise UserError(
            f"config.json: model_type {model_type!r} stores its weights transposed, which no loader reads quantised; "
            f"known families: {', '.join(FAMILIES)}",
            Reason.UNSUPPORTED_MODEL,
        )
    stack = _stack(model_type, tensors)
    blocks: dict[int, list[SourceTensor]] = {}
    embeddings: list[SourceTensor] = []
    top: list[SourceTensor] = []
    others: list[SourceTensor] = []
    for tensor in tensors.values():
        place = BLOCK.match(tensor.name)
        if place is not None and place[1] == stack:
            blocks.setdefault(int(place[2]), []).append(tensor)
        elif place is not None or SENSES.search(tensor.name):
            others.append(tensor)
        elif EMBEDDING.search(tensor.name) and not HEAD.search(tensor.name.removesuffix(".weight")):
            embeddings.append(tensor)
        else:
            top.append(tensor)
    layers = text_config(config).get("num_hidden_layers")
    note = "" if layers in (None, len(blocks)) else f" (config.json says num_hidden_layers {layers})"
    warnings.append(
        f"model_type {model_type!r} is not a known family: laid out by tensor shape, {len(blocks)} blocks at "
        f"{stack}*{note}; what loaders fuse is not known, so give all linears of a block the same scheme"
    )
    units = [_matrices("embeddings", embeddings)] if embeddings else []
    units += [_block(f"{stack}{number}", blocks[number]) for number in sorted(blocks)]
    units += [_matrices("head", top)] if top else []
    return [*units, *other_units(others)]


def _stack(model_type: Any, tensors: Mapping[str, SourceTensor]) -> str:
    """What stands before the block's number: the numbered stack with the most bytes that is no eye or ear."""
    held = Counter[str]()
    for tensor in tensors.values():
        place = BLOCK.match(tensor.name)
        if place is not None and not SENSES.search(place[1]):
            held[place[1]] += tensor.nbytes
    if not held:
        raise UserError(
            f"config.json: model_type {model_type!r} is not a known family, and no tensor is in a numbered block; "
            f"known families: {', '.join(FAMILIES)}",
            Reason.UNSUPPORTED_MODEL,
        )
    return held.most_common(1)[0][0]


def _block(name: str, tensors: list[SourceTensor]) -> UnitLayout:
    linears = [tensor for tensor in tensors if _is_linear(tensor)]
    names = {tensor.name.removesuffix("weight") for tensor in linears}
    biases = {tensor.name: tensor for tensor in tensors if tensor.name.removesuffix("bias") in names}
    taken = {tensor.name for tensor in linears} | biases.keys()
    stages = plain_stages(f"{name}.rest", (tensor for tensor in tensors if tensor.name not in taken))
    for weight in linears:
        module = weight.name.removesuffix(".weight")
        bias = biases.get(f"{module}.bias")
        stages.append(StageLayout(module, (weight, bias) if bias else (weight,), (linear_layout(weight),)))
    return UnitLayout(name, tuple(stages))


def _is_linear(tensor: SourceTensor) -> bool:
    return (
        tensor.name.endswith(".weight")
        and len(tensor.shape) == 2
        and tensor.dtype in ("F32", "F16", "BF16")
        and not NOT_LINEAR.search(tensor.name.removesuffix(".weight"))
    )


def _matrices(name: str, tensors: list[SourceTensor]) -> UnitLayout:
    """Embeddings and heads each in a stage, so that a pass can be asked to quantise them; everything else plain."""
    stages: list[StageLayout] = []
    plain: list[SourceTensor] = []
    for tensor in tensors:
        module = tensor.name.removesuffix(".weight")
        kind: Kind | None = "head" if HEAD.search(module) else "embedding" if name == "embeddings" else None
        if kind is not None and len(tensor.shape) == 2 and tensor.name.endswith(".weight"):
            stages.append(StageLayout(module, (tensor,), (linear_layout(tensor, kind),)))
        else:
            plain.append(tensor)
    return UnitLayout(name, (*plain_stages(f"{name}.rest", plain), *stages))
