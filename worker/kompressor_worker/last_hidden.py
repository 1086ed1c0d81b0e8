"""The evaluation rows' last hidden states, which meet the head slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kompressor_worker.batch import Batch
from kompressor_worker.calibrated import Engine
from kompressor_worker.decoder import Decoder
from kompressor_worker.evaluate import SCRATCH_BYTES, LogitComparison, Scored, scored
from kompressor_worker.pace import Pace

CUDA_SCRATCH_BYTES = 1 << 30
"""A tile of some ten thousand logits a side: its dozen small kernels then cost little beside the GEMMs."""


class LastHidden:
    """After the final norm, of the original and of the compressed model; nothing where there is no evaluation."""

    def __init__(
        self,
        engine: Engine,
        norm: Tensor,
        changed: Tensor,
        nbytes: int,
        tell: Callable[[int], None],
        apart: Sequence[Tensor] | None = None,
    ) -> None:
        """`norm`, and `changed` of the result. `tell` hears of the head's `nbytes` as its rows are met, and may raise. `apart`: where the
        original's rows have gone through it by themselves, what came out behind its norm, [rows, length, hidden] a batch."""
        streams, decoder = engine.streams, engine.decoder
        self.pace = Pace(nbytes, 0, tell)
        self._device = decoder.device
        self.comparing = streams.compressed is not None and (streams.original is not None or apart is not None)
        self._hidden: list[tuple[Tensor, Tensor]] = []
        if not self.comparing:
            return
        assert streams.compressed is not None
        parts: list[Scored] = []
        rows = 0
        for number, (batch, tokens) in enumerate(zip(streams.compressed.batches, streams.compressed.tokens, strict=True)):
            part = scored(tokens, torch.tensor(batch.lengths))
            parts.append(Scored(part.keep, part.targets, part.rows + rows))
            rows += len(batch.lengths)
            after = self._normed(decoder, batch, part.keep, changed)
            if apart is not None:
                self._hidden.append((apart[number][part.keep], after))
            else:
                assert streams.original is not None
                self._hidden.append((self._normed(decoder, streams.original.batches[number], part.keep, norm), after))
        targets, belongs = torch.cat([p.targets for p in parts]), torch.cat([p.rows for p in parts])
        vocabulary = int(decoder.config.vocab_size)
        self.pace = Pace(nbytes, vocabulary * len(targets), tell)
        scratch = CUDA_SCRATCH_BYTES if decoder.device.type == "cuda" else SCRATCH_BYTES
        self._comparison = LogitComparison(targets, belongs, vocabulary, softcap=decoder.final_softcap, scratch_bytes=scratch)

    def _normed(self, decoder: Decoder, batch: Batch, keep: Tensor, norm: Tensor) -> Tensor:
        return decoder.norm(batch.state["hidden"][keep], norm.to(decoder.device)).to(decoder.dtype)

    def add(self, offset: int, original: Tensor, compressed: Tensor) -> None:
        """Rows [v, hidden] of both heads, from token id `offset`."""
        start = 0
        original, compressed = original.to(self._device), compressed.to(self._device)
        for a, b in self._hidden:
            self._comparison.add(a, b, original, compressed, offset=offset, start=start)
            start += len(a)
            self.pace(len(original) * len(a))

    def result(self) -> dict[str, Any]:
        return self._comparison.result().summary()
