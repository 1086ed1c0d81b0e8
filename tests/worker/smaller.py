"""Models made smaller, seen from outside: what is planted to go, which parts a published result kept, and its function by transformers.

Nothing of the worker is used here. Parts are found by comparing the published weights with the source's.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from independent import tensors_of

__all__ = [
    "Sizes",
    "cut_heads",
    "cut_hidden",
    "cut_layers",
    "cut_width",
    "divergences",
    "kept_channels",
    "lively",
    "measure",
    "norm_factors",
    "plant",
]

State = dict[str, Tensor]
EMBEDDINGS = "model.embed_tokens.weight"
DOWN, UP = ("down_proj.weight", "w2.weight"), {"down_proj": ("gate_proj", "up_proj"), "w2": ("w1", "w3")}


@dataclass(frozen=True)
class Sizes:
    """Of a source."""

    layers: int
    heads: int
    kv_heads: int
    head: int
    hidden: int
    offset: float
    """What the family adds to a norm's stored weight."""

    @classmethod
    def of(cls, folder: Path) -> Sizes:
        from transformers import AutoConfig

        c = AutoConfig.from_pretrained(folder)
        head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        offset = 1.0 if c.model_type.startswith("gemma") else 0.0
        return cls(c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, head, c.hidden_size, offset)


# ---- sources


def lively(source: Path, folder: Path) -> Path:
    """A copy whose norms have weights that differ by channel: those of a fresh model do not."""
    state, chance = tensors_of(source), torch.Generator().manual_seed(5)
    for name, tensor in state.items():
        if name.endswith("norm.weight"):
            state[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=chance)
    return write(source, folder, state)


def plant(source: Path, folder: Path, groups: int, neurons: float, channels: int, block: int) -> Path:
    """A copy in which some parts add nothing: in every block `groups` KV heads and a share of the neurons, each block and expert its own;
    `channels` of the residual stream; and all of one block."""
    sizes, state, chance = Sizes.of(source), tensors_of(source), torch.Generator().manual_seed(7)
    dead = torch.randperm(sizes.hidden, generator=chance)[:channels]
    shared = sizes.heads // sizes.kv_heads
    for name, tensor in state.items():
        if name.endswith("o_proj.weight"):
            by_group = tensor.view(len(tensor), sizes.kv_heads, shared * sizes.head)
            by_group[:, torch.randperm(sizes.kv_heads, generator=chance)[:groups]] = 0
        elif name.endswith(DOWN):
            tensor[:, torch.randperm(tensor.shape[1], generator=chance)[: round(neurons * tensor.shape[1])]] = 0
        elif name.endswith("embed_tokens.weight"):
            tensor[:, dead] = 0
        if name.endswith(("o_proj.weight", *DOWN)):
            tensor[dead] = 0
            tensor *= f"layers.{block}." not in name
    return write(source, folder, state)


def write(source: Path, folder: Path, state: Mapping[str, Tensor]) -> Path:
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


# ---- results


def cut_heads(source: State, made: State, sizes: Sizes) -> State:
    """The source's tensors with the heads that `made` kept, which are told by their keys."""
    width, shared, state = sizes.head, sizes.heads // sizes.kv_heads, dict(source)
    for prefix in blocks(source):
        fused = f"{prefix}self_attn.qkv_proj.weight" in source
        queries, keys = sizes.heads * width, sizes.kv_heads * width
        names = ["qkv_proj"] * 3 if fused else ["q_proj", "k_proj", "v_proj"]
        starts = (0, queries, queries + keys) if fused else (0, 0, 0)
        before = source[f"{prefix}self_attn.{names[1]}.weight"][starts[1] :][:keys].unflatten(0, (-1, width))
        after = made[f"{prefix}self_attn.{names[1]}.weight"]
        groups = len(after) // (width * (shared + 2)) if fused else len(after) // width
        after = after[groups * shared * width :][: groups * width] if fused else after
        kept = found(before.flatten(1), after.unflatten(0, (groups, width)).flatten(1))
        rows = [spread(kept, shared * width), spread(kept, width), spread(kept, width)]
        if fused:
            rows = [torch.cat([start + each for start, each in zip(starts, rows, strict=True)])]
        for name, each in zip(dict.fromkeys(names), rows, strict=True):
            for what in ("weight", "bias"):
                if (full := f"{prefix}self_attn.{name}.{what}") in source:
                    state[full] = source[full][each]
        state[f"{prefix}self_attn.o_proj.weight"] = source[f"{prefix}self_attn.o_proj.weight"][:, spread(kept, shared * width)]
    return state


