"""What a model takes of a GPU's or a device's memory while it is served there, and how fast a roofline says that it is. Headers only, no
torch.

Memory is what the engine asks for: weights as planned to the byte; the KV cache of all requests at their full context, in 16 bits and in
blocks (vLLM: of 16 tokens, llama.cpp: of 256), of a sliding window what it keeps while a chunk of a prompt is on its way; the activations
of the largest step of a prefill, and logits; and an assumed overhead. What is left free of a GPU on purpose is what vLLM leaves by default
(`gpu_memory_utilization` 0.92); of a device, what its system keeps.

At decode each step reads all weights once for all requests (of experts, those that so many tokens are expected to be routed to) and each
request's cache. Steps a second are bandwidth over bytes, or arithmetic where that takes longer (Williams et al. 2009, "Roofline"). No
kernel reaches that: it is a prediction that compares plans, not a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from kompressor_api.hardware import ENGINES, Engine, Hardware
from kompressor_worker.architectures import FAMILIES, text_config
from kompressor_worker.assignment import Assignment
from kompressor_worker.estimate import is_block, steps_of, top_k
from kompressor_worker.formats.gguf_architectures import decoder_of
from kompressor_worker.layout import ModelLayout
from kompressor_worker.structure import operations
from kompressor_worker.windows import SWITCHED, windows_of

ELEMENT = 2
"""Bytes of what flows, and of keys and values that are left as they are: engines serve in 16 bits. What flows through llama.cpp has twice
as many."""
FLOWS = 5
"""Hidden states of a token that are there at once in llama.cpp."""
LARGE = ((160 << 30, 16384), (70 << 30, 8192))
"""Memory from which on vLLM takes so many tokens into a step of prefill."""


@dataclass(frozen=True)
class Need:
    """Bytes of memory."""

    weights: int
    kv: int
    activations: int
    overhead: int
    reserve: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.activations + self.overhead + self.reserve


@dataclass(frozen=True)
class Speed:
    bytes_per_token: int
    """Read for each token that is made, the weights' share of a request included."""
    tokens_per_second: float
    """Of all requests together."""

    def cost_per_million(self, price_per_hour: float) -> float:
        return price_per_hour / (3600 * self.tokens_per_second) * 1e6


@dataclass(frozen=True)
class Cache:
    """What attention layers of one kind keep."""

    width: int
    """Bytes a token, of all these layers."""
    window: int | None
    """Tokens that they look back; None: all."""

    def tokens(self, context: int, batch: int, engine: Engine) -> int:
        """Of a request, that there is room for. `batch`: tokens of a step of prefill."""
        block = engine.kv_block
        if self.window is None or self.window + batch > context:
            return block * ceil(context / block)
        return block * (ceil((self.window - 1 + batch) / block) + engine.spare_blocks)

    def held(self, context: int, batch: int, engine: Engine) -> int:
        """Bytes of a request."""
        return self.width * self.tokens(context, batch, engine)

    def read(self, context: int) -> int:
        return self.width * (context if self.window is None else min(self.window, context))


