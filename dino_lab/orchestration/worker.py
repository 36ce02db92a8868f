"""What runs in a worker's process: one trial after another, each into its folder. Nothing of MLflow or Optuna."""

import json
import os
from pathlib import Path
from typing import Any

from dino_lab.core.records import ENTROPY_FRACTION, IMAGES_PER_SECOND, KNN
from dino_lab.orchestration.folder import Train, run_trial


def work(config: dict[str, Any], *, lab: Path, train: Train | None) -> None:
    """One trial, reported to Tune record by record.

    The process is warm: it may have trained another trial before. Nothing of torch is imported before the number of
    threads is set, which is the same for all trials of a process.

    Args:
        config: The trial's settings as JSON, by "settings".
    """
    settings = json.loads(config["settings"])
    threads = settings["runtime"]["cpus"]
    os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), OPENBLAS_NUM_THREADS=str(threads))
    import torch
    from ray import tune

    from dino_lab.core.trial import Trial

    torch.set_num_threads(threads)
    for record in run_trial(Trial.of(settings), lab, train):
        shown = {key: record.values[key] for key in (ENTROPY_FRACTION, KNN, IMAGES_PER_SECOND) if key in record.values}
        tune.report({"step": record.step, "epoch": record.epoch, "verdict": record.verdict, **shown})
