"""Multi-crop: images in, normalised crops out, each image with its own draws.

First everything random is drawn (draws.py), then applied to many crops at once (pixels.py). Only the resizing has
two ways: of all images together, which must have one size and be small, or box by box, of images of any size.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float64, Int64, UInt8
from pydantic import Field
from torch import Tensor

from dino_lab.core.data import pixels
from dino_lab.core.data.draws import HUE, Draws, View, draw
from dino_lab.core.settings import Settings

MEAN = (0.485, 0.456, 0.406)
"""Of ImageNet's channels, in [0, 1]."""
STD = (0.229, 0.224, 0.225)
"""Of ImageNet's channels."""

Images: TypeAlias = UInt8[Tensor, "B H W 3"] | Sequence[UInt8[Tensor, "H W 3"]]
"""Of one size, or each of its own."""

# Local crops count from here, so that the number of global crops changes no local crop.
_FIRST_LOCAL = 2**16
_BATCHED_SIZE = 48
"""Side of the largest images whose crops are made together unless a knob says otherwise."""


class Crops(Settings):
    """How an image becomes global and local crops; defaults of the reference.

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
    global_1: View = View(blur_probability=1.0)
    """The first global crop."""
    global_2: View = View(blur_probability=0.1, solarize_probability=0.2)
    """Every other global crop."""
    local: View = View(scale=(0.05, 0.4))
    """Local crops."""
    backend: Literal["auto", "batched", "per_image"] = "auto"
    """How boxes are resized: batched, all images at once, which must be kept at one size; or per image, box by box, in
    8 bits as PIL does it. Alike up to this rounding. "auto" is batched for images kept at up to 48 pixels: for larger
    ones it is slower on a processor, though not on a GPU."""

    def is_batched(self, images: Images) -> bool:
        """Whether crops of these images are made of all of them at once."""
        return self.backend == "batched" if self.backend != "auto" else _are_small(images)


def multi_crop(
    images: Images, indices: Int64[np.ndarray, "B"], *, seed: int, epoch: int, crops: Crops
) -> tuple[Float[Tensor, "G B 3 S S"], Float[Tensor, "L B 3 s s"]]:
    """Global and local crops of a batch, normalised, on the images' device.

    `indices` are the images' places in the data set: an image's crops are a pure function of the image,
    (seed, epoch, index) and `crops`.
    """
    batched = crops.is_batched(images)
    heights, widths = _sides(images)

    def of(view: View, numbers: Int64[np.ndarray, "V"], size: int) -> Float[Tensor, "V B 3 size size"]:
        draws = draw(view, indices, numbers, seed=seed, epoch=epoch, heights=heights, widths=widths, size=size)
        return apply(images, draws, view, size=size, batched=batched)

    others = np.arange(1, crops.global_crops_number)
    local = _FIRST_LOCAL + np.arange(crops.local_crops_number)
    first = of(crops.global_1, np.arange(1), crops.global_crops_size)
    return (
        torch.cat((first, of(crops.global_2, others, crops.global_crops_size))),
        of(crops.local, local, crops.local_crops_size),
    )


def whole(images: Images, size: int) -> Float[Tensor, "B 3 size size"]:
    """The largest square in the middle of each image, resized (bicubic with antialias) and normalised: evaluated."""
    heights, widths = _sides(images)
    side = np.minimum(heights, widths)
    boxes = np.stack(((heights - side) // 2, (widths - side) // 2, side, side), axis=-1)[:, None]
    unflipped = np.zeros((len(images), 1), dtype=bool)
    return _normalised(
        _resized(images, boxes, unflipped, size=size, interpolation="bicubic", batched=_are_small(images))
    )


def apply(images: Images, draws: Draws, view: View, *, size: int, batched: bool) -> Float[Tensor, "V B 3 size size"]:
    """Crops resized to `size`, with the operations that they drew, in the view's order; normalised."""
    batch, number = draws.flip.shape
    if not number:
        return torch.empty(0, batch, 3, size, size)
    order = draws.order.reshape(draws.jitter.size, draws.order.shape[-1])
    # Jittered crops first, by the turn at which their hue comes: jitter works on slices, in place.
    sorting = np.lexsort((_turn_of_hue(order), ~draws.jitter.ravel()))
    crops = _resized(images, draws.boxes, draws.flip, size=size, interpolation=view.interpolation, batched=batched)
    crops = crops[pixels.to(sorting, crops)]

    def drawn(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        return np.flatnonzero(mask.ravel()[sorting])

    def of(values: npt.NDArray[np.generic], places: npt.NDArray[np.int64]) -> npt.NDArray[np.generic]:
        return values.reshape(len(sorting), *values.shape[2:])[sorting[places]]

    if (rotate := drawn(draws.rotate)).size:
        crops[rotate] = pixels.rotated(crops[rotate], of(draws.angle, rotate))
    if (jitter := drawn(draws.jitter)).size:
        _jitter(crops[: jitter.size], of(draws.order, jitter), of(draws.factors, jitter))
    if (gray := drawn(draws.grayscale)).size:
        crops[gray] = pixels.grayscale(crops[gray]).expand(-1, 3, -1, -1)
    if (blur := drawn(draws.blur)).size:
        crops[blur] = pixels.blurred(crops[blur], of(draws.sigma, blur))
    if (solarize := drawn(draws.solarize)).size:
        crops[solarize] = pixels.solarized(crops[solarize], view.solarize_threshold)
    if (noise := drawn(draws.noise)).size:
        crops[noise] = pixels.add_noise(crops[noise], view.noise_std, of(draws.noise_seed, noise))
    crops = _normalised(crops)
    for place in drawn(draws.erase):
        top, left, height, width = draws.erased.reshape(-1, 4)[sorting[place]]
        crops[place, :, top : top + height, left : left + width] = 0
    image, crop = np.divmod(sorting, number)
    out = torch.empty(number * batch, 3, size, size, device=crops.device)
    out.index_copy_(0, pixels.to(crop * batch + image, crops), crops)
    return out.view(number, batch, 3, size, size)


def _are_small(images: Images) -> bool:
    return isinstance(images, Tensor) and max(images.shape[1:3]) <= _BATCHED_SIZE


def _sides(images: Images) -> tuple[Int64[np.ndarray, "B"], Int64[np.ndarray, "B"]]:
    if isinstance(images, Tensor):
        return np.full(len(images), images.shape[1]), np.full(len(images), images.shape[2])
    heights, widths = zip(*(image.shape[:2] for image in images), strict=True)
    return np.array(heights), np.array(widths)


def _resized(
    images: Images,
    boxes: Int64[np.ndarray, "B V 4"],
    flip: npt.NDArray[np.bool_],
    *,
    size: int,
    interpolation: str,
    batched: bool,
) -> Float[Tensor, "N 3 size size"]:
    if batched:
        assert isinstance(images, Tensor)
        return pixels.resized(images, boxes, flip, size=size, interpolation=interpolation)
    return pixels.resized_each(images, boxes, flip, size=size, interpolation=interpolation)


def _normalised(crops: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N 3 S S"]:
    scale = 1 / torch.tensor(STD, device=crops.device).view(3, 1, 1)
    return torch.addcmul(-torch.tensor(MEAN, device=crops.device).view(3, 1, 1) * scale, crops, scale)


def as_pixels(crops: Float[Tensor, "N 3 S S"]) -> UInt8[Tensor, "N S S 3"]:
    """Crops as they are seen by people: before they were normalised."""
    pixels_of = crops * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return (pixels_of.clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1)


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
            pixels.shift_hue(crops[now], factors[now, HUE])
        if turn < blends.shape[1]:
            operation = blends[:, turn]
            pixels.blend(crops, operation, factors[np.arange(number), operation])


def _turn_of_hue(order: Int64[np.ndarray, "N J"]) -> Int64[np.ndarray, "N"]:
    """How many operations come before it; all of them where it is not among them."""
    before: npt.NDArray[np.int64] = np.logical_and.accumulate(order != HUE, axis=1).sum(axis=1)
    return before
