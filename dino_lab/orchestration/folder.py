"""One trial's folder: its journal, its lock, how it ended; and `run_trial`, which trains into it.

A second run needs nothing but this folder. Neither Ray nor MLflow is imported here, and torch only to train.
"""

import faulthandler
import fcntl
import json
import logging
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias

from dino_lab.core.records import Record

if TYPE_CHECKING:
    from dino_lab.core.trial import Trial

Ended: TypeAlias = Literal["finished", "stopped", "pruned", "diverged", "failed"]
Ongoing: TypeAlias = Literal["waiting", "running", "interrupted"]
State: TypeAlias = Ongoing | Ended
Train: TypeAlias = Callable[..., Iterator[Record]]

_PREDECESSOR_SECONDS = 60.0
"""How long a trial waits for the process that trained it before: that of a killed driver dies within 20 s."""


@dataclass(frozen=True)
class End:
    """How a trial ended, the wall time of the attempt that ended it, and how many records it left."""

    state: Ended
    error: str | None
    seconds: float
    records: int

    @property
    def is_final(self) -> bool:
        """Never run again: finished, stopped for its collapse, pruned by its search, or diverged. What failed is."""
        return self.state != "failed"


class TrialFolder:
    """`lab/trials/<identity>`: everything that is known of one trial, whoever trains it."""

    def __init__(self, lab: Path, trial_id: str) -> None:
        self.path = lab / "trials" / trial_id
        self.trial = self.path / "trial.json"
        self.journal = self.path / "journal.jsonl"
        self.checkpoint = self.path / "checkpoint.pt"
        self._unusable = self.path / "checkpoint.unusable"
        self.data = self.path / "data.json"
        self._pictures = self.path / "pictures"
        self.lock = self.path / "lock"
        self.overtime = self.path / "overtime.txt"
        """Where an attempt stood that took longer than it may."""
        self._end = self.path / "end.json"

    def records(self) -> list[Record]:
        """The whole journal."""
        return self.records_after(0)[0]

    def records_after(self, offset: int) -> tuple[list[Record], int]:
        """The journal's records from this byte on, and the byte behind them, from which to read on.

        It ends at the first line that cannot be read, as one is that is being written.
        """
        try:
            with self.journal.open("rb") as journal:
                journal.seek(offset)
                lines = journal.read().splitlines(keepends=True)
        except FileNotFoundError:
            return [], offset
        records = []
        for line in lines:
            try:
                records.append(_record(line))
            except (ValueError, TypeError):
                break
            offset += len(line)
        return records, offset

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
        """Makes the folder ready for an attempt: without an earlier failure, and a journal whose every line is whole.

        Returns:
            The last step in the journal, -1 if there is none.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.trial, trial.model_dump_json(indent=2))
        self._end.unlink(missing_ok=True)
        self.overtime.unlink(missing_ok=True)
        records, whole = self.records_after(0)
        if self.journal.exists():
            os.truncate(self.journal, whole)
        return records[-1].step if records else -1

    def usable_checkpoint(self, last_step: int) -> Path | None:
        """The checkpoint to go on from: a whole one that is not ahead of the journal, which ends at this step.

        Else it is set aside and said so in the log: trained afresh, the trial makes the same records again.
        """
        from dino_lab.core import checkpoint

        if not self.checkpoint.exists():
            return None
        try:
            step = checkpoint.load(self.checkpoint)["step"]
            if step <= last_step:
                return self.checkpoint
            why = f"is of step {step}, and the journal ends at {last_step}"
        except RuntimeError as error:
            why = str(error)
        os.replace(self.checkpoint, self._unusable)
        logging.getLogger(__name__).warning("%s: %s; trained afresh from step 0", self._unusable, why)
        return None

    def end(self) -> End | None:
        """How the trial ended; None also if the journal has lost records since: they can be made again."""
        try:
            end = End(**json.loads(self._end.read_text()))
        except FileNotFoundError:  # asked for after the fact: a retry removes it at any time
            return None
        except (ValueError, TypeError):  # damaged
            return None
        return end if end.records <= self._lines() else None

    def write_end(self, state: Ended, error: str | None = None, *, seconds: float) -> None:
        self.path.mkdir(parents=True, exist_ok=True)  # of a trial that was lost before it began
        _write(self._end, json.dumps(asdict(End(state, error, seconds, self._lines()))))

    def _lines(self) -> int:
        try:
            return self.journal.read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def prune(self) -> None:
        """Deletes the checkpoint, and one that was set aside; never a record."""
        self.checkpoint.unlink(missing_ok=True)
        self._unusable.unlink(missing_ok=True)

    @property
    def checkpoint_bytes(self) -> int:
        """What `prune` would free."""
        return sum(path.stat().st_size for path in (self.checkpoint, self._unusable) if path.exists())

    def state(self) -> State:
        """As the folder shows it now: how it ended, or whether a process trains it."""
        return self.stands()[0]

    def stands(self) -> tuple[State, End | None]:
        """The state, and how it ended if it has, by one look."""
        if end := self.end():
            return end.state, end
        if is_locked(self.lock):
            return "running", None
        return ("interrupted" if self.trial.exists() else "waiting"), None


def run_trial(trial: "Trial", lab: Path, train: Train | None = None) -> Iterator[Record]:
    """Trains into the trial's folder, going on from its checkpoint; nothing if it has ended otherwise than by failing.

    Each record is in the journal before it is yielded. Steps between the checkpoint and a crash are computed
    a second time, to the same bits, and yielded, but the journal keeps their first record: each step is there once.
    After `runtime.max_minutes` the process ends itself, whatever it is at.

    Args:
        train: In place of `dino_lab.core.trainer.train`.

    Raises:
        ValueError: if another process still trains this trial after a minute.
        Exception: whatever `train` raises apart from `Diverged`, after it has been written to end.json.
    """
    from dino_lab.core.trainer import Diverged
    from dino_lab.core.trainer import train as train_dino

    folder = TrialFolder(lab, trial.identity)
    busy = f"trial {trial.identity} is in use"
    with locked(folder.lock, patience_seconds=_PREDECESSOR_SECONDS, busy=busy, doing="trained"):
        if (earlier := folder.end()) and earlier.is_final:
            return
        last_step = folder.begin(trial)
        checkpoint = folder.usable_checkpoint(last_step)
        start = time.monotonic()
        try:
            with _limited(trial.runtime.max_minutes, folder.overtime):
                for record in (train or train_dino)(trial, workdir=folder.path, resume_from=checkpoint):
                    if record.step > last_step:
                        folder.append(record)
                    yield record
        except Diverged as error:
            folder.write_end("diverged", str(error), seconds=time.monotonic() - start)
        except Exception:
            folder.write_end("failed", traceback.format_exc(), seconds=time.monotonic() - start)
            raise
        else:
            *_, last = folder.records()
            stopped = trial.collapse.policy == "stop" and last.epoch < trial.epochs
            folder.write_end("stopped" if stopped else "finished", seconds=time.monotonic() - start)


@contextmanager
def _limited(minutes: float | None, overtime: Path) -> Iterator[None]:
    """Ends this process if the block takes longer, also where it hangs; the file then says where every thread stood."""
    if minutes is None:
        yield
        return
    with overtime.open("w") as file:
        faulthandler.dump_traceback_later(60 * minutes, exit=True, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
    overtime.unlink()


@contextmanager
def locked(path: Path, *, patience_seconds: float, busy: str, doing: str) -> Iterator[None]:
    """Holds the file's lock, alone, for the block. The system frees it when the holder dies, however it dies.

    Raises:
        ValueError: `busy`, and what the holder is doing, its process id and machine, if it is still held after
            `patience_seconds`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        deadline = time.monotonic() + patience_seconds
        while not _take(file, fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                raise ValueError(f"{busy}: {path.read_text()}")
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"{doing} by process {os.getpid()} on {socket.gethostname()}")
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


def _record(line: bytes) -> Record:
    """As it was before JSON made lists of its tuples.

    Raises:
        ValueError: the line is not whole.
    """
    if not line.endswith(b"\n"):
        raise ValueError("cut short")
    values: dict[str, Any] = json.loads(line)
    return Record(**values | {"left": tuple((kind, first, last) for kind, first, last in values.get("left", ()))})


def _write(path: Path, text: str) -> None:
    """Whole or not at all, also after a power cut."""
    new = path.with_name(f"{path.name}.new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
