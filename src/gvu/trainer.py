"""GvU, the whole method in one file: draw, read, reward, compare within the group, update.

One step: P prompts are drawn G times each (S = P * G); the understanding branch gives the probability of every prompt token given
each image; the geometric mean is the reward; rewards are centred within a prompt's group; a clipped policy loss with a KL penalty
to the frozen base moves the LoRA adapter. Differences from the authors' release: the teacher is the frozen base (theirs is the current
policy by an oversight), log-probs are those of the law that was sampled, the clip has its old log-probs, adapters are
on the decoder layers only, rewards stay in log space, and decoding noise is seeded per sample.

Shape suffixes: P prompts, S samples, A actions, T prompt tokens. Source: arXiv 2603.06043.
"""

import math
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gvu.config import TrainConfig
from gvu.errors import GvuError
from gvu.evaluate import Report, evaluate
from gvu.loss import advantage, policy_loss
from gvu.models.base import Rollout, UnifiedModel
from gvu.models.registry import load
from gvu.plan import plan
from gvu.progress import Progress
from gvu.prompts import Prompt, load_prompts
from gvu.reward import Scorer, Scores
from gvu.run import Run, output_path, refuse_existing
from gvu.runtime import Clock, Interrupt, peak_memory_gb
from gvu.sampling import derive_seed

