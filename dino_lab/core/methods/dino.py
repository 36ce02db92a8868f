"""DINO: self-distillation with no labels (arXiv:2104.14294), in the order of its Algorithm 1."""

from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from dino_lab.core import distributed, records
from dino_lab.core.methods.losses import CrossEntropy, LossSettings, agreement, cross_entropy, entropy, kl_divergence
from dino_lab.core.methods.method import Batch, Outcome, SelfDistillation, Surroundings
from dino_lab.core.methods.operations import Centering, OperationSettings, Sinkhorn, SoftmaxBatch
from dino_lab.core.networks.backbone import BackboneNetwork
from dino_lab.core.networks.head import BottleneckHeadSettings, HeadSettings, NoPredictor, PredictorSettings
from dino_lab.core.networks.network import Network
from dino_lab.core.networks.teacher import Momentum, TeacherSettings
from dino_lab.core.schedules import Now
from dino_lab.core.settings import Settings


class DINO(Settings):
    """DINO, and every switch of the paper's ablations."""

    kind: Literal["dino"] = "dino"
    """Which method."""
    head: HeadSettings = BottleneckHeadSettings()
    """Features to logits, of student and teacher."""
    predictor: PredictorSettings = NoPredictor()
    """What the student has besides."""
    teacher: TeacherSettings = Momentum()
    """How the teacher follows the student."""
    loss: LossSettings = CrossEntropy()
    """How the student is compared with the teacher."""
    operation: OperationSettings = Centering()
    """What is done to the teacher's logits first."""

    @model_validator(mode="after")
    def _switches_agree(self) -> Self:
        if isinstance(self.operation, SoftmaxBatch | Sinkhorn):
            if not isinstance(self.loss, CrossEntropy):
                raise ValueError(
                    f"method.operation.kind = {self.operation.kind!r}: makes distributions, which "
                    f"method.loss.kind = {self.loss.kind!r} does not compare; allowed are 'centering' and 'none'"
                )
            temps = {"teacher_temp": self.loss.teacher_temp}
            if self.loss.warmup_teacher_temp_epochs:
                temps["warmup_teacher_temp"] = self.loss.warmup_teacher_temp
            for knob, temp in temps.items():
                if self.loss.sharpening and temp == 0:
                    raise ValueError(
                        f"method.loss.{knob} = 0: is arg-max, which method.operation.kind = {self.operation.kind!r} "
                        "cannot even out; must be greater than 0"
                    )
        return self

    def build(self, backbone: BackboneNetwork, surroundings: Surroundings) -> "DINOMethod":
        head = self.head.build(backbone.embed_dim)
        predictor = self.predictor.build(head.projected_dim)
        return DINOMethod(Network(backbone, head, predictor), settings=self, surroundings=surroundings)


class DINOMethod(SelfDistillation):
    """A student, its teacher, and the centre of the teacher's logits."""

    center: Float[Tensor, "K"]

    def __init__(self, student: Network, *, settings: DINO, surroundings: Surroundings) -> None:
        super().__init__(student, settings.teacher, surroundings)
        self.settings = settings
        self.register_buffer("center", torch.zeros(settings.head.out_dim))
        self._logits_means: list[Tensor] = []

    def loss(self, batch: Batch, now: Now) -> Outcome:
        """The student's loss over pairs of different crops.

        Remembers the mean of the teacher's logits for `after_step`; the centre itself is not moved here.
        """
        teacher_logits, features = self.teacher([batch.global_crops])
        student_logits, _ = self.student([batch.global_crops, batch.local_crops])
        teacher_logits, student_logits, features = teacher_logits.float(), student_logits.float(), features.float()
        self._logits_means.append(teacher_logits.mean(dim=(0, 1)))

        measures: dict[str, float | Tensor] = {}
        if now.measured:
            norm = self.center.norm()
            share = (norm / teacher_logits.norm(dim=-1)).mean()
            measures = {records.CENTER_NORM: norm, records.CENTER_SHARE: share, **self.teacher.measures(now)}
        if isinstance(self.settings.loss, CrossEntropy):
            temps = self.settings.loss
            teacher_temp = temps.teacher_temp_at(now.epoch)
            targets = self.settings.operation.targets(teacher_logits, self.center, teacher_temp)
            log_probs = (student_logits / temps.student_temp).log_softmax(dim=-1)
            if now.measured:
                measures |= {
                    records.TEACHER_ENTROPY: entropy(targets),
                    records.KL: kl_divergence(targets, log_probs.detach()),
                    records.AGREEMENT: agreement(targets, log_probs),
                    records.TEACHER_TEMP: teacher_temp,
                }
            return Outcome(cross_entropy(targets, log_probs), features, targets, teacher_logits, measures)

        outputs = F.normalize(self.settings.operation.shifted(teacher_logits, self.center), dim=-1)
        loss = self.settings.loss.between(outputs, F.normalize(student_logits, dim=-1))
        return Outcome(loss, features, outputs=outputs, measures=measures)

    def after_step(self, now: Now) -> None:
        """Moves the teacher toward the student, then the centre toward the logits of this step."""
        self.teacher.follow(self.student, now)
        logits_mean = distributed.mean(torch.stack(self._logits_means).mean(dim=0))
        self.settings.operation.move_center(self.center, logits_mean)
        self._logits_means.clear()
