"""Images a second from JPEG files on disk: of one loader process, beside lightly's transform on PIL's images, and of a
whole trial that trains on them, beside the same trial on crops that are made already.

`python benchmarks/loading.py` prints both. Files are written to a temporary folder: 500 x 375 pixels, as ImageNet's.
"""

# Threads are counted when numpy and torch are imported.
import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import datetime
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from crops import images_per_second, processor
from lightly.transforms.dino_transform import DINOTransform
from PIL import Image
from torch import Tensor

from dino_lab.core import records
from dino_lab.core.data.batches import Batches
from dino_lab.core.data.crops import Crops
from dino_lab.core.data.sources import ImageFolder
from dino_lab.core.trainer import train
from experiments.baselines import BASELINES

PHOTOGRAPHS = 128
BATCH = 16


def write_photographs(root: Path) -> None:
    """Smooth noise with some grain: about 60 kB each, as photographs of this size are."""
    generator = np.random.default_rng(0)
    for split, number in (("train", PHOTOGRAPHS), ("val", 8)):
        for i in range(number):
            folder = root / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            grain = generator.normal(0, 6, (375, 500, 3))
            image = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)) + grain
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)


def compare_loaders(root: Path, *, turns: int) -> tuple[float, float, float]:
    """lightly's and our images a second by one processor, and the ratio; both from files to a batch of crops."""
    images = ImageFolder(root=str(root)).build("train", root / "data")
    batches = Batches(images, batch_size=BATCH, seed=0, crops=Crops(), device=torch.device("cpu"))
    paths = sorted((root / "train").rglob("*.jpg"))[:BATCH]
    transform = DINOTransform()

    def lightly() -> None:
        views = []
        for path in paths:
            with Image.open(path) as image:
                views.append(transform(image.convert("RGB")))
        for crop in zip(*views, strict=True):
            torch.stack(crop)

    steps = itertools.count()

    def ours() -> None:
        batches[next(steps)]

    lightly()
    ours()
    pairs = [(images_per_second(lightly, BATCH), images_per_second(ours, BATCH)) for _ in range(turns)]
    theirs, own = zip(*pairs, strict=True)
    return statistics.median(theirs), statistics.median(own), statistics.median(b / a for a, b in pairs)


def trial_images_per_second(root: Path, *, loader_workers: int, made_already: bool, steps: int) -> float:
    """Of a trial of a ViT-Ti/16 at the reference's crops, after its first step."""
    trial = BASELINES["imagenet_vits16"].but(
        {
            "data.root": str(root),
            "batch_size": BATCH,
            "accumulation_steps": 1,
            "precision": "f32",
            "backbone.name": "vit_tiny_patch16_224",
            "method.head.out_dim": 4096,
            "runtime.device": "cpu",
            "runtime.gpus": 0.0,
            "runtime.loader_workers": loader_workers,
            "runtime.log_period_steps": 1,
        }
    )
    load = Batches.load
    if made_already:

        def repeated(self: Batches, steps: range, *, loader_workers: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            return itertools.repeat(self[0], len(steps))

        Batches.load = repeated  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as workdir:
            made = list(itertools.islice(train(trial, workdir=Path(workdir)), steps + 2))
    finally:
        Batches.load = load  # type: ignore[method-assign]
    return statistics.median(record.values[records.IMAGES_PER_SECOND] for record in made[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    busy, cpus = os.getloadavg()[0], os.cpu_count()
    print(f"{datetime.date.today()}, {processor()}, load {busy:.1f} on {cpus} CPUs, torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_photographs(root)
        start = time.perf_counter()
        theirs, own, ratio = compare_loaders(root, turns=options.turns)
        print("One processor, JPEG of 500 x 375 -> 2x224 + 8x96, images/s:")
        print(f"lightly {theirs:,.0f}, dino_lab {own:,.0f}, ratio {ratio:.1f} ({time.perf_counter() - start:.0f} s)\n")
        print("A whole trial (ViT-Ti/16, one thread), images/s:")
        for workers, made_already in ((0, True), (0, False), (1, False)):
            speed = trial_images_per_second(
                root, loader_workers=workers, made_already=made_already, steps=options.steps
            )
            how = "crops made already" if made_already else f"from files, loader processes: {workers}"
            print(f"{how}: {speed:.2f}", flush=True)


if __name__ == "__main__":
    main()
