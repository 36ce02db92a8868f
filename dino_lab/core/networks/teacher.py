"""The kinds of teacher: a network that follows the student, each in its way, and gets no gradient."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field
from torch import nn

from dino_lab.core import records
from dino_lab.core.networks.network import Network
from dino_lab.core.networks.weights import load_weights, read_network
from dino_lab.core.schedules import Now, cosine
from dino_lab.core.settings import Settings


class Teacher(nn.Module):
    """A network with the student's architecture, without predictor, gradients and drop path.

    It starts with the student's weights. Batch normalisation uses the batch's own statistics, as in the reference.
    """

    def __init__(self, student: Network) -> None:
        super().__init__()
        self.network = Network(copy.deepcopy(student.backbone), copy.deepcopy(student.head))
        self.network.requires_grad_(False)
        self.network.eval()
        for module in self.network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()

    @torch.no_grad()
    def forward(self, groups: Any) -> Any:
        """Logits and features, as of `Network`."""
        return self.network(groups)

    def follow(self, student: Network, now: Now) -> None:
        """Called once after each optimiser step: moves the network's parameters, and nothing else, in place."""
        raise NotImplementedError

    def measures(self, now: Now) -> dict[str, float]:
        """Scheduled values of this step."""
        return {}

    def networks(self, student: Network) -> dict[str, Network]:
        """Whose features are evaluated, the better one of the paper first; a teacher that was given is not."""
        return {"teacher": self.network, "student": student}


@torch.no_grad()
def move(network: nn.Module, student: nn.Module, weight: float) -> None:
    """network = (1 - weight) * network + weight * student, in place; weight 1 copies and 0 holds, to the bit.

    Parameters only, as in the reference: no buffers. What the student has besides, a predictor, is left out.
    """
    parameters = dict(student.named_parameters())
    ours = dict(network.named_parameters())
    torch._foreach_lerp_(list(ours.values()), [parameters[name] for name in ours], weight)


class Momentum(Settings):
    """The teacher of the paper: an exponential moving average of the student."""

    kind: Literal["momentum"] = "momentum"
    """Which kind of teacher."""
    momentum_teacher: float = Field(default=0.996, ge=0, le=1)
    """Weight of the old teacher in each update, at the start."""
    momentum_teacher_end: float = Field(default=1.0, ge=0, le=1)
    """The same at the end of its cosine."""

    def build(self, student: Network, *, trials_dir: Path) -> Teacher:
        return MomentumTeacher(student, self.momentum_at)

    def momentum_at(self, now: Now) -> float:
        return cosine(now.step, steps=now.steps, start=self.momentum_teacher, end=self.momentum_teacher_end)


class MomentumTeacher(Teacher):
    """teacher = m * teacher + (1 - m) * student after each step.

    Source: DINO (arXiv:2104.14294); main_dino.py, train_one_epoch.
    """

    def __init__(self, student: Network, momentum_at: Callable[[Now], float]) -> None:
        super().__init__(student)
        self._momentum_at = momentum_at

    def follow(self, student: Network, now: Now) -> None:
        move(self.network, student, 1 - self._momentum_at(now))

    def measures(self, now: Now) -> dict[str, float]:
        return {records.MOMENTUM_TEACHER: self._momentum_at(now)}


class StudentCopy(Settings):
    """A teacher with the student's own weights of the same step; the paper's "no momentum"."""

    kind: Literal["student_copy"] = "student_copy"
    """Which kind of teacher."""

    def build(self, student: Network, *, trials_dir: Path) -> Teacher:
        return MomentumTeacher(student, lambda now: 0.0)


class PreviousIteration(Settings):
    """A teacher with the student's weights of one step before."""

    kind: Literal["previous_iteration"] = "previous_iteration"
    """Which kind of teacher."""

    def build(self, student: Network, *, trials_dir: Path) -> Teacher:
        return PreviousIterationTeacher(student)


class PreviousIterationTeacher(Teacher):
    """In step t it holds the weights with which the student began step t - 1; in the first, those of the start.

    Source: DINO (arXiv:2104.14294), section 5.1 and Figure 6.
    """

    def __init__(self, student: Network) -> None:
        super().__init__(student)
        self.student_now = copy.deepcopy(self.network)

    def follow(self, student: Network, now: Now) -> None:
        move(self.network, self.student_now, 1.0)
        move(self.student_now, student, 1.0)


class PreviousEpoch(Settings):
    """A teacher with the weights that the student had at the end of the epoch before."""

    kind: Literal["previous_epoch"] = "previous_epoch"
    """Which kind of teacher."""

    def build(self, student: Network, *, trials_dir: Path) -> Teacher:
        return PreviousEpochTeacher(student)


class PreviousEpochTeacher(Teacher):
    """A copy of the student, made at the end of each epoch; the weights of the start in the first.

    Source: DINO (arXiv:2104.14294), section 5.1 and Figure 6.
    """

    def follow(self, student: Network, now: Now) -> None:
        if now.ends_epoch:
            move(self.network, student, 1.0)


class Frozen(Settings):
    """A trained teacher that does not move: distillation of one DINO network into another."""

    kind: Literal["frozen"] = "frozen"
    """Which kind of teacher."""
    checkpoint: str = Field(min_length=1)
    """Its weights: a file, or the id of a finished trial of the same lab. Backbone and head are the student's."""

    def build(self, student: Network, *, trials_dir: Path) -> Teacher:
        """Reads the weights.

        Raises:
            ValueError: there is no such checkpoint, or it is of another architecture.
        """
        return FrozenTeacher(student, read_network(self.checkpoint, trials_dir), source=self.checkpoint)


class FrozenTeacher(Teacher):
    """Holds the weights it was given."""

    def __init__(self, student: Network, weights: dict[str, torch.Tensor], *, source: str) -> None:
        super().__init__(student)
        load_weights(self.network, weights, source=source)

    def follow(self, student: Network, now: Now) -> None:
        """Stays."""

    def networks(self, student: Network) -> dict[str, Network]:
        return {"student": student}


TeacherSettings: TypeAlias = Annotated[
    Momentum | StudentCopy | PreviousIteration | PreviousEpoch | Frozen, Field(discriminator="kind")
]
