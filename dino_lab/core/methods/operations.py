"""What is done to the teacher's logits before they are targets, so that they do not collapse to one prototype."""

from typing import Annotated, Literal, TypeAlias

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from dino_lab.core.distributed import gather, workers
from dino_lab.core.settings import Settings


def sharpened(logits: Float[Tensor, "*B K"], teacher_temp: float) -> Float[Tensor, "*B K"]:
    """softmax(logits / teacher_temp); at temperature 0 the limit, one-hot at the largest."""
    if teacher_temp == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)
    return (logits / teacher_temp).softmax(dim=-1)


def sinkhorn(logits: Float[Tensor, "*B K"], teacher_temp: float, *, iterations: int) -> Float[Tensor, "*B K"]:
    """exp(logits / teacher_temp) with its sums over images made equal, then those over prototypes, and so on.

    Every row sums to 1; the more iterations, the nearer each prototype is to an equal share of the images. One
    iteration is `SoftmaxBatch`. In logarithms, so that no temperature overflows.

    Source: SwAV (arXiv:2006.09882), section 3.1; DINO (arXiv:2104.14294), Appendix A and Table 15.
    """
    plan = logits.flatten(end_dim=-2) / teacher_temp
    for _ in range(iterations):
        plan = _log_softmax_of_images(plan)
        plan = plan.log_softmax(dim=1)
    return plan.exp().view_as(logits)


def _log_softmax_of_images(logits: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Over the images of all ranks, which may have unequally many."""
    if workers() == 1:
        return logits.log_softmax(dim=0)
    return logits - gather(logits.logsumexp(dim=0, keepdim=True), dim=0).logsumexp(dim=0)


class Centering(Settings):
    """Subtracts a running mean of the teacher's logits, the centre; against collapse to one prototype."""

    kind: Literal["centering"] = "centering"
    """Which operation."""
    center_momentum: float = Field(default=0.9, ge=0, le=1)
    """Weight of the old centre in its update."""

    def shifted(self, logits: Float[Tensor, "*B K"], center: Float[Tensor, "K"]) -> Float[Tensor, "*B K"]:
        return logits - center

    def targets(
        self, logits: Float[Tensor, "*B K"], center: Float[Tensor, "K"], teacher_temp: float
    ) -> Float[Tensor, "*B K"]:
        return sharpened(self.shifted(logits, center), teacher_temp)

    def move_center(self, center: Float[Tensor, "K"], mean: Float[Tensor, "K"]) -> None:
        """In place, toward the mean of this step's logits."""
        center.lerp_(mean, 1 - self.center_momentum)


class _WithoutCenter(Settings):
    def shifted(self, logits: Float[Tensor, "*B K"], center: Float[Tensor, "K"]) -> Float[Tensor, "*B K"]:
        return logits

    def targets(
        self, logits: Float[Tensor, "*B K"], center: Float[Tensor, "K"], teacher_temp: float
    ) -> Float[Tensor, "*B K"]:
        return sharpened(logits, teacher_temp)

    def move_center(self, center: Float[Tensor, "K"], mean: Float[Tensor, "K"]) -> None:
        """It stays at 0."""


class NoOperation(_WithoutCenter):
    """Leaves the teacher's logits as they are."""

    kind: Literal["none"] = "none"
    """Which operation."""


class SoftmaxBatch(_WithoutCenter):
    """A softmax over the images of the batch, of all global crops together, in place of centring.

    Each image's row is then made to sum to 1: one iteration of Sinkhorn-Knopp.
    """

    kind: Literal["softmax_batch"] = "softmax_batch"
    """Which operation."""

    def targets(
        self, logits: Float[Tensor, "*B K"], center: Float[Tensor, "K"], teacher_temp: float
    ) -> Float[Tensor, "*B K"]:
        return sinkhorn(logits, teacher_temp, iterations=1)


class Sinkhorn(_WithoutCenter):
    """Sinkhorn-Knopp over the images of the batch, of all global crops together, in place of centring."""

    kind: Literal["sinkhorn"] = "sinkhorn"
    """Which operation."""
    iterations: int = Field(default=3, ge=1)
    """Times that prototypes and images are evened in turn."""

    def targets(
        self, logits: Float[Tensor, "*B K"], center: Float[Tensor, "K"], teacher_temp: float
    ) -> Float[Tensor, "*B K"]:
        return sinkhorn(logits, teacher_temp, iterations=self.iterations)


OperationSettings: TypeAlias = Annotated[Centering | SoftmaxBatch | Sinkhorn | NoOperation, Field(discriminator="kind")]
