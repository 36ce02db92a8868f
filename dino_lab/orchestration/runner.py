"""Trials -> Ray Tune: retried, resumed from their folders, mirrored into MLflow, and nothing finished done twice.

Ray owns processes and resources, not state: a second `run` hands Tune what is unfinished.
"""

import contextlib
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dino_lab.core.records import Record
from dino_lab.orchestration import cluster
from dino_lab.orchestration.folder import Ended, Train, TrialFolder, is_locked, locked
from dino_lab.orchestration.status import TrialStatus, refreshed, seconds_left, status, values_of
from dino_lab.orchestration.tracking import Mirror, Sweep, check_store

if TYPE_CHECKING:
    from dino_lab.ablation import LabelledTrial
    from dino_lab.core.trial import Trial
    from dino_lab.orchestration.search import Study

_FREE_BYTES = 2**30
"""Of the disk, without which no run starts."""
_LOW_BYTES = 2**28
"""Of the disk, below which a run stops before it is full."""
_AHEAD = 16
"""Trials of an ablation that Tune may be starting at a time."""
_TICK_SECONDS = 1.0
_LOCK = "run.lock"
"""The file in the lab that a run holds."""
_STOP = "stop"
"""The file in the lab by which a run is asked to end: it works from any machine that has the folder."""
_DYING_SECONDS = 20.0
"""How long workers may take to die after Ray has been stopped."""


@dataclass(frozen=True)
class Progress:
    """What a live table shows."""

    trials: tuple[TrialStatus, ...]
    mirror_error: str | None
    """Why MLflow is behind the journals, None while it is not."""
    retries: int
    """Attempts that failed or were killed and were taken up again."""
    seconds_left: float | None
    """About; None while nobody knows."""


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    trials: tuple[TrialStatus, ...]
    skipped: int
    """Trials that had ended before, in this or another ablation."""
    seconds: float
    mirror_error: str | None
    retries: int
    stopped_for: str | None = None
    """Why it was stopped, if not by Ctrl-C."""
    spent: str | None = None
    """What of a search's budget is used up, empty if nothing is; None for an ablation."""

    @property
    def notes(self) -> list[str]:
        """What a person must know before going on; nothing if all is well."""
        unfinished = sum(trial.is_open for trial in self.trials)
        failed = [f"{trial.row} s{trial.seed}" for trial in self.trials if trial.state == "failed"]
        notes = []
        if self.retries:
            notes.append(f"{self.retries} attempts failed or were killed, and were taken up from their checkpoints")
        if self.stopped_for:
            notes.append(f"stopped: {self.stopped_for}")
        if unfinished:
            notes.append(
                f"{unfinished} of {len(self.trials)} trials are unfinished; "
                "the same command again goes on where each of them stopped"
            )
        if self.spent:
            notes.append(f"the search has ended: {self.spent}")
        elif self.spent == "":
            notes.append("the search has not ended; the same command again goes on with it")
        if failed:
            again = "the same command again tries them once more"
            notes.append(f"failed: {', '.join(failed)}" + (f"; {again}" if self.spent is None else ""))
        if self.mirror_error:
            notes.append(
                "MLflow is behind: the records are safe in the trials' journals and the next run "
                f"sends them ({self.mirror_error})"
            )
        return notes


