"""Data sets by name: each Settings builds an ImageSet. Drawn once, kept as uint8, found again by its settings."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64, UInt8
from pydantic import Field
from torch import Tensor

from dino_lab.core.data.random import order
from dino_lab.core.data.shapes import DRAWING, FACTORS, ShapesKnobs, Split, draw
from dino_lab.core.settings import Settings


@dataclass(frozen=True)
class ImageSet:
    """One split of a data set; images and masks are mapped from disk and are not to be written to."""

    name: str
    split: str
    images: UInt8[Tensor, "N H W 3"]
    labels: dict[str, Int64[Tensor, "N"]]
    """A label for each factor; "class" is always there."""
    classes: dict[str, tuple[str, ...]]
    """The names of the values of each factor, in the order of their labels; "class" too."""
    masks: UInt8[Tensor, "N H W"] | None
    """1 on the foreground, 0 elsewhere; None where nobody drew one."""
    digest: str
    """SHA-256 of the images' and the labels' bytes."""


class Shapes(ShapesKnobs):
    """Procedural shapes, each image with a label for every factor and a foreground mask."""

    def build(self, split: Split, cache_dir: Path) -> ImageSet:
        """The split, drawn if `cache_dir` does not hold it yet."""
        images_number = self.train_images if split == "train" else self.test_images

        def make(folder: Path) -> dict[str, np.ndarray]:
            drawn = draw(self, split, images_number)
            labels = np.stack([drawn.labels[factor] for factor in FACTORS])
            return {"images": drawn.images, "labels": labels, "masks": drawn.masks}

        # What changes no image is left out, so that trials that differ in it share the drawing.
        drawing = self.model_dump(mode="json", exclude={"class_factor", "train_images", "test_images"})
        drawing |= {"drawing": DRAWING, "split": split, "images_number": images_number}
        kept, digest = _kept(cache_dir, drawing, make)
        labels = dict(zip(FACTORS, kept["labels"], strict=True))
        names = self.factor_names()
        return ImageSet(
            name=self.kind,
            split=split,
            images=kept["images"],
            labels=labels | {"class": labels[self.class_factor]},
            classes=names | {"class": names[self.class_factor]},
            masks=kept["masks"],
            digest=digest,
        )


class Digits(Settings):
    """scikit-learn's real handwritten digits, 8 x 8 grey, enlarged; the first 1,437 train, the last 360 test."""

    kind: Literal["digits"] = "digits"
    """Which data set."""
    image_size: int = Field(default=32, ge=8, le=256)
    """Side in pixels to which the 8 x 8 digits are enlarged, bilinearly."""

    @property
    def train_images(self) -> int:
        return 1437

    def build(self, split: Split, cache_dir: Path) -> ImageSet:
        """The split, enlarged if `cache_dir` does not hold it yet."""

        def make(folder: Path) -> dict[str, np.ndarray]:
            from sklearn.datasets import load_digits  # slow to import, and used once

            digits = load_digits()
            chosen = slice(None, 1437) if split == "train" else slice(1437, None)
            small = torch.from_numpy(digits.images[chosen]).float()[:, None] * (255 / 16)
            large = F.interpolate(small, size=(self.image_size, self.image_size), mode="bilinear")
            images = large.round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
            return {"images": images.numpy(), "labels": digits.target[None, chosen].astype(np.int64)}

        kept, digest = _kept(cache_dir, self.model_dump(mode="json") | {"split": split}, make)
        names = tuple(str(digit) for digit in range(10))
        return ImageSet(
            name=self.kind,
            split=split,
            images=kept["images"],
            labels={"digit": kept["labels"][0], "class": kept["labels"][0]},
            classes={"digit": names, "class": names},
            masks=None,
            digest=digest,
        )


