"""Attention for training on CPUs: `attn_implementation="gvu"`.

torch's fused CPU kernel is 3 to 7 times slower in bf16 than two batched matrix products with a softmax between, at the sizes of
small models (benchmarks/attention.py). On a CPU in bf16 this implementation takes the products; everywhere else it is
transformers' `sdpa`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "gvu"


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
              scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None,
              **kwargs: Any) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """transformers' attention function: (S, heads, L, D) queries and (S, kv heads, K, D) keys to (S, L, heads, D)."""
    half = query.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if not (half and query.device.type == "cpu" and query.shape[2] > 1 and dropout == 0.0):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      is_causal=is_causal, **kwargs)  # fmt: skip
    causal = attention_mask is None and (is_causal if is_causal is not None else getattr(module, "is_causal", True))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return products(query, key, value, attention_mask, scale, causal), None


def products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Attention by two matrix products, softmax in fp32; kv heads are shared by groups of query heads."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if causal:
        length, past = query.shape[2], key.shape[2] - query.shape[2]
        mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril(past)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
