import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dino_lab.core import checkpoint
from dino_lab.core.records import Record
from dino_lab.core.trainer import Diverged
from dino_lab.core.trial import Trial
from dino_lab.orchestration import folder as folder_module
from dino_lab.orchestration.folder import TrialFolder, locked, run_trial

TRIAL = Trial()
STEPS = 8


def record(step: int, **values: float) -> Record:
    return Record(step, step / 2, 1e9 + step + 0.25, {"train/loss": 1 / (step + 1)} | values)


def fake_train(fails_at: int | None = None, error: Exception | None = None) -> Callable[..., Iterator[Record]]:
    """A train of STEPS steps with a checkpoint after every third, which may raise in between."""

    def train(trial: Trial, *, workdir: Path, resume_from: Path | None = None) -> Iterator[Record]:
        first = 0
        if resume_from:
            first = checkpoint.load(resume_from)["step"] + 1
        for step in range(first, STEPS):
            if step == fails_at:
                raise error
            yield Record(step, step / 2, time.time(), {"train/loss": 1 / (step + 1)})
            if step % 3 == 0:
                checkpoint.save(workdir / "checkpoint.pt", {"step": step})

    return train


@pytest.fixture
def folder(tmp_path: Path) -> TrialFolder:
    return TrialFolder(tmp_path, TRIAL.identity)


def test_what_is_appended_to_the_journal_is_read_back_and_some_may_be_skipped(folder: TrialFolder) -> None:
    left = (("constant", 1, 2),)
    records = [record(0), Record(5, 2.5, 1e9, {"a": 0.1, "b": float("inf")}, "uniform", 3, left)]
    folder.begin(TRIAL)
    for each in records:
        folder.append(each)
    assert folder.records() == records
    first = folder.journal.read_bytes().index(b"\n") + 1
    assert folder.records_after(first) == (records[1:], folder.journal.stat().st_size)


def test_a_torn_last_line_is_not_read_and_is_cut_off_by_the_next_attempt(folder: TrialFolder) -> None:
    folder.begin(TRIAL)
    folder.append(record(0))
    folder.append(record(1))
    whole = folder.journal.read_bytes()
    folder.journal.write_bytes(whole[:-7])
    assert folder.records() == [record(0)]
    assert folder.begin(TRIAL) == 0
    folder.append(record(1))
    assert folder.journal.read_bytes() == whole


def test_the_folder_holds_the_whole_resolved_trial(tmp_path: Path, folder: TrialFolder) -> None:
    list(run_trial(TRIAL, tmp_path, fake_train()))
    assert Trial.of(json.loads(folder.trial.read_text())) == TRIAL


def test_each_record_is_in_the_journal_before_it_is_yielded(tmp_path: Path, folder: TrialFolder) -> None:
    for each in run_trial(TRIAL, tmp_path, fake_train()):
        assert folder.records()[-1] == each


@pytest.mark.parametrize(("epoch", "state"), [(2.0, "stopped"), (100.0, "finished")])
def test_a_trial_that_a_collapse_ended_early_is_stopped_and_never_run_again(
    epoch: float, state: str, tmp_path: Path
) -> None:
    trial = TRIAL.but({"collapse.policy": "stop", "collapse.after_steps": 20})

    def train(trial: Trial, **_: Path | None) -> Iterator[Record]:
        yield Record(30, epoch, time.time(), {"train/loss": 1.0}, "uniform", 10)

    assert len(list(run_trial(trial, tmp_path, train))) == 1
    end = TrialFolder(tmp_path, trial.identity).end()
    assert end
    assert (end.state, end.is_final) == (state, True)
    assert list(run_trial(trial, tmp_path, train)) == []


def test_each_step_is_once_in_the_journal_with_its_first_time_after_a_resume(
    tmp_path: Path, folder: TrialFolder
) -> None:
    with pytest.raises(OSError, match="gone"):
        list(run_trial(TRIAL, tmp_path, fake_train(6, OSError("gone"))))
    before = folder.records()
    assert [each.step for each in before] == [0, 1, 2, 3, 4, 5]
    # The checkpoint is of step 3: steps 4 and 5 are computed again, and shown again.
    assert [each.step for each in run_trial(TRIAL, tmp_path, fake_train())] == [4, 5, 6, 7]
    assert [each.step for each in folder.records()] == list(range(STEPS))
    assert folder.records()[:6] == before


