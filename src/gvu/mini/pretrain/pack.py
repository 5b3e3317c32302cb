"""Last stages: the detector that sees reconstructions, the shipped folders, and the figures of the model card."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from gvu.evaluation import Benchmark, evaluate
from gvu.mini.detector import Detector
from gvu.mini.pretrain import detect, shapes
from gvu.mini.pretrain.card import card, config_of
from gvu.mini.pretrain.language import LAST_STAGE, config_for, tokenizer_at
from gvu.mini.pretrain.pictures import load_vae, load_vision, make_decoder, scale_latents
from gvu.models.registry import EMBEDDED, assets, load
from gvu.models.xomni import checkpoint
from gvu.models.xomni.adapter import XOmni
from gvu.models.xomni.decoder import FlowDecoder
from gvu.models.xomni.language import XOmniForCausalLM
from gvu.models.xomni.vision import VisionTokenizer
from gvu.probes import understanding
from gvu.runtime import autocast
from gvu.sampling import derive_seed

DECODER_STEPS = 6
SHARED = "../mini-vision"
"""Where both checkpoints find the tokenizer and the decoder."""


def load_decoder(folder: Path) -> FlowDecoder:
    """The flow decoder as stage `decoder` left it."""
    vae = load_vae(folder)
    scale_latents(vae)
    decoder = make_decoder(vae)
    decoder.transformer.load_state_dict(load_file(folder / "decoder" / "model.safetensors"))
    return decoder.eval()


def reconstructor(folder: Path, steps: int = DECODER_STEPS) -> Callable[[Tensor], Tensor]:
    """Pixels (S, 3, 64, 64) in [0, 1] through codes and flow decoder and back, as the policy's own pictures are
    made."""
    return roundtrip(load_vision(folder), load_decoder(folder), steps)


def roundtrip(vision: VisionTokenizer, decoder: FlowDecoder, steps: int = DECODER_STEPS) -> Callable[[Tensor], Tensor]:
    """The function of `reconstructor` from loaded parts."""

    @torch.no_grad()
    def reconstruct(pixels: Tensor) -> Tensor:
        codes = vision.encode(2 * pixels - 1)
        seeds = [
            derive_seed(k, int(row.sum())) for k, row in enumerate(codes)
        ]  # a function of the pictures, for exact resume
        return decoder.decode(vision.latents(codes, shapes.GRID), shapes.GRID, steps=steps, cfg=1.0, seeds=seeds)

    return reconstruct


def train_detector(folder: Path, steps: int) -> Detector:
    """Stage `detector`: ground truth of the renderer, a part of the pictures reconstructed."""
    return detect.train_detector(folder, steps, reconstruct=reconstructor(folder))


def polish_detector(folder: Path, steps: int) -> Detector:
    """Stage `polish`."""
    return detect.polish_detector(folder, steps, reconstructor(folder))


def parts(folder: Path, language: Path) -> checkpoint.Parts:
    """Everything of one checkpoint; `language` is its language model's safetensors file."""
    tokenizer = tokenizer_at(folder)
    model = XOmniForCausalLM.untrained(config_for(tokenizer))
    model.load_state_dict(load_file(language))
    return checkpoint.Parts(
        language=model.eval(),
        tokenizer=tokenizer,
        vision=load_vision(folder),
        decoder=lambda: load_decoder(folder),
        grid=shapes.GRID,
        decoder_steps=DECODER_STEPS,
    )


def pack(folder: Path, home: Path | None = None) -> None:
    """Stage `pack`: write `mini`, `mini-weak`, their shared vision part and the detector into the package's assets."""
    home = home or assets()
    for name, stage in LAST_STAGE.items():
        checkpoint.save(home / name, parts(folder, folder / stage / "model.safetensors"), shared=SHARED)
    Detector.load(folder / "polish" / "final").save(home / "mini-detector")


def measure() -> dict[str, Any]:
    """Stage `measure`: figures of the shipped files, printed as JSON and written into the model cards."""
    models = {name: cast(XOmni, load(name)) for name in EMBEDDED}
    with autocast("auto", torch.device("cpu")):
        figures: dict[str, Any] = {name: _quality(model) for name, model in models.items()}
        shared = models["mini"]
        figures["detector"] = detect.measure(Detector.default(), roundtrip(shared.vision, shared.decoder))
    for name, model in models.items():
        (assets() / name / "README.md").write_text(card(name, figures, config_of(model)))
    print(json.dumps(figures, indent=1))
    return figures


def _quality(model: XOmni) -> dict[str, Any]:
    boards: tuple[Benchmark, ...] = ("geneval-mini", "geneval++-mini")
    reports = {board: evaluate(model, board, images_per_prompt=2).as_dict(rows=False) for board in boards}
    return {**reports, "understanding": understanding(model).as_dict()}
