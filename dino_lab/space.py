"""Searches: a space over knobs, and what a suggestion out of it makes of a baseline. Pure: nothing is suggested here.

Optuna suggests, in `orchestration.search`; whatever has its `suggest_*` methods can.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args

from dino_lab.ablation import Changes, LabelledTrial, resolve
from dino_lab.core import records
from dino_lab.core.settings import KnobError

if TYPE_CHECKING:
    from dino_lab.core.trial import Trial

Sampler: TypeAlias = Literal["tpe", "gp", "nsga2", "random", "grid"]
Pruner: TypeAlias = Literal["none", "asha", "median"]
Direction: TypeAlias = Literal["maximize", "minimize"]
Knobs: TypeAlias = str | tuple[str, ...]
"""A knob, or several that take the same value; the first one names it."""
Level: TypeAlias = Mapping[Knobs, Any]
"""What an option of `OneOf` sets: values, and distributions of knobs that are searched only where it is chosen."""


class Suggest(Protocol):
    """A trial of Optuna, or what stands for one."""

    @property
    def number(self) -> int: ...
    @property
    def params(self) -> dict[str, Any]: ...
    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Between:
    """Numbers from low to high, both included; whole ones if both bounds are."""

    low: float
    high: float
    log: bool = False
    """Whether equal factors, and not equal differences, are as likely."""
    step: float | None = None
    """Distance of neighbours, by which the range must be divisible; None for any number, and 1 for whole ones."""

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def values(self) -> list[float] | None:
        """All of them; None if they are without number."""
        step = self.step or (1 if self.is_whole else None)
        if step is None:
            return None
        # Without the last bits of repeated sums: 0.3 and not 0.30000000000000004.
        return [round(self.low + i * step, 12) for i in range(round((self.high - self.low) / step) + 1)]

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.is_whole else int | float):
            return False
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return self.low <= value <= self.high and abs(steps - round(steps)) < 1e-8

    def problem(self) -> str | None:
        """What is wrong with it and what is allowed."""
        if not (self.low < self.high and math.isfinite(self.low) and math.isfinite(self.high)):
            return "low must be below high, and both finite"
        if self.log and self.low <= 0:
            return "log needs low above 0"
        if self.step is None:
            return None
        if self.log:
            return "log and step exclude each other"
        if self.is_whole and not isinstance(self.step, int):
            return "the step of whole numbers must be whole"
        if self.step <= 0 or self.high not in self:
            return "step must be above 0 and divide the range from low to high"
        return None


@dataclass(frozen=True)
class OneOf:
    """One of several values, or of several levels by their labels: knobs that are set together, as by those of an axis.

    A level's values may be distributions, of knobs that are searched only where the level is chosen.
    """

    options: Sequence[Any] | Mapping[str, Level]

    @property
    def levels(self) -> Mapping[str, Level]:
        """By label; none if the options are values."""
        return self.options if isinstance(self.options, Mapping) else {}

    @property
    def choices(self) -> list[Any]:
        """What is suggested: labels, or values, as text where they are lists."""
        return [json.dumps(option) if isinstance(option, list | tuple) else option for option in self.options]

    def problem(self) -> str | None:
        """What is wrong with it and what is allowed."""
        if len(self.options) < 2:
            return "needs at least two options"
        labels = [json.dumps(choice) for choice in self.choices]
        if twice := {label for label in labels if labels.count(label) > 1}:
            return f"the option {', '.join(sorted(twice))} is given twice"
        return None


Space: TypeAlias = Mapping[Knobs, Between | OneOf]


@dataclass(frozen=True)
class Search:
    """What varies, what it is judged by, and how long and by whom it is searched.

    Which way an objective is better stands in `core.records`. A trial that has collapsed is stopped, unless
    `collapse.policy` is set otherwise, and counts with the bad value that it has.
    """

    space: Space
    """By knob, or by the name of something that has levels."""
    objectives: Sequence[str] = (records.KNN,)
    """Logged names; with several there is no best trial, but a front of those that no other is better than in all."""
    trials: int | None = None
    """How many are asked for, at most; a grid has as many as it has points."""
    hours: float | None = None
    """How long new ones are asked for, over all sessions together; those that run are not cut off."""
    sampler: Sampler = "tpe"
    pruner: Pruner = "none"
    """What stops trials that are worse than others were at the same step."""
    seed: int = 0
    """Of the sampler, and of every trial."""
    fixed: Changes = field(default_factory=dict)
    """Knobs set for every trial."""

    def __post_init__(self) -> None:
        for name, value in _distributions(self.space):
            if not isinstance(value, Between | OneOf):
                raise KnobError(f"{name} = {value!r}: does not vary; allowed are Between and OneOf")
            if problem := value.problem():
                raise KnobError(f"{name} = {value!r}: {problem}")
        if not self.space:
            raise KnobError("space: nothing varies")
        _check_once(self.space)
        self._check_names()
        for knob in ("seed", *self.fixed):
            if knob in self.knobs or (knob == "seed" and knob in self.fixed):
                raise KnobError(f"{knob}: holds for the whole search, so it cannot be set in space or fixed as well")
        self._check_objectives()
        for name, value, allowed in (("sampler", self.sampler, Sampler), ("pruner", self.pruner, Pruner)):
            if value not in get_args(allowed):
                raise KnobError(f"{name} = {value!r}: allowed are {', '.join(get_args(allowed))}")
        if self.sampler == "grid":
            self._check_grid()
        elif self.trials is None and self.hours is None:
            raise KnobError("budget: set trials, hours, or both")
        if self.trials is not None and self.trials < 1:
            raise KnobError(f"trials = {self.trials}: must be at least 1")
        if self.hours is not None and not self.hours > 0:
            raise KnobError(f"hours = {self.hours}: must be above 0")

    @property
    def distributions(self) -> dict[str, Between | OneOf]:
        """Everything that is ever suggested, by name: the knob, with the level in brackets if it is of one only."""
        return dict(_distributions(self.space))

    @property
    def knobs(self) -> set[str]:
        """All that it may set."""
        return _knobs_of(self.space)

    @property
    def is_conditional(self) -> bool:
        """Whether some knobs are searched only where others have some value."""
        return len(self.distributions) > len(self.space)

    @property
    def directions(self) -> list[Direction]:
        """Which way each objective is better."""
        better = [records.metric(name).better for name in self.objectives]
        return ["maximize" if each == "higher" else "minimize" for each in better]

    @property
    def grid(self) -> dict[str, list[Any]]:
        """The values of each name, if there is a number of them."""
        return {
            name: value.choices if isinstance(value, OneOf) else value.values or []
            for name, value in self.distributions.items()
        }

    def start(self, baseline: Trial, overrides: Changes | None = None) -> Trial:
        """What every trial is made of: the baseline with what holds for all of them; `overrides` have the last word.

        Raises:
            KnobError: a knob that does not exist, or a value that it does not take; an override of what is searched.
        """
        overrides = overrides or {}
        if twice := overrides.keys() & (self.knobs | {"seed"}):
            raise KnobError(
                f"{', '.join(sorted(twice))}: the search sets it itself, so it cannot be set for every trial"
            )
        known = baseline.knobs()
        for name, value in self.distributions.items():
            if name in known and isinstance(value, OneOf) and value.levels:
                raise KnobError(f"{name}: is a knob, which levels set only if they say so; call them something else")
        unknown = dict.fromkeys(knob for knob in self.knobs if knob not in known)
        # Refused by name, with what they may have been meant for.
        return baseline.but({"collapse.policy": "stop", **self.fixed, **overrides, "seed": self.seed, **unknown})

    def changes(self, suggest: Suggest, start: Trial) -> dict[str, Any]:
        """The knobs that a suggestion sets."""
        baseline = start.flat()
        return {knob: resolve(value, baseline, {}) for knob, value in _suggested(self.space, suggest)}

    def labelled(self, suggest: Suggest, start: Trial) -> LabelledTrial:
        """The trial that a suggestion makes.

        Raises:
            KnobError: settings that do not go together.
        """
        changes = self.changes(suggest, start)
        row = self.row(suggest.number, suggest.params)
        return LabelledTrial(row, suggest.number, self.seed, {}, start.but(changes), changes)

    def row(self, number: int, values: Mapping[str, Any]) -> str:
        """What a trial is called: its number and what varies, by initials where these tell knobs apart."""
        short = _short_names(self.distributions)
        return " ".join([f"#{number}", *(f"{short[name]}={_text(values[name])}" for name in short if name in values)])

    def readings(self, settings: Mapping[str, Any], start: Trial) -> list[dict[str, Any]]:
        """The suggestions that set a trial's knobs as they are in these flat settings; none if they lie outside.

        What the space does not set is not looked at. There are several if levels set the same.
        """
        return _readings(self.space, settings, start.flat())

    def _check_names(self) -> None:
        seen: dict[str, Any] = {}
        for name, value in _distributions(self.space):
            if seen.setdefault(name, value) != value:
                raise KnobError(f"{name}: is searched in two ways; call one of the levels something else")

    def _check_objectives(self) -> None:
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise KnobError(f"objectives = {list(self.objectives)}: allowed are logged names, at least one, each once")
        for name in self.objectives:
            try:
                metric = records.metric(name)
            except KeyError:
                allowed = [each.name for each in records.METRICS.values() if each.better != "neither"]
                near = difflib.get_close_matches(name, allowed, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise KnobError(f"objectives: {name!r} is not logged; {hint}known: {', '.join(allowed)}") from None
            if metric.better == "neither":
                raise KnobError(f"objectives: {name!r} is better neither higher nor lower")
        if self.pruner != "none" and len(self.objectives) > 1:
            raise KnobError(f"pruner = {self.pruner!r}: with several objectives only 'none' is allowed")

    def _check_grid(self) -> None:
        if self.is_conditional:
            raise KnobError("sampler = 'grid': no level may have knobs of its own that are searched")
        for name, values in self.grid.items():
            if not values:
                raise KnobError(f"{name} = {self.distributions[name]!r}: sampler = 'grid' needs a step")


def _tuple(knobs: Knobs) -> tuple[str, ...]:
    return (knobs,) if isinstance(knobs, str) else knobs


def _name(knobs: Knobs, label: str | None) -> str:
    """What is suggested is called by its first knob; in a level by the level too, as each has its own distribution."""
    first, *_ = _tuple(knobs)
    return first if label is None else f"{first} ({label})"


def _varies(value: Any) -> bool:
    return isinstance(value, Between | OneOf)


def _distributions(space: Level, label: str | None = None) -> Iterator[tuple[str, Any]]:
    """By name, those of levels after what the levels are of; of a level only what varies."""
    for knobs, value in space.items():
        if label is None or _varies(value):
            yield _name(knobs, label), value
        if isinstance(value, OneOf):
            for each, level in value.levels.items():
                yield from _distributions(level, each)


def _suggested(space: Level, suggest: Suggest, label: str | None = None) -> Iterator[tuple[str, Any]]:
    """Knobs and what they are set to."""
    for knobs, value in space.items():
        name, chosen = _name(knobs, label), value
        if isinstance(value, Between):
            if value.is_whole:
                bounds = int(value.low), int(value.high)
                chosen = suggest.suggest_int(name, *bounds, step=int(value.step or 1), log=value.log)
            else:
                chosen = suggest.suggest_float(name, value.low, value.high, step=value.step, log=value.log)
        elif isinstance(value, OneOf):
            choice = suggest.suggest_categorical(name, value.choices)
            if value.levels:
                yield from _suggested(value.levels[choice], suggest, choice)
                continue
            chosen = list(value.options)[value.choices.index(choice)]
        yield from ((knob, chosen) for knob in _tuple(knobs))


def _readings(
    space: Level, settings: Mapping[str, Any], baseline: Mapping[str, Any], label: str | None = None
) -> list[dict[str, Any]]:
    readings: list[dict[str, Any]] = [{}]
    for knobs, value in space.items():
        found = _readings_of(knobs, value, settings, baseline, label)
        readings = [before | each for before, each in itertools.product(readings, found)]
    return readings


def _readings_of(
    knobs: Knobs, value: Any, settings: Mapping[str, Any], baseline: Mapping[str, Any], label: str | None
) -> list[dict[str, Any]]:
    name = _name(knobs, label)
    if isinstance(value, OneOf) and value.levels:
        return [
            {name: each} | inner
            for each, level in value.levels.items()
            for inner in _readings(level, settings, baseline, each)
        ]
    first, *others = _tuple(knobs)
    if first not in settings or any(settings.get(other) != settings[first] for other in others):
        return []
    there = settings[first]
    if isinstance(value, Between):
        return [{name: there}] if there in value else []
    if isinstance(value, OneOf):
        pairs = zip(value.choices, value.options, strict=True)
        return [{name: choice} for choice, option in pairs if option == there]
    return [{}] if resolve(value, baseline, {}) == there else []


def _knobs_of(space: Level) -> set[str]:
    knobs: set[str] = set()
    for key, value in space.items():
        if isinstance(value, OneOf) and value.levels:
            knobs |= {knob for level in value.levels.values() for knob in _knobs_of(level)}
        else:
            knobs |= set(_tuple(key))
    return knobs


def _check_once(space: Level) -> None:
    """No knob is set by two that may be chosen together."""
    for (key, value), (other_key, other) in itertools.combinations(space.items(), 2):
        if twice := _knobs_of({key: value}) & _knobs_of({other_key: other}):
            raise KnobError(f"{_name(key, None)} and {_name(other_key, None)} both set {', '.join(sorted(twice))}")
    for key, value in space.items():
        if isinstance(value, OneOf) and value.levels:
            if not isinstance(key, str):
                raise KnobError(f"{key}: levels have a single name")
            for level in value.levels.values():
                _check_once(level)


def _short_names(names: Mapping[str, Any]) -> dict[str, str]:
    """By name: the shortest of initials, the last part of the path, and more of it, that no other knob has."""
    knobs = {name: name.partition(" (")[0] for name in names}

    def candidates(knob: str) -> list[str]:
        parts = knob.split(".")
        words = parts[-1].split("_")
        initials = ["".join(word[:1] for word in words)] if len(words) > 1 else []
        return [*initials, *(".".join(parts[i:]) for i in reversed(range(len(parts))))]

    taken = [text for knob in set(knobs.values()) for text in candidates(knob)]
    return {
        name: next((text for text in candidates(knob) if taken.count(text) == 1), knob) for name, knob in knobs.items()
    }


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value)
