"""What released loaders cannot read of what we write, or only in a certain way; said before a weight is read, and in the report."""

from __future__ import annotations

from collections.abc import Mapping

from kompressor_worker.architectures import text_config
from kompressor_worker.layout import ModelLayout
from kompressor_worker.schemes import Scheme

EXPERTS = {
    "W8A8": "refuses them (its converter finds no int-quantized expert weights)",
    "W4A16_ASYM": "refuses them (its converter drops zero points)",
    "W2A16_ASYM": "refuses them (its converter drops zero points)",
    "FP8_BLOCK": "refuses them (its converter knows per-channel scales only)",
    "NVFP4A16": "loads them without their global scales, silently wrong",
    "NVFP4": "loads them without their global scales, silently wrong",
}
"""Schemes of routed experts that transformers 5.23 does not read, and what it does instead; seen by tests/e2e/test_compress.py."""
OWN_MULTIPLICATION = ("falcon", "gpt_bigcode")
"""Families whose modules in transformers take `weight` itself, which is not there until a packed one has been expanded."""

VLLM_BITS = (4, 8)
"""vLLM's WNA16_SUPPORTED_BITS."""
EXPAND = "make a plain checkpoint of it with kompressor expand"
EXPANDING = "only when it expands it at once: from_pretrained(..., quantization_config=CompressedTensorsConfig(dequantize=True))"


def reader_warnings(layout: ModelLayout, schemes: Mapping[str, Scheme]) -> list[str]:
    """One line for each thing that a reader stumbles over. `schemes`: for linears by name."""
    found = sorted({scheme.name for name, scheme in schemes.items() if ".experts." in name and scheme.name in EXPERTS})
    narrow = sorted({s.name for s in schemes.values() if s.format == "pack-quantized" and s.bits not in VLLM_BITS})
    lines = [
        f"experts in {name}: transformers {EXPERTS[name]}; " + (EXPAND if name in narrow else "serve this result with vLLM")
        for name in found
    ]
    if narrow:
        lines.append(
            f"{', '.join(narrow)}: vLLM reads packed integers of 4 and 8 bits only; load this result with transformers, or {EXPAND}"
        )
    formats = {scheme.format for scheme in schemes.values()}
    exact = any(".experts." in linear.name and linear.name not in schemes for linear in layout.linears())
    if exact and (schemes or layout.kv_cache) and formats != {"float-quantized"}:
        lines.append(
            "experts left exact: transformers refuses them in a model that is quantised otherwise, unless in FP8 throughout; "
            "serve this result with vLLM"
        )
    lines += mixed_experts(schemes)
    model_type = text_config(layout.config).get("model_type")
    if model_type in OWN_MULTIPLICATION and any("pack-quantized" in name for name in formats):
        lines.append(f"transformers loads a packed {model_type} {EXPANDING}")
    elif points := sorted({s.name for s in schemes.values() if s.format == "pack-quantized" and not s.symmetric} - {*found}):
        lines.append(f"transformers loads {', '.join(points)} {EXPANDING}: it expects the zero points unpacked otherwise")
    if layout.dtype != "BF16" and any("fp4-pack-quantized" in name for name in formats):
        lines.append(
            f"transformers expands 4-bit floats to bfloat16, which do not multiply with the {layout.dtype} of this model: "
            "load it with dtype=torch.bfloat16"
        )
    return lines


def mixed_experts(schemes: Mapping[str, Scheme]) -> list[str]:
    """Of routed experts that are not all alike: vLLM has one scheme a layer; transformers 5.23, whose experts are one parameter a layer,
    takes that of the first group in config.json that names any for those of all layers."""
    layers: dict[str, set[Scheme]] = {}
    for name, scheme in schemes.items():
        if ".experts." in name:
            layers.setdefault(name.partition(".experts.")[0], set()).add(scheme)
    split = next((layer for layer, found in layers.items() if len(found) > 1), None)
    if split is not None:
        return [
            f"{split}: its experts differ in their schemes, which neither vLLM nor transformers 5 reads, but only a transformers before 5, "
            "whose experts are modules of their own; kompressor expand makes a plain checkpoint of it"
        ]
    if len(set().union(*layers.values())) > 1:
        return [
            "experts differ in their schemes by layer: transformers takes one of these for all layers, and refuses the others or reads "
            "them silently wrong; serve this result with vLLM, or set experts: model"
        ]
    return []


def storage_warnings(layout: ModelLayout, schemes: Mapping[str, Scheme]) -> list[str]:
    """Of a job that asks for pruned linears to be stored by a bitmask."""
    pruned = [x for x in layout.linears() if x.pruned is not None]
    stored = [x for x in pruned if x.bitmask is not None]
    if stored:
        return [
            f"{len(stored)} linears are stored by a bitmask, which vLLM and transformers do not load: make the dense checkpoint with "
            "kompressor expand URI OUT before serving"
        ]
    why = (
        "nothing is pruned"
        if not pruned
        else "what is pruned is quantised too, and stored so"
        if all(x.name in schemes for x in pruned)
        else "it would save nothing"
    )
    return [f"output.sparseStorage: bitmask changes nothing here: {why}"]
