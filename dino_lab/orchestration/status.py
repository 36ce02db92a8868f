"""Where trials stand, from their folders alone: for tables and for whoever asks from another terminal."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from dino_lab.core.records import COLLAPSES, ENTROPY_FRACTION, IMAGES_PER_SECOND, KNN, TRAIN_MINUTES
from dino_lab.orchestration.folder import Ended, Ongoing, State, TrialFolder

if TYPE_CHECKING:
    from dino_lab.ablation import LabelledTrial
    from dino_lab.core.trial import Trial


@dataclass(frozen=True)
class TrialStatus:
    """Where one trial stands. What no record has said yet is None."""

    trial_id: str
    row: str
    seed: int
    epochs: int
    state: State = "waiting"
    records: int = 0
    step: int | None = None
    epoch: float | None = None
    entropy_fraction: float | None = None
    knn: float | None = None
    images_per_second: float | None = None
    train_minutes: float | None = None
    """Spent on steps, over all attempts."""
    verdict: str = "none"
    onset_step: int | None = None
    left: tuple[tuple[str, int, int], ...] = ()
    """Collapses that were called and taken back: kind, first and last step."""
    seconds: float | None = None
    """Wall time of the attempt that ended it."""
    error: str | None = None
    journal_bytes: int = 0
    """Of the journal, that are read."""

    @property
    def is_open(self) -> bool:
        """Not ended: the same command again goes on with it."""
        return self.state in ("waiting", "running", "interrupted")

    @property
    def is_final(self) -> bool:
        """Ended, and never run again."""
        return not self.is_open and self.state != "failed"


def counts(trials: Sequence[TrialStatus]) -> dict[str, int]:
    """How many trials are in each state, and how many have collapsed, whatever their state."""
    states = Counter(trial.state for trial in trials)
    collapsed = sum(trial.verdict in COLLAPSES for trial in trials)
    return {state: states[state] for state in get_args(Ongoing) + get_args(Ended)} | {"collapsed": collapsed}


def status(lab: Path, labelled: "Sequence[LabelledTrial]") -> list[TrialStatus]:
    """Where each trial stands."""
    return [
        refreshed(TrialStatus(each.trial.identity, each.row, each.seed, each.trial.epochs), lab) for each in labelled
    ]


def refreshed(trial: TrialStatus, lab: Path) -> TrialStatus:
    """The status brought up to date; of the journal only what is new is read."""
    folder = TrialFolder(lab, trial.trial_id)
    state, end = folder.stands()
    records, journal_bytes = folder.records_after(trial.journal_bytes)
    trial = replace(
        trial,
        state=state,
        seconds=end.seconds if end else None,
        error=end.error if end else None,
        journal_bytes=journal_bytes,
    )
    for record in records:
        trial = replace(
            trial,
            records=trial.records + 1,
            step=record.step,
            epoch=record.epoch,
            entropy_fraction=record.values.get(ENTROPY_FRACTION, trial.entropy_fraction),
            knn=record.values.get(KNN, trial.knn),
            images_per_second=record.values.get(IMAGES_PER_SECOND, trial.images_per_second),
            train_minutes=record.values.get(TRAIN_MINUTES, trial.train_minutes),
            verdict=record.verdict,
            onset_step=record.onset_step,
            left=tuple(record.left),
        )
    return trial


def prunable(lab: Path, labelled: "Sequence[LabelledTrial]") -> list[TrialFolder]:
    """Folders of trials that are over and have a checkpoint from which no open one of these starts."""
    over = {trial.trial_id for trial in status(lab, labelled) if trial.is_final}
    needed = {value for each in labelled if each.trial.identity not in over for value in values_of(each.trial)}
    folders = [TrialFolder(lab, trial_id) for trial_id in sorted(over - needed)]
    return [folder for folder in folders if folder.checkpoint_bytes]


def values_of(trial: "Trial") -> set[str]:
    """All its knobs' values as text: among them the ids of the trials from whose checkpoints it starts."""
    return set(map(str, trial.flat().values()))


def seconds_left(trials: Sequence[TrialStatus]) -> float | None:
    """About how long the open trials will take, as many at a time as are running now; None if nobody knows yet.

    At the pace of each, or of all where it has none yet; what ended trials took besides their steps (evaluation,
    starting) is counted in. Rows and seeds that share a trial count once.
    """
    each_once = {trial.trial_id: trial for trial in trials}.values()
    paces = {
        trial.trial_id: 60 * trial.train_minutes / trial.epoch
        for trial in each_once
        if trial.train_minutes and trial.epoch
    }
    ended = [trial for trial in each_once if trial.seconds and trial.train_minutes and not trial.is_open]
    trained = sum(60 * (trial.train_minutes or 0) for trial in ended)
    besides = max(1.0, sum(trial.seconds or 0 for trial in ended) / trained) if trained else 1.0
    pace_of_all = sum(paces.values()) / len(paces) if paces else None
    left = 0.0
    for trial in each_once:
        pace = paces.get(trial.trial_id, pace_of_all)
        if trial.is_open:
            if pace is None:
                return None
            left += pace * (trial.epochs - (trial.epoch or 0)) * besides
    return left / max(1, sum(trial.state == "running" for trial in each_once))
