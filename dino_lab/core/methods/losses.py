"""How the student is compared with its teacher: each loss is a mean over pairs of a global crop and a different crop.

The first G of the V crops are the teacher's own. All of them but InfoNCE need one product for a student's crop
however many teachers it has, since what it is compared with is summed first.
"""

from typing import Annotated, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from dino_lab.core.distributed import gather, rank
from dino_lab.core.schedules import linear_warmup
from dino_lab.core.settings import Settings


def pairs_number(globals_number: int, crops_number: int) -> int:
    """G (V - 1): every global crop with every crop but itself."""
    return globals_number * (crops_number - 1)


def mean_product(targets: Float[Tensor, "G B K"], outputs: Float[Tensor, "V B K"]) -> Float[Tensor, ""]:
    """Mean of targets . outputs over images and pairs of different crops.

    for v in crops:    sum += (sum_{g != v} targets[g]) . outputs[v]
    """
    globals_number, images, _ = targets.shape
    total = targets.sum(dim=0)
    products = outputs.new_zeros(())
    for crop, crop_outputs in enumerate(outputs):
        others = total - targets[crop] if crop < globals_number else total
        products = products + (others * crop_outputs).sum()
    return products / (pairs_number(globals_number, len(outputs)) * images)


def cross_entropy(targets: Float[Tensor, "G B K"], log_probs: Float[Tensor, "V B K"]) -> Float[Tensor, ""]:
    """Mean of -sum_k targets log_probs, in nats.

    Source: main_dino.py, DINOLoss.forward.
    """
    return -mean_product(targets, log_probs)


@torch.no_grad()
def kl_divergence(targets: Float[Tensor, "G B K"], log_probs: Float[Tensor, "V B K"]) -> Float[Tensor, ""]:
    """Mean of KL(targets || probs) over the pairs of `cross_entropy`, in nats. Targets may be one-hot.

    Not by subtracting the entropy from the loss, so that loss = entropy + KL is a check of all three.
    """
    divergences = [
        F.kl_div(crop_log_probs, crop_targets, reduction="sum")
        for g, crop_targets in enumerate(targets)
        for v, crop_log_probs in enumerate(log_probs)
        if g != v
    ]
    return torch.stack(divergences).sum() / (len(divergences) * log_probs.shape[1])


@torch.no_grad()
def agreement(targets: Float[Tensor, "G B K"], log_probs: Float[Tensor, "V B K"]) -> Float[Tensor, ""]:
    """Fraction of images and pairs of different crops in which teacher and student have the same largest prototype."""
    theirs, ours = targets.argmax(dim=-1), log_probs.argmax(dim=-1)
    alike = [(chosen == ours[v]).float() for g, chosen in enumerate(theirs) for v in range(len(ours)) if g != v]
    return torch.stack(alike).mean()


@torch.no_grad()
def entropy(targets: Float[Tensor, "*B K"]) -> Float[Tensor, ""]:
    """Mean entropy, in nats; 0 for one-hot targets, ln K for uniform ones."""
    return torch.special.entr(targets).sum(dim=-1).mean()  # type: ignore[no-any-return]


class CrossEntropy(Settings):
    """The paper's loss: cross-entropy of two softmaxes, the teacher's sharper than the student's."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    """Which loss."""
    student_temp: float = Field(default=0.1, gt=0)
    """Temperature of the student's softmax."""
    sharpening: bool = True
    """Gives the teacher a temperature of its own; False gives it the student's. Against uniform collapse."""
    teacher_temp: float = Field(default=0.04, ge=0)
    """Temperature of the teacher's softmax after its warm-up, 0 for arg-max. The reference advises against more than
    0.07."""
    warmup_teacher_temp: float = Field(default=0.04, ge=0)
    """Teacher temperature of the first epoch of the warm-up."""
    warmup_teacher_temp_epochs: int = Field(default=0, ge=0)
    """Epochs from the first teacher temperature to the last."""

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


class MSE(Settings):
    """Squared distance of l2-normalised outputs, as BYOL's; without temperatures there is no sharpening.

    Source: DINO (arXiv:2104.14294), Appendix B; BYOL (arXiv:2006.07733), equation 2.
    """

    kind: Literal["mse"] = "mse"
    """Which loss."""

    def between(self, targets: Float[Tensor, "G B K"], outputs: Float[Tensor, "V B K"]) -> Float[Tensor, ""]:
        """Mean of |targets - outputs|^2 for vectors of length 1: between 0 and 4."""
        return 2 - 2 * mean_product(targets, outputs)


class Cosine(Settings):
    """Dot product of l2-normalised outputs. It is (MSE - 2) / 2: to an optimiser that forgets scale, the same."""

    kind: Literal["cosine"] = "cosine"
    """Which loss."""

    def between(self, targets: Float[Tensor, "G B K"], outputs: Float[Tensor, "V B K"]) -> Float[Tensor, ""]:
        """Mean of -targets . outputs for vectors of length 1: between -1 and 1."""
        return -mean_product(targets, outputs)


class InfoNCE(Settings):
    """Which image of the batch a crop is of, by the cosine of its output with the teacher's.

    Source: CPC (arXiv:1807.03748); SimCLR (arXiv:2002.05709), with the teacher's other images as negatives.
    """

    kind: Literal["info_nce"] = "info_nce"
    """Which loss."""
    temp: float = Field(default=0.2, gt=0)
    """Temperature of the softmax over images; MoCo-v2's."""

    def between(self, targets: Float[Tensor, "G B K"], outputs: Float[Tensor, "V B K"]) -> Float[Tensor, ""]:
        """Mean of -log softmax_j(targets_j . outputs_i / temp) at j = i, in nats; ln B if all targets are alike."""
        images = torch.arange(targets.shape[1], device=targets.device) + rank() * targets.shape[1]
        targets = gather(targets, dim=1)
        # Products in bf16 would be known to some hundredths only, once divided by the temperature.
        with torch.autocast(outputs.device.type, enabled=False):
            losses = [
                F.cross_entropy(crop_outputs @ crop_targets.T / self.temp, images)
                for g, crop_targets in enumerate(targets)
                for v, crop_outputs in enumerate(outputs)
                if g != v
            ]
        return torch.stack(losses).mean()


LossSettings: TypeAlias = Annotated[CrossEntropy | MSE | Cosine | InfoNCE, Field(discriminator="kind")]
