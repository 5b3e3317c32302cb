"""The law that image codes are drawn from, and drawing from it.

A `Sampling` is a law, not a hint: log-probs that carry it are those of the tempered, guided and truncated distribution.
Shape suffixes: S samples, A actions, V codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gvu.errors import GvuError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How image codes are drawn from the model's logits.

    Attributes:
        temperature: logits are divided by it; 0 is greedy (and then has no gradient to train on).
        top_k: keep the k most probable codes; 0 keeps all.
        top_p: keep the smallest set of codes with at least this mass; 1 keeps all.
        min_p: keep codes with at least this share of the most probable code's probability; 0 keeps all.
        cfg: classifier-free guidance scale s in u + s (c - u); 1 is off and costs one branch.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    cfg: float = 1.0

    def __post_init__(self) -> None:
        bounds = (self.temperature >= 0, self.top_k >= 0, 0 < self.top_p <= 1, 0 <= self.min_p < 1, self.cfg >= 0)
        if not all(bounds):
            raise GvuError(
                f"{self} is out of range: need temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p < 1, cfg >= 0"
            )

    @property
    def truncated(self) -> bool:
        """Whether some codes can never be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def law(self) -> str:
        """Name of the law, e.g. `cond`, `cfg(3.0)`, `cond,T=0.9,min_p=0.03`."""
        parts = ["cond" if self.cfg == 1 else f"cfg({self.cfg})"]
        parts += [f"T={self.temperature}"] if self.temperature != 1 else []
        parts += [
            f"{k}={v}"
            for k, v, off in (("top_k", self.top_k, 0), ("top_p", self.top_p, 1), ("min_p", self.min_p, 0))
            if v != off
        ]
        return ",".join(parts)


def log_law(logits_V: Tensor, sampling: Sampling, keep: Tensor | None = None) -> Tensor:
    """Log-probs (..., V) in fp32 of the law over codes, from conditional (or already guided) logits (..., V).

    Args:
        keep: codes (...,) that stay in the support whatever the truncation: the actions being replayed. At the
        parameters that
            drew them they are inside anyway, so replay is exact; later they keep a finite log-prob.
    """
    logits = logits_V.float()
    if sampling.temperature == 0:
        return torch.where(_one_hot(logits.argmax(-1), logits), 0.0, float("-inf"))
    logp = torch.log_softmax(logits / sampling.temperature, -1)
    if not sampling.truncated:
        return logp
    inside = support(logp.detach(), sampling)
    if keep is not None:
        inside = inside | _one_hot(keep, logits)
    return torch.log_softmax(logp.masked_fill(~inside, float("-inf")), -1)


def support(logp_V: Tensor, sampling: Sampling) -> Tensor:
    """Codes (..., V) that truncation keeps, from log-probs (..., V): top-k, then top-p of what is left, then min-p."""
    inside = torch.ones_like(logp_V, dtype=torch.bool)
    if 0 < sampling.top_k < logp_V.shape[-1]:
        inside &= logp_V >= logp_V.topk(sampling.top_k, -1).values[..., -1:]
    if sampling.top_p < 1:
        kept = logp_V.masked_fill(~inside, float("-inf")).softmax(-1)
        order = kept.sort(dim=-1, descending=True, stable=True).indices
        before = kept.gather(-1, order).cumsum(-1) - kept.gather(-1, order)
        inside &= torch.zeros_like(inside).scatter(-1, order, before < sampling.top_p)
    if sampling.min_p > 0:
        inside &= logp_V >= logp_V.amax(-1, keepdim=True) + torch.tensor(sampling.min_p).log()
    return inside


def guide(cond_V: Tensor, uncond_V: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on log-softmax, u + s (c - u), as transformers' unbatched processor and X-Omni do."""
    cond, uncond = torch.log_softmax(cond_V.float(), -1), torch.log_softmax(uncond_V.float(), -1)
    return uncond + scale * (cond - uncond)


def draw(logp_S_V: Tensor, uniform_S: Tensor) -> Tensor:
    """One code per row by inverse CDF; the same uniform gives the same code whatever else is in the batch."""
    cdf = logp_S_V.exp().cumsum(-1)
    code = torch.searchsorted(cdf, (uniform_S[:, None] * cdf[:, -1:]).contiguous(), right=True).squeeze(-1)
    last = torch.searchsorted(cdf, cdf[:, -1:].contiguous()).squeeze(-1)  # the code that completes the mass
    return torch.minimum(code, last).clamp_max(logp_S_V.shape[-1] - 1)  # whatever the log-probs: never out of range


def uniforms(seeds: tuple[int, ...] | list[int], actions: int, device: torch.device) -> Tensor:
    """(S, A) uniforms in [0, 1), each row from its own seed."""
    rows = [torch.rand(actions, generator=torch.Generator().manual_seed(s), dtype=torch.float32) for s in seeds]
    return torch.stack(rows).to(device)


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from (run seed, step, prompt id, sample, ...), stable across processes and machines
    (splitmix64)."""
    state = 0
    for part in parts:
        state = (state ^ (part & (2**64 - 1))) + 0x9E3779B97F4A7C15 & (2**64 - 1)
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ state >> 27) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


def entropy(logp_V: Tensor) -> Tensor:
    """Entropy (...) in nats of log-probs (..., V); codes outside the support count as 0."""
    return -(logp_V.exp() * logp_V.clamp_min(torch.finfo(logp_V.dtype).min)).sum(-1)


def _one_hot(index: Tensor, like_V: Tensor) -> Tensor:
    return torch.zeros_like(like_V, dtype=torch.bool).scatter(-1, index.unsqueeze(-1), True)
