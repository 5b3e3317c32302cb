"""GvU, the whole method in one file: draw, read, reward, compare within the group, update.

One step: P prompts are drawn G times each (S = P * G); the understanding branch gives the probability of every prompt
token given each image; the geometric mean is the reward; rewards are centred within a prompt's group; a clipped policy
loss with a KL penalty to the frozen base moves the LoRA adapter. Differences from the authors' release: the teacher is
the frozen base (theirs is the current policy by an oversight), log-probs are those of the law that was sampled, the
clip has its old log-probs, adapters are on the decoder layers only, rewards stay in log space, and decoding noise is
seeded per sample.

Shape suffixes: P prompts, S samples, A actions, T prompt tokens. Source: arXiv 2603.06043.
"""

import math
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from gvu.config import TrainConfig
from gvu.errors import GvuError
from gvu.loss import advantage, policy_loss
from gvu.models.base import Rollout, UnifiedModel
from gvu.models.registry import load
from gvu.observe import TrainSummary, draw_samples, measure
from gvu.plan import plan
from gvu.progress import Progress
from gvu.prompts import Prompt, load_prompts
from gvu.reward import Scorer, Scores, edited_texts
from gvu.run import Run, output_path, refuse_existing
from gvu.runtime import Clock, Interrupt, autocast, keep_memory, peak_memory_gb
from gvu.sampling import derive_seed

__all__ = ["TrainSummary", "Trainer", "plan", "train"]


