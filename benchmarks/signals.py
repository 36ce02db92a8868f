"""What it costs to look: the part of training's time that signals take, at the logging period.

    python benchmarks/signals.py           # on the processor, with one thread
    python benchmarks/signals.py --cuda    # on a GPU, of a network of the paper's size

Two trials are trained as they are; every function that measures is timed where it is called, each step's use of
prototypes too, and set against the time of the training steps. Evaluations are neither.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dino_lab.core.diagnostics import prototypes, signals
from dino_lab.core.methods import dino
from dino_lab.core.records import IMAGES_PER_SECOND, PEAK_MEMORY, TRAIN_MINUTES, Record
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
ON_CUDA = {
    "ViT-S/16, 2 x 224 + 8 x 96 px, K 65536, bf16, 64 images, every 50 steps": BASELINES["imagenet_vits16"].but(
        {
            "epochs": 2,
            "optimizer.warmup_epochs": 0.5,
            "data": {"kind": "shapes", "image_size": 224, "train_images": 3200, "test_images": 8},
            "batch_size": 64,
            "accumulation_steps": 1,
            "evals.bank_images": 8,
            "evals.during": [],
            "evals.at_end": [],
            "crops.backend": "batched",
            "runtime.loader_workers": 0,
            "runtime.log_period_steps": 50,
        }
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuda", action="store_true")
    torch.set_num_threads(1)
    for name, trial in (ON_CUDA if parser.parse_args().cuda else TRIALS).items():
        spent, last = measured(trial)
        seconds = 60 * last.values[TRAIN_MINUTES]
        speed, memory = last.values[IMAGES_PER_SECOND], last.values[PEAK_MEMORY]
        print(f"\n{name}; {seconds:.0f} s in training steps, {speed:.0f} images/s at last, {memory:.0f} MiB")
        print("\n| part | % of training |\n|---|---|")
        for part, of_part in spent.items():
            print(f"| {part} | {100 * of_part / seconds:.2f} |")
        print(f"| **together** | **{100 * sum(spent.values()) / seconds:.2f}** |")


def measured(trial: Trial) -> tuple[dict[str, float], Record]:
    """Seconds in each part, and the last record."""
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
    return spent, last


def _timed(function: Callable[..., Any], spent: dict[str, float], part: str) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        started = now()
        try:
            return function(*arguments, **options)
        finally:
            spent[part] += now() - started

    return timed


def now() -> float:
    """Seconds, once all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
