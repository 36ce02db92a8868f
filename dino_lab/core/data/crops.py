"""Multi-crop: a whole uint8 batch in, normalised crops out, each image with its own draws.

First everything random is drawn (`draw`), then applied (`apply`): resizing and blurring are batched products
with small dense matrices, colour is elementwise on the crops that drew it. Crops stay in floating point, where
the reference rounds to 8 bits after each operation.
"""

import math
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Float64, Int64, UInt8
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from dino_lab.core.data.random import uniform
from dino_lab.core.settings import Settings

MEAN = (0.485, 0.456, 0.406)
"""Of ImageNet's channels, in [0, 1]."""
STD = (0.229, 0.224, 0.225)
"""Of ImageNet's channels."""
GRAY = (0.2989, 0.587, 0.114)
"""Weights of the channels in a grey value, as torchvision's."""
SOLARIZE_THRESHOLD = 128 / 255
"""Values from here on are inverted."""

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""The operations of colour jitter, in the order in which their factors are kept."""
_ORDERS = np.array(list(permutations(range(4))))

_TRIES = 10
# The places of an image's draws for one crop. A new draw goes to the end and leaves the others as they are.
_AREA, _RATIO = slice(0, _TRIES), slice(_TRIES, 2 * _TRIES)
_TOP, _LEFT, _FLIP, _JITTER, _ORDER, _GRAYSCALE, _BLUR, _SIGMA, _SOLARIZE = range(20, 29)
_FACTORS = slice(29, 33)
_DRAWS = 33
# Local crops count from here, so that the number of global crops changes no local crop.
_FIRST_LOCAL = 2**16

_CHUNK = 64
"""Images worked on at once: few enough that their crops stay in a core's cache."""


class Crops(Settings):
    """How an image becomes global and local crops; defaults of the reference.

    Operations of probability or strength 0 are skipped and cost nothing. In a triple of probabilities the first
    is that of the first global crop, the second that of every other global crop, the third that of local crops.

    Source: DINO (arXiv:2104.14294); main_dino.py, DataAugmentationDINO.
    """

    global_crops_size: int = Field(default=224, ge=2)
    """Side of a global crop in pixels."""
    local_crops_size: int = Field(default=96, ge=2)
    """Side of a local crop in pixels."""
    global_crops_number: int = Field(default=2, ge=2, lt=_FIRST_LOCAL)
    """Global crops an image; the teacher sees only these."""
    local_crops_number: int = Field(default=8, ge=0)
    """Local crops an image; 0 is DINO without multi-crop."""
    global_crops_scale: tuple[float, float] = (0.4, 1.0)
    """Smallest and largest area of a global crop, as a fraction of the image's."""
    local_crops_scale: tuple[float, float] = (0.05, 0.4)
    """Smallest and largest area of a local crop, as a fraction of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop before it is resized to a square; drawn evenly in its logarithm."""
    flip_probability: float = Field(default=0.5, ge=0, le=1)
    """Probability that left and right are exchanged."""
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
    blur_probability: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels of the crop whatever its size.

    This is PIL's radius, for which the reference has 0.1 to 2.0 at 224 and at 96 pixels. The same pixels are more of
    a smaller crop: a blur as strong relative to a crop of s pixels as the reference's to 224 has 2.0 * s / 224.
    """
    solarize_probability: tuple[float, float, float] = (0.0, 0.2, 0.0)
    """Probability that values of 128/255 and above are inverted."""

    @field_validator("global_crops_scale", "local_crops_scale")
    @classmethod
    def _fractions(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError(f"crops.{info.field_name} = {value}: allowed is 0 < min <= max <= 1")
        return value

    @field_validator("ratio", "blur_sigma")
    @classmethod
    def _positive(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"crops.{info.field_name} = {value}: allowed is 0 < min <= max")
        return value

    @field_validator("blur_probability", "solarize_probability")
    @classmethod
    def _probabilities(cls, value: tuple[float, float, float], info: ValidationInfo) -> tuple[float, float, float]:
        if not all(0 <= probability <= 1 for probability in value):
            raise ValueError(f"crops.{info.field_name} = {value}: allowed is 0 to 1 for each")
        return value


@dataclass(frozen=True)
class Draws:
    """Everything random about B images' V crops of one size: which operations they get, and how strong each is."""

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

    def images(self, chosen: slice) -> "Draws":
        """Those of some images."""
        return Draws(**{name: value[chosen] for name, value in vars(self).items()})


def multi_crop(
    images: UInt8[Tensor, "B H W 3"], indices: Int64[np.ndarray, "B"], *, seed: int, epoch: int, crops: Crops
) -> tuple[Float[Tensor, "G B 3 S S"], Float[Tensor, "L B 3 s s"]]:
    """Global and local crops of a batch, normalised.

    `indices` are the images' places in the data set: an image's crops are a pure function of the image,
    (seed, epoch, index) and `crops`.
    """
    _, height, width, _ = images.shape
    global_draws, local_draws = draw(indices, seed=seed, epoch=epoch, crops=crops, height=height, width=width)
    return (
        apply(images, global_draws, size=crops.global_crops_size),
        apply(images, local_draws, size=crops.local_crops_size),
    )


def whole(images: UInt8[Tensor, "B H W 3"], size: int) -> Float[Tensor, "B 3 size size"]:
    """Whole images, resized (bicubic with antialias) and normalised: what is evaluated."""
    batch, height, width, _ = images.shape
    none = np.zeros((batch, 1), dtype=bool)
    draws = Draws(
        boxes=np.tile([0, 0, height, width], (batch, 1, 1)),
        flip=none,
        jitter=none,
        order=np.zeros((batch, 1, 0), dtype=np.int64),
        factors=np.zeros((batch, 1, 4)),
        grayscale=none,
        blur=none,
        sigma=np.ones((batch, 1)),
        solarize=none,
    )
    return apply(images, draws, size=size)[0]


# ---------------------------------------------------------------------------------------------- drawing


def draw(
    indices: Int64[np.ndarray, "B"], *, seed: int, epoch: int, crops: Crops, height: int, width: int
) -> tuple[Draws, Draws]:
    """What is drawn for the global and for the local crops of images of this height and width."""
    global_numbers = np.arange(crops.global_crops_number)
    local_numbers = _FIRST_LOCAL + np.arange(crops.local_crops_number)
    global_kinds, local_kinds = np.minimum(global_numbers, 1), np.full_like(local_numbers, 2)

    def of_one_size(
        numbers: Int64[np.ndarray, "V"], kinds: Int64[np.ndarray, "V"], scale: tuple[float, float]
    ) -> Draws:
        u = uniform(seed, epoch, indices[:, None], numbers, _DRAWS)
        strengths = np.array([crops.brightness, crops.contrast, crops.saturation, crops.hue])
        low, high = np.maximum(0, 1 - strengths), 1 + strengths
        low[HUE], high[HUE] = -crops.hue, crops.hue
        order = _ORDERS[(u[..., _ORDER] * len(_ORDERS)).astype(np.int64)]
        return Draws(
            boxes=_boxes(u, scale=scale, ratio=crops.ratio, height=height, width=width),
            flip=u[..., _FLIP] < crops.flip_probability,
            jitter=u[..., _JITTER] < crops.jitter_probability,
            order=order[strengths[order] > 0].reshape(*order.shape[:-1], np.count_nonzero(strengths)),
            factors=low + u[..., _FACTORS] * (high - low),
            grayscale=u[..., _GRAYSCALE] < crops.grayscale_probability,
            blur=u[..., _BLUR] < np.array(crops.blur_probability)[kinds],
            sigma=crops.blur_sigma[0] + u[..., _SIGMA] * (crops.blur_sigma[1] - crops.blur_sigma[0]),
            solarize=u[..., _SOLARIZE] < np.array(crops.solarize_probability)[kinds],
        )

    return (
        of_one_size(global_numbers, global_kinds, crops.global_crops_scale),
        of_one_size(local_numbers, local_kinds, crops.local_crops_scale),
    )


def _boxes(
    u: Float64[np.ndarray, "B V D"], *, scale: tuple[float, float], ratio: tuple[float, float], height: int, width: int
) -> Int64[np.ndarray, "B V 4"]:
    """The first of ten tries that fits into the image, else the largest central box of an allowed ratio.

    Source: torchvision, RandomResizedCrop.get_params.
    """
    area = height * width * (scale[0] + u[..., _AREA] * (scale[1] - scale[0]))
    aspect = np.exp(math.log(ratio[0]) + u[..., _RATIO] * (math.log(ratio[1]) - math.log(ratio[0])))
    widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.argmax(axis=-1)[..., None]
    some = fits.any(axis=-1)

    whole_ratio = min(max(width / height, ratio[0]), ratio[1])
    h = np.where(some, np.take_along_axis(heights, first, -1)[..., 0], min(height, round(width / whole_ratio)))
    w = np.where(some, np.take_along_axis(widths, first, -1)[..., 0], min(width, round(height * whole_ratio)))
    top = np.where(some, np.floor(u[..., _TOP] * (height - h + 1)), (height - h) // 2)
    left = np.where(some, np.floor(u[..., _LEFT] * (width - w + 1)), (width - w) // 2)
    return np.stack((top.astype(np.int64), left.astype(np.int64), h, w), axis=-1)


# ---------------------------------------------------------------------------------------------- applying


def apply(images: UInt8[Tensor, "B H W 3"], draws: Draws, *, size: int) -> Float[Tensor, "V B 3 size size"]:
    """Crops resized to `size`, with the operations that they drew, in the reference's order; normalised."""
    batch, number = draws.flip.shape
    out = torch.empty(number, batch, 3, size, size)
    if not number:
        return out
    scale = 1 / torch.tensor(STD).view(3, 1, 1)
    shift = -torch.tensor(MEAN).view(3, 1, 1) * scale
    for start in range(0, batch, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        crops, sorting = _augmented(images[chunk], draws.images(chunk), size)
        image, crop = np.divmod(sorting, number)
        out.view(-1, 3, size, size).index_copy_(
            0, torch.from_numpy(crop * batch + start + image), torch.addcmul(shift, crops, scale)
        )
    return out


def _augmented(
    images: UInt8[Tensor, "B H W 3"], draws: Draws, size: int
) -> tuple[Float[Tensor, "N 3 size size"], Int64[np.ndarray, "N"]]:
    """Crops in [0, 1] in an order of their own, and which crop, counted through all images, each of them is."""
    order = draws.order.reshape(draws.jitter.size, draws.order.shape[-1])
    # Jittered crops first, by the turn at which their hue comes: jitter works on slices, in place.
    sorting = np.lexsort((_turn_of_hue(order), ~draws.jitter.ravel()))
    crops = resized(images, draws.boxes, draws.flip, size=size)[torch.from_numpy(sorting)]

    jittered = sorting[: np.count_nonzero(draws.jitter)]
    if jittered.size:
        _jitter(crops[: jittered.size], order[jittered], draws.factors.reshape(-1, 4)[jittered])
    if (gray := _drawn(draws.grayscale, sorting)).numel():
        crops[gray] = _gray(crops[gray]).expand(-1, 3, -1, -1)
    if (blur := _drawn(draws.blur, sorting)).numel():
        crops[blur] = blurred(crops[blur], draws.sigma.ravel()[sorting][blur.numpy()])
    if (solarize := _drawn(draws.solarize, sorting)).numel():
        crops[solarize] = solarized(crops[solarize])
    return crops, sorting


def _drawn(mask: Bool[np.ndarray, "B V"], sorting: Int64[np.ndarray, "N"]) -> Int64[Tensor, "n"]:
    return torch.from_numpy(np.flatnonzero(mask.ravel()[sorting]))


def resized(
    images: UInt8[Tensor, "B H W 3"], boxes: Int64[np.ndarray, "B V 4"], flip: Bool[np.ndarray, "B V"], *, size: int
) -> Float[Tensor, "N 3 size size"]:
    """The boxes of each image, resized to a square (bicubic with antialias, PIL's weights) and flipped, in [0, 1]."""
    batch, height, width, _ = images.shape
    number = flip.shape[1]
    top, left, h, w = np.moveaxis(boxes.reshape(-1, 4), 1, 0)
    rows = _matrices(h, top, np.zeros_like(flip).ravel(), source=height, size=size)
    columns = _matrices(w, left, flip.ravel(), source=width, size=size)
    pixels = images.permute(0, 1, 3, 2).contiguous().to(torch.float32).div_(255).view(batch, height, 3 * width)
    # All crops of an image share one product over its rows: [V S, H] x [H, 3 W].
    halfway = torch.bmm(rows.view(batch, number * size, height), pixels)
    crops = torch.bmm(halfway.view(-1, size * 3, width), columns.transpose(1, 2))
    return crops.view(-1, size, 3, size).permute(0, 2, 1, 3).contiguous().clamp_(0, 1)


def _matrices(
    lengths: Int64[np.ndarray, "N"],
    starts: Int64[np.ndarray, "N"],
    flip: Bool[np.ndarray, "N"],
    *,
    source: int,
    size: int,
) -> Float[Tensor, "N size source"]:
    """Each matrix resizes `lengths` pixels from `starts` of a line of `source` pixels to `size` pixels.

    Weights of the bicubic filter with a = -0.5, stretched by the scale where that shrinks.

    Source: Pillow, src/libImaging/Resample.c, precompute_coeffs.
    """
    # Weights depend on the length alone: computed once for each, then moved to the start.
    known, kind = np.unique(lengths, return_inverse=True)
    length = known[:, None, None]
    scale = length / size
    pixel = np.arange(known[-1])
    center = (np.arange(size)[:, None] + 0.5) * scale
    distance = np.abs(pixel + 0.5 - center) / np.maximum(scale, 1)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0)) * (pixel < length)
    weights /= weights.sum(axis=-1, keepdims=True)
    # Pixel p of the crop is pixel start + p of the line: in a row with `source` zeros before its weights, the
    # `source` places from source - start on.
    padded = torch.zeros(2, len(known), size, 2 * source)
    padded[0, :, :, source : source + len(pixel)] = torch.from_numpy(weights)
    padded[1] = padded[0].flip(1)
    windows = padded.unfold(3, source, 1).transpose(2, 3)
    return windows[torch.from_numpy(flip.astype(np.int64)), torch.from_numpy(kind), torch.from_numpy(source - starts)]


def _jitter(
    crops: Float[Tensor, "N 3 S S"], order: Int64[np.ndarray, "N J"], factors: Float64[np.ndarray, "N 4"]
) -> None:
    """Brightness, contrast, saturation and hue, each crop in its own order, in place.

    Crops are sorted by the turn of their hue: at each turn it comes to one slice, and then all crops blend.

    Source: torchvision, ColorJitter.
    """
    number = len(crops)
    blends = order[order != HUE].reshape(number, -1)
    turn_of_hue = _turn_of_hue(order)
    for turn in range(order.shape[1]):
        now = slice(*np.searchsorted(turn_of_hue, [turn, turn + 1]))
        if now.start < now.stop:
            shift_hue(crops[now], factors[now, HUE])
        if turn < blends.shape[1]:
            operation = blends[:, turn]
            blend(crops, operation, factors[np.arange(number), operation])


def _turn_of_hue(order: Int64[np.ndarray, "N J"]) -> Int64[np.ndarray, "N"]:
    """How many operations come before it; all of them where it is not among them."""
    before: npt.NDArray[np.int64] = np.logical_and.accumulate(order != HUE, axis=1).sum(axis=1)
    return before


def blend(crops: Float[Tensor, "N 3 S S"], operation: Int64[np.ndarray, "N"], factor: Float64[np.ndarray, "N"]) -> None:
    """Each crop moved away from black (brightness), its mean grey (contrast) or its own grey (saturation), in place."""
    gray = _gray(crops)
    to_mean = _column(np.where(operation == CONTRAST, 1 - factor, 0))
    to_gray = _column(np.where(operation == SATURATION, 1 - factor, 0))
    other = torch.addcmul(gray.mean(dim=(2, 3), keepdim=True) * to_mean, gray, to_gray)
    crops.mul_(_column(factor)).add_(other).clamp_(0, 1)


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
        + _column(6 * turns)[:, 0]
    )
    for channel, place in ((red, 5), (green, 3), (blue, 1)):
        away = (hue + place).remainder_(6)
        channel.copy_(value - chroma * torch.minimum(away, 4 - away).clamp_(0, 1))


def _gray(crops: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N 1 S S"]:
    red, green, blue = crops[:, 0:1], crops[:, 1:2], crops[:, 2:3]
    return (red * GRAY[0]).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])


def _column(values: Float64[np.ndarray, "N"]) -> Float[Tensor, "N 1 1 1"]:
    return torch.from_numpy(values.astype(np.float32)).view(-1, 1, 1, 1)


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
    columns = torch.bmm(crops.reshape(-1, 3 * size, size), matrix.transpose(1, 2)).view_as(crops)
    return torch.matmul(matrix[:, None], columns)


def solarized(crops: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N 3 S S"]:
    """Values from 128/255 on inverted."""
    return torch.where(crops >= SOLARIZE_THRESHOLD, 1 - crops, crops)
