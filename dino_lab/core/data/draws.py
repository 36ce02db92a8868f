"""Everything random about crops: the knobs of a kind of crop, and what is drawn by them for each image.

A draw is a pure function of (seed, epoch, image index, crop): see random.py. crops.py applies what is drawn here.
"""

import math
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float64, Int64
from pydantic import Field, field_validator

from dino_lab.core.data.random import uniform
from dino_lab.core.settings import Settings

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""The operations of colour jitter, in the order in which their factors are kept."""
_ORDERS = np.array(list(permutations(range(4))))

_TRIES = 10
# The places of an image's draws for one crop. A new draw goes to the end and leaves the others as they are.
_AREA, _RATIO = slice(0, _TRIES), slice(_TRIES, 2 * _TRIES)
_TOP, _LEFT, _FLIP, _JITTER, _ORDER, _GRAYSCALE, _BLUR, _SIGMA, _SOLARIZE = range(20, 29)
_FACTORS = slice(29, 33)
_REFERENCE_DRAWS = 33
_ROTATE, _ANGLE, _NOISE, _NOISE_SEED, _ERASE, _ERASED_TOP, _ERASED_LEFT = range(33, 40)
_ERASED_AREA, _ERASED_RATIO = slice(40, 40 + _TRIES), slice(40 + _TRIES, 40 + 2 * _TRIES)
_ALL_DRAWS = 60


class View(Settings):
    """How a kind of crop is made of an image. What has probability or strength 0 is skipped and costs nothing.

    Operations come in this order. Rotation, noise and erasing are not the reference's, and off.

    Source: DINO (arXiv:2104.14294); main_dino.py, DataAugmentationDINO.
    """

    scale: tuple[float, float] = (0.4, 1.0)
    """Smallest and largest area of a crop, as a fraction of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop before it is resized to a square; drawn evenly in its logarithm."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Filter of the resizing, with antialias."""
    flip_probability: float = Field(default=0.5, ge=0, le=1)
    """Probability that left and right are exchanged."""
    rotation_probability: float = Field(default=0.0, ge=0, le=1)
    """Probability that the crop is turned about its middle, bilinear; what comes in is black."""
    rotation_degrees: float = Field(default=30.0, gt=0, le=180)
    """Largest angle of a rotation, to either side."""
    jitter_probability: float = Field(default=0.8, ge=0, le=1)
    """Probability of colour jitter: brightness, contrast, saturation and hue in a random order."""
    brightness: float = Field(default=0.4, ge=0)
    """Strength b of brightness jitter: its factor is even between max(0, 1 - b) and 1 + b."""
    contrast: float = Field(default=0.4, ge=0)
    """Strength of contrast jitter, as brightness."""
    saturation: float = Field(default=0.2, ge=0)
    """Strength of saturation jitter, as brightness."""
    hue: float = Field(default=0.1, ge=0, le=0.5)
    """Strength h of hue jitter: its shift is even between -h and h, in turns of the colour circle."""
    grayscale_probability: float = Field(default=0.2, ge=0, le=1)
    """Probability that colour is removed."""
    blur_probability: float = Field(default=0.5, ge=0, le=1)
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels of the crop whatever its size.

    This is PIL's radius, for which the reference has 0.1 to 2.0 at 224 and at 96 pixels. The same pixels are more of
    a smaller crop: a blur as strong relative to a crop of s pixels as the reference's to 224 has 2.0 * s / 224.
    """
    solarize_probability: float = Field(default=0.0, ge=0, le=1)
    """Probability that bright values are inverted."""
    solarize_threshold: int = Field(default=128, ge=0, le=255)
    """Values from here on, of 255, are inverted."""
    noise_probability: float = Field(default=0.0, ge=0, le=1)
    """Probability of Gaussian noise."""
    noise_std: float = Field(default=0.1, gt=0)
    """Standard deviation of the noise of each pixel and channel; black is 0, white is 1."""
    erasing_probability: float = Field(default=0.0, ge=0, le=1)
    """Probability that a rectangle is filled with the mean colour (arXiv:1708.04896)."""
    erasing_scale: tuple[float, float] = (0.02, 0.33)
    """Smallest and largest area of the rectangle, as a fraction of the crop's."""
    erasing_ratio: tuple[float, float] = (0.3, 3.3)
    """Smallest and largest height / width of the rectangle; drawn evenly in its logarithm."""

    @field_validator("scale", "erasing_scale")
    @classmethod
    def _fractions(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError("allowed is 0 < min <= max <= 1")
        return value

    @field_validator("ratio", "blur_sigma", "erasing_ratio")
    @classmethod
    def _positive(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("allowed is 0 < min <= max")
        return value

    @property
    def _draws(self) -> int:
        """How many numbers a crop takes: those of the reference alone while nothing else is on."""
        extra = self.rotation_probability or self.noise_probability or self.erasing_probability
        return _ALL_DRAWS if extra else _REFERENCE_DRAWS


@dataclass(frozen=True)
class Draws:
    """Everything random about V crops of each of B images: which operations they get, and how strong each is."""

    boxes: Int64[np.ndarray, "B V 4"]
    """Top, left, height and width, in pixels of the image."""
    flip: Bool[np.ndarray, "B V"]
    jitter: Bool[np.ndarray, "B V"]
    order: Int64[np.ndarray, "B V J"]
    """Operations of the jitter, first to last; only those whose strength is not 0."""
    factors: Float64[np.ndarray, "B V 4"]
    """Factors of brightness, contrast, saturation; shift of hue."""
    grayscale: Bool[np.ndarray, "B V"]
    blur: Bool[np.ndarray, "B V"]
    sigma: Float64[np.ndarray, "B V"]
    solarize: Bool[np.ndarray, "B V"]
    rotate: Bool[np.ndarray, "B V"]
    angle: Float64[np.ndarray, "B V"]
    """Degrees, counter-clockwise."""
    noise: Bool[np.ndarray, "B V"]
    noise_seed: Int64[np.ndarray, "B V"]
    """Of the noise's own numbers, which are many."""
    erase: Bool[np.ndarray, "B V"]
    erased: Int64[np.ndarray, "B V 4"]
    """Top, left, height and width of what is erased, in pixels of the crop."""


def draw(
    view: View,
    indices: Int64[np.ndarray, "B"],
    crops: Int64[np.ndarray, "V"],
    *,
    seed: int,
    epoch: int,
    heights: Int64[np.ndarray, "B"],
    widths: Int64[np.ndarray, "B"],
    size: int,
) -> Draws:
    """What is drawn for these crops, of `size` pixels, of images of these heights and widths.

    Args:
        indices: The images' places in the data set.
        crops: Numbers that tell the crops of an image apart.
    """
    u = uniform(seed, epoch, indices[:, None], crops, view._draws)
    strengths = np.array([view.brightness, view.contrast, view.saturation, view.hue])
    low, high = np.maximum(0, 1 - strengths), 1 + strengths
    low[HUE], high[HUE] = -view.hue, view.hue
    order = _ORDERS[(u[..., _ORDER] * len(_ORDERS)).astype(np.int64)]
    never = np.zeros(u.shape[:2], dtype=bool)
    nothing = np.zeros(u.shape[:2], dtype=np.int64)
    rotate, angle, noise, noise_seed, erase, erased = never, nothing * 0.0, never, nothing, never, nothing[..., None]
    if view.rotation_probability:
        rotate = u[..., _ROTATE] < view.rotation_probability
        angle = (2 * u[..., _ANGLE] - 1) * view.rotation_degrees
    if view.noise_probability:
        noise = u[..., _NOISE] < view.noise_probability
        noise_seed = (u[..., _NOISE_SEED] * 2**32).astype(np.int64)
    if view.erasing_probability:
        erased, found = _erased(u, view, size)
        erase = found & (u[..., _ERASE] < view.erasing_probability)
    return Draws(
        boxes=_boxes(u, view, heights[:, None], widths[:, None]),
        flip=u[..., _FLIP] < view.flip_probability,
        jitter=u[..., _JITTER] < view.jitter_probability,
        order=order[strengths[order] > 0].reshape(*order.shape[:-1], np.count_nonzero(strengths)),
        factors=low + u[..., _FACTORS] * (high - low),
        grayscale=u[..., _GRAYSCALE] < view.grayscale_probability,
        blur=u[..., _BLUR] < view.blur_probability,
        sigma=view.blur_sigma[0] + u[..., _SIGMA] * (view.blur_sigma[1] - view.blur_sigma[0]),
        solarize=u[..., _SOLARIZE] < view.solarize_probability,
        rotate=rotate,
        angle=angle,
        noise=noise,
        noise_seed=noise_seed,
        erase=erase,
        erased=erased,
    )


def _sides(
    areas: Float64[np.ndarray, "B V T"], ratios: Float64[np.ndarray, "B V T"], bounds: tuple[float, float]
) -> tuple[Int64[np.ndarray, "B V T"], Int64[np.ndarray, "B V T"]]:
    """Both sides, in whole pixels, of rectangles of these areas whose ratio is even in its logarithm."""
    low, high = map(math.log, bounds)
    aspect = np.exp(low + ratios * (high - low))
    return np.rint(np.sqrt(areas * aspect)).astype(np.int64), np.rint(np.sqrt(areas / aspect)).astype(np.int64)


def _first(values: Int64[np.ndarray, "B V T"], fits: Bool[np.ndarray, "B V T"]) -> Int64[np.ndarray, "B V"]:
    """Those of the first try that fits."""
    return np.take_along_axis(values, fits.argmax(axis=-1)[..., None], -1)[..., 0]


def _boxes(
    u: Float64[np.ndarray, "B V D"], view: View, height: Int64[np.ndarray, "B 1"], width: Int64[np.ndarray, "B 1"]
) -> Int64[np.ndarray, "B V 4"]:
    """The first of ten tries that fits into the image, else the largest central box of an allowed ratio.

    Source: torchvision, RandomResizedCrop.get_params.
    """
    areas = (height * width)[..., None] * (view.scale[0] + u[..., _AREA] * (view.scale[1] - view.scale[0]))
    widths, heights = _sides(areas, u[..., _RATIO], view.ratio)
    fits = (widths > 0) & (widths <= width[..., None]) & (heights > 0) & (heights <= height[..., None])
    some = fits.any(axis=-1)

    whole_ratio = np.clip(width / height, *view.ratio)
    # At least a pixel, which torchvision does not see to.
    h = np.where(some, _first(heights, fits), np.clip(np.rint(width / whole_ratio).astype(np.int64), 1, height))
    w = np.where(some, _first(widths, fits), np.clip(np.rint(height * whole_ratio).astype(np.int64), 1, width))
    top = np.where(some, np.floor(u[..., _TOP] * (height - h + 1)), (height - h) // 2)
    left = np.where(some, np.floor(u[..., _LEFT] * (width - w + 1)), (width - w) // 2)
    return np.stack((top.astype(np.int64), left.astype(np.int64), h, w), axis=-1)


def _erased(
    u: Float64[np.ndarray, "B V D"], view: View, size: int
) -> tuple[Int64[np.ndarray, "B V 4"], Bool[np.ndarray, "B V"]]:
    """The first of ten tries that is smaller than the crop either way, and whether there is one.

    Source: torchvision, RandomErasing.get_params.
    """
    areas = size**2 * (view.erasing_scale[0] + u[..., _ERASED_AREA] * (view.erasing_scale[1] - view.erasing_scale[0]))
    heights, widths = _sides(areas, u[..., _ERASED_RATIO], view.erasing_ratio)
    fits = (heights < size) & (widths < size)
    h, w = _first(heights, fits), _first(widths, fits)
    top = np.floor(u[..., _ERASED_TOP] * (size - h + 1)).astype(np.int64)
    left = np.floor(u[..., _ERASED_LEFT] * (size - w + 1)).astype(np.int64)
    found: npt.NDArray[np.bool_] = np.logical_or.reduce(fits, axis=-1)
    return np.stack((top, left, h, w), axis=-1), found
