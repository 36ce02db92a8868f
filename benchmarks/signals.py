"""What it costs to look: the part of training's time that signals take, at the logging period. CPU.

    python benchmarks/signals.py

Two trials are trained as they are; every function that measures is timed where it is called, each step's use of
prototypes too, and set against the time of the training steps. Evaluations are neither.
"""

import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dino_lab.core.diagnostics import prototypes, signals
from dino_lab.core.methods import dino
from dino_lab.core.records import TRAIN_MINUTES
from dino_lab.core.trainer import train
from dino_lab.core.trial import Trial
from experiments.baselines import BASELINES

PARTS: dict[str, list[tuple[Any, str]]] = {
    "entropy, KL, agreement": [(dino, "entropy"), (dino, "kl_divergence"), (dino, "agreement")],
    "use of prototypes": [(prototypes.PrototypeUse, name) for name in ("see", "end_step", "measures")],
    "std, rank, spectrum": [(signals, "of_features"), (signals, "of_outputs")],
    "gradient norms": [(signals, "gradient_norms")],
    "teacher to student": [(signals, "distance")],
}

TRIALS = {
    "shapes_cpu: 32 px, D 96, K 256, 16 images, every 10 steps": BASELINES["shapes_cpu"].but({"epochs": 2}),
    "96 px, patch 16, D 192, depth 12, K 4096, 32 images, every 50 steps": BASELINES["shapes_cpu"].but(
        {
            "epochs": 1,
            "optimizer.warmup_epochs": 0.5,
            "data.image_size": 96,
            "data.train_images": 3200,
            "data.test_images": 8,
            "batch_size": 32,
            "backbone.patch_size": 16,
            "backbone.embed_dim": 192,
            "backbone.depth": 12,
            "crops.global_crops_size": 96,
            "crops.local_crops_size": 48,
            "method.head.out_dim": 4096,
            "method.head.hidden_dim": 1024,
            "method.head.bottleneck_dim": 256,
            "evals.bank_images": 8,
            "evals.during": [],
            "evals.at_end": [],
            "runtime.log_period_steps": 50,
        }
    ),
}


def main() -> None:
    torch.set_num_threads(1)
    for name, trial in TRIALS.items():
        spent, seconds = measured(trial)
        print(f"\n{name}; {seconds:.0f} s in training steps\n\n| part | % of training |\n|---|---|")
        for part, of_part in spent.items():
            print(f"| {part} | {100 * of_part / seconds:.2f} |")
        print(f"| **together** | **{100 * sum(spent.values()) / seconds:.2f}** |")


def measured(trial: Trial) -> tuple[dict[str, float], float]:
    """Seconds in each part, and in the training steps."""
    spent = dict.fromkeys(PARTS, 0.0)
    plain = {(owner, name): getattr(owner, name) for of_part in PARTS.values() for owner, name in of_part}
    try:
        for part, of_part in PARTS.items():
            for owner, name in of_part:
                setattr(owner, name, _timed(plain[owner, name], spent, part))
        with tempfile.TemporaryDirectory() as folder:
            *_, last = itertools.chain(train(trial, workdir=Path(folder)))
    finally:
        for (owner, name), function in plain.items():
            setattr(owner, name, function)
    return spent, 60 * last.values[TRAIN_MINUTES]


def _timed(function: Callable[..., Any], spent: dict[str, float], part: str) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            spent[part] += time.perf_counter() - started

    return timed


if __name__ == "__main__":
    main()
