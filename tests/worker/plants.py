"""Llama checkpoints changed on purpose, so that one known difficulty stands out: in plain fp64, with nothing of what is tested.

Each writes a folder beside the original: the same configuration and tokenizer, other bf16 weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from independent import tensors_of

__all__ = ["SPIKING", "loud_channels", "principal_axes", "spiking_tokens"]

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Linears behind each norm of a block."""
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
SPIKING = "~^@#"
"""Characters that the corpus never uses, so that each is a token of its own: one for each block."""


def loud_channels(source: Path, folder: Path, factor: float = 32.0, channels: int = 6) -> Path:
    """The same function, bit for bit: behind every norm some channels are `factor` (a power of two) times as large, and the weights that
    read them as much smaller. What SmoothQuant and AWQ are for."""
    state = _double(source)
    generator = torch.Generator().manual_seed(0)
    for norm, readers in _norms(state).items():
        loud = torch.randperm(len(state[norm]), generator=generator)[:channels]
        state[norm][loud] *= factor
        for reader in readers:
            state[reader][:, loud] /= factor
    return _write(source, folder, state)


def principal_axes(source: Path, folder: Path, tokens: Tensor) -> Path:
    """The same function up to bf16: norms folded into the weights behind them, the residual stream in the basis of its principal components
    on tokens [rows, length], so that a few channels carry most of it. What rotations are for."""
    state, axes = _double(source), _axes(source, tokens)
    for norm, readers in (_norms(state) | {"model.norm.weight": ["lm_head.weight"]}).items():
        for reader in readers:
            state[reader] = state[reader] * state[norm] @ axes
        state[norm] = torch.ones_like(state[norm])
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] @ axes
    for name in state:
        if name.removesuffix(".weight").endswith(WRITERS):
            state[name] = axes.T @ state[name]
    return _write(source, folder, state)


def spiking_tokens(source: Path, folder: Path, ids: list[int]) -> Path:
    """The same function of all other tokens: token ids[n] drives one unit of block n's feed-forward as far as a norm allows, and keeps its
    direction through all blocks. Massive activations (Sun et al. 2024, arXiv 2402.17762), but of tokens that few documents have."""
    state = _double(source)
    for layer, token in enumerate(ids):
        mlp = f"model.layers.{layer}.mlp."
        gate, up = (state[f"{mlp}{x}_proj.weight"] * state[f"model.layers.{layer}.post_attention_layernorm.weight"] for x in ("gate", "up"))
        between = torch.nn.functional.normalize(gate) + torch.nn.functional.normalize(up)
        between = torch.nn.functional.normalize(between)
        unit = ((gate * between).sum(1) * (up * between).sum(1)).argmax()
        state["model.embed_tokens.weight"][token] = 100.0 * between[unit]
    return _write(source, folder, state)


def _double(source: Path) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors_of(source).items()}


def _norms(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Every norm inside the blocks, and the weights that read it."""
    prefixes = sorted({".".join(name.split(".")[:3]) for name in state if name.startswith("model.layers.")})
    return {f"{p}.{norm}.weight": [f"{p}.{x}.weight" for x in readers] for p in prefixes for norm, readers in READERS.items()}


def _axes(source: Path, tokens: Tensor) -> Tensor:
    """fp64 [hidden, hidden]: eigenvectors, as columns, of the normalised states before every block."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.inference_mode():
        states = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states[:-1]
    stream = torch.cat([torch.nn.functional.normalize(h.flatten(0, 1).double(), dim=-1) for h in states])
    return torch.linalg.eigh(stream.T @ stream).eigenvectors


def _write(source: Path, folder: Path, state: Mapping[str, Tensor]) -> Path:
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file({name: t.to(torch.bfloat16).contiguous() for name, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder
