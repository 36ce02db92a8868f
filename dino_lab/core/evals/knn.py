"""Weighted k-NN classification of frozen features: no training, no knobs to tune, the field's first check."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from dino_lab.core.settings import Settings

_QUERIES, _BANK = 256, 65_536
"""Images of a block: smaller ones of the bank take longer, since each has its k nearest sorted out."""


class KNN(Settings):
    """Weighted nearest neighbours by cosine similarity."""

    neighbors_number: int = Field(default=20, ge=1)
    """k, the training images that vote; that of tables."""
    further_neighbors_numbers: tuple[int, ...] = (10, 100, 200)
    """Other numbers of neighbours that are tried beside it."""
    temperature: float = Field(default=0.07, gt=0)
    """A neighbour votes with weight exp(similarity / temperature)."""

    def top1(
        self,
        bank: Float[Tensor, "N D"],
        bank_labels: Int64[Tensor, "N"],
        queries: Float[Tensor, "M D"],
        query_labels: Int64[Tensor, "M"],
    ) -> dict[int, float]:
        """Percent of queries whose label wins the vote, by k; a bank smaller than k votes as a whole.

        One exact search for all k, in blocks: beside the features it takes the memory of 65,536 normalised ones, of
        256 x 65,536 similarities and of the queries once more, however large the bank is.

        Source: InstDisc (arXiv:1805.01978), section 3.4; dino, eval_knn.py.
        """
        numbers = dict.fromkeys((self.neighbors_number, *self.further_neighbors_numbers))
        classes = int(bank_labels.max()) + 1
        right = dict.fromkeys(numbers, 0)
        labels = query_labels.split(_QUERIES)
        for (similarities, neighbors), truth in zip(_nearest(bank, queries, max(numbers)), labels, strict=True):
            weights, voters = (similarities / self.temperature).exp(), bank_labels[neighbors]
            for number in numbers:
                votes = weights.new_zeros(len(truth), classes)
                votes.scatter_add_(1, voters[:, :number], weights[:, :number])
                right[number] += int((votes.argmax(dim=-1) == truth).sum())
        return {number: hits / len(queries) * 100 for number, hits in right.items()}


def _nearest(
    bank: Float[Tensor, "N D"], queries: Float[Tensor, "M D"], number: int
) -> Iterator[tuple[Float[Tensor, "m k"], Int64[Tensor, "m k"]]]:
    """Similarity and place of the nearest of the bank, nearest first, for some queries after the other."""
    number = min(number, len(bank))
    for some in F.normalize(queries, dim=-1).split(_QUERIES):
        similarities = some.new_empty(len(some), 0)
        places = torch.empty(len(some), 0, dtype=torch.long, device=some.device)
        for start in range(0, len(bank), _BANK):
            block = F.normalize(bank[start : start + _BANK], dim=-1)
            near, where = (some @ block.T).topk(min(number, len(block)), dim=-1)
            similarities, kept = torch.cat([similarities, near], dim=-1).topk(
                min(number, similarities.shape[1] + near.shape[1]), dim=-1
            )
            places = torch.cat([places, where + start], dim=-1).gather(1, kept)
        yield similarities, places
