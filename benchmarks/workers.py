"""Steps a second of a trial by one worker with one thread or several, and by as many workers with one thread each; and
what of a step is the mean of gradients.

`python benchmarks/workers.py` prints them, of `shapes_cpu` by default; `--set knob=value` changes its trial.
"""

import argparse
import datetime
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from crops import processor

from dino_lab.core import distributed, records
from dino_lab.core.trainer import train
from dino_lab.core.trial import Trial
from experiments.baselines import BASELINES

SHORT = {
    "epochs": 1,
    "data.train_images": 3200,
    "optimizer.warmup_epochs": 0.5,
    "evals.bank_images": 32,
    "data.test_images": 32,
    "evals.at_end": ["knn"],
}


def measure(results: Any, trial: Trial, rank: int, workers: int, threads: int, port: int) -> None:
    """Rank 0 tells steps a second, ms of a step that are spent in the mean of gradients, and MB of these."""
    torch.set_num_threads(threads)
    group = distributed.group(
        rank=rank, workers=workers, address=f"127.0.0.1:{port}", device=torch.device(trial.runtime.device)
    )
    average, spent, size = distributed.average_gradients, 0.0, 0

    def timed(parameters: Any) -> None:
        nonlocal spent, size
        moved = list(parameters)
        start = time.perf_counter()
        average(moved)
        spent += time.perf_counter() - start
        size = sum(each.grad.numel() * each.grad.element_size() for each in moved if each.grad is not None)

    distributed.average_gradients = timed
    with group if workers > 1 else nullcontext(), tempfile.TemporaryDirectory() as folder:
        made = list(train(trial, workdir=Path(folder)))
    if rank == 0:
        last = made[-1]
        results.put((last.step / (60 * last.values[records.TRAIN_MINUTES]), 1000 * spent / last.step, size / 1e6))


def speeds(trial: Trial, *, workers: int, threads: int) -> tuple[float, float, float]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = [
        context.Process(target=measure, args=(results, trial, rank, workers, threads, port)) for rank in range(workers)
    ]
    for process in processes:
        process.start()
    found: tuple[float, float, float] = results.get()
    for process in processes:
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--baseline", default="shapes_cpu")
    parser.add_argument("--set", action="append", default=[], metavar="KNOB=VALUE")
    options = parser.parse_args()
    changes = {knob: int(value) for knob, value in (each.split("=") for each in options.set)}
    busy, cpus = os.getloadavg()[0], os.cpu_count()
    print(f"{datetime.date.today()}, {processor()}, load {busy:.1f} on {cpus} CPUs, torch {torch.__version__}\n")
    number = options.workers
    with tempfile.TemporaryDirectory() as data_dir:
        trial = BASELINES[options.baseline].but(SHORT | changes | {"runtime.data_dir": data_dir})
        trial.data.build_all(Path(data_dir))
        arms = ((1, 1), (1, number), (number, 1))
        turns = [
            [speeds(trial, workers=workers, threads=threads) for workers, threads in arms] for _ in range(options.turns)
        ]
    for (workers, threads), *of_arm in zip(arms, *turns, strict=True):
        steps, mean, size = (statistics.median(values) for values in zip(*of_arm, strict=True))
        print(
            f"workers: {workers}, threads of each: {threads}: {steps:.1f} steps/s; "
            f"of {1000 / steps:.1f} ms a step {mean:.2f} in the mean of {size:.2f} MB of gradients"
        )
    print(f"ratio of the last two {statistics.median(several[0] / one[0] for _, one, several in turns):.2f}")


if __name__ == "__main__":
    main()
