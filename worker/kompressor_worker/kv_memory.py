"""What a KV cache takes, before and after: from config.json and the layout alone. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kompressor_worker.architectures import FAMILIES, text_config
from kompressor_worker.layout import DTYPE_BYTES, ModelLayout
from kompressor_worker.passes import Pass
from kompressor_worker.passes.hybrid_attention import HybridAttention
from kompressor_worker.windows import kept_tokens, windows_of


@dataclass(frozen=True)
class KvMemory:
    """Of one sequence, in a runtime that keeps no more than a window where there is one. Blocks of pages that are half full come on top."""

    windows: tuple[int | None, ...]
    """By layer; None: all before is kept."""
    token: int
    """Bytes of one token in one layer: keys and values."""

    @classmethod
    def of(cls, layout: ModelLayout, config: Mapping[str, Any], fp8: bool = False) -> KvMemory:
        """By `config`: the source's, or the result's."""
        family = FAMILIES[layout.family or ""]
        text = {**family.defaults, **text_config(config)}
        heads = int(text["num_attention_heads"])
        size = int(text.get("head_dim") or int(text["hidden_size"]) // heads)
        number = 1 if fp8 else DTYPE_BYTES[layout.dtype]
        token = 2 * int(text.get("num_key_value_heads") or heads) * size * number
        return cls(windows_of(config, family, int(text["num_hidden_layers"])), token)

    def tokens(self, context: int) -> int:
        """Held in all layers together."""
        return kept_tokens(self.windows, context)

    def total(self, context: int) -> int:
        """Bytes."""
        return self.token * self.tokens(context)


def kv_change(layout: ModelLayout, passes: Sequence[Pass]) -> dict[str, Any]:
    """What plan and report say, [before, after] each; empty where no pass makes the cache smaller, or config.json does not say of what size
    it is."""
    text = text_config(layout.config)
    context = next((p.context for p in passes if isinstance(p, HybridAttention)), text.get("max_position_embeddings"))
    if not (layout.windowed or layout.kv_cache is not None) or type(context) is not int or "num_attention_heads" not in text:
        return {}
    both = (KvMemory.of(layout, layout.source_config), KvMemory.of(layout, layout.config, layout.kv_cache is not None))
    return {
        "context": context,
        "bytes": [one.total(context) for one in both],
        "bytesPerToken": [round(one.total(context) / context) for one in both],
        "fullLayers": [sum(window is None for window in one.windows) for one in both],
    }


def kv_status(change: Mapping[str, Any]) -> dict[str, Any]:
    """As `status.plan` and `status.result` have it."""
    if not change:
        return {}
    before, after = change["bytesPerToken"]
    return {"kvContext": change["context"], "kvBytesPerTokenBefore": before, "kvBytesPerTokenAfter": after}


def section(layout: ModelLayout, passes: Sequence[Pass]) -> dict[str, Any]:
    """The report's: the cache, and which layers keep full attention and why."""
    change = kv_change(layout, passes)
    chosen = next((p.chosen() for p in passes if isinstance(p, HybridAttention)), None)
    return {**({"kvCache": change} if change else {}), **({"windows": chosen} if chosen else {})}
