"""Signals of a trial's health, each a pure function of what the method showed; float32, no gradient."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def marginal_entropy(targets: Float[Tensor, "G B K"]) -> Float[Tensor, ""]:
    """Entropy of the mean target over crops and images, nats: 0 if all choose one prototype, at most ln K."""
    mean = targets.mean(dim=(0, 1))
    entropy: Tensor = torch.special.entr(mean).sum()
    return entropy


@torch.no_grad()
def spread(vectors: Float[Tensor, "G B D"]) -> Float[Tensor, ""]:
    """Standard deviation over images of l2-normalised vectors, mean over dimensions, times sqrt(D).

    0 if all are the same, about 1 if they are spread over the sphere.

    Source: SimSiam (arXiv:2011.10566), section 4.1.
    """
    normalised = F.normalize(vectors.flatten(0, 1), dim=-1)
    return normalised.std(dim=0).mean() * math.sqrt(vectors.shape[-1])