def cut_width(source: State, made: State, sizes: Sizes) -> State:
    """The same of neurons, told by the rows of up."""
    state = dict(source)
    for down in [name for name in source if name.endswith(DOWN)]:
        place, _, name = down.removesuffix(".weight").rpartition(".")
        gate, up = (f"{place}.{x}.weight" for x in UP[name])
        fused, width = f"{place}.gate_up_proj.weight", source[down].shape[1]
        if fused in source:
            kept = found(source[fused][width:], made[fused][len(made[fused]) // 2 :])
            state[fused] = source[fused][torch.cat([kept, width + kept])]
        else:
            kept = found(source[up], made[up])
            state[gate], state[up] = source[gate][kept], source[up][kept]
        state[down] = source[down][:, kept]
    return state


def kept_channels(source: State, made: State) -> Tensor:
    """int64, told by the embeddings' columns, whose length may be another."""
    unit = torch.nn.functional.normalize
    likeness = unit(made[EMBEDDINGS].double(), dim=0).T @ unit(source[EMBEDDINGS].double(), dim=0)
    kept = likeness.argmax(1)
    assert bool((likeness.amax(1) > 1 - 1e-6).all()) and bool((kept.diff() > 0).all()), "columns of other channels, or out of order"
    return kept


def cut_hidden(source: State, kept: Tensor, sizes: Sizes, factors: Mapping[str, float], widened: float) -> State:
    """The source's tensors with the channels `kept`, the embeddings `widened`, norms multiplied by `factors`."""
    state = {}
    for name, tensor in source.items():
        if name.endswith(("o_proj.weight", *DOWN)):
            state[name] = tensor[kept]
        elif name in factors:
            state[name] = (tensor[kept] + sizes.offset) * factors[name] - sizes.offset
        elif name == EMBEDDINGS:
            state[name] = tensor[:, kept] * widened
        elif tensor.dim() == 2:
            state[name] = tensor[:, kept]
        else:
            state[name] = tensor  # biases of q, k and v; norms over a head's channels
    return state


def cut_layers(source: State, made: State, sizes: Sizes) -> State:
    """The same of blocks, told by their first norm."""
    prefixes, state = blocks(source), {name: t for name, t in source.items() if ".layers." not in name}
    first = torch.stack([source[f"{prefix}input_layernorm.weight"] for prefix in prefixes])
    kept = found(first, torch.stack([made[f"{prefix}input_layernorm.weight"] for prefix in blocks(made)]))
    for new, old in enumerate(kept.tolist()):
        prefix = prefixes[old]
        state |= {f"model.layers.{new}.{name.removeprefix(prefix)}": t for name, t in source.items() if name.startswith(prefix)}
    return state


def blocks(state: Mapping[str, Tensor]) -> list[str]:
    numbers = sorted({int(name.split(".")[2]) for name in state if name.startswith("model.layers.")})
    return [f"model.layers.{number}." for number in numbers]


def found(rows: Tensor, kept: Tensor) -> Tensor:
    """int64: where each of `kept` stands among `rows`, in the same order."""
    at = torch.cdist(kept.double(), rows.double()).argmin(1)
    assert torch.equal(rows[at], kept) and bool((at.diff() > 0).all()), "rows that the source has not, or out of order"
    return at


def spread(kept: Tensor, width: int) -> Tensor:
    return (kept[:, None] * width + torch.arange(width)).flatten()


# ---- functions


def norm_factors(source: Path, tokens: Tensor, kept: Tensor) -> dict[str, float]:
    """By norm over channels of the stream: root of how much more energy a kept channel has than the average one, in what the norm gets."""
    model, seen = load(source), dict[str, float]()
    for name, module in model.named_modules():
        if name.endswith("norm") and not name.endswith(("q_norm", "k_norm")):

            def hook(_: Any, inputs: Sequence[Tensor], name: str = name) -> None:
                squares = inputs[0].double().square()
                seen[f"{name}.weight"] = float((squares[..., kept].mean(-1) / squares.mean(-1)).mean()) ** 0.5

            module.register_forward_pre_hook(hook)
    with torch.inference_mode():
        model(input_ids=tokens, use_cache=False)
    return seen


def load(folder: Path) -> Any:
    """The model; every tensor of the file is one of its own, in its shape, and none is missing."""
    from transformers import AutoModelForCausalLM

    model, said = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(said.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), said
    return model.eval()


def log_probabilities(folder: Path, tokens: Tensor) -> Tensor:
    """fp64 [rows, length - 1, vocabulary] of all tokens but the first, by transformers in fp32."""
    with torch.inference_mode():
        found: Tensor = load(folder)(input_ids=tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    return found


def divergences(source: Path, result: Path, tokens: Tensor) -> Tensor:
    """fp64 [rows, length - 1]: KL of the result from the source."""
    p, q = log_probabilities(source, tokens), log_probabilities(result, tokens)
    return (p.exp() * (p - q)).sum(-1)


def measure(source: Path, result: Path, tokens: Tensor) -> dict[str, float]:
    """Mean KL of the result from the source, and its perplexity."""
    loss = -log_probabilities(result, tokens).gather(-1, tokens[:, 1:, None]).mean()
    return {"kl": float(divergences(source, result, tokens).mean()), "perplexityAfter": float(loss.exp())}
