"""The plan of the output and the cuts of its uploads: every byte has one place, and a resume cuts where the first run did."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from kompressor_worker.layout import DTYPE_BYTES, ModelLayout, SourceTensor, StageLayout, StoredTensor, UnitLayout
from kompressor_worker.pipeline import Limits, Uploader, results
from kompressor_worker.shards import plan_output
from kompressor_worker.storage import Part

DTYPES = ["F32", "BF16", "I8", "F8_E4M3", "I64"]
TENSORS = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3))


def layout_of(units: Sequence[Sequence[Sequence[Any]]]) -> ModelLayout:
    made = []
    for u, stages in enumerate(units):
        layouts = []
        for s, tensors in enumerate(stages):
            named = [(f"u{u}.s{s}.t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(tensors)]
            layouts.append(StageLayout(f"{u}.{s}", tuple(SourceTensor(n, d, x, (StoredTensor(n, d, x, "f", 0, 0),)) for n, d, x in named)))
        made.append(UnitLayout(f"u{u}", tuple(layouts)))
    return ModelLayout({}, "BF16", None, tuple(made), (), "digest")


@given(st.lists(st.lists(st.lists(TENSORS, min_size=1, max_size=4), max_size=3), min_size=1, max_size=5), st.integers(1, 400))
def test_every_tensor_has_one_aligned_place(units: list[list[list[Any]]], max_shard: int) -> None:
    layout = layout_of(units)
    plan = plan_output(layout, {}, max_shard)
    placed = [t for unit in plan.stages for stage in unit for t in stage]
    assert sorted(t.name for t in placed) == sorted(t.name for s in layout.stages() for t in s.tensors)
    for number, shard in enumerate(plan.shards):
        at = 0
        for t in (t for t in placed if t.shard == number):
            assert t.start == at, "a gap or an overlap"
            assert t.start % DTYPE_BYTES[t.dtype] == 0, "not aligned"
            at = t.stop
        assert shard.size == len(shard.header) + at
        assert len(shard.header) % 8 == 0
    positions = [plan.position(u) for u in range(len(units) + 1)]
    assert positions == sorted(positions, key=lambda p: (p.shard, p.offset))
    assert plan.index()["weight_map"] == {t.name: plan.shards[t.shard].name for t in sorted(placed, key=lambda t: t.name)}


def test_headers_are_read_by_the_formats_own_library(tmp_path_factory: Any) -> None:
    plan = plan_output(layout_of([[[("F32", [2, 3]), ("I8", [5])]], [[("BF16", [4])]], [[("I64", [2])]]]), {})
    folder = tmp_path_factory.mktemp("shards")
    names = set()
    for shard in plan.shards:
        (folder / shard.name).write_bytes(shard.header + bytes(shard.size - len(shard.header)))
        with safe_open(folder / shard.name, "pt") as file:
            names |= {(name, tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118 - it is no dict
    assert names == {("u0.s0.t0", (2, 3)), ("u0.s0.t1", (5,)), ("u1.s0.t0", (4,)), ("u2.s0.t0", (2,))}
    assert json.loads(plan.shards[0].header[8:])["__metadata__"] == {"format": "pt"}


class Memory:
    """An upload that remembers its parts; `minimum_part` as small as a test needs."""

    minimum_part = 5

    def __init__(self) -> None:
        self.parts: dict[int, bytes] = {}

    def write_part(self, name: str, upload: str, number: int, offset: int, chunks: Sequence[memoryview]) -> Part:
        self.parts[number] = b"".join(chunks)
        return Part(number, offset, len(self.parts[number]), "")


def send(units: Sequence[Sequence[bytes]], start: int, parts: Sequence[Part], tail: bytes) -> tuple[Memory, list[tuple[list[Part], bytes]]]:
    """What is committed after each unit, for a worker that starts at unit `start`."""
    output, commits, known = Memory(), [], list(parts)
    with Uploader(output, Limits(pending=1 << 20)) as uploads:  # type: ignore[arg-type]
        uploads.open("shard", "id", parts, tail)
        for number, unit in enumerate(units[start:], start):
            for data in unit:
                uploads.write(memoryview(data))
            futures, left = uploads.cut(last=number + 1 == len(units))
            known += results(futures)
            commits.append((list(known), left))
    return output, commits


@given(st.lists(st.lists(st.binary(max_size=12), max_size=3), min_size=1, max_size=8), st.data())
def test_a_resumed_upload_has_the_same_parts(units: list[list[bytes]], data: st.DataObject) -> None:
    whole, commits = send(units, 0, (), b"")
    assert b"".join(whole.parts[n] for n in sorted(whole.parts)) == b"".join(b for unit in units for b in unit)
    assert all(len(p) >= Memory.minimum_part for n, p in whole.parts.items() if n < len(whole.parts)), "only the last part may be small"
    resume = data.draw(st.integers(1, len(units)))
    if resume < len(units):
        parts, tail = commits[resume - 1]
        again, later = send(units, resume, parts, tail)
        assert {**{n: p for n, p in whole.parts.items() if n <= len(parts)}, **again.parts} == whole.parts
        assert later[-1] == commits[-1]
