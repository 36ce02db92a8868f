import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import optuna
import psutil
import pytest
from mlflow import MlflowClient
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from dino_lab.core.records import KNN, LOSS
from dino_lab.core.trainer import train
from dino_lab.core.trial import Trial
from dino_lab.orchestration import cluster, runner
from dino_lab.orchestration.folder import End, TrialFolder, locked
from dino_lab.orchestration.runner import Progress, run
from dino_lab.orchestration.search import STUDIES
from dino_lab.orchestration.tracking import Mirror
from tests.orchestration.driver import study, sweep

ROOT = Path(__file__).parents[2]
STEPS = 8


class Driver:
    """tests/orchestration/driver.py in its own process and process group."""

    def __init__(self, lab: Path, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.orchestration.driver", str(lab), *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | environment,
        )

    def outcome(self) -> dict:
        """What it prints at its end; nothing else may be printed."""
        out, err = self.process.communicate(timeout=200)
        assert out.strip(), err
        return json.loads(out)

    def wait_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 150
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def listening(self) -> set[str]:
        """Addresses on which the driver and everything that it started listen."""
        processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return {
            connection.laddr.ip.removeprefix("::ffff:")
            for process in processes
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new store: its migrations take seconds, so they are done once for all tests."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def lab(tmp_path: Path, store: Path) -> Path:
    shutil.copy(store, tmp_path / "mlflow.db")
    return tmp_path


def folders(lab: Path) -> list[TrialFolder]:
    return [TrialFolder(lab, path.name) for path in sorted((lab / "trials").glob("*"))]


def attempts(folder: TrialFolder) -> list[int]:
    """The step at which each attempt began."""
    return [int(line) for line in (folder.path / "attempts").read_text().split()]


@dataclass(frozen=True)
class Mirrored:
    state: str
    status: str
    steps: list[int]
    mirrored: int


def in_mlflow(lab: Path) -> list[Mirrored]:
    """The children of the only parent."""
    client = MlflowClient(f"sqlite:///{lab / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("fake").experiment_id])
    assert sum(run.data.tags["dino_lab.kind"] == "ablation" for run in runs) == 1
    return [
        Mirrored(
            run.data.tags["dino_lab.state"],
            run.info.status,
            [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")],
            int(run.data.tags["dino_lab.mirrored_records"]),
        )
        for run in runs
        if run.data.tags["dino_lab.kind"] == "trial"
    ]


ALL_MIRRORED = [Mirrored("finished", "FINISHED", list(range(STEPS)), STEPS)] * 3


@pytest.mark.ray
def test_killed_workers_are_retried_and_every_trial_finishes_with_each_step_once(lab: Path) -> None:
    driver = Driver(lab, "--dies-once-at", "6", "--step-seconds", "0.05")
    driver.wait_until(lambda: any(folder.records() for folder in folders(lab)))
    assert driver.listening() == {"127.0.0.1"}, "Ray is reachable from this machine only"
    outcome = driver.outcome()
    assert (outcome["states"], outcome["skipped"]) == (["finished"] * 3, 0)
    assert outcome["notes"] == ["3 attempts failed or were killed, and were taken up from their checkpoints"]
    for folder in folders(lab):
        # Killed at step 6, the checkpoint is of step 3; steps 4 and 5 are computed twice and kept once.
        assert attempts(folder) == [0, 4]
        assert [record.step for record in folder.records()] == list(range(STEPS))
    assert in_mlflow(lab) == ALL_MIRRORED
    assert not (lab / "ray").exists()


@pytest.mark.ray
def test_a_run_after_a_killed_driver_finishes_and_repeats_nothing_that_was_finished(lab: Path) -> None:
    first = Driver(lab, "--step-seconds", "0.5")
    first.wait_until(lambda: any(folder.end() for folder in folders(lab)))
    first.process.kill()
    first.process.wait()
    finished = [folder for folder in folders(lab) if folder.end()]
    before = {folder.path: folder.records() for folder in folders(lab)}
    assert 1 <= len(finished) < 3

    second = Driver(lab)
    outcome = second.outcome()
    assert outcome["states"] == ["finished"] * 3
    assert outcome["skipped"] >= len(finished)
    assert [attempts(folder) for folder in finished] == [[0]] * len(finished)
    for folder in folders(lab):
        records = folder.records()
        assert [record.step for record in records] == list(range(STEPS))
        assert records[: len(before.get(folder.path, []))] == before.get(folder.path, [])
    assert in_mlflow(lab) == ALL_MIRRORED


@pytest.mark.ray
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, "another terminal"])
def test_a_stopped_run_says_how_to_go_on_and_leaves_everything_resumable(lab: Path, stop: signal.Signals | str) -> None:
    driver = Driver(lab, "--step-seconds", "1")
    driver.wait_until(lambda: any(len(folder.records()) > 4 for folder in folders(lab)))
    if stop is signal.SIGINT:
        os.killpg(driver.process.pid, stop)  # as a terminal does: Ray's processes get it too
    elif stop is signal.SIGTERM:
        driver.process.send_signal(stop)
    else:
        with pytest.raises(ValueError, match=r"no run of others in .*: run of fake by process"):
            runner.stop("others", lab)
        runner.stop("fake", lab)
        assert all(folder.state() != "running" for folder in folders(lab))
    outcome = driver.outcome()
    assert (stop == "another terminal") == ("stopped: asked to from another terminal" in outcome["notes"])
    assert "waiting" in outcome["states"]
    assert "interrupted" in outcome["states"]
    assert any("the same command again goes on" in note for note in outcome["notes"])
    assert {(child.state, child.status) for child in in_mlflow(lab)} == {
        ("interrupted", "KILLED"),
        ("waiting", "SCHEDULED"),
    }
    for child, folder in zip(
        sorted(in_mlflow(lab), key=lambda child: -child.mirrored),
        sorted(folders(lab), key=lambda folder: -len(folder.records())),
        strict=False,
    ):
        assert child.mirrored == len(child.steps) == len(folder.records())
    with locked(lab / "run.lock", patience_seconds=0, busy="the lab is still in use", doing=""):
        pass


@pytest.mark.ray
def test_a_trial_that_hangs_ends_by_itself_is_taken_up_again_and_then_fails_and_is_tried_by_retry_alone(
    lab: Path,
) -> None:
    outcome = Driver(lab, "--max-seconds", "1.5", "--hangs-at", "5", "--rows", "1").outcome()
    (folder,) = folders(lab)
    assert (outcome["states"], attempts(folder)) == (["failed"], [0, 4, 4])
    assert "took longer than runtime.max_minutes; where it stood:" in folder.end().error
    assert "in fake_train" in folder.end().error
    retried = Driver(lab, "--only-failed").outcome()
    assert (retried["states"], attempts(folder)) == (["finished", "waiting", "waiting"], [0, 4, 4, 4])
    assert [record.step for record in folder.records()] == list(range(STEPS))


@pytest.mark.faults
def test_trials_that_raise_or_eat_memory_fail_alone(lab: Path) -> None:
    memory = psutil.virtual_memory()
    too_much = (memory.total - memory.available + 1.5 * 2**30) / memory.total
    outcome = Driver(
        lab,
        *("--eats-memory-at", "5", "--raises-at", "6", "--rows", "3"),
        RAY_memory_usage_threshold=f"{too_much:.4f}",
        RAY_memory_monitor_refresh_ms="100",
    ).outcome()
    assert outcome["states"] == ["failed", "failed", "finished"]
    errors = {each: each.end().error or "" for each in folders(lab)}
    (eater,) = (each for each, error in errors.items() if "low on memory" in error)
    (raiser,) = (each for each, error in errors.items() if "ZeroDivisionError: by zero" in error)
    # Ray kills whom it thinks best, also one that is only starting.
    assert {*attempts(eater), *attempts(raiser)} <= {0, 4}
    assert len(attempts(raiser)) <= 3
    Driver(lab).outcome()
    assert [record.step for each in folders(lab) for record in each.records()] == 3 * list(range(STEPS))


@pytest.mark.ray
def test_a_trial_over_two_workers_has_the_records_of_one_up_to_rounding(
    lab: Path, smoke: Trial, tmp_path_factory: pytest.TempPathFactory
) -> None:
    often = "runtime.log_period_steps"
    one = list(train(smoke.but({often: 2}), workdir=tmp_path_factory.mktemp("one")))
    asked = ["collapse", "--baseline", "smoke", "--seeds", "0", "--set", "runtime.workers=2"]
    line = [sys.executable, "-m", "dino_lab", "run", *asked, "--set", f"{often}=2", "--lab", str(lab), "--json"]
    said = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    two = TrialFolder(lab, smoke.identity).records()
    assert json.loads(said.stdout)["retries"] == 0
    assert [record.step for record in two] == [record.step for record in one]
    for record, other in zip(two, one, strict=True):
        assert record.values.keys() == other.values.keys()
        assert record.values.get(LOSS, 0.0) == pytest.approx(other.values.get(LOSS, 0.0), rel=1e-4)
        assert record.values.get(KNN) == other.values.get(KNN)


@pytest.mark.ray
def test_a_search_whose_driver_is_killed_goes_on_with_its_study_and_prunes_and_tells_the_truth(lab: Path) -> None:
    first = Driver(lab, "--search", "16", "--step-seconds", "0.2")
    first.wait_until(lambda: sum(folder.end() is not None for folder in folders(lab)) >= 4)
    first.process.kill()
    first.process.wait()
    outcome = Driver(lab, "--search", "16", "--step-seconds", "0.1", "--raises-at", "2").outcome()
    assert outcome["notes"][-2] == "the search has ended: 16 of 16 trials"
    assert len(outcome["states"]) == 16
    loaded = optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(lab / STUDIES))))
    told = {trial.user_attrs["trial_id"]: trial for trial in loaded.trials}
    states = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    assert {folder.path.name: states[folder.state()] for folder in folders(lab)} == {
        trial_id: trial.state for trial_id, trial in told.items()
    }
    assert {"finished", "pruned", "failed"} == {folder.state() for folder in folders(lab)}
    for folder in folders(lab):
        if folder.state() == "finished":
            assert told[folder.path.name].value == folder.records()[4].values[KNN]
    tags = [run.data.tags for run in MlflowClient(f"sqlite:///{lab / 'mlflow.db'}").search_runs(["1"])]
    children = [each for each in tags if each["dino_lab.kind"] == "trial"]
    assert {each["dino_lab.trial_id"]: each["dino_lab.search_state"] for each in children} == {
        trial_id: trial.state.name for trial_id, trial in told.items()
    }
    assert {each["dino_lab.state"] for each in children} == {"finished", "pruned", "failed"}