def test_a_trial_that_finished_or_diverged_is_not_trained_again(tmp_path: Path, folder: TrialFolder) -> None:
    list(run_trial(TRIAL, tmp_path, fake_train()))
    assert folder.end().state == folder.state() == "finished"
    assert list(run_trial(TRIAL, tmp_path, fake_train(0, AssertionError("trained again")))) == []

    other = Trial(seed=1)
    assert len(list(run_trial(other, tmp_path, fake_train(2, Diverged(2))))) == 2
    end = TrialFolder(tmp_path, other.identity).end()
    assert (end.state, end.error) == ("diverged", str(Diverged(2)))
    assert list(run_trial(other, tmp_path, fake_train())) == []


def test_a_failure_is_recorded_with_its_traceback_and_tried_again(tmp_path: Path, folder: TrialFolder) -> None:
    with pytest.raises(ZeroDivisionError):
        list(run_trial(TRIAL, tmp_path, fake_train(1, ZeroDivisionError("by zero"))))
    assert folder.end().state == "failed"
    assert "ZeroDivisionError: by zero" in folder.end().error
    list(run_trial(TRIAL, tmp_path, fake_train()))
    assert (folder.end().state, folder.end().error) == ("finished", None)


def test_who_stops_iterating_leaves_the_trial_interrupted(tmp_path: Path, folder: TrialFolder) -> None:
    records = run_trial(TRIAL, tmp_path, fake_train())
    assert folder.state() == "waiting"
    next(records)
    assert folder.state() == "running"
    records.close()
    assert folder.state() == "interrupted"
    assert folder.end() is None


