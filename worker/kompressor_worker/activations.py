"""Rows of hidden states between blocks: kept in memory up to a limit, beyond it in files; saved and restored for resume."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kompressor_worker import kernels
from kompressor_worker.batch import Batch
from kompressor_worker.errors import BadNumerics

BATCH_TOKENS = 4096
"""Tokens that go through a step together: enough for a GEMM's full rate, few enough that a step's intermediates stay small."""
EXCLUDED_SHARE = 0.1
"""More rows than this with NaN or Inf: the model, not the rows, is at fault."""
CHUNK_BYTES = 32 << 20
"""One object of a snapshot."""


class Spill:
    """Keeps tensors in memory while they fit into `limit` bytes; the others live in memory-mapped files, which the kernel pages out."""

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        self.limit, self.held, self.spilled = limit, 0, 0
        self._folder = tempfile.TemporaryDirectory(prefix="kompressor-activations-", dir=folder)
        self._known: dict[int, weakref.ref[Tensor]] = {}
        self._files = 0

    def settle(self, batch: Batch) -> None:
        """Finds a place for what is new in the state."""
        for name, value in batch.state.items():
            known = self._known.get(id(value))
            if known is None or known() is not value:
                batch.state[name] = self.keep(value)

    def keep(self, value: Tensor) -> Tensor:
        size = value.nbytes
        if self.held + size > self.limit and value.device.type == "cpu":
            value = self._file(value)
            self.spilled += size
        else:
            self.held += size
            weakref.finalize(value, self._release, size)
        self._known[id(value)] = weakref.ref(value)
        return value

    def _file(self, value: Tensor) -> Tensor:
        self._files += 1
        path = Path(self._folder.name) / str(self._files)
        kept = torch.from_file(str(path), shared=True, size=value.numel(), dtype=value.dtype).view(value.shape)
        kept.copy_(value)
        path.unlink()  # the mapping keeps it; nothing is left behind, however this process ends
        return kept

    def _release(self, size: int) -> None:
        self.held -= size


@dataclass
class Activations:
    """One stream of rows: calibration, or evaluation through the original or the compressed model."""

    name: str
    batches: list[Batch]
    tokens: list[Tensor]
    """int64 [rows, length] a batch, padded with 0."""
    dtype: torch.dtype
    hidden: int
    spill: Spill
    excluded: list[str] = field(default_factory=list)
    """In which block a row was excluded, a line for each."""

    @classmethod
    def of(cls, name: str, rows: Sequence[Tensor], dtype: torch.dtype, hidden: int, spill: Spill, device: torch.device) -> Activations:
        """Nothing embedded yet. Rows (int64, 1-D) stay in their order; neighbours make a batch."""
        batches, tokens = [], []
        for group in grouped([len(row) for row in rows]):
            padded = torch.zeros(len(group), max(len(rows[i]) for i in group), dtype=torch.int64)
            for at, i in enumerate(group):
                padded[at, : len(rows[i])] = rows[i]
            tokens.append(padded.to(device))
            batches.append(Batch(tuple(len(rows[i]) for i in group), excluded=(False,) * len(group)))
        return cls(name, batches, tokens, dtype, hidden, spill)

    @property
    def rows(self) -> int:
        return sum(len(batch.lengths) for batch in self.batches)

    @property
    def nbytes(self) -> int:
        """Of the hidden states."""
        return sum(t.numel() for t in self.tokens) * self.hidden * self.dtype.itemsize

    def embed(self, first: int, rows: Tensor) -> None:
        """Fills in the hidden states of the tokens `first` and following, whose embeddings (scaled) are rows [n, hidden]."""
        for batch, tokens in zip(self.batches, self.tokens, strict=True):
            if "hidden" not in batch.state:
                batch.state["hidden"] = self.spill.keep(torch.zeros(*tokens.shape, self.hidden, dtype=self.dtype, device=tokens.device))
            inside = (tokens >= first) & (tokens < first + len(rows))
            if inside.any():
                batch.state["hidden"][inside] = rows.to(tokens.device)[tokens[inside] - first].to(self.dtype)

    def exclude_nonfinite(self, block: str) -> None:
        """Raises BadNumerics when too many rows are out."""
        for batch in self.batches:
            hidden = batch.state["hidden"]
            if not kernels.nonfinite(hidden):
                continue
            bad = ~torch.isfinite(hidden).flatten(1).all(1)
            if bad.any():
                fresh = [bool(b) and not out for b, out in zip(bad.tolist(), batch.excluded, strict=True)]
                self.excluded += [block] * sum(fresh)
                batch.excluded = tuple(out or new for out, new in zip(batch.excluded, fresh, strict=True))
                batch.state["hidden"] = self.spill.keep(hidden.masked_fill(bad[:, None, None], 0.0))
        if len(self.excluded) > EXCLUDED_SHARE * self.rows:
            raise BadNumerics(
                f"{block}: activations of {len(self.excluded)} of {self.rows} {self.name} rows are NaN or Inf; the checkpoint overflows in "
                f"{str(self.dtype).removeprefix('torch.')}, or is damaged: convert it to bfloat16, or calibrate with other data"
            )

    def snapshot(self) -> list[Tensor]:
        """The hidden states as they are now; a block replaces them, so they stay as they are."""
        return [batch.state["hidden"] for batch in self.batches]

    def restore(self, chunks: Iterable[bytes], excluded: Sequence[Sequence[bool]]) -> None:
        """From what `chunked` cut and `excluded` of every batch."""
        data = b"".join(chunks)
        at = 0
        for batch, tokens, out in zip(self.batches, self.tokens, excluded, strict=True):
            shape = (*tokens.shape, self.hidden)
            size = tokens.numel() * self.hidden * self.dtype.itemsize
            value = torch.frombuffer(bytearray(data[at : at + size]), dtype=self.dtype).view(shape).to(tokens.device)
            batch.state = {"hidden": self.spill.keep(value)}
            batch.excluded = tuple(out)
            at += size
        assert at == len(data), f"snapshot of {self.name}: {len(data)} bytes for {at}"


def grouped(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Neighbouring rows, so many that padded they are BATCH_TOKENS, or one."""
    group: list[int] = []
    for i, length in enumerate(lengths):
        longest = max([length, *(lengths[j] for j in group)])
        if group and longest * (len(group) + 1) > BATCH_TOKENS:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def chunked(values: Iterable[Tensor]) -> Iterator[bytes]:
    """The bytes of tensors, one after the other, in objects of CHUNK_BYTES."""
    parts: list[memoryview] = []
    size = 0
    for value in values:
        data = memoryview(value.cpu().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
        while len(data):
            take = min(len(data), CHUNK_BYTES - size)
            parts.append(data[:take])
            data, size = data[take:], size + take
            if size == CHUNK_BYTES:
                yield b"".join(parts)
                parts, size = [], 0
    if parts:
        yield b"".join(parts)
