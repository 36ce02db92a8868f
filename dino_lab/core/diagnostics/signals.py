"""Signals of a trial's health, each a pure function of what the method showed; float32, no gradient."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dino_lab.core import records


def of_features(features: Float[Tensor, "G B D"]) -> dict[str, float | Tensor]:
    """Spread, rank and spectrum of the backbone's features, by logged name."""
    return _geometry(features, records.EMBEDDING_STD, records.EMBEDDING_RANK, records.EMBEDDING_SPECTRUM)


def of_outputs(outputs: Float[Tensor, "G B K"] | None) -> dict[str, float | Tensor]:
    """The same of the head's outputs; none where a method has none that are to be judged."""
    if outputs is None:
        return {}
    return _geometry(outputs, records.OUTPUT_STD, records.OUTPUT_RANK, records.OUTPUT_SPECTRUM)


def _geometry(vectors: Float[Tensor, "G B D"], std: str, rank: str, at_place: str) -> dict[str, float | Tensor]:
    """By these names; the last one is a prefix."""
    values = spectrum(vectors)
    places = {f"{at_place}{place}": value for place, value in at_places(values).items()}
    return {std: spread(vectors), rank: effective_rank(values), **places}


@torch.no_grad()
def spread(vectors: Float[Tensor, "G B D"]) -> Float[Tensor, ""]:
    """Standard deviation over images of l2-normalised vectors, mean over dimensions, times sqrt(D).

    0 if all are the same, about 1 if they are spread over the sphere.

    Source: SimSiam (arXiv:2011.10566), section 4.1.
    """
    normalised = F.normalize(vectors.flatten(0, 1), dim=-1)
    return normalised.std(dim=0).mean() * math.sqrt(vectors.shape[-1])


@torch.no_grad()
def spectrum(vectors: Float[Tensor, "*N D"]) -> Float[Tensor, "min(N,D)"]:
    """Singular values of the matrix whose rows are the vectors, largest first; on the host.

    The host's LAPACK: of matrices this small it is no slower than a GPU's solver, and waits for nothing but its input.
    """
    rows = vectors.flatten(0, -2).float().cpu()
    if not rows.isfinite().all():  # of weights that run away, before the loss does: LAPACK would raise
        return rows.new_full((min(rows.shape),), math.nan)
    values: Tensor = torch.linalg.svdvals(rows)
    return values


def effective_rank(singular_values: Float[Tensor, "R"]) -> float:
    """exp of the entropy of the singular values over their sum: n if n are equal and the others 0; at least 1.

    Source: RankMe (arXiv:2210.02885), equation 1, without its epsilon.
    """
    return float(torch.special.entr(singular_values / singular_values.sum()).sum().exp())


def at_places(singular_values: Float[Tensor, "R"]) -> dict[int, float]:
    """Singular values over the largest by their place: the 2nd, 4th, 8th and so on."""
    places = [2**power for power in range(1, len(singular_values).bit_length())]
    return {place: float(singular_values[place - 1] / singular_values[0]) for place in places}


@torch.no_grad()
def gradient_norms(student: nn.Module) -> dict[str, Float[Tensor, ""]]:
    """l2 norm of the gradient of each of the student's parts that has one: backbone, head, and what else there is."""
    gradients = {
        name: [parameter.grad for parameter in part.parameters() if parameter.grad is not None]
        for name, part in student.named_children()
    }
    return {name: torch.stack(torch._foreach_norm(of_part)).norm() for name, of_part in gradients.items() if of_part}


@torch.no_grad()
def distance(network: nn.Module, student: nn.Module) -> Float[Tensor, ""]:
    """l2 distance of the weights of two networks of one architecture, over the norm of the second's."""
    ours, theirs = ([parameter.data for parameter in each.parameters()] for each in (network, student))
    # Squares of weights that run away are no float32 any more.
    apart, own = (
        torch.stack(torch._foreach_norm(weights, dtype=torch.float64)).norm()
        for weights in (torch._foreach_sub(ours, theirs), theirs)
    )
    relative: Tensor = apart / own
    return relative
