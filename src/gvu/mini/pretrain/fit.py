"""One resumable training loop for every stage of the mini recipe.

A stage gives a module and a loss of (step, generator-free batch); `fit` does AdamW with warm-up and cosine decay,
gradient clipping, bf16 autocast where it is fast, and checkpoints (safetensors and JSON) from which the same command
goes on after an interruption.
Batches are functions of (seed, step), so a resumed run sees what the uninterrupted one would have seen.
"""

import json
import math
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import Generic, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gvu.errors import GvuError
from gvu.runtime import Precision, autocast

B = TypeVar("B")
INNER = ("layers.", "transformer_blocks.")  # where a module keeps the matrices that Muon trains
Loss = Callable[[int], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How a stage is trained.

    Attributes:
        steps: optimizer steps in all; the cosine ends there.
        lr, weight_decay, beta2: AdamW's.
        warmup: steps of linear warm-up.
        floor: last learning rate as a share of `lr`.
        clip: gradient norm above which gradients are scaled down.
        save_seconds: seconds between checkpoints.
        precision: of matrix products, see `gvu.runtime`.
        optimizer: `adamw`, or `muon`: Muon on the matrices of the layers, AdamW on the rest (embeddings, heads, norms).
    """

    steps: int
    lr: float
    weight_decay: float = 0.01
    beta2: float = 0.98
    warmup: int = 50
    floor: float = 0.02
    clip: float = 1.0
    save_seconds: float = 60.0
    precision: Precision = "auto"
    optimizer: str = "adamw"


def learning_rate(config: FitConfig, step: int) -> float:
    """Linear warm-up, then cosine to `floor` of the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    along = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    return config.lr * (config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * along)))


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Optimizers:
    """The optimizers of a stage as one: zero, step, learning rate, and a state of plain tensors."""

    def __init__(self, module: nn.Module, config: FitConfig) -> None:
        named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        hidden = (
            [p for n, p in named.items() if p.ndim == 2 and any(k in n for k in INNER)]
            if config.optimizer == "muon"
            else []
        )
        taken = {id(p) for p in hidden}
        rest = [p for p in named.values() if id(p) not in taken]
        adamw = torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay)
        self.parts: list[torch.optim.Optimizer] = [adamw]
        if hidden:
            self.parts.append(
                torch.optim.Muon(hidden, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
            )

    def step(self, lr: float) -> None:
        """One update at this learning rate."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    def state(self) -> dict[str, Tensor]:
        """Moments by `part.parameter.name`."""
        return {
            f"{k}.{i}.{n}": v
            for k, part in enumerate(self.parts)
            for i, s in part.state_dict()["state"].items()
            for n, v in s.items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` gave."""
        for k, part in enumerate(self.parts):
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in state.items():
                which, index, name = key.split(".", 2)
                if int(which) == k:
                    moments.setdefault(int(index), {})[name] = value
            part.load_state_dict({"state": moments, "param_groups": part.state_dict()["param_groups"]})


def save_stage(folder: Path, module: nn.Module, optimizer: Optimizers, step: int) -> None:
    """Write module, optimizer and step so that a reader never sees half of them: new folder first, then a rename."""
    fresh = folder.with_name(folder.name + ".new")
    fresh.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}, fresh / "model.safetensors")
    save_file({k: v.cpu().contiguous() for k, v in optimizer.state().items()}, fresh / "optim.safetensors")
    (fresh / "state.json").write_text(json.dumps({"step": step}))
    for name in ("model.safetensors", "optim.safetensors", "state.json"):
        folder.mkdir(parents=True, exist_ok=True)
        (fresh / name).replace(folder / name)
    fresh.rmdir()


def load_stage(folder: Path, module: nn.Module, optimizer: Optimizers) -> int:
    """Restore what `save_stage` wrote and return the next step; 0 when there is nothing."""
    if not (folder / "state.json").is_file():
        return 0
    module.load_state_dict(load_file(folder / "model.safetensors"))
    if (folder / "optim.safetensors").is_file():  # a branch starts with weights alone
        optimizer.load(load_file(folder / "optim.safetensors"))
    return int(json.loads((folder / "state.json").read_text())["step"])


