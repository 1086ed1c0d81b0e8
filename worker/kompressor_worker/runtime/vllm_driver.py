"""Run by vLLM's own Python, as a process of its own: loads one checkpoint and answers what is asked of it, a line of JSON each way.

python -I vllm_driver.py COMMANDS ANSWERS      (numbers of open file descriptors: standard output is vLLM's log)

    {"model": folder, "tokens": longest request, "requests": most at a time, "kvBytes": of cache, "arguments": {}}
        -> {"engine": "vllm 0.32.0", "device": name, or "" for a CPU}
    {"prompts": [[token id]], "generate": n}
        -> {"firstToken": [seconds by request], "seconds": until the last token, "decodeTokens": n, "decodeSeconds": s}
    {"memory": true}
        -> {"peakBytes": of a CPU's memory; of a GPU's what torch has taken at most, "nowBytes": what it holds of that}

or {"error": text}. It imports nothing of the worker, whose libraries vLLM's pins exclude.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before the import: one process, whose memory is all of it, and whose steps are ours
PR_SET_PDEATHSIG = 1


class Served:
    """One checkpoint in vLLM's engine."""

    def __init__(self, asked: dict[str, Any]) -> None:
        from vllm import LLM

        options: dict[str, Any] = {
            "model": asked["model"],
            "skip_tokenizer_init": True,
            "max_model_len": asked["tokens"],
            "max_num_seqs": asked["requests"],
            "enable_prefix_caching": False,  # every round computes its prompts anew
            "kv_cache_memory_bytes": asked["kvBytes"],  # not all that is free, which would be the peak of any model
            "gpu_memory_utilization": 0.05,  # asked for as free memory before it begins, and nothing else where the cache's size is given
        }
        self._engine: Any = LLM(**(options | asked["arguments"])).llm_engine
        self._number = 0

    def measure(self, prompts: list[list[int]], generate: int) -> dict[str, Any]:
        """Requests that come at the same moment. Decoding counts from when each of them has its first token."""
        from vllm import SamplingParams

        greedily = SamplingParams(max_tokens=generate, temperature=0, ignore_eos=True, detokenize=False)
        first: dict[str, float] = {}
        made: dict[str, int] = {}
        began, decoding, behind = time.perf_counter(), 0.0, 0
        for prompt in prompts:
            self._number += 1
            self._engine.add_request(str(self._number), {"prompt_token_ids": prompt}, greedily)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.perf_counter() - began
            for output in outputs:
                made[output.request_id] = len(output.outputs[0].token_ids)
                first.setdefault(output.request_id, now)
            if len(first) == len(prompts) and not decoding:
                decoding, behind = now, sum(made.values())
        seconds = time.perf_counter() - began
        if list(made.values()) != [generate] * len(prompts):
            raise RuntimeError(f"{len(prompts)} requests of {generate} tokens brought {sorted(made.values())}")
        return {
            "firstToken": list(first.values()),
            "seconds": seconds,
            "decodeTokens": sum(made.values()) - behind,
            "decodeSeconds": seconds - decoding,
        }


def loaded(asked: dict[str, Any]) -> tuple[Served, dict[str, Any]]:
    served = Served(asked)
    import torch
    import vllm

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return served, {"engine": f"vllm {vllm.__version__}", "device": device}


def memory() -> dict[str, int]:
    import torch

    if torch.cuda.is_available():
        return {"peakBytes": torch.cuda.max_memory_reserved(), "nowBytes": torch.cuda.memory_reserved()}
    with open("/proc/self/status") as status:  # noqa: PTH123 - VmHWM has no other name in Python
        peak = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:"))
    return {"peakBytes": peak, "nowBytes": 0}


def answered(asked: dict[str, Any], served: list[Served]) -> dict[str, Any]:
    if "model" in asked:
        made, says = loaded(asked)
        served.append(made)
        return says
    return memory() if "memory" in asked else served[0].measure(asked["prompts"], asked["generate"])


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody is left to answer when the worker is killed
    served: list[Served] = []
    with os.fdopen(int(sys.argv[1])) as commands, os.fdopen(int(sys.argv[2]), "w") as answers:
        for line in commands:
            asked = json.loads(line)
            try:
                answer = answered(asked, served)
            except Exception as error:
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)
            if "error" in answer:
                break
    sys.stdout.flush()
    os._exit(0)  # what engines do while they are taken down is nobody's concern


if __name__ == "__main__":
    main()
