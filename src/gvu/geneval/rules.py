"""GenEval's rule engine: detections and a prompt's metadata in, the official verdict and reason out.

Pure Python, no detector: whoever owns one hands over labelled boxes. Semantics are those of the official
`evaluate_images.py` (djghosh13/geneval, MIT; Ghosh et al. 2023, arXiv 2310.11513), checked on 600 recorded cases:
every include clause must hold on its `count` most confident detections ("at least"), exclude clauses make counting
exact, a position is read from box centres and sizes. Non-maximum suppression is off there by default and absent here.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from gvu.errors import GvuError

COLOR_ORDER: tuple[str, ...] = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
"""Order in which a verdict's reason lists the colours that were found."""

Clause = TypedDict(
    "Clause",
    {
        "class": str,
        "count": int,
        "color": NotRequired[str],
        "position": NotRequired[list[str | int]],
        "region": NotRequired[str],
        "size": NotRequired[str],
    },
)
"""One include or exclude clause of the data files; `region` and `size` are GenEval++'s."""


class Metadata(TypedDict):
    """One line of GenEval's or GenEval++'s prompt file."""

    tag: str
    include: list[Clause]
    exclude: NotRequired[list[Clause]]
    prompt: str


@dataclass(frozen=True, kw_only=True)
class Detection:
    """One detected object.

    Attributes:
        name: class name, spelt as in the metadata.
        x1, y1, x2, y2: box corners in pixels, y grows downwards; GenEval's x2, y2 are exclusive.
        score: the detector's confidence, 0 to 1.
        color: colour label, None if the detector gives none.
    """

    name: str
    x1: float
    y1: float
    x2: float
    y2: float
    score: float = 1.0
    color: str | None = None

    @property
    def center(self) -> tuple[float, float]:
        """Box centre (x, y) in pixels."""
        return (self.x1 + self.x2) / 2, (self.y1 + self.y2) / 2

    @property
    def area(self) -> float:
        """Box area in square pixels."""
        return abs(self.x2 - self.x1) * abs(self.y2 - self.y1)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Options of the engine; the defaults are the official ones.

    Attributes:
        score_threshold: a detection counts if its score is strictly above this.
        counting_threshold: the same for prompts with tag "counting".
        max_objects: at most this many detections per class, the most confident ones.
        position_threshold: share of both box sizes by which centres must differ.
    """

    score_threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    position_threshold: float = 0.1


@dataclass(frozen=True)
class Verdict:
    """Whether an image satisfies its prompt, and if not why (one line per failed clause, "" if correct)."""

    correct: bool
    reason: str


def group_by_class(
    detections: Iterable[Detection], threshold: float, max_objects: int = 16
) -> dict[str, list[Detection]]:
    """Detections strictly above `threshold` by class, most confident first, at most `max_objects` each.

    Equal scores come in reverse input order, as numpy's reversed argsort has it in the original.
    """
    groups: dict[str, list[Detection]] = {}
    for found in sorted(detections, key=lambda d: d.score)[::-1]:
        if found.score > threshold:
            groups.setdefault(found.name, []).append(found)
    return {name: group[:max_objects] for name, group in groups.items()}


def relative_position(a: Detection, b: Detection, threshold: float = 0.1) -> tuple[str, ...]:
    """Relations that hold of `a` with respect to `b`; none, one or two of left of, right of, above, below.

    Per axis the centre offset is shortened by `threshold` times the sum of both sizes and divided by the length of the
    *unshortened* offset; a relation holds beyond one half.
    """
    (ax, ay), (bx, by) = a.center, b.center
    x, y = ax - bx, ay - by
    dx = _shorten(x, threshold * (abs(a.x2 - a.x1) + abs(b.x2 - b.x1)))
    dy = _shorten(y, threshold * (abs(a.y2 - a.y1) + abs(b.y2 - b.y1)))
    if abs(dx) < 1e-3 and abs(dy) < 1e-3:
        return ()
    half = 0.5 * math.hypot(x, y)
    # The original collects a set, whose order varies by run; this order agrees with the recorded cases.
    checks = (("below", dy > half), ("left of", dx < -half), ("right of", dx > half), ("above", dy < -half))
    return tuple(name for name, holds in checks if holds)


def _shorten(offset: float, by: float) -> float:
    return math.copysign(max(abs(offset) - by, 0.0), offset)


def judge(metadata: Metadata, detections: Iterable[Detection], rules: Rules | None = None) -> Verdict:
    """The official GenEval verdict and reason for one image.

    Args:
        metadata: a line of `evaluation_metadata.jsonl`.
        detections: everything the detector found, unfiltered and in any order.
        rules: thresholds; None takes the official ones.

    Raises:
        GvuError: a colour is asked for and a detection that matters has no colour label.
    """
    rules = rules or Rules()
    threshold = rules.counting_threshold if metadata["tag"] == "counting" else rules.score_threshold
    groups = group_by_class(detections, threshold, rules.max_objects)
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []
    for clause in metadata["include"]:
        found = groups.get(clause["class"], [])[: clause["count"]]
        reason = _failure(clause, found, matched, rules)
        matched.append(found if reason is None else None)
        reasons += [reason] if reason is not None else []
    reasons += _excluded(metadata.get("exclude", []), groups)
    return Verdict(not reasons, "\n".join(reasons))


def _failure(
    clause: Clause, found: Sequence[Detection], matched: Sequence[list[Detection] | None], rules: Rules
) -> str | None:
    """Why an include clause fails, None if it holds. `matched`: detections of the earlier clauses, None if failed."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    wrong_color = _color_failure(name, clause["color"], found) if "color" in clause else None
    if wrong_color is not None or "position" not in clause:
        return wrong_color
    relation, group = str(clause["position"][0]), int(clause["position"][1])
    return _position_failure(name, relation, found, matched[group], rules.position_threshold)


def _color_failure(name: str, color: str, found: Sequence[Detection]) -> str | None:
    """Every one of the `found` detections must have the colour."""
    if any(d.color is None for d in found):
        raise GvuError(f"the prompt asks for a {color} {name}, but the detections carry no colour label")
    labels = [d.color for d in found]
    hits = labels.count(color)
    if hits == len(found):
        return None
    seen = ", ".join(f"{labels.count(c)} {c}" for c in COLOR_ORDER if c in labels)
    return f"expected {color} {name}>={len(found)}, found {hits} {color}; and {seen}"


def _position_failure(
    name: str, relation: str, found: Sequence[Detection], targets: Sequence[Detection] | None, threshold: float
) -> str | None:
    """The relation must hold between every found object and every target."""
    if targets is None:
        return f"no target for {name} to be {relation}"
    for a in found:
        for b in targets:
            true = relative_position(a, b, threshold)
            if relation not in true:
                return f"expected {name} {relation} target, found {' and '.join(true)} target"
    return None


def _excluded(clauses: Iterable[Clause], groups: Mapping[str, Sequence[Detection]]) -> list[str]:
    """One reason per exclude clause that is met, that is, with too many objects."""
    found = [(c["class"], c["count"], len(groups.get(c["class"], ()))) for c in clauses]
    return [f"expected {name}<{limit}, found {n}" for name, limit, n in found if n >= limit]
