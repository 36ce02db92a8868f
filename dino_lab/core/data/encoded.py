"""What sources of encoded files have in common: one pass over all of them before the first step, then two ways to use
them. Small sets are kept as squares, decoded once; of large ones only checksums are kept, and files are decoded when
they are needed."""

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import ClassVar, Literal, Protocol, Self

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from pydantic import Field
from torch import Tensor

from dino_lab.core.data.decoding import BadImage, decode, square
from dino_lab.core.data.images import ImageSet, Made, kept, mapped
from dino_lab.core.data.random import order
from dino_lab.core.data.source import Progress, Read, Source, Split

_PART = 64
"""Images that a thread works on at a time."""
_SHOWN = 10
"""Bad images that are named."""


class Encoded(Protocol):
    """Images as they lie on disk, in an order that is quick to read; safe for threads, and for processes by fork."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """For people, and for the digest: it does not depend on where the whole set lies."""

    def read(self, i: int) -> bytes:
        """Raises BadImage if there is no image, OSError if it cannot be read, which may pass."""


@dataclass(frozen=True)
class Listing:
    """A split as it lies on disk."""

    encoded: Encoded
    labels: Int64[np.ndarray, "N"] | None
    """The class of each image, in the order of `encoded`; None where nobody labelled them."""
    classes: tuple[str, ...]
    """The names of the classes; empty where nobody labelled the images."""
    key: str
    """Changes when a file does: where, how large and how old they are, not what they hold."""
    source: str
    """Where they lie, for people."""


@dataclass(frozen=True)
class Streamed:
    """Images that are decoded whenever they are asked for, each at its own size."""

    encoded: Encoded
    order: Int64[np.ndarray, "N"]
    """Which encoded image each one is."""

    def __len__(self) -> int:
        return len(self.order)

    def images(self, places: Int64[np.ndarray, "B"]) -> list[UInt8[Tensor, "H W 3"]]:
        """Raises ValueError, with the name, if one cannot be read or decoded any more."""
        return [self._image(int(i)) for i in self.order[places]]

    def _image(self, i: int) -> UInt8[Tensor, "H W 3"]:
        try:
            return decode(self.encoded.read(i))
        except (OSError, BadImage) as error:
            name = self.encoded.name(i)
            raise ValueError(f"{name}: cannot be decoded any more, as it could before training: {error}") from None


class EncodedSource(Source):
    """Images in files that somebody else wrote."""

    image_size: int | None = Field(default=None, ge=8, le=1024)
    """Side in pixels of the squares that are kept, decoded once: the shorter side is resized to it, bicubic, and the
    middle cut out; each takes 3 image_size^2 bytes of disk. None keeps nothing and decodes whole images when they are
    needed."""
    bad_images: Literal["stop", "skip"] = "stop"
    """Whether images that cannot be decoded stop a trial before its first step or are left out."""
    digest: str | None = Field(default=None, pattern="^[0-9a-f]{16}(-[0-9a-f]{16})?$")
    """What the training and the test split hold; filled in when a trial is prepared. None takes what lies there."""

    location: ClassVar[frozenset[str]]
    """Knobs that say where the files lie: with a digest they tell a trial from no other, wherever its data moves."""

    def _unidentified(self) -> frozenset[str]:
        return self.not_identity | (self.location if self.digest else frozenset())

    def read(self, split: Split, data_dir: Path, *, download: bool, progress: Progress) -> ImageSet:
        listing = self.listing(split, data_dir, download=download)
        number = len(listing.encoded)
        # The first images are what k-NN compares with, and files lie class after class.
        mixed = order(0, 0, number)

        def make(folder: Path) -> Made:
            return _examine(listing, mixed, self.image_size, folder, progress)

        drawing = {"kind": self.kind, "image_size": self.image_size, "files": listing.key}
        copy = kept(data_dir, drawing, make)
        if copy.skipped and self.bad_images == "stop":
            raise ValueError(_complaint(copy.skipped, number, listing.source))
        if len(copy.skipped) == number:
            raise ValueError(f"data.bad_images = 'skip': none of {number} images in {listing.source} can be decoded")
        labels = {} if listing.labels is None else {"class": torch.from_numpy(listing.labels[mixed])}
        images = ImageSet(
            name=self.kind,
            split=split,
            pixels=copy.arrays["images"] if self.image_size else Streamed(listing.encoded, mixed),
            places=np.arange(number),
            labels=labels,
            classes={"class": listing.classes} if labels else {},
            masks=None,
            digest=copy.digest,
            source=listing.source,
            skipped=copy.skipped,
        )
        if copy.skipped:
            images = images.subset(copy.arrays["places"].numpy())
        self.check_digest(self.digest, split, images)
        return images

    @abstractmethod
    def listing(self, split: Split, data_dir: Path, *, download: bool) -> Listing:
        """The images of the training or of the test split."""

    def told_apart(self, read: Read) -> Self:
        train = read("train")
        raw = [train, read("test")] if train.labels and self.evaluation_split == "test" else [train]
        for images in raw:
            if images.skipped:
                number = len(images) + len(images.skipped)
                logging.getLogger(__name__).warning(
                    "%d of %d images in %s cannot be decoded and are left out",
                    len(images.skipped),
                    number,
                    images.source,
                )
        # Side by side and not one of both, so that a split can be told to have changed without a look at the other.
        return self.but({"digest": "-".join(images.digest[:16] for images in raw)})


def _examine(
    listing: Listing, mixed: Int64[np.ndarray, "N"], size: int | None, folder: Path, progress: Progress
) -> Made:
    """Reads and decodes every image, in the order in which they lie on disk, by as many threads as there are CPUs."""
    encoded, number = listing.encoded, len(listing.encoded)
    place = np.argsort(mixed)
    progress(0, number)  # before anything is written, for who only wants to know whether it would be
    images = mapped(folder / "images.npy", (number, size, size, 3)) if size else np.zeros((number, 32), dtype=np.uint8)

    def examine(start: int) -> tuple[dict[int, str], bytes]:
        bad = {}
        names = hashlib.sha256()
        for i in range(start, min(start + _PART, number)):
            names.update(f"{encoded.name(i)}\0".encode(errors="surrogateescape"))
            try:
                data = encoded.read(i)
                image = decode(data)
                images[place[i]] = (
                    square(image, size) if size else np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
                )
            except BadImage as error:
                bad[i] = str(error)
            except (OSError, MemoryError) as error:  # which may pass: nothing is kept
                raise ValueError(f"{encoded.name(i)}: cannot be read: {type(error).__name__}: {error}") from None
        return bad, names.digest()

    bad: dict[int, str] = {}
    listed = hashlib.sha256(repr(listing.classes).encode())
    if listing.labels is not None:
        listed.update(listing.labels.tobytes())
    with ThreadPool() as threads:  # which an interrupt ends at once, as it does not the executors of concurrent.futures
        for done, (found, digest) in enumerate(threads.imap(examine, range(0, number, _PART)), start=1):
            bad |= found
            listed.update(digest)
            progress(min(done * _PART, number), number)
    arrays = {
        "images": images,
        # For the digest alone: names, labels and classes are taken from the listing.
        "listed": np.frombuffer(listed.digest(), dtype=np.uint8),
        "places": np.setdiff1d(np.arange(number), place[list(bad)]) if bad else np.arange(number),
    }
    return arrays, {encoded.name(i): why for i, why in bad.items()}


def told(skipped: Mapping[str, str]) -> list[str]:
    """A line for each image that cannot be decoded, up to ten."""
    lines = [f"{name}: cannot be decoded: {why}" for name, why in list(skipped.items())[:_SHOWN]]
    return lines + ([f"and {len(skipped) - _SHOWN} more"] if len(skipped) > _SHOWN else [])


def _complaint(skipped: Mapping[str, str], number: int, where: str) -> str:
    return "\n".join(
        [
            f"data.bad_images = 'stop': {len(skipped)} of {number} images in {where} cannot be decoded; "
            "data.bad_images = 'skip' leaves them out:",
            *told(skipped),
        ]
    )


def names_of(values: np.ndarray) -> tuple[str, ...]:
    """The classes of labels that are numbers or words themselves, in their order."""
    return tuple(str(value) for value in np.unique(values))


def numbered(values: np.ndarray, classes: tuple[str, ...], where: str) -> Int64[np.ndarray, "N"]:
    """The place of each label among the classes of the training split.

    Raises:
        ValueError: one is not among them.
    """
    found, which = np.unique(values, return_inverse=True)
    if unknown := [str(value) for value in found if str(value) not in classes]:
        raise ValueError(f"{where}: has classes that the training split has not: {unknown[:3]}")
    return np.array([classes.index(str(value)) for value in found], dtype=np.int64)[which]
