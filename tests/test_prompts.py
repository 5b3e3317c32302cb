"""Prompt sources, good and bad."""

from collections import Counter
from pathlib import Path

import pytest

from gvu.errors import GvuError
from gvu.prompts import MINI_TRAIN_DEFAULT, MINI_TRAIN_WEIGHTS, load_prompts


def write(folder: Path, name: str, data: str | bytes) -> str:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def test_text_file(tmp_path: Path) -> None:
    prompts = load_prompts(write(tmp_path, "p.txt", "\ufeffa dog\r\n\n  a photo of café \nlast"))
    assert [(p.text, p.metadata, p.id) for p in prompts] == [
        ("a dog", None, 0), ("a photo of café", None, 1), ("last", None, 2),
    ]  # fmt: skip


def test_jsonl_keeps_metadata(tmp_path: Path) -> None:
    source = write(tmp_path, "p.jsonl", '{"prompt": " a dog ", "tag": "single_object"}\n\n{"prompt": "a cat"}\n')
    prompts = load_prompts(source)
    assert [(p.text, p.metadata) for p in prompts] == [("a dog", {"tag": "single_object"}), ("a cat", None)]


def test_limit(tmp_path: Path) -> None:
    assert [p.text for p in load_prompts(write(tmp_path, "p.txt", "a\nb\nc\n"), 2)] == ["a", "b"]


def test_mini_train_is_seeded_and_carries_metadata() -> None:
    first, again, other = (load_prompts("mini-train", 20, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert [p.text for p in first] != [p.text for p in other]
    assert all(p.metadata and p.metadata["tag"] and "prompt" not in p.metadata for p in first)
    assert len(load_prompts("mini-train")) == MINI_TRAIN_DEFAULT


def test_mini_train_has_the_tags_in_which_groups_disagree() -> None:
    counts = Counter(str((p.metadata or {})["tag"]) for p in load_prompts("mini-train"))
    assert set(counts) == set(MINI_TRAIN_WEIGHTS)
    for tag, weight in MINI_TRAIN_WEIGHTS.items():  # also counting, which has 43 compositions
        assert abs(counts[tag] / MINI_TRAIN_DEFAULT - weight / sum(MINI_TRAIN_WEIGHTS.values())) < 0.05


def test_mini_train_weights(tmp_path: Path) -> None:
    prompts = load_prompts("mini-train", 10, tag_weights={"counting": 1})
    assert {p.metadata["tag"] for p in prompts if p.metadata} == {"counting"}
    with pytest.raises(GvuError, match="mini-train"):
        load_prompts("mini-train", 10, tag_weights={"cubism": 1})
    with pytest.raises(GvuError, match="tag_weights"):
        load_prompts(write(tmp_path, "p.txt", "a"), tag_weights={"counting": 1})


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("p.txt", "", "empty"),
        ("p.jsonl", " \n\n", "empty"),
        ("p.txt", b"a dog\ncaf\xe9\n", r"not UTF-8 text \(line 2\)"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2 .* is not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"text": "b"}\n', "line 3 .* no `prompt` field"),
        ("p.jsonl", '["prompt"]\n', "line 1 .* no `prompt` field"),
        ("p.jsonl", '{"prompt": 7}\n', "line 1 .* has 7 for a prompt"),
        ("p.jsonl", '{"prompt": "  "}\n', "line 1 .* expected text"),
        ("p.csv", "a", r"unknown prompts source .*\.txt file or a \.jsonl file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, data: str | bytes, match: str) -> None:
    with pytest.raises(GvuError, match=match):
        load_prompts(write(tmp_path, name, data))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(GvuError, match="No such file"):
        load_prompts(str(tmp_path / "absent.txt"))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(GvuError, match="Is a directory"):
        load_prompts(str(tmp_path / "folder.txt"))