@pytest.mark.ray
def test_a_trial_that_no_machine_can_hold_is_refused_before_anything_starts(lab: Path) -> None:
    shutil.rmtree(lab)
    driver = Driver(lab, "--cpus", "1000")
    assert "runtime.cpus = 1000" in driver.outcome()["error"]
    assert driver.process.returncode == 2
    assert not (lab / "trials").exists()
    assert not (lab / "mlflow.db").exists()


def finished_run(lab: Path, on_progress: Callable[[Progress], None]) -> runner.Summary:
    return run(sweep([]), lab=lab, on_progress=on_progress)


def test_a_run_with_nothing_left_to_do_needs_no_ray(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "connected", None)
    shown: list[Progress] = []
    summary = finished_run(lab, shown.append)
    assert (summary.trials, summary.notes, summary.mirror_error) == ((), [], None)
    assert len(shown) == 2


def test_a_search_that_has_ended_with_failures_needs_no_ray(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "connected", None)
    first = study(lab, trials=1)
    first.begin()
    asked = first.ask()
    assert asked
    TrialFolder(lab, asked.trial.identity).write_end("failed", "by zero", seconds=1.0)
    first.tell(asked.trial.identity)
    summary = run(sweep([], study(lab, trials=1)), lab=lab)
    assert [trial.state for trial in summary.trials] == ["failed"]
    assert summary.notes[0] == "the search has ended: 1 of 1 trials"


