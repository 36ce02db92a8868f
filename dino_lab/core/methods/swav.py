"""SwAV: a crop predicts to which prototypes another crop of its image is assigned (arXiv:2006.09882); no teacher."""

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from dino_lab.core import records
from dino_lab.core.distributed import gather, rank, workers
from dino_lab.core.methods.losses import agreement, cross_entropy, entropy, kl_divergence
from dino_lab.core.methods.method import Batch, Method, Outcome, Surroundings
from dino_lab.core.methods.operations import sinkhorn
from dino_lab.core.networks.backbone import BackboneNetwork
from dino_lab.core.networks.head import Head, MLPHeadSettings
from dino_lab.core.networks.network import Network
from dino_lab.core.schedules import Now
from dino_lab.core.settings import Settings


class SwAV(Settings):
    """SwAV with DINO's crops and backbone, as in the paper's comparison.

    The source's queue serves batches much smaller than the number of prototypes; it is off unless `queue_size` says
    otherwise, as in the source, and may be of any length, where the source's is a multiple of the batch.

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
    queue_size: int = Field(default=0, ge=0)
    """Images of earlier steps whose projections are evened out together with a batch's, for each global crop."""
    queue_start_epochs: float = Field(default=15.0, ge=0)
    """Epochs before the queue begins to fill; may be a fraction. It is used once it is full."""

    def build(self, backbone: BackboneNetwork, surroundings: Surroundings) -> "SwAVMethod":
        student = SwAVStudent(backbone, self.head.build(backbone.embed_dim), self.prototypes_number)
        return SwAVMethod(student, settings=self, globals_number=surroundings.global_crops_number)


class SwAVStudent(Network):
    """Backbone and head, and the prototypes that its outputs are compared with."""

    def __init__(self, backbone: BackboneNetwork, head: Head, prototypes_number: int) -> None:
        super().__init__(backbone, head)
        self.prototypes = nn.Linear(head.projected_dim, prototypes_number, bias=False)


class SwAVMethod(Method):
    """A student alone, with its prototypes, and the queue: its projections of global crops of the steps before."""

    student: SwAVStudent
    queue: Float[Tensor, "G N P"]
    """Newest first; rows of zeros where it is not full yet."""

    def __init__(self, student: SwAVStudent, *, settings: SwAV, globals_number: int) -> None:
        super().__init__(student)
        self.settings = settings
        empty = torch.zeros(globals_number, settings.queue_size, student.head.projected_dim)
        self.register_buffer("queue", empty)
        self._projections: list[Tensor] = []
        self._normalize_prototypes()

    def loss(self, batch: Batch, now: Now) -> Outcome:
        """Cross-entropy of the codes of a global crop with the prediction of a different crop.

        The codes are the targets, so teacher entropy and KL are those of the codes: SwAV's teacher is the student
        itself. They are made for each global crop apart, together with those of its queue, and get no gradient.
        Remembers the projections for `after_step`: the queue here is that of the steps before.

        Source: SwAV (arXiv:2006.09882), equations 1 to 5; main_swav.py, train.
        """
        outputs, features = self.student([batch.global_crops, batch.local_crops])
        projections = F.normalize(outputs, dim=-1)
        scores: Tensor = self.student.prototypes(projections).float()
        globals_number = len(batch.global_crops)
        self._projections.append(projections[:globals_number].detach().float())

        codes = self._codes(scores[:globals_number].detach())
        log_probs = (scores / self.settings.temp).log_softmax(dim=-1)

        measures: dict[str, float | Tensor] = {}
        if now.measured:
            measures = {
                records.TEACHER_ENTROPY: entropy(codes),
                records.KL: kl_divergence(codes, log_probs.detach()),
                records.AGREEMENT: agreement(codes, log_probs),
            }
        loss, features = cross_entropy(codes, log_probs), features[:globals_number].detach().float()
        return Outcome(loss, features, codes, self._projections[-1], measures)

    @torch.no_grad()
    def after_step(self, now: Now) -> None:
        """Puts this step's projections into the queue, and brings the prototypes back to length 1.

        The source does the latter at the start of the next step.
        """
        projections = torch.cat([gather(part, dim=1) for part in self._projections], dim=1)
        self._projections.clear()
        if self.settings.queue_size and now.step >= self.settings.queue_start_epochs * now.steps_per_epoch:
            self.queue.copy_(torch.cat([projections, self.queue], dim=1)[:, : self.settings.queue_size])
        self._normalize_prototypes()

    def held(self, now: Now) -> Iterable[nn.Parameter]:
        frozen = now.step < self.settings.freeze_prototypes_epochs * now.steps_per_epoch
        return self.student.prototypes.parameters() if frozen else ()

    @torch.no_grad()
    def _codes(self, scores: Float[Tensor, "G B K"]) -> Float[Tensor, "G B K"]:
        images = scores.shape[1]
        # Filled from the front, so that its last row is set when it is full.
        if self.settings.queue_size and self.queue[:, -1].any():
            # Evened out with those of all ranks: each row is one rank's.
            share = self.queue[:, rank() :: workers()]
            scores = torch.cat([scores, self.student.prototypes(share).float()], dim=1)
        codes = [sinkhorn(of_crop, self.settings.epsilon, iterations=self.settings.iterations) for of_crop in scores]
        return torch.stack(codes)[:, :images]

    @torch.no_grad()
    def _normalize_prototypes(self) -> None:
        prototypes = self.student.prototypes.weight
        prototypes.copy_(F.normalize(prototypes, dim=1))