def run(
    sweep: Sweep,
    *,
    lab: Path,
    concurrency: int | None = None,
    address: str | None = None,
    tracking_uri: str | None = None,
    only_failed: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    train: Train | None = None,
) -> Summary:
    """Trains what is unfinished, in the given order, and mirrors every trial into MLflow.

    Ctrl-C, SIGTERM and `stop` end all trials where they are and return. Call it from the main thread.

    Args:
        concurrency: Trials at a time; None for as many as the resources take.
        address: A running Ray cluster; None starts a private one, reachable from this machine only.
        tracking_uri: An MLflow server; None for the lab's own store.
        only_failed: Leave alone what has not failed; of a search nothing is tried again.
        on_progress: Called about once a second; it must not raise.
        train: In place of `dino_lab.core.trainer.train`.

    Raises:
        ValueError: if another run works in this lab, the disk is full, a trial asks for more than a machine has, or the
            machines cannot share the store.
    """
    start = time.monotonic()
    check_store(tracking_uri, nodes=1)
    lab = lab.resolve()
    study = sweep.study
    with _alone(lab, f"run of {sweep.name}"):
        _check_disk(lab)
        (lab / _STOP).unlink(missing_ok=True)
        if study:
            study.begin()
        labelled = study.labelled() if study else [_in_lab(each, lab) for each in sweep.labelled]
        mirror = Mirror(lab, replace(sweep, labelled=labelled), tracking_uri=tracking_uri)
        watch = _Watch(lab, status(lab, labelled), mirror, on_progress, study)
        ended = {trial.trial_id for trial in watch.trials if trial.is_final}
        # A search asks for other trials in place of those that failed.
        again = {trial.trial_id for trial in watch.trials if trial.state == "failed" and not study}
        left = again if only_failed else again | {trial.trial_id for trial in watch.trials if trial.is_open}
        trials = {each.trial.identity: each.trial for each in labelled if each.trial.identity in left}
        source = _Searching(study, watch, labelled) if study else _InOrder(trials)
        watch.show()
        try:
            if trials or (study and not study.spent):
                with cluster.connected(address):
                    from dino_lab.orchestration import tuning  # reads the environment that was just set

                    check_store(tracking_uri, nodes=len(cluster.alive_nodes()))
                    cluster.check_resources([study.start] if study else trials.values())
                    mirror.catch_up()
                    ahead = 1 if study else _AHEAD  # a search asks as late as it can, when it knows most
                    tuning.fit(source, watch, lab, concurrency=concurrency, ahead=ahead, train=train)
            else:
                mirror.catch_up()
        except KeyboardInterrupt:
            # Before or after Tune's own loop, which returns on Ctrl-C. The folders say what is unfinished.
            pass
        finally:
            _await_dying_workers(lab, [trial.trial_id for trial in watch.trials if trial.is_open])
            watch.settle()
            mirror.close()
        watch.show()
    return Summary(
        watch.trials,
        len(ended),
        time.monotonic() - start,
        mirror.error,
        watch.retries,
        stopped_for=watch.stopped_for,
        spent=study.spent if study else None,
    )


def _in_lab(each: "LabelledTrial", lab: Path) -> "LabelledTrial":
    return replace(each, trial=each.trial.but({"runtime.data_dir": str(lab / "data")}))


def stop(name: str, lab: Path) -> None:
    """Ends the run of this experiment that goes on in the lab, as Ctrl-C in its terminal does, and waits until it has.

    Raises:
        ValueError: there is none.
    """
    lock = lab / _LOCK
    if not is_locked(lock):
        raise ValueError(f"no run of {name} in {lab}")
    if not (doing := lock.read_text()).startswith(f"run of {name} "):
        raise ValueError(f"no run of {name} in {lab}: {doing}")
    (lab / _STOP).touch()
    while is_locked(lock):
        time.sleep(0.2)


def sync(sweep: Sweep, *, lab: Path, tracking_uri: str | None = None) -> str | None:
    """Sends to MLflow every record that it lacks, and settles its runs; what it has already stays as it is.

    Returns:
        Why MLflow is behind nevertheless, None if it is not.

    Raises:
        ValueError: if a run works in this lab; it does this itself.
    """
    lab = lab.resolve()
    with _alone(lab, f"sync of {sweep.name}"):
        mirror = Mirror(lab, sweep, tracking_uri=tracking_uri, again=True)
        mirror.catch_up()
        mirror.close()
    return mirror.error


def _alone(lab: Path, doing: str) -> AbstractContextManager[None]:
    return locked(lab / _LOCK, patience_seconds=0, busy=f"{lab} is in use", doing=doing)


class _InOrder:
    """Trials in their order, one that needs another's checkpoint once that one has ended."""

    def __init__(self, trials: "Mapping[str, Trial]") -> None:
        self._waiting = dict(trials)
        self._open = set(trials)

    def ask(self) -> "Trial | None":
        if not self._waiting:
            raise StopIteration
        for trial_id, trial in self._waiting.items():
            if not self._open & values_of(trial):
                return self._waiting.pop(trial_id)
        return None

    def report(self, trial_id: str, record: Record) -> bool:
        """All rows of an ablation get the same budget."""
        return False

    def tell(self, trial_id: str) -> None:
        self._open.discard(trial_id)


