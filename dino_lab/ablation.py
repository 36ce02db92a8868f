"""Ablations: a baseline and what varies, expanded into labelled trials. Pure: nothing is run here."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dino_lab.core.settings import KnobError

if TYPE_CHECKING:
    from dino_lab.core.trial import Trial

Changes = Mapping[str, Any]


class Like(str):
    """In place of a value: the baseline's value of the knob with this path, so that a level fits every scale.

    A number may be multiplied; a whole one is rounded down to a whole one.
    """

    times: float

    def __new__(cls, knob: str, *, times: float = 1.0) -> Like:
        like = super().__new__(cls, knob)
        like.times = times
        return like

    def __repr__(self) -> str:
        return f"Like({str(self)!r}, times={self.times!r})"

    @property
    def meaning(self) -> str:
        return f"the baseline's {self}" + (f" x {self.times:.3g}" if self.times != 1.0 else "")


class TrialOf(str):
    """In place of a value: the id of the trial of the row with this label and the same seed, which comes earlier."""

    @property
    def meaning(self) -> str:
        return f"the trial of {self}"


@dataclass(frozen=True)
class Axis:
    """A name and its levels: what a level is called in tables, and the knobs that it sets together."""

    name: str
    levels: Mapping[str, Changes]

    @classmethod
    def over(cls, knob: str, values: Iterable[Any]) -> Axis:
        """An axis over one knob, each level called by its value.

        Raises:
            KnobError: a value is given twice.
        """
        levels: dict[str, Changes] = {}
        for value in values:
            label = value if isinstance(value, str) else json.dumps(value)
            if label in levels:
                raise KnobError(f"axis {knob!r}: the value {label} is given twice")
            levels[label] = {knob: value}
        return cls(knob, levels)

    @classmethod
    def times(cls, knob: str, multiples: Mapping[str, float]) -> Axis:
        """An axis over multiples of the baseline's value of a knob, by what each level is called."""
        return cls(knob, {label: {knob: Like(knob, times=times)} for label, times in multiples.items()})


@dataclass(frozen=True)
class Row:
    """A row of the table: the level it takes on each axis, and all the knobs that it changes."""

    label: str
    levels: Mapping[str, str]
    changes: Changes


@dataclass(frozen=True)
class LabelledTrial:
    """A trial and its place in the table."""

    row: str
    row_index: int
    seed: int
    levels: Mapping[str, str]
    trial: Trial
    changes: Changes = field(default_factory=dict)
    """What the row sets, each value as it came out."""
    implied: Changes = field(default_factory=dict)
    """Knobs that the baseline has not, or has otherwise, because of a kind or a network's name that the row states."""


