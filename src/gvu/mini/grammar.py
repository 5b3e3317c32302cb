"""Prompt grammar of GenEval (six tags) and GenEval++ (seven tags): metadata, prompt text, minimal false edits.

Metadata has the fields and key order of the published files, and prompts their wording, oddities included ("one cats",
"on the above"). Sources: GenEval (arXiv 2310.11513, MIT), GenEval++ (Echo-4o, arXiv 2508.09987, Apache-2.0). Scenes
stay drawable on 64x64 pixels: at most 7 objects, at most 3 per clause of a mixed scene.
Random draws use `rng.integers` only, so a seed gives the same prompts on every platform.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import TypeVar, cast

import numpy as np

from gvu.errors import GvuError
from gvu.geneval.rules import Clause, Metadata
from gvu.mini.vocabulary import COLORS, OBJECTS, OPPOSITE, REGIONS, RELATIONS, SIZES, article, number, plural

T = TypeVar("T")
Sampler = Callable[..., Metadata]
MAX_OBJECTS = 7
"""Most objects in a sampled scene."""
PLUS_ONLY = frozenset(
    {"color_count_attr", "color_spatial_attr", "spatial_count_attr", "size_spatial_attr", "multi_object_count_attr"}
)
"""Tags that only GenEval++ has; "color_attr" and "counting" occur in both."""


# Prompt text


def is_plus(metadata: Metadata) -> bool:
    """Whether metadata is GenEval++'s. Four of a kind occurs in both files; there the prompt's capital A decides."""
    tag, include = metadata["tag"], metadata["include"]
    if tag == "counting":
        count = include[0]["count"]
        return count > 4 or (count == 4 and metadata.get("prompt", "").startswith("A "))
    return tag in PLUS_ONLY or (tag == "color_attr" and len(include) > 2)


def prompt_of(metadata: Metadata, plus: bool | None = None) -> str:
    """The prompt text of metadata, word for word as in the published files.

    Args:
        metadata: only `tag` and `include` are read (and the prompt's first letter where `is_plus` needs it).
        plus: GenEval++ wording (capital A); None infers it.
    """
    plus = is_plus(metadata) if plus is None else plus
    return f"{'A' if plus else 'a'} photo of {_PHRASES[metadata['tag']](metadata['include'])}"


def make(tag: str, include: Sequence[Clause], plus: bool = False) -> Metadata:
    """Metadata with prompt, and for counting the exclude clause, from its include clauses."""
    metadata = cast(Metadata, {"tag": tag, "include": list(include)})
    if tag == "counting":
        metadata["exclude"] = [_clause(include[0]["class"], include[0]["count"] + 1)]
    metadata["prompt"] = prompt_of(metadata, plus)
    return metadata


def _clause(
    name: str, count: int = 1, *, color: str | None = None, size: str | None = None, region: str | None = None
) -> Clause:
    fields = {"class": name, "count": count, "color": color, "size": size, "region": region}
    return cast(Clause, {key: value for key, value in fields.items() if value is not None})


def _noun(clause: Clause) -> str:
    return f"{clause['color']} {clause['class']}" if "color" in clause else clause["class"]


def _listed(phrases: Iterable[str]) -> str:
    """ "x", "x and y", "x, y, and z"."""
    items = list(phrases)
    return ", ".join(items[:-1]) + f", and {items[-1]}" if len(items) > 2 else " and ".join(items)


def _with_articles(include: Sequence[Clause]) -> str:
    return _listed(article(_noun(c)) for c in include)


def _position(include: Sequence[Clause]) -> str:
    reference, placed = include
    return f"{article(placed['class'])} {placed.get('position', [''])[0]} {article(reference['class'])}"


def _counted(clause: Clause) -> str:
    return f"{number(clause['count'])} {plural(_noun(clause))}"


def _counted_well(clause: Clause) -> str:
    return f"one {_noun(clause)}" if clause["count"] == 1 else _counted(clause)


def _halves(noun: Callable[[Clause], str]) -> Callable[[Sequence[Clause]], str]:
    return lambda include: " and ".join(f"{noun(c)} on the {c.get('region')}" for c in include)


_PHRASES: dict[str, Callable[[Sequence[Clause]], str]] = {
    "single_object": _with_articles,
    "two_object": _with_articles,
    "counting": lambda include: _counted(include[0]),
    "colors": _with_articles,
    "position": _position,
    "color_attr": _with_articles,
    "color_count_attr": lambda include: " and ".join(map(_counted, include)),
    "color_spatial_attr": _halves(_noun),
    "spatial_count_attr": _halves(_counted),
    "size_spatial_attr": _halves(lambda c: f"a {c.get('size')} {c['class']}"),
    "multi_object_count_attr": lambda include: _listed(map(_counted_well, include)),
}


# Sampling


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One item, uniformly."""
    return items[int(rng.integers(len(items)))]


def pick_distinct(rng: np.random.Generator, items: Sequence[T], k: int) -> list[T]:
    """`k` different items in random order (the first k steps of a Fisher-Yates shuffle)."""
    if k > len(items):
        raise GvuError(f"cannot pick {k} different items out of {len(items)}")
    pool = list(items)
    for i in range(k):
        j = i + int(rng.integers(len(pool) - i))
        pool[i], pool[j] = pool[j], pool[i]
    return pool[:k]


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high + 1))


