"""Supervised training: a classifier on the backbone, taught by labels. What DINO's features are measured against."""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field

from dino_lab.core.methods.method import Batch, Method, Outcome, Surroundings
from dino_lab.core.networks.backbone import BackboneNetwork
from dino_lab.core.networks.head import Classifier
from dino_lab.core.networks.network import Network
from dino_lab.core.schedules import Now
from dino_lab.core.settings import Settings


class Supervised(Settings):
    """Cross-entropy with the labels, on the crops of the lab's other methods.

    Of DeiT's recipe this is the loss alone, without mixup, cutmix, RandAugment, erasing and repeated augmentation: the
    crops are the trial's, so that labels are all that tells this method from DINO.

    Source: DeiT (arXiv:2012.12877), section 6 and Table 9.
    """

    kind: Literal["supervised"] = "supervised"
    """Which method."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Part of each target that is spread evenly over all classes."""

    def build(self, backbone: BackboneNetwork, surroundings: Surroundings) -> "SupervisedMethod":
        if not surroundings.classes_number:
            raise ValueError("method.kind = 'supervised': needs images with classes, and those of data have none")
        head = Classifier(backbone.embed_dim, surroundings.classes_number)
        return SupervisedMethod(Network(backbone, head), label_smoothing=self.label_smoothing)


class SupervisedMethod(Method):
    """A student without a teacher."""

    def __init__(self, student: Network, *, label_smoothing: float) -> None:
        super().__init__(student)
        self.label_smoothing = label_smoothing

    def loss(self, batch: Batch, now: Now) -> Outcome:
        """Cross-entropy of an image's smoothed label with each of its crops, mean over crops, global and local."""
        logits, features = self.student([batch.global_crops, batch.local_crops])
        labels = batch.labels.expand(len(logits), -1)
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), label_smoothing=self.label_smoothing)
        return Outcome(loss, features[: len(batch.global_crops)].detach().float())
