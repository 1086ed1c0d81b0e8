"""What models are served on, as data: memory, bandwidth, compute capability and arithmetic of GPUs, which schemes an engine runs there, and
what else an engine takes; memory and bandwidth of edge devices.

A GPU's memory is what `nvidia-smi` shows (MiB; with ECC where it is on by default), the rest what NVIDIA's data sheets and architecture
white papers state: bandwidth in GB/s, dense tensor rates with FP32 accumulation in TFLOP/s, half of what is advertised with sparsity.
A device's bandwidth is what its makers state, or width times rate of its memory as they state these; what its system keeps is assumed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["DEVICES", "ENGINES", "GPUS", "Engine", "Hardware", "Runs", "device_named", "gpu_named"]


@dataclass(frozen=True)
class Hardware:
    name: str
    memory: int
    """Bytes."""
    bandwidth: float
    """Bytes a second."""
    capability: tuple[int, int] | None
    """CUDA compute capability, major and minor; None: no GPU of its own."""
    fp16: float | None = None
    """Dense FLOP/s of FP16 and BF16 tensor cores; None: not known, so that nothing is said to be limited by it."""
    fp8: float | None = None
    """The same of FP8; None: it has none."""
    engine: str = "vllm"
    """Key of ENGINES."""
    kept: int | None = None
    """Bytes that its system keeps for itself and others; None: the engine's share of a GPU."""

    @property
    def kind(self) -> str:
        return "device" if self.capability is None else "GPU"

    @property
    def reserve(self) -> int:
        """Bytes that stay free on purpose."""
        return round(ENGINES[self.engine].reserve * self.memory) if self.kept is None else self.kept


@dataclass(frozen=True)
class Runs:
    """From which compute capability an engine runs something, and below which; None: no end."""

    since: tuple[int, int]
    below: tuple[int, int] | None = None

    def on(self, hardware: Hardware) -> bool:
        has = hardware.capability
        return has is not None and self.since <= has and (self.below is None or has < self.below)

    def says(self, what: str, hardware: Hardware) -> str:
        """Why not there, for people."""
        below = "" if self.below is None else f" and below {_dotted(self.below)}"
        has = "none" if hardware.capability is None else _dotted(hardware.capability)
        return f"{what} needs compute capability {_dotted(self.since)}{below}, {hardware.name} has {has}"


@dataclass(frozen=True)
class Engine:
    format: str
    """Of the files that it reads, as `output.format` has it."""
    schemes: Mapping[str, Runs] | None
    """By scheme; one that is not here is not run at all. None: all of its format's, wherever it runs."""
    kv_fp8: Runs | None
    """A KV cache in FP8; None: files say nothing of the cache."""
    overhead: int
    """Bytes beside weights, KV cache and activations: context of the driver, libraries, workspaces, captured graphs. Assumed."""
    batch_tokens: int
    """Tokens of a step of chunked prefill, on hardware of ordinary size."""
    reserve: float
    """Share of a GPU's memory that stays free."""
    kv_block: int
    """Tokens that a sequence's cache comes in."""
    spare_blocks: int
    """That a sliding window has beside what it and a step of prefill take."""


ENGINES: Mapping[str, Engine] = {
    # get_min_capability of vLLM's compressed-tensors schemes; FP8 below 8.9 runs as weights alone, which W8A16 does as well; INT8 with INT8
    # inputs has no kernel on Blackwell (docs.vllm.ai, INT8 W8A8); FP4 with FP4 inputs has its arithmetic from Blackwell on
    "vllm": Engine(
        format="compressed-tensors",
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
        reserve=0.08,
        kv_block=16,
        spare_blocks=1,
    ),
    # its defaults: n_ubatch 512, caches in whole 256 tokens; of its own it takes little, some more on a GPU that is not measured here
    "llama.cpp": Engine(
        format="gguf",
        schemes=None,
        kv_fp8=None,
        overhead=128 << 20,
        batch_tokens=512,
        reserve=0.08,
        kv_block=256,
        spare_blocks=0,
    ),
}

