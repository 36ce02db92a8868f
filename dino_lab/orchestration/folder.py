"""One trial's folder: its journal, its lock, how it ended; and `run_trial`, which trains into it.

A second run needs nothing but this folder. Neither Ray nor MLflow is imported here, and torch only to train.
"""

import fcntl
import json
import logging
import os
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias

from dino_lab.core.records import ENTROPY_FRACTION, IMAGES_PER_SECOND, KNN, Record

if TYPE_CHECKING:
    from dino_lab.ablation import LabelledTrial
    from dino_lab.core.trial import Trial

Ended: TypeAlias = Literal["finished", "stopped", "diverged", "failed"]
State: TypeAlias = Literal["waiting", "running", "interrupted"] | Ended
Train: TypeAlias = Callable[..., Iterator[Record]]

_PREDECESSOR_SECONDS = 60.0
"""How long a trial waits for the process that trained it before: that of a killed driver dies within 20 s."""


@dataclass(frozen=True)
class End:
    """How a trial ended, and the wall time of the attempt that ended it."""

    state: Ended
    error: str | None
    seconds: float

    @property
    def is_final(self) -> bool:
        """Never run again: finished, stopped for its collapse, or diverged. What failed is tried again."""
        return self.state != "failed"


class TrialFolder:
    """`lab/trials/<identity>`: everything that is known of one trial, whoever trains it."""

    def __init__(self, lab: Path, trial_id: str) -> None:
        self.path = lab / "trials" / trial_id
        self.trial = self.path / "trial.json"
        self.journal = self.path / "journal.jsonl"
        self.checkpoint = self.path / "checkpoint.pt"
        self.data = self.path / "data.json"
        self._pictures = self.path / "pictures"
        self.lock = self.path / "lock"
        self._end = self.path / "end.json"

    def records(self, skip: int = 0) -> list[Record]:
        """The journal after its first `skip` records; a last line that is not whole is left out."""
        if not self.journal.exists():
            return []
        whole, _, _torn = self.journal.read_text().rpartition("\n")
        return [_record(json.loads(line)) for line in whole.splitlines()[skip:]]

    def pictures(self, after: int) -> list[tuple[str, int, Path]]:
        """Pictures of steps after this one, oldest first: what is drawn, the step, and the file."""
        found = []
        for path in self._pictures.glob("*-*.png"):
            name, _, step = path.stem.rpartition("-")
            if step.isdecimal() and int(step) > after:  # others may have put theirs there
                found.append((name, int(step), path))
        return sorted(found, key=lambda picture: picture[1])

    def append(self, record: Record) -> None:
        """Adds one line to the journal; it is on the disk on return."""
        with self.journal.open("a") as journal:
            journal.write(json.dumps(asdict(record)) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def begin(self, trial: "Trial") -> int:
        """Makes the folder ready for an attempt: an earlier failure and a torn last line of the journal are removed.

        Returns:
            The last step in the journal, -1 if there is none.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.trial, trial.model_dump_json(indent=2))
        self._end.unlink(missing_ok=True)
        if self.journal.exists():
            os.truncate(self.journal, self.journal.read_bytes().rfind(b"\n") + 1)
        return max((record.step for record in self.records()), default=-1)

    def usable_checkpoint(self) -> Path | None:
        """The checkpoint to go on from; one that is cut short is set aside and said so in the log."""
        if not self.checkpoint.exists():
            return None
        if zipfile.is_zipfile(self.checkpoint):
            return self.checkpoint
        aside = self.checkpoint.with_name("checkpoint.unreadable")
        os.replace(self.checkpoint, aside)
        logging.getLogger(__name__).warning("%s cannot be read: trained afresh from step 0", aside)
        return None

    def end(self) -> End | None:
        try:
            return End(**json.loads(self._end.read_text()))
        except FileNotFoundError:  # asked for after the fact: a retry removes it at any time
            return None

    def write_end(self, end: End) -> None:
        _write(self._end, json.dumps(asdict(end)))

    def state(self) -> State:
        """As the folder shows it now: how it ended, or whether a process trains it."""
        if end := self.end():
            return end.state
        if is_locked(self.lock):
            return "running"
        return "interrupted" if self.trial.exists() else "waiting"


def run_trial(trial: "Trial", lab: Path, train: Train | None = None) -> Iterator[Record]:
    """Trains into the trial's folder, going on from its checkpoint; nothing if it has ended otherwise than by failing.

    Each record is in the journal before it is yielded. Steps between the checkpoint and a crash are computed
    a second time, to the same bits, and yielded, but the journal keeps their first record: each step is there once.

    Args:
        train: In place of `dino_lab.core.trainer.train`.

    Raises:
        ValueError: if another process still trains this trial after a minute.
        Exception: whatever `train` raises apart from `Diverged`, after it has been written to end.json.
    """
    from dino_lab.core.trainer import Diverged
    from dino_lab.core.trainer import train as train_dino

    folder = TrialFolder(lab, trial.identity)
    with locked(folder.lock, patience_seconds=_PREDECESSOR_SECONDS, busy=f"trial {trial.identity} is being trained"):
        if (earlier := folder.end()) and earlier.is_final:
            return
        last_step = folder.begin(trial)
        start = time.monotonic()
        try:
            for record in (train or train_dino)(trial, workdir=folder.path, resume_from=folder.usable_checkpoint()):
                if record.step > last_step:
                    folder.append(record)
                yield record
        except Diverged as error:
            folder.write_end(End("diverged", str(error), time.monotonic() - start))
        except Exception:
            folder.write_end(End("failed", traceback.format_exc(), time.monotonic() - start))
            raise
        else:
            *_, last = folder.records()
            stopped = trial.collapse.policy == "stop" and last.epoch < trial.epochs
            folder.write_end(End("stopped" if stopped else "finished", None, time.monotonic() - start))


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
    verdict: str = "none"
    onset_step: int | None = None
    left: tuple[tuple[str, int, int], ...] = ()
    """Collapses that were called and taken back: kind, first and last step."""
    seconds: float | None = None
    """Wall time of the attempt that ended it."""
    error: str | None = None

    @property
    def is_open(self) -> bool:
        """Not ended: the same command again goes on with it."""
        return self.state in ("waiting", "running", "interrupted")


def status(lab: Path, labelled: "list[LabelledTrial]") -> list[TrialStatus]:
    """Where each trial stands, from the folders alone."""
    return [
        refreshed(TrialStatus(each.trial.identity, each.row, each.seed, each.trial.epochs), lab) for each in labelled
    ]


def refreshed(trial: TrialStatus, lab: Path) -> TrialStatus:
    """The status brought up to date; of the journal only what is new is parsed."""
    folder = TrialFolder(lab, trial.trial_id)
    state, end = folder.state(), folder.end()
    trial = replace(trial, state=state, seconds=end.seconds if end else None, error=end.error if end else None)
    for record in folder.records(skip=trial.records):
        trial = replace(
            trial,
            records=trial.records + 1,
            step=record.step,
            epoch=record.epoch,
            entropy_fraction=record.values.get(ENTROPY_FRACTION, trial.entropy_fraction),
            knn=record.values.get(KNN, trial.knn),
            images_per_second=record.values.get(IMAGES_PER_SECOND, trial.images_per_second),
            verdict=record.verdict,
            onset_step=record.onset_step,
            left=tuple(record.left),
        )
    return trial


@contextmanager
def locked(path: Path, *, patience_seconds: float, busy: str) -> Iterator[None]:
    """Holds the file's lock, alone, for the block. The system frees it when the holder dies, however it dies.

    Raises:
        ValueError: `busy` and the holder's process id, if it is still held after `patience_seconds`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        deadline = time.monotonic() + patience_seconds
        while not _take(file, fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                raise ValueError(f"{busy} by process {path.read_text()}")
            time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            # Not left to closing: a forked loader worker may still hold a copy of the open file.
            fcntl.flock(file, fcntl.LOCK_UN)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock. Readers share it, so that looking disturbs no other reader."""
    if not path.exists():
        return False
    with path.open() as file:
        return not _take(file, fcntl.LOCK_SH)


def _take(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _record(values: dict[str, Any]) -> Record:
    """As it was before JSON made lists of its tuples."""
    return Record(**values | {"left": tuple((kind, first, last) for kind, first, last in values.get("left", ()))})


def _write(path: Path, text: str) -> None:
    """Whole or not at all, also after a power cut."""
    new = path.with_name(f"{path.name}.new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
