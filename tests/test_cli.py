"""The command line: its frozen options, its errors, and what it passes on."""

import argparse
import json
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gvu.cli import main
from gvu.cli.parser import build_parser
from gvu.images import load_image, to_png
from test_images import noise, png_header

MODEL = ["--model", "--adapter", "--device"]
SAMPLING = ["--temperature", "--top-k", "--top-p", "--min-p", "--cfg"]
OPTIONS = {
    "train": ["overrides", "--config", "--output", "--print-config", "--dry-run", "--json"],
    "generate": ["prompts", "-n", "--seed", "--out", "--steps", *SAMPLING, *MODEL],
    "score": ["image", "prompt", "--via", "--instruction", "--json", *MODEL],
    "eval": ["benchmark", "--images-per-prompt", "--seed", "--json", "--out", *MODEL],
    "mini pretrain": ["stage", "--out", "--steps", "--resume"],
    "mini card": ["name"],
    "mini world": ["-n", "--seed", "--out"],
    "version": [],
}  # fmt: skip


def options(parser: argparse.ArgumentParser, name: str = "") -> dict[str, list[str]]:
    """Names of all options of all commands below a parser."""
    found: dict[str, list[str]] = {}
    own = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
    for action in own:
        if isinstance(action, argparse._SubParsersAction):
            for child, sub in action.choices.items():
                found |= options(sub, f"{name} {child}".strip())
    return found or {name: [a.option_strings[0] if a.option_strings else a.dest for a in own]}


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run a command that must fail as bad input does: exit code 2, one sentence, nothing on standard output."""
    assert main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gvu: ")
    assert err.count("\n") == 1
    return err


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """Stand in for a module that a command imports."""
    stand_in = types.ModuleType(name)
    stand_in.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, stand_in)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_list_of_options_is_frozen() -> None:
    assert options(build_parser()) == OPTIONS


def test_help_imports_nothing_heavy() -> None:
    code = "import sys\nfrom gvu.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'transformers', 'peft', 'numpy', 'rich', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_train_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    assert "# peak learning rate.\n  lr: " in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert "\ntorch 2." in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [[], ["trian"], ["train", "--fast"], ["score", "x.png"], ["eval", "imagenet"], ["generate", "x", "-n", "0"],
             ["generate", "x", "--out", "x.jpg"], ["generate", " "], ["generate", "x", "--top-p", "2"],
             ["eval", "geneval-mini", "stray"], ["mini"], ["mini", "card", "maxi"]],
)  # fmt: skip
def test_bad_usage(argv: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, *argv)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "data", "part"),
    [
        ("p.txt", b"", "empty"),
        ("absent.txt", None, "No such file"),
        ("p.txt", b"caf\xe9\n", "not UTF-8"),
        ("p.jsonl", b'{"text": "a"}\n', "no `prompt` field"),
        ("p.jsonl", b"{\n", "is not JSON"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_bad_prompts_file(
    here: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes | None, part: str, flags: list[str]
) -> None:
    if data is not None:
        (here / name).write_bytes(data)
    assert part in fails(capsys, "train", *flags, f"prompts.source={name}", "--output", "out")
    assert not (here / "out").exists()
    assert not (here / "runs").exists()


def test_bad_config(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "c.yaml").write_text("optim:\n  lrr: 1\n")
    assert "'optim.lrr' (in c.yaml); the closest valid key is 'optim.lr'" in fails(
        capsys, "train", "--config", "c.yaml"
    )
    assert "steps is 'many', expected a whole number" in fails(capsys, "train", "steps=many")
    assert "No such file" in fails(capsys, "train", "--config", "absent.yaml")
    assert [p.name for p in here.iterdir()] == ["c.yaml"]


def test_output_that_holds_a_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "out").mkdir()
    (here / "out" / "metrics.jsonl").write_text("{}\n")
    assert "already holds a run" in fails(capsys, "train", "--output", "out")
    assert [p.name for p in (here / "out").iterdir()] == ["metrics.jsonl"]


def test_config_is_checked_before_prompts_and_prompts_before_output(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "metrics.jsonl").touch()
    assert "steps" in fails(capsys, "train", "prompts.source=absent.txt", "--output", ".", "steps=0")
    assert "prompts" in fails(capsys, "train", "prompts.source=absent.txt", "--output", ".")


def test_bad_images(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png_header(here / "huge.png", 30_000, 30_000)
    to_png(noise(3, 64, 64), here / "cut.png")
    (here / "cut.png").write_bytes((here / "cut.png").read_bytes()[:5000])
    (here / "text.png").write_text("hello")
    for name, part in {
        "huge": "too large",
        "cut": "cannot decode",
        "text": "not an image",
        "absent": "No such",
    }.items():
        assert part in fails(capsys, "score", f"{name}.png", "a photo of a dog")


def test_print_config_round_trips(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "model=mini-weak", "--print-config", "optim.lr=3e-4", "--output", "o"]) == 0
    printed = capsys.readouterr().out
    (here / "c.yaml").write_text(printed)
    assert main(["train", "--config", "c.yaml", "--print-config"]) == 0
    assert capsys.readouterr().out == printed
    assert "  name: mini-weak\n" in printed
    assert "output: o\n" in printed
    assert "  lr: 0.0003\n" in printed


@dataclass
class Summary:
    """What `gvu.trainer.train` returns, as far as the command needs it."""

    output: Path
    interrupted: bool

    def as_dict(self) -> dict[str, Any]:
        return {"output": str(self.output), "after": {"overall": 0.5}}


@pytest.mark.parametrize(("interrupted", "code"), [(False, 0), (True, 130)])
def test_train_passes_the_config_and_reports(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], interrupted: bool, code: int
) -> None:
    seen: list[Any] = []
    train = lambda config: (seen.append(config), Summary(Path("out"), interrupted))[1]  # noqa: E731
    module(monkeypatch, "gvu.trainer", train=train, plan=lambda config: {"trained": {"parameters": config.lora.r}})
    assert main(["train", "--json", "steps=7", "--output", "out"]) == code
    assert json.loads(capsys.readouterr().out)["after"]["overall"] == 0.5
    assert (seen[0].steps, seen[0].output) == (7, "out")
    assert main(["train", "lora.r=3", "--dry-run"]) == 0
    assert "trained.parameters" in capsys.readouterr().out
    assert len(seen) == 1
    assert list(here.iterdir()) == []


def test_ctrl_c_is_clean(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(config: object) -> None:
        raise KeyboardInterrupt

    module(monkeypatch, "gvu.trainer", train=stop, plan=stop)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "gvu: interrupted\n"


def test_generate_writes_a_grid(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def generate(prompts: list[str], **how: Any) -> types.SimpleNamespace:
        seen.update(how, prompts=prompts)
        return types.SimpleNamespace(pixels=noise(len(prompts) * how["n"], 3, 64, 64))

    def load(name: str, *, adapter: str | None, device: str) -> types.SimpleNamespace:
        seen["model"] = f"{name}+{adapter}@{device}"
        return types.SimpleNamespace(generate=generate)

    module(monkeypatch, "gvu.models.registry", load=load)
    assert main(["generate", "a dog", "-n", "3", "--seed", "5", "--adapter", "A", "--temperature", "0.5"]) == 0
    assert capsys.readouterr().out == "3 images in grid.png\n"
    assert (seen["model"], seen["prompts"], seen["n"], seen["seed"]) == ("mini+A@auto", ["a dog"], 3, 5)
    assert seen["sampling"].temperature == 0.5
    assert load_image(here / "grid.png").shape[2] == 3 * 200 + 8


def test_score_prints_tokens_and_json(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def score(model: str, images: torch.Tensor, prompts: list[str], *, via: str) -> types.SimpleNamespace:
        assert (tuple(images.shape), prompts, via) == ((1, 3, 64, 64), ["a [red] dog"], "pixels")
        logp = torch.tensor([0.5, 0.25, 1.0]).log()
        return types.SimpleNamespace(reward=torch.tensor([0.5]), logp=[logp], tokens=[["a", " [red]", " dog"]])

    module(monkeypatch, "gvu.models.registry", load=lambda *args, **kwargs: "model")
    module(monkeypatch, "gvu.api", score=score)
    to_png(noise(3, 64, 64), here / "x.png")
    assert main(["score", "x.png", "a [red] dog"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "a [red] dog"
    assert "[red]  0.2500    -1.386 nat" in out
    assert "reward 0.5000" in out
    assert main(["score", "x.png", "a [red] dog", "--json"]) == 0
    assert [row["p"] for row in json.loads(capsys.readouterr().out)["tokens"]] == pytest.approx([0.5, 0.25, 1.0])


def test_eval_keeps_json_clean_of_progress(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate(model: str, benchmark: str, *, images_per_prompt: int, seed: int, progress: Any) -> Any:
        progress.total = 1
        progress.update(items=1)
        data = {"benchmark": benchmark, "n": images_per_prompt, "seed": seed}
        return types.SimpleNamespace(as_dict=lambda: data, table=lambda: "the table")

    module(monkeypatch, "gvu.models.registry", load=lambda *args, **kwargs: "model")
    module(monkeypatch, "gvu.evaluation", evaluate=evaluate)
    assert main(["eval", "geneval++-mini", "--json", "--images-per-prompt", "2", "--out", "r/report.json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((here / "r" / "report.json").read_text())
    assert "geneval++-mini 1/1" in err
    assert main(["eval", "geneval-mini"]) == 0
    assert capsys.readouterr().out.endswith("the table\n")


def test_mini_world_draws_scenes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mini", "world", "-n", "2"]) == 0
    assert load_image(here / "world.png").shape[2] == 2 * 200 + 8


def test_mini_pretrain_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.Namespace] = []
    module(monkeypatch, "gvu.mini.pretrain", main=seen.append)
    assert main(["mini", "pretrain", "vae", "--out", "d", "--steps", "3", "--resume"]) == 0
    assert (seen[0].stage, seen[0].out, seen[0].steps, seen[0].resume) == ("vae", Path("d"), 3, True)