@dataclass(frozen=True)
class Served:
    """A plan's result as an engine runs it."""

    weights: int
    dense: int
    """Bytes that every step reads, whatever it is routed to."""
    experts: tuple[tuple[int, float], ...]
    """By layer: bytes of its experts, and the share of them that one token is routed to."""
    caches: tuple[Cache, ...]
    step: int
    """Bytes of a token on its way through the largest step."""
    hidden: int
    made: int
    """Numbers that the step with the most of them makes of a token."""
    vocabulary: int
    operations: float
    """Multiply-adds a token."""
    low: bool
    """Whether products are of 8 or 4 bits on both sides."""

    @classmethod
    def of(cls, assigned: Assignment) -> Served:
        layout = assigned.layout
        config = text_config(layout.config)
        stays = [replace(unit, stages=tuple(s for s in unit.stages if not s.dropped)) for unit in layout.units if not unit.dropped]
        rows, dense, experts = 0, sum(t.stop - t.start for t, _ in assigned.plan.constants), []
        sizes = {
            stage.name: sum(t.stop - t.start for t in placed)
            for unit, stages in zip(layout.units, assigned.plan.stages, strict=True)
            for stage, placed in zip(unit.stages, stages, strict=True)
        }
        for unit in stays:
            routed = 0
            for stage in unit.stages:
                size = sizes[stage.name]
                if is_expert(stage.name):
                    routed += size
                elif any(x.kind == "embedding" for x in stage.linears):
                    rows += size
                else:
                    dense += size
            if routed:
                count = sum(x.shape[0] for stage in unit.stages for x in stage.linears if x.kind == "router")
                experts.append((routed, min(1.0, top_k(layout) / max(1, count))))
        steps = [step for unit in stays if is_block(unit) for step in steps_of(unit, layout)]
        made = [sum(s.share * sum(x.shape[0] for x in s.linears) for s in step) for step in steps]
        flowing = [out + sum(s.share * s.columns for s in step) for out, step in zip(made, steps, strict=True)]
        hidden = int(config.get("hidden_size") or 0)
        inputs = [scheme.inputs for scheme in assigned.schemes.values()]
        return cls(
            weights=rows + dense + sum(size for size, _ in experts),
            dense=dense + (rows if layout.tied_embeddings else 0),  # of embeddings alone a step reads a row a token
            experts=tuple(experts),
            caches=caches(layout),
            step=round(ELEMENT * (2 * hidden + max(flowing, default=0.0))),
            hidden=hidden,
            made=round(max(made, default=0.0)),
            vocabulary=int(config.get("vocab_size") or 0),
            operations=operations(stays, config),
            low=bool(inputs) and all(kind != "none" for kind in inputs),
        )

    def with_small_cache(self, scales: int) -> Served:
        """With keys and values in one byte each; `scales`: bytes of their scales."""
        caches = tuple(replace(cache, width=cache.width // ELEMENT) for cache in self.caches)
        return replace(self, weights=self.weights + scales, dense=self.dense + scales, caches=caches)

    def at_least(self, weights: int) -> Served:
        """With so many bytes of weights, if it has fewer: those that a survey may yet come to."""
        more = max(0, weights - self.weights)
        return replace(self, weights=self.weights + more, dense=self.dense + more) if more else self

    def need(self, on: Hardware, context: int, requests: int) -> Need:
        batch, engine = batch_tokens(on), ENGINES[on.engine]
        return Need(
            weights=self.weights,
            kv=requests * sum(cache.held(context, batch, engine) for cache in self.caches),
            activations=self.activations(on, context, requests),
            overhead=engine.overhead,
            reserve=on.reserve,
        )

    def activations(self, on: Hardware, context: int, requests: int) -> int:
        """Of the largest step of a prefill, and logits. llama.cpp has room for those of each token of a step, computes in fp32 (a gate,
        what it lets through and their product at once), and keeps a mask for each kind of cache."""
        batch, engine = batch_tokens(on), ENGINES[on.engine]
        if on.engine == "vllm":
            return batch * self.step + 2 * 4 * requests * self.vocabulary
        flows = FLOWS * self.hidden + max(self.vocabulary, 3 * self.made // 2)
        masks = sum(cache.tokens(context, batch, engine) for cache in self.caches)
        return 4 * (batch * flows + requests * self.vocabulary) + 2 * batch * masks

    def fits(self, on: Hardware, context: int, requests: int) -> bool:
        return self.need(on, context, requests).total <= on.memory

    def speed(self, on: Hardware, context: int, requests: int) -> Speed:
        """With every request at its full context, where it is slowest."""
        weights = self.dense + sum(size * (1 - (1 - share) ** requests) for size, share in self.experts)
        read = weights + requests * sum(cache.read(context) for cache in self.caches)
        rate = on.fp8 if self.low and on.fp8 else on.fp16
        seconds = max(read / on.bandwidth, 2 * self.operations * requests / rate if rate else 0.0)
        return Speed(round(read / requests), requests / seconds)

    def longest(self, on: Hardware, requests: int, most: int) -> int:
        """The longest context that fits, `most` at most; 0: none does."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits(on, middle, requests) else (low, middle - 1)
        return low

    def most_requests(self, on: Hardware, context: int, most: int) -> int:
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits(on, context, middle) else (low, middle - 1)
        return low


def batch_tokens(on: Hardware) -> int:
    if on.engine != "vllm":
        return ENGINES[on.engine].batch_tokens
    return next((tokens for memory, tokens in LARGE if on.memory >= memory), ENGINES[on.engine].batch_tokens)


def is_expert(stage: str) -> bool:
    """Of a routed expert, or of all of a layer's in a stack."""
    return ".experts." in stage


def caches(layout: ModelLayout) -> tuple[Cache, ...]:
    """The layers' caches, those of one window together."""
    config = {**(FAMILIES[layout.family].defaults if layout.family else {}), **text_config(layout.config)}
    element = 1 if layout.kv_cache is not None else ELEMENT
    width = cached_values(config) * element
    found: dict[int | None, int] = {}
    layers = int(config.get("num_hidden_layers") or 0)
    for window in kept_windows(layout, layers):
        found[window] = found.get(window, 0) + width
    return tuple(Cache(size, window) for window, size in found.items())


def cached_values(config: Mapping[str, Any]) -> int:
    """Numbers that a layer keeps of a token: keys and values of its KV heads, or one latent vector (multi-head latent attention)."""
    if latent := config.get("kv_lora_rank"):
        return int(latent) + int(config.get("qk_rope_head_dim") or 0)
    heads = int(config.get("num_attention_heads") or 0)
    size = int(config.get("head_dim") or (int(config.get("hidden_size") or 0) // heads if heads else 0))
    return 2 * size * int(config.get("num_key_value_heads") or heads)


def kept_windows(layout: ModelLayout, layers: int) -> tuple[int | None, ...]:
    """By layer, what of a sequence the engine keeps. Classes that drop a source's windows without a word (vLLM's Qwen2 and Qwen3) keep all;
    where windows come from us the result is published so that they are kept to. llama.cpp keeps to what the file says."""
    dropped = text_config(layout.config).get("model_type") in SWITCHED and not layout.windowed
    if layout.file_format == "gguf":
        return decoder_of(layout).windows
    if layout.family is None or dropped:
        return (None,) * layers
    return windows_of(layout.config, FAMILIES[layout.family], layers)
