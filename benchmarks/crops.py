"""Images a second of the lab's crops on one thread, beside lightly's DINOTransform (PIL, image by image) and kornia's.

`python benchmarks/crops.py` prints a Markdown table. All make the same kinds of crops of the same images, taking turns,
and count their own processor time, so that other work on the machine tells less (not nothing: it empties caches, which
slows image-by-image work more); a ratio is the median over the turns.
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

import kornia.augmentation as K
import numpy as np
import torch
from lightly.transforms.dino_transform import DINOTransform
from PIL import Image
from torch import Tensor

from dino_lab.core.data.crops import MEAN, STD, Crops, multi_crop
from dino_lab.core.data.draws import View

SIZES = {32: (32, 16, 6, 64), 64: (64, 32, 6, 64), 128: (96, 48, 8, 64), 320: (224, 96, 8, 16)}
"""Side of an image: sides of a global and of a local crop, local crops an image, images a batch."""


def images_per_second(work: Callable[[], None], images: int) -> float:
    start = time.thread_time()
    work()
    return images / (time.thread_time() - start)


def kornia_view(view: View, size: int) -> K.AugmentationSequential:
    """The same operations with the same strengths, batched, each image with its own draws."""
    operations = [
        K.RandomResizedCrop((size, size), scale=view.scale, ratio=view.ratio, resample="bicubic"),
        K.RandomHorizontalFlip(p=view.flip_probability),
        K.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue, p=view.jitter_probability),
        K.RandomGrayscale(p=view.grayscale_probability),
        # As far as its padding allows the 4 sigma of ours.
        K.RandomGaussianBlur((min(17, size - 1 + size % 2),) * 2, view.blur_sigma, p=view.blur_probability),
    ]
    if view.solarize_probability:
        operations.append(K.RandomSolarize(0.0, 0.0, p=view.solarize_probability))
    return K.AugmentationSequential(*operations, K.Normalize(torch.tensor(MEAN), torch.tensor(STD)))


def compare(size: int, *, turns: int) -> list[float]:
    """Images a second by lightly, kornia and the lab; ratios of the lab to the two. Medians over the turns."""
    global_size, local_size, local_number, batch = SIZES[size]
    # Smooth images, as photographs are: noise would be clamped more often.
    coarse = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    images = (smooth * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    pictures = [Image.fromarray(image) for image in images.numpy()]
    crops = Crops(global_crops_size=global_size, local_crops_size=local_size, local_crops_number=local_number)
    transform = DINOTransform(global_crop_size=global_size, local_crop_size=local_size, n_local_views=local_number)
    views = [kornia_view(crops.global_1, global_size), kornia_view(crops.global_2, global_size)]
    views += [kornia_view(crops.local, local_size)] * local_number

    def lightly() -> None:
        for crop in zip(*(transform(picture) for picture in pictures), strict=True):
            torch.stack(crop)

    def kornia() -> None:
        pixels = images.permute(0, 3, 1, 2).float() / 255
        made: list[Tensor] = [view(pixels) for view in views]
        torch.stack(made[:2])
        torch.stack(made[2:])

    epochs = iter(range(1000))

    def ours() -> None:
        multi_crop(images, np.arange(batch), seed=0, epoch=next(epochs), crops=crops)

    works = (lightly, kornia, ours)
    for work in works:
        work()
    seen = [[images_per_second(work, batch) for work in works] for _ in range(turns)]
    speeds = [statistics.median(column) for column in zip(*seen, strict=True)]
    return speeds + [statistics.median(turn[2] / turn[theirs] for turn in seen) for theirs in (0, 1)]


def processor() -> str:
    described = Path("/proc/cpuinfo")
    if described.exists():
        return next(
            line.split(":", 1)[1].strip() for line in described.read_text().splitlines() if "model name" in line
        )
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    busy, cpus = os.getloadavg()[0], os.cpu_count()
    print(
        f"{datetime.date.today()}, {processor()}, load {busy:.1f} on {cpus} CPUs, one thread, torch {torch.__version__}"
    )
    print(f"\nImages a second, medians of {options.turns} turns.\n")
    print("| source -> crops | lightly | kornia | dino_lab | to lightly | to kornia |\n|---|---|---|---|---|---|")
    for size, (global_size, local_size, local_number, _) in SIZES.items():
        theirs, kornias, own, to_lightly, to_kornia = compare(size, turns=options.turns)
        recipe = f"{size} px -> 2x{global_size} + {local_number}x{local_size}"
        print(
            f"| {recipe} | {theirs:,.0f} | {kornias:,.0f} | {own:,.0f} | {to_lightly:.1f} | {to_kornia:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
