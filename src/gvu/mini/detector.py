"""The mini world's detector: a small convolutional network that stands where Mask2Former stands in GenEval.

It is trained on the renderer's ground truth alone (`gvu.mini.pretrain.detect`) and the policy never sees it.
Anchor-free: a 16x16 grid, cell (row i, column j) at pixel (4 j, 4 i), each with a class (24 objects or nothing), a
colour, and the square box of the object whose centre is near. Scores are softmax probabilities against "nothing", so
half an object or a mixture of two scores low; boxes are regressed, so an object off the lattice is still found.

Shape suffixes: S pictures, C channels of the raw output ("nothing" and the classes, the colours, then dx, dy, width).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gvu.errors import GvuError
from gvu.geneval import Detection, Metadata, Verdict, judge, judge_pp
from gvu.mini.render import SIDE, Placed
from gvu.mini.vocabulary import COLORS, OBJECTS

GRID, STRIDE = 16, 4
NEAR, IGNORED = 4.0, 6.0
"""Cells within NEAR pixels (per axis) of a centre answer for the object; those up to IGNORED need not be empty."""
OFFSET_UNIT, SIZE_UNIT = 8.0, 16.0
"""Pixels per unit of the regressed centre offset and width."""
APART = 0.6
"""Centres closer (per axis) than this share of the distance at which two objects touch are one object."""
CHUNK = 64
ASSET = "mini-detector"
"""Folder of the package's own detector, below `gvu/assets`."""


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Shape of the network.

    Attributes:
        stem: channels at stride 2.
        width: channels at stride 4.
        blocks: residual blocks of two 3x3 convolutions at stride 4.
        names, colors: labels in the order of the output channels.
    """

    stem: int = 24
    width: int = 64
    blocks: int = 3
    names: tuple[str, ...] = OBJECTS
    colors: tuple[str, ...] = COLORS


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the raw output should say.

    Attributes:
        class_S_16_16: 0 nothing, k the (k-1)-th name, -1 do not care.
        color_S_16_16: colour index, -1 where there is no object.
        box_S_3_16_16: centre offset (dx, dy) and width in the network's units, 0 where there is no object.
    """

    class_S_16_16: Tensor
    color_S_16_16: Tensor
    box_S_3_16_16: Tensor

    def to(self, device: torch.device) -> "Targets":
        """The same on another device."""
        return Targets(**{name: value.to(device) for name, value in vars(self).items()})


