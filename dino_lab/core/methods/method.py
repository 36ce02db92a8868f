"""What the trainer asks of a method, and what it tells it."""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from jaxtyping import Float
from torch import Tensor

from dino_lab.core.networks.network import Network


class Batch(NamedTuple):
    """The crops of B images: what the teacher sees, and what the student sees besides."""

    global_crops: Float[Tensor, "G B 3 S S"]
    local_crops: Float[Tensor, "L B 3 s s"]


@dataclass(frozen=True)
class Now:
    """Where training stands: scheduled values of this step, and whether a record of it is due."""

    epoch: int
    momentum_teacher: float
    measured: bool


@dataclass(frozen=True)
class Outcome:
    """A loss, what it was made of, and, where a record is due, what it measures of itself."""

    loss: Float[Tensor, ""]
    targets: Float[Tensor, "G B K"]
    teacher_features: Float[Tensor, "G B D"]
    measures: dict[str, float | Tensor] = field(default_factory=dict)


class Method(Protocol):
    """A way to train a student. Only `after_step` changes state; all of it is in `state_dict`."""

    student: Network
    teacher: Network

    def loss(self, batch: Batch, now: Now) -> Outcome: ...

    def after_step(self, now: Now) -> None: ...
