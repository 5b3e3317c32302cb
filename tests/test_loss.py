"""Advantages and the clipped loss against values worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from gvu.config import AdvantageConfig, LossConfig
from gvu.loss import Advantage, advantage, k3, policy_loss

REWARDS = torch.tensor([0.1, 0.3, 0.2, 0.6, 0.5, 0.5, 0.5, 0.5])
"""Two groups of four: deviations -0.2, 0, -0.1, 0.3 with sample variance 0.14 / 3, and one without a signal."""


def close(got: Tensor, want: Tensor | list[float], atol: float = 1e-6) -> None:
    torch.testing.assert_close(got, torch.as_tensor(want), atol=atol, rtol=0)


def values(scale: str, **kwargs: float) -> Advantage:
    return advantage(REWARDS, 4, AdvantageConfig(scale=scale, **kwargs))  # type: ignore[arg-type]


def test_advantage_over_the_groups_deviation() -> None:
    std = math.sqrt(0.14 / 3) + 1e-4
    adv = values("group")
    close(adv.value_S, [-0.2 / std, 0.0, -0.1 / std, 0.3 / std, 0, 0, 0, 0])
    assert adv.alive_S.tolist() == [True] * 4 + [False] * 4
    assert adv.dead == 0.5
    assert adv.group_std == pytest.approx(math.sqrt(0.14 / 3) / 2, abs=1e-6)


def test_advantage_over_nothing() -> None:
    close(values("none").value_S, [-0.2, 0.0, -0.1, 0.3, 0, 0, 0, 0])


def test_advantage_over_the_batchs_deviation() -> None:
    std = math.sqrt(0.14 / 7) + 0.01
    close(values("batch", eps=0.01).value_S, [-0.2 / std, 0.0, -0.1 / std, 0.3 / std, 0, 0, 0, 0])


def test_pairs_lose_the_size_of_the_gap() -> None:
    rewards = torch.tensor([0.1, 0.9, 0.52, 0.5, 0.3, 0.31])
    pairs = advantage(rewards, 2, AdvantageConfig(scale="group", eps=0.0)).value_S
    close(pairs.abs(), torch.full((6,), math.sqrt(0.5)), 1e-3)
    assert pairs.sign().tolist() == [-1, 1, 1, -1, -1, 1]
    plain = advantage(rewards, 2, AdvantageConfig(scale="none")).value_S
    close(plain, [-0.4, 0.4, 0.01, -0.01, -0.005, 0.005])


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
def test_advantages_do_not_depend_on_a_groups_level(scale: str) -> None:
    config = AdvantageConfig(scale=scale)  # type: ignore[arg-type]
    shifted = REWARDS + torch.tensor([3.0] * 4 + [-2.0] * 4)
    close(advantage(shifted, 4, config).value_S, advantage(REWARDS, 4, config).value_S, 1e-5)


def test_dead_groups_are_silent_by_threshold() -> None:
    adv = values("none", dead_below=0.3)
    assert not adv.alive_S.any()
    assert adv.dead == 1.0
    close(adv.value_S, torch.zeros(8))


def hand_loss(logp: list[float], old: list[float], gain: float, low: float, high: float) -> float:
    """One sample's loss in plain Python."""
    total = 0.0
    for a, b in zip(logp, old, strict=True):
        ratio = math.exp(a - b)
        total += min(ratio * gain, min(max(ratio, 1 - low), 1 + high) * gain)
    return -total / len(logp)


def test_clipped_loss_by_hand() -> None:
    old = torch.tensor([[-1.0, -2.0, -0.5]] * 2)
    logp = old + torch.tensor([[0.1, 0.5, -0.5]] * 2)  # ratios 1.105, 1.649, 0.607
    config = LossConfig(clip_low=0.2, clip_high=0.3)
    loss, metrics = policy_loss(logp, old, None, torch.tensor([1.5, -0.7]), config)
    rows = [hand_loss(logp[0].tolist(), old[0].tolist(), gain, 0.2, 0.3) for gain in (1.5, -0.7)]
    assert float(loss) == pytest.approx(sum(rows) / 2, abs=1e-6)
    assert metrics["clip_fraction"] == pytest.approx(2 / 6)  # +: the 1.649; -: the 0.607
    assert metrics["ratio_max"] == pytest.approx(math.exp(0.5), abs=1e-6)
    assert metrics["kl"] == 0.0


