"""Image sets, and the cache in which they are kept: made once, mapped from disk, found again by their settings."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self, TypeAlias

import filelock
import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor


class Stream(Protocol):
    """Images that nobody keeps: decoded when they are asked for, each at its own size."""

    def __len__(self) -> int: ...

    def images(self, places: Int64[np.ndarray, "B"]) -> list[UInt8[Tensor, "H W 3"]]: ...


@dataclass(frozen=True)
class ImageSet:
    """One split of a data set; pixels and masks are mapped from disk and are not to be written to."""

    name: str
    """The kind of its source."""
    split: str
    """train, bank or test."""
    pixels: UInt8[Tensor, "M H W 3"] | Stream
    """All images that lie there, those of other splits and bad ones among them."""
    places: Int64[np.ndarray, "N"]
    """Where the images of this split are among `pixels`, in order."""
    labels: dict[str, Int64[Tensor, "N"]]
    """A label for each factor; "class" is always there, unless nobody labelled the images: then it is empty."""
    classes: dict[str, tuple[str, ...]]
    """The names of the values of each factor, in the order of their labels; "class" too."""
    masks: UInt8[Tensor, "M H W"] | None
    """0 on the background of `pixels`, 255 where nobody could tell, else the number of an object; None without one."""
    digest: str
    """SHA-256 of the images' and the labels' bytes; of a subset, of that and of its places."""
    source: str
    """Where the images are from, for people."""
    skipped: dict[str, str]
    """What could not be decoded, by name, and why; it is in no place."""

    def __len__(self) -> int:
        return len(self.places)

    @property
    def class_counts(self) -> dict[str, int]:
        """How many images each class has, by its name; empty where nobody labelled them."""
        if not self.labels:
            return {}
        numbers = torch.bincount(self.labels["class"], minlength=len(self.classes["class"])).tolist()
        return dict(zip(self.classes["class"], numbers, strict=True))

    @property
    def facts(self) -> dict[str, str | int]:
        """What tells this set from others, for records."""
        _, height, width, _ = self.pixels.shape if isinstance(self.pixels, Tensor) else (0, 0, 0, 0)
        return {
            "name": self.name,
            "split": self.split,
            "images": len(self),
            "classes": len(self.classes.get("class", ())),
            "size": f"{width} x {height}" if width else "each its own",
            "digest": self.digest,
            "source": self.source,
            "skipped": len(self.skipped),
        }

    def images(self, chosen: Int64[np.ndarray, "B"]) -> UInt8[Tensor, "B H W 3"] | list[UInt8[Tensor, "H W 3"]]:
        """Some images: one tensor if they are kept, else a list, each at its own size.

        Raises:
            ValueError: a file cannot be read or decoded any more.
        """
        places = self.places[chosen]
        return self.pixels[torch.from_numpy(places)] if isinstance(self.pixels, Tensor) else self.pixels.images(places)

    def subset(self, chosen: Int64[np.ndarray, "B"]) -> Self:
        """Some of the images, in that order; no pixel is copied."""
        places = self.places[chosen]
        return replace(
            self,
            places=places,
            labels={factor: labels[torch.from_numpy(chosen)] for factor, labels in self.labels.items()},
            digest=hashlib.sha256(self.digest.encode() + places.tobytes()).hexdigest(),
        )


# ---------------------------------------------------------------------------------------------- the cache

Made: TypeAlias = tuple[dict[str, np.ndarray], dict[str, str]]
"""Arrays by name; what was skipped, and why."""


@dataclass(frozen=True)
class Kept:
    """What lies in the cache: tensors by name, the SHA-256 of all but the masks, and what was skipped."""

    arrays: dict[str, Tensor]
    digest: str
    skipped: dict[str, str]


def kept(cache_dir: Path, drawing: Mapping[str, object], make: Callable[[Path], Made]) -> Kept:
    """The arrays of a drawing, made only if no whole copy lies in `cache_dir`.

    `make` gets the folder in which they will be kept, and may map arrays of its own there, as NAME.npy.

    Of several processes that ask at once, one makes them and the others wait. A process that is killed leaves nothing
    that the next takes for whole.
    """
    settings = json.dumps(drawing, sort_keys=True)
    folder = cache_dir / f"{drawing['kind']}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    # Missing, cut short by a full disk or a crash, or written by an earlier version.
    incomplete = (OSError, EOFError, ValueError, KeyError)
    try:
        return _load(folder)  # first without the lock: a cache that is not writable can be read
    except incomplete:
        cache_dir.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(cache_dir / f".{folder.name}.lock"):
        try:
            return _load(folder)  # another process was first
        except incomplete:
            shutil.rmtree(folder, ignore_errors=True)
        fresh = cache_dir / f".{folder.name}.fresh"
        shutil.rmtree(fresh, ignore_errors=True)  # of a process that was killed: no other holds the lock
        fresh.mkdir()
        try:
            _save(fresh, *make(fresh), settings)
            os.rename(fresh, folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return _load(folder)


def mapped(path: Path, shape: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
    """A new .npy file to write into, with room on the disk for all of it, or else a full disk kills without a word.

    Raises:
        ValueError: there is no room.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        needed = math.prod(shape)
        raise ValueError(f"{path.parent.parent}: {needed} bytes are needed to keep images: {error.strerror}") from None
    return array


def _save(folder: Path, arrays: dict[str, np.ndarray], skipped: dict[str, str], settings: str) -> None:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        if isinstance(array, np.memmap):
            array.flush()
        else:
            array = np.ascontiguousarray(array)
            np.save(folder / f"{name}.npy", array)
        if name != "masks":
            digest.update(array.data)
    about = {"arrays": list(arrays), "digest": digest.hexdigest(), "skipped": skipped, "settings": json.loads(settings)}
    (folder / "about.json").write_text(json.dumps(about, indent=2))


def _load(folder: Path) -> Kept:
    about = json.loads((folder / "about.json").read_text())
    # Copy-on-write: mapped, writable for torch, and never written back. A file shorter than its header says is refused.
    arrays = {name: torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in about["arrays"]}
    return Kept(arrays, about["digest"], about["skipped"])
