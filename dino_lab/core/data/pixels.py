"""Operations on the pixels of many crops at once, on any device; each crop has its own strength.

Crops are in floating point, black 0 and white 1, where the reference rounds to 8 bits after each operation.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor

from dino_lab.core.data.draws import CONTRAST, SATURATION

GRAY = (0.2989, 0.587, 0.114)
"""Weights of the channels in a grey value, as torchvision's."""


def to(array: np.ndarray, like: Tensor) -> Tensor:
    """The array on the device of `like`."""
    return torch.from_numpy(array).to(like.device)


# -------------------------------------------------------------------------------------------------------- resizing


def resized(
    images: UInt8[Tensor, "B H W 3"],
    boxes: Int64[np.ndarray, "B V 4"],
    flip: np.ndarray,
    *,
    size: int,
    interpolation: str,
) -> Float[Tensor, "N 3 size size"]:
    """V boxes of each image, resized to a square with antialias (PIL's weights) and flipped.

    All images together, as products with small dense matrices. A matrix has a row's zeros too, which is cheap for
    small images only.
    """
    batch, height, width, _ = images.shape
    number = flip.shape[1]
    top, left, h, w = np.moveaxis(boxes.reshape(-1, 4), 1, 0)
    unflipped = np.zeros(flip.size, dtype=bool)
    rows = _matrices(h, top, unflipped, source=height, size=size, interpolation=interpolation, like=images)
    columns = _matrices(w, left, flip.ravel(), source=width, size=size, interpolation=interpolation, like=images)
    pixels = images.permute(0, 1, 3, 2).contiguous().to(torch.float32).div_(255).view(batch, height, 3 * width)
    # All crops of an image share one product over its rows: [V S, H] x [H, 3 W].
    halfway = torch.bmm(rows.view(batch, number * size, height), pixels)
    crops = torch.bmm(halfway.view(-1, size * 3, width), columns.transpose(1, 2))
    return crops.view(-1, size, 3, size).permute(0, 2, 1, 3).contiguous().clamp_(0, 1)


def resized_each(
    images: UInt8[Tensor, "B H W 3"] | Sequence[UInt8[Tensor, "H W 3"]],
    boxes: Int64[np.ndarray, "B V 4"],
    flip: np.ndarray,
    *,
    size: int,
    interpolation: str,
) -> Float[Tensor, "N 3 size size"]:
    """The same box by box, of images of any size, in 8 bits as PIL does it: only the pixels of the box are read."""
    crops = torch.empty(flip.size, 3, size, size, dtype=torch.uint8)
    places = iter(crops)
    for image, its_boxes, its_flips in zip(images, boxes.tolist(), flip.tolist(), strict=True):
        for (top, left, height, width), flipped in zip(its_boxes, its_flips, strict=True):
            box = image[top : top + height, left : left + width].permute(2, 0, 1)[None]
            crop = F.interpolate(box, size=(size, size), mode=interpolation, antialias=True)[0]
            next(places).copy_(crop.flip(-1) if flipped else crop)
    return crops.to(torch.float32).div_(255)


def _matrices(
    lengths: Int64[np.ndarray, "N"],
    starts: Int64[np.ndarray, "N"],
    flip: np.ndarray,
    *,
    source: int,
    size: int,
    interpolation: str,
    like: Tensor,
) -> Float[Tensor, "N size source"]:
    """Each matrix resizes `lengths` pixels from `starts` of a line of `source` pixels to `size` pixels.

    Weights of the triangle or of the bicubic filter with a = -0.5, stretched by the scale where that shrinks.

    Source: Pillow, src/libImaging/Resample.c, precompute_coeffs.
    """
    # Weights depend on the length alone: computed once for each, then moved to the start.
    known, kind = np.unique(lengths, return_inverse=True)
    length = known[:, None, None]
    scale = length / size
    pixel = np.arange(known[-1])
    center = (np.arange(size)[:, None] + 0.5) * scale
    distance = np.abs(pixel + 0.5 - center) / np.maximum(scale, 1)
    if interpolation == "bicubic":
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = np.where(distance < 1, near, np.where(distance < 2, far, 0)) * (pixel < length)
    else:
        weights = np.maximum(1 - distance, 0) * (pixel < length)
    weights /= weights.sum(axis=-1, keepdims=True)
    # Pixel p of the crop is pixel start + p of the line: in a row with `source` zeros before its weights, the
    # `source` places from source - start on.
    padded = torch.zeros(2, len(known), size, 2 * source)
    padded[0, :, :, source : source + len(pixel)] = torch.from_numpy(weights)
    padded[1] = padded[0].flip(1)
    windows = padded.to(like.device).unfold(3, source, 1).transpose(2, 3)
    return windows[to(flip.astype(np.int64), like), to(kind, like), to(source - starts, like)]


