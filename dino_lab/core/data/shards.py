"""Images in tar files, as the webdataset library writes and reads them; read here at any place, in any order."""

import contextlib
import glob
import hashlib
import os
import re
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int64
from pydantic import Field

from dino_lab.core.data.decoding import BadImage
from dino_lab.core.data.encoded import EncodedSource, Listing, names_of, numbered
from dino_lab.core.data.images import Made, kept
from dino_lab.core.data.source import Split

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "gif", "tif", "tiff")
"""A sample's first file with one of these is its image."""


class WebDataset(EncodedSource):
    """Samples in plain tar files: an image each, and its class as a whole number in a .cls file, or none at all."""

    location: ClassVar = frozenset({"train_shards", "test_shards"})

    kind: Literal["webdataset"] = "webdataset"
    """Which data set."""
    train_shards: str = Field(min_length=1)
    """The training split's tar files, as a pattern: shards/train-*.tar."""
    test_shards: str | None = Field(default=None, min_length=1)
    """The test split's tar files, as a pattern; None where nothing is evaluated on it."""

    def listing(self, split: Split, data_dir: Path, *, download: bool) -> Listing:
        members = self._members("train_shards", self.train_shards, data_dir)
        # Classes are those of the training split.
        classes = () if members.labels is None else names_of(members.labels)
        if split == "test":
            if self.test_shards is None:
                raise ValueError(
                    "data.test_shards = None: needed unless data.evaluation_split = 'held_out' or nothing is labelled"
                )
            members = self._members("test_shards", self.test_shards, data_dir)
        if (members.labels is None) != (not classes):
            raise ValueError(f"data.test_shards = {self.test_shards!r}: only one of the splits has labels")
        return Listing(
            encoded=members,
            labels=None if members.labels is None else numbered(members.labels, classes, members.pattern),
            classes=classes,
            key=hashlib.sha256(repr([members.key, classes]).encode()).hexdigest(),
            source=members.pattern,
        )

    def _members(self, knob: str, pattern: str, data_dir: Path) -> "Members":
        """What is in the shards; kept, since to walk through all of them takes long."""
        shards = [os.path.abspath(path) for path in sorted(glob.glob(pattern, recursive=True))]
        if not shards:
            raise ValueError(f"data.{knob} = {pattern!r}: matches no file")
        try:
            about = [(path, os.stat(path)) for path in shards]
        except OSError as error:
            raise ValueError(f"data.{knob} = {pattern!r}: {error}") from None
        files = repr([(path, each.st_size, each.st_mtime_ns) for path, each in about])
        key = hashlib.sha256(files.encode(errors="surrogateescape")).hexdigest()

        def make(folder: Path) -> Made:
            try:
                return _index(shards), {}
            except (tarfile.TarError, OSError, ValueError) as error:
                raise ValueError(f"data.{knob} = {pattern!r}: {error}") from None

        copy = kept(data_dir, {"kind": "shards", "files": key}, make)
        index = {name: array.numpy() for name, array in copy.arrays.items()}
        labelled = index["labels"] >= 0
        if labelled.any() and not labelled.all():
            missing = len(labelled) - np.count_nonzero(labelled)
            raise ValueError(f"data.{knob} = {pattern!r}: {missing} of {len(labelled)} samples have no .cls")
        return Members(pattern, key, shards, index, index["labels"] if labelled.all() else None)


@dataclass(frozen=True)
class Members:
    """The images of tar files, by where they begin."""

    pattern: str
    key: str
    shards: list[str]
    index: dict[str, np.ndarray]
    """As `_index` makes it."""
    labels: Int64[np.ndarray, "N"] | None
    """The numbers in the .cls files; None if there are none."""

    def __len__(self) -> int:
        return len(self.index["sizes"])

    def name(self, i: int) -> str:
        sample = self.index["names"][i].tobytes().rstrip(b"\0").decode(errors="surrogateescape")
        return f"{self._shard(i).name}: {sample}"

    def read(self, i: int) -> bytes:
        size = int(self.index["sizes"][i])
        if size < 0:
            raise BadImage(f"a sample without an image, which would be its .{', .'.join(EXTENSIONS)}")
        # Opened each time: nothing is shared with forked processes, and shards may be more than a process can open.
        with self._shard(i).open("rb") as shard:
            return os.pread(shard.fileno(), size, int(self.index["offsets"][i]))

    def _shard(self, i: int) -> Path:
        return Path(self.shards[self.index["shards"][i]])


def _index(shards: list[str]) -> dict[str, np.ndarray]:
    """Of each sample its name, its shard, offset and size of its image (-1: none), and its label (-1: none)."""
    numbers = array("q")  # millions of samples: no object for each
    names = []
    for shard, path in enumerate(shards):
        for name, offset, size, label in _samples(path):
            names.append(name.encode(errors="surrogateescape"))
            numbers.extend((shard, offset, size, label))
    if not names:
        raise ValueError(f"no sample in {shards}")
    columns = np.array(numbers).reshape(-1, 4)
    index = {name: columns[:, i] for i, name in enumerate(("shards", "offsets", "sizes", "labels"))}
    return index | {"names": np.array(names).view(np.uint8).reshape(len(names), -1)}


def _samples(path: str) -> Iterator[tuple[str, int, int, int]]:
    """Name, offset, size and label of each sample: files in a row whose paths are alike up to the name's first dot.

    Source: webdataset, tariterators.py, tar_file_iterator and group_by_keys.
    """
    key, seen, image, label = None, set[str](), (-1, -1), -1
    with _opened(path) as tar:
        while member := tar.next():
            tar.members.clear()  # type: ignore[attr-defined]  # or it would remember them all
            name = re.match(r"((?:.*/|)[^.]+)[.]([^/]*)$", member.name)
            if not member.isreg() or not name or re.match(r"__[^/]*__($|/)", member.name):
                continue
            extension = name[2].lower()
            if name[1] != key:
                if key is not None:
                    yield key, *image, label
                key, seen, image, label = name[1], set(), (-1, -1), -1
            if extension in seen:
                raise ValueError(f"{path}: has {member.name} twice in a row")
            seen.add(extension)
            if extension in EXTENSIONS and image == (-1, -1):
                image = (member.offset_data, member.size)
            elif extension == "cls":
                label = _label(tar, member, path)
        if key is not None:
            yield key, *image, label


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tarfile.TarFile]:
    try:
        with open(path, "rb") as shard, tarfile.open(fileobj=shard, mode="r:") as tar:
            yield tar
            # tarfile takes what is no header for the end.
            if any(os.pread(shard.fileno(), tarfile.BLOCKSIZE, tar.offset)):
                raise tarfile.ReadError(f"broken at byte {tar.offset}")
    except tarfile.ReadError as error:
        raise ValueError(f"{path}: no whole, plain tar file: {error}") from None


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> int:
    content = tar.extractfile(member)
    text = content.read().strip() if content else b""
    if not text.isdigit() or len(text) > 18:
        raise ValueError(f"{path}: {member.name} holds {text[:20]!r}, which is no whole number below 10^18")
    return int(text)
