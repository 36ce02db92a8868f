"""MoCo-v2: which key is of the same image, among a queue of keys of other images (arXiv:1911.05722, 2003.04297)."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from dino_lab.core.distributed import gather
from dino_lab.core.methods.method import Batch, Outcome, SelfDistillation, Surroundings
from dino_lab.core.networks.backbone import BackboneNetwork
from dino_lab.core.networks.head import MLPHeadSettings
from dino_lab.core.networks.network import Network
from dino_lab.core.networks.teacher import Momentum, TeacherSettings
from dino_lab.core.schedules import Now
from dino_lab.core.settings import Settings


class MoCo(Settings):
    """MoCo-v2 with DINO's crops and backbone, as in the paper's comparison.

    The head has no batch normalisation, as published; DINO's Table 14 counts batch normalisation in it
    (`head.batch_norm`), and there it is not shuffled between devices as the source shuffles a ResNet's.

    Source: MoCo-v2 (arXiv:2003.04297); MoCo (arXiv:1911.05722), Algorithm 1; DINO (arXiv:2104.14294), Tables 7, 13
    and 14.
    """

    kind: Literal["moco"] = "moco"
    """Which method."""
    head: MLPHeadSettings = MLPHeadSettings(out_dim=128, hidden_dim=2048, batch_norm=False)
    """Features to outputs, of student and teacher."""
    teacher: TeacherSettings = Momentum(momentum_teacher=0.999, momentum_teacher_end=0.999)
    """How the teacher follows the student; the source's momentum is constant."""
    temp: float = Field(default=0.2, gt=0)
    """Temperature of the softmax over keys."""
    queue_size: int = Field(default=65536, ge=1)
    """Keys of earlier steps. Where there are more of them than an epoch makes, an image meets keys of its own."""

    def build(self, backbone: BackboneNetwork, surroundings: Surroundings) -> "MoCoMethod":
        head = self.head.build(backbone.embed_dim)
        return MoCoMethod(Network(backbone, head), settings=self, surroundings=surroundings)


def info_nce(
    keys: Float[Tensor, "G B K"], queries: Float[Tensor, "V B K"], queue: Float[Tensor, "N K"], *, temp: float
) -> Float[Tensor, ""]:
    """Mean of -log softmax at a crop's key, among it and the queue, over images and pairs of different crops; in nats.

    With p the product with the key and n that with a row of the queue, both by temp, it is
    -log(e^p / (e^p + sum e^n)) = softplus(log sum e^n - p). The sum is the same for all keys of a crop.
    ln(1 + N) if keys and queue are all alike.

    Source: MoCo (arXiv:1911.05722), equation 1.
    """
    # Products in bf16 would be known to some hundredths only, once divided by the temperature.
    with torch.autocast(queries.device.type, enabled=False):
        negatives = (queries / temp @ queue.T).logsumexp(dim=-1)
    losses = [
        F.softplus(negatives[v] - (crop_queries * crop_keys).sum(dim=-1) / temp)
        for g, crop_keys in enumerate(keys)
        for v, crop_queries in enumerate(queries)
        if g != v
    ]
    return torch.stack(losses).mean()


class MoCoMethod(SelfDistillation):
    """A student, its teacher, and the queue: the teacher's keys of the steps before."""

    queue: Float[Tensor, "N K"]
    pointer: Int64[Tensor, ""]
    """Row of the oldest key, which is the next to be replaced."""

    def __init__(self, student: Network, *, settings: MoCo, surroundings: Surroundings) -> None:
        super().__init__(student, settings.teacher, surroundings)
        self.settings = settings
        self.register_buffer("queue", F.normalize(torch.randn(settings.queue_size, settings.head.out_dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self._keys: list[Tensor] = []

    def loss(self, batch: Batch, now: Now) -> Outcome:
        """InfoNCE of a student's crop with the teacher's key of a different crop, against the queue.

        Remembers the keys for `after_step`: the queue here is that of the steps before. Departs from the source,
        where the first crop alone is a query and the second alone a key.
        """
        teacher_outputs, features = self.teacher([batch.global_crops])
        student_outputs, _ = self.student([batch.global_crops, batch.local_crops])
        keys = F.normalize(teacher_outputs.float(), dim=-1)
        queries = F.normalize(student_outputs.float(), dim=-1)
        self._keys.append(keys)
        loss = info_nce(keys, queries, self.queue, temp=self.settings.temp)
        measures: dict[str, float | Tensor] = {**self.teacher.measures(now)} if now.measured else {}
        return Outcome(loss, features.float(), outputs=keys, measures=measures)

    def after_step(self, now: Now) -> None:
        """Moves the teacher toward the student, and puts this step's keys in the place of the oldest.

        Crop after crop, the images of all parts and ranks together, so that the queue does not depend on their numbers.
        Of more keys than the queue holds, the newest stay.
        """
        self.teacher.follow(self.student, now)
        keys = torch.cat([gather(part, dim=1) for part in self._keys], dim=1).flatten(0, 1)[-len(self.queue) :]
        self._keys.clear()
        rows = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[rows] = keys
        self.pointer.add_(len(keys)).remainder_(len(self.queue))
