"""Sliding windows by layer: which layers of a model have one, and under which names both transformers and vLLM keep to them. No torch.

No two model_types read the same keys alike: one class ignores `layer_types`, another puts one window on every layer, a runtime drops both
without a word. So each model_type that can be published with windows has a recipe, and the others are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kompressor_api.names import Reason
from kompressor_worker.architectures import FAMILIES, Dimensions, text_config
from kompressor_worker.dropping import is_block, layer_types, renamed
from kompressor_worker.errors import UserError
from kompressor_worker.family import Family
from kompressor_worker.layout import ModelLayout, SourceTensor, UnitLayout
from kompressor_worker.resizing import with_text
from kompressor_worker.structure import reshaped

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
    copies: Mapping[str, str] = field(default_factory=dict)
    """Keys of the other class, and those that say the same in the source."""
    family: str | None = None
    """Of the result, where tensors have other names in it."""
    renames: tuple[tuple[str, str], ...] = ()
    """Parts of names and what they become."""
    makes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Zeros that the other class wants in each block: tensor to its shape, in names of Dimensions."""


LLAMA = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
QWEN3_MOE = {"norm_topk_prob": False, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}
MIXTRAL = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_experts_per_tok": 2}
SHARED = {
    "mlp.shared_expert.gate_proj.weight": ("shared_ffn", "hidden"),
    "mlp.shared_expert.up_proj.weight": ("shared_ffn", "hidden"),
    "mlp.shared_expert.down_proj.weight": ("hidden", "shared_ffn"),
    "mlp.shared_expert_gate.weight": ("one", "hidden"),
}
WRAPPED = Recipe(architectures=("TransformersForCausalLM",), says={"use_sliding_window": True}, layer_count="max_window_layers")
"""vLLM's own class drops the windows; it wraps the one of transformers where `architectures` asks for that."""

RECIPES: dict[str, Recipe] = {
    "llama": Recipe("ministral", ("LlamaForCausalLM",), defaults=LLAMA, without=("attention_bias", "mlp_bias")),
    "ministral": Recipe(),
    "mistral": Recipe("ministral", ("MistralForCausalLM",)),
    "qwen2": WRAPPED,
    "qwen3": WRAPPED,
    "qwen2_moe": replace(WRAPPED, architectures=("TransformersMoEForCausalLM",)),
    "mixtral": Recipe(
        "qwen2_moe",
        ("TransformersMoEForCausalLM",),
        says={"use_sliding_window": True, "norm_topk_prob": True, "qkv_bias": False, "shared_expert_intermediate_size": 32},
        drops=("num_local_experts", "router_jitter_noise"),
        defaults=MIXTRAL,
        layer_count="max_window_layers",
        copies={"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
        family="qwen2_moe",
        renames=(("block_sparse_moe.", "mlp."), (".w1", ".gate_proj"), (".w3", ".up_proj"), (".w2", ".down_proj")),
        makes=SHARED,
    ),
    "qwen3_moe": Recipe(
        "mellum",
        ("MellumForCausalLM",),
        drops=("use_sliding_window", "max_window_layers"),
        defaults=QWEN3_MOE,
        rope_by_kind=True,
        dense_by_layer="mlp_layer_types",
    ),
    "mellum": Recipe(),
    "smollm3": Recipe(says={"use_sliding_window": True}),
    "olmo3": Recipe(),
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
WINDOWS = {**dict.fromkeys(("ministral", "mistral", *SWITCHED[:-1], "olmo3", "gemma2", "gemma3_text"), 4096), "mellum": 1024}
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
    if recipe.renames and (layout.rotated or reshaped(layout)):
        raise UserError(
            f"{by}: a {model_type!r} with windows is published as a {recipe.model_type}, under other tensor names, which what changes "
            f"blocks before does not know; put {by} first, or into a job of its own",
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
        if "rope_parameters" not in text:
            changes["rope_parameters"] = rotary(text)
    changes |= {key: text[other] for key, other in recipe.copies.items()}
    if recipe.layer_count is not None:
        changes[recipe.layer_count] = layers
    if recipe.rope_by_kind:
        changes["rope_parameters"] = {kind: rotary(text) for kind in (FULL, SLIDING)}
    if recipe.dense_by_layer is not None:
        changes[recipe.dense_by_layer] = ["sparse" if family.sparse(text, layer) else "dense" for layer in range(layers)]
    made = with_text(config, changes)
    if recipe.architectures:
        made["architectures"] = list(recipe.architectures)
    drops = (*recipe.drops, *(("rope_theta", "rope_scaling") if "rope_parameters" in changes else ()))
    return {key: value for key, value in made.items() if key not in drops}


def rotary(text: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters as newer files have them, of a config.json of any age."""
    if isinstance(given := text.get("rope_parameters"), dict):
        return dict(given)
    scaling = dict(text.get("rope_scaling") or {})
    kind = scaling.pop("type", None) or "default"
    theta = text.get("rope_theta", 1e6 if text["model_type"] == "mixtral" else 1e4)
    return {"rope_type": kind, "rope_theta": theta, **scaling}


def with_windows(layout: ModelLayout, recipe: Recipe, full: Sequence[int], window: int) -> ModelLayout:
    """The layout with a window on all its layers but `full`."""
    config = windowed(layout.config, FAMILIES[layout.family or ""], recipe, full, window)
    layout = replace(layout, config=config, windowed=True)
    if recipe.family is None:
        return layout
    sizes = Dimensions(FAMILIES[recipe.family], config)
    made = {name: tuple(sizes[size] or 0 for size in shape) for name, shape in recipe.makes.items()}

    def new(name: str) -> str:
        for old, other in recipe.renames:
            name = name.replace(old, other)
        return name

    units = tuple(with_zeros(renamed(unit, new), made, layout.dtype) if is_block(unit) else unit for unit in layout.units)
    return replace(layout, family=recipe.family, units=units)


def with_zeros(block: UnitLayout, made: Mapping[str, tuple[int, ...]], dtype: str) -> UnitLayout:
    """The block with tensors that a pass makes, in its second stage of linears: the attention's output, which every family has."""
    tensors = tuple(SourceTensor(f"{block.name}.{name}", dtype, shape, (), "made") for name, shape in made.items())
    at = [number for number, stage in enumerate(block.stages) if stage.linears][1]
    stages = list(block.stages)
    stages[at] = replace(stages[at], tensors=(*stages[at].tensors, *tensors))
    return replace(block, stages=tuple(stages))
