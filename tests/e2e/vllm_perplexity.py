"""Run by vLLM's own Python: perplexity of token rows under a checkpoint, as JSON on the last line.

python vllm_perplexity.py MODEL TOKENS.json
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1"
)  # before the import: vLLM reads them then


def main() -> None:
    from vllm import LLM, SamplingParams

    model, tokens = sys.argv[1:]
    rows = json.loads(Path(tokens).read_text())
    llm = LLM(model=model, enforce_eager=True, max_model_len=512)
    outputs = llm.generate([{"prompt_token_ids": row} for row in rows], SamplingParams(prompt_logprobs=0, max_tokens=1, temperature=0))
    total, count = 0.0, 0
    for row, output in zip(rows, outputs, strict=True):
        logprobs = output.prompt_logprobs
        assert logprobs is not None
        for i in range(1, len(row)):
            entry = logprobs[i]
            assert entry is not None
            total -= entry[row[i]].logprob
            count += 1
    print(json.dumps({"perplexity": math.exp(total / count)}))


if __name__ == "__main__":
    main()
