"""Scenes of the mini world and their 64x64 pictures.

`scene_for(metadata, rng)` lays out objects so that a GenEval or GenEval++ prompt is true of the picture; `render`
paints it.
Objects are 16 or 24 pixels wide, stand on an 8-pixel lattice and do not overlap.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gvu.mini.icons import NATURAL, PALETTE, sprite

SIDE, LATTICE, SMALL, LARGE = 64, 8, 16, 24
GROUND = (234, 234, 230)


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One object of a scene: its top-left corner and width in pixels."""

    name: str
    color: str
    size: int
    x: int
    y: int

    @property
    def center(self) -> tuple[float, float]:
        """Centre (x, y) in pixels."""
        return self.x + self.size / 2, self.y + self.size / 2


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Objects over the plain ground."""

    objects: tuple[Placed, ...]


def render(scene: Scene) -> NDArray[np.uint8]:
    """Picture of a scene, (64, 64, 3) uint8."""
    canvas = np.empty((SIDE, SIDE, 3), np.float32)
    canvas[:] = np.asarray(GROUND, np.float32) / 255.0
    for o in scene.objects:
        paint = sprite(o.name, o.color, o.size)
        window = canvas[o.y : o.y + o.size, o.x : o.x + o.size]
        window *= 1.0 - paint[..., 3:]
        window += paint[..., :3]
    return (canvas * 255.0 + 0.5).clip(0, 255).astype(np.uint8)


def scene_for(metadata: Mapping[str, Any], rng: np.random.Generator, tries: int = 400) -> Scene:
    """A random scene of which the prompt of `metadata` is true (GenEval and GenEval++ fields).

    Raises:
        ValueError: when no layout was found, which means that the metadata asks for more than the canvas holds.
    """
    clauses = metadata["include"]
    for attempt in range(tries):
        crowded = attempt >= tries // 4
        placed = _layout(clauses, rng, crowded)
        if placed is not None:
            return Scene(objects=tuple(placed))
    raise ValueError(f"no 64x64 scene found for {metadata['prompt']!r} in {tries} tries; ask for fewer objects")


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene of 1 to 7 random objects in random colours: what the picture parts (tokenizer, decoder, detector) are
    trained on."""
    names, colors = tuple(NATURAL), tuple(PALETTE)
    count = int(rng.choice(7, p=(0.18, 0.3, 0.2, 0.14, 0.06, 0.06, 0.06))) + 1
    repeat = names[rng.integers(len(names))] if rng.random() < 0.3 else None
    placed: list[Placed] = []
    for _ in range(count):
        name = repeat or names[rng.integers(len(names))]
        color = NATURAL[name] if rng.random() < 0.35 else colors[rng.integers(len(colors))]
        clause = {"class": name, "color": color}
        spot = _place(clause, placed, (), _size(clause, count, False, rng), rng)
        placed += [spot] if spot else []
    return Scene(objects=tuple(placed))


def _layout(clauses: Sequence[Mapping[str, Any]], rng: np.random.Generator, crowded: bool) -> list[Placed] | None:
    total = sum(c["count"] for c in clauses)
    placed: list[Placed] = []
    firsts: list[Placed] = []
    for clause in clauses:
        for k in range(clause["count"]):
            spot = _place(clause, placed, firsts, _size(clause, total, crowded, rng), rng)
            if spot is None:
                return None
            placed.append(spot)
            if k == 0:
                firsts.append(spot)
    return placed


def _size(clause: Mapping[str, Any], total: int, crowded: bool, rng: np.random.Generator) -> int:
    if "size" in clause:
        return LARGE if clause["size"] == "larger" else SMALL
    if total > 4 or crowded:
        return SMALL
    return LARGE if rng.random() < (0.5 if total < 3 else 0.25) else SMALL


def _place(
    clause: Mapping[str, Any], placed: Sequence[Placed], firsts: Sequence[Placed], size: int, rng: np.random.Generator
) -> Placed | None:
    color = clause.get("color", NATURAL[clause["class"]])
    for _ in range(24):
        x, y = (int(v) * LATTICE for v in rng.integers(0, (SIDE - size) // LATTICE + 1, 2))
        spot = Placed(name=clause["class"], color=color, size=size, x=x, y=y)
        if any(_touch(spot, other) for other in placed) or not _in_region(spot, clause.get("region")):
            continue
        relation = clause.get("position")
        if relation is None or _stands(spot, relation[0], firsts[relation[1]]):
            return spot
    return None


def _touch(a: Placed, b: Placed) -> bool:
    return a.x < b.x + b.size and b.x < a.x + a.size and a.y < b.y + b.size and b.y < a.y + a.size


def _in_region(o: Placed, region: str | None) -> bool:
    half = SIDE / 2
    inside = {
        None: True,
        "left": o.x + o.size <= half,
        "right": o.x >= half,
        "above": o.y + o.size <= half,
        "below": o.y >= half,
    }
    return inside[region]


def _stands(a: Placed, relation: str, b: Placed) -> bool:
    """Whether `a` stands clearly in the relation to `b`: its side of the diagonals, with no overlap along that axis."""
    dx, dy = a.center[0] - b.center[0], a.center[1] - b.center[1]
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along >= (a.size + b.size) / 2 and along > abs(across) * 1.25
