"""What models are served on, as data: memory, bandwidth, compute capability and arithmetic of GPUs, and which schemes an engine runs there.

Memory is what `nvidia-smi` shows (MiB; with ECC where it is on by default), the rest what NVIDIA's data sheets and architecture
white papers state: bandwidth in GB/s, dense tensor rates with FP32 accumulation in TFLOP/s, half of what is advertised with sparsity.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ENGINES", "GPUS", "Engine", "Hardware", "Runs", "gpu_named"]


@dataclass(frozen=True)
class Hardware:
    name: str
    memory: int
    """Bytes."""
    bandwidth: float
    """Bytes a second."""
    capability: tuple[int, int]
    """CUDA compute capability, major and minor."""
    fp16: float | None = None
    """Dense FLOP/s of FP16 and BF16 tensor cores; None: not known, so that nothing is said to be limited by it."""
    fp8: float | None = None
    """The same of FP8; None: it has none."""
    engine: str = "vllm"
    """Key of ENGINES."""


@dataclass(frozen=True)
class Runs:
    """From which compute capability an engine runs something, and below which; None: no end."""

    since: tuple[int, int]
    below: tuple[int, int] | None = None

    def on(self, capability: tuple[int, int]) -> bool:
        return self.since <= capability and (self.below is None or capability < self.below)

    def says(self, what: str, hardware: Hardware) -> str:
        """Why not there, for people."""
        below = "" if self.below is None else f" and below {_dotted(self.below)}"
        return f"{what} needs compute capability {_dotted(self.since)}{below}, {hardware.name} has {_dotted(hardware.capability)}"


@dataclass(frozen=True)
class Engine:
    schemes: Mapping[str, Runs]
    """By scheme; one that is not here is not run at all."""
    kv_fp8: Runs
    """A KV cache in FP8."""
    overhead: int
    """Bytes beside weights, KV cache and activations: context of the driver, libraries, workspaces, captured graphs. Assumed."""
    batch_tokens: int
    """Tokens of a step of chunked prefill, on hardware of ordinary size."""


ENGINES: Mapping[str, Engine] = {
    # get_min_capability of vLLM's compressed-tensors schemes; FP8 below 8.9 runs as weights alone, which W8A16 does as well; INT8 with INT8
    # inputs has no kernel on Blackwell (docs.vllm.ai, INT8 W8A8); FP4 with FP4 inputs has its arithmetic from Blackwell on
    "vllm": Engine(
        schemes={
            "W8A8": Runs((7, 5), below=(10, 0)),
            "W8A16": Runs((7, 5)),
            "W4A16": Runs((7, 5)),
            "FP8_DYNAMIC": Runs((8, 9)),
            "NVFP4": Runs((10, 0)),
            "MXFP4": Runs((8, 0)),
        },
        kv_fp8=Runs((8, 9)),
        overhead=1536 << 20,
        batch_tokens=2048,
    ),
}

_MI, _G, _T = 1 << 20, 1e9, 1e12


def _gpu(name: str, memory_mib: int, gb_s: float, capability: tuple[int, int], fp16: float, fp8: float | None = None) -> Hardware:
    return Hardware(name, memory_mib * _MI, gb_s * _G, capability, fp16 * _T, None if fp8 is None else fp8 * _T)


GPUS: Mapping[str, Hardware] = {
    gpu.name: gpu
    for gpu in (
        # GeForce and professional cards: GA102, AD102 and GB202 architecture white papers, appendix tables
        _gpu("RTX-3060-12GB", 12288, 360, (8, 6), 25.4),
        _gpu("RTX-3080-10GB", 10240, 760, (8, 6), 59.5),
        _gpu("RTX-3090", 24576, 936, (8, 6), 71),
        _gpu("RTX-4060-Ti-16GB", 16380, 288, (8, 9), 44.1, 88.2),
        _gpu("RTX-4080", 16376, 717, (8, 9), 97.5, 194.9),
        _gpu("RTX-4090", 24564, 1008, (8, 9), 165.2, 330.3),
        _gpu("RTX-5080", 16303, 960, (12, 0), 112.6, 225.1),
        _gpu("RTX-5090", 32607, 1792, (12, 0), 209.5, 419),
        _gpu("RTX-A6000", 49140, 768, (8, 6), 154.8),
        _gpu("RTX-6000-Ada", 49140, 960, (8, 9), 364.2, 728.5),
        _gpu("RTX-PRO-6000", 97887, 1792, (12, 0), 503.8, 1007.6),
        # data centre: the product pages' data sheets
        _gpu("T4", 15360, 320, (7, 5), 65),
        _gpu("A10", 23028, 600, (8, 6), 125),
        _gpu("A10G", 23028, 600, (8, 6), 70),
        _gpu("A30", 24576, 933, (8, 0), 165),
        _gpu("A40", 46068, 696, (8, 6), 149.7),
        _gpu("L4", 23034, 300, (8, 9), 121, 242),
        _gpu("L40", 46068, 864, (8, 9), 181, 362),
        _gpu("L40S", 46068, 864, (8, 9), 362, 733),
        _gpu("A100-40GB", 40960, 1555, (8, 0), 312),
        _gpu("A100-80GB", 81920, 2039, (8, 0), 312),
        _gpu("H100-PCIE", 81559, 2039, (9, 0), 756, 1513),
        _gpu("H100", 81559, 3350, (9, 0), 989, 1979),
        _gpu("H200", 143771, 4800, (9, 0), 989, 1979),
        _gpu("B200", 183359, 8000, (10, 0), 2250, 4500),
    )
}
"""By the name that a spec gives. Another one is described by `hardware`."""


def gpu_named(name: str) -> Hardware:
    """As people write them: `nvidia rtx 4090` is RTX-4090. Raises ValueError with the nearest names."""
    plain = {_plain(known): known for known in GPUS}
    if found := plain.get(_plain(name)):
        return GPUS[found]
    near = difflib.get_close_matches(_plain(name), plain, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(plain[key] for key in near)}?" if near else f"known are {', '.join(GPUS)}"
    raise ValueError(f"gpu {name!r} is not known; {hint} Any other is described by hardware: {{memory, computeCapability, bandwidth}}")


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
