"""Rotary embeddings in GGUF: config.json's parameters, of any age, as llama.cpp's keys and tensors.

What transformers computes is in its `modeling_rope_utils`; llama.cpp scales by keys (linear, YaRN) or divides each frequency by a tensor's
factor (Llama 3; LongRoPE, which has two tensors and takes the one for the context that is asked for).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kompressor_api.names import Reason
from kompressor_worker.errors import UserError

__all__ = ["Rotary", "rotary_of"]

THETAS = {"mixtral": 1e6, "gemma3_text": 1e6}
"""Of a config.json that does not say `rope_theta`; 1e4 for all others."""
LOCAL_THETA = 1e4
"""Of Gemma 3's layers with a window, where config.json does not say `rope_local_base_freq`."""
FULL, SLIDING = "full_attention", "sliding_attention"
ALIASES = {"su": "longrope"}


@dataclass(frozen=True)
class Rotary:
    """What a config.json says of them."""

    kind: str
    """default, linear, yarn, llama3, longrope, dynamic, or another's name."""
    theta: float
    parameters: Mapping[str, Any]
    dimensions: int
    """Channels of a head that are turned."""
    positions: int
    """max_position_embeddings."""
    local_theta: float | None = None
    """Of layers with a window, which are not scaled, where that is said apart."""

    def number(self, key: str, default: float | None = None) -> float:
        """Raises UserError."""
        value = self.parameters.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise UserError(
                f"config.json: rope_parameters says {key} {value!r}, and rope_type {self.kind} wants a number above zero; correct it",
                Reason.UNSUPPORTED_MODEL,
            )
        return float(value)

    @property
    def original(self) -> int:
        """Positions that the model was trained for before its context was stretched."""
        return int(self.number("original_max_position_embeddings", self.positions))

    def keys(self) -> dict[str, str | float | int]:
        """What metadata say, by the library's names in `Keys.Rope`. Raises UserError."""
        said: dict[str, str | float | int] = {"DIMENSION_COUNT": self.dimensions, "FREQ_BASE": self.theta}
        if self.local_theta is not None:
            said["FREQ_BASE_SWA"] = self.local_theta
        if self.kind == "linear":
            said |= {"SCALING_TYPE": "linear", "SCALING_FACTOR": self.number("factor")}
        elif self.kind == "yarn":
            said |= self._yarn()
        elif self.kind == "longrope":
            said |= {"SCALING_TYPE": "longrope", "SCALING_ORIG_CTX_LEN": self.original, "SCALING_ATTN_FACTOR": self._long_attention()}
        return said

    def factors(self) -> dict[str, list[float]]:
        """Divisors of the frequencies, by the library's names of the tensors that hold them. Raises UserError."""
        if self.kind == "llama3":
            return {"ROPE_FREQS": self._llama3()}
        if self.kind != "longrope":
            return {}
        found = {"ROPE_FACTORS_LONG": self.parameters.get("long_factor"), "ROPE_FACTORS_SHORT": self.parameters.get("short_factor")}
        for name, values in found.items():
            if not isinstance(values, list) or len(values) != self.dimensions // 2:
                key = name.removeprefix("ROPE_FACTORS_").lower()
                raise UserError(
                    f"config.json: rope_parameters says {key}_factor {values!r:.60}, not a list of {self.dimensions // 2} numbers, one for "
                    "every pair of channels; correct it",
                    Reason.UNSUPPORTED_MODEL,
                )
        return {name: [float(x) for x in values or ()] for name, values in found.items()}

    def _yarn(self) -> dict[str, str | float | int]:
        if "mscale" in self.parameters or "mscale_all_dim" in self.parameters or self.parameters.get("truncate") is False:
            raise UserError(
                "config.json: rope_parameters says mscale, mscale_all_dim or truncate false, which llama.cpp's YaRN has not for this "
                "architecture; publish as compressed-tensors",
                Reason.UNSUPPORTED_MODEL,
            )
        factor = self.number("factor")
        said: dict[str, str | float | int] = {"SCALING_TYPE": "yarn", "SCALING_FACTOR": factor, "SCALING_ORIG_CTX_LEN": self.original}
        if self.parameters.get("attention_factor") is not None:
            # llama.cpp multiplies what is said here with the default that the paper suggests
            said["SCALING_ATTN_FACTOR"] = self.number("attention_factor") / (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
        for key, name in (("beta_fast", "SCALING_YARN_BETA_FAST"), ("beta_slow", "SCALING_YARN_BETA_SLOW")):
            if self.parameters.get(key) is not None:
                said[name] = self.number(key)
        return said

    def _long_attention(self) -> float:
        if self.parameters.get("attention_factor") is not None:
            return self.number("attention_factor")
        given = self.parameters.get("factor")
        factor = self.number("factor") if given is not None else self.positions / self.original
        return math.sqrt(1 + math.log(factor) / math.log(self.original)) if factor > 1 else 1.0

    def _llama3(self) -> list[float]:
        factor, low, high = (self.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        original = self.original
        divisors = []
        for pair in range(self.dimensions // 2):
            length = 2 * math.pi * self.theta ** (2 * pair / self.dimensions)
            if length < original / high:
                divisors.append(1.0)
            elif length > original / low:
                divisors.append(factor)
            else:
                smooth = (original / length - low) / (high - low)
                divisors.append(1 / ((1 - smooth) / factor + smooth))
        return divisors


def rotary_of(text: Mapping[str, Any], head_dim: int) -> Rotary:
    """Of the decoder's part of config.json. Raises UserError."""
    said = text.get("rope_parameters")
    model_type = str(text.get("model_type"))
    theta = text.get("rope_theta") or THETAS.get(model_type, 1e4)
    local: Mapping[str, Any] | None = None
    if isinstance(said, dict) and FULL in said:
        local = said.get(SLIDING)
        said = said[FULL]
    elif model_type == "gemma3_text":
        local = {"rope_theta": text.get("rope_local_base_freq") or LOCAL_THETA}
    if not isinstance(said, dict):
        said = text.get("rope_scaling") or {}
    kind = str(said.get("rope_type") or said.get("type") or "default")
    original = text.get("original_max_position_embeddings")
    parameters = {**({} if original is None else {"original_max_position_embeddings": original}), **said}
    partial = said.get("partial_rotary_factor") or text.get("partial_rotary_factor") or 1.0
    local_theta = None
    if local is not None and dict(local) != dict(said):
        if (other := local.get("rope_type") or local.get("type") or "default") != "default":
            raise UserError(
                f"config.json: rope_parameters.{SLIDING} says rope_type {other!r}, and llama.cpp does not scale layers with a window; "
                "publish as compressed-tensors",
                Reason.UNSUPPORTED_MODEL,
            )
        local_theta = float(local.get("rope_theta") or LOCAL_THETA)
    return Rotary(
        ALIASES.get(kind, kind),
        float(said.get("rope_theta") or theta),
        parameters,
        int(head_dim * partial),
        int(text["max_position_embeddings"]),
        local_theta,
    )
