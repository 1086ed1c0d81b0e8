"""llama.cpp's named mixes: the same type for every tensor as its own quantiser chooses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy
import pytest

from kompressor_worker.formats.gguf_mixes import MIXES, types_of
from kompressor_worker.layout import LinearLayout
from kompressor_worker.passes.gptq import GptqParams
from kompressor_worker.passes.rtn import RtnParams

QUANTIZER = Path(__file__).parents[1] / "llama_quantize.py"
LAYERS, HIDDEN, FFN, VOCABULARY = 16, 256, 256, 64
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "ffn_gate_exps": "mlp.experts.0.gate_proj", "ffn_up_exps": "mlp.experts.0.up_proj", "ffn_down_exps": "mlp.experts.0.down_proj",
}  # fmt: skip
MODELS = {"tied": (0, True, 4), "untied": (0, False, 1), "eight experts": (8, False, 2), "sixteen experts": (16, False, 4)}
"""Experts, whether the embeddings are the head, query heads that share a KV head."""


def write(path: Path, experts: int, tied: bool, share: int) -> None:
    """A model of zeros, as llama.cpp's converter names its tensors."""
    writer = gguf.GGUFWriter(path, "qwen3moe" if experts else "llama")
    for add, value in (
        (writer.add_block_count, LAYERS), (writer.add_context_length, 128), (writer.add_embedding_length, HIDDEN),
        (writer.add_feed_forward_length, FFN), (writer.add_head_count, 8), (writer.add_head_count_kv, 8 // share),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_vocab_size, VOCABULARY),
    ):  # fmt: skip
        add(value)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(FFN)
    for name, shape in shapes(experts, tied, share):
        writer.add_tensor(name, numpy.zeros(shape, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def shapes(experts: int, tied: bool, share: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "token_embd.weight", (VOCABULARY, HIDDEN)
    if not tied:
        yield "output.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        for name in NAMES:
            if name.startswith("attn_"):
                yield f"blk.{layer}.{name}.weight", (HIDDEN // share if name[-1] in "kv" else HIDDEN, HIDDEN)
            elif name.endswith("_exps") == bool(experts):
                yield f"blk.{layer}.{name}.weight", ((experts,) if experts else ()) + (FFN, HIDDEN)


@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_gets_the_type_that_llama_cpp_gives_it(model: str, tmp_path: Path) -> None:
    experts, tied, share = MODELS[model]
    write(tmp_path / "model.gguf", experts, tied, share)
    config: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8 // share, "num_experts": experts}
    linears = {name: linear(name) for name, _ in shapes(experts, tied, share)}
    asked = [mix for mix in MIXES if mix not in ("Q3_K", "Q4_K", "Q5_K", "MXFP4")]  # ours alone
    script = f"import sys; sys.path.insert(0, {str(QUANTIZER.parent)!r}); from llama_quantize import quantize; from pathlib import Path\n"
    script += f"for mix in {asked!r}: quantize(Path('model.gguf'), Path(mix + '.gguf'), mix, None, False, 1)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for mix in asked:
        theirs = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / f"{mix}.gguf").tensors}
        ours = types_of(MIXES[mix], linears.values(), config, tied, LAYERS)
        assert {name: ours[x.name] for name, x in linears.items()} == {name: theirs[name] for name in linears}, mix


def linear(name: str) -> LinearLayout:
    stem = name.removesuffix(".weight")
    if stem in ("token_embd", "output"):
        return LinearLayout(stem, (VOCABULARY, HIDDEN), "BF16", "embedding" if stem == "token_embd" else "head")
    _, layer, part = stem.split(".")
    return LinearLayout(f"model.layers.{layer}.{NAMES[part]}", (HIDDEN, HIDDEN), "BF16")


def test_every_mix_can_be_asked_for() -> None:
    rtn, gptq = (set(get_args(params.model_fields["scheme"].annotation)) for params in (RtnParams, GptqParams))
    assert set(MIXES) <= rtn
    assert set(MIXES) - gptq == {"F16", "BF16", "MXFP4", "MXFP4_MOE"}, "levels that are no even steps"
