"""The shipped checkpoints load by name and are what their cards say: they read well, and draw worse than they read."""

import json
from pathlib import Path

import pytest
import torch

from gvu.evaluation import evaluate
from gvu.mini.detector import Detector
from gvu.models.registry import EMBEDDED, assets, load
from gvu.probes import understanding
from gvu.runtime import autocast


def test_all_assets_are_safetensors_and_small() -> None:
    files = [p for p in assets().rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 30e6
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".jinja", ".md"}


@pytest.mark.parametrize("name", EMBEDDED)
def test_it_has_the_released_layout(name: str) -> None:
    config = json.loads((assets() / name / "config.json").read_text())
    assert config["model_type"] == "x-omni"
    for path in (config["vision_config"]["encoder"]["siglip_path"], config["vision_config"]["decoder"]["model_path"]):
        assert (assets() / name / path).exists()
    for file in ("tokenizer.json", "chat_template.jinja", "model.safetensors", "README.md"):
        assert (assets() / name / file).is_file()


@pytest.mark.parametrize("name", EMBEDDED)
def test_it_reads_well(name: str) -> None:
    """Forced choice among six captions on real renders: chance is 0.17, the cards say 0.9 or more (on 240 prompts)."""
    with autocast("auto", torch.device("cpu")):
        assert understanding(load(name), n=72).mean.overall.value > 0.8


def test_it_draws_what_it_is_asked_better_than_the_weak_one() -> None:
    with autocast("auto", torch.device("cpu")):
        strong, weak = (evaluate(load(name), "geneval-mini").overall.value for name in EMBEDDED)
    assert 0.40 < strong < 0.80
    assert 0.10 < weak < 0.45
    assert strong > weak + 0.1


def test_the_detector_is_the_shipped_one() -> None:
    assert Detector.default().digest == Detector.load(Path(assets()) / "mini-detector").digest


def test_an_image_is_the_same_in_any_batch() -> None:
    model = load("mini")
    one = model.generate(["a photo of a cat"], n=1, seed=3)
    two = model.generate(["a photo of a cat", "a photo of two red cars"], n=1, seed=3)
    assert torch.equal(one.rollout.codes_S_A[0], two.rollout.codes_S_A[0])
    torch.testing.assert_close(one.pixels[0], two.pixels[0], atol=1e-4, rtol=0)


def test_it_answers_in_its_own_words() -> None:
    model = load("mini")
    images = model.generate(["a photo of a cat"], n=1, seed=3)
    answer = model.answer(model.read_tokens(images.rollout), "Describe the image in detail.")[0]
    assert answer.startswith("a photo of")
