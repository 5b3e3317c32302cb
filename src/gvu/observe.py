"""What a run shows of itself: its summary, its sample pictures, its benchmarks."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gvu.evaluation import Report, evaluate
from gvu.progress import Progress
from gvu.reward import Scorer
from gvu.run import Run
from gvu.runtime import Interrupt
from gvu.sampling import derive_seed

if TYPE_CHECKING:
    from gvu.trainer import Trainer


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
        return {
            "output": str(self.output),
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "interrupted": self.interrupted,
            "benchmarks": pairs,
            "last": self.last,
        }

    def _pair(self, name: str) -> dict[str, Any]:
        before, after = self.before.get(name), self.after.get(name)
        shown: dict[str, Any] = {k: r.as_dict(rows=False) for k, r in (("before", before), ("after", after)) if r}
        return {**shown, "difference": asdict(after.compare(before))} if before and after else shown


@torch.no_grad()
def draw_samples(trainer: "Trainer", run: Run, step: int) -> None:
    """The first prompts with fixed seeds, so that pictures and rewards of different steps can be compared.

    Logs their mean reward as `samples/reward`: a step's own reward also says how hard its prompts are.
    """
    c = trainer.config
    if not (c.log.sample_every and c.log.sample_prompts):
        return
    batch = trainer.prompts[: c.log.sample_prompts]
    seeds = [derive_seed(c.seed, 3, p.id) for p in batch]
    with trainer.autocast():
        encoded = trainer.model.encode_prompts([p.text for p in batch])
        rollout = trainer.model.rollout(encoded, 1, trainer.sampling, seeds)
        pixels = trainer.model.decode(rollout)
        with trainer.model.teacher("frozen"):
            scorer = Scorer(trainer.model, replace(c.reward, kind="geometric_mean"))
            scores = scorer(trainer.model.read_pixels(pixels), rollout.prompts.texts)
    rewards = scores.reward_S.tolist()
    run.samples(step, pixels, [p.text for p in batch], rewards)
    run.log(step, {"samples/reward": sum(rewards) / len(rewards)})


def measure(trainer: "Trainer", interrupt: Interrupt) -> dict[str, Report]:
    """The configured benchmarks under the training law; nothing after Ctrl-C."""
    e, reports = trainer.config.eval, dict[str, Report]()
    for name in e.benchmarks if not interrupt.asked else ():
        with Progress(f"measuring {name}", 0) as progress, trainer.autocast():
            reports[name] = evaluate(
                trainer.model,
                name,
                images_per_prompt=e.images_per_prompt,
                seed=e.seed,
                sampling=trainer.sampling,
                progress=progress,
            )
    return reports
