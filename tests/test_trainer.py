"""The method on a tiny X-Omni: what a step does, what it must not depend on, and that the reward rises."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gvu.config import TrainConfig, load_config
from gvu.loss import policy_loss
from gvu.models.base import LoraSpec
from gvu.models.xomni.adapter import XOmni
from gvu.prompts import Prompt
from gvu.reward import Scorer
from gvu.runtime import Clock, autocast, in_bf16
from gvu.testing.common import stir
from gvu.trainer import Trainer

TEXTS = ("a red car", "a blue dog", "two cups", "a cat")
SMALL = (
    "precision=fp32", "steps=15", "rollout.prompts_per_step=2", "rollout.num_generations=4", "optim.warmup_steps=0",
    "optim.lr=1e-2", "reward.kind=mean_logp",
)  # fmt: skip
Weights = dict[str, Tensor]


def trainer(*overrides: str, model: XOmni | None = None, texts: tuple[str, ...] = TEXTS) -> Trainer:
    """A trainer of a fresh tiny model; the settings are small unless overridden."""
    config = load_config(TrainConfig, overrides=[*SMALL, *overrides])
    model = model or XOmni.tiny(0)
    model.add_lora(config.lora, seed=1)
    return Trainer(model, [Prompt(text=t, metadata=None, id=i) for i, t in enumerate(texts)], config)


def weights(t: Trainer) -> Weights:
    return {n: p.detach().clone() for n, p in t.model.trainable().items()}


def trained(*overrides: str, steps: int = 2) -> tuple[Weights, list[dict[str, float]]]:
    t = trainer(*overrides)
    metrics = [t.step(k) for k in range(steps)]
    return weights(t), metrics


def same(a: Weights, b: Weights, atol: float = 0.0) -> bool:
    assert a.keys() == b.keys()
    return all(float((a[n] - b[n]).abs().max()) <= atol for n in a)


# --- what a step does --------------------------------------------------------------------------------------------


def test_a_step_is_the_equations() -> None:
    """One step, written out: draw, score, centre, loss, AdamW; the trainer must arrive at the same parameters."""
    settings = ("loss.beta=0", "advantage.scale=group")
    t, mirror = trainer(*settings), trainer(*settings)
    metrics = t.step(0)
    rollout, scores = mirror.experience(0, mirror.batch(0), Clock())
    groups = scores.reward_S.view(2, 4)
    gain = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    logp, _ = mirror.model.policy_logp(rollout)
    loss = -((logp - rollout.logp_S_A).exp() * gain[:, None]).mean()
    parameters = list(mirror.model.trainable().values())
    grads = torch.autograd.grad(loss, parameters)
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g / max(1.0, norm)
    optimizer.step()
    assert same(weights(t), weights(mirror), 1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["reward"] == pytest.approx(float(scores.reward_S.mean()))
    assert metrics["group_std"] == pytest.approx(float(groups.std(1).mean()), rel=1e-5)
    assert metrics["entropy"] == pytest.approx(float(rollout.entropy_S_A.mean()))


def test_the_reward_rises() -> None:
    paper = ("advantage.scale=group", "loss.beta=0.03", "optim.schedule=constant", "reward.via=tokens")
    t = trainer("rollout.prompts_per_step=4", "rollout.num_generations=8", *paper)
    metrics = [t.step(k) for k in range(15)]
    rewards = [m["reward"] for m in metrics]
    within = metrics[0]["group_std"]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 2 * within
    assert rewards[-1] > rewards[0] + 0.3
    assert max(m["replay_gap"] for m in metrics) < 1e-5


def test_a_larger_beta_stays_nearer_to_the_base() -> None:
    far, near = (trained(f"loss.beta={beta}", steps=6)[1][-1] for beta in (1e-6, 5))
    assert near["kl"] < far["kl"] / 2
    assert near["kl"] > 0


def test_without_beta_there_is_no_reference_pass() -> None:
    metrics = trained("loss.beta=0", steps=1)[1][0]
    assert metrics["kl"] == 0
    assert trainer("loss.beta=0").reference(trainer().experience(0, trainer().batch(0), Clock())[0]) is None


def test_first_update_has_ratio_one() -> None:
    _, metrics = trained(steps=3)
    for m in metrics:
        assert m["replay_gap"] < 1e-5
        assert m["ratio_max"] == pytest.approx(1, abs=1e-4)
        assert m["clip_fraction"] == 0
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics[2]["kl"] > 1e-5


def test_several_updates_are_clipped() -> None:
    _, metrics = trained("optim.updates_per_rollout=3", "optim.lr=3e-2", steps=2)
    assert all(m["clip_fraction"] > 0.05 for m in metrics)
    assert all(m["replay_gap"] < 1e-5 for m in metrics), "the gap is that of the first update"
    assert metrics[0]["ratio_max"] > 1.2


def test_later_updates_keep_the_sampled_log_probs() -> None:
    """The second update's loss is that of the moved policy against the log-probs of the drawing one."""
    t = trainer("optim.updates_per_rollout=1", "loss.beta=0.1", "loss.clip_high=0.05")
    rollout, scores = t.experience(0, t.batch(0), Clock())
    gain = scores.reward_S - scores.reward_S.mean()
    reference = t.reference(rollout)
    t._descend(rollout, reference, gain)
    with torch.no_grad():
        want, named = policy_loss(t.model.policy_logp(rollout)[0], rollout.logp_S_A, reference, gain, t.config.loss)
    got = t._descend(rollout, reference, gain)
    assert got["loss"] == pytest.approx(float(want), abs=1e-5)
    assert got["clip_fraction"] == pytest.approx(named["clip_fraction"], abs=1e-6)
    assert named["clip_fraction"] > 0


