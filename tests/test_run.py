"""The run folder and the progress display."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gvu.config import TrainConfig, load_config
from gvu.errors import GvuError
from gvu.progress import Progress, duration, sparkline
from gvu.run import Run, output_path


def test_a_run_folder_holds_everything(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    config = load_config(TrainConfig, overrides=["steps=3"])
    with Run.create(path, config) as run:
        run.log(1, {"reward": 0.5, "kl": float("nan")})
        run.log(2, {"reward": torch.tensor(0.75), "kl": np.float32(0.5)})  # type: ignore[dict-item]
        picture = run.samples(2, torch.rand(2, 3, 8, 8), ["a dog", "a cat"], rewards=[0.1, 0.2])
        adapter = run.checkpoint_dir(2)
        run.summary({"after": {"overall": 0.51239, "note": "a|b"}, "bad": float("inf")})
    assert load_config(TrainConfig, file=path / "config.yaml") == config
    assert json.loads((path / "environment.json").read_text())["packages"]["torch"]
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["reward"], line["kl"]) for line in lines] == [(1, 0.5, None), (2, 0.75, 0.5)]
    assert picture == path / "samples" / "step_00002.png"
    assert Image.open(picture).width > 2 * 192
    assert adapter == path / "checkpoints" / "step_00002"
    assert adapter.is_dir()
    assert json.loads((path / "summary.json").read_text()) == {
        "after": {"overall": 0.51239, "note": "a|b"},
        "bad": None,
    }
    assert "| after.overall | 0.5124 |" in (path / "summary.md").read_text()


def test_tensorboard_reads_the_events(tmp_path: Path) -> None:
    with Run.create(tmp_path, TrainConfig()) as run:
        run.log(7, {"reward": 0.5})
        run.samples(7, torch.rand(1, 3, 8, 8), ["a dog"])
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(7, 0.5)]
    assert [e.step for e in events.Images("samples")] == [7]


def test_metrics_are_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    run = Run.create(tmp_path, TrainConfig(), tensorboard=False)
    run.log(1, {"reward": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["reward"] == 0.5
    assert list(tmp_path.glob("events*")) == []
    run.close()
    run.close()


def test_a_folder_with_a_run_is_refused_and_kept(tmp_path: Path) -> None:
    Run.create(tmp_path, TrainConfig(), tensorboard=False).close()
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(GvuError, match="already holds a run"):
        Run.create(tmp_path, TrainConfig(steps=1))
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(GvuError, match="is a file"):
        Run.create(tmp_path / "f", TrainConfig())
    with pytest.raises(GvuError, match="cannot write"):
        Run.create(tmp_path / "f" / "run", TrainConfig())


def test_output_path_fills_in_model_and_time() -> None:
    assert output_path("runs/{model}-x", "/models/X-Omni-En") == Path("runs/X-Omni-En-x")
    assert len(output_path("{time}", "mini").name) == len("20260101-120000")


def test_progress_prints_plain_lines_without_a_terminal() -> None:
    out = io.StringIO()
    with Progress("train", 4, spark="reward", every=2, file=out) as progress:
        for step in range(4):
            progress.update({"reward": step / 4, "kl": 0.01}, items=64)
        progress.note("saved")
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["train 2/4", "train 4/4", "saved"]
    assert "reward 0.25  kl 0.01  images/s " in lines[0]
    assert "ETA 0s" in lines[1]


def test_progress_is_live_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    out = io.StringIO()
    with Progress("train", 2, spark="reward", file=out) as progress:
        progress.update({"reward": 0.0})
        progress.update({"reward": 1.0})
    assert "\x1b[" in out.getvalue()
    assert "▁█" in out.getvalue()


def test_progress_can_be_quiet() -> None:
    out = io.StringIO()
    with Progress("train", 1, file=out, quiet=True) as progress:
        progress.update({"reward": 1.0})
        progress.note("x")
    assert out.getvalue() == ""


def test_render_counts_speed_over_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("gvu.progress.time.monotonic", lambda: float(next(clock)))
    progress = Progress("eval", 10, file=io.StringIO(), unit="prompts")
    for _ in range(4):
        progress.update(items=6)
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as capture:
        console.print(progress.render())
    assert "prompts/s 3.0" in capture.get()
    assert "ETA 12s" in capture.get()


def test_sparkline_and_duration() -> None:
    assert sparkline([0, 1, float("nan"), 2], 10) == "▁▅ █"
    assert sparkline([1, 1], 10) == "▅▅"
    assert len(sparkline([float(i) for i in range(1000)], 60)) == 60
    assert sparkline([], 5) == ""
    assert [duration(s) for s in (4.4, 65, 7800, -1)] == ["4s", "1m05s", "2h10m", "0s"]