class Trainer:
    """A model with a fresh adapter, its optimizer and its prompts; `step(k)` is the method."""

    def __init__(self, model: UnifiedModel, prompts: Sequence[Prompt], config: TrainConfig) -> None:
        if config.reward.via not in model.capabilities.reads:
            raise GvuError(
                f"reward.via={config.reward.via!r} is not possible with this model; "
                f"it reads via {sorted(model.capabilities.reads)}"
            )
        self.model, self.prompts, self.config = model, prompts, config
        self.sampling, self.scorer = config.rollout.sampling, Scorer(model, config.reward)
        self.parameters = list(model.trainable().values())
        o = config.optim
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=o.lr, betas=(o.beta1, o.beta2), weight_decay=o.weight_decay
        )
        if config.reward.teacher == "ema":
            model.update_ema(config.reward.ema_decay)
        if self.sampling.truncated:
            law = self.sampling.law
            warnings.warn(f"sampling {law} is truncated: the support of the law moves with the policy", stacklevel=2)

    def step(self, index: int) -> dict[str, float]:
        """Step `index`, counted from 0: one rollout and its updates. Returns the step's metrics."""
        clock, batch = Clock(), self.batch(index)
        rollout, scores = self.experience(index, batch, clock)
        adv = advantage(scores.reward_S, self.config.rollout.num_generations, self.config.advantage)
        metrics = self.update(index, rollout, adv.value_S, adv.alive_S, clock)
        if self.config.reward.teacher == "ema":
            self.model.update_ema(self.config.reward.ema_decay)
        drawn = {
            "reward": float(scores.reward_S.mean()),
            "reward_std": float(scores.reward_S.std()),
            "group_std": adv.group_std,
            "dead_groups": adv.dead,
            "entropy": float(rollout.entropy_S_A.mean()),
        }
        total = sum(clock.seconds.values())
        speed = {
            "seconds": total,
            "images_per_second": len(rollout) / total,
            "tokens_per_second": rollout.codes_S_A.numel() / total,
        }
        phases = {f"seconds/{k}": v for k, v in clock.seconds.items()}
        return {
            **drawn,
            **metrics,
            "lr": self.rate(index),
            **speed,
            **phases,
            "peak_memory_gb": peak_memory_gb(self.model.device),
        }

    def batch(self, index: int) -> list[Prompt]:
        """The P prompts of a step: a new order of all prompts in every epoch, a function of (seed, step) only."""
        size, total = self.config.rollout.prompts_per_step, len(self.prompts)
        places = range(index * size, (index + 1) * size)
        return [self.prompts[self._order(place // total)[place % total]] for place in places]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, 1, epoch))
        return torch.randperm(len(self.prompts), generator=generator).tolist()

    def seeds(self, index: int, batch: Sequence[Prompt]) -> list[int]:
        """One per sample, from (run seed, step, prompt id, sample); a prompt that comes twice in a step goes on
        counting."""
        group, drawn, seeds = self.config.rollout.num_generations, Counter[int](), list[int]()
        for p in batch:
            seeds += [derive_seed(self.config.seed, 2, index, p.id, drawn[p.id] + g) for g in range(group)]
            drawn[p.id] += group
        return seeds

    @torch.no_grad()
    def check_prompts(self) -> None:
        """GvuError where a prompt does not fit the context, to be drawn or (the longest, in one pass) to be read.

        Also where the reward is contrastive and a prompt has nothing to edit it by.
        """
        prompts = self.model.encode_prompts([p.text for p in self.prompts])
        longest = prompts.texts[int(prompts.mask_P_L.sum(1).argmax())]
        blank = self.model.read_pixels(torch.zeros(1, 3, 8 * prompts.grid[0], 8 * prompts.grid[1]))
        self.model.text_logp(blank, [longest], self.config.reward.instruction)
        for p in self.prompts if self.config.reward.kind == "contrastive" else ():
            edited_texts(p.text, p.metadata)

    @torch.no_grad()
    def experience(self, index: int, batch: Sequence[Prompt], clock: Clock) -> tuple[Rollout, Scores]:
        """Draw G images for each prompt and let the teacher read them."""
        group, via = self.config.rollout.num_generations, self.config.reward.via
        seeds = self.seeds(index, batch)
        with self.autocast():
            with clock("rollout"), self.model.merged():
                prompts = self.model.encode_prompts([p.text for p in batch])
                rollout = self.model.rollout(prompts, group, self.sampling, seeds)
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
            return {"loss": 0.0, "kl": 0.0, "clip_fraction": 0.0, "ratio_max": 1.0, "grad_norm": 0.0, "replay_gap": 0.0}
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
            base = None if reference is None else reference[rows]
            loss, metrics = policy_loss(logp, part.logp_S_A, base, value_S[rows], self.config.loss)
            share = len(part) / total
            (loss * share).backward()
            gap = max(gap, float((logp.detach() - part.logp_S_A).abs().mean()))
            for k, v in {"loss": float(loss.detach()), **metrics}.items():
                sums[k] = sums.get(k, 0.0) + share * v
        self.model.language.eval()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optim.max_grad_norm))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm}; nothing was updated; lower optim.lr or use fp32")
        self.optimizer.step()
        return {**sums, "grad_norm": norm, "replay_gap": gap}

    def _micro(self, total: int) -> list[slice]:
        size = self.config.optim.micro_batch
        return [slice(k, min(k + size, total)) for k in range(0, total, size)]

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 matrix products where the configuration asks for them; parameters and optimizer stay fp32."""
        return autocast(self.config.precision, self.model.device)

    def rate(self, index: int) -> float:
        """Learning rate of step `index`: linear warm-up, then the schedule."""
        o, steps = self.config.optim, self.config.steps
        if index < o.warmup_steps:
            return o.lr * (index + 1) / o.warmup_steps
        along = (index - o.warmup_steps) / max(1, steps - o.warmup_steps)
        cosine = 0.5 + 0.5 * math.cos(math.pi * along)
        return o.lr * {"constant": 1.0, "linear": 1 - along, "cosine": cosine}[o.schedule]


def train(config: TrainConfig) -> TrainSummary:
    """Run a whole training: measure, train with samples and checkpoints, measure again, save.

    Raises:
        GvuError: bad configuration, prompts, output folder or model; nothing was trained then.
    """
    began, c = time.time(), config
    prompts = load_prompts(c.prompts.source, c.prompts.limit, tag_weights=c.prompts.tag_weights)
    path = output_path(c.output, c.model.name)
    refuse_existing(path)
    keep_memory()
    model = load(c.model.name, device=c.model.device)
    if c.model.adapter is None:
        model.add_lora(c.lora, seed=derive_seed(c.seed, 0))
    else:
        model.load_adapter(c.model.adapter, trainable=True)
    trainer = Trainer(model, prompts, c)
    trainer.check_prompts()
    with Run.create(path, c, tensorboard=c.log.tensorboard) as run, Interrupt() as interrupt:
        before = measure(trainer, interrupt) if c.eval.before_after else {}
        try:
            done, last = _loop(trainer, run, interrupt)
        except FloatingPointError as error:
            model.save_adapter(run.path / "adapter")
            raise GvuError(f"{error}; the adapter as it was before that step is in {run.path / 'adapter'}") from None
        model.save_adapter(run.path / "adapter")
        after = measure(trainer, interrupt) if c.eval.before_after else {}
        summary = TrainSummary(
            output=run.path,
            steps=done,
            seconds=time.time() - began,
            before=before,
            after=after,
            interrupted=interrupt.asked,
            last=last,
        )
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
