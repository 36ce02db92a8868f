"""A network: backbone and head, run on crops of several sizes."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dino_lab.core.networks.backbone import VisionTransformer
from dino_lab.core.networks.head import DINOHead


class Network(nn.Module):
    """What student and teacher are: the same architecture with weights of their own."""

    def __init__(self, backbone: VisionTransformer, head: DINOHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(
        self, groups: Sequence[Float[Tensor, "_ B 3 _ _"]]
    ) -> tuple[Float[Tensor, "V B K"], Float[Tensor, "V B D"]]:
        """Logits and features of every crop.

        Crops of one size go through the backbone together, then all features through the head at once.
        """
        batch = groups[0].shape[1]
        features = torch.cat([self.backbone(crops.flatten(0, 1)) for crops in groups if len(crops)])
        logits = self.head(features)
        return logits.unflatten(0, (-1, batch)), features.unflatten(0, (-1, batch))
