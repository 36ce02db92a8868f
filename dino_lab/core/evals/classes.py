"""A part of each class: what classifiers are trained on or held to."""

import torch
from jaxtyping import Int64
from torch import Tensor


def first_of_each(labels: Int64[Tensor, "N"], numbers: Int64[Tensor, "C"]) -> Int64[Tensor, "n"]:
    """Places of the first images of each class, as many as its number says; class after class, in order."""
    by_class = labels.argsort(stable=True)
    counts = torch.bincount(labels, minlength=len(numbers))
    turn = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return by_class[turn < numbers.repeat_interleave(counts)]