def start_from(before: Path, home: Path, step: int = 0) -> None:
    """Lay an earlier stage's weights into a stage's folder, without its optimizer, where nothing is yet.

    Raises:
        GvuError: the earlier stage has not been run.
    """
    if (home / "state.json").is_file():
        return
    if not (before / "model.safetensors").is_file():
        raise GvuError(
            f"stage {home.name!r} starts from stage {before.name!r}, which {str(before)!r} lacks; run it first"
        )
    home.mkdir(parents=True, exist_ok=True)
    copyfile(before / "model.safetensors", home / "model.safetensors")
    (home / "state.json").write_text(json.dumps({"step": step}))


def fit(
    module: nn.Module,
    loss: Loss,
    config: FitConfig,
    folder: Path,
    every: int = 25,
    after_step: Callable[[int], None] | None = None,
    rate: Callable[[int], float] | None = None,
) -> None:
    """Train `module` to `config.steps`, from the checkpoint in `folder` if there is one, printing a line every
    `every` steps.

    `rate` replaces the configuration's learning rate.
    """
    params = [p for p in module.parameters() if p.requires_grad]
    optimizer = Optimizers(module, config)
    start = load_stage(folder, module, optimizer)
    log, saved, began = _Log(folder, every, start), time.monotonic(), time.monotonic()
    module.train()
    for step in range(start, config.steps):
        lr = rate(step) if rate else learning_rate(config, step)
        metrics = _update(params, optimizer, loss, config, step, lr)
        if after_step:
            after_step(step)
        log(step, config.steps, metrics, began)
        if time.monotonic() - saved > config.save_seconds or step + 1 == config.steps:
            save_stage(folder, module, optimizer, step + 1)
            saved = time.monotonic()
    module.eval()


def _update(
    params: list[nn.Parameter], optimizer: Optimizers, loss: Loss, config: FitConfig, step: int, lr: float
) -> dict[str, float]:
    for p in params:
        p.grad = None
    with autocast(config.precision, params[0].device):
        value, metrics = loss(step)
    value.backward()
    norm = float(nn.utils.clip_grad_norm_(params, config.clip))
    if math.isfinite(norm):
        optimizer.step(lr)
    return {"loss": float(value.detach()), "norm": norm, **metrics}


class _Log:
    """Running means to standard output and `log.jsonl`."""

    def __init__(self, folder: Path, every: int, start: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.every, self.start, self.sums, self.count = folder / "log.jsonl", every, start, {}, 0

    def __call__(self, step: int, steps: int, metrics: dict[str, float], began: float) -> None:
        for k, v in metrics.items():
            self.sums[k] = self.sums.get(k, 0.0) + v
        self.count += 1
        if (step + 1) % self.every and step + 1 != steps:
            return
        means = {k: round(v / self.count, 5) for k, v in self.sums.items()}
        rate = (time.monotonic() - began) / (step + 1 - self.start)
        print(
            f"step {step + 1}/{steps}  {rate:.2f} s/step  " + "  ".join(f"{k} {v:.4f}" for k, v in means.items()),
            flush=True,
        )
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step + 1, **means}) + "\n")
        self.sums, self.count = {}, 0


class Prefetch(Generic[B]):
    """Makes the batch of step + 1 in a thread while step runs; `batch(step)` must depend on nothing else."""

    def __init__(self, batch: Callable[[int], B]) -> None:
        self.batch, self.pool = batch, ThreadPoolExecutor(1)
        self.ready: dict[int, Future[B]] = {}

    def __call__(self, step: int) -> B:
        """The batch of a step."""
        future = self.ready.pop(step, None) or self.pool.submit(self.batch, step)
        self.ready = {step + 1: self.pool.submit(self.batch, step + 1)}
        return future.result()


@contextmanager
def threads(count: int) -> Generator[None]:
    """Inside, torch uses `count` CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
