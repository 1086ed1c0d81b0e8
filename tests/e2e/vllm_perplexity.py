"""Run by vLLM's own Python: perplexity of token rows under checkpoints, one after the other in one process, which starts slowly; and how
the first of them go on.

python vllm_perplexity.py ROWS.json OUT.json [DTYPE]

ROWS: {folder: [[token id]]}; OUT: {folder: {perplexity, losses, generated}, or an error's text}; DTYPE: such as float32.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1"
)  # before the import: vLLM reads them then


PROMPTS, PROMPT, TOKENS = 4, 32, 24
"""So many rows' first PROMPT tokens are continued, greedily, by so many."""


def seen(model: str, rows: list[list[int]], dtype: str) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model, enforce_eager=True, max_model_len=512, dtype=dtype, skip_tokenizer_init=not Path(model, "tokenizer.json").exists()
    )
    prompts: list[Any] = [{"prompt_token_ids": row[:PROMPT]} for row in rows[:PROMPTS]]
    greedily = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, detokenize=False)
    generated = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, greedily, use_tqdm=False)]
    found = losses(llm, rows)
    each = [loss for row in found for loss in row]
    return {"perplexity": math.exp(sum(each) / len(each)), "losses": found, "generated": generated}


def losses(llm: Any, rows: list[list[int]]) -> list[list[float]]:
    """Negative log-likelihood of each token but the first."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": row} for row in rows],
        SamplingParams(prompt_logprobs=0, max_tokens=1, temperature=0, detokenize=False),
        use_tqdm=False,
    )
    found: list[list[float]] = []
    for row, output in zip(rows, outputs, strict=True):
        logprobs = output.prompt_logprobs
        assert logprobs is not None
        found.append([])
        for i in range(1, len(row)):
            entry = logprobs[i]
            assert entry is not None
            found[-1].append(-entry[row[i]].logprob)
    return found


def make_static_fp8_run() -> None:
    """vLLM's CPU build (0.32) loads nobody's FP8 weights with one scale and static inputs: two operations it calls for them exist on GPUs
    only. Here one is written out in torch, and the other, which fuses SiLU with rounding, is left out: vLLM then does these apart.

    The first rounds every weight again as it is loaded, to the largest scale of what vLLM fuses; ours have one there, so no code changes.
    """
    import torch
    from vllm import _custom_ops
    from vllm.model_executor.layers.fusion import fused_act_quant

    def scaled_fp8_quant(values: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (values.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    if not torch.ops._C.static_scaled_fp8_quant.default._schema.arguments:  # declared, for the CPU, without any
        _custom_ops.scaled_fp8_quant = scaled_fp8_quant
    if not hasattr(torch.ops._C, "silu_and_mul_quant"):
        fused_act_quant._FUSED_ACT_QUANT.clear()


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    make_static_fp8_run()
    wanted, out = map(Path, sys.argv[1:3])
    dtype = sys.argv[3] if len(sys.argv) > 3 else "auto"
    found: dict[str, dict[str, Any] | str] = {}
    for model, rows in json.loads(wanted.read_text()).items():
        try:
            found[model] = seen(model, rows, dtype)
        except Exception:  # the others are measured all the same
            found[model] = traceback.format_exc()
        gc.collect()
        cleanup_dist_env_and_memory()
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
