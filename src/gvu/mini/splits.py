"""Train and test prompts of the mini world, disjoint as *scenes*.

Two prompts are the same composition if they describe the same scene in another order or from the other side ("a cup and
a kite" and "a kite and a cup"; "a cup left of a kite" and "a kite right of a cup"); `canonical` gives the key. A key
in one of the two test sets is never sampled for training, neither as a pretraining caption nor as an RL prompt.

| tag           | prompts | scenes | GenEval-mini | also held out by GenEval++-mini | scenes left to train on |
|---------------|---------|--------|--------------|---------------------------------|-------------------------|
| single_object |      24 |     24 |           12 |                               0 |                      12 |
| two_object    |     552 |    276 |           64 |                               1 |                     211 |
| counting      |      72 |     72 |           24 |                               5 |                      43 |
| colors        |     240 |    240 |           60 |                               0 |                     180 |
| position      |   2,208 |  1,104 |           64 |                               1 |                   1,039 |
| color_attr    |  49,680 | 24,840 |           64 |                               0 |                  24,776 |
| all           |  52,776 | 26,556 |          288 |                               7 |                  26,261 |

Single objects and counts are small spaces, hence their smaller test sets; the held-out single objects are trained on in
every other tag, only never alone. Of GenEval++ nothing is trained on: 140 prompts, 20 per tag, test it. The column
"also held out" lists the GenEval++-mini scenes that a GenEval prompt could describe as well ("A photo of four cups",
"A photo of one cup and one kite"). The order in which tags and prompts are drawn is part of the split: never change
it. All draws are `rng.integers` of a PCG64 generator with a constant seed.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from copy import deepcopy
from functools import cache

import numpy as np

from gvu.errors import GvuError
from gvu.geneval.rules import Clause, Metadata
from gvu.mini.grammar import SAMPLERS, SAMPLERS_PP, Sampler
from gvu.mini.vocabulary import OPPOSITE

SPLIT_SEED = 2603_06043
"""Seed of both test sets (the arXiv number of GvU)."""

GENEVAL_SIZES = {
    "single_object": 12, "two_object": 64, "counting": 24, "colors": 60, "position": 64, "color_attr": 64,
}  # fmt: skip
"""GenEval-mini: test prompts per tag, 288 in all."""

PLUS_SIZE = 20
"""GenEval++-mini: test prompts per tag, 140 in all."""

TRAIN_WEIGHTS: Mapping[str, float] = {
    "single_object": 1, "two_object": 2, "counting": 2, "colors": 2, "position": 3, "color_attr": 3,
}  # fmt: skip
"""Default odds of the tags in `sample_train`."""

Key = tuple[Hashable, ...]
MAX_MISSES = 2_000
"""Draws in a row without a new composition after which a tag starts over."""


def canonical(metadata: Metadata) -> Key:
    """The composition's key: equal exactly for prompts that describe the same scene, whatever tag or order.

    Unordered objects (class, count, colour, size), or ordered ones behind "left of" or "above" where the prompt says
    who is where; GenEval++'s image halves count as that relation.
    """
    items = [_item(clause) for clause in metadata["include"]]
    placed = metadata["include"][-1]
    if "position" in placed:
        relation = str(placed["position"][0])
        return _directed(relation, items[-1], items[int(placed["position"][1])])
    region = metadata["include"][0].get("region")
    if region is None:
        return ("", *sorted(items))
    return _directed(region if region in OPPOSITE else f"{region} of", *items)


def _item(clause: Clause) -> tuple[str, int, str, str]:
    return clause["class"], clause["count"], clause.get("color", ""), clause.get("size", "")


def _directed(relation: str, a: Hashable, b: Hashable) -> Key:
    return (relation, a, b) if relation in ("left of", "above") else (OPPOSITE[relation], b, a)


def geneval_mini() -> list[Metadata]:
    """The 288 held-out GenEval prompts, tag by tag (fresh copies)."""
    return deepcopy(_test_sets()[0])


def genevalpp_mini() -> list[Metadata]:
    """The 140 held-out GenEval++ prompts, 20 per tag (fresh copies)."""
    return deepcopy(_test_sets()[1])


@cache
def held_out() -> frozenset[Key]:
    """Keys of both test sets, which no training prompt may have."""
    return frozenset(canonical(m) for test in _test_sets() for m in test)


def sample_train(rng: np.random.Generator, weights: Mapping[str, float] | None = None) -> Metadata:
    """One training prompt of the six GenEval tags, never of a held-out composition.

    Args:
        rng: only its `integers` are used.
        weights: odds per tag; tags left out are not sampled. None takes `TRAIN_WEIGHTS`.

    Raises:
        GvuError: an unknown tag, or no positive weight.
    """
    sampler = SAMPLERS[_pick_tag(rng, TRAIN_WEIGHTS if weights is None else weights)]
    while True:
        metadata = sampler(rng)
        if canonical(metadata) not in held_out():
            return metadata


def train_prompts(n: int, seed: int, weights: Mapping[str, float] | None = None) -> list[Metadata]:
    """`n` training prompts with the odds of the tags as given.

    Within a tag all compositions come once before one comes again: there are 43 counting prompts, so that a list with
    200 of them holds each four or five times.

    Raises:
        GvuError: an unknown tag, or no positive weight.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    odds = TRAIN_WEIGHTS if weights is None else weights
    taken: defaultdict[str, set[Key]] = defaultdict(set)
    return [_next_of(tag, rng, taken[tag]) for tag in (_pick_tag(rng, odds) for _ in range(n))]


