"""Pictures of what the heads of the last block attend to, alike at every step so that they can be compared."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from dino_lab.core.evals.attention import patches_of_mass

_TILE = 96
"""Side in pixels of an image in the picture, at least."""
_GAP = 4
_MASS = 0.6
"""Part of the attention whose border is drawn, as in the paper's Figure 4."""
_BORDER = torch.tensor([0, 255, 0], dtype=torch.uint8)


def heads(images: UInt8[Tensor, "B S S 3"], attention: Float[Tensor, "B H P"]) -> UInt8[Tensor, "h w 3"]:
    """A row for each image: itself, then a tile for each head, from black to white with its share of attention.

    White is a head's own largest share in this image. Around the patches that hold 60 % of it runs a green border.
    """
    enlarged = images.shape[1] * math.ceil(_TILE / images.shape[1])
    side = math.isqrt(attention.shape[-1])
    tiles = [F.interpolate(images.movedim(-1, 1), size=(enlarged, enlarged), mode="nearest-exact").movedim(1, -1)]
    for head, marked in zip(attention.unbind(1), patches_of_mass(attention, _MASS).unbind(1), strict=True):
        heat = (head / head.amax(dim=-1, keepdim=True)).unflatten(-1, (side, side))
        heat = F.interpolate(heat[:, None], size=(enlarged, enlarged), mode="nearest-exact")[:, 0]
        # Black, red, yellow, white.
        colors = torch.stack([(3 * heat - channel).clamp(0, 1) for channel in range(3)], dim=-1).mul(255).byte()
        inside = F.interpolate(
            marked.unflatten(-1, (side, side))[:, None].float(), size=(enlarged, enlarged), mode="nearest-exact"
        )
        # Inside, with something outside among the eight around it; beyond the image is outside.
        border = (inside - (-F.max_pool2d(F.pad(-inside, (1, 1, 1, 1), value=0.0), 3, stride=1))) > 0
        tiles.append(torch.where(border[:, 0, ..., None], _BORDER, colors))
    gap = images.new_full((len(images), enlarged, _GAP, 3), 255)
    rows = torch.cat([part for tile in tiles for part in (tile, gap)][:-1], dim=2)
    rows = F.pad(rows, (0, 0, 0, 0, 0, _GAP), value=255)
    return rows.flatten(0, 1)[:-_GAP]
