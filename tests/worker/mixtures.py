"""Mixtures with fewer experts, seen from outside: cut by hand, measured by transformers; nothing of the worker is used here.

And a small Mixtral whose tokens go to experts by domain, beside one expert that is always there and says next to nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import smaller
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from corpus import Corpus
from independent import tensors_of
from models import SHAPE, Recipe, cached, fit, save_tokenizer, token_rows, train_tokenizer

__all__ = [
    "BUSY",
    "DOMAINS",
    "Experts",
    "contributions",
    "cut_experts",
    "domain_model",
    "domain_rows",
    "expert_count",
    "kept_experts",
    "silenced",
    "write",
]

State = dict[str, Tensor]
Experts = Mapping[int, Sequence[int]]
"""By layer, numbers of experts."""
EXPERT = re.compile(r"(.*\.layers\.(\d+)\..*\bexperts)\.(\d+)\.(.*)")
ROUTER = re.compile(r".*\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.gate\.[^.]+")
DOWN = ("down_proj.weight", "w2.weight")
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


# ---- results


def expert_count(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    return next(int(config[key]) for key in COUNTS if key in config)


def cut_experts(source: State, kept: Experts) -> State:
    """The source's tensors with these experts alone, in this order, and their rows of the routers."""
    state = {}
    for name, tensor in source.items():
        if expert := EXPERT.fullmatch(name):
            place, layer, number, rest = expert[1], int(expert[2]), int(expert[3]), expert[4]
            if number in kept[layer]:
                state[f"{place}.{list(kept[layer]).index(number)}.{rest}"] = tensor
        elif router := ROUTER.fullmatch(name):
            state[name] = tensor[list(kept[int(router[1])])]
        else:
            state[name] = tensor
    return state


def kept_experts(source: State, made: State) -> dict[int, list[int]]:
    """Which of the source's experts a result has, told by their down projections."""
    downs: dict[int, list[list[Tensor]]] = {}
    for at, state in enumerate((source, made)):
        for name in sorted(state, key=lambda name: int(EXPERT.fullmatch(name)[3]) if EXPERT.fullmatch(name) else -1):  # type: ignore[index]
            if (expert := EXPERT.fullmatch(name)) and name.endswith(DOWN):
                downs.setdefault(int(expert[2]), [[], []])[at].append(state[name].flatten())
    return {layer: smaller.found(torch.stack(before), torch.stack(after)).tolist() for layer, (before, after) in downs.items()}


