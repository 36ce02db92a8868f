"""Masked prediction, BERT's for images: the student names what the teacher sees in patches that it does not see."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor, nn

from dino_lab.core import distributed, records
from dino_lab.core.methods.losses import CrossEntropy, entropy
from dino_lab.core.methods.method import Batch, Outcome, SelfDistillation, Surroundings
from dino_lab.core.methods.operations import Centering
from dino_lab.core.methods.patches import PatchMean, block_masks, hidden_number, places, random_masks, with_patches
from dino_lab.core.networks.backbone import BackboneNetwork, VisionTransformer
from dino_lab.core.networks.head import BottleneckHeadSettings, Head
from dino_lab.core.networks.network import Network
from dino_lab.core.networks.teacher import Momentum, TeacherSettings
from dino_lab.core.schedules import Now
from dino_lab.core.settings import Settings


class Masked(Settings):
    """BERT's masked prediction with iBOT's online tokenizer: a momentum teacher gives each patch its distribution.

    Of BERT: the ratio, and a loss on masked places alone. Left out of BERT: 10 % of the chosen places that get a random
    token and 10 % that stay as they are (here all get the mask token), and next-sentence prediction. Of iBOT: teacher,
    head and centre. Left out of iBOT: its loss of CLS tokens across crops, which is DINO's; images without a mask;
    ratios drawn for each image. Local crops are not used.

    Source: BERT (arXiv:1810.04805), section 3.1; iBOT (arXiv:2111.07832), section 3; main_ibot.py.
    """

    kind: Literal["masked"] = "masked"
    """Which method."""
    mask_ratio: float = Field(default=0.15, gt=0, lt=1)
    """Part of a global crop's patches that the student does not see; rounded to patches, at least one, never all."""
    blocks: bool = False
    """Masks rectangles of neighbouring patches, as BEiT; False masks patches anywhere, as BERT masks words."""
    head: BottleneckHeadSettings = BottleneckHeadSettings(out_dim=8192)
    """Features of a patch to logits, of student and teacher; as many prototypes as iBOT's."""
    teacher: TeacherSettings = Momentum()
    """How the teacher follows the student."""
    loss: CrossEntropy = CrossEntropy()
    """Temperatures of student and teacher."""
    operation: Centering = Centering()
    """How the teacher's logits are centred."""

    def build(self, backbone: BackboneNetwork, surroundings: Surroundings) -> "MaskedMethod":
        """Builds student and teacher.

        Raises:
            ValueError: the backbone has no patches that can be hidden.
        """
        vit, side = with_patches(backbone, surroundings.image_size, method=self.kind)
        student = MaskedStudent(vit, self.head.build(vit.embed_dim))
        return MaskedMethod(student, side=side, settings=self, surroundings=surroundings)


# ---------------------------------------------------------------------------------------------------- the method


class MaskedStudent(Network):
    """Backbone and head, and the mask token, which a teacher needs not."""

    backbone: VisionTransformer

    def __init__(self, backbone: VisionTransformer, head: Head) -> None:
        super().__init__(backbone, head)
        # Two dimensions, since those of one get no weight decay.
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, backbone.embed_dim), std=0.02))

    def masked_logits(
        self, crops: Float[Tensor, "B 3 S S"], hidden: Bool[Tensor, "B N"], masked: Int64[Tensor, "B M"]
    ) -> Float[Tensor, "B M K"]:
        """Logits of the hidden patches, from crops that show the mask token in their place."""
        tokens = self.backbone.encode(self.backbone.tokens(crops, hidden=hidden, mask_token=self.mask_token[0]))
        patches = tokens[:, 1:].take_along_dim(masked[..., None], dim=1)
        return self.head(patches.flatten(0, 1)).unflatten(0, masked.shape)  # type: ignore[no-any-return]