__all__ = ["TrainSummary", "Trainer", "plan", "train"]


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """What a run ends with.

    Attributes:
        output: the run's folder; its `adapter` subfolder loads with PEFT's `PeftModel.from_pretrained`.
        steps: steps that were done.
        seconds: wall-clock time of the run.
        before, after: benchmark name -> report.
        interrupted: whether Ctrl-C ended it early.
        last: the last step's metrics.
    """

    output: Path
    steps: int
    seconds: float
    before: dict[str, Report] = field(default_factory=dict)
    after: dict[str, Report] = field(default_factory=dict)
    interrupted: bool = False
    last: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: per benchmark before, after and their paired difference with its interval."""
        pairs = {name: self._pair(name) for name in self.before | self.after}
        return {"output": str(self.output), "steps": self.steps, "seconds": round(self.seconds, 1), "interrupted": self.interrupted,
                "benchmarks": pairs, "last": self.last}  # fmt: skip

    def _pair(self, name: str) -> dict[str, Any]:
        before, after = self.before.get(name), self.after.get(name)
        shown: dict[str, Any] = {k: r.as_dict(rows=False) for k, r in (("before", before), ("after", after)) if r}
        return {**shown, "difference": after.compare(before).as_dict()} if before and after else shown


class Trainer:
    """A model with a fresh adapter, its optimizer and its prompts; `step(k)` is the method."""

    def __init__(self, model: UnifiedModel, prompts: Sequence[Prompt], config: TrainConfig) -> None:
        if config.reward.via not in model.capabilities.reads:
            raise GvuError(f"reward.via={config.reward.via!r} is not possible with this model; "
                           f"it reads via {sorted(model.capabilities.reads)}")  # fmt: skip
        self.model, self.prompts, self.config = model, prompts, config
        self.sampling, self.scorer = config.rollout.sampling, Scorer(model, config.reward)
        self.parameters = list(model.trainable().values())
        o = config.optim
        self.optimizer = torch.optim.AdamW(self.parameters, lr=o.lr, betas=(o.beta1, o.beta2), weight_decay=o.weight_decay)
        if config.reward.teacher == "ema":
            model.update_ema(config.reward.ema_decay)
        if self.sampling.truncated:
            warnings.warn(f"sampling {self.sampling.law} is truncated: the ratio is that of the truncated law, which moves with the policy",
                          stacklevel=2)  # fmt: skip

    def step(self, index: int) -> dict[str, float]:
        """Step `index`, counted from 0: one rollout and its updates. Returns the step's metrics."""
        clock, batch = Clock(), self.batch(index)
        rollout, scores = self.experience(index, batch, clock)
        adv = advantage(scores.reward_S, self.config.rollout.num_generations, self.config.advantage)
        metrics = self.update(index, rollout, adv.value_S, adv.alive_S, clock)
        if self.config.reward.teacher == "ema":
            self.model.update_ema(self.config.reward.ema_decay)
        drawn = {"reward": float(scores.reward_S.mean()), "reward_std": float(scores.reward_S.std()), "group_std": adv.group_std,
                 "dead_groups": adv.dead, "entropy": float(rollout.entropy_S_A.mean())}  # fmt: skip
        total = sum(clock.seconds.values())
        speed = {"seconds": total, "images_per_second": len(rollout) / total, "tokens_per_second": rollout.codes_S_A.numel() / total}
        phases = {f"seconds/{k}": v for k, v in clock.seconds.items()}
        return {**drawn, **metrics, "lr": self.rate(index), **speed, **phases, "peak_memory_gb": peak_memory_gb(self.model.device)}

    def batch(self, index: int) -> list[Prompt]:
        """The P prompts of a step: a new order of all prompts in every epoch, a function of (seed, step) only."""
        size, total = self.config.rollout.prompts_per_step, len(self.prompts)
        places = range(index * size, (index + 1) * size)
        return [self.prompts[self._order(place // total)[place % total]] for place in places]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, 1, epoch))
        return torch.randperm(len(self.prompts), generator=generator).tolist()

    @torch.no_grad()
    def experience(self, index: int, batch: Sequence[Prompt], clock: Clock) -> tuple[Rollout, Scores]:
        """Draw G images for each prompt and let the teacher read them."""
        group, via = self.config.rollout.num_generations, self.config.reward.via
        seeds = [derive_seed(self.config.seed, 2, index, p.id, g) for p in batch for g in range(group)]
        with self.autocast():
            with clock("rollout"):
                rollout = self.model.rollout(self.model.encode_prompts([p.text for p in batch]), group, self.sampling, seeds)
            with clock("perceive"):
                reading = self.model.read(rollout, via, steps=self.config.reward.decoder_steps)
            with clock("score"), self.model.teacher(self.config.reward.teacher):
                scores = self.scorer(reading, rollout.prompts.texts, [p.metadata for p in batch for _ in range(group)])
        if not bool(scores.reward_S.isfinite().all()):
            raise FloatingPointError(f"step {index + 1}: a reward is not finite; lower optim.lr or use precision=fp32")
        return rollout, scores

    def update(self, index: int, rollout: Rollout, value_S: Tensor, alive_S: Tensor, clock: Clock) -> dict[str, float]:
        """`updates_per_rollout` optimizer steps; micro-batches accumulate to the gradient of the whole batch."""
        kept = alive_S.nonzero().flatten() if self.config.advantage.skip_dead else torch.arange(len(rollout))
        if len(kept) == 0:
            return {"loss": 0.0, "kl": 0.0, "clip_fraction": 0.0, "grad_norm": 0.0, "replay_gap": 0.0}
        rollout, value_S = rollout.rows(kept), value_S[kept]
        with clock("reference"):
            reference = self.reference(rollout)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(index)
        history: list[dict[str, float]] = []
        with clock("update"):
            for _ in range(self.config.optim.updates_per_rollout):
                history.append(self._descend(rollout, reference, value_S))
        means = {k: sum(h[k] for h in history) / len(history) for k in history[0]}
        return {**means, "replay_gap": history[0]["replay_gap"]}

    def reference(self, rollout: Rollout) -> Tensor | None:
        """Log-probs (S, A) under the frozen base; None when the KL term is off."""
        if self.config.loss.beta == 0:
            return None
        with torch.no_grad(), self.autocast(), self.model.teacher("frozen"):
            return torch.cat([self.model.policy_logp(rollout.rows(rows))[0] for rows in self._micro(len(rollout))])

    def _descend(self, rollout: Rollout, reference: Tensor | None, value_S: Tensor) -> dict[str, float]:
        total, sums, gap = len(rollout), dict[str, float](), 0.0
        self.optimizer.zero_grad(set_to_none=True)
        self.model.language.train(self.config.lora.dropout > 0)  # the only dropout there is; off everywhere else
        for rows in self._micro(total):
            part = rollout.rows(rows)
            with self.autocast():
                logp, _ = self.model.policy_logp(part)
            loss, metrics = policy_loss(logp, part.logp_S_A, None if reference is None else reference[rows], value_S[rows], self.config.loss)
            share = len(part) / total
            (loss * share).backward()
            gap = max(gap, float((logp.detach() - part.logp_S_A).abs().mean()))
            for k, v in {"loss": float(loss.detach()), **metrics}.items():
                sums[k] = sums.get(k, 0.0) + share * v
        self.model.language.eval()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optim.max_grad_norm))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm}; nothing was updated; lower optim.lr or use precision=fp32")
        self.optimizer.step()
        return {**sums, "grad_norm": norm, "replay_gap": gap}

    def _micro(self, total: int) -> list[slice]:
        size = self.config.optim.micro_batch
        return [slice(k, min(k + size, total)) for k in range(0, total, size)]

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 matrix products where the configuration asks for them; parameters and optimizer stay fp32."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def rate(self, index: int) -> float:
        """Learning rate of step `index`: linear warm-up, then the schedule."""
        o, steps = self.config.optim, self.config.steps
        if index < o.warmup_steps:
            return o.lr * (index + 1) / o.warmup_steps
        along = (index - o.warmup_steps) / max(1, steps - o.warmup_steps)
        return o.lr * {"constant": 1.0, "linear": 1 - along, "cosine": 0.5 + 0.5 * math.cos(math.pi * along)}[o.schedule]


