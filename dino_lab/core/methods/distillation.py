"""Knowledge distillation from a supervised network (arXiv:1503.02531): the form from which DINO drops the labels."""

import copy
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dino_lab.core import records
from dino_lab.core.methods.losses import agreement, cross_entropy, entropy, kl_divergence
from dino_lab.core.methods.method import Batch, Method, Outcome, Surroundings
from dino_lab.core.networks.backbone import BackboneNetwork
from dino_lab.core.networks.head import Classifier
from dino_lab.core.networks.network import Network
from dino_lab.core.networks.weights import load_weights, read_network
from dino_lab.core.schedules import Now
from dino_lab.core.settings import Settings


class Distillation(Settings):
    """A student learns the distributions of a trained, supervised teacher that does not move.

    DINO is this with a teacher that labels never taught: one made of the student itself.

    Source: Hinton et al. (arXiv:1503.02531), section 2; DINO (arXiv:2104.14294), section 3.1.
    """

    kind: Literal["distillation"] = "distillation"
    """Which method."""
    checkpoint: str = Field(min_length=1)
    """The teacher: a file, or the id of a finished supervised trial of the same lab with the student's architecture."""
    temp: float = Field(default=4.0, gt=0)
    """Temperature of the softmax of both, teacher and student; the source finds 2.5 to 4 best for small students."""

    def build(self, backbone: BackboneNetwork, surroundings: Surroundings) -> "DistillationMethod":
        """Reads the teacher.

        Raises:
            ValueError: there is no such checkpoint, or it is of another architecture or number of classes.
        """
        student = Network(backbone, Classifier(backbone.embed_dim, surroundings.classes_number))
        weights = read_network(self.checkpoint, surroundings.trials_dir)
        return DistillationMethod(student, weights, source=f"method.checkpoint = {self.checkpoint!r}", temp=self.temp)


class DistillationMethod(Method):
    """A student, and a frozen teacher in evaluation mode, batch normalisation included."""

    def __init__(self, student: Network, weights: dict[str, Tensor], *, source: str, temp: float) -> None:
        super().__init__(student)
        self.teacher = copy.deepcopy(student)
        load_weights(self.teacher, weights, source=source)
        self.teacher.requires_grad_(False)
        self.teacher.eval()
        self.temp = temp

    def loss(self, batch: Batch, now: Now) -> Outcome:
        """Cross-entropy of the teacher's distribution of a global crop with the student's of a different crop.

        Departs from the source, which compares distributions of the same crop: the pairs are DINO's, so that the
        teacher is all that differs. It has no term with the labels, and no factor temp^2, which serves to keep the
        two terms in proportion: without it loss = entropy + KL.

        Features are the student's, since it is what is judged. Targets are not handed on to be judged for collapse:
        these cannot, yet at such temperatures the entropy of a good teacher is close to ln K.

        Source: Hinton et al. (arXiv:1503.02531), equation 1 and section 2.1.
        """
        with torch.no_grad():
            teacher_logits, _ = self.teacher([batch.global_crops])
        student_logits, features = self.student([batch.global_crops, batch.local_crops])
        targets = (teacher_logits.float() / self.temp).softmax(dim=-1)
        log_probs = (student_logits.float() / self.temp).log_softmax(dim=-1)

        measures: dict[str, float | Tensor] = {}
        if now.measured:
            measures = {
                records.TEACHER_ENTROPY: entropy(targets),
                records.KL: kl_divergence(targets, log_probs.detach()),
                records.AGREEMENT: agreement(targets, log_probs),
                records.TEACHER_TEMP: self.temp,
            }
        features = features[: len(batch.global_crops)].detach().float()
        return Outcome(cross_entropy(targets, log_probs), features, measures=measures)
