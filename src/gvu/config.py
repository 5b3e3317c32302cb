"""What can be configured, one frozen dataclass per component; `gvu train --print-config` shows it with these texts.

Read with `load_config(TrainConfig, file=..., overrides=["optim.lr=3e-4"])`; write with `to_yaml`. In Python, components
are keyword-only and check themselves: `TrainConfig(optim=OptimConfig(lr=3e-4))`.
"""

from dataclasses import dataclass, field
from typing import Literal

from gvu.models.base import LoraSpec
from gvu.runtime import Precision
from gvu.sampling import Sampling
from gvu.settings import BadValue, Component, bounded, check, docs, leaves, load_config, to_dict, to_yaml

__all__ = [
    "AdvantageConfig", "Benchmark", "EvalConfig", "LogConfig", "LoraSpec", "LossConfig", "ModelConfig", "OptimConfig",
    "PromptsConfig", "RewardConfig", "RolloutConfig", "TrainConfig",
    "docs", "leaves", "load_config", "to_dict", "to_yaml",
]  # fmt: skip

Benchmark = Literal["geneval-mini", "geneval++-mini"]
"""Benchmarks that `gvu eval` and the evaluation before and after training know."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Component):
    """Which model is trained.

    Attributes:
        name: name of an embedded model (mini, mini-weak) or path of a checkpoint folder.
        adapter: folder of a saved PEFT adapter to go on from; null starts a fresh one.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
    """

    name: str = "mini"
    adapter: str | None = None
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class PromptsConfig(Component):
    """Which prompts it is trained on.

    Attributes:
        source: mini-train (sampled from the mini world's grammar), or a .txt file with one prompt per line, or a
            .jsonl file with a `prompt` field.
        limit: use only the first so many prompts; 0 uses all.
        tag_weights: odds of the six GenEval tags in mini-train; empty takes the defaults.
    """

    source: str = "mini-train"
    limit: int = bounded(0, "at least 0")
    tag_weights: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Component):
    """How images are drawn.

    Attributes:
        prompts_per_step: prompts P of one step.
        num_generations: images G of one prompt; advantages are relative to them.
        temperature: the model's logits are divided by it.
        top_k: draw from the k most probable codes only; 0 is off.
        top_p: draw from the smallest set of codes with this mass; 1 is off.
        min_p: draw only codes with at least this share of the most probable code's probability; 0 is off.
        cfg: classifier-free guidance scale; 1 is off.
    """

    prompts_per_step: int = bounded(8, "at least 1")
    num_generations: int = bounded(8, "at least 2")
    temperature: float = bounded(1.0, "above 0")
    top_k: int = bounded(0, "at least 0")
    top_p: float = bounded(1.0, "above 0 and at most 1")
    min_p: float = bounded(0.0, "at least 0 and below 1")
    cfg: float = bounded(1.0, "at least 0")

    @property
    def sampling(self) -> Sampling:
        """The law that codes are drawn from."""
        return Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, cfg=self.cfg
        )


@dataclass(frozen=True, kw_only=True)
class RewardConfig(Component):
    """How the understanding branch judges an image (GvU, arXiv 2603.06043).

    Attributes:
        kind: geometric_mean of the prompt tokens' probabilities (the paper), mean_logp of all tokens, the same of
            content tokens only, contrastive against edited prompts, or pmi against the prompt without an image.
        via: tokens reads the sampled codes; pixels decodes and encodes again (the paper).
        instruction: the question that the prompt is scored as the answer to.
        teacher: who reads: the frozen base, the current policy, or its moving average.
        ema_decay: decay per step of the moving average.
        decoder_steps: flow steps of the decoder, where via is pixels.
        micro_batch: images scored in one pass.
    """

    kind: Literal["geometric_mean", "mean_logp", "content", "contrastive", "pmi"] = "geometric_mean"
    via: Literal["tokens", "pixels"] = "pixels"
    instruction: str = "Describe the image in detail."
    teacher: Literal["frozen", "current", "ema"] = "frozen"
    ema_decay: float = bounded(0.99, "from 0 to 1")
    decoder_steps: int = bounded(2, "at least 1")
    micro_batch: int = bounded(64, "at least 1")


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig(Component):
    """How rewards become advantages.

    Attributes:
        scale: divide the group-centred reward by the group's standard deviation (the paper), by nothing (Dr. GRPO), or
            by the batch's.
        eps: added to the standard deviation.
        dead_below: a group whose rewards have a standard deviation below this has no signal and is counted dead.
        skip_dead: leave dead groups out of the update.
    """

    scale: Literal["group", "none", "batch"] = "none"
    eps: float = bounded(1e-4, "at least 0")
    dead_below: float = bounded(1e-6, "at least 0")
    skip_dead: bool = False


@dataclass(frozen=True, kw_only=True)
class LossConfig(Component):
    """The clipped policy loss with a penalty for leaving the base.

    Attributes:
        beta: weight of the k3 estimate of the KL divergence to the frozen base.
        clip_low: the ratio counts down to 1 - clip_low.
        clip_high: the ratio counts up to 1 + clip_high.
    """

    beta: float = bounded(0.01, "at least 0")
    clip_low: float = bounded(0.2, "from 0 to 1")
    clip_high: float = bounded(0.2, "at least 0")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Component):
    """AdamW on the adapter.

    Attributes:
        lr: peak learning rate.
        beta1: decay of the gradient's moving average.
        beta2: decay of the squared gradient's moving average.
        weight_decay: AdamW's weight decay.
        warmup_steps: steps over which the learning rate rises linearly to its peak.
        schedule: what the learning rate does after that, until the last step.
        max_grad_norm: gradients of a larger norm are scaled down to it.
        updates_per_rollout: optimizer steps on the images of one rollout; above 1 the clip is at work.
        micro_batch: images of one backward pass; does not change the result.
    """

    lr: float = bounded(1e-3, "at least 0")
    beta1: float = bounded(0.9, "at least 0 and below 1")
    beta2: float = bounded(0.999, "at least 0 and below 1")
    weight_decay: float = bounded(0.0, "at least 0")
    warmup_steps: int = bounded(5, "at least 0")
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    max_grad_norm: float = bounded(1.0, "above 0")
    updates_per_rollout: int = bounded(1, "at least 1")
    micro_batch: int = bounded(64, "at least 1")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Component):
    """When and on what the model is measured.

    Attributes:
        benchmarks: geneval-mini, geneval++-mini, both, or none.
        images_per_prompt: images drawn for each test prompt (GenEval draws four).
        seed: seed of those images; the same before and after, so that the difference is paired.
        every: measure every so many steps; 0 is never.
        before_after: measure before the first and after the last step.
    """

    benchmarks: tuple[Benchmark, ...] = ("geneval-mini",)
    images_per_prompt: int = bounded(4, "at least 1")
    seed: int = bounded(1234, "at least 0")
    every: int = bounded(0, "at least 0")
    before_after: bool = True


@dataclass(frozen=True, kw_only=True)
class LogConfig(Component):
    """What a run leaves behind.

    Attributes:
        sample_every: draw and score the sample prompts, with fixed seeds, every so many steps; 0 is never.
        sample_prompts: how many prompts are drawn then.
        save_every: save a checkpoint every so many steps; 0 is only at the end.
        tensorboard: write TensorBoard events as well as metrics.jsonl.
    """

    sample_every: int = bounded(20, "at least 0")
    sample_prompts: int = bounded(32, "at least 0")
    save_every: int = bounded(50, "at least 0")
    tensorboard: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Component):
    """A whole training run.

    Attributes:
        steps: rollouts, each with its updates.
        seed: every random number of the run is derived from it.
        precision: of matrix products: bf16 autocast, fp32, or auto: bf16 where the hardware multiplies in it.
        output: the run's folder; {model} and {time} are filled in.
    """

    steps: int = bounded(140, "at least 1")
    seed: int = bounded(0, "at least 0")
    precision: Precision = "auto"
    output: str = "runs/{model}-{time}"
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraSpec = field(default_factory=LoraSpec)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check("lora.r", self.lora.r, "at least 1")
        check("lora.alpha", self.lora.alpha, "at least 1")
        check("lora.dropout", self.lora.dropout, "at least 0 and below 1")
        if not self.output.strip():
            raise BadValue("output", self.output, "the name of a folder")
