"""Batches by step: what a loader hands to the trainer, alike for any number of workers."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino_lab.core import distributed
from dino_lab.core.data.crops import Crops, multi_crop, whole
from dino_lab.core.data.images import ImageSet
from dino_lab.core.data.random import order

_SMALL_IMAGES, _PHOTOGRAPHS = 64, 8
"""Images that a processor works on at once: few enough for its cache if they are small, and for the memory if not."""
_WHOLE_IMAGES = 256
"""Images that are evaluated at once."""


class Batches(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Step -> the crops of its images, and their classes, -1 where nobody labelled them; of these a rank's share.

    The last images of an epoch that do not fill a batch are left out. Crops are made on `device`, of images that are
    kept at one size. Where a step is worked through in several equal parts, a rank has its share of each.
    """

    def __init__(
        self, images: ImageSet, *, batch_size: int, seed: int, crops: Crops, device: torch.device, parts: int = 1
    ) -> None:
        if batch_size > len(images):
            raise ValueError(f"batch_size = {batch_size}: exceeds the {len(images)} images of {images.name}")
        self.images = images
        self.labels = images.labels.get("class", torch.full((len(images),), -1))
        self.batch_size = batch_size
        self.seed = seed
        self.crops = crops
        self.device = device
        self.parts = parts
        # Noted here, since processes that make crops ahead are in no group.
        self.rank, self.workers = distributed.rank(), distributed.workers()
        self.steps_per_epoch = len(images) // batch_size
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(
        self, step: int
    ) -> tuple[Float[Tensor, "G B 3 S S"], Float[Tensor, "L B 3 s s"], Int64[Tensor, "B"]]:
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:  # sorting all images once an epoch, not once a step
            self._epoch, self._order = epoch, order(self.seed, epoch, len(self.images))
        batch = self._order[place * self.batch_size :][: self.batch_size]
        indices = batch.reshape(self.parts, self.workers, -1)[:, self.rank].reshape(-1)
        parts = [self._crops(part, epoch) for part in _parts(indices, self.images, self.device)]
        global_crops, local_crops = (torch.cat(crops, dim=1) for crops in zip(*parts, strict=True))
        return global_crops, local_crops, self.labels[torch.from_numpy(indices)]

    def _crops(
        self, indices: Int64[np.ndarray, "b"], epoch: int
    ) -> tuple[Float[Tensor, "G b 3 S S"], Float[Tensor, "L b 3 s s"]]:
        images = self.images.images(indices)
        if isinstance(images, Tensor) and self.crops.is_batched(images):
            images = images.to(self.device)
        return multi_crop(images, indices, seed=self.seed, epoch=epoch, crops=self.crops)

    def load(self, steps: range, *, loader_workers: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches of these steps in order, made by this many processes ahead of time, or here if 0."""
        return _loaded(self, steps, loader_workers, pinned=self.device.type == "cpu")


class Wholes(Dataset[Tensor]):
    """Whole images as they are evaluated, some hundreds at a time."""

    def __init__(self, images: ImageSet, size: int) -> None:
        self.images = images
        self.size = size
        self.chunks = np.array_split(np.arange(len(images)), max(1, -(-len(images) // _WHOLE_IMAGES)))

    def __getitem__(self, chunk: int) -> Float[Tensor, "b 3 size size"]:
        parts = _parts(self.chunks[chunk], self.images, torch.device("cpu"))
        return torch.cat([whole(self.images.images(part), self.size) for part in parts])

    def load(self, *, loader_workers: int, first: int = 0, every: int = 1) -> Iterator[Tensor]:
        """All of them in order, or every so many from the first on; made by this many processes ahead of time, or here
        if 0."""
        return _loaded(self, range(first, len(self.chunks), every), loader_workers, pinned=True)


def _parts(indices: Int64[np.ndarray, "B"], images: ImageSet, device: torch.device) -> Iterator[Int64[np.ndarray, "b"]]:
    """The indices, as many at a time as are worked on at once."""
    size = len(indices)
    if device.type == "cpu":
        size = _SMALL_IMAGES if isinstance(images.pixels, Tensor) else _PHOTOGRAPHS
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _loaded(dataset: Dataset[Any], sampler: Iterable[int], loader_workers: int, *, pinned: bool) -> Iterator[Any]:
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=loader_workers,
        pin_memory=pinned and torch.cuda.is_available(),
        generator=torch.Generator(),  # or it would draw from the caller's
    )
    return iter(loader)
