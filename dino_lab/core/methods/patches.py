"""What methods that hide patches share: the masks, and the features of a network whose patches are trained."""

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from dino_lab.core.networks.backbone import BackboneNetwork, VisionTransformer

_SMALLEST_BLOCK = 16
"""Patches; BEiT's, at 14 x 14 patches an image."""
_FLATTEST_BLOCK = 0.3
"""Height / width; the narrowest is its inverse."""


def with_patches(backbone: BackboneNetwork, image_size: int, *, method: str) -> tuple[VisionTransformer, int]:
    """The backbone, and how many patches lie on a side of a global crop.

    Raises:
        ValueError: the backbone is no plain vision transformer, or a global crop is a single patch.
    """
    if not isinstance(backbone, VisionTransformer):
        raise ValueError(
            f"backbone.name: method.kind = {method!r} hides patches, which only a plain vision transformer can do; "
            "allowed are timm's vit_* and deit_*"
        )
    patch: int = backbone.vit.patch_embed.patch_size[0]
    if image_size < 2 * patch:
        raise ValueError(
            f"crops.global_crops_size = {image_size}: is one patch of the backbone's {patch} pixels, "
            f"of which method.kind = {method!r} can hide none"
        )
    return backbone, image_size // patch


def hidden_number(mask_ratio: float, patches: int) -> int:
    """Patches to hide: the nearest number to this part of them, at least one, never all."""
    return min(max(round(mask_ratio * patches), 1), patches - 1)


def random_masks(images: int, patches: int, number: int) -> Bool[Tensor, "B N"]:
    """Exactly `number` patches of each image, all choices equally likely.

    Drawn on the host from torch's generator, as block masks are: the same on every device.
    """
    order = torch.rand(images, patches).argsort(dim=1)
    return torch.zeros(images, patches, dtype=torch.bool).scatter(1, order[:, :number], True)


def block_masks(images: int, side: int, number: int) -> Bool[Tensor, "B N"]:
    """Exactly `number` patches of each image in rectangles, which may overlap; side x side patches an image.

    Departs from the source in three ways: the last block is cut off, row by row, where the number is reached; what is
    left when fewer than 16 patches are missing is one more block of about that size; a side longer than the
    image's is cut to it.

    Source: BEiT (arXiv:2106.08254), Algorithm 1.
    """
    line = torch.arange(side)
    hidden = torch.zeros(images, side, side, dtype=torch.bool)
    while (missing := number - hidden.sum(dim=(1, 2))).any():
        smallest = missing.clamp(max=_SMALLEST_BLOCK)
        area = smallest + torch.rand(images) * (missing - smallest)
        aspect = torch.exp((2 * torch.rand(images) - 1) * math.log(_FLATTEST_BLOCK))
        height = (area * aspect).sqrt().round().clamp(1, side)
        width = (area / aspect).sqrt().round().clamp(1, side)
        top = (torch.rand(images) * (side - height + 1)).floor()
        left = (torch.rand(images) * (side - width + 1)).floor()
        rows = (line >= top[:, None]) & (line < (top + height)[:, None])
        columns = (line >= left[:, None]) & (line < (left + width)[:, None])
        block = rows[:, :, None] & columns[:, None, :] & ~hidden
        within = block.flatten(1).cumsum(dim=1) <= missing[:, None]
        hidden |= block & within.view_as(block)
    return hidden.flatten(1)


def places(chosen: Bool[Tensor, "B N"]) -> Int64[Tensor, "B M"]:
    """Where each row is True, in order; every row is so equally often."""
    return chosen.nonzero()[:, 1].unflatten(0, (len(chosen), -1))  # type: ignore[no-any-return]


class PatchMean(nn.Module):
    """Whole images to features where no CLS token is trained: the mean of their patches' tokens."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        return self.backbone.encode(self.backbone.tokens(images))[:, 1:].mean(dim=1)