class _Searching:
    """What a study asks for, as long as it does."""

    def __init__(self, study: "Study", watch: "_Watch", known: "Sequence[LabelledTrial]") -> None:
        self._study = study
        self._watch = watch
        self._next_number = 1 + max((each.row_index for each in known), default=-1)

    def ask(self) -> "Trial | None":
        labelled = self._study.ask()
        # Also those that had ended in this lab before, which it has told itself.
        new = self._study.labelled(first=self._next_number)
        if new:
            self._next_number = 1 + new[-1].row_index
            self._watch.add(new)
        if labelled is None:
            raise StopIteration
        return labelled.trial

    def report(self, trial_id: str, record: Record) -> bool:
        pruned = self._study.report(trial_id, record)
        if pruned:
            self._watch.prune(trial_id)
        return pruned

    def tell(self, trial_id: str) -> None:
        self._study.tell(trial_id)


class _Watch:
    """What the driver knows of its trials, and whom it tells."""

    def __init__(
        self,
        lab: Path,
        trials: list[TrialStatus],
        mirror: Mirror,
        on_progress: Callable[[Progress], None],
        study: "Study | None" = None,
    ) -> None:
        self.trials = tuple(trials)
        self.retries = 0
        self.stopped_for: str | None = None
        self._pruned: set[str] = set()
        self._study = study
        self._lab = lab
        self._mirror = mirror
        self._on_progress = on_progress
        self._next_tick = 0.0

    def tick(self) -> None:
        """Once a second: the table and MLflow follow the journals, and the run ends if it must."""
        if time.monotonic() < self._next_tick:
            return
        self._stop_if_asked()
        self.settle()
        # As the last look saw them, so that the end of a trial is sent too.
        self._mirror.catch_up([trial.trial_id for trial in self.trials if trial.is_open])
        self.show()
        self._next_tick = time.monotonic() + _TICK_SECONDS

    def show(self) -> None:
        self.trials = tuple(trial if trial.is_final else refreshed(trial, self._lab) for trial in self.trials)
        self._on_progress(Progress(self.trials, self._mirror.error, self.retries, seconds_left(self.trials)))

    def _stop_if_asked(self) -> None:
        if self.stopped_for:
            return
        free = shutil.disk_usage(self._lab).free
        if free < _LOW_BYTES:
            self.stopped_for = f"{self._lab} has {free / 2**20:.0f} MiB free; make room and give the same command again"
        elif (self._lab / _STOP).exists():
            self.stopped_for = "asked to from another terminal"
        if self.stopped_for:
            signal.raise_signal(signal.SIGINT)  # Tune's own way to end

    def retried(self) -> None:
        self.retries += 1

    def add(self, labelled: "Sequence[LabelledTrial]") -> None:
        """Trials that the study has asked for, or found, since."""
        self.trials += tuple(status(self._lab, labelled))
        self._mirror.add(labelled)

    def prune(self, trial_id: str) -> None:
        """It is being stopped."""
        self._pruned.add(trial_id)

    def settle(self) -> None:
        """What was pruned has ended once its worker has let go of it."""
        for trial_id in list(self._pruned):
            folder = TrialFolder(self._lab, trial_id)
            if not is_locked(folder.lock):
                self._end(trial_id, "pruned", None)
                self._pruned.remove(trial_id)

    def lost(self, trial_id: str, error: str) -> None:
        """Tune has given the trial up: a worker that was killed too often could not write its own end."""
        overtime = TrialFolder(self._lab, trial_id).overtime
        stood = overtime.read_text() if overtime.exists() else ""
        if stood:
            error = f"took longer than runtime.max_minutes; where it stood:\n{stood}"
        self._end(trial_id, "failed", error)

    def _end(self, trial_id: str, state: Ended, error: str | None) -> None:
        folder = TrialFolder(self._lab, trial_id)
        with contextlib.suppress(OSError):  # of a full disk: then it stays unfinished, as it is
            if not folder.end():
                folder.write_end(state, error, seconds=0.0)
            if self._study:
                self._study.tell(trial_id)


def _check_disk(lab: Path) -> None:
    free = shutil.disk_usage(lab).free
    if free < _FREE_BYTES:
        raise ValueError(f"{lab}: {free / 2**30:.2f} GiB free, at least {_FREE_BYTES / 2**30:g} GiB are needed")


def _await_dying_workers(lab: Path, trial_ids: Sequence[str]) -> None:
    """Ray returns before its workers are dead, and one that still trains is not interrupted."""
    deadline = time.monotonic() + _DYING_SECONDS
    while any(is_locked(TrialFolder(lab, each).lock) for each in trial_ids) and time.monotonic() < deadline:
        time.sleep(0.1)