@pytest.mark.parametrize("reward", ["geometric_mean", "content", "pmi"])
@pytest.mark.parametrize("via", ["tokens", "pixels"])
def test_every_reward_and_path_takes_a_step(reward: str, via: str) -> None:
    after, metrics = trained(f"reward.kind={reward}", f"reward.via={via}", "reward.decoder_steps=1", steps=1)
    assert all(math.isfinite(v) for v in metrics[0].values())
    assert not same(after, weights(trainer()))


def test_guided_and_truncated_laws_train_on_what_was_drawn() -> None:
    with pytest.warns(UserWarning, match="truncated"):
        _, metrics = trained("rollout.cfg=2", "rollout.min_p=0.05", "rollout.temperature=0.9", steps=2)
    assert metrics[0]["replay_gap"] < 1e-4
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-5)


# --- what it must not depend on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 3])
def test_gradient_accumulation_is_one_large_batch(micro: int) -> None:
    """AdamW's first step is the gradient's sign, so the norm is compared as well."""
    whole, metrics = trained("optim.lr=1e-4", steps=1)
    parts, split = trained("optim.lr=1e-4", f"optim.micro_batch={micro}", steps=1)
    assert not same(whole, weights(trainer()), 5e-5)
    assert same(whole, parts, 1e-6)
    for name in ("loss", "kl", "grad_norm", "clip_fraction"):
        assert split[0][name] == pytest.approx(metrics[0][name], abs=1e-5)


def test_the_rewards_micro_batch_changes_nothing() -> None:
    whole, metrics = trained("optim.lr=1e-4", steps=1)
    for size in (1, 3):
        parts, split = trained("optim.lr=1e-4", f"reward.micro_batch={size}", steps=1)
        assert same(whole, parts, 1e-6)
        assert split[0]["reward"] == pytest.approx(metrics[0]["reward"], abs=1e-6)


def test_a_seed_is_a_run() -> None:
    torch.manual_seed(1)
    one, first = trained(steps=2)
    torch.manual_seed(2)
    two, second = trained(steps=2)
    assert same(one, two)
    for name in ("reward", "loss", "kl", "grad_norm", "entropy"):
        assert [m[name] for m in first] == [m[name] for m in second]
    other, third = trained("seed=1", steps=2)
    assert not same(one, other, 1e-4)
    assert first[0]["reward"] != third[0]["reward"]


def test_an_epoch_draws_every_prompt_once_in_a_new_order() -> None:
    t = trainer("rollout.prompts_per_step=3", texts=tuple(f"prompt {k}" for k in range(6)))
    steps = [[p.id for p in t.batch(k)] for k in range(40)]
    epochs = [steps[k] + steps[k + 1] for k in range(0, 40, 2)]
    assert all(sorted(e) == list(range(6)) for e in epochs)
    assert len({tuple(e) for e in epochs}) > 10
    assert [[p.id for p in t.batch(k)] for k in range(40)] == steps


def test_a_prompt_that_comes_twice_is_drawn_anew() -> None:
    t = trainer("rollout.prompts_per_step=4", texts=("a red car",))
    seeds = t.seeds(0, t.batch(0))
    assert len(set(seeds)) == 16
    assert seeds[:4] == trainer("rollout.prompts_per_step=1").seeds(0, t.batch(0)[:1])
    assert not set(seeds) & set(t.seeds(1, t.batch(1)))


# --- variants ----------------------------------------------------------------------------------------------------


def test_skipped_groups_leave_the_mean_to_the_others() -> None:
    """With one of two groups dead the gradient of the rest counts once instead of half."""
    probe = trainer()
    stds = probe.experience(0, probe.batch(0), Clock())[1].reward_S.view(2, 4).std(1).tolist()
    below = f"advantage.dead_below={sum(stds) / 2}"
    kept, skipped = (
        trained(below, "loss.beta=0", f"advantage.skip_dead={s}", steps=1)[1][0] for s in ("false", "true")
    )
    assert kept["dead_groups"] == skipped["dead_groups"] == 0.5
    assert skipped["grad_norm"] == pytest.approx(2 * kept["grad_norm"], rel=1e-4)


def test_a_step_without_a_signal_moves_nothing() -> None:
    before = weights(trainer())
    after, metrics = trained("advantage.dead_below=1e6", "advantage.skip_dead=true", steps=1)
    assert same(before, after)
    assert metrics[0]["dead_groups"] == 1
    assert metrics[0].keys() >= trained(steps=1)[1][0].keys() - {"seconds/reference", "seconds/update"}


