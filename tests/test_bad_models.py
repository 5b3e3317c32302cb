"""Checkpoints, adapters and prompts that cannot work: one sentence, exit code 2, no output folder left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gvu.cli import main
from gvu.errors import GvuError
from gvu.models.base import LoraSpec
from gvu.models.registry import load
from gvu.models.xomni.adapter import XOmni
from gvu.models.xomni.tiny import byte_tokenizer

Damage = Callable[[Path], None]
FILES = (
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "siglip_vit.safetensors",
    "vq_projector.safetensors", "decoder/config.json", "decoder/diffusion_pytorch_model.safetensors",
    "flux/vae/config.json", "flux/vae/diffusion_pytorch_model.safetensors", "flux/scheduler/scheduler_config.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that loads, and its adapter."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoint"
    model = XOmni.tiny(0)
    model.save_pretrained(folder)
    model.add_lora(LoraSpec(r=2))
    model.save_adapter(folder.parent / "adapter")
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage, with prompts beside it."""
    shutil.copytree(whole, tmp_path / "checkpoint")
    shutil.copytree(whole.parent / "adapter", tmp_path / "adapter")
    (tmp_path / "prompts.txt").write_text("a red car\na cup\n")
    return tmp_path / "checkpoint"


def fails(capsys: pytest.CaptureFixture[str], folder: Path, *overrides: str, model: str | None = None) -> str:
    """`gvu train` must refuse: exit code 2, one sentence, nothing written."""
    output = folder.parent / "run"
    prompts = f"prompts.source={folder.parent / 'prompts.txt'}"
    capsys.readouterr()
    code = main(["train", f"model={model or folder}", prompts, f"output={output}", "eval.benchmarks=[]", *overrides])
    out, err = capsys.readouterr()
    assert code == 2, (code, out, err)
    assert not output.exists()
    assert out == ""
    assert err.startswith("gvu: ")
    assert err.count("\n") == 1
    assert len(err) < 600
    return err


def removed(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def truncated(name: str) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) * 2 // 3])

    return damage


