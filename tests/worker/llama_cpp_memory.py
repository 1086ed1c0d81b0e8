"""What llama.cpp itself says that it takes: it loads a file of the right shapes that holds nothing, and allocates nothing (`no_alloc`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy

ARCHITECTURES = {"llama": "llama", "mixtral": "llama", "gemma3_text": "gemma3"}
SIZE = re.compile(r"(KV|compute|output) buffer size = +([\d.]+) MiB|llama_kv_cache: size = +([\d.]+) MiB")


def write_shapes(path: Path, config: Mapping[str, Any]) -> Path:
    """A GGUF file of a model of this config.json, all matrices in F16, with a hole where its data would be."""
    arch, hidden, width = ARCHITECTURES[config["model_type"]], config["hidden_size"], config["intermediate_size"]
    heads, kv, layers, vocabulary = (
        config[key] for key in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "vocab_size")
    )
    size, experts = config.get("head_dim") or hidden // heads, config.get("num_local_experts", 0)
    file = gguf.GGUFWriter(path, arch)
    file.add_tokenizer_model("no_vocab")
    file.add_vocab_size(vocabulary)
    file.add_block_count(layers)
    file.add_context_length(config["max_position_embeddings"])
    file.add_embedding_length(hidden)
    file.add_feed_forward_length(width)
    file.add_head_count(heads)
    file.add_head_count_kv(kv)
    file.add_key_length(size)
    file.add_value_length(size)
    file.add_layer_norm_rms_eps(1e-5)
    if experts:
        file.add_expert_count(experts)
        file.add_expert_used_count(config["num_experts_per_tok"])
    if window := config.get("sliding_window"):
        file.add_sliding_window(window)

    def tensor(name: str, *shape: int) -> None:
        kind = numpy.dtype(numpy.float32 if len(shape) == 1 else numpy.float16)
        file.add_tensor_info(f"{name}.weight", shape, kind, int(numpy.prod(shape)) * kind.itemsize)

    tensor("token_embd", vocabulary, hidden)
    tensor("output_norm", hidden)
    if not config.get("tie_word_embeddings"):
        tensor("output", vocabulary, hidden)
    for i in range(layers):
        norms = ["attn_norm", "ffn_norm", *(["post_attention_norm", "post_ffw_norm"] if arch == "gemma3" else [])]
        for name in norms:
            tensor(f"blk.{i}.{name}", hidden)
        for name in ("attn_q_norm", "attn_k_norm") if arch == "gemma3" else ():
            tensor(f"blk.{i}.{name}", size)
        for name, rows, columns in (("q", heads * size, hidden), ("k", kv * size, hidden), ("v", kv * size, hidden)):
            tensor(f"blk.{i}.attn_{name}", rows, columns)
        tensor(f"blk.{i}.attn_output", hidden, heads * size)
        if experts:
            tensor(f"blk.{i}.ffn_gate_inp", experts, hidden)
        stack, of = ((experts,), "_exps") if experts else ((), "")
        for name, rows, columns in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
            tensor(f"blk.{i}.ffn_{name}{of}", *stack, rows, columns)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_ti_data_to_file()
    assert file.fout is not None
    end = file.fout[0].tell()
    data = sum(-(-info.nbytes // 32) * 32 for info in file.tensors[0].values())
    file.fout[0].truncate(-(-end // 32) * 32 + data)
    file.close()
    return path


def asked_for(path: Path, context: int, requests: int) -> dict[str, int]:
    """Bytes: kv, compute (with the output's buffer), of requests of that context at a time. Raises RuntimeError."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, library, said = get_ffi(), get_lib(), list[str]()

    @ffi.callback("void(enum ggml_log_level, const char *, void *)")  # type: ignore[untyped-decorator]
    def hear(_level: int, text: Any, _: Any) -> None:
        said.append(ffi.string(text).decode())

    library.llama_log_set(hear, ffi.NULL)
    try:
        of_model, of_context = library.llama_model_default_params(), library.llama_context_default_params()
        of_model.no_alloc, of_model.load_mode = True, library.LLAMA_LOAD_MODE_NONE
        model = library.llama_model_load_from_file(str(path).encode(), of_model)
        if model == ffi.NULL:
            raise RuntimeError("".join(said)[-1000:])
        of_context.n_ctx, of_context.n_seq_max, of_context.swa_full = context * requests, requests, False
        made = library.llama_init_from_model(model, of_context)
        if made == ffi.NULL:
            raise RuntimeError("".join(said)[-1000:])
        library.llama_free(made)
        library.llama_model_free(model)
    finally:
        library.llama_log_set(ffi.NULL, ffi.NULL)
    found = {"kv": 0.0, "compute": 0.0}
    for kind, buffer, cells in SIZE.findall("".join(said)):
        if cells:
            found["kv"] += float(cells)
        elif kind != "KV":  # nothing: it is not allocated
            found["compute"] += float(buffer)
    return {name: round(mib * 2**20) for name, mib in found.items()}
