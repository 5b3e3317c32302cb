"""What a model understands, and how well its reward knows.

`understanding`: on real renders of held-out prompts, is the true caption more probable to it than five minimal edits?
`reward_knowledge`: among its own drawings of one prompt, does the reward put right ones above wrong ones?
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gvu.errors import GvuError
from gvu.geneval import Metadata, Report, aggregate, judge
from gvu.mini.detector import Detector
from gvu.mini.grammar import minimal_edits
from gvu.mini.render import render, scene_for
from gvu.mini.splits import geneval_mini
from gvu.models.base import Reading, Rollout, Teacher, UnifiedModel, Via
from gvu.sampling import Sampling, derive_seed

INSTRUCTION = "Describe the image in detail."
EDITS = 5
PairRow = tuple[str, int, float]
"""Tag, prompt id, 1 for a pair in the right order, 0.5 for a tie, else 0."""


@dataclass(frozen=True, kw_only=True)
class Understanding:
    """Share of forced choices won, per tag and overall, under two ways to weigh a caption.

    Attributes:
        mean: by the mean log-prob of the caption's tokens (the reward's own measure; long captions are not put back).
        sum: by the total log-prob (the caption's probability).
    """

    mean: Report
    sum: Report

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class RewardKnowledge:
    """How well the reward tells right drawings of a prompt from wrong ones.

    Attributes:
        order: by path, the share of (right, wrong) pairs within a prompt that the reward orders correctly, per tag that
            has such pairs and overall; None if no prompt has both right and wrong drawings. `n_images` counts pairs.
        accuracy: share of right drawings.
        spearman: rank correlation of the two paths' rewards within a prompt, averaged over prompts; None unless both
            were asked for.
        spearman_pooled: the same over all drawings at once.
    """

    order: dict[Via, Report | None]
    accuracy: Report
    spearman: float | None
    spearman_pooled: float | None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def probe_prompts(n: int | None) -> list[Metadata]:
    """The first `n` GenEval-mini prompts with the six tags taking turns; None gives all 288.

    Raises:
        GvuError: `n` is not positive or more than there are.
    """
    tags: dict[str, list[Metadata]] = {}
    for metadata in geneval_mini():
        tags.setdefault(metadata["tag"], []).append(metadata)
    turns = [m for row in zip_longest(*tags.values()) for m in row if m is not None]
    if n is not None and not 1 <= n <= len(turns):
        raise GvuError(f"there are 1 to {len(turns)} held-out prompts to probe with, asked for {n}")
    return turns[:n]


@torch.no_grad()
def understanding(
    model: UnifiedModel, *, n: int | None = None, seed: int = 4321, batch: int = 16, instruction: str = INSTRUCTION
) -> Understanding:
    """Forced choice of the true caption among itself and five minimal edits, on real renders of held-out prompts.

    A choice is won only if the true caption is strictly more probable than every edit.

    Args:
        model: reads with its current parameters, through the pixel path.
        n: prompts, tags taking turns; None takes all of GenEval-mini.
        seed: of scenes and edits, each prompt by its own.
        batch: pictures at once (six captions each).
        instruction: what the model is asked about the picture.
    """
    metadata = probe_prompts(n)
    rows: dict[str, list[PairRow]] = {"mean": [], "sum": []}
    for start in range(0, len(metadata), batch):
        part = metadata[start : start + batch]
        cases = [_case(m, derive_seed(seed, start + i)) for i, m in enumerate(part)]
        reading = model.read_pixels(torch.stack([picture for picture, _ in cases]).to(model.device))
        scores = caption_scores(model, reading, [captions for _, captions in cases], instruction)
        for how, score_S_K in scores.items():
            won = score_S_K[:, 0] > score_S_K[:, 1:].amax(1)
            rows[how] += [(m["tag"], start + i, float(won[i])) for i, m in enumerate(part)]
    return Understanding(mean=aggregate(rows["mean"]), sum=aggregate(rows["sum"]))


def _case(metadata: Metadata, seed: int) -> tuple[Tensor, list[str]]:
    """Picture (3, 64, 64) in [0, 1], and the captions with the true one first."""
    rng = np.random.default_rng(seed)
    picture = torch.from_numpy(render(scene_for(metadata, rng))).permute(2, 0, 1).float() / 255
    return picture, [metadata["prompt"], *(edit["prompt"] for edit in minimal_edits(metadata, rng, EDITS))]


def caption_scores(
    model: UnifiedModel, reading: Reading, captions: Sequence[Sequence[str]], instruction: str = INSTRUCTION
) -> dict[str, Tensor]:
    """Mean and summed log-prob (S, K) in nats of K captions for each of S pictures."""
    k = len(captions[0])
    repeated = replace(reading, content_S=reading.content_S.repeat_interleave(k, 0))
    score = model.text_logp(repeated, [text for texts in captions for text in texts], instruction)
    total = score.logp_S_T.double().masked_fill(~score.mask_S_T.bool(), 0.0).sum(1)
    return {"mean": (total / score.mask_S_T.sum(1)).view(-1, k).cpu(), "sum": total.view(-1, k).cpu()}


@torch.no_grad()
def reward_knowledge(
    model: UnifiedModel,
    via: Via | Sequence[Via] = ("tokens", "pixels"),
    *,
    n_prompts: int = 48,
    n_images: int = 8,
    seed: int = 77,
    teacher: Teacher = "frozen",
    sampling: Sampling | None = None,
    decoder_steps: int | None = None,
    batch: int = 64,
    detector: Detector | None = None,
    instruction: str = INSTRUCTION,
) -> RewardKnowledge:
    """Draw held-out prompts several times, judge the drawings by the detector, and see whether the reward agrees.

    Args:
        model: draws with its current parameters.
        via: what the reward reads; several are compared on the same drawings.
        n_prompts: held-out prompts, tags taking turns.
        n_images: drawings of each.
        seed: drawing i of prompt p has seed `derive_seed(seed, p, i)`.
        teacher: whose parameters give the reward.
        sampling: the law that codes are drawn from; None is plain sampling at temperature 1.
        decoder_steps: of the pixel decoder; None is the model's own number.
        batch: most images at once; at least one prompt's.
        detector: None takes the package's own.
        instruction: what the teacher is asked about the picture.

    Raises:
        GvuError: more prompts than there are, fewer than two images of each, or a path by which the model cannot read.
    """
    paths = _paths(model, via)
    if n_images < 2:
        raise GvuError(f"pairs need at least 2 images of each prompt, got {n_images}")
    metadata, judge_of = probe_prompts(n_prompts), detector or Detector.default()
    right: list[bool] = []
    rewards: dict[Via, list[float]] = {path: [] for path in paths}
    at_once = max(1, batch // n_images)
    for start in range(0, n_prompts, at_once):
        part = metadata[start : start + at_once]
        seeds = [derive_seed(seed, start + p, i) for p in range(len(part)) for i in range(n_images)]
        prompts = model.encode_prompts([m["prompt"] for m in part])
        rollout = model.rollout(prompts, n_images, sampling or Sampling(), seeds)
        pictures = model.decode(rollout, steps=decoder_steps).float()
        right += [judge(part[s // n_images], found).correct for s, found in enumerate(judge_of.detect(pictures))]
        with model.teacher(teacher):
            for path in paths:
                rewards[path] += _rewards(model, rollout, pictures, path, instruction)
    tags = [m["tag"] for m in metadata]
    return _knowledge(tags, _grid(right, n_images), {path: _grid(values, n_images) for path, values in rewards.items()})


def _paths(model: UnifiedModel, via: Via | Sequence[Via]) -> tuple[Via, ...]:
    paths: tuple[Via, ...] = (via,) if isinstance(via, str) else tuple(via)
    unknown = set(paths) - model.capabilities.reads
    if unknown or not paths:
        raise GvuError(f"this model reads via {sorted(model.capabilities.reads)}, asked for via {sorted(unknown)}")
    return paths


def _grid(values: Sequence[float], columns: int) -> NDArray[Any]:
    return np.array(values).reshape(-1, columns)


def _rewards(model: UnifiedModel, rollout: Rollout, pictures: Tensor, via: Via, instruction: str) -> list[float]:
    """GvU's reward of each sample: the geometric-mean probability of the prompt's own text given the picture."""
    reading = model.read_tokens(rollout) if via == "tokens" else model.read_pixels(pictures)
    scores = caption_scores(model, reading, [[text] for text in rollout.prompts.texts], instruction)
    return scores["mean"][:, 0].exp().tolist()


def _knowledge(
    tags: Sequence[str], right: NDArray[np.bool_], rewards: dict[Via, NDArray[np.float64]]
) -> RewardKnowledge:
    """From verdicts and rewards, each (prompts, images)."""
    accuracy = aggregate((tag, p, bool(good)) for p, tag in enumerate(tags) for good in right[p])
    order: dict[Via, Report | None] = {}
    for path, reward in rewards.items():
        rows = [(tag, p, pair) for p, tag in enumerate(tags) for pair in pair_order(right[p], reward[p])]
        order[path] = aggregate(rows) if rows else None
    within = pooled = None
    if {"tokens", "pixels"} <= rewards.keys():
        a, b = rewards["tokens"], rewards["pixels"]
        within = float(np.mean([spearman(*pair) for pair in zip(a, b, strict=True)]))
        pooled = spearman(a.ravel(), b.ravel())
    return RewardKnowledge(order=order, accuracy=accuracy, spearman=within, spearman_pooled=pooled)


def pair_order(right: NDArray[np.bool_], reward: NDArray[np.float64]) -> list[float]:
    """Per (right, wrong) pair of a prompt's drawings: 1 if the right one has more reward, 0.5 if as much, else 0."""
    gap = reward[right][:, None] - reward[~right][None, :]
    return ((np.sign(gap) + 1) / 2).ravel().tolist()


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Rank correlation, ties at their mean rank; 0 if either side is constant."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / scale if scale else 0.0


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0, equal values at their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    before = np.cumsum(counts) - counts
    return (before + (counts - 1) / 2)[place]