def test_gradient_is_the_ratio_times_the_advantage_and_zero_where_clipped() -> None:
    old = torch.zeros(2, 3) - 1
    logp = (old + torch.tensor([[0.1, 0.5, -0.5]] * 2)).requires_grad_()
    policy_loss(logp, old, None, torch.tensor([2.0, -3.0]), LossConfig())[0].backward()
    ratio = [math.exp(0.1), math.exp(0.5), math.exp(-0.5)]
    want = [[-2 * ratio[0], 0.0, -2 * ratio[2]], [3 * ratio[0], 3 * ratio[1], 0.0]]
    assert logp.grad is not None
    close(logp.grad, torch.tensor(want) / 6)


def test_several_updates_follow_the_hand_calculation() -> None:
    """Plain gradient descent on log-probs themselves: each update is r A / n until the clip holds it."""
    old, gains, rate = torch.zeros(2, 1) - 1, torch.tensor([1.0, -1.0]), 0.2
    logp, mirror = old.clone().requires_grad_(), [-1.0, -1.0]
    for update in range(5):
        loss, metrics = policy_loss(logp, old, None, gains, LossConfig())
        (grad,) = torch.autograd.grad(loss, logp)
        logp = (logp - rate * grad).detach().requires_grad_()
        inside = [math.exp(mirror[0] + 1) <= 1.2, math.exp(mirror[1] + 1) >= 0.8]
        assert metrics["clip_fraction"] == 1 - sum(inside) / 2
        moves = [rate * math.exp(m + 1) * g / 2 * i for m, g, i in zip(mirror, (1, -1), inside, strict=True)]
        mirror = [m + d for m, d in zip(mirror, moves, strict=True)]
        close(logp.detach().flatten(), mirror)
        assert update > 0 or metrics["ratio_max"] == 1.0
    assert mirror[0] > -1 + math.log(1.2)
    assert mirror[1] < -1 + math.log(0.8)


def test_first_update_is_the_policy_gradient() -> None:
    logp = torch.tensor([[-1.0, -2.0], [-0.3, -4.0]], requires_grad=True)
    loss, _ = policy_loss(logp, logp.detach(), None, torch.tensor([0.5, -0.25]), LossConfig())
    loss.backward()
    assert logp.grad is not None
    close(logp.grad, torch.tensor([[-0.5, -0.5], [0.25, 0.25]]) / 4)


def test_kl_term_is_weighted_and_can_be_left_out() -> None:
    logp, reference = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    want = sum(math.exp(g) - g - 1 for g in (-0.5, 1.0)) / 2
    gains = torch.zeros(1)
    loss, metrics = policy_loss(logp, logp, reference, gains, LossConfig(beta=0.4))
    assert metrics["kl"] == pytest.approx(want, abs=1e-6)
    assert float(loss) == pytest.approx(0.4 * want, abs=1e-6)
    assert float(policy_loss(logp, logp, reference, gains, LossConfig(beta=0.0))[0]) == 0.0
    assert float(policy_loss(logp, logp, None, gains, LossConfig(beta=0.4))[0]) == 0.0


def test_k3_is_not_negative_and_zero_at_the_reference_only() -> None:
    gap = torch.linspace(-5, 5, 201)
    estimate = k3(torch.zeros(201), gap)
    assert bool((estimate >= -1e-6).all())
    assert float(estimate.abs().min()) == 0.0
    assert bool((estimate[gap.abs() > 0.1] > 1e-3).all())


def test_k3_is_the_divergence_in_expectation() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, base = (torch.randn(12, generator=generator).log_softmax(-1) for _ in range(2))
    kl = float((policy.exp() * (policy - base)).sum())
    assert float((policy.exp() * k3(policy, base)).sum()) == pytest.approx(kl, abs=1e-5)
    codes = torch.multinomial(policy.exp(), 50_000, replacement=True, generator=generator)
    assert float(k3(policy[codes], base[codes]).mean()) == pytest.approx(kl, rel=0.05)