class MaskedMethod(SelfDistillation):
    """A student that sees masked crops, its teacher that sees them whole, and the centre of the teacher's logits."""

    student: MaskedStudent
    center: Float[Tensor, "K"]

    def __init__(self, student: MaskedStudent, *, side: int, settings: Masked, surroundings: Surroundings) -> None:
        super().__init__(student, settings.teacher, surroundings)
        self.settings = settings
        self.side = side
        self.register_buffer("center", torch.zeros(settings.head.out_dim))
        self._logits_means: list[Tensor] = []

    def loss(self, batch: Batch, now: Now) -> Outcome:
        """Cross-entropy of the teacher's and the student's distributions of the same patch, mean over masked patches.

        Remembers the mean of the teacher's logits over all patches, masked or not, for `after_step`; the centre itself
        is not moved here.

        Entropy and KL are means over masked patches, as the loss is, and the targets handed on are those of single
        patches: every crop has equally many masked. The outputs are the mean of each crop's patches.

        Source: iBOT (arXiv:2111.07832), equation 2; main_ibot.py, iBOTLoss.
        """
        crops = batch.global_crops.flatten(0, 1)
        hidden = distributed.own(self._masks(distributed.workers() * len(crops)))
        masked = places(hidden).to(crops.device)
        teacher_logits, features = self._teacher_patches(crops)
        student_logits = self.student.masked_logits(crops, hidden.to(crops.device), masked).float()
        self._logits_means.append(teacher_logits.mean(dim=(0, 1)))

        teacher_temp = self.settings.loss.teacher_temp_at(now.epoch)
        targets = self.settings.operation.targets(
            teacher_logits.take_along_dim(masked[..., None], dim=1), self.center, teacher_temp
        )
        log_probs = (student_logits / self.settings.loss.student_temp).log_softmax(dim=-1)
        loss = -(targets * log_probs).sum(dim=-1).mean()

        measures: dict[str, float | Tensor] = {}
        if now.measured:
            measures = {
                records.CENTER_NORM: self.center.norm(),
                records.TEACHER_ENTROPY: entropy(targets),
                records.KL: F.kl_div(log_probs.detach(), targets, reduction="sum") / masked.numel(),
                records.AGREEMENT: (targets.argmax(dim=-1) == log_probs.argmax(dim=-1)).float().mean(),
                records.TEACHER_TEMP: teacher_temp,
                **self.teacher.measures(now),
            }
        crops_of_images = batch.global_crops.shape[:2]
        return Outcome(
            loss,
            features.unflatten(0, crops_of_images),
            targets=targets.unflatten(0, crops_of_images),
            outputs=teacher_logits.mean(dim=1).unflatten(0, crops_of_images),
            measures=measures,
        )

    def after_step(self, now: Now) -> None:
        """Moves the teacher toward the student, then the centre toward the logits of this step."""
        self.teacher.follow(self.student, now)
        logits_mean = distributed.mean(torch.stack(self._logits_means).mean(dim=0))
        self.settings.operation.move_center(self.center, logits_mean)
        self._logits_means.clear()

    def encoders(self) -> dict[str, nn.Module]:
        teacher = {"teacher": PatchMean(self._teacher_backbone)}
        judged = teacher if "teacher" in self.teacher.networks(self.student) else {}
        return {**judged, "student": PatchMean(self.student.backbone)}

    @property
    def _teacher_backbone(self) -> VisionTransformer:
        backbone = self.teacher.network.backbone
        assert isinstance(backbone, VisionTransformer)
        return backbone

    @torch.no_grad()
    def _teacher_patches(self, crops: Float[Tensor, "B 3 S S"]) -> tuple[Float[Tensor, "B N K"], Float[Tensor, "B D"]]:
        """Logits of every patch, and the mean of the patches' tokens, of crops without a mask."""
        patches = self._teacher_backbone.encode(self._teacher_backbone.tokens(crops))[:, 1:]
        logits = self.teacher.network.head(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
        return logits.float(), patches.float().mean(dim=1)

    def _masks(self, crops: int) -> Bool[Tensor, "B N"]:
        patches = self.side**2
        number = hidden_number(self.settings.mask_ratio, patches)
        if self.settings.blocks:
            return block_masks(crops, self.side, number)
        return random_masks(crops, patches, number)