# ---------------------------------------------------------------------------------------------------------- colour


def blend(crops: Float[Tensor, "N 3 S S"], operation: Int64[np.ndarray, "N"], factor: Float64[np.ndarray, "N"]) -> None:
    """Each crop moved away from black (brightness), its mean grey (contrast) or its own grey (saturation), in place."""
    gray = grayscale(crops)
    to_mean = _column(np.where(operation == CONTRAST, 1 - factor, 0), crops)
    to_gray = _column(np.where(operation == SATURATION, 1 - factor, 0), crops)
    other = torch.addcmul(gray.mean(dim=(2, 3), keepdim=True) * to_mean, gray, to_gray)
    crops.mul_(_column(factor, crops)).add_(other).clamp_(0, 1)


def shift_hue(crops: Float[Tensor, "N 3 S S"], turns: Float64[np.ndarray, "N"]) -> None:
    """Hues moved along the colour circle, value and saturation kept, in place."""
    red, green, blue = crops.unbind(1)
    value = crops.amax(1)
    chroma = value - crops.amin(1)
    safe = chroma.clamp(min=1e-12)
    # In sixths of the circle, as torchvision's: from the channel that is largest.
    hue = (
        torch.where(
            value == red,
            (green - blue) / safe,
            torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
        )
        + _column(6 * turns, crops)[:, 0]
    )
    for channel, place in ((red, 5), (green, 3), (blue, 1)):
        away = (hue + place).remainder_(6)
        channel.copy_(value - chroma * torch.minimum(away, 4 - away).clamp_(0, 1))


def grayscale(crops: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N 1 S S"]:
    """The grey value of each pixel."""
    red, green, blue = crops[:, 0:1], crops[:, 1:2], crops[:, 2:3]
    return (red * GRAY[0]).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])


def solarized(crops: Float[Tensor, "N 3 S S"], threshold: int) -> Float[Tensor, "N 3 S S"]:
    """Values from threshold/255 on inverted."""
    return torch.where(crops >= threshold / 255, 1 - crops, crops)


def _column(values: Float64[np.ndarray, "N"], like: Tensor) -> Float[Tensor, "N 1 1 1"]:
    return to(values.astype(np.float32), like).view(-1, 1, 1, 1)


# ---------------------------------------------------------------------------------------------- neighbours and place


def blurred(crops: Float[Tensor, "N 3 S S"], sigma: Float64[np.ndarray, "N"]) -> Float[Tensor, "N 3 S S"]:
    """Crops blurred by a Gaussian cut off at 4 sigma; beyond its edge a crop goes on with its last pixel, as PIL's."""
    size = crops.shape[-1]
    place = torch.arange(size)
    width = torch.from_numpy(sigma)[:, None]
    distance = torch.arange(max(size, math.ceil(4 * sigma.max()) + 1))
    kernel = torch.exp(-0.5 * (distance / width) ** 2) * (distance <= 4 * width)
    # What a kernel has from a distance on: an edge pixel stands for all that lie beyond it. Summed from afar, where
    # there are only zeros, it does not depend on the longest kernel of the batch.
    tail = kernel.flip(1).cumsum(1).flip(1)
    total = 2 * tail[:, :1] - kernel[:, :1]
    kernel, tail = (kernel / total).float(), (tail / total).float()
    matrix = kernel[:, (place[:, None] - place).abs()]
    matrix[:, :, 0] = tail[:, :size]
    matrix[:, :, -1] = tail[:, :size].flip(1)
    matrix = matrix.to(crops.device)
    columns = torch.bmm(crops.reshape(-1, 3 * size, size), matrix.transpose(1, 2)).view_as(crops)
    return torch.matmul(matrix[:, None], columns)


def rotated(crops: Float[Tensor, "N 3 S S"], degrees: Float64[np.ndarray, "N"]) -> Float[Tensor, "N 3 S S"]:
    """Crops turned about their middle, counter-clockwise, bilinear; what comes in is black."""
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    nothing = np.zeros_like(cos)
    back = np.stack((np.stack((cos, -sin, nothing), -1), np.stack((sin, cos, nothing), -1)), axis=1)
    grid = F.affine_grid(to(back.astype(np.float32), crops), list(crops.shape), align_corners=False)
    return F.grid_sample(crops, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def add_noise(crops: Float[Tensor, "N 3 S S"], std: float, seeds: Int64[np.ndarray, "N"]) -> Float[Tensor, "N 3 S S"]:
    """Crops with Gaussian noise, each from its own seed, cut off at black and white."""
    noise = [
        np.random.Generator(np.random.Philox(key=seed)).standard_normal(crops.shape[1:], np.float32) for seed in seeds
    ]
    return torch.add(crops, to(np.stack(noise), crops), alpha=std).clamp_(0, 1)
