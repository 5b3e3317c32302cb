"""The rule engine against 600 recorded official verdicts, and the edges those cases do not reach."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gvu.geneval import Detection, Metadata, Rules, judge, judge_pp
from gvu.geneval.rules import relative_position

SHARED = Path(os.environ.get("GVU_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))


def shared_lines(name: str) -> list[dict[str, Any]]:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is absent; set GVU_SHARED to the folder with the shared data")
    return [json.loads(line) for line in path.read_text().splitlines()]


def box(name: str, x: float, y: float, side: float = 20, score: float = 0.95, color: str | None = None) -> Detection:
    half = side / 2
    return Detection(name=name, x1=x - half, y1=y - half, x2=x + half, y2=y + half, score=score, color=color)


def meta(tag: str, *include: dict[str, Any], exclude: dict[str, Any] | None = None) -> Metadata:
    extra = {"exclude": [exclude]} if exclude else {}
    return {"tag": tag, "include": list(include), **extra, "prompt": ""}  # type: ignore[typeddict-item]


def test_all_recorded_verdicts_and_reasons_are_reproduced():
    cases = shared_lines("golden/geneval/rule_cases.jsonl")
    assert len(cases) == 600
    for case in cases:
        detections = [Detection(name=d.pop("class"), **d) for d in case["detections"]]
        verdict = judge(case["metadata"], detections)
        assert (verdict.correct, verdict.reason) == (case["correct"], case["reason"]), case


def test_score_thresholds_are_strict_and_depend_on_the_tag():
    one = meta("single_object", {"class": "cup", "count": 1})
    assert not judge(one, [box("cup", 0, 0, score=0.3)]).correct
    assert judge(one, [box("cup", 0, 0, score=0.31)]).correct
    two = meta("counting", {"class": "cup", "count": 2}, exclude={"class": "cup", "count": 3})
    assert not judge(two, [box("cup", 0, 0), box("cup", 50, 0, score=0.9)]).correct
    assert judge(two, [box("cup", 0, 0), box("cup", 50, 0), box("cup", 90, 0, score=0.9)]).correct
    assert judge(two, [box("cup", 0, 0, score=0.4)] * 2, Rules(counting_threshold=0.3)).correct


def test_at_most_sixteen_objects_of_a_class_are_seen():
    crowd = meta("counting", {"class": "cup", "count": 2}, exclude={"class": "cup", "count": 17})
    cups = [box("cup", x, 0) for x in range(20)]
    assert judge(crowd, cups).correct
    assert judge(crowd, cups, Rules(max_objects=17)).reason == "expected cup<17, found 17"


def test_of_equal_scores_the_later_detection_comes_first():
    red = meta("colors", {"class": "cup", "count": 1, "color": "red"})
    assert judge(red, [box("cup", 0, 0, color="blue"), box("cup", 9, 0, color="red")]).correct
    assert not judge(red, [box("cup", 9, 0, color="red"), box("cup", 0, 0, color="blue")]).correct


def test_a_missing_color_label_is_an_error_and_not_a_wrong_color():
    with pytest.raises(ValueError, match="no colour label"):
        judge(meta("colors", {"class": "cup", "count": 1, "color": "red"}), [box("cup", 0, 0)])


def test_relative_position_on_axes_diagonal_and_overlap():
    center = box("a", 100, 100)
    assert relative_position(box("b", 40, 100), center) == ("left of",)
    assert relative_position(box("b", 100, 160), center) == ("below",)
    assert set(relative_position(box("b", 160, 40), center)) == {"right of", "above"}
    assert relative_position(box("b", 103, 100), center) == ()
    assert relative_position(center, center) == ()


SIZE = (64, 64)


def test_pp_counts_are_exact_per_class_and_color():
    spec = meta("color_count_attr", {"class": "cup", "count": 2, "color": "red"}, {"class": "cat", "count": 1})
    right = [box("cup", 10, 10, color="red"), box("cup", 40, 10, color="red"), box("cat", 40, 40)]
    assert judge_pp(spec, right, SIZE).correct
    assert judge_pp(spec, [*right, box("cup", 10, 40, color="blue")], SIZE).correct
    extra = judge_pp(spec, [*right, box("cup", 10, 40, color="red")], SIZE)
    assert extra.reason == "expected red cup==2, found 3"
    assert not judge_pp(spec, right[1:], SIZE).correct


@pytest.mark.parametrize(
    ("region", "x", "y"), [("left", 10, 40), ("right", 50, 20), ("above", 40, 10), ("below", 9, 50)]
)
def test_pp_region_is_the_half_of_every_center(region: str, x: float, y: float):
    spec = meta("spatial_count_attr", {"class": "cup", "count": 2, "region": region})
    mirrored = box("cup", 64 - x, 64 - y)
    assert judge_pp(spec, [box("cup", x, y)] * 2, SIZE).correct
    assert not judge_pp(spec, [box("cup", x, y), mirrored], SIZE).correct
    assert not judge_pp(spec, [box("cup", 32, 32)] * 2, SIZE).correct


def test_pp_larger_needs_a_fifth_more_area():
    spec = meta("size_spatial_attr", {"class": "cup", "count": 1, "size": "larger"},
                {"class": "cat", "count": 1, "size": "smaller"})  # fmt: skip
    assert judge_pp(spec, [box("cup", 10, 10, 12), box("cat", 40, 10, 10)], SIZE).correct
    assert not judge_pp(spec, [box("cup", 10, 10, 10.9), box("cat", 40, 10, 10)], SIZE).correct
    assert not judge_pp(spec, [box("cup", 10, 10, 10), box("cat", 40, 10, 12)], SIZE).correct


def test_pp_accepts_a_perfect_layout_of_every_published_prompt():
    for metadata in shared_lines("data/genevalpp/Geneval++.jsonl"):
        detections = [
            box(
                c["class"],
                *CENTERS[c.get("region", "left")],
                24 if c.get("size") == "larger" else 16,
                color=c.get("color"),
            )
            for c in metadata["include"]
            for _ in range(c["count"])
        ]
        assert judge_pp(metadata, detections, SIZE).correct  # type: ignore[arg-type]
        assert not judge_pp(metadata, detections[1:], SIZE).correct  # type: ignore[arg-type]


CENTERS = {"left": (16, 32), "right": (48, 32), "above": (32, 16), "below": (32, 48)}
