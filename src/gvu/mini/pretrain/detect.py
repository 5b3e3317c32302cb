"""Stage `detector`: the network that judges pictures of the mini world, and how far it can be trusted.

It learns from the renderer's ground truth: random scenes and true scenes of training prompts. What it will judge are
reconstructions and drawings, so half of the pictures are damaged (shifted, blurred, noisy, off in colour, with 8x8
patches exchanged as by wrong image tokens); an object of which too much is destroyed or cut off is dropped from the
truth, so that half an object scores low. Where a tokenizer and decoder exist, a part of each batch goes through them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gvu.geneval import Detection, Metadata
from gvu.mini.detector import Detector, DetectorConfig, Targets, encode, losses, verdict
from gvu.mini.grammar import SAMPLERS, SAMPLERS_PP, minimal_edits
from gvu.mini.icons import sprite
from gvu.mini.pretrain.fit import FitConfig, Prefetch, device, fit, start_from
from gvu.mini.pretrain.pictures import pixels
from gvu.mini.render import GROUND, LATTICE, SIDE, Placed, Scene, random_scene, scene_for
from gvu.mini.splits import sample_train

Reconstruct = Callable[[Tensor], Tensor]
"""Pictures (S, 3, 64, 64) in [0, 1] to the same through tokenizer and decoder."""
Shares = dict[str, float]

DESTROYED = 0.3
"""An object is dropped from the truth when more than this share of its sprite was changed or cut off."""
CHANGED = 0.15
"""A pixel counts as changed when some channel moved by more than this."""
MAX_SHIFT, MAX_PATCHES = 4, 8


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pictures (S, 3, 64, 64) in [0, 1] and what the detector should say of them."""

    pixels_S_3_64_64: Tensor
    targets: Targets


