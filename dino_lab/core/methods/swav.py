"""SwAV: a crop predicts to which prototypes another crop of its image is assigned (arXiv:2006.09882); no teacher."""

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from dino_lab.core import records
from dino_lab.core.methods.losses import cross_entropy, entropy, kl_divergence
from dino_lab.core.methods.method import Batch, Method, Outcome, Surroundings
from dino_lab.core.methods.operations import sinkhorn
from dino_lab.core.networks.backbone import BackboneNetwork
from dino_lab.core.networks.head import Head, MLPHeadSettings
from dino_lab.core.networks.network import Network
from dino_lab.core.schedules import Now
from dino_lab.core.settings import Settings


class SwAV(Settings):
    """SwAV with DINO's crops and backbone, as in the paper's comparison.

    Without the source's queue of features, which it needs for batches much smaller than the number of prototypes:
    `prototypes_number` is to go with the batch.

    Source: SwAV (arXiv:2006.09882), section 3; main_swav.py; DINO (arXiv:2104.14294), Tables 7 and 13.
    """

    kind: Literal["swav"] = "swav"
    """Which method."""
    head: MLPHeadSettings = MLPHeadSettings(out_dim=128, hidden_dim=2048)
    """Features to what is l2-normalised and compared with the prototypes."""
    prototypes_number: int = Field(default=3000, ge=2, le=262144)
    """K, directions of length 1 that are learned."""
    freeze_prototypes_epochs: float = Field(default=1.0, ge=0)
    """Epochs during which the prototypes are held; may be a fraction."""
    temp: float = Field(default=0.1, gt=0)
    """Temperature of the softmax that predicts the codes."""
    epsilon: float = Field(default=0.05, gt=0)
    """Temperature of the codes before they are evened out."""
    iterations: int = Field(default=3, ge=1)
    """Times that Sinkhorn-Knopp evens prototypes and images in turn."""

    def build(self, backbone: BackboneNetwork, surroundings: Surroundings) -> "SwAVMethod":
        head = PrototypesHead(self.head.build(backbone.embed_dim), self.prototypes_number)
        return SwAVMethod(Network(backbone, head), settings=self)


class PrototypesHead(Head):
    """Features to scores: products of a projection of length 1 with each prototype."""

    def __init__(self, projection: Head, prototypes_number: int) -> None:
        super().__init__()
        self.projection = projection
        self.projected_dim = projection.projected_dim
        self.prototypes = nn.Linear(self.projected_dim, prototypes_number, bias=False)

    def project(self, features: Float[Tensor, "*B D"]) -> Float[Tensor, "*B P"]:
        return self.projection(features)  # type: ignore[no-any-return]

    def logits(self, projected: Float[Tensor, "*B P"]) -> Float[Tensor, "*B K"]:
        return self.prototypes(F.normalize(projected, dim=-1))  # type: ignore[no-any-return]


class SwAVMethod(Method):
    """A student alone, with its prototypes."""

    def __init__(self, student: Network, *, settings: SwAV) -> None:
        super().__init__(student)
        self.settings = settings
        self._normalize_prototypes()

    def loss(self, batch: Batch, now: Now) -> Outcome:
        """Cross-entropy of the codes of a global crop with the prediction of a different crop.

        The codes are the targets, so teacher entropy and KL are those of the codes: SwAV's teacher is the student
        itself. They are made for each global crop apart and get no gradient.

        Source: SwAV (arXiv:2006.09882), equations 1 to 5; main_swav.py, train.
        """
        scores, features = self.student([batch.global_crops, batch.local_crops])
        scores, globals_number = scores.float(), len(batch.global_crops)
        epsilon, iterations = self.settings.epsilon, self.settings.iterations
        global_scores = scores[:globals_number].detach()
        codes = torch.stack([sinkhorn(crop_scores, epsilon, iterations=iterations) for crop_scores in global_scores])
        log_probs = (scores / self.settings.temp).log_softmax(dim=-1)

        measures: dict[str, float | Tensor] = {}
        if now.measured:
            measures = {records.TEACHER_ENTROPY: entropy(codes), records.KL: kl_divergence(codes, log_probs.detach())}
        loss, features = cross_entropy(codes, log_probs), features[:globals_number].detach().float()
        return Outcome(loss, features, targets=codes, measures=measures)

    def after_step(self, now: Now) -> None:
        """Brings the prototypes back to length 1; the source does so at the start of the next step."""
        self._normalize_prototypes()

    def held(self, now: Now) -> Iterable[nn.Parameter]:
        frozen = now.step < self.settings.freeze_prototypes_epochs * now.steps_per_epoch
        return [self._prototypes()] if frozen else ()

    def _prototypes(self) -> nn.Parameter:
        return self.student.get_parameter("head.prototypes.weight")

    @torch.no_grad()
    def _normalize_prototypes(self) -> None:
        prototypes = self._prototypes()
        prototypes.copy_(F.normalize(prototypes, dim=1))
