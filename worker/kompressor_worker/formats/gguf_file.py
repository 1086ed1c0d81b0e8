"""GGUF files, known to the byte before any weight is read: headers go first, tensors follow as they are made.

A file is a header (metadata, then name, shape, type and offset of each tensor) and the tensors' data, each at a multiple of 32. The `gguf`
library writes the header, from shapes alone. A result above a stated size is split; the first split has the metadata. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import PurePosixPath

from kompressor_worker.formats.gguf_architectures import unsupported
from kompressor_worker.formats.gguf_metadata import Metadata
from kompressor_worker.formats.gguf_names import FLOATS, Form, Names
from kompressor_worker.formats.stored import PlannedTensor
from kompressor_worker.layout import ModelLayout, UnitLayout
from kompressor_worker.schemes import Scheme
from kompressor_worker.shards import OutputPlan, PlacedTensor, Shard, stage_tensors

__all__ = ["ALIGNMENT", "MAX_SPLIT_BYTES", "plan_gguf"]

ALIGNMENT = 32
"""Of every tensor and of where the data begin: the format's own default."""
MAX_SPLIT_BYTES = 45 * 10**9
"""Hubs take files up to 50 GB."""


OWN = re.compile(r".*(?=layers\.\d+$)")
"""What comes before a block's own name in that of its unit."""


@dataclass
class _FileTensor:
    """One of the file's, made of one tensor of the model, or of one an expert."""

    name: str
    type: str
    shape: tuple[int, ...]
    parts: dict[int, tuple[PlannedTensor, Form]] = field(default_factory=dict)
    constant: bytes | None = None
    shard: int = 0
    start: int = 0

    @property
    def part_bytes(self) -> int:
        return next(_nbytes(t, form) for t, form in self.parts.values())

    @property
    def nbytes(self) -> int:
        return len(self.constant) if self.constant is not None else self.part_bytes * len(self.parts)


def plan_gguf(
    layout: ModelLayout, schemes: Mapping[str, Scheme], metadata: Metadata, name: str, max_shard: int = MAX_SPLIT_BYTES
) -> OutputPlan:
    """Places every tensor of the result in the file `name` (`model-Q4_K_M.gguf`), or in splits of it of at most `max_shard` bytes of data
    where one tensor is no larger. Raises UserError for what has no place in GGUF."""
    if other := next(((name, s.name) for name, s in schemes.items() if s.format != "gguf"), None):
        raise unsupported(f"{other[0]}: scheme {other[1]} is no type of GGUF; choose Q4_K_M or one of its relatives")
    names = Names(metadata.decoder)
    experts, constants = metadata.decoder.experts, metadata.constants(names)
    units = [
        [] if unit.dropped else [*_unit(unit, schemes, names, experts), *_known(constants.get(OWN.sub("", unit.name), {}))]
        for unit in layout.units
    ]
    shards = _place([t for unit in units for t in unit], max_shard)
    placed = {part.name: part for unit in units for t in unit for part in _placed(t)}
    stages = tuple(
        tuple(
            () if unit.dropped or stage.dropped else tuple(placed[t.name] for t in stage_tensors(stage, schemes) if t.name in placed)
            for stage in unit.stages
        )
        for unit in layout.units
    )
    return OutputPlan(_shards(shards, metadata, name), stages, tuple(_constants(units)))


def _unit(unit: UnitLayout, schemes: Mapping[str, Scheme], names: Names, experts: int) -> list[_FileTensor]:
    """What the file has of a unit, in order: a stack stands where its first expert comes."""
    found: dict[str, _FileTensor] = {}
    for stage in unit.stages:
        if stage.dropped:
            continue
        linears = {linear.weight: linear for linear in stage.linears}
        for t in stage_tensors(stage, schemes):
            linear = linears.get(t.name)
            kind = _type(t, None if linear is None else schemes.get(linear.name))
            form = names.form(t.name, t.shape, kind, router=linear is not None and linear.kind == "router")
            if form is not None:
                _add(found, t, form, t.shape if linear is None else linear.shape)
    for tensor in found.values():
        _check_stack(tensor, experts)
    return list(found.values())


def _known(constants: Mapping[str, Sequence[float]]) -> list[_FileTensor]:
    """Tensors that no weight of the source makes, by their names in the file."""
    return [
        _FileTensor(name, "F32", (len(values),), constant=struct.pack(f"<{len(values)}f", *values)) for name, values in constants.items()
    ]


