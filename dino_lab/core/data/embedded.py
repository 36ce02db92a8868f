"""Data sets that need no file: procedural shapes, and the handwritten digits that scikit-learn brings along."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from dino_lab.core.data.images import ImageSet, Made, kept
from dino_lab.core.data.shapes import DRAWING, FACTORS, ShapesKnobs, draw
from dino_lab.core.data.source import CHOICE, Progress, Source, Split


class Shapes(ShapesKnobs, Source):
    """Procedural shapes, each image with a label for every factor and a foreground mask."""

    has_masks = True

    @property
    def listed_train_images(self) -> int:
        return self.train_images

    def read(self, split: Split, data_dir: Path, *, download: bool, progress: Progress) -> ImageSet:
        drawn_split: Literal["train", "test"] = "test" if split == "test" else "train"
        images_number = self.test_images if split == "test" else self.train_images

        def make(folder: Path) -> Made:
            drawn = draw(self, drawn_split, images_number)
            labels = np.stack([drawn.labels[factor] for factor in FACTORS])
            return {"images": drawn.images, "labels": labels, "masks": drawn.masks}, {}

        # What changes no image is left out; the class does where the drawing depends on it.
        same = CHOICE | {"train_images", "test_images"}
        bound = ("color_predicts_class", "background_predicts_class", "class_imbalance")
        if all(getattr(self, knob) == Shapes.model_fields[knob].default for knob in bound):
            same |= {"class_factor"}
        drawing = self.model_dump(mode="json", exclude=same)
        drawing |= {"drawing": DRAWING, "split": drawn_split, "images_number": images_number}
        copy = kept(data_dir, drawing, make)
        labels = dict(zip(FACTORS, copy.arrays["labels"], strict=True))
        names = self.factor_names()
        return ImageSet(
            name=self.kind,
            split=split,
            pixels=copy.arrays["images"],
            places=np.arange(images_number),
            labels=labels | {"class": labels[self.class_factor]},
            classes=names | {"class": names[self.class_factor]},
            masks=copy.arrays["masks"],
            digest=copy.digest,
            source="drawn here",
            skipped={},
        )


class Digits(Source):
    """scikit-learn's real handwritten digits, 8 x 8 grey, enlarged; the first 1,437 train, the last 360 test."""

    kind: Literal["digits"] = "digits"
    """Which data set."""
    image_size: int = Field(default=32, ge=8, le=256)
    """Side in pixels to which the 8 x 8 digits are enlarged, bilinearly."""

    @property
    def listed_train_images(self) -> int:
        return 1437

    def read(self, split: Split, data_dir: Path, *, download: bool, progress: Progress) -> ImageSet:
        def make(folder: Path) -> Made:
            from sklearn.datasets import load_digits  # slow to import, and used once

            digits = load_digits()
            chosen = slice(1437, None) if split == "test" else slice(None, 1437)
            small = torch.from_numpy(digits.images[chosen]).float()[:, None] * (255 / 16)
            large = F.interpolate(small, size=(self.image_size, self.image_size), mode="bilinear")
            images = large.round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
            return {"images": images.numpy(), "labels": digits.target[None, chosen].astype(np.int64)}, {}

        drawing = self.model_dump(mode="json", exclude=CHOICE) | {"split": "test" if split == "test" else "train"}
        copy = kept(data_dir, drawing, make)
        names = tuple(str(digit) for digit in range(10))
        labels = copy.arrays["labels"][0]
        return ImageSet(
            name=self.kind,
            split=split,
            pixels=copy.arrays["images"],
            places=np.arange(len(labels)),
            labels={"digit": labels, "class": labels},
            classes={"digit": names, "class": names},
            masks=None,
            digest=copy.digest,
            source="scikit-learn's digits",
            skipped={},
        )
