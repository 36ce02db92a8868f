"""Images of every mode, and what is no image."""

import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from dino_lab.core.data.decoding import BadImage, decode, square


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def colors(data: bytes) -> list[tuple[int, ...]]:
    """The first row's."""
    return [tuple(pixel) for pixel in decode(data)[0].tolist()]


def row(mode: str, values: list) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    return image


RED, BLUE = (255, 0, 0), (0, 0, 255)
ALIKE = {
    "RGB": (encoded(row("RGB", [RED, BLUE])), [RED, BLUE]),
    "grey": (encoded(row("L", [0, 200])), [(0, 0, 0), (200, 200, 200)]),
    "grey and alpha": (encoded(row("LA", [(90, 255), (200, 0)])), [(90, 90, 90), (200, 200, 200)]),
    "RGBA": (encoded(row("RGBA", [(255, 0, 0, 255), (0, 0, 255, 3)])), [RED, BLUE]),
    "1 bit": (encoded(row("1", [0, 255])), [(0, 0, 0), (255, 255, 255)]),
    "palette": (encoded(row("RGB", [RED, BLUE]).convert("P", palette=Image.Palette.ADAPTIVE)), [RED, BLUE]),
    "CMYK": (encoded(row("CMYK", [(0, 0, 0, 0), (0, 0, 0, 255)]), "TIFF"), [(255, 255, 255), (0, 0, 0)]),
    "16 bits": (
        encoded(Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))),
        [(0, 0, 0), (100, 100, 100), (255, 255, 255)],
    ),
    "16 bits, widened": (b"P5 3 1 65535\n" + struct.pack(">3H", 0, 25700, 65535), [(0,) * 3, (100,) * 3, (255,) * 3]),
    "float": (
        encoded(Image.fromarray(np.array([[0, 0.4, 1]], np.float32)), "TIFF"),
        [(0,) * 3, (102,) * 3, (255,) * 3],
    ),
    "float of 255": (
        encoded(Image.fromarray(np.array([[0, 102, 300]], np.float32)), "TIFF"),
        [(0,) * 3, (102,) * 3, (255,) * 3],
    ),
    "1 x 1": (encoded(Image.new("RGB", (1, 1), "red")), [RED]),
    "gif": (encoded(row("RGB", [RED, BLUE]), "GIF"), [RED, BLUE]),
}


@pytest.mark.parametrize("name", ALIKE)
def test_every_mode_has_its_colors(name):
    data, expected = ALIKE[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert colors(data) == expected


def test_a_palette_with_transparency_has_its_colors_and_warns_of_nothing():
    image = row("P", [0, 1])
    image.putpalette([*RED, *BLUE])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert colors(encoded(image, transparency=b"\x00\x80")) == [RED, BLUE]


def test_a_jpeg_is_as_pil_decodes_it():
    photograph = Image.effect_noise((40, 30), 60).convert("RGB")
    for image in (photograph, photograph.convert("CMYK"), photograph.convert("L")):
        data = encoded(image, "JPEG")
        assert np.array_equal(decode(data).numpy(), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_an_image_at_which_pil_would_warn_is_no_attack():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(encoded(Image.new("1", (9_500, 9_500), 1))).shape == (9_500, 9_500, 3)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"a text in a file that is called .jpg", "no image that PIL knows"),
        (bytes(1000), "no image that PIL knows"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900], "truncated"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:30], "."),
        (encoded(Image.effect_noise((64, 64), 50))[:900], "."),
        (png_header(20_000, 20_000), "has 400000000 pixels; allowed are 178956970"),
        (encoded(Image.fromarray(np.array([[np.nan]], np.float32)), "TIFF"), "no numbers"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode(data)


@pytest.mark.filterwarnings("ignore")
def test_no_damage_ends_in_another_error():
    rng = random.Random(0)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        whole = encoded(Image.effect_noise((24, 24), 50).convert("RGB"), kind)
        for _ in range(60):
            data = bytearray(whole[: rng.randrange(1, len(whole) + 1)])
            for _ in range(rng.randrange(20)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                decode(bytes(data))
            except BadImage as error:
                assert str(error)  # noqa: PT017  whether it is raised is chance


@pytest.mark.parametrize("size", [8, 33, 224])
def test_squares_are_torchvisions_to_the_last_bit(size):
    rng = np.random.default_rng(size)
    for height, width in rng.integers(20, 400, (12, 2)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        theirs = transforms.Compose(
            [transforms.Resize(size, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size)]
        )(image)
        assert np.array_equal(square(torch.from_numpy(np.array(image)), size).numpy(), np.asarray(theirs))


def test_the_shorter_side_is_resized_and_the_middle_kept():
    wide = torch.zeros(20, 60, 3, dtype=torch.uint8)
    wide[:, 20:40] = 200
    assert (square(wide, 10)[:, 1:-1].int() - 200).abs().max() <= 20  # bicubic rings at an edge
    assert torch.equal(square(wide.transpose(0, 1), 10), square(wide, 10).transpose(0, 1))


def test_of_a_long_strip_the_middle_is_kept():
    strip = torch.zeros(1, 100_000, 3, dtype=torch.uint8)
    strip[:, 40_000:60_000] = 255
    assert (square(strip, 64) == 255).all()


def test_a_lack_of_memory_says_nothing_of_the_image(monkeypatch):
    def lack(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", lack)
    with pytest.raises(MemoryError):
        decode(encoded(Image.new("L", (8, 8))))
