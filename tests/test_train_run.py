"""`gvu.train` from a checkpoint folder and a list of prompts to a run folder; Ctrl-C."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gvu.cli import main
from gvu.config import TrainConfig, load_config
from gvu.models.registry import load
from gvu.models.xomni.adapter import XOmni
from gvu.runtime import Interrupt
from gvu.testing.common import drawn, near
from gvu.trainer import Trainer, TrainSummary, train

METRICS = {
    "reward", "reward_std", "group_std", "dead_groups", "kl", "clip_fraction", "ratio_max", "grad_norm", "entropy",
    "replay_gap", "tokens_per_second", "images_per_second", "seconds", "seconds/rollout", "seconds/perceive",
    "seconds/score", "seconds/reference", "seconds/update", "peak_memory_gb", "loss", "lr",
}  # fmt: skip
"""What DESIGN 2 asks for at every step."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint and three prompts."""
    path = tmp_path_factory.mktemp("model")
    XOmni.tiny(0).save_pretrained(path / "checkpoint")
    (path / "prompts.txt").write_text("a red car\n\na blue dog\ntwo cups\n")
    return path


def settings(folder: Path, output: Path, *more: str) -> list[str]:
    return [
        f"model.name={folder / 'checkpoint'}", "model.device=cpu", f"prompts.source={folder / 'prompts.txt'}",
        f"output={output}", "steps=4", "precision=fp32", "rollout.prompts_per_step=2", "rollout.num_generations=3",
        "optim.lr=1e-2", "optim.warmup_steps=0", "eval.benchmarks=[]", "log.sample_every=2", "log.save_every=3", *more,
    ]  # fmt: skip


def run(folder: Path, output: Path, *more: str) -> TrainSummary:
    return train(load_config(TrainConfig, overrides=settings(folder, output, *more)))


def lines(output: Path, having: str = "reward") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if having in row]


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainSummary:
    return run(folder, tmp_path_factory.mktemp("out") / "run")


def test_the_run_folder_is_complete(folder: Path, done: TrainSummary) -> None:
    out = done.output
    config = load_config(TrainConfig, overrides=settings(folder, out))
    assert load_config(TrainConfig, file=out / "config.yaml") == config
    assert {p.name for p in (out / "samples").iterdir()} == {f"step_0000{k}.png" for k in (0, 2, 4)}
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step_00003"]
    assert (out / "checkpoints" / "step_00003" / "adapter_model.safetensors").is_file()
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["interrupted"]) == (4, False)
    assert summary["last"]["reward"] == pytest.approx(done.last["reward"])
    assert (done.steps, done.interrupted, done.before, done.after) == (4, False, {}, {})


def test_every_step_logs_every_metric(done: TrainSummary) -> None:
    rows = lines(done.output)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row.keys() >= METRICS
        assert all(row[name] is not None for name in METRICS)
        assert row["replay_gap"] < 1e-5
        assert 0 < row["peak_memory_gb"] < 64
    events = EventAccumulator(str(done.output)).Reload()
    assert set(events.Tags()["scalars"]) >= METRICS
    assert [e.value for e in events.Scalars("reward")] == pytest.approx([row["reward"] for row in rows], rel=1e-5)
    assert [e.step for e in events.Images("samples")] == [0, 2, 4]


def test_the_sample_prompts_rewards_are_logged(done: TrainSummary) -> None:
    """Same prompts, same seeds: what moves between the lines is the model alone."""
    rows = lines(done.output, having="samples/reward")
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert all(0 < row["samples/reward"] < 1 for row in rows)
    assert len({row["samples/reward"] for row in rows}) == 3


def test_the_adapter_loads_with_stock_peft(folder: Path, done: TrainSummary) -> None:
    checkpoint, adapter = folder / "checkpoint", done.output / "adapter"
    stock, ours, bare = (load(str(checkpoint), device="cpu") for _ in range(3))
    stock.language = PeftModel.from_pretrained(stock.language, str(adapter))  # type: ignore[arg-type]
    ours.load_adapter(adapter)
    rollout = drawn(bare)
    with torch.no_grad():
        logs = [m.policy_logp(rollout)[0] for m in (stock, ours, bare)]
    near(logs[0], logs[1], 1e-6)
    assert float((logs[0] - logs[2]).abs().max()) > 1e-3


def test_a_run_is_its_seed(folder: Path, done: TrainSummary, tmp_path: Path) -> None:
    run(folder, tmp_path / "again")
    timed = {name for name in METRICS if "second" in name} | {"time", "peak_memory_gb"}
    rows = [
        [{k: v for k, v in row.items() if k not in timed} for row in lines(p)]
        for p in (done.output, tmp_path / "again")
    ]
    assert rows[0] == rows[1]


def test_a_run_goes_on_from_an_adapter(folder: Path, done: TrainSummary, tmp_path: Path) -> None:
    adapter = done.output / "adapter"
    more = run(folder, tmp_path / "more", f"model.adapter={adapter}", "steps=1", "log.sample_every=0")
    first = lines(tmp_path / "more")[0]
    assert first["kl"] > 1e-4, "the reference is the base, not the adapter that was loaded"
    assert first["replay_gap"] < 1e-5
    assert not (more.output / "samples").exists()
    assert (more.output / "adapter" / "adapter_model.safetensors").read_bytes() != (
        adapter / "adapter_model.safetensors"
    ).read_bytes()


def interrupting(monkeypatch: pytest.MonkeyPatch, at: int, times: int = 1) -> None:
    """Send this process Ctrl-C in the middle of step `at`."""
    step = Trainer.step

    def interrupted(self: Trainer, index: int) -> dict[str, float]:
        for _ in range(times if index == at else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, index)

    monkeypatch.setattr(Trainer, "step", interrupted)


def test_ctrl_c_ends_with_an_adapter(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupting(monkeypatch, at=1)
    summary = run(folder, tmp_path / "run")
    assert summary.interrupted
    assert summary.steps == len(lines(tmp_path / "run")) == 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["interrupted"] is True
    load(str(folder / "checkpoint"), adapter=str(tmp_path / "run" / "adapter"), device="cpu")
    assert signal.getsignal(signal.SIGINT) is before


def test_the_command_line_says_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupting(monkeypatch, at=0)
    assert main(["train", *settings(folder, tmp_path / "run")]) == 130
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()


def test_a_second_ctrl_c_ends_at_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupting(monkeypatch, at=1, times=2)
    assert main(["train", *settings(folder, tmp_path / "run")]) == 130
    assert len(lines(tmp_path / "run")) == 1
    assert not (tmp_path / "run" / "adapter").exists()


def test_interrupt_works_beside_the_main_thread() -> None:
    errors = list[BaseException]()

    def work() -> None:
        try:
            with Interrupt() as interrupt:
                assert not interrupt.asked
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []


def test_a_dry_run_writes_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "--json", *settings(folder, tmp_path / "run")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"]["trained"] == sum(p.numel() for p in fresh().trainable().values())
    assert report["prompts"] == 3
    assert report["memory in MB"]["total"] > 0
    assert report["time"]["seconds per step"] >= 0
    assert not (tmp_path / "run").exists()


def fresh() -> XOmni:
    model = XOmni.tiny(0)
    model.add_lora(TrainConfig().lora)
    return model
