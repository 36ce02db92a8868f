"""The verdict: whether a trial has collapsed, to what, since when, and by which signals. Pure; no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, cast

from pydantic import Field, model_validator

from dino_lab.core import records
from dino_lab.core.settings import Settings

Kind: TypeAlias = Literal[
    "none", "not_started", "uniform", "one_prototype", "few_prototypes", "constant", "dimensional", "diverged"
]


class Collapse(Settings):
    """Bounds of the verdict, on entropies as fractions of ln K so that they hold for any head; and what follows."""

    uniform_entropy: float = Field(default=0.99, gt=0, le=1)
    """Teacher entropy / ln K above which targets are uniform, if KL is low too."""
    one_prototype_entropy: float = Field(default=0.02, ge=0, lt=1)
    """Entropy / ln K of a batch's mean target below which all targets are one prototype, if KL is low too."""
    low_kl: float = Field(default=0.02, gt=0)
    """KL / ln K below which the student has nothing left to learn from its teacher."""
    same_targets: float = Field(default=0.01, ge=0, lt=1)
    """Mutual information of image and prototype / ln K below which all images have the same target."""
    few_prototypes: float = Field(default=3.0, ge=1)
    """Perplexity of a batch's mean target below which few prototypes are used, if K is four times as large."""
    few_dimensions: float = Field(default=1.5, ge=1)
    """Effective rank of outputs below which they lie in few dimensions."""
    constant_std: float = Field(default=0.1, ge=0, lt=1)
    """Std of outputs below which all images have the same, where outputs are vectors and not distributions."""
    unmoved: float = Field(default=0.3, gt=0)
    """Relative change of a rank or a std up to which it is still where it began."""
    certain_steps: int = Field(default=40, ge=0)
    """Steps for which there must be signs before a collapse is called, and over which they are counted; and for which a
    network must stand still, or move, before that is said."""
    certain_fraction: float = Field(default=0.02, ge=0, lt=1)
    """The same as a fraction of the run, where that is more: what is slow to start in a long run is not collapsed."""
    policy: Literal["record", "stop"] = "record"
    """Whether a collapse is recorded, or ends the trial."""
    after_steps: int = Field(default=100, ge=0)
    """Steps from its first sign, of whatever kind, after which a collapse ends the trial, with policy = 'stop'."""

    @model_validator(mode="after")
    def _bounds_apart(self) -> "Collapse":
        if self.one_prototype_entropy >= self.uniform_entropy:
            raise ValueError(
                f"collapse.one_prototype_entropy = {self.one_prototype_entropy}: "
                f"must be below collapse.uniform_entropy = {self.uniform_entropy}"
            )
        return self

    def over(self, steps: int) -> "Collapse":
        """These bounds for a run of so many steps."""
        return self.model_copy(
            update={"certain_steps": max(self.certain_steps, math.ceil(self.certain_fraction * steps))}
        )

    def stops(self, step: int, verdict: "Verdict") -> bool:
        """Whether a trial with this verdict ends here."""
        if self.policy == "record" or verdict.kind not in records.COLLAPSES or verdict.first_sign is None:
            return False
        return step - verdict.first_sign[1] >= self.after_steps


@dataclass(frozen=True)
class Crossed:
    """A signal that is past its bound."""

    signal: str
    """A logged name, or what is made of one."""
    value: float
    relation: Literal["<=", ">="]
    bound: float

    def __str__(self) -> str:
        return f"{self.signal} {self.value:.4g} {self.relation} {self.bound:.4g}"


