"""From the bytes of a file to an image: 8 bits, three channels, whatever PIL can open."""

import io

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

PIXELS_LIMIT = 178_956_970
"""An image with more is bad: from here on PIL suspects an attack on the memory."""
# PIL's own check also warns of honest images of half that, in the middle of a run's output.
Image.MAX_IMAGE_PIXELS = None


class BadImage(ValueError):
    """Bytes that are no image, or not a whole one."""


def decode(data: bytes) -> UInt8[Tensor, "H W 3"]:
    """An image of any mode as RGB: grey is repeated, alpha left out, 16 bits are scaled to 8, as is a float's [0, 1].

    Raises:
        BadImage: with the reason.
        MemoryError: there is not enough at the moment.
    """
    if not data:
        raise BadImage("the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if (pixels := image.width * image.height) > PIXELS_LIMIT:
                raise BadImage(f"has {pixels} pixels; allowed are {PIXELS_LIMIT}")
            return torch.from_numpy(np.array(_rgb(image)))
    except MemoryError:  # which says nothing of the image
        raise
    except Exception as error:  # PIL's readers raise whatever a wrong byte leads them to
        unknown = isinstance(error, UnidentifiedImageError)  # whose message is the address of our buffer
        raise BadImage("no image that PIL knows" if unknown else str(error) or type(error).__name__) from None


def square(image: UInt8[Tensor, "H W 3"], size: int) -> UInt8[Tensor, "size size 3"]:
    """The middle of an image whose shorter side is resized to `size` pixels, bicubic with antialias.

    Source: torchvision, Resize and CenterCrop on a PIL image, to the last bit; but of a strip more than 32 times as
    long as wide only the middle is resized, since the whole might not fit the memory.
    """
    picture = _middle(Image.fromarray(image.numpy()), 32 * min(image.shape[:2]))
    shorter = min(picture.size)
    width, height = (int(size * length / shorter) for length in picture.size)
    picture = _middle(picture.resize((width, height), Image.Resampling.BICUBIC), size)
    return torch.from_numpy(np.array(picture))


def _middle(image: Image.Image, side: int) -> Image.Image:
    """What a square of this side around the middle shares with the image."""
    width, height = min(image.width, side), min(image.height, side)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise BadImage("holds values that are no numbers")
        # Where one exceeds 1, they are 8-bit values that were stored as floats.
        image = Image.fromarray(np.rint(values * (1 if values.max() > 1 else 255)).clip(0, 255).astype(np.uint8))
    elif image.mode.startswith("I"):
        # 16 bits, also where PIL widens them to 32; its own conversion cuts off all above 255.
        image = Image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # or PIL warns
    return image.convert("RGB")
