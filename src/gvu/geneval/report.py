"""Scores with intervals: GenEval's aggregation, a bootstrap over prompts, and paired comparison of two runs.

Aggregation is GenEval's: per tag the mean over images, overall the unweighted mean of the tag means (arXiv 2310.11513).
Intervals are percentile bootstrap intervals that resample prompts within each tag, not images, since the images of one
prompt are not independent (Efron and Tibshirani 1993, ch. 13). They depend on neither row order nor the other tags.
"""

import zlib
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gvu.errors import GvuError

Row = tuple[str, Hashable, bool | int | float]
"""One image: tag, prompt id (unique within its tag), correct (0 or 1)."""
Floats = NDArray[np.float64]
Table = dict[str, dict[Hashable, list[float]]]


@dataclass(frozen=True)
class Interval:
    """A mean (or difference of means) with its interval, and how many prompts and images it rests on."""

    value: float
    low: float
    high: float
    n_prompts: int
    n_images: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Report:
    """Intervals per tag and overall (the unweighted mean of the tags)."""

    overall: Interval
    tags: dict[str, Interval]


def aggregate(rows: Iterable[Row], *, level: float = 0.95, n_boot: int = 2000, seed: int = 0) -> Report:
    """Tag means, their unweighted mean, and bootstrap intervals.

    Args:
        rows: one (tag, prompt_id, correct) per image; a failed image must be passed as wrong, not left out.
        level: coverage of the intervals.
        n_boot: number of resamples.
        seed: seed of the resampling.

    Raises:
        GvuError: there are no rows.
    """
    parts: dict[str, tuple[float, Floats, int, int]] = {}
    for tag, prompts in _table(rows).items():
        sums, counts = _sums(prompts)
        draws = _resample(tag, len(sums), n_boot, seed)
        parts[tag] = _mean(sums, counts), _means(sums, counts, draws), len(sums), int(counts.sum())
    return _report(parts, level)


def paired_difference(
    before: Iterable[Row], after: Iterable[Row], *, level: float = 0.95, n_boot: int = 2000, seed: int = 0
) -> Report:
    """`after` minus `before`, per tag and overall, with paired bootstrap intervals.

    Each resample draws the same prompts on both sides, so prompt difficulty cancels. Arguments as in `aggregate`;
    numbers of images per prompt may differ, and `n_images` counts those of `after`.

    Raises:
        GvuError: there are no rows, or the two sides do not have the same prompts.
    """
    old, new = _table(before), _table(after)
    _check_same_prompts(old, new)
    parts: dict[str, tuple[float, Floats, int, int]] = {}
    for tag, prompts in new.items():
        (old_sums, old_counts), (sums, counts) = _sums(old[tag]), _sums(prompts)
        draws = _resample(tag, len(sums), n_boot, seed)
        value = _mean(sums, counts) - _mean(old_sums, old_counts)
        gains = _means(sums, counts, draws) - _means(old_sums, old_counts, draws)
        parts[tag] = value, gains, len(sums), int(counts.sum())
    return _report(parts, level)


def _table(rows: Iterable[Row]) -> Table:
    """tag -> prompt id -> verdicts; tags in order of first appearance, prompts in a fixed order."""
    table: Table = {}
    for tag, prompt_id, correct in rows:
        table.setdefault(tag, {}).setdefault(prompt_id, []).append(float(correct))
    if not table:
        raise GvuError("nothing to report: there are no rows")
    return {tag: dict(sorted(prompts.items(), key=lambda item: repr(item[0]))) for tag, prompts in table.items()}


def _check_same_prompts(old: Table, new: Table) -> None:
    ids = [{(tag, prompt) for tag, prompts in side.items() for prompt in prompts} for side in (old, new)]
    unpaired = ids[0] ^ ids[1]
    if unpaired:
        example = min(unpaired, key=repr)
        raise GvuError(f"cannot pair the runs: {len(unpaired)} prompts are in one of them only, e.g. {example}")


def _sums(prompts: dict[Hashable, list[float]]) -> tuple[Floats, Floats]:
    """Correct images and images per prompt, each of shape (prompts,)."""
    verdicts = list(prompts.values())
    return np.array([sum(v) for v in verdicts], np.float64), np.array([len(v) for v in verdicts], np.float64)


def _resample(tag: str, n: int, n_boot: int, seed: int) -> NDArray[np.int64]:
    """Prompt indices, shape (n_boot, n); seeded by tag, so other tags do not change them."""
    rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(tag.encode())]))
    return rng.integers(n, size=(n_boot, n))


def _mean(sums: Floats, counts: Floats) -> float:
    return float(sums.sum() / counts.sum())


def _means(sums: Floats, counts: Floats, draws: NDArray[np.int64]) -> Floats:
    """Mean over images of each resample, shape (n_boot,)."""
    return sums[draws].sum(axis=1) / counts[draws].sum(axis=1)


def _report(parts: dict[str, tuple[float, Floats, int, int]], level: float) -> Report:
    """Intervals from per-tag (value, resampled values, prompts, images)."""
    tags = {tag: _interval(*part, level) for tag, part in parts.items()}
    values, resampled, prompts, images = zip(*parts.values(), strict=True)
    overall = _interval(float(np.mean(values)), np.mean(resampled, axis=0), sum(prompts), sum(images), level)
    return Report(overall, tags)


def _interval(value: float, resampled: Floats, n_prompts: int, n_images: int, level: float) -> Interval:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), n_prompts, n_images)
