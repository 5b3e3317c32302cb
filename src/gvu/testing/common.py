"""What the checks share: prompts, laws, stirred models, comparisons."""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gvu.errors import GvuError
from gvu.models.base import LoraSpec, Rollout, UnifiedModel
from gvu.sampling import Sampling

Tiny = Callable[[int], UnifiedModel]
"""Seed to a small random model: an adapter's `tiny`."""
TEXTS = ("a red car", "a photo of two small dogs", "a cup")
"""Prompts of different lengths, the longest in the middle."""
INSTRUCTION = "Describe the image in detail."
LAWS = (
    Sampling(),
    Sampling(temperature=0.7, top_k=5),
    Sampling(top_p=0.8),
    Sampling(temperature=1.3, min_p=0.1),
    Sampling(top_k=12, top_p=0.9, min_p=0.05),
)
FORBIDDEN = re.compile(r"(embed\w*|\w*head|\w*norm\w*)\.lora_")
"""Adapters on these are off unless asked for."""


def near(got: Tensor, want: Tensor, atol: float) -> None:
    """The same shape, and values within `atol`."""
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


def drawn(model: UnifiedModel, n: int = 1, sampling: Sampling | None = None, texts: Sequence[str] = TEXTS) -> Rollout:
    """`n` images of each text; the seeds count up from 100."""
    seeds = range(100, 100 + len(texts) * n)
    return model.rollout(model.encode_prompts(texts), n, sampling or Sampling(), list(seeds))


def stir(model: UnifiedModel, scale: float = 0.1) -> None:
    """Move every trainable parameter at random, as if it had been trained (fresh LoRA is the identity)."""
    generator = torch.Generator().manual_seed(7)
    for p in model.trainable().values():
        p.data += scale * torch.randn(p.shape, generator=generator)


def adapted(tiny: Tiny) -> UnifiedModel:
    """A model with a LoRA adapter that does something."""
    model = tiny(0)
    model.add_lora(LoraSpec(r=4, alpha=8), seed=1)
    stir(model)
    return model


@torch.no_grad()
def outputs(model: UnifiedModel, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Log-probs (S, A) of the codes and (S, T) of the texts: both branches in two tensors."""
    text = model.text_logp(model.read_tokens(rollout), rollout.prompts.texts, INSTRUCTION)
    return model.policy_logp(rollout)[0], text.logp_S_T


def same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], atol: float) -> None:
    """Both branches agree."""
    near(got[0], want[0], atol)
    near(got[1], want[1], atol)


def differ(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    """Both branches differ visibly."""
    for a, b in zip(one, other, strict=True):
        assert float((a - b).abs().max()) > 1e-2, "the adapter changes nothing here"


def refused(use: Callable[[], object]) -> GvuError:
    """What calling it raises, which must be a GvuError."""
    try:
        use()
    except GvuError as error:
        return error
    raise AssertionError("bad input was accepted")
