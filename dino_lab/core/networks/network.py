"""A network: backbone and head, and perhaps a predictor, run on crops of several sizes."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dino_lab.core.networks.backbone import BackboneNetwork
from dino_lab.core.networks.head import Head


class Network(nn.Module):
    """What student and teacher are: the same architecture with weights of their own. Only a student predicts."""

    def __init__(self, backbone: BackboneNetwork, head: Head, predictor: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.predictor = predictor

    def forward(
        self, groups: Sequence[Float[Tensor, "_ B 3 _ _"]]
    ) -> tuple[Float[Tensor, "V B K"], Float[Tensor, "V B D"]]:
        """Logits and features of every crop.

        Crops of one size go through the backbone together, then all features through the head at once, so that
        batch normalisation in a head sees all crops.
        """
        batch = groups[0].shape[1]
        features = torch.cat([self.backbone(crops.flatten(0, 1)) for crops in groups if len(crops)])
        projected = self.head.project(features)
        if self.predictor is not None:
            projected = self.predictor(projected)
        logits = self.head.logits(projected)
        return logits.unflatten(0, (-1, batch)), features.unflatten(0, (-1, batch))
