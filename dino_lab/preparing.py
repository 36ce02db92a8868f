"""Data sets before trials: read or fetched where they are trained on, told apart from others where they are looked for.

Whatever is wrong with them is a ValueError that names the knob.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from dino_lab.asking import Asked, find_baseline

if TYPE_CHECKING:
    from dino_lab.core.data.source import Progress
    from dino_lab.core.data.sources import AnyData
    from dino_lab.core.trial import Trial
    from dino_lab.lint import RowsFinding
    from dino_lab.orchestration.search import Study
    from dino_lab.space import Search


def data_dir(lab: Path) -> Path:
    """Where a lab keeps its data sets."""
    return lab.resolve() / "data"


def with_data(asked: Asked, *, progress: "Progress", download: bool) -> Asked:
    """The same, ready to train: see `prepared`; a search with its study."""
    ready = _with_trials(asked, prepared(_trials(asked), asked.lab, progress=progress, download=download))

    def prepare(data: "AnyData") -> "AnyData":
        return data.prepare(data_dir(asked.lab), download=download, progress=progress)

    return replace(ready, study=_study(asked, prepare)) if asked.start else ready


def prepared(trials: "Sequence[Trial]", lab: Path, *, progress: "Progress", download: bool) -> "list[Trial]":
    """Trials whose data is there and read, each data set once; of images in files with their digest, so that trials of
    other images are other trials.

    Args:
        download: Whether a data set that is not there may be fetched.
    """

    def prepare(data: "AnyData") -> "AnyData":
        return data.prepare(data_dir(lab), download=download, progress=progress)

    ready = _each_data_set(trials, prepare)
    for trial in ready:
        number = train_images(trial.data, lab)
        if trial.batch_size > number:
            raise ValueError(f"batch_size = {trial.batch_size}: exceeds the {number} images of data")
    return ready


@functools.cache
def train_images(data: "AnyData", lab: Path) -> int:
    """How many images are trained on; listed once, as many files take long."""
    known = data.known_train_images
    return len(data.build("train", data_dir(lab))) if known is None else known


def findings(rows: "Sequence[tuple[str, Trial]]", *, strict: bool, read_in: Path | None = None) -> "list[RowsFinding]":
    """What the linter has against trials, by their rows.

    Args:
        strict: Refuses warnings, by a ValueError that names their rules.
        read_in: The lab in which the images were read, so that all are counted; None takes numbers that are known.
    """
    from dino_lab import lint  # here, since --help need not wait for pydantic

    def number(trial: "Trial") -> int | None:
        known = lint.about_train_images(trial)
        return train_images(trial.data, read_in) if known is None and read_in is not None else known

    found = lint.over_rows([(row, trial, number(trial)) for row, trial in rows])
    broken = dict.fromkeys(each.finding.rule for each in found if each.finding.severity == "warning")
    if strict and broken:
        raise ValueError(f"--strict: the linter warns of {', '.join(broken)}; without --strict it says why")
    return found


def with_known_data(asked: Asked) -> tuple[Asked, list[str]]:
    """The same, with the digests of images in files that were read before, and why others have none: nothing is read
    now, and trials whose data nobody has read yet have not begun."""
    notes = []

    def identify(data: "AnyData") -> "AnyData":
        try:
            return data.with_digest(data_dir(asked.lab), progress=_not_now)
        except (ValueError, _NotRead) as error:
            notes.append(f"ids of trials are not known before their images are read: {error}")
            return data

    known = _with_trials(asked, _each_data_set(_trials(asked), identify))
    if asked.start:
        from dino_lab.orchestration.search import STUDIES  # Optuna takes a second

        if (asked.lab / STUDIES).exists():
            study = _study(asked, identify)
            known = replace(known, study=study, labelled=study.labelled())
    return known, notes


class _NotRead(Exception):
    """Images would have to be read."""


def _not_now(done: int, total: int) -> None:
    raise _NotRead(f"{total} images have not been read yet; run, train and data do it")


def _study(asked: Asked, change: "Callable[[AnyData], AnyData]") -> "Study":
    """The search's study, each of whose trials is to be trained in this lab, on data as it becomes by this change."""
    from dino_lab.orchestration.search import Study

    known: dict[AnyData, AnyData] = {}

    def prepare(trial: "Trial") -> "Trial":
        (ready,) = _each_data_set([trial], change, known)
        return ready.but({"runtime.data_dir": str(data_dir(asked.lab))})

    return Study(
        asked.lab,
        cast("Search", asked.experiment),
        name=asked.name,
        baseline_name=asked.baseline_name,
        baseline=find_baseline(asked.baseline_name),
        overrides=asked.overrides,
        prepare=prepare,
    )


def _trials(asked: Asked) -> "list[Trial]":
    """Of an ablation all; of a search what they have in common."""
    return [asked.start] if asked.start else [each.trial for each in asked.labelled]


def _with_trials(asked: Asked, trials: "Sequence[Trial]") -> Asked:
    if asked.start:
        return replace(asked, start=trials[0])
    labelled = [replace(each, trial=trial) for each, trial in zip(asked.labelled, trials, strict=True)]
    return replace(asked, labelled=labelled)


def _each_data_set(
    trials: "Sequence[Trial]",
    change: "Callable[[AnyData], AnyData]",
    known: "dict[AnyData, AnyData] | None" = None,
) -> "list[Trial]":
    """The trials with what becomes of each data set, which is looked at once; `known` are those looked at before."""
    known = {} if known is None else known

    def changed(section: str, data: "AnyData") -> "AnyData":
        if data not in known:
            try:
                known[data] = change(data)
            except ValueError as error:
                raise ValueError(f"in evals.data: {error}" if section == "evals.data" else str(error)) from None
        return known[data]

    made = []
    for trial in trials:
        sections = {"data": trial.data} | ({} if trial.evals.data.kind == "same" else {"evals.data": trial.judged})
        changes = {section: changed(section, data) for section, data in sections.items()}
        made.append(trial.but({section: data.model_dump(mode="json") for section, data in changes.items()}))
    return made
