"""Tensors made in another order than their file's: every byte in its place, through gaps and splits, cut off and gone on with anywhere."""

from __future__ import annotations

import random
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from kompressor_api.v1alpha1 import OutputSpec
from kompressor_worker.in_order import PIECE, InOrder, spool_bytes
from kompressor_worker.journal import open_journal
from kompressor_worker.pipeline import Limits, Uploader
from kompressor_worker.shards import OutputPlan, PlacedTensor, Position, Shard
from kompressor_worker.storage.locations import open_output
from kompressor_worker.writer import Writer

ALIGNED = 8


class Cut(Exception):
    """A worker is gone."""


def plan_of(sizes: list[list[int]], chance: random.Random) -> OutputPlan:
    """Units of tensors of these sizes, aligned, with a constant here and there; a unit's are made in another order than they lie in."""
    shards: list[Shard] = []
    stages: list[tuple[tuple[PlacedTensor, ...], ...]] = []
    constants: list[tuple[PlacedTensor, bytes]] = []
    at = 0

    def close() -> None:
        header = chance.randbytes(chance.randrange(1, 40))
        shards.append(Shard(f"part-{len(shards)}.gguf", header, len(header) + at))

    for u, unit in enumerate(sizes):
        placed = []
        for n, size in enumerate(unit):
            if at and chance.random() < 0.2:
                close()
                at = 0
            placed.append(PlacedTensor(f"u{u}.{n}", "U8", (size,), len(shards), at, at + size))
            at += size + -size % ALIGNED
            if size and chance.random() < 0.2:
                value = chance.randbytes(chance.randrange(1, 20))
                constants.append((PlacedTensor(f"c{u}.{n}", "U8", (len(value),), len(shards), at, at + len(value)), value))
                at += len(value) + -len(value) % ALIGNED
        chance.shuffle(placed)
        cut = chance.randrange(len(placed) + 1)
        stages.append((tuple(placed[:cut]), tuple(placed[cut:])))
    close()
    return OutputPlan(tuple(shards), tuple(stages), tuple(constants))


def files_of(plan: OutputPlan, contents: dict[str, bytes]) -> dict[str, bytes]:
    files = {shard.name: bytearray(shard.header.ljust(shard.size, b"\0")) for shard in plan.shards}
    for t in plan.tensors():
        shard = plan.shards[t.shard]
        files[shard.name][len(shard.header) + t.start : len(shard.header) + t.stop] = contents[t.name]
    return {name: bytes(data) for name, data in files.items()}


def work(plan: OutputPlan, contents: dict[str, bytes], uri: str, minimum: int, chance: random.Random, lives: int) -> int | None:
    """One worker, which is cut off after `lives` pieces; the units that it found committed, or None where it has published."""
    output = open_output(OutputSpec(uri=uri), {})
    output.minimum_part = minimum
    journal = open_journal(output, {"of": "a test"}, "worker", lambda surveys: plan)
    begun = journal.state.unit
    try:
        with Uploader(output, Limits()) as uploads, Writer(plan, output, journal, uploads) as writer:
            for unit in range(begun, len(plan.stages)):
                left = {t: contents[t.name] for stage in plan.stages[unit] for t in stage}
                while left:
                    lives -= 1
                    if lives < 0:
                        raise Cut
                    t = chance.choice(list(left))
                    piece, left[t] = left[t][: (step := chance.randrange(1, 60))], left[t][step:]
                    writer.append(t, memoryview(piece))
                    if not left[t]:
                        del left[t]
                writer.finish(unit)
    except Cut:
        return begun
    for upload in journal.state.uploads:
        output.complete(upload.name, upload.id, upload.parts)
    output.publish("config.json", b"{}")
    output.cleanup()
    return None


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 120), min_size=1, max_size=5), min_size=1, max_size=6),
    st.integers(1, 300),
    st.integers(3, 12),
    st.randoms(use_true_random=False),
)
def test_every_byte_has_its_place_wherever_workers_are_cut_off(
    tmp_path_factory: object, sizes: list[list[int]], minimum: int, lives: int, chance: random.Random
) -> None:
    plan = plan_of(sizes, chance)
    contents = {t.name: chance.randbytes(t.stop - t.start) for unit in plan.stages for stage in unit for t in stage}
    contents |= {t.name: value for t, value in plan.constants}
    folder: Path = tmp_path_factory.mktemp("out") / "model"  # type: ignore[attr-defined]
    before = 0
    for attempt in range(200):
        found = work(plan, contents, f"file://{folder}", minimum, chance, lives + attempt)
        if found is None:
            break
        assert found >= before, "a committed unit was done again"
        before = found
    published = {path.name: path.read_bytes() for path in folder.iterdir()}
    del published["config.json"]
    assert published == files_of(plan, contents)


def test_what_waits_lies_on_disk_and_is_as_much_as_was_planned() -> None:
    """Three experts of three matrices, as a mixture's come: gate, up and down of the first, then of the second."""
    size, experts = PIECE + 5, 3
    order = [(matrix, expert) for expert in (2, 0, 1) for matrix in range(3)]
    placed = [PlacedTensor(f"{m}.{e}", "U8", (size,), 0, (m * experts + e) * size, (m * experts + e + 1) * size) for m, e in order]
    plan = OutputPlan((Shard("m", b"head", 4 + 9 * size),), ((tuple(placed),),))
    assert spool_bytes(plan) == 5 * size  # of nine: those that come when it is their turn do not wait
    seen, passed = 0, bytearray()

    def emit(shard: int, data: memoryview) -> None:
        nonlocal passed
        passed += data

    ordered = InOrder(plan, emit)
    for t in placed:
        ordered.put(t, memoryview(bytes([t.start // size]) * size))
        seen = max(seen, ordered._spooled)
    assert passed == b"".join(bytes([n]) * size for n in range(9))
    assert ordered.stands_at(Position(0, plan.shards[0].size))
    assert seen == spool_bytes(plan)
    ordered.close()
