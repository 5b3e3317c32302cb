"""The 24 object icons of the mini world, drawn by us as vector shapes on the unit square.

An icon is a tuple of primitives `(shape, role, *numbers)`; `role` names a paint that depends on the object's colour:
`main` (the colour itself), `dark` and `light` (its shades), `ink` (outline), `paper` (near white), `leaf`, `wood`.
Every icon gets one ink outline around its silhouette, so that white objects show on light grounds.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Primitive = tuple[str, str, tuple[float, ...]]
RGB = tuple[int, int, int]

PALETTE: dict[str, RGB] = {
    "red": (214, 40, 40), "orange": (245, 132, 32), "yellow": (250, 210, 44), "green": (46, 158, 68),
    "blue": (40, 98, 215), "purple": (128, 60, 180), "pink": (250, 140, 190), "brown": (122, 76, 44),
    "black": (32, 32, 36), "white": (250, 250, 250),
}  # fmt: skip
NATURAL: dict[str, str] = {
    "apple": "red", "banana": "yellow", "carrot": "orange", "pizza": "orange", "donut": "pink", "cake": "white",
    "car": "red", "bus": "yellow", "boat": "blue", "airplane": "white", "bicycle": "green", "cat": "orange",
    "bird": "blue", "umbrella": "purple", "clock": "white", "cup": "blue", "wine glass": "purple", "book": "green",
    "chair": "brown", "bed": "pink", "tv": "black", "kite": "green", "scissors": "red", "stop sign": "red",
}  # fmt: skip
INK: RGB = (44, 44, 52)
SUPERSAMPLE = 8


def poly(role: str, *xy: float) -> Primitive:
    """Filled polygon through the points x0, y0, x1, y1, ..."""
    return "poly", role, xy


def disc(role: str, cx: float, cy: float, rx: float, ry: float | None = None) -> Primitive:
    """Filled ellipse by centre and radii."""
    return "disc", role, (cx, cy, rx, rx if ry is None else ry)


def box(role: str, x0: float, y0: float, x1: float, y1: float, radius: float = 0.0) -> Primitive:
    """Filled rectangle with rounded corners."""
    return "box", role, (x0, y0, x1, y1, radius)


def line(role: str, width: float, *xy: float) -> Primitive:
    """Open stroke of the given width with round ends."""
    return "line", role, (width, *xy)


def hole(cx: float, cy: float, rx: float, ry: float | None = None) -> Primitive:
    """Ellipse cut out of the icon."""
    return "hole", "ink", (cx, cy, rx, rx if ry is None else ry)


ICONS: dict[str, tuple[Primitive, ...]] = {
    "apple": (line("wood", 0.08, 0.5, 0.32, 0.56, 0.08), disc("main", 0.34, 0.6, 0.27, 0.34),
              disc("main", 0.66, 0.6, 0.27, 0.34), poly("leaf", 0.56, 0.22, 0.72, 0.06, 0.92, 0.1, 0.76, 0.26),
              disc("light", 0.28, 0.5, 0.08, 0.12)),
    "banana": (poly("main", 0.1, 0.2, 0.22, 0.12, 0.3, 0.4, 0.5, 0.6, 0.78, 0.64, 0.95, 0.56, 0.96, 0.68, 0.78, 0.86,
                    0.5, 0.88, 0.24, 0.7, 0.12, 0.44), line("dark", 0.06, 0.2, 0.4, 0.36, 0.66, 0.62, 0.76, 0.84, 0.72),
               poly("wood", 0.08, 0.2, 0.1, 0.06, 0.2, 0.05, 0.22, 0.16)),
    "carrot": (poly("main", 0.24, 0.36, 0.76, 0.36, 0.66, 0.64, 0.5, 0.97, 0.34, 0.64),
               line("dark", 0.06, 0.3, 0.5, 0.48, 0.5), line("dark", 0.06, 0.54, 0.66, 0.66, 0.66),
               poly("leaf", 0.42, 0.38, 0.2, 0.1, 0.4, 0.2, 0.5, 0.02, 0.6, 0.2, 0.8, 0.1, 0.58, 0.38)),
    "pizza": (poly("main", 0.08, 0.22, 0.92, 0.22, 0.5, 0.97), box("wood", 0.04, 0.06, 0.96, 0.26, 0.1),
              disc("ink", 0.36, 0.42, 0.09), disc("ink", 0.63, 0.44, 0.09), disc("ink", 0.5, 0.68, 0.08)),
    "donut": (disc("main", 0.5, 0.5, 0.46), line("paper", 0.07, 0.22, 0.3, 0.3, 0.24), line("paper", 0.07, 0.72, 0.22, 0.8, 0.32),
              line("paper", 0.07, 0.14, 0.6, 0.2, 0.7), line("paper", 0.07, 0.8, 0.66, 0.72, 0.76),
              line("paper", 0.07, 0.44, 0.86, 0.56, 0.86), hole(0.5, 0.5, 0.17)),
    "cake": (box("wood", 0.06, 0.86, 0.94, 0.96, 0.04), box("main", 0.14, 0.44, 0.86, 0.88, 0.05),
             box("dark", 0.14, 0.62, 0.86, 0.7), line("steel", 0.05, 0.32, 0.44, 0.32, 0.2), line("steel", 0.05, 0.5, 0.44, 0.5, 0.2),
             line("steel", 0.05, 0.68, 0.44, 0.68, 0.2), disc("flame", 0.32, 0.12, 0.07), disc("flame", 0.5, 0.12, 0.07),
             disc("flame", 0.68, 0.12, 0.07)),
    "car": (poly("main", 0.22, 0.48, 0.34, 0.24, 0.68, 0.24, 0.82, 0.48), box("main", 0.03, 0.46, 0.97, 0.74, 0.1),
            poly("glass", 0.3, 0.46, 0.38, 0.3, 0.48, 0.3, 0.48, 0.46), poly("glass", 0.55, 0.46, 0.55, 0.3, 0.65, 0.3, 0.73, 0.46),
            disc("ink", 0.25, 0.74, 0.14), disc("ink", 0.75, 0.74, 0.14), disc("paper", 0.25, 0.74, 0.05),
            disc("paper", 0.75, 0.74, 0.05)),
    "bus": (box("main", 0.08, 0.06, 0.92, 0.84, 0.1), box("glass", 0.16, 0.16, 0.46, 0.46), box("glass", 0.54, 0.16, 0.84, 0.46),
            box("dark", 0.08, 0.56, 0.92, 0.62), disc("paper", 0.2, 0.72, 0.06), disc("paper", 0.8, 0.72, 0.06),
            box("ink", 0.14, 0.84, 0.32, 0.97, 0.03), box("ink", 0.68, 0.84, 0.86, 0.97, 0.03)),
    "boat": (poly("main", 0.03, 0.66, 0.97, 0.66, 0.8, 0.94, 0.2, 0.94), line("wood", 0.07, 0.5, 0.66, 0.5, 0.06),
             poly("paper", 0.55, 0.08, 0.92, 0.58, 0.55, 0.58), poly("light", 0.45, 0.18, 0.45, 0.58, 0.14, 0.58)),
    "airplane": (poly("main", 0.5, 0.02, 0.6, 0.14, 0.6, 0.36, 0.98, 0.6, 0.98, 0.7, 0.6, 0.6, 0.58, 0.8, 0.74, 0.92,
                      0.74, 0.98, 0.5, 0.93, 0.26, 0.98, 0.26, 0.92, 0.42, 0.8, 0.4, 0.6, 0.02, 0.7, 0.02, 0.6, 0.4, 0.36,
                      0.4, 0.14), disc("glass", 0.5, 0.18, 0.05, 0.07), line("dark", 0.05, 0.5, 0.34, 0.5, 0.84)),
    "bicycle": (disc("main", 0.24, 0.66, 0.235), disc("main", 0.76, 0.66, 0.235), hole(0.24, 0.66, 0.155), hole(0.76, 0.66, 0.155),
                line("main", 0.08, 0.24, 0.66, 0.4, 0.34, 0.68, 0.34, 0.76, 0.66),
                line("main", 0.08, 0.4, 0.34, 0.5, 0.64, 0.68, 0.34), line("main", 0.08, 0.24, 0.66, 0.5, 0.64),
                line("dark", 0.08, 0.3, 0.26, 0.46, 0.26), line("dark", 0.08, 0.66, 0.34, 0.66, 0.16, 0.82, 0.16)),
    "cat": (poly("main", 0.1, 0.5, 0.12, 0.06, 0.42, 0.26), poly("main", 0.9, 0.5, 0.88, 0.06, 0.58, 0.26),
            disc("main", 0.5, 0.58, 0.42, 0.38), disc("ink", 0.33, 0.52, 0.07, 0.09), disc("ink", 0.67, 0.52, 0.07, 0.09),
            poly("ink", 0.43, 0.66, 0.57, 0.66, 0.5, 0.75), line("dark", 0.05, 0.1, 0.66, 0.3, 0.7),
            line("dark", 0.05, 0.9, 0.66, 0.7, 0.7)),
    "bird": (poly("dark", 0.98, 0.3, 0.66, 0.46, 0.8, 0.7), disc("main", 0.52, 0.58, 0.3, 0.25), disc("main", 0.3, 0.34, 0.2),
             poly("flame", 0.14, 0.28, 0.0, 0.4, 0.14, 0.46), disc("ink", 0.27, 0.3, 0.05), disc("dark", 0.58, 0.58, 0.17, 0.12),
             line("flame", 0.06, 0.44, 0.8, 0.44, 0.96), line("flame", 0.06, 0.6, 0.8, 0.6, 0.96)),
    "umbrella": (line("wood", 0.08, 0.5, 0.4, 0.5, 0.86, 0.6, 0.94, 0.7, 0.86), ("pie", "main", (0.5, 0.5, 0.48, 0.44)),
                 poly("dark", 0.36, 0.5, 0.5, 0.08, 0.64, 0.5), line("ink", 0.06, 0.5, 0.02, 0.5, 0.1)),
    "clock": (disc("main", 0.5, 0.5, 0.47), disc("paper", 0.5, 0.5, 0.3), line("ink", 0.08, 0.5, 0.28, 0.5, 0.5, 0.66, 0.58)),
    "cup": (disc("main", 0.74, 0.52, 0.22, 0.2), hole(0.77, 0.52, 0.1, 0.1), poly("main", 0.08, 0.2, 0.78, 0.2, 0.7, 0.92, 0.16, 0.92),
            disc("dark", 0.43, 0.2, 0.35, 0.1), line("light", 0.07, 0.22, 0.42, 0.26, 0.76)),
    "wine glass": (poly("paper", 0.22, 0.04, 0.78, 0.04, 0.74, 0.4, 0.58, 0.56, 0.42, 0.56, 0.26, 0.4),
                   poly("main", 0.23, 0.16, 0.77, 0.16, 0.74, 0.4, 0.58, 0.56, 0.42, 0.56, 0.26, 0.4),
                   line("main", 0.1, 0.5, 0.54, 0.5, 0.88), disc("main", 0.5, 0.91, 0.3, 0.07)),
    "book": (poly("main", 0.04, 0.14, 0.5, 0.24, 0.96, 0.14, 0.96, 0.86, 0.5, 0.96, 0.04, 0.86),
             poly("paper", 0.13, 0.22, 0.47, 0.3, 0.47, 0.84, 0.13, 0.76), poly("paper", 0.87, 0.22, 0.53, 0.3, 0.53, 0.84, 0.87, 0.76),
             line("ink", 0.04, 0.2, 0.42, 0.4, 0.46), line("ink", 0.04, 0.2, 0.58, 0.4, 0.62),
             line("ink", 0.04, 0.6, 0.46, 0.8, 0.42), line("ink", 0.04, 0.6, 0.62, 0.8, 0.58)),
    "chair": (box("main", 0.2, 0.03, 0.32, 0.97), box("main", 0.2, 0.03, 0.42, 0.12), box("main", 0.2, 0.28, 0.42, 0.36),
              box("main", 0.36, 0.03, 0.44, 0.5), box("dark", 0.2, 0.5, 0.86, 0.64, 0.03), box("main", 0.72, 0.6, 0.84, 0.97)),
    "bed": (box("wood", 0.02, 0.2, 0.12, 0.92), box("wood", 0.88, 0.46, 0.98, 0.92), box("main", 0.1, 0.52, 0.9, 0.8, 0.04),
            box("dark", 0.1, 0.7, 0.9, 0.8), box("paper", 0.14, 0.36, 0.42, 0.54, 0.06)),
    "tv": (box("main", 0.03, 0.1, 0.97, 0.76, 0.06), box("screen", 0.13, 0.2, 0.87, 0.66), poly("glass", 0.2, 0.26, 0.5, 0.26, 0.2, 0.56),
           box("main", 0.44, 0.76, 0.56, 0.88), box("main", 0.26, 0.86, 0.74, 0.95, 0.03)),
    "kite": (poly("main", 0.5, 0.02, 0.86, 0.36, 0.5, 0.78, 0.14, 0.36), poly("light", 0.5, 0.02, 0.5, 0.36, 0.14, 0.36),
             poly("dark", 0.5, 0.36, 0.86, 0.36, 0.5, 0.78), line("ink", 0.05, 0.5, 0.78, 0.6, 0.86, 0.44, 0.9, 0.56, 0.97)),
    "scissors": (line("steel", 0.11, 0.3, 0.68, 0.74, 0.06), line("steel", 0.11, 0.7, 0.68, 0.26, 0.06), disc("main", 0.25, 0.78, 0.21),
                 disc("main", 0.75, 0.78, 0.21), hole(0.25, 0.78, 0.09), hole(0.75, 0.78, 0.09)),
    "stop sign": (box("steel", 0.45, 0.6, 0.55, 0.98), poly("main", 0.3, 0.02, 0.7, 0.02, 0.92, 0.22, 0.92, 0.54, 0.7, 0.74,
                  0.3, 0.74, 0.08, 0.54, 0.08, 0.22), box("paper", 0.2, 0.32, 0.8, 0.45)),
}  # fmt: skip


def paints(color: str) -> dict[str, RGB]:
    """Role -> RGB for an object of the named colour."""
    main = PALETTE[color]
    lift = (92, 92, 100) if color == "black" else tuple(int(c * 0.66) for c in main)
    light = (120, 120, 130) if color == "black" else tuple(int(c + (255 - c) * 0.5) for c in main)
    fixed: dict[str, RGB] = {"ink": (130, 130, 140) if color == "black" else INK, "paper": (244, 244, 240), "leaf": (70, 140, 60), "wood": (150, 110, 70),
                             "flame": (245, 170, 40), "glass": (170, 205, 225), "steel": (150, 155, 165),
                             "screen": (90, 120, 140)}  # fmt: skip
    return {"main": main, "dark": lift, "light": light, **fixed}  # type: ignore[dict-item]


def _stroke(draw: ImageDraw.ImageDraw, xy: list[float], width: float, fill: RGB | int) -> None:
    points = list(zip(xy[::2], xy[1::2], strict=True))
    draw.line(points, fill=fill, width=max(1, round(width)), joint="curve")
    for x, y in points:
        draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=fill)


def _shape(draw: ImageDraw.ImageDraw, kind: str, v: list[float], fill: RGB | int) -> None:
    if kind == "poly":
        draw.polygon(v, fill=fill)
    elif kind in ("disc", "hole"):
        draw.ellipse((v[0] - v[2], v[1] - v[3], v[0] + v[2], v[1] + v[3]), fill=fill)
    elif kind == "pie":
        draw.pieslice((v[0] - v[2], v[1] - v[3], v[0] + v[2], v[1] + v[3]), 180, 360, fill=fill)
    elif kind == "box":
        draw.rounded_rectangle(v[:4], radius=v[4], fill=fill)
    else:
        _stroke(draw, v[1:], v[0], fill)


@cache
def sprite(name: str, color: str, size: int) -> NDArray[np.float32]:
    """One object as premultiplied RGBA of shape (size, size, 4) in [0, 1], with a margin of half a pixel for its outline."""
    side, margin = size * SUPERSAMPLE, SUPERSAMPLE
    scale, paint = side - 2 * margin, paints(color)
    image, mask = Image.new("RGB", (side, side), INK), Image.new("L", (side, side), 0)
    for kind, role, numbers in ICONS[name]:
        head = numbers[:1] if kind == "line" else ()
        lengths = kind in ("disc", "hole", "pie")
        v = [n * scale for n in head] + [
            n * scale + (0 if lengths and i >= 2 else margin) for i, n in enumerate(numbers[len(head) :])
        ]
        if kind == "box":
            v[4] = numbers[4] * scale
        _shape(ImageDraw.Draw(image), kind, v, paint[role])
        _shape(ImageDraw.Draw(mask), kind, v, 0 if kind == "hole" else 255)
    grown = mask.filter(ImageFilter.MaxFilter(2 * (SUPERSAMPLE * 3 // 4) + 1))
    edge = Image.composite(image, Image.new("RGB", (side, side), INK), mask)
    rgb = np.asarray(edge, np.float32) / 255.0
    alpha = np.asarray(ImageChops.lighter(grown, mask), np.float32)[..., None] / 255.0
    full = np.concatenate([rgb * alpha, alpha], -1)
    return full.reshape(size, SUPERSAMPLE, size, SUPERSAMPLE, 4).mean((1, 3), dtype=np.float32)
