"""Photographs in folders, as ImageNet's: a folder for each class, or one for all where nobody labelled them."""

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from dino_lab.core.data.decoding import BadImage
from dino_lab.core.data.encoded import EncodedSource, Listing
from dino_lab.core.data.source import Split


class ImageFolder(EncodedSource):
    """Photographs in a folder for each class, as ImageNet's, or in one folder, without labels.

    Files whose names start with a dot do not count, nor do files beside the folders of classes. All others are images:
    what cannot be decoded is a bad one. ImageNet at 256 pixels takes 250 GB if it is kept, and an hour or more to
    decode; the reference crops from the whole photograph, as is done where nothing is kept.
    """

    location: ClassVar = frozenset({"root"})

    kind: Literal["imagefolder"] = "imagefolder"
    """Which data set."""
    root: str = Field(min_length=1)
    """The folder that holds those of the splits."""
    train_folder: str = Field(default="train", min_length=1)
    """Name of the training split's folder in `root`."""
    test_folder: str = Field(default="val", min_length=1)
    """Name of the held-out split's folder in `root`; it need not be there if nothing is evaluated on it."""

    def listing(self, split: Split, data_dir: Path, *, download: bool) -> Listing:
        try:
            return self._listing(self.test_folder if split == "test" else self.train_folder)
        except OSError as error:
            raise ValueError(f"data.root = {self.root!r}: cannot be listed: {error}") from None

    def _listing(self, name: str) -> Listing:
        folder = Path(self.root) / name
        classes, others = self._classes(name), self._classes(self.train_folder)
        if classes != others:
            odd = sorted(set(classes) ^ set(others))[:3]
            raise ValueError(f"data.root = {self.root!r}: {name} and {self.train_folder} differ in classes: {odd}")

        names: list[str] = []
        labels: list[int] = []
        no_files: set[int] = set()
        # With where they lie: elsewhere, files as old and as large under the same names may be others.
        key = hashlib.sha256(repr([str(folder.resolve()), classes]).encode(errors="surrogateescape"))
        own = [os.stat(path) for path in (folder, *(folder / each for each in classes))]
        entered = {(about.st_dev, about.st_ino) for about in own} if classes else None
        for label, start in enumerate(classes or ("",)):
            before = len(names)
            for path, about in files_below(folder / start, entered=entered):
                if not stat.S_ISREG(about.st_mode):
                    no_files.add(len(names))
                names.append(os.path.relpath(path, self.root))
                labels.append(label)
                key.update(f"{names[-1]}\0{about.st_size}\0{about.st_mtime_ns}\0".encode(errors="surrogateescape"))
            if len(names) == before:
                raise ValueError(f"data.root = {self.root!r}: no image in {folder / start}")
        return Listing(
            encoded=Files(Path(self.root), np.array([os.fsencode(name) for name in names]), frozenset(no_files)),
            labels=np.array(labels) if classes else None,
            classes=classes,
            key=key.hexdigest(),
            source=str(folder),
        )

    def _classes(self, name: str) -> tuple[str, ...]:
        """Names of the folders in a split's folder; none if its images have no labels."""
        try:
            with os.scandir(Path(self.root) / name) as entries:
                visible = (each for each in entries if not each.name.startswith("."))
                kinds = {each.name: _about(each).st_mode for each in visible if each.is_symlink() or each.is_dir()}
        except (FileNotFoundError, NotADirectoryError):
            knob = "train_folder" if name == self.train_folder else "test_folder"
            there = f"; it has {sorted(os.listdir(self.root))[:10]}" if os.path.isdir(self.root) else ""
            raise ValueError(f"data.root = {self.root!r}: no folder {name!r} (data.{knob}) there{there}") from None
        classes = tuple(sorted(each for each, kind in kinds.items() if stat.S_ISDIR(kind)))
        # One may be a class, which would be left out without a word.
        lost = sorted(each for each, kind in kinds.items() if stat.S_ISLNK(kind))
        if classes and lost:
            raise ValueError(f"data.root = {self.root!r}: {name} has links that lead nowhere: {lost[:3]}")
        return classes


@dataclass(frozen=True)
class Files:
    """Files by their paths below a folder."""

    root: Path
    # One array and not a million strings, whose counters a forked process would touch and so copy.
    names: np.ndarray
    no_files: frozenset[int]
    """Links that lead nowhere, pipes and the like."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return os.fsdecode(self.names[i])

    def read(self, i: int) -> bytes:
        if i in self.no_files:
            raise BadImage("a link that leads nowhere, or else no file")
        return (self.root / self.name(i)).read_bytes()


def files_below(folder: Path | str, *, entered: set[tuple[int, int]] | None) -> Iterator[tuple[str, os.stat_result]]:
    """Path, kind, size and age of each file in a folder, and in those below it; in order of names.

    Names that start with a dot are left out.

    Args:
        entered: Device and inode of the folders that are not entered any more; None enters none.
    """
    with os.scandir(folder) as entries:
        listed = sorted((each for each in entries if not each.name.startswith(".")), key=lambda each: each.name)
    for entry in listed:
        about = _about(entry)
        if not stat.S_ISDIR(about.st_mode):
            yield entry.path, about
        elif entered is not None and (about.st_dev, about.st_ino) not in entered:
            entered.add((about.st_dev, about.st_ino))
            yield from files_below(entry.path, entered=entered)


def _about(entry: "os.DirEntry[str]") -> os.stat_result:
    """Of a link what it leads to, or of itself if it leads nowhere."""
    try:
        return entry.stat()
    except OSError:
        return entry.stat(follow_symlinks=False)