def _colorable(objects: Sequence[str]) -> list[str]:
    """GenEval never colours a person."""
    return [name for name in objects if name != "person"]


def _colored(rng: np.random.Generator, objects: Sequence[str], n: int) -> list[tuple[str, str]]:
    return list(zip(pick_distinct(rng, _colorable(objects), n), pick_distinct(rng, COLORS, n), strict=True))


def _counts(rng: np.random.Generator, n: int) -> list[int]:
    """`n` counts of 1 to 3, at most 7 together."""
    while True:
        counts = [_between(rng, 1, 3) for _ in range(n)]
        if sum(counts) <= MAX_OBJECTS:
            return counts


def sample_single_object(rng: np.random.Generator, objects: Sequence[str] = OBJECTS) -> Metadata:
    """ "a photo of a bench"."""
    return make("single_object", [_clause(pick(rng, objects))])


def sample_two_object(rng: np.random.Generator, objects: Sequence[str] = OBJECTS) -> Metadata:
    """ "a photo of a bench and a kite", two different objects."""
    return make("two_object", [_clause(name) for name in pick_distinct(rng, objects, 2)])


def sample_counting(rng: np.random.Generator, objects: Sequence[str] = OBJECTS) -> Metadata:
    """ "a photo of three clocks", two to four."""
    return make("counting", [_clause(pick(rng, objects), _between(rng, 2, 4))])


def sample_colors(rng: np.random.Generator, objects: Sequence[str] = OBJECTS) -> Metadata:
    """ "a photo of a pink car"."""
    return make("colors", [_clause(pick(rng, _colorable(objects)), color=pick(rng, COLORS))])


def sample_position(rng: np.random.Generator, objects: Sequence[str] = OBJECTS) -> Metadata:
    """ "a photo of a kite above a cup"; include[0] is the reference (the cup)."""
    reference, placed = (_clause(name) for name in pick_distinct(rng, objects, 2))
    placed["position"] = [pick(rng, RELATIONS), 0]
    return make("position", [reference, placed])


def sample_color_attr(rng: np.random.Generator, objects: Sequence[str] = OBJECTS) -> Metadata:
    """ "a photo of a green bus and a purple cake", two different objects and colours."""
    return make("color_attr", [_clause(name, color=color) for name, color in _colored(rng, objects, 2)])


def sample_pp_color_attr(rng: np.random.Generator, objects: Sequence[str] = OBJECTS) -> Metadata:
    """GenEval++: three (three times in four) or four coloured objects."""
    n = pick(rng, (3, 3, 3, 4))
    return make("color_attr", [_clause(name, color=color) for name, color in _colored(rng, objects, n)], plus=True)


def sample_pp_counting(rng: np.random.Generator, objects: Sequence[str] = OBJECTS) -> Metadata:
    """GenEval++: "A photo of six clocks", four to seven."""
    return make("counting", [_clause(pick(rng, objects), _between(rng, 4, 7))], plus=True)


def sample_pp_color_count_attr(rng: np.random.Generator, objects: Sequence[str] = OBJECTS) -> Metadata:
    """GenEval++: "A photo of two white cups and one pink kites", one to three each."""
    pairs = zip(_colored(rng, objects, 2), _counts(rng, 2), strict=True)
    return make("color_count_attr", [_clause(name, n, color=color) for (name, color), n in pairs], plus=True)


def sample_pp_color_spatial_attr(rng: np.random.Generator, objects: Sequence[str] = OBJECTS) -> Metadata:
    """GenEval++: "A photo of blue cup on the left and red kite on the right"."""
    pairs = zip(_colored(rng, objects, 2), pick(rng, REGIONS), strict=True)
    return make("color_spatial_attr", [_clause(n, color=c, region=region) for (n, c), region in pairs], plus=True)


def sample_pp_spatial_count_attr(rng: np.random.Generator, objects: Sequence[str] = OBJECTS) -> Metadata:
    """GenEval++: "A photo of three cups on the above and one kites on the below", one to three each."""
    parts = zip(pick_distinct(rng, objects, 2), _counts(rng, 2), pick(rng, REGIONS), strict=True)
    return make("spatial_count_attr", [_clause(name, n, region=region) for name, n, region in parts], plus=True)


def sample_pp_size_spatial_attr(rng: np.random.Generator, objects: Sequence[str] = OBJECTS) -> Metadata:
    """GenEval++: "A photo of a larger cup on the left and a smaller kite on the right"."""
    parts = zip(pick_distinct(rng, objects, 2), SIZES, pick(rng, REGIONS), strict=True)
    return make("size_spatial_attr", [_clause(n, size=size, region=region) for n, size, region in parts], plus=True)


