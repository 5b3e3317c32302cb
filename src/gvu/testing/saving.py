"""Checks of adapters on disk, merging and checkpoints."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel

from gvu.models.base import LoraSpec, UnifiedModel
from gvu.testing.common import (
    Tiny,
    adapted,
    drawn,
    near,
    outputs,
    refused,
    same,
    stir,
)


def adapter_loads_with_peft(tiny: Tiny) -> None:
    """A saved adapter gives equal results with stock PEFT on a fresh language model and with `load_adapter`."""
    model = adapted(tiny)
    rollout = drawn(model)
    own = outputs(model, rollout)
    with tempfile.TemporaryDirectory() as folder:
        model.save_adapter(folder)
        assert {p.name for p in Path(folder).iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
        stock, ours, going = tiny(0), tiny(0), tiny(0)
        stock.language = PeftModel.from_pretrained(stock.language, folder)  # type: ignore[arg-type]
        ours.load_adapter(folder)
        going.load_adapter(folder, trainable=True)
    for other in (stock, ours, going):
        same(outputs(other, rollout), own, 1e-6)
    with ours.teacher("frozen"):
        pass
    assert not ours.trainable(), "an adapter loaded for use must stay untrainable"
    assert set(going.trainable()) == set(model.trainable())


def second_adapter_is_refused(tiny: Tiny) -> None:
    """An adapter on an adapter, and a missing or damaged one, are GvuErrors."""
    model = adapted(tiny)
    with tempfile.TemporaryDirectory() as folder:
        model.save_adapter(folder)
        weights = Path(folder) / "adapter_model.safetensors"
        uses: list[Callable[[], object]] = [lambda: model.add_lora(LoraSpec()), lambda: model.load_adapter(folder)]
        uses += [
            lambda: tiny(0).load_adapter(Path(folder) / "none"),
            tiny(0).merge,
            lambda: tiny(0).save_adapter(folder),
        ]
        for use in uses:
            refused(use)
        weights.write_bytes(weights.read_bytes()[:100])
        refused(lambda: tiny(0).load_adapter(folder))
        weights.unlink()
        refused(lambda: tiny(0).load_adapter(folder))


def merging_keeps_the_function(tiny: Tiny) -> None:
    """The merged model is the adapted one within 1e-4 nat and has no adapter any more."""
    model = adapted(tiny)
    rollout = drawn(model)
    own = outputs(model, rollout)
    model.merge()
    same(outputs(model, rollout), own, 1e-4)
    assert not isinstance(model.language, PeftModel)
    assert not any("lora" in name for name, _ in model.language.named_parameters())
    assert not model.trainable()


def checkpoints_come_back(tiny: Tiny) -> None:
    """`save_pretrained` then `from_pretrained` is the same model, pictures included, also after a merge."""
    model = tiny(0)
    _round_trip(model)
    model.add_lora(LoraSpec(r=4, alpha=8), seed=1)
    stir(model)
    with tempfile.TemporaryDirectory() as folder:
        refused(lambda: model.save_pretrained(folder))
        assert not list(Path(folder).iterdir())
    model.merge()
    _round_trip(model)


def _round_trip(model: UnifiedModel) -> None:
    rollout = drawn(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        back = type(model).from_pretrained(folder)
        pixels = back.decode(rollout)
    again = drawn(back)
    assert torch.equal(again.codes_S_A, rollout.codes_S_A)
    same(outputs(back, rollout), outputs(model, rollout), 1e-6)
    near(pixels, model.decode(rollout), 1e-5)
    near(back.read_pixels(pixels).content_S, model.read_pixels(pixels).content_S, 1e-5)
    assert back.capabilities == model.capabilities
