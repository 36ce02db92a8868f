"""Attention maps as segmentations: how well what the CLS token attends to covers the objects of an image."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, UInt8
from pydantic import Field
from torch import Tensor

from dino_lab.core.settings import Settings

BACKGROUND, VOID = 0, 255
"""Values of a mask that are no object's; void is what nobody could tell, as the borders in PASCAL VOC."""


class Attention(Settings):
    """Jaccard index of each object's mask and the last block's attention.

    From the paper: a head's mask holds 60 % of its attention, and the best head is shown. From its author (dino, issue
    54): for each object of an image, the head whose mask has the best Jaccard index; of those the mean over the image's
    objects, then over images. Choosing a head looks at the truth, so that more heads can only score higher.

    Our reading: an object is an instance and not all of its class; void pixels count for nothing; images without an
    object are left out; an image is the square that is evaluated, at the size of a global crop, where the paper has
    480 pixels.

    Source: DINO (arXiv:2104.14294), section 4.2.2 and Figure 4.
    """

    mass: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(default=(0.6, 0.8), min_length=1)
    """Shares of a head's attention that its mask holds, each judged by itself: the paper's, and a larger one."""

    def jaccard(self, attention: Float[Tensor, "N H P"], masks: UInt8[Tensor, "N S S"]) -> dict[float, float]:
        """Percent for each mass; masks as `jaccard`. NaN if no image has an object."""
        return {mass: 100 * float(jaccard(patches_of_mass(attention, mass), masks).nanmean()) for mass in self.mass}


def patches_of_mass(attention: Float[Tensor, "N H P"], mass: float) -> Bool[Tensor, "N H P"]:
    """The fewest patches of each head that hold this share of its attention; 1 takes all that have any.

    Source: dino, visualize_attention.py; of patches with equal attention, those that come last.
    """
    ascending, places = attention.sort(dim=-1, stable=True)
    held = (ascending / ascending.sum(dim=-1, keepdim=True)).cumsum(dim=-1) > 1 - mass
    return torch.zeros_like(held).scatter(-1, places, held)


def jaccard(patches: Bool[Tensor, "N H P"], masks: UInt8[Tensor, "N S S"]) -> Float64[Tensor, "N"]:
    """Of each image, the mean over its objects of the best head's intersection over union; NaN without an object.

    Args:
        patches: Which ones each head marks, row by row of a square grid.
        masks: 0 background, 255 void, each other value one object; S is a multiple of the grid's side.
    """
    return torch.stack([_of_image(*image) for image in zip(patches, masks, strict=True)])


def whole_masks(masks: UInt8[Tensor, "N H W"], size: int) -> UInt8[Tensor, "N size size"]:
    """The largest square in the middle of each mask, by the nearest pixel: as `whole` (data/crops.py) of images."""
    height, width = masks.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    middle = masks[:, None, top : top + side, left : left + side]
    # Not "nearest", which takes a pixel's corner for its centre.
    return F.interpolate(middle, size=(size, size), mode="nearest-exact")[:, 0]


def _of_image(patches: Bool[Tensor, "H P"], mask: UInt8[Tensor, "S S"]) -> Float64[Tensor, ""]:
    """Pixels are counted by patch, since all of a patch are marked or none: as if marks were enlarged to pixels."""
    length = len(mask) // math.isqrt(patches.shape[1])
    pixels = mask.unfold(0, length, length).unfold(1, length, length).flatten(2).flatten(0, 1).long()
    counts = torch.zeros(len(pixels), VOID + 1, dtype=torch.float64)
    counts.scatter_add_(1, pixels, torch.ones_like(pixels, dtype=torch.float64))
    of_object = counts[:, BACKGROUND + 1 : VOID]
    of_object = of_object[:, of_object.any(dim=0)]
    of_any = counts[:, :VOID].sum(dim=1, keepdim=True)
    marked = patches.double()
    intersection = marked @ of_object
    union = marked @ of_any + of_object.sum(dim=0) - intersection
    best: Tensor = (intersection / union).amax(dim=0)
    return best.mean()
