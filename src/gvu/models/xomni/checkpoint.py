"""X-Omni's checkpoint folder: language model and tokenizer as transformers saves them, and `vision_config` for the
rest.

    config.json, generation_config.json, model.safetensors, tokenizer files, chat_template.jinja
    vision_config.encoder: siglip_path, projector_path (safetensors) and their shapes
    vision_config.decoder: model_path (the flow transformer), flux_path (folder with `vae` and `scheduler`)

Paths are relative to the folder, so that several language models can share one vision part.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gvu.errors import GvuError, brief
from gvu.models.xomni.decoder import FlowDecoder, XOmniFluxTransformer
from gvu.models.xomni.language import XOmniConfig, XOmniForCausalLM
from gvu.models.xomni.vision import ProjectorConfig, VisionTokenizer, VitConfig

T = TypeVar("T")
VISION_CONFIG = {
    "encoder": ("siglip_path", "projector_path", "vit", "projector"),
    "decoder": ("model_path", "flux_path", "grid", "steps"),
}
"""What `vision_config` must hold."""


@dataclass(kw_only=True)
class Parts:
    """A whole X-Omni in memory. `decoder` is loaded when first asked for: reading tokens never needs it."""

    language: XOmniForCausalLM
    tokenizer: PreTrainedTokenizerFast
    vision: VisionTokenizer
    decoder: Callable[[], FlowDecoder]
    grid: tuple[int, int]
    decoder_steps: int


def load(folder: Path, dtype: torch.dtype) -> Parts:
    """Read a checkpoint folder; GvuError names the file that is missing, damaged or of the wrong shape."""
    config = read_config(folder)
    encoder, decoder = config.vision_config["encoder"], config.vision_config["decoder"]  # type: ignore[index]
    check_decoder(folder, decoder)
    return Parts(
        language=load_language(folder, config, dtype),
        tokenizer=load_tokenizer(folder, config),
        vision=load_vision(folder, encoder, config.image_vocab_size, dtype),
        decoder=lambda: load_decoder(folder, decoder, dtype),
        grid=tuple(decoder["grid"]),
        decoder_steps=int(decoder["steps"]),
    )


def read_config(folder: Path) -> XOmniConfig:
    """The configuration, with a vision part."""
    path = _present(folder, "config.json")
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise GvuError(f"{path} is not JSON ({error}); restore it from the checkpoint's source") from None
    if raw.get("model_type") != XOmniConfig.model_type:
        raise GvuError(f"{path} says model_type {raw.get('model_type')!r}; expected {XOmniConfig.model_type!r}")
    config = _read(path, lambda: XOmniConfig.from_dict(raw))
    vision = config.vision_config or {}
    lost = [
        f"{part}.{name}"
        for part, names in VISION_CONFIG.items()
        for name in names
        if name not in (vision.get(part) or {})
    ]
    if lost:
        raise GvuError(f"{path} lacks vision_config.{lost[0]}, so it can neither read nor draw; copy it again")
    return config


def load_language(folder: Path, config: XOmniConfig, dtype: torch.dtype) -> XOmniForCausalLM:
    """The language model from safetensors, every key and shape checked."""
    _present(folder, "model.safetensors")
    with torch.device("meta"):
        model = XOmniForCausalLM.untrained(config)
    fill(model, folder / "model.safetensors", dtype)
    rotary = type(model.model.rotary_emb)(config=config)
    model.model.rotary_emb = rotary
    return model.eval()


def load_tokenizer(folder: Path, config: XOmniConfig) -> PreTrainedTokenizerFast:
    """The tokenizer; its image tokens must lie where the configuration puts them."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        _json(_present(folder, name))
    tokenizer = _read(
        folder / "tokenizer.json", lambda: AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    )
    start, after = config.vocab_size, config.vocab_size + config.image_vocab_size
    places = {"<MM-Token-0>": range(start, start + 1), f"<MM-Token-{after - start - 1}>": range(after - 1, after)}
    places |= {mark: range(after, start + config.mm_vocab_size) for mark in ("<SOM>", "<EOM>", "<IMAGE>")}
    for token, place in places.items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found not in place:
            raise GvuError(
                f"{folder / 'tokenizer.json'} puts {token} at id {found}, not in "
                f"{place.start}-{place.stop - 1} as config.json asks; take both from the same checkpoint"
            )
    if not tokenizer.chat_template:
        raise GvuError(
            f"the tokenizer of {str(folder)!r} has no chat template, so it cannot read; copy chat_template.jinja too"
        )
    return tokenizer


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of one token.

    Raises:
        GvuError: the tokenizer does not know it.
    """
    found = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(found, int) or found == tokenizer.unk_token_id:
        raise GvuError(f"the tokenizer has no token {token!r}; take the one that came with the checkpoint")
    return found


def load_vision(folder: Path, encoder: dict[str, Any], codes: int, dtype: torch.dtype) -> VisionTokenizer:
    """ViT and projector, whose codebook must hold as many codes as the language model knows."""
    config = folder / "config.json"
    vision = _read(
        config, lambda: VisionTokenizer(VitConfig(**encoder["vit"]), ProjectorConfig(**encoder["projector"]))
    )
    entries = vision.projector.config.codebook_size
    if entries != codes:
        raise GvuError(
            f"{config} says image_vocab_size {codes}, but a codebook of {entries}; take both from one source"
        )
    fill(vision.vit, _present(folder, encoder["siglip_path"]), dtype)
    fill(vision.projector, _present(folder, encoder["projector_path"]), dtype)
    return vision.eval().requires_grad_(False)


def check_decoder(folder: Path, decoder: dict[str, Any]) -> None:
    """Check that the decoder's files, which are loaded when first needed, are there, whole and of its shapes."""
    model, flux = _present(folder, decoder["model_path"]), _present(folder, decoder["flux_path"])
    _json(_present(folder, f"{decoder['flux_path']}/scheduler/scheduler_config.json"))
    parts: tuple[tuple[Path, Any], ...] = ((model, XOmniFluxTransformer), (flux / "vae", AutoencoderKL))
    for home, kind in parts:
        _check_part(home, kind, _json(_present(home, "config.json")))


