"""Small data sets that torchvision knows where to fetch: decoded once, kept as uint8."""

import json
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from pydantic import Field

from dino_lab.core.data.decoding import square
from dino_lab.core.data.images import ImageSet, Made, kept, mapped
from dino_lab.core.data.source import Progress, Source, Split


class Download(Source):
    """A data set that torchvision fetches, by its class of the same name; never without being told to.

    Files must have the checksums of those that were published, so that the kind alone tells what they hold.
    """

    not_identity: ClassVar = frozenset({"root"})  # the published files, wherever they lie

    root: str | None = Field(default=None, min_length=1)
    """The folder with the files, as torchvision keeps them; None: downloads in the lab's data folder."""
    image_size: int = Field(ge=8, le=256)
    """Side of an image in pixels; where it is not the set's own, images are resized, bicubic with antialias."""

    def read(self, split: Split, data_dir: Path, *, download: bool, progress: Progress) -> ImageSet:
        root = Path(self.root) if self.root else data_dir / "downloads"
        part = self.part(split)

        def make(folder: Path) -> Made:
            self._check(root, download=download)
            found = self.load(root, part)
            number = len(found.labels)
            images = mapped(folder / "images.npy", (number, self.image_size, self.image_size, 3))
            for i, image in enumerate(found.pixels):
                images[i] = square(torch.from_numpy(np.array(image)), self.image_size)
                if (i + 1) % 1000 == 0 or i + 1 == number:
                    progress(i + 1, number)
            names = np.frombuffer(json.dumps(found.classes).encode(), dtype=np.uint8)
            return {"images": images, "labels": found.labels.astype(np.int64), "classes": names}, {}

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

    @property
    def torchvision(self) -> Any:
        """torchvision's class."""
        from torchvision import datasets  # slow to import

        return getattr(datasets, type(self).__name__)

    def part(self, split: Split) -> str:
        """Of the set's own parts, the one in which a split lies."""
        return "test" if split == "test" else "train"

    def files(self) -> dict[str, str]:
        """The MD5 of each published file, by its path below the root."""
        theirs = self.torchvision
        return {f"{theirs.base_folder}/{name}": md5 for name, md5 in theirs.train_list + theirs.test_list}

    def fetch(self, root: Path) -> None:
        """Fetches what is not there, and unpacks it."""
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(self.torchvision.url, root, md5=self.torchvision.tgz_md5)

    @abstractmethod
    def load(self, root: Path, part: str) -> "Loaded":
        """A part, of files that are whole."""

    def _check(self, root: Path, *, download: bool) -> None:
        """Sees to it that the files are those that were published."""
        whose = f"data.kind = {self.kind!r}"
        try:
            if download and self._wrong(root):
                self.fetch(root)
            wrong = self._wrong(root)
        except (RuntimeError, OSError, EOFError) as error:
            done = "fetched into" if download else "read in"
            raise ValueError(f"{whose}: could not be {done} {root}: {error}") from None
        if wrong:
            raise ValueError(
                f"{whose}: not there, or not as published: {', '.join(wrong)} in {root}; `--download` fetches it"
            )

    def _wrong(self, root: Path) -> list[str]:
        from torchvision.datasets.utils import check_integrity

        return [name for name, md5 in self.files().items() if not check_integrity(root / name, md5)]


@dataclass(frozen=True)
class Loaded:
    """A part of a set as its files have it; the pixels need not be in memory."""

    pixels: Iterable[UInt8[np.ndarray, "H W 3"]]
    labels: Int[np.ndarray, "N"]
    """-1: nobody labelled the image."""
    classes: tuple[str, ...]


_RAW = "FashionMNIST/raw"
_FASHION_MNIST = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
"""The MD5 of the unpacked files; torchvision has those of the archives, and else only looks whether files are there."""


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

    def files(self) -> dict[str, str]:
        return {f"{_RAW}/{name}": md5 for name, md5 in _FASHION_MNIST.items()}

    def fetch(self, root: Path) -> None:
        from torchvision.datasets.utils import download_and_extract_archive

        for name, md5 in self.torchvision.resources:
            download_and_extract_archive(self.torchvision.mirrors[0] + name, root / _RAW, md5=md5)

    def load(self, root: Path, part: str) -> Loaded:
        name = "train" if part == "train" else "t10k"
        images = np.memmap(root / _RAW / f"{name}-images-idx3-ubyte", mode="r", offset=16).reshape(-1, 28, 28, 1)
        labels = np.fromfile(root / _RAW / f"{name}-labels-idx1-ubyte", dtype=np.uint8, offset=8)
        return Loaded(np.broadcast_to(images, (len(images), 28, 28, 3)), labels, tuple(self.torchvision.classes))


class _CIFAR(Download):
    """What both have in common.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009).
    """

    image_size: int = Field(default=32, ge=8, le=256)
    """Side of an image in pixels; where it is not the set's own, images are resized, bicubic with antialias."""

    @property
    def listed_train_images(self) -> int:
        return 50_000

    def files(self) -> dict[str, str]:
        theirs = self.torchvision
        return super().files() | {f"{theirs.base_folder}/{theirs.meta['filename']}": theirs.meta["md5"]}

    def load(self, root: Path, part: str) -> Loaded:
        found = self.torchvision(root, train=part == "train")
        return Loaded(found.data, np.array(found.targets), tuple(found.classes))


class CIFAR10(_CIFAR):
    """CIFAR-10: 50,000 and 10,000 photographs of ten classes, 32 x 32."""

    kind: Literal["cifar10"] = "cifar10"
    """Which data set."""


class CIFAR100(_CIFAR):
    """CIFAR-100: 50,000 and 10,000 photographs of a hundred classes, 32 x 32."""

    kind: Literal["cifar100"] = "cifar100"
    """Which data set."""


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

    def load(self, root: Path, part: str) -> Loaded:
        # Mapped, of 2.9 GB; torchvision would read them into memory, twice. Columns lie before rows, as in MATLAB.
        folder, parts = root / self.torchvision.base_folder, part.split("+")
        files = [np.memmap(folder / f"{each}_X.bin", mode="r").reshape(-1, 3, 96, 96) for each in parts]
        labels = np.fromfile(folder / f"{parts[0]}_y.bin", dtype=np.uint8).astype(np.int64) - 1
        unlabelled = np.full(sum(map(len, files)) - len(labels), -1)
        names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
        images = chain(*(each.transpose(0, 3, 2, 1) for each in files))
        return Loaded(images, np.concatenate([labels, unlabelled]), names)
