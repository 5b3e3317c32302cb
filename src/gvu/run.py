"""The folder of one training run: configuration, environment, metrics, samples, checkpoints, summary.

    config.yaml  environment.json  metrics.jsonl  events.out.tfevents.*  samples/step_00020.png
    checkpoints/step_00050/  summary.json  summary.md

Metrics are appended and flushed line by line, so that a run that dies keeps all it had.
"""

import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from torch import Tensor

from gvu.errors import GvuError
from gvu.images import captioned_grid
from gvu.settings import to_yaml

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

MARKS = ("config.yaml", "metrics.jsonl", "summary.json")
"""Files by which a folder is known to hold a run."""
PACKAGES = ("gvu", "torch", "transformers", "peft", "diffusers", "accelerate", "safetensors", "tokenizers", "numpy")


def output_path(template: str, model: str) -> Path:
    """A run's folder: `{model}` becomes the model's name (the last part of a path), `{time}` the local time."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path(template.replace("{model}", Path(model).name or "model").replace("{time}", stamp)).expanduser()


def refuse_existing(path: Path) -> None:
    """Refuse a folder that already holds a run, and a path that is no folder. Writes nothing.

    Raises:
        GvuError: the path cannot take a new run.
    """
    if path.exists() and not path.is_dir():
        raise GvuError(f"the output {str(path)!r} is a file; expected a folder, new or without a run")
    if any((path / mark).exists() for mark in MARKS):
        raise _taken(path)


def _taken(path: Path) -> GvuError:
    return GvuError(f"the output folder {str(path)!r} already holds a run; choose another with --output")


def environment() -> dict[str, Any]:
    """Versions, machine and command line, for the record."""
    cuda = torch.cuda.is_available()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "packages": {name: version(name) for name in PACKAGES},
    }


def version(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Run:
    """An open run folder; use it in a `with` block, or `close()` it."""

    def __init__(self, path: Path, metrics: IO[str], events: "SummaryWriter | None") -> None:
        self.path = path
        self._metrics = metrics
        self._events = events

    @classmethod
    def create(cls, path: Path, config: Any, *, tensorboard: bool = True) -> Self:
        """Make the folder and write config.yaml and environment.json.

        Args:
            config: the resolved configuration, a dataclass.
            tensorboard: write TensorBoard events too.

        Raises:
            GvuError: the folder already holds a run (two starts at once count), or cannot be written.
        """
        refuse_existing(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            with (path / "config.yaml").open("x", encoding="utf-8") as file:
                file.write(to_yaml(config))
            _write_json(path / "environment.json", environment())
            metrics = (path / "metrics.jsonl").open("x", encoding="utf-8")
        except FileExistsError:
            raise _taken(path) from None
        except OSError as error:
            raise GvuError(f"cannot write the output folder {str(path)!r}: {error.strerror}") from None
        return cls(path, metrics, _event_writer(path) if tensorboard else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line of metrics (a number that is not finite becomes null) and the TensorBoard scalars."""
        record = {"step": step, "time": round(time.time(), 3), **metrics}
        self._metrics.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._metrics.flush()
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)

    def samples(
        self, step: int, images_S_3_H_W: Tensor, captions: Sequence[str], rewards: Sequence[float] | None = None
    ) -> Path:
        """Write samples/step_NNNNN.png, a captioned grid, and the same as a TensorBoard image."""
        target = self.path / "samples" / f"step_{step:05d}.png"
        target.parent.mkdir(exist_ok=True)
        picture = captioned_grid(images_S_3_H_W, captions, rewards=rewards)
        picture.save(target)
        if self._events is not None:
            self._events.add_image("samples", np.asarray(picture), step, dataformats="HWC")
        return target

    def checkpoint_dir(self, step: int) -> Path:
        """checkpoints/step_NNNNN, made."""
        target = self.path / "checkpoints" / f"step_{step:05d}"
        target.mkdir(parents=True, exist_ok=True)
        return target

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, and summary.md as a table of its leaves."""
        data = cast("dict[str, Any]", _finite(dict(summary)))
        _write_json(self.path / "summary.json", data)
        rows = [f"| {name} | {_cell(value)} |" for name, value in _leaves(data, "")]
        text = "\n".join([f"# Run {self.path.name}", "", "| what | value |", "|---|---|", *rows])
        (self.path / "summary.md").write_text(text + "\n", encoding="utf-8")

    def close(self) -> None:
        """Close the files; may be called twice."""
        self._metrics.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _event_writer(path: Path) -> "SummaryWriter":
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(path), flush_secs=10)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON cannot hold, and tensors of one element as numbers."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in cast("Sequence[Any]", value)]
    if isinstance(value, Tensor | np.generic):
        return _finite(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _leaves(data: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in data.items():
        nested = isinstance(value, Mapping) and value
        pairs += _leaves(cast("Mapping[str, Any]", value), f"{prefix}{name}.") if nested else [(prefix + name, value)]
    return pairs


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
