"""llama.cpp, as a process: tokens and logits of GGUF files. `python tests/llama_cpp_logits.py REQUESTS.json ANSWERS`.

REQUESTS.json: a list of {"model": file, "texts": [...], "tokens": [...]}. ANSWERS/0.json has the token ids of each text of the first
request ("ids"), ANSWERS/0.npy the logits [tokens, vocabulary] (fp32) after each of its tokens. Keys and values are cached in fp32,
attention is not fused, one thread: what differs from transformers' arithmetic is the order of sums, and GELU by a table of halves.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(requests: Path, answers: Path) -> None:
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, library = get_ffi(), get_lib()
    said: list[str] = []
    log = ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda level, text, _: said.append(ffi.string(text).decode()))
    library.llama_log_set(log, ffi.NULL)
    library.llama_backend_init()
    for number, request in enumerate(json.loads(requests.read_text())):
        params = library.llama_model_default_params()
        params.vocab_only = not request.get("tokens")
        model = library.llama_model_load_from_file(request["model"].encode(), params)
        if model == ffi.NULL:
            raise SystemExit(f"{request['model']}: llama.cpp does not load it:\n" + "".join(said[-20:]))
        vocabulary = library.llama_model_get_vocab(model)
        ids = [tokenized(ffi, library, vocabulary, text) for text in request.get("texts", ())]
        (answers / f"{number}.json").write_text(json.dumps({"ids": ids}))
        if tokens := request.get("tokens"):
            save(answers / f"{number}.npy", logits(ffi, library, model, tokens))
        library.llama_model_free(model)


def tokenized(ffi: Any, library: Any, vocabulary: Any, text: str) -> list[int]:
    """Of a text with special tokens in it, and those that the tokenizer adds."""
    data = text.encode()
    room = 2 * len(data) + 8
    ids = ffi.new("llama_token[]", room)
    count = library.llama_tokenize(vocabulary, data, len(data), ids, room, True, True)
    return list(ids[0:count])


def logits(ffi: Any, library: Any, model: Any, tokens: list[int]) -> Any:
    import numpy

    params = library.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(256, len(tokens))
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = library.GGML_TYPE_F32
    params.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = library.llama_init_from_model(model, params)
    batch = library.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for at, token in enumerate(tokens):
        batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, at, 1, 1
        batch.seq_id[at][0] = 0
    if code := library.llama_decode(context, batch):
        raise SystemExit(f"llama_decode: {code}")
    width = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    found = library.llama_get_logits(context)
    made = numpy.frombuffer(ffi.buffer(found, 4 * len(tokens) * width), numpy.float32).reshape(len(tokens), width).copy()
    library.llama_batch_free(batch)
    library.llama_free(context)
    return made


def save(path: Path, values: Any) -> None:
    import numpy

    numpy.save(path, values)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
