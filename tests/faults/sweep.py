"""The sweep that faults are done to, as a person runs it, and what must hold of it afterwards."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from mlflow import MlflowClient

from dino_lab.core.records import TIMINGS, Record
from dino_lab.orchestration.folder import TrialFolder, is_locked

ROOT = Path(__file__).parents[2]
TRIALS = 6
ASKED = ["collapse", "--baseline", "smoke", "--seeds", "0,1", "--set", "epochs=50"]
OFTEN = ["--set", "runtime.log_period_steps=2", "--set", "runtime.checkpoint_period_steps=10"]

DRIVERS: list["subprocess.Popen[bytes]"] = []
"""All that were started; a test that fails leaves some behind."""


class Sweep:
    """`dino-lab run` of three rows with two seeds, 200 steps each, in a lab of its own."""

    def __init__(
        self,
        folder: Path,
        *,
        cluster: "Cluster | None" = None,
        server: "Server | None" = None,
        lab: Path | None = None,
        workers: int = 1,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.lab = lab or folder / "lab"
        self.asked = [*ASKED, *OFTEN, "--set", f"runtime.workers={workers}", "--lab", str(self.lab)]
        self.options = ["--address", cluster.address] if cluster else []
        self.options += ["--tracking-uri", server.uri] if server else []
        self.uri = server.uri if server else f"sqlite:///{self.lab / 'mlflow.db'}"
        self.log = folder / "said.txt"

    def start(self, **environment: str) -> "subprocess.Popen[bytes]":
        """The driver, in a process group of its own."""
        with self.log.open("ab") as log:
            driver = subprocess.Popen(
                [sys.executable, "-m", "dino_lab", "run", *self.asked, *self.options],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # Or Ray would look for 127.0.0.1 at this machine's other address.
                env=os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} | environment,
            )
        DRIVERS.append(driver)
        return driver

    def run(self, **environment: str) -> int:
        """To its end; the exit code."""
        return self.start(**environment).wait(timeout=280)

    def said(self) -> str:
        return self.log.read_text()

    @property
    def folders(self) -> list[TrialFolder]:
        return [TrialFolder(self.lab, path.name) for path in sorted((self.lab / "trials").glob("*"))]

    def begun(self) -> bool:
        """Whether a trial that has a checkpoint is being trained."""
        return any(folder.checkpoint.exists() and is_locked(folder.lock) for folder in self.folders)

    def is_done(self) -> bool:
        return [folder.state() for folder in self.folders] == ["finished"] * TRIALS

    def workers(self) -> list[int]:
        """Processes that train a trial now."""
        texts = [folder.lock.read_text() for folder in self.folders if is_locked(folder.lock)]
        return [int(found[1]) for text in texts if (found := re.search(r"by process (\d+)", text))]


class Cluster:
    """tests/faults/cluster.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.cluster"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self.address = self._line()

    def kill_a_node(self) -> None:
        """One on which no driver is; another takes its place."""
        assert self._process.stdin
        self._process.stdin.write("kill\n")
        self._process.stdin.flush()
        assert self._line() == "killed"

    def close(self) -> None:
        self._process.communicate(timeout=60)

    def _line(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()


class Server:
    """`mlflow server` on a port that stays the same."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
        wait_until(self._answers, seconds=120)

    def kill(self) -> None:
        """With all of its processes, at once."""
        assert self._process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=1)
        except OSError:
            return False
        return True


def wait_until(condition: Callable[[], object], *, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def pause(chance: random.Random, *, at_least: float = 0.0, at_most: float = 2.0) -> None:
    """So that a fault falls anywhere; seconds."""
    time.sleep(chance.uniform(at_least, at_most))


def bits(records: list[Record]) -> list[tuple[object, ...]]:
    """What must be the same in every run of a trial: all but times."""
    return [
        (
            record.step,
            record.epoch,
            {name: value.hex() for name, value in record.values.items() if name not in TIMINGS},
            record.verdict,
            record.onset_step,
            record.left,
        )
        for record in records
    ]


def assert_nothing_lost(sweep: Sweep, undisturbed: Path) -> None:
    """Every trial has finished with the records of the undisturbed run, bit for bit, and MLflow has each once."""
    assert len(sweep.folders) == TRIALS
    for folder in sweep.folders:
        assert (folder.path.name, folder.state()) == (folder.path.name, "finished")
        assert bits(folder.records()) == bits(TrialFolder(undisturbed, folder.path.name).records())
    client = MlflowClient(sweep.uri)
    experiment = client.get_experiment_by_name("collapse")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = (run for run in runs if run.data.tags["dino_lab.kind"] == "ablation")
    children = [run for run in runs if run.data.tags["dino_lab.kind"] == "trial"]
    assert [run.data.tags["mlflow.parentRunId"] for run in children] == [parent.info.run_id] * TRIALS
    assert {run.data.tags["dino_lab.trial_id"] for run in children} == {folder.path.name for folder in sweep.folders}
    for run in children:
        records = TrialFolder(sweep.lab, run.data.tags["dino_lab.trial_id"]).records()
        assert run.data.tags["dino_lab.state"] == "finished"
        assert json.loads(run.data.tags["dino_lab.mirrored_records"]) == len(records)
        for name in run.data.metrics:
            points = sorted(client.get_metric_history(run.info.run_id, name), key=lambda point: point.step)
            made = [record for record in records if name in record.values]
            assert [point.step for point in points] == [record.step for record in made], name
            if name not in TIMINGS:  # those of records that were lost and made again are others
                assert [point.value for point in points] == [record.values[name] for record in made], name
