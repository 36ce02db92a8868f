"""Search -> Optuna: a study in the lab's journal, which asks for trials and is told what came of them.

Neither Ray nor MLflow is imported here: whoever runs the trials calls `ask`, `report` and `tell`.
"""

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, GPSampler, GridSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FixedTrial, FrozenTrial, TrialState, create_trial

from dino_lab.core.records import COLLAPSES, Record
from dino_lab.core.settings import flatten
from dino_lab.orchestration.folder import End, TrialFolder
from dino_lab.space import Between, OneOf, Pruner, Search

if TYPE_CHECKING:
    from dino_lab.ablation import Changes, LabelledTrial
    from dino_lab.core.trial import Trial

STUDIES = "optuna.log"
"""In the lab folder: all its studies, as `optuna-dashboard lab/optuna.log` shows them."""

_PRUNERS: dict[Pruner, Callable[[int], BasePruner]] = {
    "none": lambda first_step: NopPruner(),
    # Rungs at the first evaluation and at powers of four of it; Optuna's own guess is a hundredth of the run, which
    # would put several rungs before the first evaluation and leave one trial in 64.
    "asha": lambda first_step: SuccessiveHalvingPruner(min_resource=first_step),
    "median": lambda first_step: MedianPruner(),
}
_WITHOUT_VALUES = {"pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
_VAIN_NUMBER = 50
"""Suggestions in a row that made nothing to run, after which the space counts as exhausted."""
_REFUSED_SHOWN = 20
"""MLflow takes tags of 8,000 characters."""


class Study:
    """A search of one baseline, as Optuna knows it over all sessions.

    It is found again by its name, which has the experiment, the baseline, the overrides, and a hash of all that makes
    trials and their values: whoever changes the space or the objectives starts another study, which takes over what
    fits. Trials keep Optuna's numbers.
    """

    def __init__(
        self,
        lab: Path,
        search: Search,
        *,
        name: str,
        baseline_name: str,
        baseline: "Trial",
        overrides: "Changes | None" = None,
        prepare: "Callable[[Trial], Trial]" = lambda trial: trial,
    ) -> None:
        """Opens the study, without a change if it is there.

        Args:
            prepare: What each trial becomes before it can run in this lab, as by what is known of its data.

        Raises:
            ValueError: as `Search.start` and `prepare`; the journal is none of Optuna's.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        # Absolute: Optuna's lock would wait for ever on a relative one that a killed process left.
        self._lab = lab.resolve()
        self._search = search
        self._prepare = prepare
        self.start = search.start(baseline, overrides)
        # A grid knows its points by the numbers of trials, so that it cannot go on with those of another sampler.
        is_grid = search.sampler == "grid"
        asked = repr((prepare(self.start).identity, search.space, list(search.objectives), is_grid))
        changes = [f"{knob}={json.dumps(value)}" for knob, value in sorted((overrides or {}).items())]
        self.name = " ".join([name, baseline_name, *changes, hashlib.sha256(asked.encode()).hexdigest()[:6]])
        self._lab.mkdir(parents=True, exist_ok=True)
        storage = _storage(self._lab / STUDIES)
        if self.name not in optuna.get_all_study_names(storage):
            _cut_torn_line(self._lab / STUDIES)
            optuna.create_study(storage=storage, study_name=self.name, directions=search.directions)
        self._study = optuna.load_study(study_name=self.name, storage=storage)
        # With the same seed a sampler would suggest the same first points once more.
        self._study.sampler = _sampler(search, seed=search.seed + len(self._trials()))
        self._seconds_before: float = self._study.user_attrs.get("seconds", 0.0)
        self._opened = time.monotonic()
        self._running: dict[str, list[optuna.Trial]] = {}
        self._left: list[LabelledTrial] = []
        self._is_exhausted = False

    def begin(self) -> None:
        """Takes up what was before this session; needs the lab to itself.

        Trials that ended without being told are told, those that are still to be run come first from `ask`, and trials
        of other experiments that are points of the space are added.
        """
        _cut_torn_line(self._lab / STUDIES)
        for frozen in self._trials():
            if frozen.state == TrialState.RUNNING:
                labelled = self._open(optuna.Trial(self._study, frozen._trial_id))
                if labelled and labelled.trial.identity not in {each.trial.identity for each in self._left}:
                    self._left.append(labelled)
        for trial_id in list(self._running):
            self.tell(trial_id)
        self._left = [each for each in self._left if each.trial.identity in self._running]
        # A grid comes to each of its points itself.
        if self._search.sampler != "grid":
            self._seed()

    def ask(self) -> "LabelledTrial | None":
        """The next trial to run; None if there is none, see `spent`.

        What was suggested and has ended in this lab before is told at once, and what runs already is told with it. What
        is refused has failed.
        """
        if self._left:
            return self._left.pop(0)
        for _ in range(_VAIN_NUMBER):
            self._count_seconds()
            if self.spent:
                return None
            labelled = self._open(self._study.ask())
            if labelled and len(self._running[labelled.trial.identity]) == 1:
                if not (end := TrialFolder(self._lab, labelled.trial.identity).end()) or not end.is_final:
                    return labelled
                self.tell(labelled.trial.identity)
        self._is_exhausted = True
        return None

    @property
    def spent(self) -> str:
        """Why no new trial is asked for; empty while one is.

        Hours are those in which a session of this study was open, as of its last `ask` or `tell`, whatever ran
        meanwhile. What was taken over from other experiments is no trial of its own.
        """
        limits = [] if self._search.trials is None else [self._search.trials]
        if self._search.sampler == "grid":
            limits.append(math.prod(map(len, self._search.grid.values())))
        asked = sum("seeded" not in frozen.user_attrs for frozen in self._trials())
        if limits and asked >= min(limits):
            return f"{asked} of {min(limits)} trials"
        hours = self._study.user_attrs.get("seconds", 0.0) / 3600
        if self._search.hours is not None and hours >= self._search.hours:
            return f"{hours:.2f} of {self._search.hours:g} hours"
        return f"the last {_VAIN_NUMBER} suggestions were refused or known" if self._is_exhausted else ""

    def report(self, trial_id: str, record: Record) -> bool:
        """Takes in a record of a running trial; returns whether the trial is to be pruned.

        The untrained network says nothing of the settings, the last record prunes nothing, and what has collapsed is
        stopped as that. With several objectives there is nothing to prune by.
        """
        course = self._course([record])
        if not course:
            return False
        judgements = [self._is_worse(trial, course[record.step], record.step) for trial in self._running[trial_id]]
        settings = self._labelled(self._running[trial_id][0]).trial
        ends = record.epoch >= settings.epochs
        collapsed = record.verdict in COLLAPSES and settings.collapse.policy == "stop"
        return any(judgements) and not ends and not collapsed

    def tell(self, trial_id: str) -> None:
        """Tells what came of a trial, by its folder; nothing if it has not ended, or was told before.

        See `_outcome`.
        """
        self._count_seconds()
        folder = TrialFolder(self._lab, trial_id)
        if not (end := folder.end()):
            return
        records = folder.records()
        state, values, error = self._outcome(end, records)
        for trial in self._running.pop(trial_id, []):
            # What nobody reported, as of a trial that had ended before: others are pruned by it.
            for step, value in self._course(records).items():
                _report(trial, value, step)
            for key, fact in _facts(end, records, error).items():
                trial.set_user_attr(key, fact)
            self._study.tell(trial, values, state)

    def labelled(self, first: int = 0) -> "list[LabelledTrial]":
        """The study's trials in the order of their numbers, from this one on; what was refused is none."""
        return [self._labelled(frozen) for frozen in self._trials()[first:] if "trial_id" in frozen.user_attrs]

    def tags(self) -> dict[str, str]:
        """What is to be recorded of the whole study: names and JSON."""
        search = self._search
        refused = [frozen for frozen in self._trials() if "refused" in frozen.user_attrs]
        first = [
            {
                "row": search.row(each.number, each.params),
                "suggested": each.params,
                "error": each.user_attrs["refused"],
            }
            for each in refused[:_REFUSED_SHOWN]
        ]
        space = {name: json.loads(distribution_to_json(each)) for name, each in _distributions(search).items()}
        budget = {"trials": search.trials, "hours": search.hours}
        return {
            "dino_lab.study": self.name,
            "dino_lab.space": json.dumps(space),
            "dino_lab.objectives": json.dumps(list(search.objectives)),
            "dino_lab.search": json.dumps(
                {"sampler": search.sampler, "pruner": search.pruner, "seed": search.seed, **budget}
            ),
            "dino_lab.fixed": json.dumps(dict(search.fixed)),
            "dino_lab.refused": json.dumps({"number": len(refused), "first": first}),
        }

    def tags_of(self, labelled: "LabelledTrial") -> dict[str, str]:
        """What is to be recorded of a trial of the study: names and JSON; its state is Optuna's."""
        frozen = self._trials()[labelled.row_index]
        return {
            "dino_lab.suggested": json.dumps(frozen.params),
            "dino_lab.changes": json.dumps(dict(labelled.changes)),
            "dino_lab.search_state": frozen.state.name,
            "dino_lab.told": json.dumps(frozen.values),
            "dino_lab.seeded": json.dumps("seeded" in frozen.user_attrs),
        }

    def _trials(self) -> list[FrozenTrial]:
        """As they are in the journal, in the order of their numbers; not to be changed."""
        return self._study.get_trials(deepcopy=False)

    def _open(self, trial: optuna.Trial) -> "LabelledTrial | None":
        """The trial that a suggestion makes, now counted as running; None if its settings are refused."""
        try:
            labelled = self._search.labelled(trial, self.start)
            settings = self._prepare(labelled.trial)
        except ValueError as error:
            trial.set_user_attr("refused", str(error))
            self._study.tell(trial, state=TrialState.FAIL)
            return None
        through = _run_through(settings)
        if (end := TrialFolder(self._lab, through.identity).end()) and end.state == "finished":
            settings = through
        self._running.setdefault(settings.identity, []).append(trial)
        trial.set_user_attr("row", labelled.row)
        trial.set_user_attr("trial_id", settings.identity)
        return self._labelled(trial)

    def _labelled(self, trial: optuna.Trial | FrozenTrial) -> "LabelledTrial":
        """A trial of the study again, from its suggestion and its id."""
        labelled = self._search.labelled(trial, self.start)
        settings = self._prepare(labelled.trial)
        is_own = settings.identity == trial.user_attrs["trial_id"]
        return replace(labelled, trial=settings if is_own else _run_through(settings))

    def _seed(self) -> None:
        """Adds what the lab has of trials that the space could have made."""
        known = {frozen.user_attrs.get("trial_id") for frozen in self._trials()}
        distributions = _distributions(self._search)
        for path in sorted((self._lab / "trials").glob("*/end.json")):
            folder = TrialFolder(self._lab, path.parent.name)
            end = folder.end()
            if path.parent.name in known or not end or (params := self._suggestion_of(folder)) is None:
                continue
            records = folder.records()
            state, values, error = self._outcome(end, records)
            if state == TrialState.COMPLETE:
                facts = {"trial_id": path.parent.name, "row": self._search.row(len(self._trials()), params)}
                trial = create_trial(
                    values=values,
                    params=params,
                    distributions={name: distributions[name] for name in params},
                    intermediate_values=self._course(records),
                    user_attrs={**facts, "seeded": True, **_facts(end, records, error)},
                )
                self._study.add_trial(trial)

    def _suggestion_of(self, folder: TrialFolder) -> dict[str, Any] | None:
        """The suggestion that makes this very trial, but for whether its collapse would have ended it."""
        try:
            flat = dict(flatten(json.loads(folder.trial.read_text())))
        except (FileNotFoundError, ValueError):  # gone or damaged: nobody knows what was trained
            return None
        for params in self._search.readings(flat, self.start):
            try:
                made = self._prepare(self._search.labelled(FixedTrial(params), self.start).trial)
            except ValueError:
                continue
            if folder.path.name in (made.identity, _run_through(made).identity):
                return params
        return None

    def _is_worse(self, trial: optuna.Trial, value: float, step: int) -> bool:
        _report(trial, value, step)
        frozen = self._trials()[trial.number]
        return _PRUNERS[self._search.pruner](min(frozen.intermediate_values)).prune(self._study, frozen)

    def _outcome(self, end: End, records: Sequence[Record]) -> tuple[TrialState, list[float] | None, str | None]:
        """What Optuna is told of a trial that has ended: its state, a value of each objective, and what went wrong.

        The value of a trial that was stopped, or diverged, is bad and not missing. Of what is better higher it is what
        was measured when it was stopped, or 0, the worst there is. What is better lower is had cheaply by ending early:
        it is the worst that any trial of the study has had. No value is ever NaN.
        """
        if end.state in _WITHOUT_VALUES:
            return _WITHOUT_VALUES[end.state], None, end.error
        values, missing = [], []
        for index, (name, direction) in enumerate(zip(self._search.objectives, self._search.directions, strict=True)):
            value = _last(name, records)
            if end.state in ("stopped", "diverged"):
                if direction == "minimize":
                    value = max([*self._had(index), *([] if value is None else [value])], default=None)
                elif value is None or end.state == "diverged":
                    value = 0.0
            if value is None:
                missing.append(name)
            else:
                values.append(value)
        if missing:
            return TrialState.FAIL, None, f"{end.state} without a value of {', '.join(missing)}"
        return TrialState.COMPLETE, values, end.error

    def _had(self, index: int) -> list[float]:
        """This objective's values so far."""
        return [trial.values[index] for trial in self._trials() if trial.state == TrialState.COMPLETE]

    def _course(self, records: Sequence[Record]) -> dict[int, float]:
        """The objective by the step; nothing if there are several, of which Optuna keeps no course."""
        name, *others = self._search.objectives
        values = {record.step: record.values[name] for record in records if record.step > 0 and name in record.values}
        return {} if others else {step: value for step, value in values.items() if math.isfinite(value)}

    def _count_seconds(self) -> None:
        self._study.set_user_attr("seconds", self._seconds_before + time.monotonic() - self._opened)


def _storage(path: Path) -> JournalStorage:
    try:
        return JournalStorage(JournalFileBackend(str(path)))
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error!r}); move it away, and searches begin again with the lab's finished trials"
        ) from None


