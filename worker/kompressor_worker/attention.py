"""Causal attention over whole rows: full or in a sliding window, with grouped KV heads and, in some families, soft-capped scores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [rows, heads, length, head_dim] by cos and sin [1, length, rotary_dim]; what is beyond rotary_dim
    passes (Phi-3's partial factor). Halves are paired, as in the files that hubs hold."""
    cos, sin = cos[:, None], sin[:, None]
    width = cos.shape[-1]
    turned, passed = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, passed), dim=-1) if passed.shape[-1] else turned


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """Attention output [rows, length, heads * head_dim] of q [rows, heads, length, head_dim] and k, v [rows, KV heads, length, head_dim].

    A position sees itself and those before it, at most `window` in all. Rows are padded on the right only, so padding is never seen."""
    rows, heads, length, _ = q.shape
    shared = heads // k.shape[1]
    if softcap is None:
        mask = visible(length, window, q.device) if window is not None and window < length else None
        k, v = (x.repeat_interleave(shared, dim=1) if shared > 1 else x for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    else:
        out = capped(q, k, v, scale, window, softcap)
    return out.transpose(1, 2).reshape(rows, length, -1)


def capped(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float) -> Tensor:
    """[rows, heads, length, head_dim] in q's dtype, of soft-capped scores; arithmetic is fp32."""
    rows, _, length, _ = q.shape
    shared, mask = q.shape[1] // k.shape[1], visible(length, window, q.device)

    def seen(row: int, head: int) -> Tensor:
        """By the heads that share this KV head. Scores of a few heads at a time: they are the one matrix that grows with length squared."""
        mine = q[row, head * shared : (head + 1) * shared].float()
        scores = torch.tanh(mine @ k[row, head].float().T * (scale / softcap)) * softcap
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v[row, head].float()

    if q.requires_grad or k.requires_grad or v.requires_grad:  # a backward through writes into one tensor copies all of it for each
        return torch.stack([torch.cat([seen(row, head) for head in range(k.shape[1])]) for row in range(rows)]).to(q.dtype)
    out = torch.empty_like(q)
    for row in range(rows):
        for head in range(k.shape[1]):
            out[row, head * shared : (head + 1) * shared] = seen(row, head)
    return out


def visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [length, length]: which key (column) a query (row) sees."""
    at = torch.arange(length, device=device)
    distance = at[:, None] - at[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)
