"""Weighted k-NN classification of frozen features: no training, no knobs to tune, the field's first check."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from dino_lab.core.settings import Settings


class KNN(Settings):
    """Weighted nearest neighbours by cosine similarity."""

    neighbors_number: int = Field(default=20, ge=1)
    """k, the training images that vote."""
    temperature: float = Field(default=0.07, gt=0)
    """A neighbour votes with weight exp(similarity / temperature)."""
    bank_images: int = Field(default=100_000, ge=1)
    """Training images that can be neighbours, at most; the first ones."""

    def top1(
        self,
        bank: Float[Tensor, "N D"],
        bank_labels: Int64[Tensor, "N"],
        queries: Float[Tensor, "M D"],
        query_labels: Int64[Tensor, "M"],
    ) -> float:
        """Percent of queries whose label wins the vote; memory 256 x N a chunk of queries.

        Source: InstDisc (arXiv:1805.01978), section 3.4; dino, eval_knn.py.
        """
        bank = F.normalize(bank, dim=-1)
        classes = int(bank_labels.max()) + 1
        right = 0
        for part, labels in zip(F.normalize(queries, dim=-1).split(256), query_labels.split(256), strict=True):
            nearest, neighbors = (part @ bank.T).topk(min(self.neighbors_number, len(bank)), dim=-1)
            votes = torch.zeros(len(part), classes, device=part.device)
            votes.scatter_add_(1, bank_labels[neighbors], (nearest / self.temperature).exp())
            right += int((votes.argmax(dim=-1) == labels).sum())
        return right / len(queries) * 100
