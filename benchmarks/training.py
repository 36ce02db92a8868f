"""Images/s of whole training, crops included: dino_lab against lightly's DINO recipe, in turns in one run.

Both train timm's ViT (32 px, patch 4, dim 192, depth 6) with the reference's head (K 4096), 2 + 6 crops and batches
of 64, from the same images. lightly's recipe is that of its documentation: its transform in loader processes, its
head, loss and momentum update, torch's AdamW. Each side has all processors that this process may use, in the way
that serves it best; a trial of a sweep has one. Each turn is a process of its own, so that nothing of one side (its
loader's processes, which work ahead) runs in the other's time.

    python benchmarks/training.py [--rounds 3] [--steps 12]
    taskset -c 0 python benchmarks/training.py
"""

import argparse
import copy
import datetime
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import timm
import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.dino_transform import DINOTransform
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dino_lab.core.records import IMAGES_PER_SECOND
from dino_lab.core.trainer import train
from dino_lab.core.trial import Trial

BATCH, IMAGES = 64, 4096


def trial(*, steps: int, precision: str, data_dir: Path) -> Trial:
    return Trial().but(
        {
            "precision": precision,
            "epochs": 100,
            "batch_size": BATCH,
            "data.image_size": 32,
            "data.train_images": IMAGES,
            "data.test_images": 64,
            "crops.global_crops_size": 32,
            "crops.local_crops_size": 16,
            "crops.local_crops_number": 6,
            "backbone.name": "vit_tiny_patch16_224",
            "backbone.patch_size": 4,
            "backbone.depth": 6,
            "method.head.out_dim": 4096,
            "evals.bank_images": 64,
            "runtime.log_period_steps": steps,
            "runtime.data_dir": str(data_dir),
        }
    )


def ours(settings: Trial, *, steps: int) -> Iterator[float]:
    """Images/s of each stretch of steps; evaluations are not timed."""
    assert settings.runtime.log_period_steps == steps
    with tempfile.TemporaryDirectory() as workdir:
        for record in train(settings, workdir=Path(workdir)):
            if record.step:
                yield record.values[IMAGES_PER_SECOND]


class Pictures(Dataset):  # type: ignore[type-arg]
    """The same images as PIL, which lightly's transform works on."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images.numpy()
        self.transform = DINOTransform(global_crop_size=32, local_crop_size=16, n_local_views=6)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return self.transform(Image.fromarray(self.images[index]))


def lightly(settings: Trial, *, steps: int) -> Iterator[float]:
    """Images/s of each stretch of steps of lightly's recipe."""
    assert settings.runtime.data_dir
    images = settings.data.build("train", Path(settings.runtime.data_dir)).images
    backbone = timm.create_model(
        settings.backbone.name,
        num_classes=0,
        img_size=32,
        patch_size=4,
        depth=6,
        dynamic_img_size=True,
        drop_path_rate=settings.backbone.drop_path_rate,
    )
    student = torch.nn.Sequential(backbone, DINOProjectionHead(192, 2048, 256, 4096, freeze_last_layer=1))
    teacher = torch.nn.Sequential(copy.deepcopy(backbone), DINOProjectionHead(192, 2048, 256, 4096))
    teacher[1].load_state_dict(student[1].state_dict())
    deactivate_requires_grad(teacher)
    criterion = DINOLoss(output_dim=4096, warmup_teacher_temp_epochs=5)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0005)
    loader = DataLoader(Pictures(images), BATCH, shuffle=True, drop_last=True, num_workers=torch.get_num_threads())
    started = done = 0.0
    while True:
        for views in loader:
            started = started or time.perf_counter()
            update_momentum(student, teacher, m=0.996)
            with torch.autocast("cpu", torch.bfloat16, settings.precision == "bf16"):
                teacher_out = [teacher(view) for view in views[:2]]
                student_out = [student(view) for view in views]
            loss = criterion([t.float() for t in teacher_out], [s.float() for s in student_out], epoch=0)
            optimizer.zero_grad()
            loss.backward()
            student[1].cancel_last_layer_gradients(current_epoch=0)
            optimizer.step()
            done += 1
            if done == steps:
                yield steps * BATCH / (time.perf_counter() - started)
                started = done = 0.0


SIDES = {
    "dino_lab f32": (ours, "f32"),
    "lightly f32": (lightly, "f32"),
    "dino_lab bf16": (ours, "bf16"),
    "lightly bf16": (lightly, "bf16"),
}


def turn(side: str, data_dir: Path, *, steps: int) -> float:
    """Images/s of one side over `steps` steps, after as many to warm up."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    train_side, precision = SIDES[side]
    rates = train_side(trial(steps=steps, precision=precision, data_dir=data_dir), steps=steps)
    next(rates)
    return next(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    bf16 = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    sides = [side for side in SIDES if bf16 or "bf16" not in side]
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            rates = {}
            for side in sides:
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    rates[side] = pool.submit(turn, side, Path(folder), steps=arguments.steps).result()
            rounds.append(rates)
    processors = len(os.sched_getaffinity(0))
    print(f"{datetime.date.today()}, {platform.machine()}, {processors} processors, images/s\n")
    print(f"| round | {' | '.join(sides)} |\n|{'---|' * (len(sides) + 1)}")
    for i, rates in enumerate(rounds):
        print(f"| {i + 1} | {' | '.join(f'{rates[side]:.1f}' for side in sides)} |")
    print()
    for ours_side in (side for side in sides if "dino_lab" in side):
        for theirs in (side for side in sides if "lightly" in side):
            ratios = [rates[ours_side] / rates[theirs] for rates in rounds]
            print(f"{ours_side} / {theirs}: median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
