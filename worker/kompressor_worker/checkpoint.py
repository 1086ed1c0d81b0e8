"""The files of a checkpoint: which hold the weights, which are carried over, which left behind; and all headers."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from kompressor_api.names import Reason
from kompressor_worker.errors import CorruptSource, NotFound, UserError
from kompressor_worker.headers import FIRST_READ, header_length, load_json, parse_header
from kompressor_worker.layout import StoredTensor
from kompressor_worker.storage import WORK, ObjectInfo, Source

__all__ = ["Checkpoint", "read_checkpoint"]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
REPORT = "kompressor.json"
PAGE = "report.html"
EVENTS = "tensorboard/"
"""How the training of one of our results went."""
QUANTISED = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Where older tools said that the weights are quantised, if config.json does not."""
READERS = 16
"""Headers read at the same time."""

NUMBERED = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
OTHER_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|onnx|onnx_data|h5|msgpack|npz|tflite|ot)$|.*\.(safetensors|bin)\.index\.json$"
)
"""The same weights once more, in another format or for another loader."""
OTHER_FOLDERS = ("original/", "onnx/", "openvino/", "coreml/", "metal/")
IGNORED = re.compile(r"(.*/)?(\.git|\.cache|\.huggingface|__pycache__)/.*|(.*/)?(\.gitattributes|\.gitignore|\.DS_Store)")
"""What tools leave behind; not worth a word."""


@dataclass(frozen=True)
class Checkpoint:
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    """By name, in the order of files and offsets."""
    other_files: tuple[str, ...]
    digest: str
    warnings: tuple[str, ...]
    file_sizes: Mapping[str, int]
    """Of all files of the source, by name."""


def read_checkpoint(source: Source) -> Checkpoint:
    """Lists the source and reads config.json, the index and all headers, in parallel; two or three round trips.

    Raises UserError (not a safetensors checkpoint of transformers), CorruptSource, and what storage raises.
    """
    files = {name: info for name, info in source.list().items() if not name.startswith(WORK)}
    if CONFIG not in files:
        raise UserError(_no_config(source.uri, files), Reason.UNSUPPORTED_MODEL)
    warnings: list[str] = []
    with ThreadPoolExecutor(READERS, "headers") as pool:
        config_text = pool.submit(source.read, CONFIG)
        index_text = pool.submit(source.read, INDEX) if INDEX in files else None
        index = parse_index(index_text.result()) if index_text else None
        weights = find_weights(source.uri, files, index, warnings)
        headers = list(pool.map(lambda name: _read_header(source, files[name]), weights))
        config = config_text.result()
    tensors = merge(headers_tensors for _, headers_tensors in headers)
    if index is not None:
        check_index(index, tensors, warnings)
    carried = other_files(files, weights, warnings)
    used = [CONFIG, *weights, *([INDEX] if index is not None else []), *carried]
    parsed = load_json(CONFIG, config, duplicates=True)
    if marker := next((name for name in QUANTISED if name in files and "quantization_config" not in parsed), None):
        raise UserError(
            f"{source.uri}: {marker} says that the weights are quantised; start from the unquantised checkpoint", Reason.UNSUPPORTED_MODEL
        )
    digest = hashlib.sha256()
    for name in sorted(used):
        digest.update(f"{name}\0{files[name].size}\0{files[name].etag}\n".encode())
    for content in (config, *(text for text, _ in headers)):
        digest.update(hashlib.sha256(content).digest())
    sizes = {name: info.size for name, info in files.items()}
    return Checkpoint(parsed, tensors, carried, f"sha256:{digest.hexdigest()}", tuple(warnings), sizes)


def parse_index(text: bytes) -> dict[str, str]:
    """Tensor name to file name. Raises CorruptSource."""
    weight_map = load_json(INDEX, text).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CorruptSource(f"{INDEX}: weight_map must map tensor names to file names; upload the index again")
    return weight_map


def find_weights(uri: str, files: Mapping[str, ObjectInfo], index: Mapping[str, str] | None, warnings: list[str]) -> list[str]:
    """The safetensors files that make up the model, in order. Raises UserError, NotFound, CorruptSource."""
    if index is not None:
        named = sorted(set(index.values()))
        for file in named:
            if file not in files:
                tensor = next(t for t, f in index.items() if f == file)
                raise CorruptSource(f"{INDEX}: {tensor!r} is in {file}, which {uri} lacks; upload that file")
        if WEIGHTS in files and WEIGHTS not in named:
            raise CorruptSource(f"{uri}: {WEIGHTS} and {INDEX} are both there; loaders disagree on which counts: remove the stale one")
        return named
    if WEIGHTS in files:
        return [WEIGHTS]
    shards = {name: m for name in files if (m := NUMBERED.fullmatch(name))}
    if not shards:
        raise _no_weights(uri, files)
    total = int(next(iter(shards.values()))[2])
    for number in range(1, total + 1):
        if not any(int(m[1]) == number and int(m[2]) == total for m in shards.values()):
            raise CorruptSource(f"{uri}: shard {number} of {total} is missing, and so is {INDEX}; upload both")
    warnings.append(f"{INDEX} is missing; all {total} shards are there and were used")
    return sorted(name for name, m in shards.items() if int(m[2]) == total)