def test_a_truncated_checkpoint_is_set_aside_and_the_trial_trained_afresh(
    tmp_path: Path, folder: TrialFolder, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(OSError, match="gone"):
        list(run_trial(TRIAL, tmp_path, fake_train(6, OSError("gone"))))
    before = folder.records()
    os.truncate(folder.checkpoint, folder.checkpoint.stat().st_size // 2)
    assert [each.step for each in run_trial(TRIAL, tmp_path, fake_train())] == list(range(STEPS))
    assert "cannot be read" in caplog.text
    assert folder.records()[:6] == before
    assert len(folder.records()) == STEPS


def interrupted(lab: Path, folder: TrialFolder) -> list[Record]:
    """What a trial that failed at step 6 left: records of steps 0 to 5, a checkpoint of step 3."""
    with pytest.raises(OSError, match="gone"):
        list(run_trial(TRIAL, lab, fake_train(6, OSError("gone"))))
    return folder.records()


def test_a_checkpoint_with_a_flipped_bit_is_not_gone_on_from(
    tmp_path: Path, folder: TrialFolder, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(tmp_path, folder)
    content = bytearray(folder.checkpoint.read_bytes())
    content[content.index(b"step") + 1] ^= 1
    folder.checkpoint.write_bytes(content)
    assert [each.step for each in run_trial(TRIAL, tmp_path, fake_train())] == list(range(STEPS))
    assert "is damaged" in caplog.text
    assert (folder.path / "checkpoint.unusable").read_bytes() == content


@pytest.mark.parametrize("damage", ["cut", "a line is no record", "gone"])
def test_records_that_a_journal_lost_are_made_again(
    damage: str, tmp_path: Path, folder: TrialFolder, caplog: pytest.LogCaptureFixture
) -> None:
    before = interrupted(tmp_path, folder)
    lines = folder.journal.read_bytes().splitlines(keepends=True)
    if damage == "cut":
        folder.journal.write_bytes(b"".join(lines[:2]) + lines[2][:10])
    elif damage == "gone":
        folder.journal.unlink()
    else:
        folder.journal.write_bytes(b"".join([*lines[:2], b"{}\n", *lines[3:]]))
    # The checkpoint is of step 3: going on from it would leave a hole.
    assert [each.step for each in run_trial(TRIAL, tmp_path, fake_train())] == list(range(STEPS))
    assert "checkpoint.unusable: is of step 3" in caplog.text
    kept = 0 if damage == "gone" else 2
    assert folder.records()[:kept] == before[:kept]
    assert [each.step for each in folder.records()] == list(range(STEPS))
    assert [each.values for each in folder.records()[:6]] == [each.values for each in before]


def test_a_finished_trial_whose_journal_lost_records_makes_them_again(tmp_path: Path, folder: TrialFolder) -> None:
    list(run_trial(TRIAL, tmp_path, fake_train()))
    whole = folder.journal.read_bytes()
    os.truncate(folder.journal, len(whole) - 3)
    assert (folder.end(), folder.state()) == (None, "interrupted")
    list(run_trial(TRIAL, tmp_path, fake_train()))
    assert folder.state() == "finished"
    assert [each.step for each in folder.records()] == list(range(STEPS))


@pytest.mark.parametrize("left", ["", '{"state": "fini', "[]", "{}"])
def test_a_damaged_end_is_written_again_without_training(left: str, tmp_path: Path, folder: TrialFolder) -> None:
    list(run_trial(TRIAL, tmp_path, fake_train()))
    (folder.path / "end.json").write_text(left)
    (folder.path / "trial.json").write_text("")
    assert folder.state() == "interrupted"
    assert [each.step for each in run_trial(TRIAL, tmp_path, fake_train())] == [7]
    assert folder.state() == "finished"
    assert len(folder.records()) == STEPS


def test_an_attempt_that_hangs_ends_itself_and_leaves_where_it_stood(tmp_path: Path) -> None:
    trial = TRIAL.but({"runtime.max_minutes": 0.01})
    folder = TrialFolder(tmp_path, trial.identity)
    code = (
        "import sys, time; from pathlib import Path; from dino_lab.core.trial import Trial;"
        "from dino_lab.orchestration.folder import run_trial\n"
        "def hanging(*arguments, **named):\n    time.sleep(100)\n    yield\n"
        "list(run_trial(Trial().but({'runtime.max_minutes': 0.01}), Path(sys.argv[1]), hanging))"
    )
    ended = subprocess.run([sys.executable, "-c", code, tmp_path], timeout=60, check=False, capture_output=True)
    assert (ended.returncode, folder.state()) == (1, "interrupted")
    assert "in hanging" in folder.overtime.read_text()
    # In time, the next attempt leaves no trace of that.
    assert len(list(run_trial(trial, tmp_path, fake_train()))) == STEPS
    assert (folder.state(), folder.overtime.exists()) == ("finished", False)


def test_a_trial_waits_for_its_predecessor_to_die(tmp_path: Path, folder: TrialFolder) -> None:
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX);"
        "print('held', flush=True); time.sleep(60)"
    )
    folder.path.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", code, folder.lock], stdout=subprocess.PIPE) as predecessor:
        predecessor.stdout.readline()
        assert folder.state() == "running"
        predecessor.kill()
        assert len(list(run_trial(TRIAL, tmp_path, fake_train()))) == STEPS


def test_a_trial_that_another_process_goes_on_training_is_refused_by_name(
    tmp_path: Path, folder: TrialFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "_PREDECESSOR_SECONDS", 0.3)
    with (
        locked(folder.lock, patience_seconds=0, busy="", doing="held"),
        pytest.raises(ValueError, match=rf"trial {TRIAL.identity} is in use: held by process {os.getpid()} on"),
    ):
        next(run_trial(TRIAL, tmp_path, fake_train()))
    assert not folder.trial.exists()


def test_a_lock_is_free_after_its_block_though_a_forked_child_keeps_the_file_open(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with locked(lock, patience_seconds=0, busy="", doing="held"):
        child = subprocess.Popen(["sleep", "60"], pass_fds=[_descriptor_of(lock)])
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    child.kill()
    child.wait()


def _descriptor_of(path: Path) -> int:
    return next(int(fd.name) for fd in Path("/proc/self/fd").iterdir() if fd.resolve() == path.resolve())
