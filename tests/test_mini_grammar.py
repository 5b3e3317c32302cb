"""The grammar against the published prompt files; the splits by an independent reading of the text."""

import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gvu.geneval import Detection, Metadata, judge, judge_pp
from gvu.mini.grammar import SAMPLERS, SAMPLERS_PP, is_plus, make, minimal_edits, prompt_of
from gvu.mini.splits import (
    GENEVAL_SIZES,
    TRAIN_WEIGHTS,
    canonical,
    geneval_mini,
    genevalpp_mini,
    sample_train,
    train_prompts,
)
from gvu.mini.vocabulary import COLORS, NUMBERS, OBJECTS

SHARED = Path(os.environ.get("GVU_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))
GENEVAL, PLUS = "data/geneval/evaluation_metadata.jsonl", "data/genevalpp/Geneval++.jsonl"
ALL_SAMPLERS = [*SAMPLERS.values(), *SAMPLERS_PP.values()]


def shared_path(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is absent; set GVU_SHARED to the folder with the shared data")
    return SHARED / name


def lines(name: str) -> list[Any]:
    return [json.loads(line) for line in shared_path(name).read_text().splitlines()]


@pytest.mark.parametrize(("name", "n"), [(GENEVAL, 553), (PLUS, 280)])
def test_every_published_line_is_regenerated_byte_for_byte(name: str, n: int):
    published = lines(name)
    assert len(published) == n
    for metadata in published:
        silent = {k: v for k, v in metadata.items() if k != "prompt"}
        assert prompt_of(silent, plus=name == PLUS) == metadata["prompt"]  # type: ignore[arg-type]
        assert prompt_of(metadata) == metadata["prompt"]
        assert is_plus(metadata) == (name == PLUS)
        rebuilt = make(metadata["tag"], metadata["include"], plus=name == PLUS)
        assert json.dumps(rebuilt) == json.dumps(metadata)


def test_vocabulary_is_part_of_genevals():
    names = shared_path("data/geneval/object_names.txt").read_text().splitlines()
    assert len(set(OBJECTS)) == 24
    assert set(OBJECTS) <= set(names)


@pytest.mark.parametrize(("samplers", "name"), [(SAMPLERS, GENEVAL), (SAMPLERS_PP, PLUS)])
def test_samples_have_the_fields_of_the_published_tags(samplers: dict[str, Any], name: str):
    published = lines(name)
    rng = np.random.default_rng(0)
    for tag, sampler in samplers.items():
        shapes = {shape(m) for m in published if m["tag"] == tag}
        samples = [sampler(rng) for _ in range(200)]
        assert {m["tag"] for m in samples} == {tag}
        assert {shape(m) for m in samples} == shapes
        assert max(sum(c["count"] for c in m["include"]) for m in samples) <= 7


def shape(metadata: Metadata) -> tuple[Any, ...]:
    return tuple(metadata), tuple(tuple(clause) for clause in metadata["include"])


# An independent reading of prompts: text in, scene out.

NOUN = "|".join(sorted((*OBJECTS, *(o + ("es" if o[-1] == "s" else "s") for o in OBJECTS)), key=len, reverse=True))
PHRASE = re.compile(rf"(?:(an?|{'|'.join(NUMBERS)}) )?(?:(larger|smaller) )?(?:({'|'.join(COLORS)}) )?({NOUN})\b")


def read(prompt: str) -> Any:
    """The scene as frozen data: a bag of (count, size, color, object), directed where the text says so."""
    things = [(word_count(n), s, c, singular(o)) for n, s, c, o in PHRASE.findall(prompt.split(" photo of ")[1])]
    for relation, swap in (("left of", 0), ("right of", 1), ("above a", 0), ("below a", 1)):
        if f" {relation}" in prompt:
            return relation in ("left of", "right of"), tuple(things[::-1] if swap else things)
    for region in ("left", "above"):
        if f" on the {region} and " in prompt:
            return region == "left", tuple(things)
    return frozenset(Counter(things).items())


def word_count(word: str) -> int:
    return NUMBERS.index(word) + 1 if word in NUMBERS else 1


def singular(noun: str) -> str:
    return noun if noun in OBJECTS else noun[:-1] if noun[:-1] in OBJECTS else noun[:-2]


def test_canonical_agrees_with_an_independent_reading_of_the_text():
    rng = np.random.default_rng(0)
    samples = [sampler(rng, OBJECTS[:4]) for sampler in ALL_SAMPLERS for _ in range(150)]
    keys, scenes = [canonical(m) for m in samples], [read(m["prompt"]) for m in samples]
    assert len(set(keys)) == len(set(scenes)) == len(set(zip(keys, scenes, strict=True)))


def test_test_sets_have_the_promised_sizes_and_no_repeats():
    plain, plus = geneval_mini(), genevalpp_mini()
    assert Counter(m["tag"] for m in plain) == GENEVAL_SIZES
    assert len(plain) == 288
    assert Counter(m["tag"] for m in plus) == dict.fromkeys(SAMPLERS_PP, 20)
    assert len({read(m["prompt"]) for m in plain + plus}) == 428
    assert Counter(m["include"][0]["count"] for m in plain if m["tag"] == "counting") == {2: 8, 3: 8, 4: 8}
    assert not any(map(is_plus, plain))
    assert all(map(is_plus, plus))


def test_no_training_prompt_describes_a_test_scene():
    held_out = {read(m["prompt"]) for m in geneval_mini() + genevalpp_mini()}
    rng = np.random.default_rng(0)
    train = [sample_train(rng, dict.fromkeys(SAMPLERS, 1)) for _ in range(20_000)]
    assert {m["tag"] for m in train} == set(SAMPLERS)
    assert held_out.isdisjoint(read(m["prompt"]) for m in train)
    reachable = [m for tag, n in (("single_object", 24), ("counting", 72), ("colors", 240))
                 for m in {m["prompt"]: m for m in train if m["tag"] == tag}.values()]  # fmt: skip
    assert Counter(m["tag"] for m in reachable) == {"single_object": 12, "counting": 43, "colors": 180}


def test_the_split_never_changes():
    """A changed hash means that numbers are no longer comparable and that old checkpoints have seen test scenes."""
    text = "\n".join(m["prompt"] for m in geneval_mini() + genevalpp_mini())
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "5a587d1a2dd92fe44b6e778a41bb09b9f3a547d14d430715283bed55405033c6"
    )


def test_prompt_lists_are_deterministic_and_free_of_reordered_twins():
    odds = {"position": 1, "color_attr": 2}
    prompts = train_prompts(900, seed=1, weights=odds)
    assert prompts == train_prompts(900, seed=1, weights=odds)
    assert prompts != train_prompts(900, seed=2, weights=odds)
    assert len({read(m["prompt"]) for m in prompts}) == 900
    assert {m["tag"] for m in train_prompts(100, 0, {"position": 1})} == {"position"}


def test_a_small_tag_keeps_its_share_by_starting_over():
    tags = Counter(m["tag"] for m in train_prompts(1000, seed=0, weights={"counting": 1, "position": 1}))
    assert abs(tags["counting"] - 500) < 60
    times = Counter(m["prompt"] for m in train_prompts(43 * 3, seed=0, weights={"counting": 1}))
    assert len(times) == 43
    assert set(times.values()) == {3}


def test_odd_weights_are_refused():
    for weights in ({"dogs": 1}, {"counting": 0}, {"counting": -1, "colors": 3}, {}):
        with pytest.raises(ValueError, match="tag"):
            sample_train(np.random.default_rng(0), weights)


def test_tag_weights_are_met():
    rng = np.random.default_rng(0)
    tags = Counter(sample_train(rng)["tag"] for _ in range(5000))
    for tag, weight in TRAIN_WEIGHTS.items():
        assert tags[tag] / 5000 == pytest.approx(weight / sum(TRAIN_WEIGHTS.values()), abs=0.03)


def test_callers_cannot_damage_the_test_sets():
    geneval_mini()[0]["include"][0]["class"] = "horse"
    assert geneval_mini()[0]["include"][0]["class"] in OBJECTS


# Minimal edits, judged by the rule engines on a drawing of the original.


def draw(metadata: Metadata, rng: np.random.Generator) -> list[Detection]:
    """Ground-truth boxes of a scene that shows exactly the metadata, positions random where the text is silent."""
    while True:
        scene = [_box(c, rng) for c in metadata["include"] for _ in range(c["count"])]
        if true_of(metadata, scene):
            return scene


def _box(clause: Any, rng: np.random.Generator) -> Detection:
    x, y = rng.uniform(12, 52, 2)
    low, high = rng.uniform(12, 28), rng.uniform(36, 52)
    x = {"left": low, "right": high}.get(clause.get("region"), x)
    y = {"above": low, "below": high}.get(clause.get("region"), y)
    half = {"larger": 12, "smaller": 8}.get(clause.get("size"), 8)
    color = clause.get("color", "red")
    return Detection(name=clause["class"], x1=x - half, y1=y - half, x2=x + half, y2=y + half, color=color)


def true_of(metadata: Metadata, scene: list[Detection]) -> bool:
    return (judge_pp(metadata, scene, (64, 64)) if is_plus(metadata) else judge(metadata, scene)).correct


@pytest.mark.parametrize("sampler", ALL_SAMPLERS)
def test_minimal_edits_are_distinct_and_false_of_the_true_scene(sampler: Any):
    rng = np.random.default_rng(0)
    for _ in range(100):
        metadata = sampler(rng)
        scene = draw(metadata, rng)
        edits = minimal_edits(metadata, rng)
        assert len({metadata["prompt"], *(e["prompt"] for e in edits)}) == 6
        for edit in edits:
            assert not true_of(edit, scene), (metadata["prompt"], edit["prompt"])
            assert read(edit["prompt"]) != read(metadata["prompt"])
            assert edit["prompt"] == prompt_of(edit)


def test_edits_hit_every_kind_and_are_the_same_for_a_seed():
    def prompts(metadata: Metadata, n: int = 5) -> list[str]:
        return [e["prompt"] for e in minimal_edits(metadata, np.random.default_rng(3), n)]

    position = make("position", [{"class": "cup", "count": 1}, {"class": "cat", "count": 1, "position": ["above", 0]}])
    assert "a photo of a cat below a cup" in prompts(position)
    pair = make("color_attr", [{"class": "cup", "count": 1, "color": "red"},
                               {"class": "cat", "count": 1, "color": "blue"}])  # fmt: skip
    assert "a photo of a blue cup and a red cat" in prompts(pair)
    counting = make("counting", [{"class": "cup", "count": 3}])
    assert {"a photo of two cups", "a photo of four cups"} <= set(prompts(counting))
    assert prompts(pair) == prompts(pair)
    with pytest.raises(ValueError, match="minimal edits exist"):
        prompts(counting, n=99)