def _check_part(home: Path, kind: Any, config: dict[str, Any]) -> None:
    with torch.device("meta"):
        module: nn.Module = _read(home / "config.json", lambda: kind.from_config(config))
    have = dict[str, torch.Size]()
    for path in sorted(home.glob("*.safetensors")):
        have |= _read(path, lambda p=path: _shapes(p))
    wanted = {k: v.shape for k, v in module.state_dict().items()}
    _fit({k: have[k] for k in wanted if k in have}, wanted, home)


def _shapes(path: Path) -> dict[str, torch.Size]:
    """Shapes in a safetensors file, from its header; SafetensorError where the file is cut short."""
    with safe_open(path, "pt") as file:
        return {k: torch.Size(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118


def load_decoder(folder: Path, decoder: dict[str, Any], dtype: torch.dtype) -> FlowDecoder:
    """Flow transformer, VAE and scheduler, by diffusers."""
    model, flux = _present(folder, decoder["model_path"]), _present(folder, decoder["flux_path"])
    transformer = _read(
        model, lambda: XOmniFluxTransformer.from_pretrained(str(model), torch_dtype=dtype, use_safetensors=True)
    )
    vae = _read(
        flux / "vae",
        lambda: AutoencoderKL.from_pretrained(str(flux), subfolder="vae", torch_dtype=dtype, use_safetensors=True),
    )
    scheduler = _read(
        flux / "scheduler", lambda: FlowMatchEulerDiscreteScheduler.from_pretrained(str(flux), subfolder="scheduler")
    )
    return FlowDecoder(transformer, vae, cast(FlowMatchEulerDiscreteScheduler, scheduler)).eval().requires_grad_(False)


def fill(module: nn.Module, path: Path, dtype: torch.dtype) -> None:
    """Load a safetensors file into a module (which may be on the meta device); every key and shape must fit."""
    state = _read(path, lambda: load_file(path))
    _fit({k: v.shape for k, v in state.items()}, {k: v.shape for k, v in module.state_dict().items()}, path)
    module.load_state_dict({k: v.to(dtype) for k, v in state.items()}, assign=True)


def _fit(have: dict[str, torch.Size], wanted: dict[str, torch.Size], path: Path) -> None:
    """GvuError unless the tensors of a file are those that the configuration asks for."""
    wrong = [k for k in wanted if k in have and have[k] != wanted[k]]
    if wrong:
        raise GvuError(
            f"{path}: tensor {wrong[0]!r} has shape {tuple(have[wrong[0]])}, the configuration asks for "
            f"{tuple(wanted[wrong[0]])}; config and weights are of different checkpoints"
        )
    for names, word in ((wanted.keys() - have.keys(), "lacks"), (have.keys() - wanted.keys(), "has the unexpected")):
        if names:
            raise GvuError(
                f"{path} {word} {len(names)} tensor(s), {sorted(names)[0]!r} first; it is not this model's file"
            )


def save(folder: Path, parts: Parts, *, shared: str = ".", dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a checkpoint folder; the vision part goes to `folder / shared` unless it is there already."""
    parts.language.config.vision_config = vision_config(parts, shared)
    parts.language.to(dtype).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    parts.tokenizer.save_pretrained(folder)
    home = folder / shared
    if (home / "decoder").exists():
        return
    home.mkdir(parents=True, exist_ok=True)
    save_file(_plain(parts.vision.vit, dtype), home / "siglip_vit.safetensors")
    save_file(_plain(parts.vision.projector, dtype), home / "vq_projector.safetensors")
    decoder = parts.decoder().to(dtype)
    decoder.transformer.save_pretrained(home / "decoder")
    decoder.vae.save_pretrained(home / "flux" / "vae")
    decoder.scheduler.save_pretrained(home / "flux" / "scheduler")


def vision_config(parts: Parts, shared: str) -> dict[str, Any]:
    """The `vision_config` of these parts, the released field names with the shapes beside them."""
    at = (lambda name: name) if shared == "." else (lambda name: f"{shared}/{name}")
    side = parts.vision.vit.config.patch_size
    return {
        "dtype": "bfloat16",
        "transform": {"short_size": side * min(parts.grid), "long_size": side * max(parts.grid), "patch_size": side},
        "encoder": {
            "siglip_path": at("siglip_vit.safetensors"),
            "projector_path": at("vq_projector.safetensors"),
            "vit": asdict(parts.vision.vit.config),
            "projector": asdict(parts.vision.projector.config),
        },
        "decoder": {
            "model_path": at("decoder"),
            "flux_path": at("flux"),
            "grid": list(parts.grid),
            "steps": parts.decoder_steps,
        },
    }


def _plain(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.detach().cpu().to(dtype).contiguous() for k, v in module.state_dict().items()}


def _present(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        raise GvuError(f"checkpoint {str(folder)!r} lacks {name!r}; copy the whole folder again")
    return path


def _json(path: Path) -> Any:
    return _read(path, lambda: json.loads(path.read_text(encoding="utf-8")))


def _read(path: Path, reader: Callable[[], T]) -> T:
    """Run a reader; what the libraries say about a damaged file becomes one sentence."""
    try:
        return reader()
    except (SafetensorError, StrictDataclassError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise GvuError(f"{path} cannot be read ({brief(error)}); copy it again from the checkpoint's source") from error