class _Grid(GridSampler):
    """Does not stop the study after its last point, which only an optimisation loop of Optuna's own can be told."""

    def after_trial(self, *told: Any) -> None:
        pass


def _sampler(search: Search, *, seed: int) -> BaseSampler:
    match search.sampler:
        case "tpe":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                # Knobs of one level are sampled together, apart from those of the others.
                return (
                    TPESampler(seed=seed, group=True, multivariate=True)
                    if search.is_conditional
                    else TPESampler(seed=seed)
                )
        case "gp":
            return GPSampler(seed=seed)
        case "nsga2":
            return NSGAIISampler(seed=seed)
        case "random":
            return RandomSampler(seed=seed)
        case "grid":
            # Its order must stay, since points are known by their places.
            return _Grid(search.grid, seed=search.seed)


def _distributions(search: Search) -> dict[str, BaseDistribution]:
    return {name: _distribution(each) for name, each in search.distributions.items()}


def _distribution(each: Between | OneOf) -> BaseDistribution:
    if isinstance(each, OneOf):
        return CategoricalDistribution(each.choices)
    if each.is_whole:
        return IntDistribution(int(each.low), int(each.high), log=each.log, step=int(each.step or 1))
    return FloatDistribution(each.low, each.high, log=each.log, step=each.step)


def _facts(end: End, records: Sequence[Record], error: str | None) -> dict[str, Any]:
    """What is kept of a trial beside its values."""
    facts: dict[str, Any] = {"state": end.state, "error": error}
    if records:
        facts |= {"verdict": records[-1].verdict, "onset_step": records[-1].onset_step}
    return {key: fact for key, fact in facts.items() if fact is not None}


def _report(trial: optuna.Trial, value: float, step: int) -> None:
    """Once for each step: what a resumed trial reports again is the same, to the bit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial.report(value, step)


def _run_through(trial: "Trial") -> "Trial":
    """The same trial, run to its end whatever becomes of it."""
    return trial.but({"collapse.policy": "record"})


def _last(name: str, records: Sequence[Record]) -> float | None:
    """The last value after the untrained network's, if it is a number."""
    values = [record.values[name] for record in records if record.step > 0 and name in record.values]
    return values[-1] if values and math.isfinite(values[-1]) else None


def _cut_torn_line(path: Path) -> None:
    """A line that a power cut left unfinished would spoil the one that is written after it."""
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
