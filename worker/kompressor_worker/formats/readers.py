"""What released loaders cannot read of what we write; said before a weight is read, and in the report."""

from __future__ import annotations

from collections.abc import Mapping

from kompressor_worker.schemes import Scheme

EXPERTS = {
    "W8A8": "refuses them (its converter finds no int-quantized expert weights)",
    "W4A16_ASYM": "refuses them (its converter drops zero points)",
    "FP8_BLOCK": "refuses them (its converter knows per-channel scales only)",
    "NVFP4A16": "loads them without their global scales, silently wrong",
}
"""Schemes of routed experts that transformers 5.23 does not read, and what it does instead; seen by tests/e2e/test_compress.py."""


def reader_warnings(schemes: Mapping[str, Scheme]) -> list[str]:
    """One line a scheme, for linears by name."""
    found = sorted({scheme.name for name, scheme in schemes.items() if ".experts." in name and scheme.name in EXPERTS})
    return [f"experts in {name}: transformers {EXPERTS[name]}; serve this result with vLLM" for name in found]
