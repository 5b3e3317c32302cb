"""Group-relative advantages and the clipped policy loss, as pure functions of tensors.

Shape suffixes: S samples (groups of G neighbours share a prompt), A actions.
Sources: GRPO (arXiv 2402.03300); Dr. GRPO (2503.20783) for mean-only advantages; k3 (Schulman, "Approximating KL
divergence").
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gvu.config import AdvantageConfig, LossConfig


@dataclass(frozen=True, kw_only=True)
class Advantage:
    """Advantages of a batch.

    Attributes:
        value_S: the advantage of each sample, the same for all its actions.
        alive_S: True where the sample's group has a signal.
        group_std: mean over groups of the rewards' standard deviation.
        dead: share of groups without a signal.
    """

    value_S: Tensor
    alive_S: Tensor
    group_std: float
    dead: float


def advantage(reward_S: Tensor, group: int, config: AdvantageConfig) -> Advantage:
    """Reward minus its group's mean, divided by nothing, the group's or the batch's standard deviation (with G - 1)."""
    reward = reward_S.float().view(-1, group)
    centred, std = reward - reward.mean(1, keepdim=True), reward.std(1, keepdim=True)
    divisor = {"group": std + config.eps, "none": torch.ones_like(std), "batch": centred.std() + config.eps}[
        config.scale
    ]
    alive = (std >= config.dead_below).expand_as(reward)
    value = torch.where(alive, centred / divisor, torch.zeros_like(centred))
    dead = 1.0 - float(alive[:, 0].float().mean())
    return Advantage(value_S=value.flatten(), alive_S=alive.flatten(), group_std=float(std.mean()), dead=dead)


def policy_loss(
    logp_S_A: Tensor, old_S_A: Tensor, reference_S_A: Tensor | None, advantage_S: Tensor, config: LossConfig
) -> tuple[Tensor, dict[str, float]]:
    """Mean over samples and actions of -min(r A, clip(r) A) + beta k3, with r = exp(logp - old).

    Args:
        logp_S_A: log-probs under the parameters being trained, with gradient.
        old_S_A: log-probs of the sampling policy.
        reference_S_A: log-probs of the frozen base; None leaves the KL term out.
        advantage_S: one advantage per sample.

    Returns:
        The loss, and the metrics `kl`, `clip_fraction`, `ratio_max`.
    """
    ratio = (logp_S_A - old_S_A).exp()
    gain = advantage_S[:, None]
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    surrogate = torch.minimum(ratio * gain, clipped * gain)
    loss, kl = -surrogate.mean(), logp_S_A.new_zeros(())
    if reference_S_A is not None:
        kl = k3(logp_S_A, reference_S_A).mean()
        loss = loss + config.beta * kl
    outside = ((ratio < 1 - config.clip_low) & (gain < 0)) | ((ratio > 1 + config.clip_high) & (gain > 0))
    metrics = {"kl": kl, "clip_fraction": outside.float().mean(), "ratio_max": ratio.max()}
    return loss, {k: float(v.detach()) for k, v in metrics.items()}


def k3(logp: Tensor, reference: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference) in nats at actions drawn from the policy."""
    gap = reference - logp
    return gap.exp() - gap - 1
