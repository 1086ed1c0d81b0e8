"""GGUF: which of llama.cpp's architectures computes a decoder.

An architecture is one function in llama.cpp, with the tensors and the metadata that it wants. Most families have one of their own; some
take another one's for layers with a sliding window, or for heads of another size. What none of them computes is refused by name. Source:
llama.cpp's src/models, one file an architecture, as of b11739.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kompressor_api.names import Reason
from kompressor_worker.architectures import EXPERT_COUNTS, FAMILIES, text_config
from kompressor_worker.errors import UserError
from kompressor_worker.family import Family
from kompressor_worker.formats.gguf_rope import Rotary, rotary_of
from kompressor_worker.layout import ModelLayout
from kompressor_worker.windows import windows_of

__all__ = ["ARCHITECTURES", "CANDIDATES", "INSIDE", "Architecture", "Decoder", "decoder_of", "period_of", "unsupported"]

INSIDE = re.compile(r"(model\.)?language_model\.(model\.)?")
"""Where the decoder's tensors are in a model that also sees or hears."""
NO_SINK = -1e30
"""A logit that takes no share of a softmax."""


@dataclass(frozen=True)
class Architecture:
    name: str
    """`general.architecture`."""
    names: str
    """The architecture in the `gguf` library (MODEL_ARCH) whose tensors are called alike."""
    paired: bool = False
    """Whether rotary embeddings turn neighbouring channels, instead of those half a head apart as in the files that hubs hold."""
    scaling: tuple[str, ...] = ("default", "linear", "yarn")
    """Kinds of rotary scaling."""
    partial: bool = False
    """Whether some channels of a head may stay as they are."""
    windows: Literal["none", "period", "layers"] = "none"
    """Which layers may have a sliding window: none; all but every n-th; any."""
    square: bool = False
    """Whether all heads together must be as wide as the residual stream."""
    head: Literal["any", "tied", "own"] = "any"
    """Whether logits come from the embeddings, or from a head of their own."""
    biased: tuple[str, ...] = ("attn_q", "attn_k", "attn_v")
    """Linears that may have a bias, by their names in the file without the block's."""
    activation: tuple[str, ...] = ("silu", "swish")
    experts: Literal["none", "some", "all"] = "none"
    """Which layers may have experts: none; all of them or none; all."""
    caps: tuple[str, ...] = ()
    """Soft caps that it has, by keys of config.json; it has no model without the first of two."""
    scale: Literal["head", "norm", ""] = ""
    """What becomes of a `query_pre_attn_scalar` that is not what llama.cpp takes the root of: refused, or put into the queries' norm."""
    large: int = 0
    """Layers of the one model of which llama.cpp takes hidden_size over heads for that instead of a head's size."""
    sinks: bool = False
    """Whether it wants a tensor of logits, one a head, that join every softmax."""
    keys: Mapping[str, float] = field(default_factory=dict)
    """What its metadata says beside, whatever the model."""
    defaults: Mapping[str, float] = field(default_factory=dict)
    """Of a config.json that does not say it."""


