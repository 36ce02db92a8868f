"""Image retrieval: how far up, among all images by likeness to a query, those are that it is of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

_QUERIES = 256
"""Queries that are ranked at once."""


def mean_average_precision(
    queries: Float[Tensor, "M D"],
    query_labels: Int64[Tensor, "M"],
    gallery: Float[Tensor, "N D"],
    gallery_labels: Int64[Tensor, "N"],
) -> float:
    """Percent, by cosine similarity; what is sought are the images of the query's label.

    Average precision of a query is the mean of the precision at each place where one of them is. A query without any is
    left out; nan if that is all. Memory 256 x N.
    """
    gallery = F.normalize(gallery, dim=-1)
    total, number = 0.0, 0
    for some, labels in zip(F.normalize(queries, dim=-1).split(_QUERIES), query_labels.split(_QUERIES), strict=True):
        order = (some @ gallery.T).argsort(dim=-1, descending=True, stable=True)
        sought = gallery_labels[order] == labels[:, None]
        places = torch.arange(1, sought.shape[1] + 1, dtype=torch.float64, device=sought.device)
        precision = sought.cumsum(dim=-1) / places
        counts = sought.sum(dim=-1)
        has = counts > 0
        total += float(((precision * sought).sum(dim=-1)[has] / counts[has]).sum())
        number += int(has.sum())
    return 100 * total / number if number else float("nan")


@dataclass(frozen=True)
class Truth:
    """Of a query of the revisited Oxford and Paris sets, images of the gallery by how well they show its place."""

    easy: Sequence[int]
    hard: Sequence[int]
    junk: Sequence[int]


def revisited(
    similarities: Float[Tensor, "M N"], truth: Sequence[Truth], *, protocol: Literal["easy", "medium", "hard"]
) -> float:
    """Mean average precision in percent by the protocol of the revisited Oxford and Paris sets.

    Sought are the easy images, the hard, or (medium) both; junk, and of easy and hard what is not sought, is taken out
    of the ranking. Average precision is the area below the curve of precision by trapezoids, as there. A query with
    nothing sought is left out; nan if that is all.

    Source: Radenovic et al. (arXiv:1803.11285), section 3.3; filipradenovic/revisitop, compute_ap.
    """
    values = []
    for row, of_query in zip(similarities, truth, strict=True):
        sought = {
            "easy": list(of_query.easy),
            "medium": [*of_query.easy, *of_query.hard],
            "hard": list(of_query.hard),
        }[protocol]
        if not sought:
            continue
        left_out = {*of_query.junk, *of_query.easy, *of_query.hard} - set(sought)
        ranking = [place for place in row.argsort(descending=True, stable=True).tolist() if place not in left_out]
        ranks = sorted(ranking.index(place) for place in sought)
        # Precision just before and at each of those sought, counted from 0.
        values.append(
            sum(((found / rank if rank else 1.0) + (found + 1) / (rank + 1)) / 2 for found, rank in enumerate(ranks))
            / len(ranks)
        )
    return 100 * sum(values) / len(values) if values else float("nan")