def _type(tensor: PlannedTensor, scheme: Scheme | None) -> str:
    """In the file, if it is a matrix. Raises UserError."""
    if scheme is not None:
        return scheme.name.removesuffix("_GGUF")
    if tensor.dtype not in FLOATS:
        raise unsupported(f"{tensor.name} is {tensor.dtype}, and exact tensors are {', '.join(FLOATS)}")
    return tensor.dtype


def _add(found: dict[str, _FileTensor], tensor: PlannedTensor, form: Form, shape: tuple[int, ...]) -> None:
    """Raises UserError for an expert of another type or shape than the ones before it."""
    other = found.setdefault(form.tensor, _FileTensor(form.tensor, form.type, shape))
    if (other.type, other.shape) != (form.type, shape):
        raise unsupported(
            f"{tensor.name} is {form.type} {list(shape)}, other experts of it {other.type} {list(other.shape)}, and they are one tensor "
            "in GGUF; give all experts of a layer the same"
        )
    number = form.expert or 0
    assert number not in other.parts, f"{tensor.name}: {form.tensor} has one already"
    other.parts[number] = (tensor, form)


def _check_stack(tensor: _FileTensor, experts: int) -> None:
    """Makes a stack of what holds experts."""
    if next(iter(tensor.parts.values()))[1].expert is None:
        return
    assert sorted(tensor.parts) == list(range(experts)), f"{tensor.name}: experts {sorted(tensor.parts)} of {experts}"
    tensor.shape = (experts, *tensor.shape)


def _place(tensors: list[_FileTensor], max_shard: int) -> list[list[_FileTensor]]:
    """By shard. A constant stays in the shard of the tensor before it."""
    shards: list[list[_FileTensor]] = [[]]
    size = 0
    for t in tensors:
        padded = -(-t.nbytes // ALIGNMENT) * ALIGNMENT
        if shards[-1] and size + padded > max_shard and t.constant is None:
            shards.append([])
            size = 0
        t.shard, t.start = len(shards) - 1, size
        shards[-1].append(t)
        size += padded
    return shards


def _placed(t: _FileTensor) -> Iterator[PlacedTensor]:
    for number, (tensor, form) in t.parts.items():
        start = t.start + (number * t.part_bytes if form.expert is not None else 0)
        yield PlacedTensor(tensor.name, tensor.dtype, tuple(tensor.shape), t.shard, start, start + t.part_bytes, form)


def _constants(units: list[list[_FileTensor]]) -> Iterator[tuple[PlacedTensor, bytes]]:
    for t in (t for unit in units for t in unit):
        if t.constant is not None:
            yield PlacedTensor(t.name, t.type, t.shape, t.shard, t.start, t.start + t.nbytes), t.constant


def _nbytes(tensor: PlannedTensor, form: Form) -> int:
    return prod(tensor.shape) * (1 if tensor.dtype == "U8" else FLOATS[form.type])


def _shards(shards: list[list[_FileTensor]], metadata: Metadata, name: str) -> tuple[Shard, ...]:
    total, path = sum(map(len, shards)), PurePosixPath(name)
    made = []
    for number, tensors in enumerate(shards):
        header = _header(tensors, metadata, (number, len(shards), total) if len(shards) > 1 else None)
        last = tensors[-1]
        split = f"{path.stem}-{number + 1:05d}-of-{len(shards):05d}{path.suffix}"
        size = len(header) + -(-(last.start + last.nbytes) // ALIGNMENT) * ALIGNMENT
        made.append(Shard(split if len(shards) > 1 else name, header, size))
    return tuple(made)


def _header(tensors: list[_FileTensor], metadata: Metadata, split: tuple[int, int, int] | None) -> bytes:
    """Up to the data, written by the library as if into a file. `split`: its number, how many there are, and tensors in all of them."""
    import gguf
    import numpy as np

    writer, buffer = gguf.GGUFWriter(None, metadata.decoder.architecture.name), io.BytesIO()
    for t in tensors:
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.nbytes, raw_dtype=gguf.GGMLQuantizationType[t.type])
    writer.kv_data = [{}]
    if split is not None:
        writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_NO, split[0])
        writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, split[1])
        writer.add_int32(gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, split[2])
    of_split = writer.kv_data
    first = split is None or split[0] == 0
    out: io.BufferedWriter = io.BufferedWriter(buffer)
    writer.fout, writer.state = [out], gguf.gguf_writer.WriterState.EMPTY
    writer.kv_data = [{**metadata.values, **of_split[0]}] if first else of_split
    writer.write_header_to_file()
    out.write(metadata.packed if first else b"")
    writer.kv_data = of_split
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    out.flush()
    data = buffer.getvalue()
    return data + bytes(-len(data) % ALIGNMENT)