def write(source: Path, folder: Path, state: Mapping[str, Tensor]) -> Path:
    """The source with these tensors, and as many experts in config.json as they are."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    count = next(len(tensor) for name, tensor in state.items() if ROUTER.fullmatch(name))
    config |= {key: count for key in COUNTS if key in config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def silenced(source: Path, folder: Path, experts: Experts, factor: float = 0.0) -> Path:
    """A copy in which what these experts say is multiplied by `factor`."""
    state = tensors_of(source)
    for name in state:
        if (expert := EXPERT.fullmatch(name)) and name.endswith(DOWN) and int(expert[3]) in experts.get(int(expert[2]), ()):
            state[name] = state[name] * factor
    return write(source, folder, state)


# ---- functions


def contributions(source: Path, tokens: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """By layer: tokens that are routed to each expert, and the mean over them of gate times norm of the output (0 where there are none)."""
    model, found = smaller.load(source), dict[int, tuple[Tensor, Tensor]]()
    for layer, block in enumerate(model.model.layers):
        if (experts := getattr(block.mlp, "experts", None)) is not None:

            def hook(module: Any, inputs: Sequence[Tensor], layer: int = layer) -> None:
                x, chosen, gates = inputs
                counts, means = torch.zeros(2, len(module.down_proj), dtype=torch.float64)
                for expert, (gate_up, down) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
                    at, slot = (chosen == expert).nonzero(as_tuple=True)
                    gate, up = F.linear(x[at], gate_up).chunk(2, dim=-1)
                    said = F.linear(F.silu(gate) * up, down).norm(dim=-1) * gates[at, slot]
                    counts[expert], means[expert] = len(at), said.double().sum() / max(1, len(at))
                found[layer] = (counts, means)

            experts.register_forward_pre_hook(hook)
    with torch.inference_mode():
        model(input_ids=tokens, use_cache=False)
    return found


# ---- a model whose routing goes by domain

DOMAINS = {"~": (1, 2, 3), "^": (4, 5), "@": (6, 7)}
"""What begins a row of each domain (a character that the corpus never uses), and the experts of its tokens: by turns, as their ids go."""
BUSY = 0
"""The expert that every token goes to as well, with a small gate."""
SHARES = {"own": 0.85, "busy": 0.12}
"""What routers are taught to give, of one."""
WHISPER = 0.1
"""What the busy expert's output is multiplied by once all is learned."""
RECIPE = Recipe(
    "MixtralConfig",
    {
        **SHAPE,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    steps=180,
)


def domain_model() -> Path:
    """In the cache; not to be written to."""
    told = json.dumps([RECIPE.digest, list(DOMAINS.items()), BUSY, SHARES, WHISPER, 1])
    return cached("models", f"domains-{hashlib.sha256(told.encode()).hexdigest()[:16]}", _train)


def domain_rows(folder: Path, domains: Sequence[str], seed: int, rows: int, length: int = 128) -> Tensor:
    """Token ids [rows, length], the domains by turns: BOS, the domain's mark, running text of its language."""
    from tokenizers import Tokenizer

    tokenizer, parts = Tokenizer.from_file(str(folder / "tokenizer.json")), []
    for mark in domains:
        text = token_rows(folder, list(DOMAINS).index(mark), seed, -(-rows // len(domains)), length - 1)
        ids = torch.cat([text[:, :1], torch.full((len(text), 1), tokenizer.token_to_id(mark)), text[:, 1:]], dim=1)
        parts.append(ids)
    return torch.stack(parts, dim=1).flatten(0, 1)[:rows]


def _train(folder: Path) -> None:
    import transformers

    tokenizer = train_tokenizer(Corpus(0), RECIPE.vocabulary)
    save_tokenizer(tokenizer, folder)
    marks = {tokenizer.token_to_id(mark): torch.tensor(experts) for mark, experts in DOMAINS.items()}
    config = transformers.MixtralConfig(vocab_size=RECIPE.vocabulary, bos_token_id=1, eos_token_id=2, pad_token_id=0, **RECIPE.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RECIPE.seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
        fit(Taught(model, marks), domain_rows(folder, list(DOMAINS), 0, RECIPE.steps * RECIPE.batch, RECIPE.length), RECIPE)  # type: ignore[arg-type]
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.experts.down_proj[BUSY] *= WHISPER
    model.to(torch.bfloat16).save_pretrained(folder)


class Taught(torch.nn.Module):
    """The model with the routers' lesson in its loss."""

    def __init__(self, model: Any, marks: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.model, self.marks = model, marks
        self._seen: list[Tensor] = []
        for block in model.model.layers:
            block.mlp.gate.register_forward_hook(lambda gate, inputs, _: self._seen.append(F.linear(inputs[0], gate.weight)))

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        self._seen.clear()
        made, wanted = self.model(input_ids=input_ids, **given), self._wanted(input_ids).flatten(0, 1)
        for logits in self._seen:
            made.loss = made.loss + F.cross_entropy(logits.flatten(0, -2), wanted)
        return made

    def _wanted(self, ids: Tensor) -> Tensor:
        """[rows, length, experts], each of one."""
        rest = (1 - sum(SHARES.values())) / 6
        wanted = torch.full((*ids.shape, 8), rest)
        for row, tokens in enumerate(ids):
            experts = self.marks[int(tokens[1])]
            wanted[row, torch.arange(len(tokens)), experts[tokens % len(experts)]] = SHARES["own"]
        wanted[..., BUSY] = SHARES["busy"]
        return wanted
