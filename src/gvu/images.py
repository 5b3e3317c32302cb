"""Images in and out: bounded loading, PNG, and captioned grids. Pixels are float (3, H, W) in [0, 1].

Pillow throughout (torchvision is never installed). Shape suffix: S images.
"""

import math
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from gvu.errors import GvuError

MAX_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)

CELL, GAP, FONT_SIZE, CAPTION_LINES = 192, 8, 14, 4
PAPER, INK, REWARD_INK = (255, 255, 255), (32, 32, 32), (0, 96, 160)


def load_image(path: str | Path, side: int | None = None) -> Tensor:
    """An image file as float (3, H, W) in [0, 1].

    Args:
        path: PNG, JPEG, WebP, BMP, GIF (first frame) or TIFF; transparency is laid on white, EXIF rotation is applied.
        side: scale and centre-crop to `side` x `side`; None keeps the size.

    Raises:
        GvuError: missing, not an image, truncated, or of more than `MAX_PIXELS` (told by the header alone).
    """
    image = _open(path)
    try:
        with image:
            image.load()
            rgb = _to_rgb(ImageOps.exif_transpose(image))
    except _UNREADABLE as error:
        raise GvuError(f"cannot decode the image {str(path)!r}: {error}") from None
    if side is not None and rgb.size != (side, side):
        rgb = ImageOps.fit(rgb, (side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(rgb, np.float32) / 255.0).permute(2, 0, 1).contiguous()


def _open(path: str | Path) -> Image.Image:
    """The image by its header alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        raise GvuError(f"the image {str(path)!r} is too large: at most {MAX_PIXELS // 10**6} megapixels") from None
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise GvuError(f"cannot read the image {str(path)!r}: {error.strerror}") from None
    except _UNREADABLE:
        raise GvuError(f"{str(path)!r} is not an image (expected {', '.join(FORMATS)})") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        limit = MAX_PIXELS // 10**6
        raise GvuError(f"the image {str(path)!r} is too large: {width} x {height}, at most {limit} megapixels")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def to_pil(image_3_H_W: Tensor) -> Image.Image:
    """One image as an 8-bit Pillow image; values outside [0, 1] are clipped."""
    pixels = (image_3_H_W.detach().float().cpu().clamp(0, 1) * 255.0).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def to_png(image_3_H_W: Tensor, path: str | Path) -> None:
    """Write one image as PNG; its folder is made.

    Raises:
        GvuError: the file cannot be written.
    """
    _save(to_pil(image_3_H_W), path)


def grid(images_S_3_H_W: Tensor, columns: int) -> Tensor:
    """All images side by side, `columns` in a row, as (3, rows * H, columns * W); missing ones are white."""
    count, channels, height, width = images_S_3_H_W.shape
    rows = -(-count // columns)
    canvas = images_S_3_H_W.new_ones(rows * columns, channels, height, width)
    canvas[:count] = images_S_3_H_W
    cells = canvas.view(rows, columns, channels, height, width)
    return cells.permute(2, 0, 3, 1, 4).reshape(channels, rows * height, columns * width)


def save_grid(
    path: str | Path,
    images_S_3_H_W: Tensor,
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    rewards: Sequence[float] | None = None,
    cell: int = CELL,
) -> None:
    """Write a PNG grid with the caption, and the reward if given, under each image.

    Args:
        columns: images in a row; by default as square as can be, at most 8.
        cell: small images are enlarged, pixel by pixel, until they are at least this wide.

    Raises:
        GvuError: the file cannot be written.
    """
    _save(captioned_grid(images_S_3_H_W, captions, columns=columns, rewards=rewards, cell=cell), path)


def captioned_grid(
    images_S_3_H_W: Tensor,
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    rewards: Sequence[float] | None = None,
    cell: int = CELL,
) -> Image.Image:
    """What `save_grid` writes, as a Pillow image."""
    count, _, height, width = images_S_3_H_W.shape
    across = columns or min(8, max(1, count) if count <= 4 else math.ceil(count**0.5))
    factor = max(1, -(-cell // width))
    box = width * factor, height * factor
    notes = _notes(count, captions, rewards, box[0])
    line = FONT_SIZE + 4
    step = box[0] + GAP, box[1] + GAP + line * max(len(n) for n in notes)
    canvas = Image.new("RGB", (across * step[0] + GAP, -(-count // across) * step[1] + GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, (image, note) in enumerate(zip(images_S_3_H_W, notes, strict=True)):
        x, y = GAP + i % across * step[0], GAP + i // across * step[1]
        canvas.paste(to_pil(image).resize(box, Image.Resampling.NEAREST), (x, y))
        for k, (text, ink) in enumerate(note):
            draw.text((x, y + box[1] + 2 + k * line), text, fill=ink, font=_font())
    return canvas


def _notes(
    count: int, captions: Sequence[str] | None, rewards: Sequence[float] | None, width: int
) -> list[list[tuple[str, tuple[int, int, int]]]]:
    """The lines under each image with their colours; captions are padded so that rewards stand level."""
    wrapped = [_wrap(text, width) for text in captions] if captions else [[] for _ in range(count)]
    tallest = max((len(lines) for lines in wrapped), default=0)
    notes = [[(text, INK) for text in lines] for lines in wrapped]
    if rewards is not None:
        for note, reward in zip(notes, rewards, strict=True):
            note += [("", INK)] * (tallest - len(note)) + [(f"reward {reward:.3f}", REWARD_INK)]
    return notes or [[]]


def _wrap(text: str, width: int) -> list[str]:
    """Text broken at spaces into at most `CAPTION_LINES` lines of `width` pixels; the last ends in ... if cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _font().getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    cut = len(lines) > CAPTION_LINES
    return [_fit(line, width, dots=cut and i == CAPTION_LINES - 1) for i, line in enumerate(lines[:CAPTION_LINES])]


def _fit(line: str, width: int, *, dots: bool) -> str:
    tail = "..." if dots else ""
    while line and _font().getlength(line + tail) > width:
        line, tail = line[:-1], "..."
    return line + tail


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(FONT_SIZE)


def _save(image: Image.Image, path: str | Path) -> None:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        image.save(path, format="PNG")
    except OSError as error:
        raise GvuError(f"cannot write the image {str(path)!r}: {error.strerror or error}") from None
