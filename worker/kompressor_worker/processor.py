"""What Linux says of this machine's processor. No torch."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path

__all__ = ["features", "model_name", "multiplies_bf16"]


@cache
def _said() -> Mapping[str, str]:
    """/proc/cpuinfo of the first processor, which lists only what the kernel lets programs use; nothing on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def model_name() -> str:
    return _said().get("model name") or platform.processor() or platform.machine()


def features() -> frozenset[str]:
    """As x86 names them."""
    return frozenset(_said().get("flags", "").split())


def multiplies_bf16() -> bool:
    """Whether a core multiplies matrices of bf16 faster than those of fp32, by oneDNN in torch 2.13: with AMX 6 times as fast (Xeon), with
    AVX-512's instructions 2.3 times on an EPYC; but on a Xeon without AMX, which has one unit for them and two for fp32, at 0.5 to 0.85 of
    the rate, and on AVX2 alone at an eighth (`benchmarks/products.py`)."""
    return "amx_bf16" in features() or ("avx512_bf16" in features() and _said().get("vendor_id") == "AuthenticAMD")
