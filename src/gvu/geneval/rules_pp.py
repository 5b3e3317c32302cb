"""A rule engine for GenEval++ metadata: the same detections as GenEval's, judged strictly.

The published GenEval++ protocol asks GPT-4.1 whether class, count, colour, position and size *all* hold (Ye et al.
2025, Echo-4o, arXiv 2508.09987; data Apache-2.0). This engine is our stand-in where a detector is exact, as in the mini
world. Its numbers are not GenEval++ numbers with a VLM judge and must carry the judge's name.
"""

from collections.abc import Iterable, Sequence

from gvu.errors import GvuError
from gvu.geneval.rules import Clause, Detection, Metadata, Rules, Verdict, group_by_class

SIZE_RATIO = 1.2
"""The larger object's box area must be at least this many times the smaller one's."""


def judge_pp(
    metadata: Metadata, detections: Iterable[Detection], image_size: tuple[float, float], rules: Rules | None = None
) -> Verdict:
    """Verdict on one image for GenEval++ metadata: exact counts, colours, image halves and sizes.

    Args:
        metadata: a line of `Geneval++.jsonl`.
        detections: everything the detector found, unfiltered.
        image_size: width and height in pixels.
        rules: `score_threshold` and `max_objects` apply, to every tag alike.
    """
    rules = rules or Rules()
    groups = group_by_class(detections, rules.score_threshold, rules.max_objects)
    include = metadata["include"]
    found = [_of_color(groups.get(c["class"], ()), c) for c in include]
    reasons = [r for c, objects in zip(include, found, strict=True) for r in _clause(c, objects, image_size)]
    reasons += _sizes(include, found)
    return Verdict(not reasons, "\n".join(reasons))


def in_region(found: Detection, region: str, image_size: tuple[float, float]) -> bool:
    """Whether the box centre lies in the named half ("left", "right", "above", "below") of a (width, height) image."""
    (x, y), (width, height) = found.center, image_size
    halves = {"left": x < width / 2, "right": x > width / 2, "above": y < height / 2, "below": y > height / 2}
    return halves[region]


def _of_color(objects: Sequence[Detection], clause: Clause) -> list[Detection]:
    """The objects with the clause's colour, all of them where it names none."""
    color = clause.get("color")
    if color is not None and any(d.color is None for d in objects):
        raise GvuError(f"the prompt asks for a {color} {clause['class']}, but the detections carry no colour label")
    return [d for d in objects if color is None or d.color == color]


def _clause(clause: Clause, objects: Sequence[Detection], image_size: tuple[float, float]) -> list[str]:
    """Reasons why the count or the region of one clause fails."""
    name = " ".join(filter(None, (clause.get("color"), clause["class"])))
    if len(objects) != clause["count"]:
        return [f"expected {name}=={clause['count']}, found {len(objects)}"]
    region = clause.get("region")
    if region is None or all(in_region(d, region, image_size) for d in objects):
        return []
    return [f"expected {name} in the {region} half"]


def _sizes(include: Sequence[Clause], found: Sequence[Sequence[Detection]]) -> list[str]:
    """A reason if some "larger" object is not clearly larger than every "smaller" one; missing ones fail by count."""
    areas: dict[str, list[float]] = {"larger": [], "smaller": []}
    for clause, objects in zip(include, found, strict=True):
        if "size" in clause:
            areas[clause["size"]] += [d.area for d in objects]
    if not all(areas.values()) or min(areas["larger"]) >= SIZE_RATIO * max(areas["smaller"]):
        return []
    return [f"expected the larger object's area >= {SIZE_RATIO} times the smaller one's"]
