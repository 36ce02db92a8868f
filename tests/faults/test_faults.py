"""What may happen to a sweep, on a real Ray cluster of three nodes and with a real MLflow server.

Whatever it is, the same command again ends with the records of a run to which nothing happened, bit for bit.
`pytest -m faults` runs all of it, half an hour; what is marked `ray` too is in every run of the tests.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest

from dino_lab.core.records import LOSS
from dino_lab.orchestration.folder import TrialFolder
from tests.faults.sweep import ROOT, Cluster, Server, Sweep, assert_nothing_lost, pause, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
FAULTS = 100
"""Of the soak."""


@pytest.mark.ray
def test_a_worker_and_a_node_are_killed_and_the_server_is_away(
    tmp_path: Path, undisturbed: Path, cluster: Cluster, server: Server
) -> None:
    chance = random.Random(0)
    sweep = Sweep(tmp_path, cluster=cluster, server=server)
    driver = sweep.start()
    wait_until(sweep.begun)
    pause(chance)
    kill(chance.choice(sweep.workers()))
    server.kill()
    pause(chance)
    cluster.kill_a_node()
    wait_until(sweep.begun)
    server.start()
    assert driver.wait(timeout=280) == 0, sweep.said()
    assert "attempts failed or were killed, and were taken up from their checkpoints" in sweep.said()
    assert_nothing_lost(sweep, undisturbed)


def test_a_worker_of_a_trial_over_two_is_killed(
    tmp_path: Path, undisturbed: Path, undisturbed_by_two: Path, cluster: Cluster, server: Server
) -> None:
    chance = random.Random(5)
    sweep = Sweep(tmp_path, cluster=cluster, server=server, workers=2)
    driver = sweep.start()
    for of_rank in (sweep.workers, others, others):
        wait_until(sweep.begun)
        wait_until(of_rank)
        pause(chance)
        for process in of_rank():
            kill(process)
    assert driver.wait(timeout=280) in (0, 1), sweep.said()
    assert sweep.run() == 0, sweep.said()
    assert_nothing_lost(sweep, undisturbed_by_two)
    for folder in sweep.folders:  # and of what one worker does, the same up to rounding, while rounding is small
        one = TrialFolder(undisturbed, folder.path.name).records()[:10]
        for record, other in zip(folder.records(), one, strict=False):
            assert record.values[LOSS] == pytest.approx(other.values[LOSS], rel=1e-3) if LOSS in record.values else True


def test_the_driver_is_killed_and_terminated_and_interrupted(
    tmp_path: Path, undisturbed: Path, cluster: Cluster, server: Server
) -> None:
    chance = random.Random(1)
    sweep = Sweep(tmp_path, cluster=cluster, server=server)
    for stop in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        driver = sweep.start()
        wait_until(sweep.begun)
        pause(chance)
        kill(driver.pid, stop, group=stop is signal.SIGINT)  # as a terminal does
        assert driver.wait(timeout=60) == (-signal.SIGKILL if stop is signal.SIGKILL else 130), sweep.said()
        wait_until(lambda: not sweep.workers())  # those of a killed driver die later
    assert sweep.run() == 0, sweep.said()
    assert_nothing_lost(sweep, undisturbed)


def test_the_server_is_away_for_two_minutes(
    tmp_path: Path, undisturbed: Path, cluster: Cluster, server: Server
) -> None:
    sweep = Sweep(tmp_path, cluster=cluster, server=server)
    driver = sweep.start()
    wait_until(sweep.begun)
    server.kill()
    pause(random.Random(2), at_least=120, at_most=121)
    server.start()
    assert driver.wait(timeout=280) in (0, 1), sweep.said()
    # It may have come back too late for that run; then the next one, which has nothing to train, sends the rest.
    assert sweep.run() == 0, sweep.said()
    assert_nothing_lost(sweep, undisturbed)


def test_the_disk_is_full(tmp_path: Path, small_disk: Path, undisturbed: Path) -> None:
    sweep = Sweep(tmp_path, lab=small_disk / "lab")
    driver = sweep.start()
    wait_until(sweep.begun)
    filler = small_disk / "filler"
    subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=1M"], check=False, capture_output=True)
    assert driver.wait(timeout=120) in (1, 130), sweep.said()
    assert any(folder.state() in ("interrupted", "failed") for folder in sweep.folders)
    refused = sweep.start()
    assert refused.wait(timeout=60) == 2
    filler.unlink()
    assert "0.00 GiB free, at least 1 GiB are needed" in sweep.said()
    assert sweep.run() == 0, sweep.said()
    assert_nothing_lost(sweep, undisturbed)


def test_the_lab_is_read_only(tmp_path: Path, small_disk: Path, undisturbed: Path) -> None:
    sweep = Sweep(tmp_path, lab=small_disk / "lab")
    interrupt(sweep)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert sweep.run() == 2
    assert "cannot be written to" in sweep.said()
    subprocess.run([sys.executable, "-m", "dino_lab", "status", *sweep.asked], cwd=ROOT, check=True)
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert sweep.run() == 0, sweep.said()
    assert_nothing_lost(sweep, undisturbed)


def test_files_are_cut_short_between_two_runs(tmp_path: Path, undisturbed: Path) -> None:
    chance = random.Random(3)
    sweep = Sweep(tmp_path)
    driver = sweep.start()
    wait_until(lambda: any(folder.end() for folder in sweep.folders) and sweep.begun())
    kill(driver.pid)
    driver.wait()
    wait_until(lambda: not sweep.workers())
    for folder in sweep.folders:
        for name in ("checkpoint.pt", "journal.jsonl", "trial.json", "end.json"):
            cut(folder, name, chance)
    assert sweep.run() == 0, sweep.said()
    assert_nothing_lost(sweep, undisturbed)


def test_the_clock_is_set_back_between_two_runs(tmp_path: Path, undisturbed: Path) -> None:
    sweep = Sweep(tmp_path)
    interrupt(sweep)
    yesterday = tmp_path / "yesterday"
    yesterday.mkdir()
    (yesterday / "sitecustomize.py").write_text("import time\nnow = time.time\ntime.time = lambda: now() - 86_400.0\n")
    assert sweep.run(PYTHONPATH=str(yesterday)) == 0, sweep.said()
    seconds = [record.seconds for folder in sweep.folders for record in folder.records()]
    assert max(seconds) - min(seconds) > 80_000, "the clock was set back"
    assert_nothing_lost(sweep, undisturbed)


def test_a_second_run_of_the_same_experiment_says_so_and_does_nothing(tmp_path: Path, undisturbed: Path) -> None:
    sweep = Sweep(tmp_path)
    driver = sweep.start()
    wait_until(sweep.begun)
    second = sweep.start()
    assert second.wait(timeout=60) == 2
    assert f"is in use: run of collapse by process {driver.pid} on" in sweep.said()
    assert driver.wait(timeout=280) == 0, sweep.said()
    assert_nothing_lost(sweep, undisturbed)


@pytest.mark.timeout(5400)
def test_a_hundred_faults_at_random_points(tmp_path: Path, undisturbed: Path, cluster: Cluster, server: Server) -> None:
    chance = random.Random(4)
    done: Counter[str] = Counter()
    while done.total() < FAULTS:
        sweep = Sweep(tmp_path / str(done.total()), cluster=cluster, server=server)
        while not sweep.is_done():
            done += harmed(sweep, cluster, server, chance)
            print(dict(done), flush=True)
        assert sweep.run() == 0, sweep.said()
        assert_nothing_lost(sweep, undisturbed)


def harmed(sweep: Sweep, cluster: Cluster, server: Server, chance: random.Random) -> Counter[str]:
    """One run of the sweep, and perhaps files cut short after it: what was done to it, and how often."""
    done: Counter[str] = Counter()
    driver = sweep.start()
    stops = {"killed": signal.SIGKILL, "terminated": signal.SIGTERM, "interrupted": signal.SIGINT}
    while driver.poll() is None:
        wait_until(lambda: sweep.begun() or driver.poll() is not None)
        pause(chance)
        fault = chance.choice(["worker", "worker", "worker", "node", "server", "second run", *stops])
        done[fault] += 1
        if fault == "worker":
            for worker in sweep.workers()[:1]:
                kill(worker)
        elif fault == "node":
            cluster.kill_a_node()
        elif fault == "server":
            server.kill()
            pause(chance)
            server.start()
        elif fault == "second run":
            assert sweep.start().wait(timeout=100) == 2 or driver.poll() is not None
        else:
            kill(driver.pid, stops[fault])
            driver.wait(timeout=100)
    wait_until(lambda: not sweep.workers())
    for folder in sweep.folders:
        if chance.random() < 0.1:
            name = chance.choice(["checkpoint.pt", "journal.jsonl", "trial.json", "end.json"])
            cut(folder, name, chance)
            done[name] += 1
    return done


def others() -> list[int]:
    """Processes of ranks other than 0."""
    return [each.pid for each in psutil.process_iter(["name"]) if each.info["name"].startswith("ray::_Other")]


def interrupt(sweep: Sweep) -> None:
    """Starts it, and ends it by Ctrl-C once a trial is being trained."""
    driver = sweep.start()
    wait_until(sweep.begun)
    kill(driver.pid, signal.SIGINT)
    assert driver.wait(timeout=60) == 130


def kill(process: int, how: signal.Signals = signal.SIGKILL, *, group: bool = False) -> None:
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(process, how)


def cut(folder: TrialFolder, name: str, chance: random.Random) -> None:
    """At any byte."""
    path = folder.path / name
    if path.exists():
        os.truncate(path, chance.randrange(path.stat().st_size + 1))