def edited(name: str, *keys: str, value: Any) -> Damage:
    """Set a nested key of a JSON file; None removes it."""

    def damage(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        place = data
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        if value is None:
            del place[keys[-1]]
        (folder / name).write_text(json.dumps(data))

    return damage


def without_a_tensor(name: str) -> Damage:
    def damage(folder: Path) -> None:
        state = load_file(folder / name)
        del state[sorted(state)[0]]
        save_file(state, folder / name, metadata={"format": "pt"})

    return damage


def with_a_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({**state, "stray.weight": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})


def other_tokenizer(codes: int) -> Damage:
    return lambda folder: byte_tokenizer(codes).save_pretrained(folder)


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copied: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    removed(name)(copied)
    err = fails(capsys, copied)
    assert Path(name).name in err or "lacks" in err
    assert str(copied) in err


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(copied: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    truncated(name)(copied)
    assert Path(name).name in fails(capsys, copied)


MISMATCHES: dict[str, tuple[Damage, str]] = {
    "width": (edited("config.json", "hidden_size", value=64), "model.safetensors"),
    "layers": (edited("config.json", "num_hidden_layers", value=4), "num_hidden_layers"),
    "fewer layers": (edited("config.json", "num_hidden_layers", value=2), "num_hidden_layers"),
    "word for number": (edited("config.json", "hidden_size", value="wide"), "hidden_size"),
    "too many mm layers": (edited("config.json", "num_mm_adap_layers", value=9), "num_mm_adap_layers"),
    "codes": (edited("config.json", "image_vocab_size", value=16), "image_vocab_size"),
    "codebook": (
        edited("config.json", "vision_config", "encoder", "projector", "codebook_size", value=9),
        "codebook of 9",
    ),
    "vit option": (edited("config.json", "vision_config", "encoder", "vit", "colour", value=9), "colour"),
    "vit width": (edited("config.json", "vision_config", "encoder", "vit", "width", value=64), "ViT width"),
    "no vit": (edited("config.json", "vision_config", "encoder", "vit", value=None), "encoder.vit"),
    "no grid": (edited("config.json", "vision_config", "decoder", "grid", value=None), "decoder.grid"),
    "no vision": (edited("config.json", "vision_config", value=None), "vision_config"),
    "kind": (edited("config.json", "model_type", value="qwen2"), "qwen2"),
    "decoder": (edited("decoder/config.json", "siglip_channels", value=8), "siglip_embed"),
    "vae": (edited("flux/vae/config.json", "latent_channels", value=8), "vae"),
    "tensor lost": (without_a_tensor("model.safetensors"), "lacks 1 tensor"),
    "decoder tensor lost": (without_a_tensor("decoder/diffusion_pytorch_model.safetensors"), "lacks 1 tensor"),
    "tensor too many": (with_a_tensor, "stray.weight"),
    "fewer codes in tokenizer": (other_tokenizer(16), "<MM-Token-31>"),
    "more codes in tokenizer": (other_tokenizer(48), "<SOM>"),
    "no template": (no_template, "chat template"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_parts_that_do_not_fit_are_named(copied: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, word = MISMATCHES[name]
    damage(copied)
    assert word in fails(capsys, copied)


@pytest.mark.parametrize("text", ["", "[]", "{", "7", "\xff"])
def test_a_configuration_that_is_none(copied: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in fails(capsys, copied)


@pytest.mark.parametrize("name", ["mini-strong", "no/such/folder", "openai/clip"])
def test_an_unknown_model_names_the_known(copied: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    err = fails(capsys, copied, model=name)
    assert name in err
    assert "mini-weak" in err


@pytest.mark.parametrize("device", ["tpu-ish", "cuda" if not torch.cuda.is_available() else "quantum"])
def test_a_device_that_is_not_there(copied: Path, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "device" in fails(capsys, copied, f"model.device={device}")


def test_other_commands_refuse_the_same(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncated("decoder/diffusion_pytorch_model.safetensors")(copied)
    picture = copied.parent / "grid.png"
    assert main(["generate", "a cup", "--model", str(copied), "--out", str(picture)]) == 2
    assert not picture.exists()
    assert main(["generate", "a cup", "--model", "nothing", "--out", str(picture)]) == 2
    assert capsys.readouterr().err.count("\n") == 2


# --- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("letters", [230, 200], ids=["to draw", "to read"])
def test_a_prompt_longer_than_the_context(copied: Path, letters: int, capsys: pytest.CaptureFixture[str]) -> None:
    """256 positions hold 230 letters without their image, and 200 with it but without the question about it."""
    (copied.parent / "prompts.txt").write_text("a red car\n" + "x" * letters + "\na cup\n")
    err = fails(capsys, copied)
    assert "xxx" in err
    assert "256" in err


def test_a_contrastive_reward_needs_something_to_edit(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "metadata" in fails(capsys, copied, "reward.kind=contrastive")


# --- adapters ----------------------------------------------------------------------------------------------------


def test_adapters_that_do_not_load(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = copied.parent / "adapter"
    option = f"model.adapter={adapter}"
    config = (adapter / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(config.replace('"r": 2', '"r": 3'))
    assert "adapter" in fails(capsys, copied, option)
    (adapter / "adapter_config.json").write_text("{")
    assert "adapter" in fails(capsys, copied, option)
    (adapter / "adapter_config.json").write_text(config)
    truncated("adapter_model.safetensors")(adapter)
    assert "adapter" in fails(capsys, copied, option)
    (adapter / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in fails(capsys, copied, option)
    assert "no adapter" in fails(capsys, copied, f"model.adapter={copied}")


def test_an_adapter_of_other_modules_is_refused(copied: Path) -> None:
    adapter = copied.parent / "adapter"
    state = load_file(adapter / "adapter_model.safetensors")
    save_file({k.replace("layers.0", "layers.7"): v for k, v in state.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(GvuError, match="adapter"):
        load(str(copied), adapter=str(adapter), device="cpu")


def test_the_whole_checkpoint_loads(whole: Path) -> None:
    assert load(str(whole), adapter=str(whole.parent / "adapter"), device="cpu").capabilities.codebook == 32