@dataclass(frozen=True)
class Sign:
    """What one record looks like, and why."""

    kind: Kind
    evidence: tuple[Crossed, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The kind of collapse so far, and what it is judged on: a fold over records."""

    kind: Kind = "none"
    onset_step: int | None = None
    left: tuple[tuple[Kind, int, int], ...] = ()
    """Collapses that were called and left: kind, first and last step."""
    suspected: Mapping[Kind, tuple[int, float]] = field(default_factory=dict)
    """Kinds with a sum: since which step, and the sum, in steps."""
    first_sign: tuple[Kind, int] | None = None
    """What the first record looked like since when any kind has been suspected, and its step."""
    leaving_since: int | None = None
    """Since when there has been no sign."""
    step: int | None = None
    """Of the last record."""
    has_been_sharp: bool = False
    """Whether targets have ever not been flat, or the student had still to follow them."""
    started: Mapping[str, float] | None = None
    """Ranks and stds of the first record, those that could become less."""
    started_step: int = 0
    moving: bool = False
    """Whether one of them was elsewhere in the last record."""
    moving_since: int = 0
    """Since when that has been so, or has not."""
    has_moved: bool = False

    def after(self, step: int, values: Mapping[str, float], *, bounds: Collapse) -> "Verdict":
        """The verdict with one more record; a record without a loss, that of the untrained network, changes nothing.

        Each kind has a cumulative sum, as of Page (Continuous inspection schemes, Biometrika 1954): a record that looks
        like it adds the steps since the record before, up to `certain_steps`; any other takes more than that away. A
        kind is suspected from when its sum leaves zero, which is its date, until it is back there. Once any has been
        suspected for `certain_steps` a collapse is called, by the kind with the largest sum. It is taken back when none
        is suspected any more, and stays among what was left.
        """
        if records.LOSS not in values:
            return self
        if not math.isfinite(values[records.LOSS]):
            return replace(self, kind="diverged", onset_step=self.onset_step if self.kind == "diverged" else step)
        sign = self.sign(values, bounds=bounds).kind
        return self._shows(step, values, bounds)._suspects(step, sign, bounds)._called(step, sign, bounds)

    def sign(self, values: Mapping[str, float], *, bounds: Collapse) -> Sign:
        """What a record looks like after those before, whether or not it has for long."""
        if _has_targets(values):
            return _of_targets(values, bounds)
        std = values.get(records.OUTPUT_STD, math.nan)
        if std <= bounds.constant_std:
            return Sign("constant", (Crossed(records.OUTPUT_STD, std, "<=", bounds.constant_std),))
        return _few_dimensions(values, bounds)

    def _suspects(self, step: int, sign: Kind, bounds: Collapse) -> "Verdict":
        """Takes in what the record looks like."""
        passed = 0 if self.step is None else step - self.step
        suspected: dict[Kind, tuple[int, float]] = {}
        for kind in _COLLAPSES:
            since, before = self.suspected.get(kind, (step, 0.0))
            same = kind in _SAME_TARGETS and sign in _SAME_TARGETS
            if sign == kind or (same and kind == "constant"):
                suspected[kind] = since, min(before + passed, bounds.certain_steps)
            elif (after := before - _ABSENCE * passed / (2 if same else 1)) > 0:
                suspected[kind] = since, after
        first = (sign, step) if self.first_sign is None and sign != "none" else self.first_sign
        leaving = None if sign != "none" else step if self.leaving_since is None else self.leaving_since
        return replace(
            self, step=step, suspected=suspected, first_sign=first if suspected else None, leaving_since=leaving
        )

    def _likeliest(self) -> Kind:
        """The suspected kind with the largest sum, and of the same target for all images the narrowest that fits."""
        sums = {kind: each for kind, (_, each) in self.suspected.items()}
        kind = max(sums, key=lambda each: sums[each])
        if kind not in _SAME_TARGETS:
            return kind
        narrow: list[Kind] = [each for each in _NARROW if each in sums and sums[each] >= _ALIKE * sums["constant"]]
        return narrow[0] if len(narrow) == 1 else "constant"

    def _shows(self, step: int, values: Mapping[str, float], bounds: Collapse) -> "Verdict":
        """Takes in whether there is anything that could collapse: targets that are not flat, and movement."""
        # Outputs that are no distributions cannot be flat.
        sharp = not _has_targets(values) or _entropy(values) < bounds.uniform_entropy or _kl(values) > bounds.low_kl
        seen = replace(self, has_been_sharp=self.has_been_sharp or sharp)
        shown = {name: values[name] for name in _GEOMETRY if math.isfinite(values.get(name, math.nan))}
        if seen.started is None:
            # Whoever shows no geometry, or the same for all images from the start, is not known to stand still.
            starts = {name: value for name, value in shown.items() if shown.get(_GEOMETRY[name], 1.0) > _SAME_STD}
            return replace(seen, started=starts, started_step=step, moving_since=step, has_moved=not starts)
        # What is no number any more is elsewhere too.
        stays = (abs(shown.get(name, math.inf) - at) <= bounds.unmoved * at for name, at in seen.started.items())
        moving = not all(stays)
        since = seen.moving_since if moving == seen.moving else step
        moved = moving and step - since >= bounds.certain_steps
        return replace(seen, moving=moving, moving_since=since, has_moved=seen.has_moved or moved)

    def _called(self, step: int, sign: Kind, bounds: Collapse) -> "Verdict":
        """The verdict on what was taken in."""
        certain = bounds.certain_steps
        if not (self.has_moved and self.has_been_sharp):
            still = not self.moving and step - self.moving_since >= certain
            flat = not self.has_been_sharp and step - self.started_step >= certain
            if self.kind == "not_started" or still or flat:
                return replace(self, kind="not_started", onset_step=self.started_step)
            return replace(self, kind="none", onset_step=None)
        is_collapse = self.kind in _COLLAPSES
        if is_collapse and self.suspected and sign == "none":
            return self
        if self.first_sign and sign != "none" and (is_collapse or step - self.first_sign[1] >= certain):
            kind = self._likeliest()
            return replace(self, kind=kind, onset_step=self.suspected[kind][0])
        left = ((self.kind, self.onset_step, self.leaving_since),) if is_collapse else ()
        return replace(self, kind="none", onset_step=None, left=(*self.left, *left))


_COLLAPSES = cast(tuple[Kind, ...], records.COLLAPSES)
_NARROW: tuple[Kind, ...] = ("uniform", "one_prototype")
_SAME_TARGETS: tuple[Kind, ...] = (*_NARROW, "constant")
"""Kinds whose images all have the same target; a record of a narrow one is one of `constant` too."""
_ABSENCE = 1.5
"""Steps that a step away takes from a sum, half as many while the target is still the same for all images. After two
thirds of `certain_steps` away a kind that comes back is dated anew, as readers of curves do (experiments/README.md,
the verdict beside readers)."""
_ALIKE = 0.75
"""Share of the sum of `constant` with which a narrow kind, if it is the only one, still names a collapse."""
_GEOMETRY = {
    records.EMBEDDING_RANK: records.EMBEDDING_STD,
    records.EMBEDDING_STD: records.EMBEDDING_STD,
    records.OUTPUT_RANK: records.OUTPUT_STD,
    records.OUTPUT_STD: records.OUTPUT_STD,
}
"""What shows whether a network moves, each with the std of what it is measured on."""
_SAME_STD = 0.01
"""Std up to which all images have the same features, or outputs: a rank of these means nothing."""


def _has_targets(values: Mapping[str, float]) -> bool:
    return records.TEACHER_ENTROPY in values and records.PROTOTYPES_NUMBER in values


def _information(values: Mapping[str, float]) -> float:
    """How much a target says of its image, as a fraction of ln K."""
    return values[records.MUTUAL_INFORMATION] / math.log(values[records.PROTOTYPES_NUMBER])


def _entropy(values: Mapping[str, float]) -> float:
    """Of the teacher's targets, as a fraction of ln K."""
    return values[records.TEACHER_ENTROPY] / math.log(values[records.PROTOTYPES_NUMBER])


def _kl(values: Mapping[str, float]) -> float:
    """Of student and teacher, as a fraction of ln K."""
    return values[records.KL] / math.log(values[records.PROTOTYPES_NUMBER])


def _of_targets(values: Mapping[str, float], bounds: Collapse) -> Sign:
    """The states that self-distillation falls into and stays in, the narrowest first.

    Uniform: every target is flat, and the student has followed. One prototype: every target is one-hot, and on the same
    prototype (a sharp healthy teacher has low entropy, but a high one of the mean target). Few: the same of two or
    three. Constant: the target is the same for all images, but wanders, and the student does not catch up.
    """
    prototypes = values[records.PROTOTYPES_NUMBER]
    entropy, kl, information = _entropy(values), _kl(values), _information(values)
    of_mean = entropy + information
    followed = Crossed("KL / ln K", kl, "<=", bounds.low_kl)
    if kl <= bounds.low_kl and entropy >= bounds.uniform_entropy:
        return Sign("uniform", (Crossed("teacher entropy / ln K", entropy, ">=", bounds.uniform_entropy), followed))
    if kl <= bounds.low_kl and of_mean <= bounds.one_prototype_entropy:
        crossed = Crossed("entropy of the mean target / ln K", of_mean, "<=", bounds.one_prototype_entropy)
        return Sign("one_prototype", (crossed, followed))
    if information <= bounds.same_targets:
        return Sign("constant", (Crossed("mutual information / ln K", information, "<=", bounds.same_targets),))
    perplexity = prototypes**of_mean
    if perplexity <= bounds.few_prototypes <= prototypes / 4:
        return Sign(
            "few_prototypes", (Crossed("perplexity of the mean target", perplexity, "<=", bounds.few_prototypes),)
        )
    return _few_dimensions(values, bounds)


def _few_dimensions(values: Mapping[str, float], bounds: Collapse) -> Sign:
    rank = values.get(records.OUTPUT_RANK, math.nan)
    if rank <= bounds.few_dimensions:
        return Sign("dimensional", (Crossed(records.OUTPUT_RANK, rank, "<=", bounds.few_dimensions),))
    return Sign("none")