def test_a_second_driver_in_the_same_lab_is_refused_and_told_whose_it_is(lab: Path) -> None:
    with (
        locked(lab / "run.lock", patience_seconds=0, busy="", doing="held"),
        pytest.raises(ValueError, match=f"is in use: held by process {os.getpid()} on"),
    ):
        finished_run(lab, lambda progress: None)


def test_a_full_disk_is_refused_before_anything_starts(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_FREE_BYTES", 2**70)
    with pytest.raises(ValueError, match="GiB free"):
        finished_run(lab, lambda progress: None)
    assert not (lab / "trials").exists()


def test_a_run_stops_before_the_disk_is_full(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = runner._Watch(lab, [], Mirror(lab, sweep([])), lambda progress: None)
    watch.tick()
    assert watch.stopped_for is None
    monkeypatch.setattr(runner, "_LOW_BYTES", 2**70)
    monkeypatch.setattr(runner, "_TICK_SECONDS", 0.0)
    watch._next_tick = 0.0
    with pytest.raises(KeyboardInterrupt):
        watch.tick()
    assert "make room and give the same command again" in watch.stopped_for
    watch.tick()  # Tune ends in its own time meanwhile


def test_there_is_nothing_to_stop_where_nothing_runs(lab: Path) -> None:
    with pytest.raises(ValueError, match="no run of fake in"):
        runner.stop("fake", lab)
    finished_run(lab, lambda progress: None)
    with pytest.raises(ValueError, match="no run of fake in"):
        runner.stop("fake", lab)


def test_a_store_that_machines_cannot_share_is_refused(lab: Path) -> None:
    with pytest.raises(ValueError, match="must begin with http://"):
        run(sweep([]), lab=lab, tracking_uri="ftp://me:secret@there")
    assert not list(lab.glob("*lock"))


def test_trials_that_need_anothers_checkpoint_come_after_it(smoke: Trial) -> None:
    teacher = smoke.but({"method.kind": "supervised"})
    student = smoke.but({"method.kind": "distillation", "method.checkpoint": teacher.identity})
    second = student.but({"method.checkpoint": student.identity})
    elsewhere = student.but({"method.checkpoint": "of_another_lab.pt"})
    source = runner._InOrder({trial.identity: trial for trial in (second, student, elsewhere, teacher, smoke)})
    assert [source.ask() for _ in range(4)] == [elsewhere, teacher, smoke, None]
    source.tell(smoke.identity)
    assert source.ask() is None
    source.tell(teacher.identity)
    assert [source.ask() for _ in range(2)] == [student, None]
    source.tell(student.identity)
    assert source.ask() is second
    with pytest.raises(StopIteration):
        source.ask()
    # What has finished before is not waited for.
    assert runner._InOrder({student.identity: student}).ask() is student


def test_a_trial_that_tune_gave_up_is_failed_unless_it_wrote_its_own_end(lab: Path) -> None:
    watch = runner._Watch(lab, [], None, lambda progress: None)
    TrialFolder(lab, "raised").write_end("failed", "ZeroDivisionError", seconds=3.0)
    for trial_id in ("killed", "raised"):
        watch.lost(trial_id, "the worker died")
    assert TrialFolder(lab, "killed").end() == End("failed", "the worker died", 0.0, records=0)
    assert TrialFolder(lab, "raised").end() == End("failed", "ZeroDivisionError", 3.0, records=0)
