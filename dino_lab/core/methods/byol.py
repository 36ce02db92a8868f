"""BYOL: the student predicts the teacher's output of another crop (arXiv:2006.07733); no negatives, no prototypes."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from dino_lab.core.methods.losses import MSE
from dino_lab.core.methods.method import Batch, Outcome, SelfDistillation, Surroundings
from dino_lab.core.networks.backbone import BackboneNetwork
from dino_lab.core.networks.head import MLPHeadSettings, MLPPredictor, PredictorSettings
from dino_lab.core.networks.network import Network
from dino_lab.core.networks.teacher import Momentum, TeacherSettings
from dino_lab.core.schedules import Now
from dino_lab.core.settings import Settings


class BYOL(Settings):
    """BYOL with DINO's crops and backbone, as in the paper's comparison.

    Source: BYOL (arXiv:2006.07733), section 3; DINO (arXiv:2104.14294), Tables 7, 13 and 14.
    """

    kind: Literal["byol"] = "byol"
    """Which method."""
    head: MLPHeadSettings = MLPHeadSettings()
    """Features to outputs, of student and teacher."""
    predictor: PredictorSettings = MLPPredictor()
    """What the student has besides; without it the outputs collapse (DINO's Table 14, row 8)."""
    teacher: TeacherSettings = Momentum()
    """How the teacher follows the student."""

    def build(self, backbone: BackboneNetwork, surroundings: Surroundings) -> "BYOLMethod":
        head = self.head.build(backbone.embed_dim)
        predictor = self.predictor.build(head.projected_dim)
        return BYOLMethod(Network(backbone, head, predictor), self.teacher, surroundings)


class BYOLMethod(SelfDistillation):
    """A student with a predictor, and its teacher without one."""

    def loss(self, batch: Batch, now: Now) -> Outcome:
        """Squared distance of l2-normalised predictions and teacher's outputs, mean over pairs of different crops.

        Departs from the source, which has two crops and the sum of both directions: of two crops this is half of it.
        Batch normalisation of head and predictor sees all crops of a network at once, not one crop after the other.

        Source: BYOL (arXiv:2006.07733), equation 2.
        """
        teacher_outputs, features = self.teacher([batch.global_crops])
        predictions, _ = self.student([batch.global_crops, batch.local_crops])
        outputs = F.normalize(teacher_outputs.float(), dim=-1)
        loss = MSE().between(outputs, F.normalize(predictions.float(), dim=-1))
        measures: dict[str, float | Tensor] = {**self.teacher.measures(now)} if now.measured else {}
        return Outcome(loss, features.float(), outputs=outputs, measures=measures)