class ImageFolder(Settings):
    """Photographs in a folder for each class, as ImageNet's; each decoded once and kept at one size.

    Each takes 3 image_size^2 bytes of disk, in a file that is mapped and not loaded: ImageNet at 256 pixels 250 GB, and
    an hour or more to decode. The reference crops from the whole photograph, this from the kept square.
    """

    kind: Literal["imagefolder"] = "imagefolder"
    """Which data set."""
    root: str = Field(min_length=1)
    """The folder that holds those of the splits."""
    train_folder: str = Field(default="train", min_length=1)
    """Name of the training split's folder in `root`; it holds a folder for each class."""
    test_folder: str = Field(default="val", min_length=1)
    """Name of the held-out split's folder in `root`."""
    image_size: int = Field(default=256, ge=8, le=1024)
    """Side in pixels of what is kept: the shorter side is resized to it, bicubic, and the middle cut out."""

    @property
    def train_images(self) -> None:
        """Not known before the folder is read."""

    def build(self, split: Split, cache_dir: Path) -> ImageSet:
        """The split, decoded if `cache_dir` does not hold it yet.

        Raises:
            ValueError: there is no such folder or no image in it, the splits differ in classes, or a file cannot be
                decoded.
        """
        from torchvision import datasets, transforms  # slow to import

        name = self.train_folder if split == "train" else self.test_folder
        try:
            listing = datasets.ImageFolder(str(Path(self.root) / name))
            others = datasets.folder.find_classes(str(Path(self.root) / self.train_folder))[0]
        except FileNotFoundError as error:
            raise ValueError(f"data.root = {self.root!r}: {error}") from None
        if listing.classes != others:
            odd = sorted(set(listing.classes) ^ set(others))[:3]
            raise ValueError(f"data.root = {self.root!r}: {name} and {self.train_folder} differ in classes: {odd}")
        # Not class after class, since the first images are what k-NN compares with.
        samples = [listing.samples[i] for i in order(0, 0, len(listing.samples))]
        files = [(str(Path(path).relative_to(self.root)), label) for path, label in samples]

        def make(folder: Path) -> dict[str, np.ndarray]:
            square = transforms.Compose(
                [
                    transforms.Resize(self.image_size, transforms.InterpolationMode.BICUBIC),
                    transforms.CenterCrop(self.image_size),
                ]
            )
            shape = (len(files), self.image_size, self.image_size, 3)
            images = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
            for i, (path, _) in enumerate(samples):
                try:
                    images[i] = square(listing.loader(path))
                except OSError as error:
                    raise ValueError(f"{path}: cannot be decoded: {error}") from None
            return {"images": images, "labels": np.array([[label for _, label in files]], dtype=np.int64)}

        # By place and names, not by bytes: a file changed in place is not seen until the data folder is removed.
        names = hashlib.sha256(json.dumps([str(Path(self.root).resolve()), files]).encode()).hexdigest()
        drawing = {"kind": self.kind, "split": split, "image_size": self.image_size, "files": names}
        kept, digest = _kept(cache_dir, drawing, make)
        return ImageSet(
            name=self.kind,
            split=split,
            images=kept["images"],
            labels={"class": kept["labels"][0]},
            classes={"class": tuple(listing.classes)},
            masks=None,
            digest=digest,
        )


def _kept(
    cache_dir: Path, drawing: Mapping[str, object], make: Callable[[Path], dict[str, np.ndarray]]
) -> tuple[dict[str, Tensor], str]:
    """The arrays of a drawing and their digest, made only if no whole copy lies in `cache_dir`.

    `make` gets the folder in which they will be kept, and may map arrays of its own there, as NAME.npy.

    Safe when several processes do it at once: the first to finish wins, the others use what it left.
    """
    settings = json.dumps(drawing, sort_keys=True)
    folder = cache_dir / f"{drawing['kind']}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    try:
        return _load(folder)
    except (OSError, EOFError, ValueError):  # missing, or cut short by a full disk or a crash
        cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".drawing-") as temporary:
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, Path(temporary) / "broken")
        fresh = Path(temporary) / "fresh"
        fresh.mkdir()
        _save(fresh, make(fresh), settings)
        with contextlib.suppress(OSError):  # a folder that is not empty: another process was first
            os.rename(fresh, folder)
    return _load(folder)


def _save(folder: Path, arrays: dict[str, np.ndarray], settings: str) -> None:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        if isinstance(array, np.memmap):
            array.flush()
        else:
            array = np.ascontiguousarray(array)
            np.save(folder / f"{name}.npy", array)
        if name != "masks":
            digest.update(array.data)
    about = {"arrays": list(arrays), "digest": digest.hexdigest(), "settings": json.loads(settings)}
    (folder / "about.json").write_text(json.dumps(about, indent=2))


def _load(folder: Path) -> tuple[dict[str, Tensor], str]:
    about = json.loads((folder / "about.json").read_text())
    # Copy-on-write: mapped, writable for torch, and never written back. A file shorter than its header says is refused.
    arrays = {name: torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in about["arrays"]}
    return arrays, about["digest"]


DataSettings: TypeAlias = Annotated[Shapes | Digits | ImageFolder, Field(discriminator="kind")]
