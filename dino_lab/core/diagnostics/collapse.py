"""The verdict: whether targets have collapsed, to what, and since when. Pure; no torch."""

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from dino_lab.core import records
from dino_lab.core.settings import Settings

Kind = Literal["none", "uniform", "one_prototype", "constant"]


class Collapse(Settings):
    """Bounds of the verdict; those on entropies are fractions of ln K, so that they hold for any head."""

    uniform_entropy: float = Field(default=0.98, gt=0, le=1)
    """Teacher entropy / ln K above which targets are uniform, if KL is low too."""
    one_prototype_entropy: float = Field(default=0.02, ge=0, lt=1)
    """Teacher entropy / ln K and marginal entropy / ln K below which all targets are one prototype."""
    low_kl: float = Field(default=0.02, gt=0)
    """KL / ln K below which the student has nothing left to learn from its teacher."""
    same_targets: float = Field(default=0.01, ge=0, lt=1)
    """(Marginal entropy - teacher entropy) / ln K, the mutual information of image and prototype, below which all
    images have the same target; counted once it has been above."""
    constant_std: float = Field(default=0.02, ge=0, lt=1)
    """Std of outputs below which all images have the same, where outputs are vectors and not distributions."""
    certain_steps: int = Field(default=40, ge=0)
    """Steps for which the bounds must be crossed without a break before the verdict is given."""

    @model_validator(mode="after")
    def _bounds_apart(self) -> "Collapse":
        if self.one_prototype_entropy >= self.uniform_entropy:
            raise ValueError(
                f"collapse.one_prototype_entropy = {self.one_prototype_entropy}: "
                f"must be below collapse.uniform_entropy = {self.uniform_entropy}"
            )
        return self


@dataclass(frozen=True)
class Verdict:
    """The kind of collapse so far, and the stretch that it is judged on: a fold over records."""

    kind: Kind = "none"
    onset_step: int | None = None
    suspected: Kind = "none"
    suspected_since: int = 0
    has_told_apart: bool = False
    """Whether targets have ever been different for different images."""

    def after(self, step: int, values: dict[str, float], *, out_dim: int | None, bounds: Collapse) -> "Verdict":
        """The verdict with one more record.

        A collapse that ends is taken back, one that changes its kind keeps its date.
        `out_dim` is K of the targets, None for a method that has none.
        """
        if out_dim is None:
            same = values.get(records.OUTPUT_STD, math.inf) <= bounds.constant_std
            sign: Kind = "constant" if same else "none"
        else:
            same = _information(values, out_dim) <= bounds.same_targets
            sign = _fixed_point(values, out_dim=out_dim, bounds=bounds)
            # Where it has never been otherwise, training has not begun rather than collapsed.
            sign = "constant" if sign == "none" and same and self.has_told_apart else sign
        since = self.suspected_since if "none" not in (sign, self.suspected) else step
        certain = step - since >= bounds.certain_steps and sign != "none"
        return Verdict(
            kind=sign if certain else "none",
            onset_step=since if certain else None,
            suspected=sign,
            suspected_since=since,
            has_told_apart=self.has_told_apart or not same,
        )


def _information(values: dict[str, float], out_dim: int) -> float:
    """How much a target says of its image, as a fraction of ln K."""
    return (values[records.MARGINAL_ENTROPY] - values[records.TEACHER_ENTROPY]) / math.log(out_dim)


def _fixed_point(values: dict[str, float], *, out_dim: int, bounds: Collapse) -> Kind:
    """Whether this record alone looks like one of the two states that DINO falls into and stays in.

    Uniform: every target is flat, and the student has followed. One prototype: every target is one-hot, and
    on the same prototype (a sharp healthy teacher has low entropy, but a high one of the mean target).
    """
    scale = math.log(out_dim)
    entropy = values[records.TEACHER_ENTROPY] / scale
    if values[records.KL] / scale > bounds.low_kl:
        return "none"
    if entropy >= bounds.uniform_entropy:
        return "uniform"
    if max(entropy, values[records.MARGINAL_ENTROPY] / scale) <= bounds.one_prototype_entropy:
        return "one_prototype"
    return "none"