def test_the_configured_teacher_reads() -> None:
    rewards = dict[str, Tensor]()
    for teacher in ("frozen", "current", "ema"):
        t = trainer(f"reward.teacher={teacher}", "reward.via=tokens")
        stir(t.model)
        t.model.update_ema(0.5)
        rollout, scores = t.experience(0, t.batch(0), Clock())
        with t.model.teacher(teacher):  # type: ignore[arg-type]
            want = Scorer(t.model, t.config.reward)(t.model.read_tokens(rollout), rollout.prompts.texts).reward_S
        torch.testing.assert_close(scores.reward_S, want)
        rewards[teacher] = want
    assert float((rewards["frozen"] - rewards["current"]).abs().max()) > 1e-3
    assert float((rewards["ema"] - rewards["current"]).abs().max()) > 1e-3
    assert float((rewards["ema"] - rewards["frozen"]).abs().max()) > 1e-3


def test_the_ema_teacher_follows_every_step() -> None:
    t = trainer("reward.teacher=ema", "reward.ema_decay=0.7")
    average = weights(t)
    for k in range(3):
        t.step(k)
        average = {n: 0.7 * average[n] + 0.3 * p for n, p in weights(t).items()}
    with t.model.teacher("ema"):
        assert same(weights(t), average, 1e-6)


def test_dropout_acts_in_the_update_only() -> None:
    t = trainer("lora.dropout=0.5")
    stir(t.model)
    t.step(0)
    rollout, _ = t.experience(1, t.batch(1), Clock())
    with torch.no_grad():
        torch.testing.assert_close(t.model.policy_logp(rollout)[0], rollout.logp_S_A, atol=1e-5, rtol=0)
    assert t.update(1, rollout, torch.ones(8), torch.ones(8, dtype=torch.bool), Clock())["replay_gap"] > 1e-3


def test_bf16_keeps_parameters_in_fp32() -> None:
    t = trainer("precision=bf16")
    metrics = [t.step(k) for k in range(3)]
    assert all(math.isfinite(v) for m in metrics for v in m.values())
    assert all(p.dtype == torch.float32 for p in t.model.trainable().values())
    assert 0 < metrics[2]["replay_gap"] < 0.1
    assert abs(metrics[0]["kl"]) < 0.01
    assert metrics[0]["entropy"] != trained(steps=1)[1][0]["entropy"], "nothing was computed in bf16"


@pytest.mark.parametrize(
    ("schedule", "want"),
    [("constant", [0.5, 1, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.75, 0.5]), ("cosine", [0.5, 1, 1, 0.8535534, 0.5])],
)
def test_rates_warm_up_and_fall(schedule: str, want: list[float]) -> None:
    t = trainer(f"optim.schedule={schedule}", "optim.warmup_steps=2", "steps=6", "optim.lr=1")
    assert [t.rate(k) for k in range(5)] == pytest.approx(want)
    t.config = replace(t.config, steps=15)
    assert t.step(0)["lr"] == 0.5
    assert t.optimizer.param_groups[0]["lr"] == 0.5


# --- what goes wrong ---------------------------------------------------------------------------------------------


class NanReader(XOmni):
    """Reads nothing but nan."""

    def text_logp(self, *args: Any, **kwargs: Any) -> Any:
        score = super().text_logp(*args, **kwargs)
        return replace(score, logp_S_T=score.logp_S_T * math.nan)


class NanReplay(XOmni):
    """Its gradients are nan."""

    def policy_logp(self, *args: Any, **kwargs: Any) -> Any:
        logp, entropy = super().policy_logp(*args, **kwargs)
        return logp * torch.tensor(math.nan), entropy


@pytest.mark.parametrize(("family", "word"), [(NanReader, "reward"), (NanReplay, "gradient")])
def test_numbers_that_are_none_stop_the_run_and_move_nothing(family: type[XOmni], word: str) -> None:
    t = trainer(model=family.tiny(0))
    before = weights(t)
    with pytest.raises(FloatingPointError, match=word):
        t.step(0)
    assert same(before, weights(t))
    assert not t.model.language.training


def test_the_fresh_adapter_is_the_base() -> None:
    """So the first rollout is the base's, whatever the adapter's seed."""
    bare, model = XOmni.tiny(0), XOmni.tiny(0)
    model.add_lora(LoraSpec(), seed=5)
    assert torch.equal(bare.generate("a cup").rollout.codes_S_A, model.generate("a cup").rollout.codes_S_A)


def test_auto_precision_is_bf16_where_the_cpu_multiplies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU without bf16 instructions a step in bf16 took twelve times as long as in fp32."""
    cpu = torch.device("cpu")
    for capabilities, fast in (({"avx2": True, "avx512_bf16": False}, False), ({"amx_bf16": True}, True), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capabilities=capabilities: capabilities)
        assert in_bf16("auto", cpu) == fast
        assert in_bf16("bf16", cpu)
        assert not in_bf16("fp32", cpu)
        with autocast("auto", cpu):
            assert torch.is_autocast_enabled("cpu") == fast