def _next_of(tag: str, rng: np.random.Generator, taken: set[Key]) -> Metadata:
    """A prompt of the tag whose composition is not taken; when none is found all are free again."""
    for _ in range(MAX_MISSES):
        metadata = sample_train(rng, {tag: 1})
        if canonical(metadata) not in taken:
            taken.add(canonical(metadata))
            return metadata
    taken.clear()
    return _next_of(tag, rng, taken)


def _pick_tag(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    unknown = weights.keys() - SAMPLERS.keys()
    if unknown:
        raise GvuError(f"unknown tags {sorted(unknown)}; training prompts have {sorted(SAMPLERS)}")
    if min(weights.values(), default=0) < 0 or sum(weights.values()) <= 0:
        raise GvuError(f"tag weights must be non-negative with a positive sum, got {dict(weights)}")
    point = int(rng.integers(2**53)) / 2**53 * sum(weights.values())
    for tag, weight in weights.items():
        point -= weight
        if point < 0:
            return tag
    return max(weights, key=lambda tag: weights[tag])  # rounding left the point at the very end


@cache
def _test_sets() -> tuple[list[Metadata], list[Metadata]]:
    rng = np.random.Generator(np.random.PCG64(SPLIT_SEED))
    taken: set[Key] = set()
    plain = [m for tag, size in GENEVAL_SIZES.items() for m in _draw(rng, SAMPLERS[tag], size, taken)]
    plus = [m for sampler in SAMPLERS_PP.values() for m in _draw(rng, sampler, PLUS_SIZE, taken)]
    return plain, plus


def _draw(rng: np.random.Generator, sampler: Sampler, n: int, taken: set[Key]) -> list[Metadata]:
    """`n` prompts with new keys (added to `taken`), spread evenly over the tag's counts, colours or directions."""
    drawn: list[Metadata] = []
    filled: Counter[Hashable] = Counter()
    while len(drawn) < n:
        metadata = sampler(rng)
        key, stratum = canonical(metadata), _stratum(metadata)
        if key in taken or filled[stratum] >= -(-n // _STRATA.get(stratum[0], 1)):
            continue
        taken.add(key)
        filled[stratum] += 1
        drawn.append(metadata)
    return drawn


_STRATA = {"count 2-4": 3, "count 4-7": 4, "color": 10, "relation": 4, "region": 2}
"""Kinds of strata and how many of each there are."""


def _stratum(metadata: Metadata) -> tuple[str, Hashable]:
    """The kind and value over which a tag's test prompts are balanced."""
    first, last = metadata["include"][0], metadata["include"][-1]
    if metadata["tag"] == "counting":
        return ("count 4-7" if metadata["prompt"][0] == "A" else "count 2-4"), first["count"]
    if metadata["tag"] == "colors":
        return "color", first.get("color")
    if "position" in last:
        return "relation", last["position"][0]
    return ("region", first["region"]) if "region" in first else ("none", None)
