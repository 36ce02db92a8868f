"""The teacher: a momentum average of the student."""

import copy
from typing import TypeVar

import torch
from pydantic import Field
from torch import nn

from dino_lab.core.schedules import cosine
from dino_lab.core.settings import Settings

NetworkT = TypeVar("NetworkT", bound=nn.Module)


class MomentumTeacher(Settings):
    """The teacher of the paper: an exponential moving average of the student."""

    momentum_teacher: float = Field(default=0.996, ge=0, le=1)
    """Weight of the old teacher in each update, at the start."""
    momentum_teacher_end: float = Field(default=1.0, ge=0, le=1)
    """The same at the end of its cosine."""

    def momentum_at(self, step: int, *, steps: int) -> float:
        return cosine(step, steps=steps, start=self.momentum_teacher, end=self.momentum_teacher_end)


def teacher_of(student: NetworkT) -> NetworkT:
    """A teacher with the student's weights, without gradients and without drop path."""
    teacher = copy.deepcopy(student)
    return teacher.eval().requires_grad_(False)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum_teacher: float) -> None:
    """Move the teacher toward the student, in place: teacher = m * teacher + (1 - m) * student.

    m = 1 leaves the teacher as it is; m = 0 copies the student. Parameters only, as in the reference.

    Source: DINO (arXiv:2104.14294); main_dino.py, train_one_epoch.
    """
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum_teacher)
