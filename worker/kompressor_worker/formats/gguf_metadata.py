"""GGUF's metadata: what config.json says, under llama.cpp's keys.

They are put together by the `gguf` library, without a file.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kompressor_worker.formats.gguf_architectures import NO_SINK, Decoder, decoder_of, period_of
from kompressor_worker.formats.gguf_tokenizer import TokenizerMetadata
from kompressor_worker.layout import ModelLayout

if TYPE_CHECKING:
    from kompressor_worker.formats.gguf_names import Names

__all__ = ["Metadata", "metadata_of"]

PHI = re.compile("phi-?3", re.IGNORECASE)


@dataclass(frozen=True)
class Metadata:
    """Of a file, and what in it no weight of the source makes."""

    decoder: Decoder
    values: Mapping[str, Any]
    """The library's GGUFValue by key."""
    warnings: tuple[str, ...] = ()
    """What is not what it was, for the user to know."""

    @cached_property
    def packed(self) -> bytes:
        """As a file has them; a vocabulary takes the library seconds, and a plan is made more than once."""
        import gguf

        writer, buffer = gguf.GGUFWriter(None, ""), io.BytesIO()
        out: io.BufferedWriter = io.BufferedWriter(buffer)
        writer.fout, writer.kv_data, writer.state = [out], [dict(self.values)], gguf.gguf_writer.WriterState.HEADER
        writer.write_kv_data_to_file()
        out.flush()
        return buffer.getvalue()

    def constants(self, names: Names) -> dict[str, dict[str, list[float]]]:
        """By unit (embeddings, layers.0), the values (F32) of tensors that are known already, by their names in the file."""
        d = self.decoder
        found = {"embeddings": {names.constant(tensor): values for tensor, values in d.rotary.factors().items()}}
        if d.architecture.sinks:
            for layer in range(d.layers):
                found[f"layers.{layer}"] = {names.constant("ATTN_SINKS", layer): [NO_SINK] * d.heads}
        return found


def metadata_of(layout: ModelLayout, tokenizer: TokenizerMetadata, name: str, file_type: int | None = None) -> Metadata:
    """`name`: of the model. `file_type`: the library's LlamaFileType of the mix. Raises UserError for a decoder that llama.cpp does not
    compute."""
    import gguf

    d = decoder_of(layout)
    text, writer = d.text, gguf.GGUFWriter(None, d.architecture.name)
    writer.add_type("model")
    writer.add_name(_name(name, tokenizer.strips))
    if file_type is not None:
        writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(d.context)
    writer.add_embedding_length(int(text["hidden_size"]))
    writer.add_block_count(d.layers)
    writer.add_feed_forward_length(int(text["intermediate_size"]))
    writer.add_head_count(d.heads)
    writer.add_head_count_kv(d.kv_heads)
    writer.add_key_length(d.head_dim)
    writer.add_value_length(d.head_dim)
    writer.add_layer_norm_rms_eps(float(text["rms_norm_eps"]))
    writer.add_vocab_size(int(text["vocab_size"]))
    _add_rotary(writer, d)
    _add_attention(writer, d)
    if d.experts:
        writer.add_expert_count(d.experts)
        writer.add_expert_used_count(int(text["num_experts_per_tok"]))
        if (width := text.get("moe_intermediate_size")) is not None:
            writer.add_expert_feed_forward_length(int(width))
    for key, value in d.architecture.keys.items():
        writer.add_float32(f"{d.architecture.name}.{key}", value)
    return Metadata(d, {**writer.kv_data[0], **tokenizer.values}, (*d.warnings, *tokenizer.warnings))


def _name(name: str, strips: bool) -> str:
    """llama.cpp takes a model by this name for one whose special tokens take the whitespace behind them."""
    if strips:
        return name if PHI.search(name) else f"{name} (Phi-3)"
    return PHI.sub("phi 3", name)


def _add_rotary(writer: Any, d: Decoder) -> None:
    import gguf

    for name, value in d.rotary.keys().items():
        key = getattr(gguf.Keys.Rope, name).format(arch=d.architecture.name)
        if isinstance(value, str):
            writer.add_string(key, value)
        elif name in ("DIMENSION_COUNT", "SCALING_ORIG_CTX_LEN"):
            writer.add_uint32(key, int(value))
        else:
            writer.add_float32(key, float(value))


def _add_attention(writer: Any, d: Decoder) -> None:
    a = d.architecture
    window = next((window for window in d.windows if window is not None), None)
    if window is not None:
        writer.add_sliding_window(window)
    if a.windows == "layers":
        writer.add_array(f"{a.name}.attention.sliding_window_pattern", [w is not None for w in d.windows])
    elif a.windows == "period":
        period = period_of(d.windows)
        assert period is not None
        writer.add_uint32(f"{a.name}.attention.sliding_window_pattern", period)
    if "attn_logit_softcapping" in a.caps:
        writer.add_attn_logit_softcapping(float(d.text["attn_logit_softcapping"]))
    if d.text.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(float(d.text["final_logit_softcapping"]))
