"""What the trainer asks of a method, and what it tells it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dino_lab.core import distributed
from dino_lab.core.networks.network import Network
from dino_lab.core.networks.teacher import TeacherSettings
from dino_lab.core.schedules import Now


class Batch(NamedTuple):
    """The crops of B images: what the teacher sees, what the student sees besides, and the class of each image."""

    global_crops: Float[Tensor, "G B 3 S S"]
    local_crops: Float[Tensor, "L B 3 s s"]
    labels: Int64[Tensor, "B"]

    def split(self, parts: int) -> "list[Batch]":
        """The same images in so many batches of equal size."""
        chunks = (self.global_crops.chunk(parts, 1), self.local_crops.chunk(parts, 1), self.labels.chunk(parts))
        return [Batch(*part) for part in zip(*chunks, strict=True)]


class Surroundings(NamedTuple):
    """What a method may need to know of its trial besides its settings."""

    classes_number: int
    image_size: int
    """Side of a global crop, pixels."""
    global_crops_number: int
    """G."""
    trials_dir: Path
    """Where the other trials of the lab have their folders."""


@dataclass(frozen=True)
class Outcome:
    """A loss, what it was made of, and, where a record is due, what it measures of itself."""

    loss: Float[Tensor, ""]
    features: Float[Tensor, "G B D"]
    """The backbone's, float32, of the teacher if there is one."""
    targets: Float[Tensor, "G B *P K"] | None = None
    """Distributions that the student learns from, of crops or of their patches."""
    outputs: Float[Tensor, "G B K"] | None = None
    """The head's, float32, of the teacher if there is one."""
    measures: dict[str, float | Tensor] = field(default_factory=dict)


class Method(nn.Module, ABC):
    """A way to train a student. Only `after_step` changes state; all of it is in `state_dict`."""

    student: nn.Module
    """What the optimiser moves: with a backbone, and whatever is learned with it."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    @abstractmethod
    def loss(self, batch: Batch, now: Now) -> Outcome:
        """Of one batch, or of one of several parts of a step's batch, which are then called in turn."""

    def after_step(self, now: Now) -> None:
        """After the optimiser has moved the student."""

    def held(self, now: Now) -> Iterable[nn.Parameter]:
        """Parameters of the student that do not move in this step."""
        return ()

    def encoders(self) -> dict[str, nn.Module]:
        """Images to features by role: the student, and the teacher if there is one. The first is the one to judge."""
        return {"student": self.student.get_submodule("backbone")}


class SelfDistillation(Method):
    """A student that learns from a teacher made of itself."""

    student: Network

    def __init__(self, student: Network, teacher: TeacherSettings, surroundings: Surroundings) -> None:
        super().__init__(student)
        self.teacher = teacher.build(student, trials_dir=surroundings.trials_dir)

    def after_step(self, now: Now) -> None:
        """Moves the teacher toward the student."""
        self.teacher.follow(self.student, now)

    def held(self, now: Now) -> Iterable[nn.Parameter]:
        return self.student.head.held(now)

    def encoders(self) -> dict[str, nn.Module]:
        return {role: network.backbone for role, network in self.teacher.networks(self.student).items()}


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of a whole batch from those of its equal parts: means, and what belongs to images side by side.

    Of each part ranks have equal shares; targets, which can be as large as a network, stay those of the rank's own.
    """
    outcomes = [_of_all_ranks(outcome) for outcome in outcomes]
    if len(outcomes) == 1:
        return outcomes[0]

    def beside(tensors: list[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present, dim=1) if present else None

    names = outcomes[0].measures
    return Outcome(
        loss=torch.stack([outcome.loss for outcome in outcomes]).mean(),
        features=torch.cat([outcome.features for outcome in outcomes], dim=1),
        targets=beside([outcome.targets for outcome in outcomes]),
        outputs=beside([outcome.outputs for outcome in outcomes]),
        measures={name: sum(float(each.measures[name]) for each in outcomes) / len(outcomes) for name in names},
    )


def _of_all_ranks(outcome: Outcome) -> Outcome:
    """What was measured on images, and is a tensor, becomes a mean; a number is the same on all ranks."""
    measured = {name: value for name, value in outcome.measures.items() if isinstance(value, Tensor)}
    loss, *means = distributed.means([outcome.loss, *measured.values()])
    return replace(
        outcome,
        loss=loss,
        features=distributed.gather(outcome.features, dim=1),
        outputs=None if outcome.outputs is None else distributed.gather(outcome.outputs, dim=1),
        measures={**outcome.measures, **dict(zip(measured, means, strict=True))},
    )