def merge(headers: Iterable[list[StoredTensor]]) -> dict[str, StoredTensor]:
    """All tensors by name. Raises CorruptSource when two files hold the same one."""
    tensors: dict[str, StoredTensor] = {}
    for tensor in (t for header in headers for t in header):
        other = tensors.setdefault(tensor.name, tensor)
        if other is not tensor:
            raise CorruptSource(f"{tensor.name!r} is both in {other.file} and in {tensor.file}; remove the stale file")
    return tensors


def check_index(index: Mapping[str, str], tensors: Mapping[str, StoredTensor], warnings: list[str]) -> None:
    """Raises CorruptSource where the index promises what the files do not hold; the reverse is a warning."""
    for name, file in index.items():
        if name not in tensors:
            raise CorruptSource(f"{INDEX}: {name!r} is not in {file}; upload the index and the shards of one version")
        if tensors[name].file != file:
            raise CorruptSource(f"{INDEX}: {name!r} is in {tensors[name].file}, not in {file}; upload the index again")
    extra = [name for name in tensors if name not in index]
    if extra:
        # Loaders read every tensor of the named files, so these count; the result's own index lists them.
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        warnings.append(f"{INDEX} does not list {extra[0]}{more}; kept, as loaders do")


def other_files(files: Mapping[str, ObjectInfo], weights: Iterable[str], warnings: list[str]) -> tuple[str, ...]:
    """What is carried over as it is: all but the weights, what describes them, and their copies in other formats."""
    ours = {CONFIG, INDEX, REPORT, PAGE, *weights}
    consolidated = any(name.startswith("consolidated") for name in files)
    carried: list[str] = []
    left: list[str] = []
    for name in sorted(files):
        if name in ours or name.startswith(EVENTS) or IGNORED.fullmatch(name):
            continue
        # params.json describes consolidated.safetensors: loaders that find it would look for the file.
        stale = consolidated and name == "params.json"
        behind = stale or OTHER_WEIGHTS.fullmatch(name) is not None or name.startswith(OTHER_FOLDERS)
        (left if behind else carried).append(name)
    if left:
        places = Counter(name.split("/")[0] + "/" if "/" in name else name for name in left)
        listed = ", ".join(f"{place} ({count} files)" if count > 1 else place for place, count in places.items())
        warnings.append(f"not carried over, being other copies of the weights: {listed}")
    return tuple(carried)


def _read_header(source: Source, info: ObjectInfo) -> tuple[bytes, list[StoredTensor]]:
    head = source.read(info.name, 0, min(info.size, FIRST_READ)) if info.size else b""
    stop = 8 + header_length(info.name, info.size, head)
    if stop > len(head):
        head += source.read(info.name, len(head), stop)
    text = head[8:stop]
    return text, parse_header(info.name, info.size, text)


def _no_config(uri: str, files: Mapping[str, ObjectInfo]) -> str:
    shown = ", ".join(sorted(files)[:5]) + (", ..." if len(files) > 5 else "")
    if any(name.endswith("/" + CONFIG) for name in files):
        inner = next(name for name in sorted(files) if name.endswith("/" + CONFIG)).removesuffix(CONFIG)
        return f"{uri}: no config.json here, but in {inner}; point model.source.uri there"
    return f"{uri}: no config.json among {shown}; point model.source.uri at a transformers checkpoint"


def _no_weights(uri: str, files: Mapping[str, ObjectInfo]) -> UserError:
    if "adapter_model.safetensors" in files:
        text = "a LoRA adapter, not a model; merge it into its base (peft's merge_and_unload) and save that"
    elif any(name.endswith((".bin", ".pt", ".pth")) for name in files):
        text = "only PyTorch pickles; convert: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
    elif any(name.endswith(".gguf") for name in files):
        text = "weights only as GGUF, already compressed; start from the original checkpoint"
    elif any(name.endswith(".safetensors") for name in files):
        shown = next(name for name in sorted(files) if name.endswith(".safetensors"))
        text = f"{shown} is no name that transformers loads; save the model with save_pretrained ({WEIGHTS})"
    else:
        return NotFound(f"{uri}: no {WEIGHTS} and no {INDEX}; upload the weights")
    return UserError(f"{uri}: {text}", Reason.UNSUPPORTED_MODEL)