@dataclass(frozen=True)
class Ablation:
    """Rows, seeds and, where the paper has them, the study with its numbers.

    Made by `grid` or `one_at_a_time`. The first row is the baseline that the others are compared with.
    """

    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    published: str | None = None
    fixed: Changes = field(default_factory=dict)
    """Knobs set for every row."""
    paper_rows: Mapping[str, str] = field(default_factory=dict)
    """The paper's name of a row, where the row's label is another."""

    def __post_init__(self) -> None:
        labels = {row.label for row in self.rows}
        if unknown := self.paper_rows.keys() - labels:
            raise KnobError(f"paper_rows: no row is called {', '.join(sorted(unknown))}")
        names = [self.paper_rows.get(label, label) for label in labels]
        if twice := {name for name in names if names.count(name) > 1}:
            raise KnobError(f"paper_rows: two rows are the paper's {', '.join(sorted(twice))}")

    @classmethod
    def grid(
        cls,
        axes: Sequence[Axis],
        *,
        seeds: Sequence[int] = (0, 1, 2),
        published: str | None = None,
        fixed: Changes | None = None,
        paper_rows: Mapping[str, str] | None = None,
    ) -> Ablation:
        """Every combination of levels; the last axis varies fastest.

        Raises:
            KnobError: two axes set the same knob.
        """
        for one, other in itertools.combinations(axes, 2):
            if twice := _knobs(one) & _knobs(other):
                raise KnobError(f"axes {one.name!r} and {other.name!r} both set {', '.join(sorted(twice))}")
        rows = []
        for levels in itertools.product(*(axis.levels for axis in axes)):
            chosen = dict(zip((axis.name for axis in axes), levels, strict=True))
            changes = {k: v for axis in axes for k, v in axis.levels[chosen[axis.name]].items()}
            label = levels[0] if len(axes) == 1 else ", ".join(f"{name} {level}" for name, level in chosen.items())
            rows.append(Row(label, chosen, changes))
        return cls(tuple(rows), tuple(seeds), published, fixed or {}, paper_rows or {})

    @classmethod
    def one_at_a_time(
        cls,
        axes: Sequence[Axis],
        *,
        seeds: Sequence[int] = (0, 1, 2),
        published: str | None = None,
        fixed: Changes | None = None,
        paper_rows: Mapping[str, str] | None = None,
    ) -> Ablation:
        """The baseline as it is, then each level of each axis alone."""
        rows = [Row("baseline", {}, {})]
        for axis in axes:
            for level, changes in axis.levels.items():
                label = level if len(axes) == 1 else f"{axis.name} {level}"
                rows.append(Row(label, {axis.name: level}, changes))
        return cls(tuple(rows), tuple(seeds), published, fixed or {}, paper_rows or {})

    @property
    def baseline_row(self) -> str:
        return self.rows[0].label

    def trials(
        self, baseline: Trial, *, overrides: Changes | None = None, seeds: Sequence[int] | None = None
    ) -> list[LabelledTrial]:
        """Rows x seeds, all rows of the first seed first, so that a small table is complete early.

        `overrides` change the baseline of every row.

        Raises:
            KnobError: naming the row, the knob and what is allowed; an override of what a row sets itself would
                make two rows the same, a row's own seed would unpair it from the others, and a row that came to differ
                from the baseline in more than it states would not show what its stated knobs do.
        """
        overrides = overrides or {}
        for row in self.rows:
            for knob, value in row.changes.items():
                if knob == "seed" or (knob in overrides and not isinstance(value, Like)):
                    raise KnobError(f"{knob}: row {row.label!r} sets it itself, so it cannot be set for every row")
        labelled = []
        for seed in self.seeds if seeds is None else seeds:
            start = baseline.but({**self.fixed, **overrides, "seed": seed})
            values, ids = start.flat(), dict[str, str]()
            for index, row in enumerate(self.rows):
                try:
                    changes = {knob: resolve(value, values, ids) for knob, value in row.changes.items()}
                    trial = start.but(changes)
                except KnobError as error:
                    raise KnobError(f"row {row.label!r}: {error}") from None
                implied = _implied(values, trial.flat(), row)
                ids[row.label] = trial.identity
                labelled.append(LabelledTrial(row.label, index, seed, row.levels, trial, changes, implied))
        return labelled


def resolve(value: Any, baseline: Mapping[str, Any], ids: Mapping[str, str]) -> Any:
    """What a value stands for, over the baseline's flat settings and the ids of trials by their rows.

    Raises:
        KnobError: it stands for nothing.
    """
    if isinstance(value, Like):
        if baseline.get(value) is None:
            raise KnobError(f"like {str(value)!r}: the baseline does not set it; set it for every row, if it has one")
        found = baseline[value]
        if value.times == 1.0:
            return found
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise KnobError(f"like {str(value)!r}: {found!r} of the baseline cannot be multiplied")
        # A third of 3 is 1, whatever the last bit says.
        return math.floor(found * value.times + 1e-9) if isinstance(found, int) else found * value.times
    if isinstance(value, TrialOf):
        if value not in ids:
            raise KnobError(f"trial of row {str(value)!r}: no row before it has this label")
        return ids[value]
    return value


def _implied(before: Mapping[str, Any], after: Mapping[str, Any], row: Row) -> dict[str, Any]:
    """What differs in a row without being stated: what comes with a changed kind or name; else the row is refused."""
    differs = {knob for knob in after.keys() - row.changes.keys() if knob not in before or before[knob] != after[knob]}
    # A kind, or a network's name, brings its section along; and a section may be stated whole.
    sections = tuple(f"{knob}." for knob in row.changes.keys() - after.keys())
    for knob in row.changes:
        section, _, last = knob.rpartition(".")
        if last in ("kind", "name") and before.get(knob) != after.get(knob):
            sections += (f"{section}.",)
    if unstated := sorted(knob for knob in differs if not knob.startswith(sections)):
        raise KnobError(f"row {row.label!r}: differs from the baseline in more than it states: {', '.join(unstated)}")
    return {knob: value for knob, value in after.items() if knob in differs}


def meaning(value: Any, resolved: Any = None) -> str:
    """How a level's value is shown: as `--set` takes it, and what it stands for."""
    if isinstance(value, Like):
        return value.meaning if resolved is None else f"{json.dumps(resolved)} ({value.meaning})"
    return value.meaning if isinstance(value, TrialOf) else json.dumps(value)


def _knobs(axis: Axis) -> set[str]:
    return {knob for changes in axis.levels.values() for knob in changes}
