"""llama.cpp's named mixes as data: one name, such as Q4_K_M, for a type of each tensor by what it does and how deep it lies.

Most tensors get the mix's own type; those whose errors cost most get a wider one. Facts from llama.cpp's `src/llama-quant.cpp`
(`llama_tensor_get_type`); one is left out: with an importance matrix it puts Q4_1 into the first eighth of Q4_0's down projections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kompressor_worker.layout import LinearLayout

Role = Literal["embedding", "head", "qkv", "v", "k", "o", "down", "expert", "other"]

ROLES: Mapping[str, Role] = {
    "v_proj": "v", "k_proj": "k", "qkv_proj": "qkv", "o_proj": "o", "down_proj": "down", "w2": "down",
}  # fmt: skip
"""By the last part of a linear's name."""


@dataclass(frozen=True)
class Place:
    """A layer out of so many, in a model of so many experts."""

    layer: int
    layers: int
    experts: int
    query_heads: int
    """That share a KV head."""


When = Callable[[Place], bool]


def always(_: Place) -> bool:
    return True


def outer_and_third(place: Place) -> bool:
    """The first and the last eighth of the layers, and every third one between them."""
    eighth = place.layers // 8
    return place.layer < eighth or place.layer >= 7 * place.layers // 8 or (place.layer - eighth) % 3 == 2


def grouped_queries(place: Place) -> bool:
    """V is so small that more bits cost next to nothing."""
    return place.query_heads >= 4


def first(layers: int) -> When:
    return lambda place: place.layer < layers


def first_share(parts: int) -> When:
    return lambda place: place.layer < place.layers // parts


@dataclass(frozen=True)
class Mix:
    name: str
    base: str
    """What tensors get that no rule speaks of."""
    rules: Mapping[Role, tuple[tuple[When, str], ...]] = field(default_factory=dict)
    """The first that holds gives the type."""
    head: str = "Q6_K"
    """Of the head, and of embeddings that are the head."""
    of_eight: Mapping[Role, str] = field(default_factory=dict)
    """Instead, where there are eight experts, beside which attention weighs little."""


KV_OF_EIGHT: Mapping[Role, str] = {"v": "Q8_0", "k": "Q8_0"}
OF_EIGHT: Mapping[Role, str] = {**KV_OF_EIGHT, "o": "Q5_K"}

MIXES: dict[str, Mix] = {
    mix.name: mix
    for mix in (
        Mix("F16", "F16", head="F16"),
        Mix("BF16", "BF16", head="BF16"),
        Mix("Q8_0", "Q8_0", head="Q8_0"),
        Mix("Q6_K", "Q6_K", of_eight=KV_OF_EIGHT),
        Mix("Q5_K", "Q5_K"),
        Mix("Q4_K", "Q4_K"),
        Mix("Q3_K", "Q3_K"),
        Mix("Q4_0", "Q4_0", of_eight=KV_OF_EIGHT),
        Mix("MXFP4", "MXFP4", head="Q8_0"),
        Mix("Q5_K_S", "Q5_K", of_eight=KV_OF_EIGHT),
        Mix(
            "Q5_K_M", "Q5_K",
            {"v": ((outer_and_third, "Q6_K"),), "down": ((outer_and_third, "Q6_K"),), "qkv": ((always, "Q6_K"),)},
            of_eight=KV_OF_EIGHT,
        ),
        Mix("Q4_K_S", "Q4_K", {"v": ((first(4), "Q5_K"),), "down": ((first_share(8), "Q5_K"),)}, of_eight=OF_EIGHT),
        Mix(
            "Q4_K_M", "Q4_K",
            {"v": ((outer_and_third, "Q6_K"),), "down": ((outer_and_third, "Q6_K"),), "qkv": ((always, "Q5_K"),)},
            of_eight=OF_EIGHT,
        ),
        Mix("Q3_K_S", "Q3_K", of_eight=OF_EIGHT),
        Mix(
            "Q3_K_M", "Q3_K",
            {
                "v": ((first(2), "Q5_K"), (always, "Q4_K")), "down": ((first_share(16), "Q5_K"), (always, "Q4_K")),
                "o": ((always, "Q4_K"),), "qkv": ((always, "Q4_K"),),
            },
            of_eight=OF_EIGHT,
        ),
        Mix(
            "Q3_K_L", "Q3_K",
            {"v": ((always, "Q5_K"),), "down": ((always, "Q5_K"),), "o": ((always, "Q5_K"),), "qkv": ((always, "Q4_K"),)},
            of_eight={**KV_OF_EIGHT, "o": "Q3_K"},
        ),
        Mix(
            "Q2_K", "Q2_K",
            {"v": ((grouped_queries, "Q4_K"), (always, "Q3_K")), "down": ((always, "Q3_K"),), "o": ((always, "Q3_K"),)},
            of_eight=OF_EIGHT,
        ),
        Mix("MXFP4_MOE", "Q8_0", {"expert": ((always, "MXFP4"),)}, head="Q8_0"),
    )
}  # fmt: skip
"""Without rules (Q4_K, MXFP4): that type everywhere but in the head. Names that llama.cpp has too mean what they mean there."""

WIDER_V_OF_70B = {"Q3_K": "Q5_K", "Q4_K": "Q5_K"}
"""Of 80 layers whose eight query heads share a KV head."""


def type_of(linear: LinearLayout, mix: Mix, config: Mapping[str, Any], tied: bool, layers: int) -> str:
    """Of one tensor, whatever its shape. `config`: of the text model; `tied`: whether the embeddings are the head."""
    role = role_of(linear)
    if role == "head" or (role == "embedding" and tied):
        return mix.head
    place = Place(layer_of(linear), layers, experts_of(config), query_heads(config))
    if role == "expert" and "expert" not in mix.rules:
        role = ROLES.get(linear.name.rpartition(".")[2], "other")
    if place.experts == 8 and role in mix.of_eight:
        return mix.of_eight[role]
    chosen = next((found for when, found in mix.rules.get(role, ()) if when(place)), mix.base)
    if role == "v" and layers == 80 and place.query_heads == 8:
        return WIDER_V_OF_70B.get(chosen, chosen)
    return chosen


def types_of(mix: Mix, linears: Iterable[LinearLayout], config: Mapping[str, Any], tied: bool, layers: int) -> dict[str, str]:
    """Type by linear's name; before any falls back because of its shape (`gguf_types.fitting`)."""
    return {linear.name: type_of(linear, mix, config, tied, layers) for linear in linears}


def role_of(linear: LinearLayout) -> Role:
    if linear.kind in ("embedding", "head"):
        return "embedding" if linear.kind == "embedding" else "head"
    if ".experts." in linear.name:
        return "expert"
    return ROLES.get(linear.name.rpartition(".")[2], "other")


def layer_of(linear: LinearLayout) -> int:
    """Its block's number; 0 outside of blocks."""
    return next((int(part) for part in linear.name.split(".") if part.isdigit()), 0)


def experts_of(config: Mapping[str, Any]) -> int:
    return int(config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts") or 0)


def query_heads(config: Mapping[str, Any]) -> int:
    heads = int(config.get("num_attention_heads") or 1)
    return heads // int(config.get("num_key_value_heads") or heads)
