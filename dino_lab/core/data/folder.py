"""Photographs in folders, as ImageNet's: a folder for each class, or one for all where nobody labelled them."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from dino_lab.core.data.encoded import EncodedSource, Listing
from dino_lab.core.data.source import Split


class ImageFolder(EncodedSource):
    """Photographs in a folder for each class, as ImageNet's, or in one folder, without labels.

    Files whose names start with a dot do not count, nor do files beside the folders of classes. All others are images:
    what cannot be decoded is a bad one. ImageNet at 256 pixels takes 250 GB if it is kept, and an hour or more to
    decode; the reference crops from the whole photograph, as is done where nothing is kept.
    """

    kind: Literal["imagefolder"] = "imagefolder"
    """Which data set."""
    root: str = Field(min_length=1)
    """The folder that holds those of the splits."""
    train_folder: str = Field(default="train", min_length=1)
    """Name of the training split's folder in `root`."""
    test_folder: str = Field(default="val", min_length=1)
    """Name of the held-out split's folder in `root`; it need not be there if nothing is evaluated on it."""

    def listing(self, split: Split, data_dir: Path, *, download: bool) -> Listing:
        name = self.test_folder if split == "test" else self.train_folder
        folder = Path(self.root) / name
        classes, others = self._classes(name), self._classes(self.train_folder)
        if classes != others:
            odd = sorted(set(classes) ^ set(others))[:3]
            raise ValueError(f"data.root = {self.root!r}: {name} and {self.train_folder} differ in classes: {odd}")

        names: list[str] = []
        labels: list[int] = []
        # With where they lie: elsewhere, files as old and as large under the same names may be others.
        key = hashlib.sha256(repr([str(folder.resolve()), classes]).encode(errors="surrogateescape"))
        for label, start in enumerate(classes or ("",)):
            before = len(names)
            for path, about in files_below(folder / start, enter=bool(classes)):
                names.append(os.path.relpath(path, self.root))
                labels.append(label)
                key.update(f"{names[-1]}\0{about.st_size}\0{about.st_mtime_ns}\0".encode(errors="surrogateescape"))
            if len(names) == before:
                raise ValueError(f"data.root = {self.root!r}: no image in {folder / start}")
        return Listing(
            encoded=Files(Path(self.root), np.array([os.fsencode(name) for name in names])),
            labels=np.array(labels) if classes else None,
            classes=classes,
            key=key.hexdigest(),
            source=str(folder),
        )

    def _classes(self, name: str) -> tuple[str, ...]:
        """Names of the folders in a split's folder; none if its images have no labels."""
        try:
            with os.scandir(Path(self.root) / name) as entries:
                return tuple(sorted(each.name for each in entries if each.is_dir() and not each.name.startswith(".")))
        except (FileNotFoundError, NotADirectoryError):
            knob = "train_folder" if name == self.train_folder else "test_folder"
            there = f"; it has {sorted(os.listdir(self.root))[:10]}" if os.path.isdir(self.root) else ""
            raise ValueError(f"data.root = {self.root!r}: no folder {name!r} (data.{knob}) there{there}") from None


@dataclass(frozen=True)
class Files:
    """Files by their paths below a folder."""

    root: Path
    # One array and not a million strings, whose counters a forked process would touch and so copy.
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return os.fsdecode(self.names[i])

    def read(self, i: int) -> bytes:
        return (self.root / self.name(i)).read_bytes()


def files_below(folder: Path | str, *, enter: bool) -> Iterator[tuple[str, os.stat_result]]:
    """Path, size and age of each file in a folder, and in those below it if it is to be entered; in order of names.

    Names that start with a dot are left out.
    """
    with os.scandir(folder) as entries:
        listed = sorted((each for each in entries if not each.name.startswith(".")), key=lambda each: each.name)
    for entry in listed:
        if not entry.is_dir():
            yield entry.path, entry.stat()
        elif enter:
            yield from files_below(entry.path, enter=True)
