"""Where training stands, and schedules as pure functions of it: computed where they are used, not kept in arrays."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Now:
    """Where training stands, and whether a record of this step is due."""

    step: int
    """Optimiser steps done before this one."""
    steps: int
    """Optimiser steps of the whole training."""
    steps_per_epoch: int
    measured: bool

    @property
    def epoch(self) -> int:
        """Epochs done before this step."""
        return self.step // self.steps_per_epoch

    @property
    def ends_epoch(self) -> bool:
        """Whether this is the last step of its epoch."""
        return (self.step + 1) % self.steps_per_epoch == 0


def cosine(
    step: int, *, steps: int, start: float, end: float, warmup_steps: int = 0, warmup_start: float = 0.0
) -> float:
    """Half a cosine from `start` at the end of the warm-up to `end`, after a linear warm-up.

    The warm-up reaches `start` at its last step, and the cosine stops one step short of `end`, both as in the
    reference.

    Source: main_dino.py, utils.cosine_scheduler.
    """
    if step < warmup_steps:
        return warmup_start + (start - warmup_start) * step / max(warmup_steps - 1, 1)
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def linear_warmup(epoch: int, *, start: float, end: float, warmup_epochs: int) -> float:
    """From `start` to `end` in `warmup_epochs` equal values, one an epoch, both ends among them; then `end`.

    Source: main_dino.py, DINOLoss.teacher_temp_schedule (numpy.linspace).
    """
    if epoch >= warmup_epochs:
        return end
    return start + (end - start) * epoch / max(warmup_epochs - 1, 1)
