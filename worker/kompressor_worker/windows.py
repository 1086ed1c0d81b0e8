"""Sliding windows by layer: which layers of a model have one, and under which names both transformers and vLLM keep to them. No torch.

No two model_types read the same keys alike: one class ignores `layer_types`, another puts one window on every layer, a runtime drops both
without a word. So each model_type that can be published with windows has a recipe, and the others are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kompressor_api.names import Reason
from kompressor_worker.architectures import FAMILIES, Family, text_config
from kompressor_worker.dropping import layer_types
from kompressor_worker.errors import UserError
from kompressor_worker.layout import ModelLayout
from kompressor_worker.resizing import with_text

__all__ = ["RECIPES", "Recipe", "kept_tokens", "recipe_for", "windowed", "windows_of", "with_windows"]

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Recipe:
    """How a model_type is published with windows in some layers."""

    model_type: str | None = None
    """Its name in the result; None: its own."""
    architectures: tuple[str, ...] = ()
    """The same."""
    says: Mapping[str, Any] = field(default_factory=dict)
    """Beside `layer_types` and `sliding_window`."""
    drops: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a config.json may leave out, and the other class has another default for: written out."""
    layer_count: str | None = None
    """Key that is set to the number of layers: from there on windows would begin by themselves."""
    rope_by_kind: bool = False
    """Whether rotary parameters are given for each kind of attention: the source's for both."""
    dense_by_layer: str | None = None
    """Key that lists which layers are dense or sparse."""
    without: tuple[str, ...] = ()
    """What the other class cannot do, by keys of config.json that say so."""


LLAMA = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
QWEN3_MOE = {"norm_topk_prob": False, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}
WRAPPED = Recipe(architectures=("TransformersForCausalLM",), says={"use_sliding_window": True}, layer_count="max_window_layers")
"""vLLM's own class drops the windows; it wraps the one of transformers where `architectures` asks for that."""

RECIPES: dict[str, Recipe] = {
    "llama": Recipe("ministral", ("LlamaForCausalLM",), defaults=LLAMA, without=("attention_bias", "mlp_bias")),
    "ministral": Recipe(),
    "mistral": Recipe("ministral", ("MistralForCausalLM",)),
    "qwen2": WRAPPED,
    "qwen3": WRAPPED,
    "qwen3_moe": Recipe(
        "mellum",
        ("MellumForCausalLM",),
        drops=("use_sliding_window", "max_window_layers", "rope_theta", "rope_scaling"),
        defaults=QWEN3_MOE,
        rope_by_kind=True,
        dense_by_layer="mlp_layer_types",
    ),
    "mellum": Recipe(),
    "gemma2": Recipe(),
    "gemma3_text": Recipe(),
}
"""By model_type of the decoder."""

