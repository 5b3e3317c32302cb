"""Attention for training on CPUs: `attn_implementation="gvu"`.

torch's fused CPU kernel is 3 to 7 times slower in bf16 than two batched matrix products with a softmax between, at
the sizes of small models (benchmarks/attention.py). On a CPU in bf16 this implementation takes the products; everywhere
else it is
transformers' `sdpa`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "gvu"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: (S, heads, L, D) queries and (S, kv heads, K, D) keys to (S, L, heads, D)."""
    half = query.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if not (half and query.device.type == "cpu" and dropout == 0.0):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    causal = (
        attention_mask is None
        and query.shape[2] > 1
        and (is_causal if is_causal is not None else getattr(module, "is_causal", True))
    )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast("cpu", enabled=False):
        out = products(query.bfloat16(), key.bfloat16(), value.bfloat16(), attention_mask, scale, causal)
    return out.transpose(1, 2), None


def products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """(S, heads, L, D) by two matrix products, softmax in fp32; the query heads of a kv head are stacked, not its
    keys repeated."""
    samples, heads, length, width = query.shape
    stacked = query.reshape(samples, key.shape[1], -1, width)
    scores = (stacked @ key.transpose(-1, -2)).float().view(samples, heads, length, -1) * scale
    if causal:
        mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril(key.shape[2] - length)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).to(value.dtype).view(samples, key.shape[1], -1, key.shape[2])
    return (weights @ value).view(samples, heads, length, width)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
