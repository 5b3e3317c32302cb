"""Images in and out."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gvu.errors import GvuError
from gvu.images import captioned_grid, grid, load_image, save_grid, to_png


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)) / 255.0


def png_header(path: Path, width: int, height: int) -> Path:
    """A PNG that promises a size and has (almost) no data."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def test_png_round_trip_is_exact(tmp_path: Path) -> None:
    image_3_H_W = noise(3, 5, 7)
    to_png(image_3_H_W, tmp_path / "new" / "a.png")
    torch.testing.assert_close(load_image(tmp_path / "new" / "a.png"), image_3_H_W, rtol=0, atol=1e-6)


def test_side_crops_the_centre(tmp_path: Path) -> None:
    image_3_H_W = torch.zeros(3, 8, 24)
    image_3_H_W[0, :, 8:16] = 1
    to_png(image_3_H_W, tmp_path / "wide.png")
    loaded = load_image(tmp_path / "wide.png", 4)
    assert loaded.shape == (3, 4, 4)
    assert loaded[0, :, 1:3].min() > 0.95
    assert loaded[1:].max() == 0


def test_transparency_is_laid_on_white_and_16_bit_is_scaled(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png").min() == 1
    Image.fromarray(np.full((2, 2), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png").mean() == pytest.approx(128 / 255)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "r.jpg", exif=exif)
    assert load_image(tmp_path / "r.jpg").shape == (3, 8, 4)


@pytest.mark.parametrize("size", [(30_000, 30_000), (12_000, 6_000), (2**31 - 1, 2**31 - 1)])
def test_huge_images_are_refused_by_their_header(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(GvuError, match="too large"):
        load_image(png_header(tmp_path / "huge.png", *size))


def test_truncated_image(tmp_path: Path) -> None:
    to_png(noise(3, 64, 64), tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for keep in (len(data) // 2, 60, 40):
        (tmp_path / "cut.png").write_bytes(data[:keep])
        with pytest.raises(GvuError, match="cut"):
            load_image(tmp_path / "cut.png")


def test_not_an_image_missing_and_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(GvuError, match="not an image"):
        load_image(tmp_path / "a.png")
    with pytest.raises(GvuError, match="No such file"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(GvuError, match="Is a directory"):
        load_image(tmp_path)


def test_grid_places_images_row_by_row() -> None:
    images_S_3_H_W = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 2, 4) / 3
    sheet = grid(images_S_3_H_W, 2)
    assert sheet.shape == (3, 4, 8)
    assert (sheet[:, :2, 4:] == images_S_3_H_W[1]).all()
    assert (sheet[:, 2:, :4] == images_S_3_H_W[2]).all()
    assert (sheet[:, 2:, 4:] == 1).all()


def test_captioned_grid_enlarges_by_whole_pixels_and_writes_below() -> None:
    images_S_3_H_W = noise(3, 3, 64, 64)
    plain = captioned_grid(images_S_3_H_W, columns=3)
    noted = captioned_grid(images_S_3_H_W, ["a photo of a dog", "", "w" * 300], columns=3, rewards=[0.5, 0.25, 1.0])
    assert plain.width == noted.width == 3 * (192 + 8) + 8
    assert noted.height > plain.height
    picture = np.asarray(noted)
    expected = (images_S_3_H_W[1] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert (picture[9:200:3, 209:400:3] == expected).all()
    below = picture[201:, :].min(axis=(0, 2))
    assert (below[8:200] < 128).any()  # the first has ink under it
    assert (below[-8:] == 255).all()  # and the long word stays inside its column


def test_save_grid_refuses_an_impossible_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(GvuError, match="cannot write"):
        save_grid(tmp_path / "file" / "grid.png", noise(1, 3, 4, 4))