NEVER = ("llama",)
"""model_types whose class in transformers has no windows, whatever config.json says;"""
ALIKE = ("mistral", "mixtral", "phi3", "qwen3_moe")
"""whose class has one on all layers or on none: `layer_types` says nothing to it;"""
SWITCHED = ("qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "smollm3")
"""and whose class has some only with `use_sliding_window`."""
WINDOWS = dict.fromkeys(("ministral", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "gemma2", "gemma3_text"), 4096) | {
    "mellum": 1024
}
"""Of a config.json that does not say `sliding_window`."""


def recipe_for(layout: ModelLayout, by: str) -> Recipe:
    """Raises UserError, which names the model_type, where there is none."""
    text, listed = text_config(layout.config), ", ".join(RECIPES)
    model_type = text.get("model_type")
    if text.get("kv_lora_rank"):
        raise UserError(
            f"{by}: the model (kv_lora_rank {text['kv_lora_rank']!r}) attends to latent vectors, and no loader gives those a window; leave "
            f"{by} out",
            Reason.UNSUPPORTED_MODEL,
        )
    recipe = RECIPES.get(str(model_type))
    if recipe is None or layout.family is None:
        raise UserError(
            f"{by}: a {model_type!r} with windows in some layers is read alike by no two loaders (known: {listed}); leave {by} out",
            Reason.UNSUPPORTED_MODEL,
        )
    if (unable := next((key for key in recipe.without if text.get(key)), None)) is not None:
        raise UserError(
            f"{by}: a {model_type!r} with windows is published as a {recipe.model_type}, which has no {unable}; leave {by} out",
            Reason.UNSUPPORTED_MODEL,
        )
    if text is not layout.config and (recipe.model_type or recipe.architectures):
        raise UserError(
            f"{by}: the model also sees or hears, and its {model_type!r} inside would have to change its name; leave {by} out",
            Reason.UNSUPPORTED_MODEL,
        )
    return recipe


def windows_of(config: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, ...]:
    """The window of each layer as transformers reads this config.json; None: it sees everything before."""
    text = {**family.defaults, **text_config(config)}
    model_type = str(text.get("model_type"))
    window = text.get("sliding_window", WINDOWS.get(model_type))
    off = model_type in NEVER or not text.get("use_sliding_window", model_type not in SWITCHED)
    if type(window) is not int or window < 1 or off:
        return (None,) * layers
    kinds = None
    if model_type not in ALIKE:
        kinds = text.get("layer_types") or layer_types(text, family, layers)
        if kinds is None and type(first := text.get("max_window_layers")) is int:
            kinds = [FULL if layer < first else SLIDING for layer in range(layers)]
    return tuple(window if kinds is None or kinds[layer] == SLIDING else None for layer in range(layers))


def kept_tokens(windows: Sequence[int | None], context: int) -> int:
    """What a cache holds of a sequence of `context` tokens, all layers together."""
    return sum(context if window is None else min(window, context) for window in windows)


def windowed(config: Mapping[str, Any], family: Family, recipe: Recipe, full: Sequence[int], window: int) -> dict[str, Any]:
    """config.json with a window on all layers but `full`, under the names of the recipe."""
    text = {**recipe.defaults, **text_config(config)}
    layers = int(text["num_hidden_layers"])
    changes: dict[str, Any] = {key: text[key] for key in recipe.defaults}
    changes |= {"layer_types": [FULL if layer in full else SLIDING for layer in range(layers)], "sliding_window": window, **recipe.says}
    if recipe.model_type is not None:
        heads = int(text["num_attention_heads"])
        changes["model_type"] = recipe.model_type
        changes["num_key_value_heads"] = text.get("num_key_value_heads") or heads
        changes["head_dim"] = text.get("head_dim") or int(text["hidden_size"]) // heads
    if recipe.layer_count is not None:
        changes[recipe.layer_count] = layers
    if recipe.rope_by_kind:
        changes["rope_parameters"] = {kind: rotary(text) for kind in (FULL, SLIDING)}
    if recipe.dense_by_layer is not None:
        changes[recipe.dense_by_layer] = ["sparse" if family.sparse(text, layer) else "dense" for layer in range(layers)]
    made = with_text(config, changes)
    if recipe.architectures:
        made["architectures"] = list(recipe.architectures)
    return {key: value for key, value in made.items() if key not in recipe.drops}


def rotary(text: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters as newer files have them, of a config.json of any age."""
    if isinstance(given := text.get("rope_parameters"), dict):
        return dict(given)
    scaling = dict(text.get("rope_scaling") or {})
    kind = scaling.pop("type", None) or "default"
    return {"rope_type": kind, "rope_theta": text.get("rope_theta", 10_000.0), **scaling}


def with_windows(layout: ModelLayout, recipe: Recipe, full: Sequence[int], window: int) -> ModelLayout:
    """The layout with a window on all its layers but `full`."""
    return replace(layout, config=windowed(layout.config, FAMILIES[layout.family or ""], recipe, full, window), windowed=True)
