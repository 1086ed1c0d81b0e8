"""Run by the Python that has llama.cpp, as a process of its own: loads one GGUF file and answers what is asked, a line of JSON each way.

python -I llama_cpp_driver.py COMMANDS ANSWERS      (numbers of open file descriptors: standard error is llama.cpp's log)

It speaks as vllm_driver.py does. `arguments` are fields of llama.cpp's `llama_model_params` and `llama_context_params`, such as
{"n_threads": 4}. Requests are put together as llama.cpp's server does: a step has the next token of every request that is being answered,
and as much of the prompts that wait as a batch still holds. It imports nothing of the worker.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from math import ceil
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
PAD = 256
"""Tokens that a sequence's cache comes in."""
WARNING, GOES_ON = 3, 5
"""Of ggml's levels; the second goes on with a line that was begun."""
ON_GPU = (1, 2)
"""Types of ggml's devices: of its own memory, and integrated."""


class Refused(Exception):
    """What llama.cpp does not do; its log says why."""


class Request:
    """A sequence: what of it llama.cpp has yet to see, and what came of it."""

    def __init__(self, prompt: list[int]) -> None:
        self.waiting, self.seen, self.made = list(prompt), 0, 0
        self.first = 0.0


class Served:
    """One GGUF file in llama.cpp."""

    def __init__(self, asked: dict[str, Any]) -> None:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
        from llama_cpp_py_sync._version import __llama_cpp_tag__ as tag

        self._ffi, self._lib = get_ffi(), get_lib()
        self._log = log_of(self._ffi)
        self._lib.llama_log_set(self._log, self._ffi.NULL)
        self._lib.llama_backend_init()
        of_model, of_context = self._lib.llama_model_default_params(), self._lib.llama_context_default_params()
        of_model.load_mode = self._lib.LLAMA_LOAD_MODE_NONE  # mapped, what is repacked for this processor would count twice
        of_context.n_seq_max = asked["requests"]
        of_context.n_ctx = asked["requests"] * PAD * ceil(asked["tokens"] / PAD)
        of_context.n_batch = max(of_context.n_batch, asked["requests"])
        of_context.swa_full = False  # of a sliding window is kept what is seen, as llama.cpp's server does
        of_context.n_threads = of_context.n_threads_batch = threads()
        self._lay_over(asked["arguments"], of_model, of_context)
        file = min(Path(asked["model"]).glob("*.gguf"))  # of splits the first, which names how many there are
        self._model = self._lib.llama_model_load_from_file(str(file).encode(), of_model)
        if self._model == self._ffi.NULL:
            raise Refused(f"llama.cpp does not load {file.name}")
        self._context = self._lib.llama_init_from_model(self._model, of_context)
        if self._context == self._ffi.NULL:
            raise Refused(f"llama.cpp makes no context of {of_context.n_ctx} tokens")
        self._room = of_context.n_batch
        self._batch = self._lib.llama_batch_init(self._room, 0, 1)
        self._greedily = self._lib.llama_sampler_init_greedy()
        self.device = gpu() if of_model.n_gpu_layers else ""
        self.version = str(tag)

    def _lay_over(self, arguments: dict[str, Any], *params: Any) -> None:
        for name, value in arguments.items():
            named = [each for each in params if hasattr(each, name)]
            if not named:
                raise Refused(f"KOMPRESSOR_ENGINE_ARGUMENTS: {name} is no field of llama_model_params or llama_context_params")
            setattr(named[0], name, value)

    def measure(self, prompts: list[list[int]], generate: int) -> dict[str, Any]:
        """Requests that come at the same moment. Decoding counts from when each of them has its first token."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        requests = [Request(prompt) for prompt in prompts]
        began, decoding, behind = time.perf_counter(), 0.0, 0
        while live := [one for one in requests if one.made < generate]:
            self._step(requests, live)
            now = time.perf_counter() - began
            for one in live:
                one.first = one.first or (now if one.made else 0.0)
            if not decoding and all(one.made for one in requests):
                decoding, behind = now, sum(one.made for one in requests)
        seconds = time.perf_counter() - began
        return {
            "firstToken": [one.first for one in requests],
            "seconds": seconds,
            "decodeTokens": sum(one.made for one in requests) - behind,
            "decodeSeconds": seconds - decoding,
        }

    def _step(self, requests: list[Request], live: list[Request]) -> None:
        """One batch through the model: a token more for each request that is in it to its end."""
        batch, ends = self._batch, dict[int, Request]()
        batch.n_tokens = 0
        for one in sorted(live, key=lambda one: not one.made):
            taken = one.waiting[: self._room - batch.n_tokens]
            del one.waiting[: len(taken)]
            for token in taken:
                row = batch.n_tokens
                batch.token[row], batch.pos[row], batch.logits[row] = token, one.seen, False
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, requests.index(one)
                one.seen += 1
                batch.n_tokens += 1
            if taken and not one.waiting:
                batch.logits[batch.n_tokens - 1] = True
                ends[batch.n_tokens - 1] = one
        if code := self._lib.llama_decode(self._context, batch):
            raise Refused(f"llama_decode of {batch.n_tokens} tokens says {code}")
        for row, one in ends.items():
            one.waiting = [self._lib.llama_sampler_sample(self._greedily, self._context, row)]
            one.made += 1


def log_of(ffi: Any) -> Any:
    """What llama.cpp warns of, without what it says of every tensor. Has to be kept for as long as it is called."""
    last = 0

    @ffi.callback("void(enum ggml_log_level, const char *, void *)")  # type: ignore[untyped-decorator]
    def say(level: int, text: Any, _: Any) -> None:
        nonlocal last
        last = last if level == GOES_ON else level
        if last >= WARNING:
            sys.stderr.buffer.write(ffi.string(text))
            sys.stderr.flush()

    return say


def threads(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: those that it may run on, and no more than its container's share of time."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return max(1, min(cores, ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such controller, or `max`
        return cores


def gpu() -> str:
    """What the first one calls itself; empty: this build of llama.cpp finds none."""
    from llama_cpp_py_sync._cffi_bindings import get_backend_base_lib, get_backend_lib, get_ffi

    registry, base = get_backend_lib(), get_backend_base_lib()
    devices = [registry.ggml_backend_dev_get(i) for i in range(registry.ggml_backend_dev_count())]
    found = [one for one in devices if base.ggml_backend_dev_type(one) in ON_GPU]
    return str(get_ffi().string(base.ggml_backend_dev_description(found[0])).decode()) if found else ""


def memory(device: str) -> dict[str, int]:
    """All that llama.cpp takes of a GPU is there once it has loaded, and seen from outside."""
    if device:
        return {"peakBytes": 0, "nowBytes": 0}
    status = Path("/proc/self/status").read_text()
    return {"peakBytes": next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:")), "nowBytes": 0}


def answered(asked: dict[str, Any], served: list[Served]) -> dict[str, Any]:
    if "model" in asked:
        served.append(Served(asked))
        return {"engine": f"llama.cpp {served[0].version}", "device": served[0].device}
    return memory(served[0].device) if "memory" in asked else served[0].measure(asked["prompts"], asked["generate"])


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody is left to answer when the worker is killed
    served: list[Served] = []
    with os.fdopen(int(sys.argv[1])) as commands, os.fdopen(int(sys.argv[2]), "w") as answers:
        for line in commands:
            asked = json.loads(line)
            try:
                answer = answered(asked, served)
            except Exception as error:
                if not isinstance(error, Refused):
                    traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)
            if "error" in answer:
                break
    sys.stderr.flush()
    os._exit(0)  # what engines do while they are taken down is nobody's concern


if __name__ == "__main__":
    main()
