"""Source: what all data sets have in common, which is how a split is chosen from the images that lie there."""

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal, Self, TypeAlias

import numpy as np
import torch
from jaxtyping import Int64
from pydantic import Field, field_validator

from dino_lab.core.data.images import ImageSet
from dino_lab.core.settings import Settings

Split: TypeAlias = Literal["train", "bank", "test"]
"""Bank: the labelled images among which k-NN looks for neighbours."""
Progress: TypeAlias = Callable[[int, int], None]
"""Told now and then how many images are done, and of how many."""
Read: TypeAlias = Callable[[Split], ImageSet]
"""All images of a split, read the first time that it is asked for."""


def silent(done: int, total: int) -> None:
    """Tells nobody."""


class Source(Settings, ABC):
    """A data set by its kind, and which of its images are used."""

    has_masks: ClassVar[bool] = False
    """Whether objects are marked in its images."""

    kind: str
    """Which data set."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Fraction of the images that are trained on, the same of each class, at least one image of each; a smaller one is
    part of a larger one. Neighbours of k-NN are taken from all."""
    classes: tuple[str, ...] | None = Field(default=None, min_length=1)
    """The classes that are kept, in all splits, by name; labels are numbered in this order. None keeps all."""
    evaluation_split: Literal["test", "held_out"] = "test"
    """What is evaluated: the test split, or a tenth of the training images, which then is not trained on and no
    neighbour of k-NN: for choosing knobs without a look at the test split."""

    @field_validator("classes")
    @classmethod
    def _each_once(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value and len(set(value)) < len(value):
            raise ValueError("a class is named twice")
        return value

    def build(self, split: Split, data_dir: Path, *, download: bool = False, progress: Progress = silent) -> ImageSet:
        """The images of a split; what has to be drawn or decoded is kept in `data_dir`.

        Raises:
            ValueError: images are not there, are bad or not those of this trial, do not have these classes, or none is
                left.
        """
        return self._chosen(split, self._once(data_dir, download=download, progress=progress))

    def build_all(self, data_dir: Path) -> dict[Split, ImageSet]:
        """Train, bank and, if images are labelled or have masks, test; as `build`, but shared files are listed once."""
        return self._all(self._once(data_dir, download=False, progress=silent))

    def prepare(self, data_dir: Path, *, download: bool = False, progress: Progress = silent) -> Self:
        """Builds every split that a trial will build, so that what is wrong is found before the first one starts.

        Returns:
            These settings as `with_digest`.

        Raises:
            ValueError: as `build`.
        """
        read = self._once(data_dir, download=download, progress=progress)
        self._all(read)
        return self.told_apart(read)

    def with_digest(self, data_dir: Path, *, progress: Progress = silent) -> Self:
        """These settings, of files that may hold any images with the digest of what lies there, which makes trials of
        other images other trials.

        Raises:
            ValueError: as `build`.
        """
        return self.told_apart(self._once(data_dir, download=False, progress=progress))

    @property
    def known_train_images(self) -> int | None:
        """How many images are trained on, if that is known without reading them."""
        whole = self.fraction == 1 and self.classes is None and self.evaluation_split == "test"
        return self.listed_train_images if whole else None

    @property
    def listed_train_images(self) -> int | None:
        """How many images lie in the training split, if that is known without reading them."""
        return None

    @property
    def bank_is_train(self) -> bool:
        """Whether the neighbours of k-NN are the training images."""
        return True

    @abstractmethod
    def read(self, split: Split, data_dir: Path, *, download: bool, progress: Progress) -> ImageSet:
        """All images of a split as they lie there; bank, asked for only where it is not train, has the same pixels."""

    def told_apart(self, read: Read) -> Self:
        """These settings, told apart from those of other images: nothing to do where they alone say which those are."""
        return self

    def check_digest(self, expected: str | None, split: Split, images: ImageSet) -> None:
        """Refuses images that are others than those of a trial, whose digests of train and test these are.

        Raises:
            ValueError: the digest of this split is another.
        """
        known = dict(zip(("train", "test"), (expected or "").split("-"), strict=False)).get(split)
        if known and known != images.digest[:16]:
            what = "images or masks" if self.has_masks else "images"
            raise ValueError(
                f"data.digest = {expected!r}: the {what} in {images.source} are others than those of this trial: "
                f"{images.digest[:16]}"
            )

    def _once(self, data_dir: Path, *, download: bool, progress: Progress) -> Read:
        return functools.cache(lambda split: self.read(split, data_dir, download=download, progress=progress))

    def _all(self, read: Read) -> dict[Split, ImageSet]:
        sets: dict[Split, ImageSet] = {"train": self._chosen("train", read), "bank": self._chosen("bank", read)}
        is_judged = sets["bank"].labels or sets["bank"].masks is not None
        return sets | ({"test": self._chosen("test", read)} if is_judged else {})

    def _chosen(self, split: Split, read: Read) -> ImageSet:
        if split == "test" and self.evaluation_split == "test":
            return self._of_classes(read("test"))
        lies_in: Split = "train" if split == "train" or self.bank_is_train else "bank"
        images = replace(self._of_classes(read(lies_in)), split=split)
        if self.evaluation_split == "held_out":
            bank = images if self.bank_is_train or split != "train" else self._of_classes(read("bank"))
            # Not the first of each class, so that a class of one image keeps it for training.
            held_out = _turns(bank)[0] % 10 == 1
            if not held_out.any():
                raise ValueError(
                    f"data.evaluation_split = 'held_out': none is, as no class has two images in {bank.source}"
                )
            if split == "test":
                return bank.subset(np.flatnonzero(held_out))
            images = images.subset(np.flatnonzero(~np.isin(images.places, bank.places[held_out])))
        if self.fraction < 1 and split == "train":
            turn, number = _turns(images)
            images = images.subset(np.flatnonzero(turn < np.maximum(1, np.rint(self.fraction * number))))
        return images

    def _of_classes(self, images: ImageSet) -> ImageSet:
        if self.classes is None:
            return images
        knob = f"data.classes = {list(self.classes)}"
        if not images.labels:
            raise ValueError(f"{knob}: the images of {images.source} have no labels")
        known = images.classes["class"]
        if unknown := [name for name in self.classes if name not in known]:
            more = f" and {len(known) - 20} more" if len(known) > 20 else ""
            raise ValueError(f"{knob}: unknown {unknown}; known: {', '.join(known[:20])}{more}")
        number = np.full(len(known), -1)
        number[[known.index(name) for name in self.classes]] = np.arange(len(self.classes))
        labels = number[images.labels["class"].numpy()]
        chosen = np.flatnonzero(labels >= 0)
        if not len(chosen):
            raise ValueError(f"{knob}: {images.source} has no image of them in its {images.split} split")
        part = images.subset(chosen)
        return replace(
            part,
            labels=part.labels | {"class": torch.from_numpy(labels[chosen])},
            classes=part.classes | {"class": self.classes},
            digest=hashlib.sha256((part.digest + json.dumps(self.classes)).encode()).hexdigest(),
        )


CHOICE = set(Source.model_fields) - {"kind"}
"""Knobs that choose among the images and change none: trials that differ in them share what is kept."""


def _turns(images: ImageSet) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"]]:
    """How many images of its class come before each image, and how many its class has; without labels all are one."""
    labels = images.labels["class"].numpy() if images.labels else np.zeros(len(images), dtype=np.int64)
    by_class, numbers = np.argsort(labels, kind="stable"), np.bincount(labels)
    turns = np.empty(len(labels), dtype=np.int64)
    turns[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    return turns, numbers[labels]
