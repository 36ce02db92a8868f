"""DINO: self-distillation with no labels (arXiv:2104.14294), in the order of its Algorithm 1."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from dino_lab.core import records
from dino_lab.core.methods.method import Batch, Now, Outcome
from dino_lab.core.networks.network import Network
from dino_lab.core.networks.teacher import teacher_of, update_teacher
from dino_lab.core.schedules import linear_warmup
from dino_lab.core.settings import Settings


class DINO(Settings):
    """Temperatures, centring and sharpening of DINO."""

    student_temp: float = Field(default=0.1, gt=0)
    """Temperature of the student's softmax."""
    teacher_temp: float = Field(default=0.04, gt=0)
    """Temperature of the teacher's softmax after its warm-up; the reference advises against more than 0.07."""
    warmup_teacher_temp: float = Field(default=0.04, gt=0)
    """Teacher temperature of the first epoch."""
    warmup_teacher_temp_epochs: int = Field(default=0, ge=0)
    """Epochs from the first teacher temperature to the last."""
    center_momentum: float = Field(default=0.9, ge=0, le=1)
    """Weight of the old centre in its update."""
    centering: bool = True
    """Subtracts the centre from the teacher's logits; against collapse to one prototype."""
    sharpening: bool = True
    """Gives the teacher its own, lower temperature; False uses student_temp. Against uniform collapse."""

    def build(self, student: Network, *, out_dim: int) -> "DINOMethod":
        return DINOMethod(student, settings=self, out_dim=out_dim)

    def teacher_temp_at(self, epoch: int) -> float:
        """The teacher's temperature in this epoch, counted from 0."""
        if not self.sharpening:
            return self.student_temp
        return linear_warmup(
            epoch,
            start=self.warmup_teacher_temp,
            end=self.teacher_temp,
            warmup_epochs=self.warmup_teacher_temp_epochs,
        )


class DINOMethod(nn.Module):
    """A student, its teacher, and the centre of the teacher's logits."""

    center: Float[Tensor, "K"]

    def __init__(self, student: Network, *, settings: DINO, out_dim: int) -> None:
        super().__init__()
        self.settings = settings
        self.student = student
        self.teacher = teacher_of(student)
        self.register_buffer("center", torch.zeros(out_dim))
        self._teacher_logits_mean = self.center

    def loss(self, batch: Batch, now: Now) -> Outcome:
        """Cross-entropy of targets and student over pairs of different crops.

        Remembers the mean of the teacher's logits for `after_step`; the centre itself is not moved here.
        """
        with torch.no_grad():
            teacher_logits, teacher_features = self.teacher([batch.global_crops])
        student_logits, _ = self.student([batch.global_crops, batch.local_crops])

        teacher_logits = teacher_logits.float()
        self._teacher_logits_mean = teacher_logits.mean(dim=(0, 1))
        teacher_temp = self.settings.teacher_temp_at(now.epoch)
        log_targets = ((teacher_logits - self.center) / teacher_temp).log_softmax(dim=-1)
        log_probs = (student_logits.float() / self.settings.student_temp).log_softmax(dim=-1)
        targets = log_targets.exp()
        loss = cross_entropy(targets, log_probs)
        outcome = Outcome(loss, targets, teacher_features.float())
        if not now.measured:
            return outcome
        measures: dict[str, float | Tensor] = {
            records.TEACHER_ENTROPY: -(targets * log_targets).sum(dim=-1).mean(),
            records.KL: kl_divergence(log_targets, log_probs.detach()),
            records.CENTER_NORM: self.center.norm(),
            records.TEACHER_TEMP: teacher_temp,
        }
        return replace(outcome, measures=measures)

    def after_step(self, now: Now) -> None:
        """Moves the teacher toward the student, then the centre toward the logits of this step."""
        update_teacher(self.teacher, self.student, now.momentum_teacher)
        if self.settings.centering:
            self.center.lerp_(self._teacher_logits_mean, 1 - self.settings.center_momentum)


def cross_entropy(targets: Float[Tensor, "G B K"], log_probs: Float[Tensor, "V B K"]) -> Float[Tensor, ""]:
    """Mean of -sum_k targets log_probs over images and pairs of a global crop and a different crop, in nats.

    The first G of the V crops are the teacher's own. The targets that a student crop is compared with are
    summed first, so that a crop costs one product however many teachers it has:

        for v in crops:    loss += -(sum_{g != v} targets[g]) . log_probs[v]

    Source: main_dino.py, DINOLoss.forward.
    """
    globals_number, images, _ = targets.shape
    total = targets.sum(dim=0)
    loss = log_probs.new_zeros(())
    for crop, crop_log_probs in enumerate(log_probs):
        others = total - targets[crop] if crop < globals_number else total
        loss = loss - (others * crop_log_probs).sum()
    return loss / (pairs_number(globals_number, len(log_probs)) * images)


@torch.no_grad()
def kl_divergence(log_targets: Float[Tensor, "G B K"], log_probs: Float[Tensor, "V B K"]) -> Float[Tensor, ""]:
    """Mean of KL(targets || probs) over the pairs of `cross_entropy`, in nats.

    Not by subtracting the entropy from the loss, so that loss = entropy + KL is a check of all three.
    """
    divergences = [
        F.kl_div(crop_log_probs, crop_log_targets, reduction="sum", log_target=True)
        for g, crop_log_targets in enumerate(log_targets)
        for v, crop_log_probs in enumerate(log_probs)
        if g != v
    ]
    return torch.stack(divergences).sum() / (len(divergences) * log_probs.shape[1])


def pairs_number(globals_number: int, crops_number: int) -> int:
    """G (V - 1): every global crop with every crop but itself."""
    return globals_number * (crops_number - 1)