def train_detector(
    folder: Path,
    steps: int,
    seed: int = 15,
    batch: int = 48,
    reconstruct: Reconstruct | None = None,
    config: DetectorConfig | None = None,
    name: str = "detector",
    lr: float = 3e-3,
    share: float = 1 / 3,
) -> Detector:
    """Train from the checkpoint in `folder/name` or from nothing; the result is in `folder/name/final` too.

    Args:
        folder: the recipe's folder.
        steps: optimizer steps in all.
        seed: weights and pictures.
        batch: pictures a step.
        reconstruct: pixels through tokenizer and decoder, for a part of each batch; runs in another thread, without
            gradients.
        config: the network's shape.
        name: the stage.
        lr: peak learning rate.
        share: part of each batch that is reconstructed.
    """
    torch.manual_seed(seed)
    detector = Detector(config).to(device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
    stream = Prefetch(lambda step: make_batch(seed, step, batch, detector.config, reconstruct, share))

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        now = stream(step)
        x = now.pixels_S_3_64_64.to(device(), memory_format=torch.channels_last)
        parts = losses(detector(x), now.targets.to(device()), detector.config)
        return torch.stack(list(parts.values())).sum(), {k: float(v.detach()) for k, v in parts.items()}

    fit(detector, loss, FitConfig(steps=steps, lr=lr, warmup=min(50, steps // 5 + 1)), folder / name)
    detector.save(folder / name / "final")
    return detector


def polish_detector(folder: Path, steps: int, reconstruct: Reconstruct, seed: int = 19) -> Detector:
    """Stage `polish`: on from stage `detector` with half of each batch reconstructed.

    Neighbouring colours (red, orange, yellow, brown) come closer in tokenizer and decoder than they are in renders.
    """
    start_from(folder / "detector", folder / "polish")
    return train_detector(folder, steps, seed, reconstruct=reconstruct, name="polish", lr=1e-3, share=1 / 2)


@torch.no_grad()
def make_batch(
    seed: int,
    step: int,
    count: int,
    config: DetectorConfig,
    reconstruct: Reconstruct | None = None,
    share: float = 1 / 3,
) -> Batch:
    """The batch of a step: reconstructions (`share`, if there is a decoder), then damaged pictures, then clean ones."""
    rng = np.random.default_rng((seed, step))
    scenes = [random_scene(rng) if s % 2 else scene_for(sample_train(rng), rng) for s in range(count)]
    clean = pixels(scenes) * 0.5 + 0.5
    through = int(count * share) if reconstruct else 0
    damaged = (count - through) // 2
    images, objects = clean.clone(), [s.objects for s in scenes]
    if reconstruct:
        images[:through] = reconstruct(clean[:through]).float().cpu().clamp(0, 1)
    for s in range(through, through + damaged):
        images[s], objects[s] = damage(clean[s], objects[s], clean, rng)
    return Batch(pixels_S_3_64_64=images, targets=encode(objects, config))


def damage(
    image_3_64_64: Tensor, objects: Sequence[Placed], donors_S_3_64_64: Tensor, rng: np.random.Generator
) -> tuple[Tensor, tuple[Placed, ...]]:
    """A picture as a poor generator might have drawn it, and the objects that can still be recognised there."""
    image = image_3_64_64
    if rng.random() < 0.5:
        dx, dy = (int(v) for v in rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, 2))
        image, objects = _shift(image, dx, dy), [replace(o, x=o.x + dx, y=o.y + dy) for o in objects]
    if rng.random() < 0.6:
        before = image
        image = _patches(image, objects, donors_S_3_64_64, rng)
        objects = [o for o in objects if _destroyed(o, before, image) <= DESTROYED]
    objects = [o for o in objects if _cut_off(o) <= DESTROYED]
    for change in (_blur, _tint, _noise):
        image = change(image, rng) if rng.random() < 0.5 else image
    return image.clamp(0, 1), tuple(objects)


def _ground() -> Tensor:
    return torch.tensor(GROUND, dtype=torch.float32).view(3, 1, 1) / 255


def _shift(image: Tensor, dx: int, dy: int) -> Tensor:
    """Moved right and down, ground coming in."""
    wide = F.pad(image - _ground(), (MAX_SHIFT,) * 4)
    top, left = MAX_SHIFT - dy, MAX_SHIFT - dx
    return wide[:, top : top + SIDE, left : left + SIDE] + _ground()


def _patches(image: Tensor, objects: Sequence[Placed], donors: Tensor, rng: np.random.Generator) -> Tensor:
    """Up to MAX_PATCHES lattice patches, mostly on objects, become ground, one colour, or a patch of some picture."""
    image = image.clone()
    for _ in range(int(rng.integers(1, MAX_PATCHES + 1))):
        y, x = _spot(objects, rng)
        kind, (v, u) = rng.random(), (int(n) * LATTICE for n in rng.integers(0, SIDE // LATTICE, 2))
        if kind < 0.25:
            patch = _ground()
        elif kind < 0.35:
            patch = torch.from_numpy(rng.random((3, 1, 1), np.float32))
        else:
            patch = donors[int(rng.integers(len(donors))), :, v : v + LATTICE, u : u + LATTICE]
        image[:, y : y + LATTICE, x : x + LATTICE] = patch
    return image


def _spot(objects: Sequence[Placed], rng: np.random.Generator) -> tuple[int, int]:
    """Top and left of a lattice patch, three times in four one that some object covers."""
    y, x = (int(n) * LATTICE for n in rng.integers(0, SIDE // LATTICE, 2))
    if objects and rng.random() < 0.75:
        o = objects[int(rng.integers(len(objects)))]
        inner_y, inner_x = (int(n) * LATTICE for n in rng.integers(0, o.size // LATTICE, 2))
        y, x = ((start + inner) // LATTICE * LATTICE for start, inner in ((o.y, inner_y), (o.x, inner_x)))
    last = SIDE - LATTICE
    return min(max(y, 0), last), min(max(x, 0), last)


def _window(o: Placed) -> tuple[slice, slice, slice, slice]:
    """Rows and columns of an object on the canvas, then the same within its sprite."""
    top, left = max(o.y, 0), max(o.x, 0)
    bottom, right = min(o.y + o.size, SIDE), min(o.x + o.size, SIDE)
    return slice(top, bottom), slice(left, right), slice(top - o.y, bottom - o.y), slice(left - o.x, right - o.x)


def _solid(o: Placed) -> Tensor:
    """Where the sprite covers the ground, (size, size) bool."""
    return torch.from_numpy(sprite(o.name, o.color, o.size)[..., 3] > 0.5)


def _destroyed(o: Placed, before: Tensor, after: Tensor) -> float:
    """Share of the sprite's visible pixels that changed."""
    rows, columns, inner_rows, inner_columns = _window(o)
    solid = _solid(o)[inner_rows, inner_columns]
    changed = (after - before)[:, rows, columns].abs().amax(0) > CHANGED
    return float((changed & solid).sum() / solid.sum().clamp_min(1))


def _cut_off(o: Placed) -> float:
    """Share of the sprite's pixels beyond the canvas."""
    _, _, rows, columns = _window(o)
    solid = _solid(o)
    return 1.0 - float(solid[rows, columns].sum() / solid.sum())


def _blur(image: Tensor, rng: np.random.Generator) -> Tensor:
    side = int(rng.integers(26, 56))
    small = F.interpolate(image[None], (side, side), mode="bilinear", antialias=True)
    return F.interpolate(small, (SIDE, SIDE), mode="bicubic")[0]


def _tint(image: Tensor, rng: np.random.Generator) -> Tensor:
    gain, lift = rng.uniform(0.92, 1.08, (3, 1, 1)), rng.uniform(-0.04, 0.04, (3, 1, 1))
    return image * torch.from_numpy(gain).float() + torch.from_numpy(lift).float()


def _noise(image: Tensor, rng: np.random.Generator) -> Tensor:
    return image + torch.from_numpy(rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0.01, 0.08)))


# How far the detector can be trusted


@torch.no_grad()
def measure(
    detector: Detector, reconstruct: Reconstruct | None = None, n_per_tag: int = 500, seed: int = 99
) -> dict[str, dict[str, Shares]]:
    """Detector and rules against prompts that are true, or by one edit false, of rendered scenes.

    Returns:
        For `clean` and, if there is a decoder, `reconstructed` pictures: `verified`, the share of true prompts judged
        correct, and `rejected`, the share of false ones judged wrong, both by tag ("geneval/..." and "geneval++/...");
        and `garbled`: which shares of objects with less than half of their sprite left are still found.
    """
    report: dict[str, dict[str, Shares]] = {"clean": {}} | ({"reconstructed": {}} if reconstruct else {})
    report["garbled"] = {"found": measure_garbled(detector, n_per_tag, seed)}
    for style, samplers in (("geneval", SAMPLERS), ("geneval++", SAMPLERS_PP)):
        for index, (tag, sampler) in enumerate(samplers.items()):
            rng = np.random.default_rng((seed, len(style), index))
            cases = [_case(sampler(rng), rng) for _ in range(n_per_tag)]
            clean = pixels([scene for _, _, scene in cases]) * 0.5 + 0.5
            views = {"clean": clean}
            if reconstruct:
                views["reconstructed"] = torch.cat([reconstruct(part) for part in clean.split(48)])
            for view, pictures in views.items():
                _verdicts(report[view], f"{style}/{tag}", cases, detector.detect(pictures))
    return report


Case = tuple[Metadata, Metadata, Scene]
"""A prompt, one of its minimal false edits, and a scene of which the prompt is true."""


def _case(metadata: Metadata, rng: np.random.Generator) -> Case:
    edits = minimal_edits(metadata, rng, n=5)
    return metadata, edits[int(rng.integers(len(edits)))], scene_for(metadata, rng)


def _verdicts(into: dict[str, Shares], tag: str, cases: Sequence[Case], found: Sequence[Sequence[Detection]]) -> None:
    plus = tag.startswith("geneval++")
    right = [verdict(true, objects, plus).correct for (true, _, _), objects in zip(cases, found, strict=True)]
    wrong = [not verdict(false, objects, plus).correct for (_, false, _), objects in zip(cases, found, strict=True)]
    into.setdefault("verified", {})[tag] = sum(right) / len(right)
    into.setdefault("rejected", {})[tag] = sum(wrong) / len(wrong)


def measure_garbled(detector: Detector, n: int, seed: int) -> Shares:
    """Of `n` single objects with over half of the sprite replaced, the shares found at the rules' two thresholds."""
    rng = np.random.default_rng((seed, 7))
    donors = pixels([random_scene(rng) for _ in range(64)]) * 0.5 + 0.5
    kept: list[tuple[Placed, Tensor]] = []
    while len(kept) < n:
        o = random_scene(rng).objects[0]
        before = pixels([Scene(objects=(o,))])[0] * 0.5 + 0.5
        after = _patches(before, [o], donors, rng)
        kept += [(o, after)] if 0.5 < _destroyed(o, before, after) < 0.95 else []
    found = detector.detect(torch.stack([image for _, image in kept]))
    own = ((d.score for d in ds if d.name == o.name) for (o, _), ds in zip(kept, found, strict=True))
    scores = [max(each, default=0.0) for each in own]
    return {f"above {t}": sum(s > t for s in scores) / n for t in (0.3, 0.9)}


def worst(shares: Mapping[str, float]) -> tuple[str, float]:
    """The tag with the least share."""
    tag = min(shares, key=lambda name: shares[name])
    return tag, shares[tag]
