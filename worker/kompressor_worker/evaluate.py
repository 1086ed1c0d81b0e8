"""How far the compressed model is from the original: KL divergence of the logits, perplexity before and after, top-1 agreement.

Neither [tokens, vocabulary] nor the whole head is ever held. The head arrives in slices of its rows; each slice adds to per-token running
sums, as in online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867), of which the KL divergence needs one more: with logits z of the
original and y of the compressed model, p = softmax(z), q = softmax(y),

    KL(p || q) = sum_v p_v (z_v - y_v) - logsumexp(z) + logsumexp(y)

Logits and their differences are fp32, sums over slices fp64, so a token's KL is right to about 1e-6 times its largest logit. It may come
out as little below zero, and is not clamped: the mean over tokens then has no bias. Two equal models give exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from kompressor_worker.errors import BadNumerics

SCRATCH_BYTES = 64 << 20
"""What one tile may take: its logits, and fp32 copies of the head's and the hidden states' rows. More suits a GPU: a tile is a dozen small
kernels there."""
CPU_TILE = (512, 1024)
"""Tokens and vocabulary rows of a tile at most on a CPU: logits stay in its cache from the GEMM to the last sum. CPU time of
one AVX2 core over that of the two GEMMs alone, two different heads: 1.02 at hidden 2048, 1.5 at hidden 384, where exponentials show."""


@dataclass(frozen=True)
class Scored:
    """Which positions are scored: every token of a row but its first, each by the hidden state before it."""

    keep: Tensor
    """bool [rows, length]: this position's hidden state predicts a scored token. `hidden[keep]` is what LogitComparison takes."""
    targets: Tensor
    """int64 [T]: the tokens predicted, in the order of `hidden[keep]`."""
    rows: Tensor
    """int64 [T]: the row that each belongs to."""


def scored(tokens: Tensor, lengths: Tensor | None = None) -> Scored:
    """Of token ids [rows, length], each row filled from its start up to its `lengths` int64 [rows]."""
    rows, length = tokens.shape
    lengths = torch.full((rows,), length) if lengths is None else lengths
    keep = torch.arange(1, length + 1)[None, :] < lengths[:, None]
    following = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1)
    return Scored(keep, following[keep].long(), torch.arange(rows)[:, None].expand(rows, length)[keep])


@dataclass
class _Sums:
    """Running sums of one model's logits, one number a token."""

    high: Tensor
    """fp32 [T]: largest logit so far."""
    total: Tensor
    """fp64 [T]: sum of exp(logit - high)."""
    best: Tensor
    """int64 [T]: token id of the largest logit; of equals the one met first."""
    target: Tensor
    """fp64 [T]: logit of the target; NaN until its slice has come."""

    @classmethod
    def of(cls, count: int, device: torch.device) -> _Sums:
        return cls(
            torch.full((count,), -math.inf, device=device),
            torch.zeros(count, dtype=torch.float64, device=device),
            torch.full((count,), -1, dtype=torch.int64, device=device),
            torch.full((count,), math.nan, dtype=torch.float64, device=device),
        )

    def exponentials(self, at: slice, logits: Tensor, offset: int) -> Tensor:
        """Counts logits [t, v] of token ids from `offset`; they become exp(logit - high). Returns what earlier sums shrink by, fp64 [t]."""
        largest, where = logits.max(dim=1)
        high = torch.maximum(self.high[at], largest)
        self.best[at] = torch.where(largest > self.high[at], where + offset, self.best[at])
        shrink = (self.high[at].double() - high.double()).exp()
        torch.sub(logits, high[:, None], out=logits).exp_()
        self.total[at] = self.total[at] * shrink + logits.sum(dim=1).double()
        self.high[at] = high
        return shrink

    def logsumexp(self) -> Tensor:
        return self.high.double() + self.total.log()


