"""Lists of prompts: text files, JSONL files, and the mini world's own training prompts."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

from gvu.errors import GvuError

MINI_TRAIN = "mini-train"
MINI_TRAIN_DEFAULT = 1000
"""How many prompts `mini-train` has when no limit is given."""
MINI_TRAIN_WEIGHTS = {"two_object": 3, "counting": 3, "position": 4, "colors": 1}
"""Its odds of the tags: those in which a group's images differ in what is right. Of single objects nearly all images
are, of coloured pairs nearly none, and a group that agrees has nothing to learn from."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt.

    Attributes:
        text: what the model is asked to draw.
        metadata: the other fields of its JSONL line (GenEval: tag, include, exclude), None where there are none.
        id: its place in the list, from 0; seeds are derived from it.
    """

    text: str
    metadata: dict[str, Any] | None
    id: int


def load_prompts(
    source: str, limit: int = 0, *, seed: int = 0, tag_weights: Mapping[str, float] | None = None
) -> list[Prompt]:
    """The prompts of a source.

    Args:
        source: `mini-train`, or the path of a .txt file (one prompt per line) or a .jsonl file (a `prompt` field per
            line); blank lines are passed over.
        limit: only the first so many; 0 is all of a file, and `MINI_TRAIN_DEFAULT` of mini-train.
        seed: seed of mini-train.
        tag_weights: odds of mini-train's tags.

    Raises:
        GvuError: the source is unknown, missing, empty, not UTF-8, or has a bad line.
    """
    if source == MINI_TRAIN:
        records = _mini_train(limit or MINI_TRAIN_DEFAULT, seed, tag_weights)
    elif tag_weights:
        raise GvuError(
            f"prompts.tag_weights belongs to {MINI_TRAIN!r}; the prompts of {source!r} are taken as they stand"
        )
    else:
        records = _read(Path(source))
    prompts = [_prompt(i, record) for i, record in enumerate(islice(records, limit or None))]
    if not prompts:
        raise GvuError(f"the prompts file {source!r} is empty: expected one prompt per line")
    return prompts


def _prompt(index: int, record: dict[str, Any]) -> Prompt:
    metadata = {k: v for k, v in record.items() if k != "prompt"}
    return Prompt(text=record["prompt"], metadata=metadata or None, id=index)


def _mini_train(n: int, seed: int, weights: Mapping[str, float] | None) -> Iterator[dict[str, Any]]:
    from gvu.mini.splits import train_prompts

    try:
        return iter([dict(m) for m in train_prompts(n, seed, weights or MINI_TRAIN_WEIGHTS)])
    except ValueError as error:
        raise GvuError(f"{MINI_TRAIN}: {error}") from None


def _read(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix not in (".txt", ".jsonl"):
        raise GvuError(f"unknown prompts source {str(path)!r}: expected {MINI_TRAIN!r}, a .txt file or a .jsonl file")
    lines = _lines(path)
    if path.suffix == ".txt":
        return ({"prompt": line} for _, line in lines)
    return (_record(path, number, line) for number, line in lines)


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a file that are not blank, stripped, with their numbers from 1."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise GvuError(f"cannot read the prompts file {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = bytes(error.object[: error.start]).count(b"\n") + 1
        raise GvuError(f"the prompts file {str(path)!r} is not UTF-8 text (line {line}); save it as UTF-8") from None
    return [(i, line.strip()) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    where = f"line {number} of the prompts file {str(path)!r}"
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise GvuError(f'{where} is not JSON: expected an object such as {{"prompt": "a photo of a dog"}}') from None
    if not isinstance(record, dict) or "prompt" not in record:
        raise GvuError(f"{where} has no `prompt` field")
    prompt = cast("dict[str, Any]", record)["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise GvuError(f"{where} has {prompt!r} for a prompt, expected text")
    return {**cast("dict[str, Any]", record), "prompt": prompt.strip()}
