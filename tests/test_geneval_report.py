"""Aggregation on the published human labels, and intervals that behave."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from gvu.geneval import aggregate, paired_difference

SHARED = Path(os.environ.get("GVU_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))


def simulate(rng: np.random.Generator, shift: float = 0.0, n: int = 40) -> list[tuple[str, int, bool]]:
    """Four images for each of n prompts in two tags; prompts differ in difficulty."""
    hard = np.random.default_rng(99).random((2, n))
    return [(tag, p, bool(rng.random() < np.clip(hard[t, p] + shift, 0, 1)))
            for t, tag in enumerate(("a", "b")) for p in range(n) for _ in range(4)]  # fmt: skip


def test_overall_is_the_unweighted_mean_of_tag_means_over_images():
    rows = [("a", 0, 1), ("a", 0, 1), ("a", 1, 0), ("b", 0, 0)]
    report = aggregate(rows)
    assert report.tags["a"].value == pytest.approx(2 / 3)
    assert report.tags["b"].value == 0
    assert report.overall.value == pytest.approx(1 / 3)
    assert (report.overall.n_prompts, report.overall.n_images) == (3, 4)


def test_human_labels_give_the_published_means():
    path = SHARED / "data/geneval/human_consensus_derived.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is absent; set GVU_SHARED to the folder with the shared data")
    labels = [json.loads(line) for line in path.read_text().splitlines()]
    expected = {"clip": 0.414, "sdv2": 0.579, "if-xl": 0.734}
    for model, mean in expected.items():
        rows = [(r["tag"], r["prompt_id"], r["human_correct"]) for r in labels if r["model"] == model]
        report = aggregate(rows)
        assert len(rows) == 400
        assert report.overall.value == pytest.approx(mean, abs=5e-4)
        assert report.overall.low < mean < report.overall.high


def test_rows_in_any_order_and_other_tags_do_not_change_an_interval():
    rows = simulate(np.random.default_rng(0))
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    report = aggregate(rows)
    assert aggregate(shuffled).tags == report.tags
    assert aggregate([r for r in rows if r[0] == "a"]).tags["a"] == report.tags["a"]
    assert aggregate(rows, seed=1).overall != report.overall


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """Prompts are drawn anew each time; resampling images instead of prompts would cover about 78%."""
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        p = rng.beta(0.5, 0.5, 60)  # mean 1/2, prompts nearly always right or wrong
        rows = [("a", i, bool(rng.random() < p[i])) for i in range(60) for _ in range(4)]
        overall = aggregate(rows, n_boot=300).overall
        hits += overall.low <= 0.5 <= overall.high
    assert 0.89 <= hits / 200 <= 0.99


def test_paired_difference_is_zero_against_itself_and_sees_a_gain():
    before = simulate(np.random.default_rng(0))
    same = paired_difference(before, before)
    assert (same.overall.value, same.overall.low, same.overall.high) == (0, 0, 0)
    gain = paired_difference(before, simulate(np.random.default_rng(2), shift=0.2))
    assert gain.overall.low > 0
    assert gain.overall.value == pytest.approx((gain.tags["a"].value + gain.tags["b"].value) / 2)


def test_pairing_is_tighter_than_two_separate_intervals():
    before, after = simulate(np.random.default_rng(0)), simulate(np.random.default_rng(2), shift=0.1)
    paired = paired_difference(before, after).overall
    apart = [aggregate(rows).overall for rows in (before, after)]
    assert paired.high - paired.low < np.hypot(*(i.high - i.low for i in apart))


def test_unpaired_prompts_and_empty_input_are_refused():
    rows = [("a", 0, True), ("a", 1, False)]
    with pytest.raises(ValueError, match="1 prompts are in one of them only"):
        paired_difference(rows, rows[:1])
    with pytest.raises(ValueError, match="no rows"):
        aggregate([])