class _Block(nn.Module):
    """Two 3x3 convolutions beside a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = _conv(width, width, 3), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class Detector(nn.Module):
    """Finds the objects of 64x64 pictures."""

    def __init__(self, config: DetectorConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or DetectorConfig()
        self.stem = nn.Sequential(_conv(3, c.stem, 5, 2), nn.BatchNorm2d(c.stem), nn.ReLU(),
                                  _conv(c.stem, c.width, 3, 2), nn.BatchNorm2d(c.width), nn.ReLU())  # fmt: skip
        self.body = nn.Sequential(*(_Block(c.width) for _ in range(c.blocks)))
        self.head = nn.Sequential(nn.Conv2d(c.width, 2 * c.width, 1), nn.ReLU())
        channels = 1 + len(c.names) + len(c.colors) + 3
        self.out = nn.Conv2d(2 * c.width, channels, 1)
        nn.init.zeros_(self.out.weight)
        self.out.bias = nn.Parameter(torch.tensor([6.0] + [0.0] * (channels - 1)))  # most cells are empty
        self.eval()

    def forward(self, pixels_S_3_64_64: Tensor) -> Tensor:
        """Raw output (S, C, 16, 16) for pictures in [0, 1]."""
        return self.out(self.head(self.body(self.stem(pixels_S_3_64_64 * 2 - 1))))

    @torch.no_grad()
    def detect(self, pixels_S_3_64_64: Tensor, *, floor: float = 0.05) -> list[list[Detection]]:
        """The objects of each picture, most confident first, every one with a colour label.

        Always computed in the weights' precision, inside an autocast region too: verdicts must not depend on it.

        Args:
            pixels_S_3_64_64: pictures in [0, 1]; each is judged alone, whatever else is in the batch.
            floor: detections below this score are left out (the rules' own thresholds are 0.3 and 0.9).

        Raises:
            GvuError: pictures of another size.
        """
        if pixels_S_3_64_64.shape[1:] != (3, SIDE, SIDE):
            raise GvuError(f"the detector takes (S, 3, {SIDE}, {SIDE}) pictures, got {tuple(pixels_S_3_64_64.shape)}")
        own = self.out.weight
        chunks = pixels_S_3_64_64.to(own.device, own.dtype).clamp(0, 1).split(CHUNK)
        with torch.autocast(own.device.type, enabled=False):
            return [found for chunk in chunks for found in decode(self(chunk), self.config, floor)]

    @property
    def digest(self) -> str:
        """SHA-256 of configuration and weights: which judge a number comes from."""
        total = hashlib.sha256(json.dumps(asdict(self.config)).encode())
        for name, value in sorted(self.state_dict().items()):
            total.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        weights = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            GvuError: a file is missing, unreadable, or does not fit the configuration.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise GvuError(f"no detector in {str(folder)!r}: {name} is missing; gvu mini pretrain makes one")
        try:
            fields: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            fields |= {name: tuple(fields[name]) for name in ("names", "colors")}
            detector = cls(DetectorConfig(**fields))
            detector.load_state_dict(load_file(folder / "model.safetensors"))
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
            raise GvuError(f"the detector in {str(folder)!r} cannot be loaded: {str(error).splitlines()[0]}") from None
        return detector

    @classmethod
    def default(cls) -> Self:
        """The detector that the package ships.

        Raises:
            GvuError: this installation has none.
        """
        with resources.as_file(resources.files("gvu") / "assets" / ASSET) as folder:
            return cls.load(folder)


def truth(objects: Sequence[Placed]) -> list[Detection]:
    """The detections of a perfect detector."""
    return [Detection(name=o.name, x1=o.x, y1=o.y, x2=o.x + o.size, y2=o.y + o.size, color=o.color) for o in objects]


def verdict(metadata: Metadata, found: Sequence[Detection], plus: bool) -> Verdict:
    """GenEval's rules, or (`plus`) GenEval++'s, on a picture of the mini world."""
    return judge_pp(metadata, found, (SIDE, SIDE)) if plus else judge(metadata, found)


def encode(scenes: Sequence[Sequence[Placed]], config: DetectorConfig) -> Targets:
    """Training targets for the objects of each picture."""
    shape = (len(scenes), GRID, GRID)
    classes, colors = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    boxes = torch.zeros(len(scenes), 3, GRID, GRID)
    ticks = torch.arange(GRID) * float(STRIDE)
    for s, objects in enumerate(scenes):
        for o in objects:
            dx, dy = torch.broadcast_tensors(o.center[0] - ticks[None, :], o.center[1] - ticks[:, None])
            away = torch.maximum(dx.abs(), dy.abs())
            near = away <= NEAR
            classes[s][(away <= IGNORED) & ~near & (classes[s] == 0)] = -1
            classes[s][near] = 1 + config.names.index(o.name)
            colors[s][near] = config.colors.index(o.color)
            box = torch.stack([dx / OFFSET_UNIT, dy / OFFSET_UNIT, torch.full_like(dx, o.size / SIZE_UNIT)])
            boxes[s][:, near] = box[:, near]
    return Targets(class_S_16_16=classes, color_S_16_16=colors, box_S_3_16_16=boxes)


def losses(raw_S_C_16_16: Tensor, targets: Targets, config: DetectorConfig) -> dict[str, Tensor]:
    """Class and colour cross-entropy and box L1, each a mean over the cells that answer for an object.

    The class loss is plain cross-entropy over all cells but the ignored ones: unweighted, so scores are probabilities.
    """
    raw = raw_S_C_16_16.float()
    n = 1 + len(config.names)
    near = targets.class_S_16_16 > 0
    count = near.sum().clamp_min(1)
    sort = F.cross_entropy(raw[:, :n], targets.class_S_16_16, ignore_index=-1, reduction="sum")
    color = F.cross_entropy(raw[:, n:-3], targets.color_S_16_16, ignore_index=-1, reduction="sum")
    box = ((raw[:, -3:] - targets.box_S_3_16_16).abs() * near[:, None]).sum()
    return {"class": sort / count, "color": color / count, "box": box / count}


def decode(raw_S_C_16_16: Tensor, config: DetectorConfig, floor: float = 0.05) -> list[list[Detection]]:
    """Raw output to detections: cells above `floor`, and of those that mean the same object only the most confident."""
    raw = raw_S_C_16_16.float().cpu()
    n = 1 + len(config.names)
    score, name = raw[:, :n].softmax(1)[:, 1:].max(1)
    color = raw[:, n:-3].argmax(1)
    ticks = torch.arange(GRID) * float(STRIDE)
    cx, cy = ticks[None, None, :] + raw[:, -3] * OFFSET_UNIT, ticks[None, :, None] + raw[:, -2] * OFFSET_UNIT
    size = (raw[:, -1] * SIZE_UNIT).clamp_min(1.0)
    cells_S_N_6 = torch.stack([v.flatten(1).double() for v in (score, cx, cy, size, name, color)], 2)
    return [_suppress(cells[cells[:, 0] > floor], config) for cells in cells_S_N_6]


def _suppress(cells_N_6: Tensor, config: DetectorConfig) -> list[Detection]:
    """Greedy suppression, whatever the class: one place holds one object."""
    order = cells_N_6[:, 0].argsort(descending=True, stable=True)
    kept: list[list[float]] = []
    for cell in cells_N_6[order].tolist():
        if not any(_same_place(cell, other) for other in kept):
            kept.append(cell)
    return [_detection(cell, config) for cell in kept]


def _same_place(a: Sequence[float], b: Sequence[float]) -> bool:
    return max(abs(a[1] - b[1]), abs(a[2] - b[2])) < APART * (a[3] + b[3]) / 2


def _detection(cell: Sequence[float], config: DetectorConfig) -> Detection:
    score, cx, cy, size, name, color = cell
    half = size / 2
    return Detection(name=config.names[int(name)], color=config.colors[int(color)], score=score,
                     x1=cx - half, y1=cy - half, x2=cx + half, y2=cy + half)  # fmt: skip
