import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dino_lab.ablation import LabelledTrial
from dino_lab.core.records import ENTROPY_FRACTION, KNN, Record
from dino_lab.core.trial import Trial
from dino_lab.orchestration.folder import TrialFolder, locked, run_trial
from dino_lab.orchestration.status import TrialStatus, counts, prunable, refreshed, seconds_left, status

WAITING = TrialStatus("a", "row", 0, epochs=10)
RUNNING = replace(WAITING, trial_id="b", state="running", epoch=4.0, train_minutes=2.0)
FINISHED = replace(WAITING, trial_id="c", state="finished", epoch=10.0, train_minutes=3.0, seconds=270.0)


def train(trial: Trial, **_: Path | None) -> Iterator[Record]:
    for step in range(8):
        yield Record(step, step / 2, time.time(), {"train/loss": 1 / (step + 1)})


def record(step: int, **values: float) -> Record:
    return Record(step, step / 2, 1e9 + step, values)


def test_status_is_read_from_the_folders_alone(tmp_path: Path) -> None:
    rows = [LabelledTrial(f"row {seed}", 0, seed, {}, Trial(seed=seed)) for seed in range(3)]
    list(run_trial(rows[0].trial, tmp_path, train))
    folder = TrialFolder(tmp_path, rows[1].trial.identity)
    folder.begin(rows[1].trial)
    folder.append(record(0, **{KNN: 30.0, ENTROPY_FRACTION: 0.9}))
    folder.append(Record(4, 2.0, 1e9, {ENTROPY_FRACTION: 0.5}, "one_prototype", 2))
    finished, interrupted, waiting = status(tmp_path, rows)
    assert (finished.state, finished.step, finished.records, finished.is_open) == ("finished", 7, 8, False)
    assert finished.seconds < 10
    assert (interrupted.state, interrupted.step, interrupted.epoch) == ("interrupted", 4, 2.0)
    assert (interrupted.knn, interrupted.entropy_fraction) == (30.0, 0.5)
    assert (interrupted.verdict, interrupted.onset_step) == ("one_prototype", 2)
    assert (waiting.state, waiting.step, waiting.knn, waiting.seed) == ("waiting", None, None, 2)


def test_of_a_journal_only_what_is_new_is_read(tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path, Trial().identity)
    folder.begin(Trial())
    folder.append(record(0, **{KNN: 30.0}))
    seen = refreshed(replace(WAITING, trial_id=Trial().identity), tmp_path)
    content = folder.journal.read_bytes()
    folder.journal.write_bytes(b"x" * len(content))  # what was read may be anything now
    folder.append(record(4, **{ENTROPY_FRACTION: 0.5}))
    with folder.journal.open("ab") as journal:
        journal.write(b'{"step": 6, "epo')
    later = refreshed(seen, tmp_path)
    assert (later.records, later.step, later.knn, later.entropy_fraction) == (2, 4, 30.0, 0.5)
    assert later.journal_bytes == folder.journal.read_bytes().index(b'{"step": 6')


def test_a_trial_runs_while_its_lock_is_held(tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path, Trial().identity)
    folder.begin(Trial())
    trial = replace(WAITING, trial_id=Trial().identity)
    with locked(folder.lock, patience_seconds=0, busy="", doing=""):
        assert refreshed(trial, tmp_path).state == "running"
    assert refreshed(trial, tmp_path).state == "interrupted"


def test_trials_are_counted_by_state_and_the_collapsed_besides() -> None:
    collapsed = [replace(FINISHED, verdict="uniform"), replace(RUNNING, verdict="constant")]
    counted = counts([WAITING, RUNNING, FINISHED, *collapsed, replace(FINISHED, verdict="not_started")])
    assert {state: number for state, number in counted.items() if number} == {
        "waiting": 1,
        "running": 2,
        "finished": 3,
        "collapsed": 2,
    }
    assert counted["diverged"] == counted["failed"] == counted["pruned"] == 0


@pytest.mark.parametrize(
    ("trials", "left"),
    [
        ([WAITING], None),
        ([WAITING, replace(RUNNING, epoch=0.0, train_minutes=None)], None),
        # 30 s an epoch.
        ([RUNNING], 6 * 30),
        ([RUNNING, WAITING], 6 * 30 + 10 * 30),
        # Two at a time, the second at 15 s an epoch; the waiting one at the mean of their paces.
        ([RUNNING, replace(RUNNING, trial_id="d", train_minutes=1.0), WAITING], (6 * 30 + 6 * 15 + 10 * 22.5) / 2),
        # What has ended trained for 3 minutes of its 4.5, so all take half as much again.
        ([FINISHED, RUNNING], 1.5 * 6 * 30),
        ([FINISHED], 0),
        # Two rows that are one trial.
        ([RUNNING, replace(RUNNING, row="other")], 6 * 30),
    ],
)
def test_time_left_is_that_of_open_trials_at_their_paces(trials: list[TrialStatus], left: float | None) -> None:
    assert seconds_left(trials) == (left if left is None else pytest.approx(left))


def test_a_checkpoint_is_prunable_once_its_trial_and_those_that_start_from_it_are_over(
    smoke: Trial, tmp_path: Path
) -> None:
    teacher = smoke.but({"method.kind": "supervised"})
    student = smoke.but({"method.kind": "distillation", "method.checkpoint": teacher.identity})
    rows = [LabelledTrial(row, 0, 0, {}, trial) for row, trial in (("teacher", teacher), ("student", student))]
    folders = [TrialFolder(tmp_path, each.trial.identity) for each in rows]
    for each, folder in zip(rows, folders, strict=True):
        folder.begin(each.trial)
        folder.checkpoint.write_bytes(b"weights")
    assert prunable(tmp_path, rows) == []
    folders[0].write_end("finished", seconds=1.0)
    assert prunable(tmp_path, rows) == []
    folders[1].write_end("failed", "is tried again", seconds=1.0)
    assert prunable(tmp_path, rows) == []
    folders[1].write_end("finished", seconds=1.0)
    assert {each.path for each in prunable(tmp_path, rows)} == {each.path for each in folders}
    for folder in folders:
        folder.prune()
    assert prunable(tmp_path, rows) == []
    assert [folder.state() for folder in folders] == ["finished", "finished"]
