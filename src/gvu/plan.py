"""`gvu train --dry-run`: what a run will train, hold in memory and take, before it starts."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gvu.config import TrainConfig
from gvu.models.base import UnifiedModel
from gvu.models.registry import load
from gvu.prompts import load_prompts
from gvu.runtime import in_bf16
from gvu.sampling import derive_seed

ADAM_BYTES = 4 + 4 + 8
"""fp32 weight, gradient and two moments of a trained parameter."""


def plan(config: TrainConfig) -> dict[str, Any]:
    """Load the model, time one small step on a throw-away adapter, and report; nothing is written.

    Memory is arithmetic over shapes; the time is one measured step of at most two prompts, scaled to the configured
    number.
    """
    from gvu.trainer import Trainer

    prompts = load_prompts(config.prompts.source, config.prompts.limit, tag_weights=config.prompts.tag_weights)
    model = load(config.model.name, device=config.model.device)
    model.add_lora(config.lora, seed=derive_seed(config.seed, 0))
    trained = sum(p.numel() for p in model.trainable().values())
    return {
        "model": config.model.name,
        "device": str(model.device),
        "prompts": len(prompts),
        "images per step": config.rollout.prompts_per_step * config.rollout.num_generations,
        "parameters": {"trained": trained, "language model": count(model.language) - trained},
        "memory in MB": memory(model, config, trained),
        "time": seconds(Trainer(model, prompts, small(config)), config),
    }


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def memory(model: UnifiedModel, config: TrainConfig, trained: int) -> dict[str, float]:
    """MB per part at the widest moment of a step; activations of the backward pass are an estimate (14 C + 4 F per
    layer)."""
    c: Any = model.language.config
    rows, columns = model.capabilities.grids[0]
    width = 2 if in_bf16(config.precision, model.device) else 4
    samples = config.rollout.prompts_per_step * config.rollout.num_generations * (2 if config.rollout.cfg != 1 else 1)
    actions, micro = rows * columns, min(samples, config.optim.micro_batch)
    positions = actions + 32
    heads = c.num_key_value_heads * (c.hidden_size // c.num_attention_heads)
    layer = 14 * c.hidden_size + 4 * c.intermediate_size
    parts = {
        "weights": sum(p.numel() * p.element_size() for p in model.language.parameters()),
        "adapter, gradient, Adam": trained * ADAM_BYTES,
        "KV cache of the rollout": samples * positions * c.num_hidden_layers * 2 * heads * 4,
        "image logits of a micro-batch": micro * actions * model.capabilities.codebook * 4 * 3,
        "activations of a micro-batch": micro * positions * c.num_hidden_layers * layer * width,
    }
    parts["total"] = sum(parts.values())
    return {k: round(v / 1e6, 1) for k, v in parts.items()}


def small(config: TrainConfig) -> TrainConfig:
    """The same configuration with at most two prompts a step."""
    return replace(config, rollout=replace(config.rollout, prompts_per_step=min(2, config.rollout.prompts_per_step)))


def seconds(trainer: Any, config: TrainConfig) -> dict[str, float]:
    """Seconds per step and minutes of the run, scaled from one measured step (after one to warm up)."""
    trainer.step(0)
    scale = config.rollout.prompts_per_step / trainer.config.rollout.prompts_per_step
    step = trainer.step(1)["seconds"] * scale
    return {
        "seconds per step": round(step, 2),
        "minutes of training": round(step * config.steps / 60, 1),
        "threads": float(torch.get_num_threads()),
    }
