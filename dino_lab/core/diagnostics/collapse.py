"""The verdict: whether a trial has collapsed, to what, since when, and by which signals. Pure; no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from pydantic import Field, model_validator

from dino_lab.core import records
from dino_lab.core.settings import Settings

Kind: TypeAlias = Literal[
    "none", "not_started", "uniform", "one_prototype", "few_prototypes", "constant", "dimensional", "diverged"
]


class Collapse(Settings):
    """Bounds of the verdict, on entropies as fractions of ln K so that they hold for any head; and what follows."""

    uniform_entropy: float = Field(default=0.98, gt=0, le=1)
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
    """Relative change of a rank or a std, seen in two records on end, up to which it is still where it began."""
    certain_steps: int = Field(default=40, ge=0)
    """Steps for which the bounds must be crossed without a break before a collapse is called, and for which they must
    not be before it is taken back."""
    certain_fraction: float = Field(default=0.02, ge=0, lt=1)
    """The same as a fraction of the run, where that is more: what is slow to start in a long run is not collapsed."""
    policy: Literal["record", "stop"] = "record"
    """Whether a collapse is recorded, or ends the trial."""
    after_steps: int = Field(default=100, ge=0)
    """Steps from its onset after which a collapse that is called ends the trial, with policy = 'stop'."""

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

    def stops(self, step: int, verdict: str, onset_step: int | None) -> bool:
        """Whether a trial with this verdict ends here."""
        if self.policy == "record" or verdict not in records.COLLAPSES or onset_step is None:
            return False
        return step - onset_step >= self.after_steps


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
    suspected: Mapping[Kind, tuple[int, int]] = field(default_factory=dict)
    """Kinds that signs have been of, each with its first step and a weight, the kind seen last at the end; empty while
    there is no sign. Signs weigh 1, 2, 3 and so on, so that what it has become decides."""
    signs_number: int = 0
    leaving_since: int | None = None
    """Since when there has been none, in a collapse."""
    has_been_sharp: bool = False
    """Whether targets have ever not been flat, or the student had still to follow them."""
    started: Mapping[str, float] | None = None
    """Ranks and stds of the first record."""
    started_step: int = 0
    moving: bool = False
    """Whether one of them was elsewhere in the last record."""
    has_moved: bool = False

    @property
    def first_sign(self) -> tuple[Kind, int] | None:
        """What a collapse looked like when its signs began, and the step; None while there are none."""
        since = {kind: first for kind, (first, _) in self.suspected.items()}
        return min(since.items(), key=lambda each: each[1], default=None)

    def after(self, step: int, values: Mapping[str, float], *, bounds: Collapse) -> "Verdict":
        """The verdict with one more record; a record without a loss, that of the untrained network, changes nothing.

        A collapse is called by the kind that most of its records look like, the later ones above all, and dated by the
        first of these. One that ends is taken back once it has been away for as long as it took to be called, and stays
        among what was left.
        """
        if records.LOSS not in values:
            return self
        if not math.isfinite(values[records.LOSS]):
            return replace(self, kind="diverged", onset_step=self.onset_step if self.kind == "diverged" else step)
        seen = self._suspects(step, self.sign(values, bounds=bounds).kind)._shows(step, values, bounds)
        return seen._called(step, bounds)

    def sign(self, values: Mapping[str, float], *, bounds: Collapse) -> Sign:
        """What a record looks like after those before, whether or not it has for long."""
        if _has_targets(values):
            return _of_targets(values, bounds)
        std = values.get(records.OUTPUT_STD, math.nan)
        if std <= bounds.constant_std:
            return Sign("constant", (Crossed(records.OUTPUT_STD, std, "<=", bounds.constant_std),))
        return _few_dimensions(values, bounds)

    def _suspects(self, step: int, sign: Kind) -> "Verdict":
        """Takes in what the record looks like."""
        if sign == "none":
            leaving = step if self.leaving_since is None else self.leaving_since
            if self.kind in records.COLLAPSES:
                return replace(self, leaving_since=leaving)
            return self._unsuspected()
        number = self.signs_number + 1
        suspected = dict(self.suspected)
        first, weight = suspected.pop(sign, (step, 0))
        suspected[sign] = first, weight + number
        return replace(self, suspected=suspected, signs_number=number, leaving_since=None)

    def _unsuspected(self) -> "Verdict":
        return replace(self, suspected={}, signs_number=0, leaving_since=None)

    def _shows(self, step: int, values: Mapping[str, float], bounds: Collapse) -> "Verdict":
        """Takes in whether there is anything that could collapse: targets that are not flat, and movement."""
        # Outputs that are no distributions cannot be flat.
        sharp = not _has_targets(values) or _entropy(values) < bounds.uniform_entropy or _kl(values) > bounds.low_kl
        seen = replace(self, has_been_sharp=self.has_been_sharp or sharp)
        shown = {name: values[name] for name in _GEOMETRY if math.isfinite(values.get(name, math.nan))}
        if seen.started is None:
            # Whoever shows no geometry cannot be said to stand still.
            return replace(seen, started=shown, started_step=step, has_moved=not shown)
        # What is no number any more is elsewhere too.
        stays = (abs(shown.get(name, math.inf) - at) <= bounds.unmoved * at for name, at in seen.started.items())
        moving = not all(stays)
        return replace(seen, moving=moving, has_moved=seen.has_moved or (moving and seen.moving))

    def _called(self, step: int, bounds: Collapse) -> "Verdict":
        """The verdict on what was taken in."""
        if self.leaving_since is not None:
            assert self.onset_step is not None
            if step - self.leaving_since < bounds.certain_steps:
                return self
            left = (*self.left, (self.kind, self.onset_step, self.leaving_since))
            return replace(self._unsuspected(), kind="none", onset_step=None, left=left)
        has_started = self.has_moved and self.has_been_sharp
        first = self.first_sign
        if (
            has_started
            and first is not None
            and (self.kind in records.COLLAPSES or step - first[1] >= bounds.certain_steps)
        ):
            # Of equal weight, the one that was seen last.
            kind, (since, _) = max(reversed(list(self.suspected.items())), key=lambda each: each[1][1])
            return replace(self, kind=kind, onset_step=since)
        if not has_started and step - self.started_step >= bounds.certain_steps:
            return replace(self, kind="not_started", onset_step=self.started_step)
        return replace(self, kind="none", onset_step=None)


_GEOMETRY = (records.EMBEDDING_RANK, records.EMBEDDING_STD, records.OUTPUT_RANK, records.OUTPUT_STD)


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