EVERYWHERE = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
GELU = ("gelu_pytorch_tanh",)
ROPE_TENSOR = ("default", "linear", "yarn", "llama3")

ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in (
        Architecture("llama", "LLAMA", paired=True, scaling=ROPE_TENSOR, biased=EVERYWHERE, experts="some"),
        Architecture(  # Granite's factors are ones, and its sinks take nothing: what is left is llama with windows
            "granite_swa",
            "LLAMA",
            paired=True,
            scaling=ROPE_TENSOR,
            windows="layers",
            biased=EVERYWHERE,
            experts="some",
            sinks=True,
            keys={"logit_scale": 1.0},
        ),
        Architecture("qwen2", "QWEN2", square=True),
        Architecture("seed_oss", "SEED_OSS"),
        Architecture("qwen3", "QWEN3"),
        Architecture("qwen3moe", "QWEN3MOE", experts="all"),
        Architecture("mellum", "QWEN3MOE", experts="all", windows="layers", head="own", scaling=("default",)),
        Architecture(
            "gemma2",
            "GEMMA2",
            windows="period",
            head="tied",
            activation=GELU,
            caps=("attn_logit_softcapping", "final_logit_softcapping"),
            scale="head",
            large=46,
            defaults={"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        ),
        Architecture(
            "gemma3",
            "GEMMA3",
            windows="period",
            activation=GELU,
            caps=("final_logit_softcapping",),
            scale="norm",
            large=62,
            defaults={"query_pre_attn_scalar": 256},
        ),
        Architecture("phi3", "PHI3", square=True, partial=True, scaling=("default", "longrope"), biased=()),
    )
}

CANDIDATES: dict[str, tuple[str, ...]] = {
    "llama": ("llama", "granite_swa"),
    "mistral": ("llama", "granite_swa"),
    "mixtral": ("llama", "granite_swa"),
    "qwen2": ("qwen2", "seed_oss", "granite_swa"),
    "qwen3": ("qwen3",),
    "qwen3_moe": ("qwen3moe", "mellum"),
    "gemma2": ("gemma2",),
    "gemma3": ("gemma3",),
    "phi3": ("phi3",),
}
"""By key of architectures.FAMILIES: the first that computes a model is its own."""


@dataclass(frozen=True)
class Decoder:
    """What the plan of the file has to know of a model, and the architecture that computes it."""

    architecture: Architecture
    family: Family
    text: Mapping[str, Any]
    """The decoder's part of config.json."""
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    """Of a layer; 0: there are none."""
    windows: tuple[int | None, ...]
    """By layer; None: it sees everything before."""
    rotary: Rotary
    context: int
    """Tokens for which llama.cpp computes what the model does."""
    tied: bool
    """Whether the head is the embeddings."""
    warnings: tuple[str, ...] = ()

    @property
    def query_factor(self) -> float:
        """What the queries' norm is multiplied by, so that llama.cpp's scale of the scores becomes the model's."""
        if self.architecture.scale != "norm":
            return 1.0
        return math.sqrt(self.assumed_scalar / self.scalar)

    @property
    def scalar(self) -> float:
        """Scores are divided by its root."""
        return float(self.text.get("query_pre_attn_scalar") or self.head_dim)

    @property
    def assumed_scalar(self) -> int:
        """What llama.cpp takes it for."""
        if self.architecture.large and self.layers == self.architecture.large:
            return int(self.text["hidden_size"]) // self.heads
        return self.head_dim


def decoder_of(layout: ModelLayout) -> Decoder:
    """The model as passes leave it. Raises UserError for what llama.cpp cannot compute."""
    text = text_config(layout.config)
    model_type = text.get("model_type")
    name = _family(layout)
    if name not in CANDIDATES or layout.family is None:
        raise unsupported(f"model_type {model_type!r} has no names in GGUF here (known: {', '.join(CANDIDATES)})")
    assert text is layout.config, "a model that also sees is its decoder alone here (gguf_result)"
    family = FAMILIES[layout.family]
    text = {**family.defaults, **text}
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "rms_norm_eps", "vocab_size"):
        if type(text.get(key)) not in (int, float):
            raise unsupported(f"config.json says {key} {text.get(key)!r}, which the metadata of a GGUF file wants; write it there")
    layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
    head_dim = int(text.get("head_dim") or int(text["hidden_size"]) // heads)
    positions = int(text["max_position_embeddings"])
    rotary, windows = rotary_of(text, head_dim), windows_of(layout.config, family, layers)
    if rotary.local_theta is None:  # else it says which layers are turned by that
        windows = tuple(w if w is not None and w < positions else None for w in windows)
    found = [
        Decoder(
            ARCHITECTURES[candidate],
            family,
            {**ARCHITECTURES[candidate].defaults, **text},
            layers,
            heads,
            int(text.get("num_key_value_heads") or heads),
            head_dim,
            next((int(text[key]) for key in EXPERT_COUNTS if text.get(key)), 0) if family.experts else 0,
            windows,
            rotary,
            positions,
            layout.tied_embeddings,
        )
        for candidate in CANDIDATES[name]
    ]
    own, *others = found
    if (unable := _unable(own)) is None:
        return own
    if (other := next((decoder for decoder in others if _unable(decoder) is None), None)) is not None:
        warning = (
            f"a {model_type} with {unable} is not computed by llama.cpp's architecture {own.architecture.name}: the file says "
            f"{other.architecture.name}, which computes the same; old releases of llama.cpp do not know that (b11739 does)"
        )
        return replace(other, warnings=(warning,))
    return _within_window(own, layout)


def _unable(d: Decoder) -> str | None:
    """What the architecture cannot do of the model; None: it computes it."""
    a, text, rotary = d.architecture, d.text, d.rotary
    activation = text.get("hidden_activation") or text.get("hidden_act")
    width, hidden = d.heads * d.head_dim, int(text["hidden_size"])
    caps = {key: text.get(key) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    sparse = [d.family.sparse(text, layer) for layer in range(d.layers)] if d.experts else [False] * d.layers
    checks = (
        (any(d.windows) and not _windowed_alike(a, d.windows), f"a sliding window in {_layers(d.windows)}"),
        (a.square and width != hidden, f"{d.heads} heads of {d.head_dim} channels beside a hidden_size of {hidden}"),
        (rotary.kind not in a.scaling, f"rotary embeddings scaled as rope_type {rotary.kind!r}"),
        (rotary.dimensions != d.head_dim and not a.partial, f"rotary embeddings on {rotary.dimensions} of {d.head_dim} channels"),
        (rotary.local_theta is not None and a.windows != "period", "other rotary embeddings in layers with a window"),
        (activation is not None and activation not in a.activation, f"the activation {activation!r}"),
        (a.head == "own" and d.tied, "a head that is tied to the embeddings"),
        (a.head == "tied" and not d.tied, "a head that is not tied to the embeddings"),
        (any(caps[key] and key not in a.caps for key in caps), f"soft caps {caps}"),
        (len(a.caps) > 1 and not all(caps.values()), f"soft caps {caps}"),
        (a.scale == "head" and d.scalar != d.assumed_scalar, f"query_pre_attn_scalar {d.scalar:g} (it takes {d.assumed_scalar})"),
        (any(sparse) and a.experts == "none", "experts"),
        (a.experts == "all" and not all(sparse), "layers without experts"),
        (a.experts == "some" and any(sparse) and not all(sparse), "layers without experts"),
        (any(sparse) and text.get("norm_topk_prob") is False, "gates that are not shares of one (norm_topk_prob false)"),
        (bool(text.get("use_bidirectional_attention")), "attention that looks ahead (use_bidirectional_attention)"),
    )
    return next((what for fails, what in checks if fails), None)


def _windowed_alike(a: Architecture, windows: tuple[int | None, ...]) -> bool:
    if len({window for window in windows if window is not None}) > 1:
        return False
    return a.windows == "layers" or (a.windows == "period" and period_of(windows) is not None)


def _within_window(d: Decoder, layout: ModelLayout) -> Decoder:
    """In a context no longer than the window, where nothing is out of sight, a source with windows is one without. Raises UserError."""
    unable = _unable(d)
    shortest = min((window for window in d.windows if window is not None), default=None)
    everywhere = replace(d, windows=(None,) * d.layers)
    if shortest is None or layout.windowed or _unable(everywhere) is not None:
        raise unsupported(f"llama.cpp computes no {d.text['model_type']} with {unable} (its architecture {d.architecture.name})")
    warning = (
        f"llama.cpp computes no {d.text['model_type']} with {unable}: the file says a context_length of {shortest}, up to which the model "
        f"is what it was; beyond, up to {d.context}, it would see more than it was trained to"
    )
    return replace(everywhere, context=shortest, warnings=(warning,))


def _layers(windows: tuple[int | None, ...]) -> str:
    """Which of them have one, in words."""
    found = [str(layer) for layer, window in enumerate(windows) if window is not None]
    return "all layers" if len(found) == len(windows) else f"layer{'s' * (len(found) > 1)} {', '.join(found)}"


def _family(layout: ModelLayout) -> str | None:
    """A Mixtral with windows has another's names by now, and a shared expert of zeros: that it is one counts here."""
    mixtral = text_config(layout.source_config).get("model_type") == "mixtral"
    return "mixtral" if layout.family == "qwen2_moe" and mixtral else layout.family


def period_of(windows: tuple[int | None, ...]) -> int | None:
    """n, where all layers but every n-th have a window, the n-th layer the first without; 0: all have one; None: neither."""
    if all(windows):
        return 0
    every = windows.index(None) + 1
    return every if all((window is None) == ((layer + 1) % every == 0) for layer, window in enumerate(windows)) else None


def unsupported(what: str) -> UserError:
    return UserError(f"output.format gguf: {what}; or set output.format compressed-tensors", Reason.UNSUPPORTED_MODEL)