_MI, _GI, _G, _T = 1 << 20, 1 << 30, 1e9, 1e12


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


def _device(name: str, memory_gib: int, gb_s: float, kept_gib: float) -> Hardware:
    return Hardware(name, memory_gib * _GI, gb_s * _G, None, engine="llama.cpp", kept=round(kept_gib * _GI))


DEVICES: Mapping[str, Hardware] = {
    device.name: device
    for device in (
        # Raspberry Pi 5, product brief: LPDDR4X-4267, 32 bits wide; a system without a desktop takes some 0.3 GiB
        _device("Raspberry-Pi-5-4GB", 4, 17.1, 0.5),
        _device("Raspberry-Pi-5-8GB", 8, 17.1, 0.5),
        _device("Raspberry-Pi-5-16GB", 16, 17.1, 0.5),
        # Jetson modules' data sheets: memory bandwidth, in the Orin Nano's first power modes and its later ones ("Super")
        _device("Jetson-Orin-Nano-8GB", 8, 68, 1.5),
        _device("Jetson-Orin-Nano-Super-8GB", 8, 102, 1.5),
        _device("Jetson-AGX-Orin-64GB", 64, 204.8, 3),
        # Macs, Apple's technical specifications: memory bandwidth. Metal lends a model two thirds of a small memory, three quarters of more
        _device("Apple-M1-8GB", 8, 68.25, 8 / 3),
        _device("Apple-M1-16GB", 16, 68.25, 16 / 3),
        _device("Apple-M2-16GB", 16, 100, 16 / 3),
        _device("Apple-M3-16GB", 16, 100, 16 / 3),
        _device("Apple-M4-16GB", 16, 120, 16 / 3),
        _device("Apple-M4-Pro-24GB", 24, 273, 8),
        _device("Apple-M4-Pro-48GB", 48, 273, 12),
        _device("Apple-M4-Max-64GB", 64, 546, 16),
        # a phone as such: LPDDR5X-7500, 64 bits wide, half of the memory left by the system to one application
        _device("Phone-8GB", 8, 60, 4),
        _device("Phone-12GB", 12, 60, 6),
        # Steam Deck, technical specifications: LPDDR5-5500, four channels of 32 bits
        _device("Steam-Deck", 16, 88, 3),
        # small computers: Intel N100 (one channel of DDR5-4800), a laptop or desktop with two channels of DDR5-5600, a server of one socket
        # with two channels of DDR4-3200, each 64 bits wide
        _device("Intel-N100-16GB", 16, 38.4, 1.5),
        _device("Laptop-DDR5-16GB", 16, 89.6, 4),
        _device("Laptop-DDR5-32GB", 32, 89.6, 4),
        _device("Server-DDR4-32GB", 32, 51.2, 1.5),
        _device("Server-DDR4-64GB", 64, 51.2, 1.5),
        # Ryzen AI Max+ 395, product page: LPDDR5X-8000, 256 bits wide
        _device("Ryzen-AI-Max-128GB", 128, 256, 16),
    )
}
"""By the name that a spec gives. Another one is described by memory and bandwidth."""


def gpu_named(name: str) -> Hardware:
    """As people write them: `nvidia rtx 4090` is RTX-4090. Raises ValueError with the nearest names."""
    return _named("gpu", name, GPUS, "hardware: {memory, computeCapability, bandwidth}")


def device_named(name: str) -> Hardware:
    """As people write them: `raspberry pi 5 8GB` is Raspberry-Pi-5-8GB. Raises ValueError with the nearest names."""
    return _named("device", name, DEVICES, "memory and bandwidth")


def _named(what: str, name: str, known: Mapping[str, Hardware], otherwise: str) -> Hardware:
    plain = {_plain(each): each for each in known}
    if found := plain.get(_plain(name)):
        return known[found]
    near = difflib.get_close_matches(_plain(name), plain, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(plain[key] for key in near)}?" if near else f"known are {', '.join(known)}"
    raise ValueError(f"{what} {name!r} is not known; {hint} Any other is described by {otherwise}")


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
