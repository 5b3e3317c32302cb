"""The recipe of the shipped checkpoints: stages go on from one another and never lose what is there."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gvu.errors import GvuError
from gvu.mini.pretrain import STEPS, runners
from gvu.mini.pretrain.fit import FitConfig, fit, start_from
from gvu.mini.pretrain.language import LANGUAGE, LAST_STAGE, Stage, examples, trajectory
from gvu.models.registry import EMBEDDED


def test_every_checkpoint_has_a_trajectory_from_random_weights() -> None:
    assert set(LAST_STAGE) == set(EMBEDDED)
    for name, last in LAST_STAGE.items():
        stages = trajectory(last)
        assert LANGUAGE[stages[0]].after is None, name
        assert [LANGUAGE[stage].after for stage in stages[1:]] == stages[:-1]


def test_stages_run_after_what_they_start_from() -> None:
    order = list(STEPS)
    assert set(LANGUAGE) < set(order)
    for name, stage in LANGUAGE.items():
        assert STEPS[name] > stage.start
        assert stage.after is None or order.index(stage.after) < order.index(name)
    assert set(runners()) == {*order, "pack", "measure"}


def test_a_stage_starts_from_weights_alone_and_only_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, data = torch.nn.Linear(3, 1), torch.randn(8, 3)
    home, before = tmp_path / "later", tmp_path / "earlier"
    before.mkdir()
    save_file({k: v.clone() for k, v in module.state_dict().items()}, before / "model.safetensors")
    start_from(before, home, step=4)

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        return module(data).square().mean(), {}

    with torch.no_grad():
        module.weight.zero_()
    fit(module, loss, FitConfig(steps=6, lr=0.1, warmup=0), home)
    assert [json.loads(line)["step"] for line in (home / "log.jsonl").read_text().splitlines()] == [6]
    trained = load_file(home / "model.safetensors")
    assert not torch.equal(trained["weight"], load_file(before / "model.safetensors")["weight"])
    assert trained["weight"].abs().sum() > 0, "the earlier stage's weights were not taken"
    start_from(before, home, step=4)
    assert torch.equal(load_file(home / "model.safetensors")["weight"], trained["weight"])
    assert json.loads((home / "state.json").read_text()) == {"step": 6}


def test_a_stage_without_its_predecessor_says_which_to_run(tmp_path: Path) -> None:
    with pytest.raises(GvuError, match=r"stage 'mini' starts from stage 'weak', which .* lacks; run it first"):
        start_from(tmp_path / "weak", tmp_path / "mini")
    assert not (tmp_path / "mini").exists()


def test_drawing_and_reading_examples_have_their_own_odds() -> None:
    stage = Stage(
        after=None, horizon=9, draw=6, read=5, weights={"counting": 1}, draw_weights={"two_object": 1}, seed=3
    )
    texts, pixels = examples(stage, 4)
    again, same = examples(stage, 4)
    assert len(texts) == len(pixels) == 11
    assert all(" and " in text for text in texts[:6])
    assert not any(" and " in text for text in texts[6:])
    assert texts == again
    assert torch.equal(pixels, same)
    assert examples(stage, 5)[0] != texts


def test_one_set_of_odds_shares_its_pictures_between_drawing_and_reading() -> None:
    stage = Stage(after=None, horizon=9, draw=6, read=5, weights={"counting": 1}, seed=3)
    assert len(examples(stage, 0)[0]) == 6
