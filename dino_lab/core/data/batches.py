"""Batches of crops by step: what a loader hands to the trainer, alike for any number of workers."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino_lab.core.data.crops import Crops, multi_crop
from dino_lab.core.data.random import order
from dino_lab.core.data.sources import ImageSet


class Batches(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Step -> the crops of its images, and their classes.

    The last images of an epoch that do not fill a batch are left out.
    """

    def __init__(self, images: ImageSet, *, batch_size: int, seed: int, crops: Crops) -> None:
        if batch_size > len(images.images):
            raise ValueError(f"batch_size = {batch_size}: exceeds the {len(images.images)} images of {images.name}")
        self.images, self.labels = images.images, images.labels["class"]
        self.batch_size = batch_size
        self.seed = seed
        self.crops = crops
        self.steps_per_epoch = len(self.images) // batch_size
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(
        self, step: int
    ) -> tuple[Float[Tensor, "G B 3 S S"], Float[Tensor, "L B 3 s s"], Int64[Tensor, "B"]]:
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:  # sorting all images once an epoch, not once a step
            self._epoch, self._order = epoch, order(self.seed, epoch, len(self.images))
        indices = self._order[place * self.batch_size :][: self.batch_size]
        chosen = torch.from_numpy(indices)
        crops = multi_crop(self.images[chosen], indices, seed=self.seed, epoch=epoch, crops=self.crops)
        return *crops, self.labels[chosen]

    def load(self, steps: range, *, loader_workers: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches of these steps in order, made by this many processes ahead of time, or here if 0."""
        loader: DataLoader[tuple[Tensor, Tensor, Tensor]] = DataLoader(
            self,
            batch_size=None,
            sampler=steps,
            num_workers=loader_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or it would draw from the caller's
        )
        return iter(loader)
