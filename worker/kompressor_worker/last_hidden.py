"""The evaluation rows' last hidden states, which meet the head slice by slice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kompressor_worker.calibrated import Engine
from kompressor_worker.evaluate import LogitComparison, Scored, scored


class LastHidden:
    """After the final norm, of the original and of the compressed model; nothing where there is no evaluation."""

    def __init__(self, engine: Engine, norm: Tensor, changed: Tensor) -> None:
        streams, decoder = engine.streams, engine.decoder
        self.comparing = streams.original is not None and streams.compressed is not None
        self._hidden: list[tuple[Tensor, Tensor]] = []
        if not self.comparing:
            return
        assert streams.original is not None and streams.compressed is not None
        parts: list[Scored] = []
        rows = 0
        for a, b, tokens in zip(streams.original.batches, streams.compressed.batches, streams.original.tokens, strict=True):
            part = scored(tokens, torch.tensor(a.lengths))
            parts.append(Scored(part.keep, part.targets, part.rows + rows))
            rows += len(a.lengths)
            states = (decoder.norm(x.state["hidden"][part.keep], w).to(decoder.dtype) for x, w in ((a, norm), (b, changed)))
            self._hidden.append((next(states), next(states)))
        targets, belongs = torch.cat([p.targets for p in parts]), torch.cat([p.rows for p in parts])
        self._comparison = LogitComparison(targets, belongs, int(decoder.config.vocab_size), softcap=decoder.final_softcap)

    def add(self, offset: int, original: Tensor, compressed: Tensor) -> None:
        """Rows [v, hidden] of both heads, from token id `offset`."""
        start = 0
        for a, b in self._hidden:
            self._comparison.add(a, b, original, compressed, offset=offset, start=start)
            start += len(a)

    def result(self) -> dict[str, Any]:
        return self._comparison.result().summary()
