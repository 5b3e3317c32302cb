"""The documentation's pictures, from a finished run.

`python docs/make_figures.py RUN` writes docs/images/before_after.png (the first held-out prompt of each GenEval tag,
drawn by the base and by the trained model from the same seeds; green or red by the detector's verdict) and
docs/images/reward.png (reward and KL over the steps). Prompts and seeds are fixed: nothing is picked by hand.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from torch import Tensor

from gvu.config import TrainConfig, load_config
from gvu.geneval import Metadata, judge
from gvu.mini.detector import Detector
from gvu.models.base import UnifiedModel
from gvu.models.registry import load
from gvu.probes import probe_prompts
from gvu.sampling import Sampling, derive_seed

mpl.use("Agg")
import matplotlib.pyplot as plt

SEED, EACH, WINDOW = 2603, 4, 10
"""Seed of the pictures, pictures of each prompt, steps of the running mean."""
RIGHT, WRONG = "#2a9d4a", "#c8443c"


@torch.no_grad()
def draw(model: UnifiedModel, metadata: Sequence[Metadata], sampling: Sampling) -> tuple[Tensor, list[bool]]:
    """Pictures (P * EACH, 3, H, W) and verdicts."""
    seeds = [derive_seed(SEED, p, k) for p in range(len(metadata)) for k in range(EACH)]
    rollout = model.rollout(model.encode_prompts([m["prompt"] for m in metadata]), EACH, sampling, seeds)
    pixels = model.decode(rollout).float().cpu()
    found = Detector.default().detect(pixels)
    return pixels, [judge(metadata[s // EACH], objects).correct for s, objects in enumerate(found)]


def place(axes: Any, pixels_3_H_W: Tensor, right: bool) -> None:
    """One picture in a coloured frame."""
    axes.imshow(pixels_3_H_W.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(color=RIGHT if right else WRONG, linewidth=2.5)


def before_after(run: Path, config: TrainConfig, target: Path) -> None:
    """Rows of prompts; left the base's pictures, right the trained model's from the same seeds."""
    metadata = probe_prompts(6)
    sides = [draw(load(config.model.name, adapter=a), metadata, config.rollout.sampling)
             for a in (None, str(run / "adapter"))]  # fmt: skip
    widths = [2.2, *[1.0] * EACH, 0.25, *[1.0] * EACH]
    figure, axes = plt.subplots(len(metadata), len(widths), figsize=(12, 1.15 * len(metadata) + 0.5),
                                gridspec_kw={"width_ratios": widths, "wspace": 0.08, "hspace": 0.08})  # fmt: skip
    for row, m in enumerate(metadata):
        for blank in (axes[row, 0], axes[row, EACH + 1]):
            blank.axis("off")
        axes[row, 0].text(0.0, 0.5, fill(m["prompt"], 24), va="center", fontsize=10)
        for side, (pixels, right) in enumerate(sides):
            for k in range(EACH):
                place(axes[row, 1 + side * (EACH + 1) + k], pixels[row * EACH + k], right[row * EACH + k])
    for side, name in enumerate(("before", "after")):
        share = np.mean(sides[side][1])
        axes[0, 1 + side * (EACH + 1)].set_title(f"{name}: {share:.0%} right", fontsize=11, loc="left")
    save(figure, target)


def reward_curve(run: Path, target: Path) -> None:
    """Reward and KL over the steps, with a running mean."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "reward" in row]
    steps = np.array([row["step"] for row in rows])
    figure, axes = plt.subplots(1, 2, figsize=(10, 3))
    for ax, name, color in zip(axes, ("reward", "kl"), ("#1f6fb2", "#8a5a9e"), strict=True):
        values = np.array([row[name] for row in rows])
        ax.plot(steps, values, color=color, alpha=0.3, linewidth=1)
        width = min(WINDOW, len(values))
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        ax.plot(steps[width - 1 :], smooth, color=color, linewidth=2)
        ax.set(xlabel="step", title={"reward": "reward", "kl": "KL to the base, nats per image token"}[name])
        ax.spines[["top", "right"]].set_visible(False)
    save(figure, target)


def save(figure: Any, target: Path) -> None:
    """Write a figure as PNG."""
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("run", type=Path, help="folder of a finished run")
    options.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "images", metavar="DIR", help="(docs/images)"
    )
    return options


def main(argv: list[str] | None = None) -> None:
    """Write both pictures."""
    args = parser().parse_args(argv)
    config = load_config(TrainConfig, file=args.run / "config.yaml")
    before_after(args.run, config, args.out / "before_after.png")
    reward_curve(args.run, args.out / "reward.png")


if __name__ == "__main__":
    main()
