"""Images a second of the batched crops on one thread, beside lightly's DINOTransform (PIL, image by image).

`python benchmarks/crops.py` prints a Markdown table. Both make the same crops of the same images, taking turns, and
count their own processor time, so that other work on the machine tells less (not nothing: it empties caches, which
slows lightly more); the ratio is the median over the turns.
"""

# Threads are counted when numpy and torch are imported.
import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from lightly.transforms.dino_transform import DINOTransform
from PIL import Image

from dino_lab.core.data.crops import Crops, multi_crop

SIZES = {32: (32, 16, 6), 64: (64, 32, 6), 128: (96, 48, 8)}
"""Side of an image: sides of a global and of a local crop, local crops an image."""


def images_per_second(work: Callable[[], None], images: int) -> float:
    start = time.thread_time()
    work()
    return images / (time.thread_time() - start)


def compare(size: int, *, batch: int, turns: int) -> tuple[float, float, float]:
    """lightly's and our images a second, and the ratio of ours to lightly's: medians over the turns."""
    global_size, local_size, local_number = SIZES[size]
    # Smooth images, as photographs are: noise would be clamped more often.
    coarse = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    images = (smooth * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    pictures = [Image.fromarray(image) for image in images.numpy()]
    crops = Crops(global_crops_size=global_size, local_crops_size=local_size, local_crops_number=local_number)
    transform = DINOTransform(global_crop_size=global_size, local_crop_size=local_size, n_local_views=local_number)

    def lightly() -> None:
        views = [transform(picture) for picture in pictures]
        for crop in zip(*views, strict=True):
            torch.stack(crop)

    epochs = iter(range(1000))

    def ours() -> None:
        multi_crop(images, np.arange(batch), seed=0, epoch=next(epochs), crops=crops)

    lightly()
    ours()
    pairs = [(images_per_second(lightly, batch), images_per_second(ours, batch)) for _ in range(turns)]
    theirs, own = zip(*pairs, strict=True)
    return (
        statistics.median(theirs),
        statistics.median(own),
        statistics.median(b / a for a, b in pairs),
    )


def processor() -> str:
    described = Path("/proc/cpuinfo")
    if described.exists():
        return next(
            line.split(":", 1)[1].strip() for line in described.read_text().splitlines() if "model name" in line
        )
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    busy, cpus = os.getloadavg()[0], os.cpu_count()
    print(
        f"{datetime.date.today()}, {processor()}, load {busy:.1f} on {cpus} CPUs, one thread, torch {torch.__version__}"
    )
    print(f"\nBatches of {options.batch}, median of {options.turns} turns.\n")
    print("| source -> crops | lightly, images/s | dino_lab, images/s | ratio |\n|---|---|---|---|")
    for size, (global_size, local_size, local_number) in SIZES.items():
        theirs, own, ratio = compare(size, batch=options.batch, turns=options.turns)
        recipe = f"{size} px -> 2x{global_size} + {local_number}x{local_size}"
        print(f"| {recipe} | {theirs:,.0f} | {own:,.0f} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