def train(config: TrainConfig) -> TrainSummary:
    """Run a whole training: measure, train with samples and checkpoints, measure again, save.

    Raises:
        GvuError: bad configuration, prompts, output folder or model; nothing was trained then.
    """
    began, c = time.time(), config
    prompts = load_prompts(c.prompts.source, c.prompts.limit, tag_weights=c.prompts.tag_weights)
    path = output_path(c.output, c.model.name)
    refuse_existing(path)
    model = load(c.model.name, device=c.model.device)
    if c.model.adapter is None:
        model.add_lora(c.lora, seed=derive_seed(c.seed, 0))
    else:
        model.load_adapter(c.model.adapter, trainable=True)
    trainer = Trainer(model, prompts, c)
    model.encode_prompts([p.text for p in prompts])  # a prompt that does not fit is found before anything is computed
    with Run.create(path, c, tensorboard=c.log.tensorboard) as run, Interrupt() as interrupt:
        before = measure(trainer, interrupt) if c.eval.before_after else {}
        done, last = _loop(trainer, run, interrupt)
        model.save_adapter(run.path / "adapter")
        after = measure(trainer, interrupt) if c.eval.before_after else {}
        summary = TrainSummary(output=run.path, steps=done, seconds=time.time() - began, before=before, after=after,
                               interrupted=interrupt.asked, last=last)  # fmt: skip
        run.summary(summary.as_dict())
    return summary


def _loop(trainer: Trainer, run: Run, interrupt: Interrupt) -> tuple[int, dict[str, float]]:
    c, metrics, done = trainer.config, dict[str, float](), 0
    size = c.rollout.prompts_per_step * c.rollout.num_generations
    with Progress(f"training {c.model.name}", c.steps, spark="reward") as progress:
        draw_samples(trainer, run, 0)
        for index in range(c.steps):
            if interrupt.asked:
                progress.note("stopping after this step; the adapter is saved")
                break
            metrics, done = trainer.step(index), index + 1
            run.log(done, metrics)
            progress.update(metrics, items=size)
            if c.log.sample_every and done % c.log.sample_every == 0:
                draw_samples(trainer, run, done)
            if c.log.save_every and done % c.log.save_every == 0:
                trainer.model.save_adapter(run.checkpoint_dir(done))
            if c.eval.every and done % c.eval.every == 0:
                run.log(done, {f"eval/{k}": r.overall.value for k, r in measure(trainer, interrupt).items()})
    return done, metrics


@torch.no_grad()
def draw_samples(trainer: Trainer, run: Run, step: int) -> None:
    """The first prompts with fixed seeds, so that pictures of different steps can be compared."""
    c = trainer.config
    if not (c.log.sample_every and c.log.sample_prompts):
        return
    batch = trainer.prompts[: c.log.sample_prompts]
    seeds = [derive_seed(c.seed, 3, p.id) for p in batch]
    with trainer.autocast():
        rollout = trainer.model.rollout(trainer.model.encode_prompts([p.text for p in batch]), 1, trainer.sampling, seeds)
        pixels = trainer.model.decode(rollout)
        with trainer.model.teacher("frozen"):
            scorer = Scorer(trainer.model, replace(c.reward, kind="geometric_mean"))
            scores = scorer(trainer.model.read_pixels(pixels), rollout.prompts.texts)
    run.samples(step, pixels, [p.text for p in batch], scores.reward_S.tolist())


def measure(trainer: Trainer, interrupt: Interrupt) -> dict[str, Report]:
    """The configured benchmarks under the training law; nothing after Ctrl-C."""
    e, reports = trainer.config.eval, dict[str, Report]()
    for name in e.benchmarks if not interrupt.asked else ():
        with Progress(f"measuring {name}", 0) as progress, trainer.autocast():
            reports[name] = evaluate(trainer.model, name, images_per_prompt=e.images_per_prompt, seed=e.seed,
                                     sampling=trainer.sampling, progress=progress)  # fmt: skip
    return reports