def sample_pp_multi_object_count_attr(rng: np.random.Generator, objects: Sequence[str] = OBJECTS) -> Metadata:
    """GenEval++: "A photo of one cup, two kites, and three cakes"; two or three kinds, at most 7 objects."""
    n = _between(rng, 2, 3)
    pairs = zip(pick_distinct(rng, objects, n), _counts(rng, n), strict=True)
    return make("multi_object_count_attr", [_clause(name, count) for name, count in pairs], plus=True)


SAMPLERS: dict[str, Sampler] = {
    "single_object": sample_single_object,
    "two_object": sample_two_object,
    "counting": sample_counting,
    "colors": sample_colors,
    "position": sample_position,
    "color_attr": sample_color_attr,
}
"""GenEval's six tags in the order of its tables."""

SAMPLERS_PP: dict[str, Sampler] = {
    "color_attr": sample_pp_color_attr,
    "counting": sample_pp_counting,
    "color_count_attr": sample_pp_color_count_attr,
    "color_spatial_attr": sample_pp_color_spatial_attr,
    "spatial_count_attr": sample_pp_spatial_count_attr,
    "size_spatial_attr": sample_pp_size_spatial_attr,
    "multi_object_count_attr": sample_pp_multi_object_count_attr,
}
"""GenEval++'s seven tags."""


# Minimal edits

Edit = dict[int, dict[str, object]]
"""Clause index -> fields to overwrite."""


def minimal_edits(
    metadata: Metadata, rng: np.random.Generator, n: int = 5, objects: Sequence[str] = OBJECTS
) -> list[Metadata]:
    """`n` metadata with different prompts, each one edit away and false of a scene that shows exactly the original.

    Edits replace an object, a colour or a number, exchange colours, sizes or places, or turn a relation round. Kinds
    take turns, so the rare hard ones (a turned relation) are always among the first. Merely reordered captions and
    relations that a diagonal layout could also satisfy ("above" for "left of") are never returned.

    Raises:
        GvuError: fewer than `n` such edits exist.
    """
    kinds = [pick_distinct(rng, kind, len(kind)) for kind in _edits(metadata, objects) if kind]
    available = sum(map(len, kinds))
    if available < n:
        raise GvuError(f"only {available} minimal edits exist for {metadata['prompt']!r}, {n} were asked for")
    order = pick_distinct(rng, kinds, len(kinds))
    turns = [kind[i] for i in range(max(map(len, kinds))) for kind in order if i < len(kind)]
    return [_apply(metadata, edit) for edit in turns[:n]]


def _apply(metadata: Metadata, edit: Edit) -> Metadata:
    include = [cast(Clause, {**clause, **edit.get(i, {})}) for i, clause in enumerate(metadata["include"])]
    to_counting = metadata["tag"] == "single_object" and include[0]["count"] > 1
    return make("counting" if to_counting else metadata["tag"], include, is_plus(metadata))


def _edits(metadata: Metadata, objects: Sequence[str]) -> list[list[Edit]]:
    """All edits, one list per kind; fields stay different between clauses, as in the grammar."""
    include = metadata["include"]
    colors = _replacements(include, "color", COLORS) if "color" in include[0] else []
    return [
        _replacements(include, "class", objects),
        colors,
        _exchanges(include, "color"),
        _exchanges(include, "size"),
        _places(include),
        _numbers(metadata),
    ]


def _replacements(include: Sequence[Clause], field: str, words: Sequence[str]) -> list[Edit]:
    used = {clause.get(field) for clause in include}
    if field == "class" and any("color" in clause for clause in include):
        words = _colorable(words)
    return [{i: {field: word}} for i in range(len(include)) for word in words if word not in used]


def _exchanges(include: Sequence[Clause], field: str) -> list[Edit]:
    """The clauses' values of a field, exchanged between two of them."""
    pairs = [(i, j) for i, j in combinations(range(len(include)), 2) if field in include[i] and field in include[j]]
    return [{i: {field: include[j].get(field)}, j: {field: include[i].get(field)}} for i, j in pairs]


def _places(include: Sequence[Clause]) -> list[Edit]:
    """Who is where: turn the relation round, or exchange the two objects of a relation or of two image halves."""
    last = include[-1]
    if "position" not in last:
        return _exchanges(include, "class") if "region" in last else []
    relation, group = last["position"]
    return [*_exchanges(include, "class"), {len(include) - 1: {"position": [OPPOSITE[str(relation)], group]}}]


def _numbers(metadata: Metadata) -> list[Edit]:
    """Another count, out of those the tag's own prompts use."""
    tag = metadata["tag"]
    if tag in ("single_object", "counting"):
        choices = range(4, 8) if is_plus(metadata) else range(2, 5)
    elif tag in ("color_count_attr", "spatial_count_attr", "multi_object_count_attr"):
        choices = range(1, 4)
    else:
        return []
    return [{i: {"count": n}} for i, c in enumerate(metadata["include"]) for n in choices if n != c["count"]]
