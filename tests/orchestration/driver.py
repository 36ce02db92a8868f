"""A driver in a process of its own, to be killed: python -m tests.orchestration.driver LAB. Its trials are fakes."""

import argparse
import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dino_lab.ablation import LabelledTrial
from dino_lab.core import checkpoint
from dino_lab.core.records import ENTROPY_FRACTION, KNN, LOSS, Record
from dino_lab.core.trial import Trial
from dino_lab.orchestration.runner import Progress, run
from dino_lab.orchestration.search import Study
from dino_lab.orchestration.tracking import Sweep
from dino_lab.space import Between, Search

STEPS = 8
CHECKPOINT_PERIOD = 3


def labelled_trials(number: int = 3) -> list[LabelledTrial]:
    """Rows of one seed that differ in their epochs."""
    return [
        LabelledTrial(f"row {i}", i, 0, {"epochs": str(100 + i)}, Trial().but({"epochs": 100 + i}))
        for i in range(number)
    ]


def fake_train(
    trial: Trial,
    *,
    workdir: Path,
    resume_from: Path | None = None,
    step_seconds: float = 0.0,
    dies_once_at: int | None = None,
    hangs_at: int | None = None,
    eats_memory_at: int | None = None,
    raises_at: int | None = None,
) -> Iterator[Record]:
    """Yields STEPS records, the same values each time; writes down where each attempt began."""
    first = 0
    if resume_from:
        first = checkpoint.load(resume_from)["step"] + 1
    with (workdir / "attempts").open("a") as attempts:
        attempts.write(f"{first}\n")
    for step in range(first, STEPS):
        time.sleep(step_seconds)
        if step == hangs_at:
            time.sleep(1000)
        if step == raises_at and trial.epochs % 3 == 2:
            raise ZeroDivisionError("by zero")
        eaten = []
        while step == eats_memory_at and trial.epochs == 100:
            eaten.append(b"x" * 2**26)
            time.sleep(0.05)
        death = workdir / "died"
        if step == dies_once_at and not death.exists():
            death.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        values = {LOSS: 1 / (step + 1), ENTROPY_FRACTION: step / STEPS}
        if step % 4 == 0:
            values[KNN] = trial.epochs - 90.0 + step
        yield Record(step, step / 2, time.time(), values, *(("uniform", 5) if step >= 5 else ()))
        if step % CHECKPOINT_PERIOD == 0:
            checkpoint.save(workdir / "checkpoint.pt", {"step": step})


def sweep(labelled: list[LabelledTrial], study: Study | None = None) -> Sweep:
    return Sweep("fake", "smoke", {}, "Fakes.", labelled, "row 0", study=study)


def study(lab: Path, trials: int) -> Study:
    """Of fakes: the more epochs, the better."""
    fixed = {"collapse.policy": "record"}
    search = Search({"epochs": Between(100, 1000)}, trials=trials, sampler="random", pruner="median", fixed=fixed)
    return Study(lab, search, name="fake", baseline_name="smoke", baseline=Trial())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("lab", type=Path)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--dies-once-at", type=int)
    parser.add_argument("--hangs-at", type=int)
    parser.add_argument("--eats-memory-at", type=int)
    parser.add_argument("--raises-at", type=int)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--search", type=int)
    parser.add_argument("--only-failed", action="store_true")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--max-seconds", type=float)
    arguments = parser.parse_args()
    changes = {
        "runtime.cpus": arguments.cpus,
        "runtime.max_minutes": arguments.max_seconds and arguments.max_seconds / 60,
    }
    labelled = [replace(each, trial=each.trial.but(changes)) for each in labelled_trials(arguments.rows)]
    terminal = threading.RLock()

    def show(progress: Progress) -> None:
        """Holds what cannot be copied, as a live table does: Tune writes its callbacks to disk."""
        with terminal:
            pass

    try:
        summary = run(
            sweep([], study(arguments.lab, arguments.search)) if arguments.search else sweep(labelled),
            lab=arguments.lab,
            only_failed=arguments.only_failed,
            on_progress=show,
            train=functools.partial(
                fake_train,
                step_seconds=arguments.step_seconds,
                dies_once_at=arguments.dies_once_at,
                hangs_at=arguments.hangs_at,
                eats_memory_at=arguments.eats_memory_at,
                raises_at=arguments.raises_at,
            ),
        )
    except ValueError as error:
        print(json.dumps({"error": str(error)}))
        sys.exit(2)
    states = [trial.state for trial in summary.trials]
    print(json.dumps({"states": states, "skipped": summary.skipped, "notes": summary.notes}))


if __name__ == "__main__":
    main()
