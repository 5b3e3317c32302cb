"""Models by name: the embedded checkpoints and checkpoint folders."""

import json
from importlib.resources import files
from pathlib import Path

import torch

from gvu.errors import GvuError
from gvu.models.base import UnifiedModel
from gvu.models.xomni.adapter import XOmni

EMBEDDED = ("mini", "mini-weak")
FAMILIES: dict[str, type[UnifiedModel]] = {"x-omni": XOmni}
"""`model_type` of config.json -> adapter."""


def assets() -> Path:
    """Folder of the embedded checkpoints."""
    return Path(str(files("gvu") / "assets"))


def locate(name_or_path: str) -> Path:
    """The checkpoint folder of an embedded name or a path."""
    if name_or_path in EMBEDDED:
        return assets() / name_or_path
    path = Path(name_or_path)
    if not path.is_dir():
        raise GvuError(f"unknown model {name_or_path!r}: expected one of {', '.join(EMBEDDED)} or a checkpoint folder")
    return path


def pick_device(device: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise GvuError(f"unknown device {device!r}; give auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise GvuError(f"device {device!r} was asked for, but torch sees no GPU; give device=cpu")
    return chosen


def load(
    name_or_path: str, *, adapter: str | None = None, device: str = "auto", dtype: torch.dtype = torch.float32
) -> UnifiedModel:
    """Load a model by embedded name or checkpoint folder, with a trained adapter on it if given.

    Raises:
        GvuError: for an unknown name, a missing or damaged file, an unknown device.
    """
    folder = locate(name_or_path)
    model = family(folder).from_pretrained(folder, dtype=dtype, device=pick_device(device))
    if adapter is not None:
        model.load_adapter(adapter)
    return model


def family(folder: Path) -> type[UnifiedModel]:
    """The adapter class that `config.json` asks for."""
    path = folder / "config.json"
    if not path.is_file():
        raise GvuError(f"checkpoint {str(folder)!r} lacks 'config.json'; give a folder in the released layout")
    try:
        kind = json.loads(path.read_text()).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise GvuError(f"{path} is not a JSON object ({error}); restore it from the checkpoint's source") from None
    if kind not in FAMILIES:
        raise GvuError(f"{path} says model_type {kind!r}; expected one of {', '.join(FAMILIES)}")
    return FAMILIES[kind]
