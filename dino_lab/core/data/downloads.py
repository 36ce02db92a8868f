"""Small data sets that torchvision knows how to fetch: decoded once, kept as uint8."""

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from pydantic import Field

from dino_lab.core.data.decoding import square
from dino_lab.core.data.images import ImageSet, Made, kept
from dino_lab.core.data.source import Progress, Source, Split


class Download(Source):
    """A data set that torchvision fetches; never without being told to."""

    root: str | None = Field(default=None, min_length=1)
    """The folder with the files, as torchvision keeps them; None: downloads in the lab's data folder."""
    image_size: int = Field(ge=8, le=256)
    """Side of an image in pixels; where it is not the set's own, images are resized, bicubic with antialias."""

    def read(self, split: Split, data_dir: Path, *, download: bool, progress: Progress) -> ImageSet:
        root = Path(self.root) if self.root else data_dir / "downloads"
        part = self.part(split)

        def make(folder: Path) -> Made:
            found = self._found(root, part, download=download)
            number = len(found.pixels)
            shape = (number, self.image_size, self.image_size, 3)
            images = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
            for i, image in enumerate(found.pixels):
                images[i] = square(torch.from_numpy(np.array(image)), self.image_size)
                if (i + 1) % 1000 == 0 or i + 1 == number:
                    progress(i + 1, number)
            names = np.frombuffer(json.dumps(found.classes).encode(), dtype=np.uint8)
            return {"images": images, "labels": np.array(found.labels, dtype=np.int64), "classes": names}, {}

        drawing = {"kind": self.kind, "root": self.root, "part": part, "image_size": self.image_size}
        copy = kept(data_dir, drawing, make)
        return ImageSet(
            name=self.kind,
            split=split,
            pixels=copy.arrays["images"],
            places=np.arange(len(copy.arrays["labels"])),
            labels={"class": copy.arrays["labels"]},
            classes={"class": tuple(json.loads(bytes(copy.arrays["classes"].numpy())))},
            masks=None,
            digest=copy.digest,
            source=str(root),
            skipped={},
        )

    def part(self, split: Split) -> str:
        """Of the set's own parts, the one in which a split lies."""
        return "test" if split == "test" else "train"

    @abstractmethod
    def load(self, root: Path, part: str, *, download: bool) -> "Loaded":
        """A part, as torchvision reads it."""

    def _found(self, root: Path, part: str, *, download: bool) -> "Loaded":
        whose = f"data.kind = {self.kind!r}"
        try:
            return self.load(root, part, download=download)
        except (RuntimeError, OSError, EOFError) as error:
            if download:
                raise ValueError(f"{whose}: could not be fetched into {root}: {error}") from None
            raise ValueError(f"{whose}: not there, or not whole, in {root}; `--download` fetches it") from None


@dataclass(frozen=True)
class Loaded:
    """A part of a set as torchvision has it in memory."""

    pixels: UInt8[np.ndarray, "N H W 3"]
    labels: Sequence[int]
    """-1: nobody labelled the image."""
    classes: Sequence[str]


class FashionMNIST(Download):
    """Fashion-MNIST: 60,000 and 10,000 grey images of clothes, 28 x 28.

    Source: Xiao et al., arXiv:1708.07747.
    """

    kind: Literal["fashion_mnist"] = "fashion_mnist"
    """Which data set."""
    image_size: int = Field(default=28, ge=8, le=256)
    """Side of an image in pixels; where it is not the set's own, images are resized, bicubic with antialias."""

    @property
    def listed_train_images(self) -> int:
        return 60_000

    def load(self, root: Path, part: str, *, download: bool) -> Loaded:
        from torchvision import datasets  # slow to import

        found = datasets.FashionMNIST(root, train=part == "train", download=download)
        grey = found.data.numpy()[..., None]
        return Loaded(np.broadcast_to(grey, (*grey.shape[:3], 3)), found.targets.tolist(), found.classes)


class CIFAR10(Download):
    """CIFAR-10: 50,000 and 10,000 photographs of ten classes, 32 x 32.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009).
    """

    kind: Literal["cifar10"] = "cifar10"
    """Which data set."""
    image_size: int = Field(default=32, ge=8, le=256)
    """Side of an image in pixels; where it is not the set's own, images are resized, bicubic with antialias."""

    @property
    def listed_train_images(self) -> int:
        return 50_000

    def load(self, root: Path, part: str, *, download: bool) -> Loaded:
        from torchvision import datasets  # slow to import

        found = datasets.CIFAR10(root, train=part == "train", download=download)
        return Loaded(found.data, found.targets, found.classes)


class CIFAR100(Download):
    """CIFAR-100: 50,000 and 10,000 photographs of a hundred classes, 32 x 32.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009).
    """

    kind: Literal["cifar100"] = "cifar100"
    """Which data set."""
    image_size: int = Field(default=32, ge=8, le=256)
    """Side of an image in pixels; where it is not the set's own, images are resized, bicubic with antialias."""

    @property
    def listed_train_images(self) -> int:
        return 50_000

    def load(self, root: Path, part: str, *, download: bool) -> Loaded:
        from torchvision import datasets  # slow to import

        found = datasets.CIFAR100(root, train=part == "train", download=download)
        return Loaded(found.data, found.targets, found.classes)


class STL10(Download):
    """STL-10: 5,000 labelled, 100,000 unlabelled and 8,000 test photographs, 96 x 96.

    Source: Coates, Ng and Lee, "An Analysis of Single-Layer Networks in Unsupervised Feature Learning" (2011).
    """

    kind: Literal["stl10"] = "stl10"
    """Which data set."""
    image_size: int = Field(default=96, ge=8, le=256)
    """Side of an image in pixels; where it is not the set's own, images are resized, bicubic with antialias."""
    train_split: Literal["unlabeled", "train", "train+unlabeled"] = "unlabeled"
    """What is trained on; neighbours of k-NN are always of the labelled images."""

    @property
    def listed_train_images(self) -> int:
        return {"unlabeled": 100_000, "train": 5_000, "train+unlabeled": 105_000}[self.train_split]

    @property
    def bank_is_train(self) -> bool:
        return self.train_split == "train"

    def part(self, split: Split) -> str:
        if split == "test" or self.bank_is_train:
            return super().part(split)
        # In one, so that an image held out of the bank can be told from the others.
        return "train+unlabeled"

    def read(self, split: Split, data_dir: Path, *, download: bool, progress: Progress) -> ImageSet:
        images = super().read(split, data_dir, download=download, progress=progress)
        if split == "test" or self.bank_is_train:
            return images
        labelled = images.labels["class"].numpy() >= 0
        if split == "bank":
            return images.subset(np.flatnonzero(labelled))
        if self.train_split == "unlabeled":
            images = images.subset(np.flatnonzero(~labelled))
        return replace(images, labels={}, classes={})

    def load(self, root: Path, part: str, *, download: bool) -> Loaded:
        from torchvision import datasets  # slow to import

        found = datasets.STL10(root, split=part, download=download)
        names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
        return Loaded(found.data.transpose(0, 2, 3, 1), found.labels, names)