class LogitComparison:
    """Original against compressed at T scored positions; 88 bytes a position, on the device of `targets`.

    `targets` int64 [T] and `rows` int64 [T] are those of `scored`, `vocabulary` counts the rows of the head. A model's logits are
    `softcap * tanh(scale * (h W^T + b) / softcap)` (Gemma 2 caps; Granite scales by 1 / logits_scaling, Cohere by logit_scale).
    """

    def __init__(
        self,
        targets: Tensor,
        rows: Tensor,
        vocabulary: int,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        scratch_bytes: int = SCRATCH_BYTES,
    ) -> None:
        assert targets.shape == rows.shape and len(targets) and int(targets.max()) < vocabulary, (targets.shape, rows.shape, vocabulary)
        self.targets, self.rows, self.vocabulary = targets, rows, vocabulary
        self._scale, self._softcap, self._scratch = scale, softcap, scratch_bytes
        self._original = _Sums.of(len(targets), targets.device)
        self._compressed = _Sums.of(len(targets), targets.device)
        self._numerator = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
        self._seen = torch.zeros(len(targets), dtype=torch.int64, device=targets.device)

    def add(
        self,
        original: Tensor,
        compressed: Tensor,
        head: Tensor,
        compressed_head: Tensor | None = None,
        *,
        offset: int,
        start: int = 0,
        bias: Tensor | None = None,
        compressed_bias: Tensor | None = None,
    ) -> None:
        """Counts one slice of the vocabulary for the positions from `start`.

        `original`, `compressed`: hidden states after the final norm, [t, hidden], bf16 or fp32. `head`: rows `offset` onwards of the
        original's head, [v, hidden]; `compressed_head`: the same rows of the compressed one, decoded; None where it is the same. Slices may
        come in any order, each once for every position. A bias [v] goes with its head.
        """
        other, other_bias = (head, bias) if compressed_head is None else (compressed_head, compressed_bias)
        assert original.shape[0] == compressed.shape[0] and head.shape[0] == other.shape[0]
        tokens, columns = self._tile(max(head.shape[1], other.shape[1]))
        for low in range(0, head.shape[0], columns):
            part = slice(low, min(low + columns, head.shape[0]))
            weight = head[part].float()
            other_weight = weight if other is head else other[part].float()
            for begin in range(0, original.shape[0], tokens):
                batch = slice(begin, begin + tokens)
                z = self._logits(original[batch], weight, None if bias is None else bias[part])
                y = self._logits(compressed[batch], other_weight, None if other_bias is None else other_bias[part])
                self._add_tile(slice(start + begin, start + begin + len(z)), z, y, offset + low)

    def _tile(self, hidden: int) -> tuple[int, int]:
        """Tokens and vocabulary rows of a tile of edge e: both models' inputs and weights take 4 e hidden floats, their logits 3 e^2."""
        edge = max(16, (math.isqrt(4 * hidden * hidden + 3 * (self._scratch // 4)) - 2 * hidden) // 3)
        return (min(edge, CPU_TILE[0]), min(edge, CPU_TILE[1])) if self.targets.device.type == "cpu" else (edge, edge)

    def _logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """fp32 [t, v]."""
        logits = torch.nn.functional.linear(hidden.float(), weight, None if bias is None else bias.float())
        if self._scale != 1.0:
            logits.mul_(self._scale)
        if self._softcap is not None:
            logits.div_(self._softcap).tanh_().mul_(self._softcap)
        return logits

    def _add_tile(self, at: slice, z: Tensor, y: Tensor, offset: int) -> None:
        width = z.shape[1]
        self._seen[at] += width
        column = self.targets[at] - offset
        hit = ((column >= 0) & (column < width)).nonzero()[:, 0]
        for sums, logits in ((self._original, z), (self._compressed, y)):
            sums.target[at.start + hit] = logits[hit, column[hit]].double()
        difference = z - y
        shrink = self._original.exponentials(at, z, offset)
        self._numerator[at] = self._numerator[at] * shrink + difference.mul_(z).sum(dim=1).double()
        self._compressed.exponentials(at, y, offset)

    def state(self) -> dict[str, Tensor]:
        """All that is needed to go on in another process, by name; safetensors can hold it. Not copied."""
        tensors = {"numerator": self._numerator, "seen": self._seen}
        for name, sums in (("original", self._original), ("compressed", self._compressed)):
            tensors |= {f"{name}.{f.name}": getattr(sums, f.name) for f in fields(sums)}
        return tensors

    def load(self, state: dict[str, Tensor]) -> None:
        """Goes on from `state()` of a comparison with the same targets."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def result(self) -> Evaluation:
        """Raises BadNumerics where a model's logits are not finite."""
        seen = {int(self._seen.min()), int(self._seen.max())}
        assert seen == {self.vocabulary}, f"of {self.vocabulary} rows of the head {sorted(seen)} were given"
        before = self._original.logsumexp() - self._original.target
        after = self._compressed.logsumexp() - self._compressed.target
        kl = self._numerator / self._original.total - self._original.logsumexp() + self._compressed.logsumexp()
        for what, values in (("original", before), ("compressed", after + kl)):
            if bad := int((~values.isfinite()).sum()):
                row = int(self.rows[~values.isfinite()][0])
                raise BadNumerics(
                    f"evaluation row {row}: logits of the {what} model are NaN or Inf for {bad} of {len(values)} tokens; "
                    f"check the checkpoint, or choose a scheme with more range"
                )
        return Evaluation.of(self.rows, kl, before, after, self._original.best == self._compressed.best)


@dataclass(frozen=True)
class Evaluation:
    """All fp64, on the CPU. A row without scored tokens counts nowhere."""

    kl: Tensor
    """[rows]: mean over the row's scored tokens of KL(original || compressed), nats."""
    loss_before: Tensor
    loss_after: Tensor
    """[rows]: mean negative log-likelihood, nats."""
    agreement: Tensor
    """[rows]: share of tokens where both models' most likely token is the same."""
    tokens: Tensor
    """[rows]: scored tokens."""
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Tensor, kl: Tensor, before: Tensor, after: Tensor, same: Tensor) -> Evaluation:
        """From one number a token."""
        rows = rows.cpu()
        count = torch.bincount(rows).double()
        scored_rows = count > 0

        def mean(values: Tensor) -> Tensor:
            return (torch.bincount(rows, weights=values.cpu().double()) / count.clamp(min=1))[scored_rows]

        return cls(mean(kl), mean(before), mean(after), mean(same), count[scored_rows])

    def _mean(self, values: Tensor) -> float:
        return float((values * self.tokens).sum() / self.tokens.sum())

    def summary(self) -> dict[str, Any]:
        """What kompressor.json says, and gates judge; six digits, so that sums in another order say the same."""
        before, after = self._mean(self.loss_before), self._mean(self.loss_after)
        return {
            "rows": len(self.tokens),
            "tokens": int(self.tokens.sum()),
            "kl": _digits(self._mean(self.kl)),
            "perplexityBefore": _digits(math.exp(before)),
            "perplexityAfter": _digits(math.exp(after)),
            "perplexityIncrease": _digits(math.expm1(after - before)),
            "topOneAgreement": _digits(self._mean(self.agreement)),
            **self.notes,
        }


def bootstrap_ratio(kl_a: Tensor | Sequence[float], kl_b: Tensor | Sequence[float], draws: int, seed: int) -> tuple[float, float, float]:
    """Mean of a over mean of b, and its 95 % interval by paired bootstrap: the same rows drawn for both (Efron and Tibshirani 1993).

    One number a row, rows of equal length. Returns (ratio, low, high)."""
    a, b = torch.as_tensor(kl_a, dtype=torch.float64), torch.as_tensor(kl_b, dtype=torch.float64)
    assert a.shape == b.shape and a.dim() == 1 and len(a) > 0, (a.shape, b.shape)
    drawn = torch.randint(len(a), (draws, len(a)), generator=torch.Generator().manual_seed(seed))
    ratios = a[drawn].mean(dim=1) / b[drawn].mean(dim=1)
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(a.mean() / b.mean()), low, high


@dataclass
class BlockError:
    """Relative error of a block's output over all evaluation rows: sqrt(sum |compressed - original|^2 / sum |original|^2)."""

    squared_error: float = 0.0
    squared_norm: float = 0.0

    def add(self, original: Tensor, compressed: Tensor) -> None:
        """Hidden states of the same shape [..., hidden], any dtype; differences in fp32, sums over positions in fp64."""
        assert original.shape == compressed.shape, (original.shape, compressed.shape)
        original, compressed = original.flatten(0, -2), compressed.flatten(0, -2)
        for start in range(0, len(original), 1024):
            x = original[start : start + 1024].float()
            self.squared_error += _squares(compressed[start : start + 1024].float() - x)
            self.squared_norm += _squares(x)

    @property
    def value(self) -> float:
        """0 where nothing was counted; NaN and Inf come through."""
        return _digits(math.sqrt(self.squared_error / self.squared_norm)) if self.squared_norm else 0.0


def _squares(x: Tensor) -> float:
    """Sum of squares of fp32 [rows, columns]: a row's in fp32, over rows in fp64."""
    return float(x.square().sum(dim=-1).double().sum())


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
