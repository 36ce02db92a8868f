"""Data sets in the form of the Hugging Face hub: from the hub, or from a folder."""

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Int64
from pydantic import Field

from dino_lab.core.data.decoding import BadImage
from dino_lab.core.data.encoded import EncodedSource, Listing, names_of, numbered
from dino_lab.core.data.folder import files_below
from dino_lab.core.data.source import Split

_DOWNLOADS = Path("downloads") / "huggingface"
"""Where in the lab's data folder copies from the hub lie."""

_FETCH = """
import sys, datasets
name, config, cache, folder = sys.argv[1:]
try:
    datasets.load_dataset(name, config or None, cache_dir=cache).save_to_disk(folder)
except Exception as error:
    sys.exit(print(f"{type(error).__name__}: {error}") or 1)
"""


class HuggingFace(EncodedSource):
    """A data set of the Hugging Face hub, or in a folder: saved by save_to_disk, or with parquet or arrow files."""

    location: ClassVar = frozenset({"path"})

    kind: Literal["huggingface"] = "huggingface"
    """Which data set."""
    path: str = Field(min_length=1)
    """A folder, or else a name on the hub."""
    config: str | None = Field(default=None, min_length=1)
    """Which of several configurations; None takes the only one."""
    train_split: str = Field(default="train", min_length=1)
    """Name of the training split."""
    test_split: str = Field(default="test", min_length=1)
    """Name of the held-out split."""
    image_column: str = Field(default="image", min_length=1)
    """Column that holds the images."""
    label_column: str | None = Field(default="label", min_length=1)
    """Column that holds the class, as a number or a word; None: nobody labelled the images."""

    def listing(self, split: Split, data_dir: Path, *, download: bool) -> Listing:
        if not find_spec("datasets"):
            raise ValueError("data.kind = 'huggingface': needs the extra: pip install 'dino-lab[huggingface]'")
        folder = Path(self.path) if os.path.isdir(self.path) else self._fetched(data_dir, download=download)
        splits = self._splits(folder, data_dir / _DOWNLOADS)
        name = self.test_split if split == "test" else self.train_split
        labels, classes = self._labels(splits, name)
        # With where they lie: elsewhere, files as old and as large under the same names may be others.
        key = hashlib.sha256(repr([self.config, name, self.image_column, self.label_column, classes]).encode())
        for path, about in files_below(folder.resolve(), entered=set()):
            key.update(f"{path}\0{about.st_size}\0{about.st_mtime_ns}\0".encode(errors="surrogateescape"))
        return Listing(
            encoded=Rows(self._images(splits, name), name, self.image_column),
            labels=labels,
            classes=classes,
            key=key.hexdigest(),
            source=f"{self.path}, split {name}",
        )

    def _fetched(self, data_dir: Path, *, download: bool) -> Path:
        """Where the lab keeps its copy of a data set of the hub."""
        folder = data_dir / _DOWNLOADS / "--".join([*self.path.split("/"), *filter(None, [self.config])])
        if folder.is_dir():
            return folder
        if not download:
            raise ValueError(
                f"data.path = {self.path!r}: no such folder, and not fetched into {folder} yet; `--download` does"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as temporary:
            # A process of its own: the libraries ask whether they may use the network once, when they are imported.
            online = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": f"{temporary}/hub"}
            arguments = [self.path, self.config or "", f"{temporary}/cache", f"{temporary}/saved"]
            command = [sys.executable, "-c", _FETCH, *arguments]
            done = subprocess.run(command, env=online, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise ValueError(f"data.path = {self.path!r}: could not be fetched from the hub: {done.stdout.strip()}")
            with contextlib.suppress(OSError):  # another process was first
                os.rename(f"{temporary}/saved", folder)
        return folder

    def _splits(self, folder: Path, cache_dir: Path) -> dict[str, Any]:
        import datasets  # slow to import

        datasets.disable_progress_bars()
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # or the hub is told of folders, too
        try:
            if (folder / "dataset_dict.json").exists():
                return dict(datasets.load_from_disk(str(folder)))
            if (folder / "state.json").exists():
                return {self.train_split: datasets.load_from_disk(str(folder))}
            return dict(datasets.load_dataset(str(folder), self.config, cache_dir=str(cache_dir)))
        # The library stumbles over a split without rows, with an IndexError where it was saved.
        except (OSError, ValueError, IndexError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"data.path = {self.path!r}: cannot be loaded: {error}") from None

    def _column(self, splits: dict[str, Any], split: str, column: str) -> Any:
        if split not in splits:
            knob = "train_split" if split == self.train_split else "test_split"
            raise ValueError(f"data.{knob} = {split!r}: not in {self.path}; known: {', '.join(splits)}")
        if column not in splits[split].column_names:
            knob = "image_column" if column == self.image_column else "label_column"
            known = ", ".join(splits[split].column_names)
            raise ValueError(f"data.{knob} = {column!r}: not in {self.path}, split {split}; known: {known}")
        return splits[split].select_columns([column])

    def _images(self, splits: dict[str, Any], split: str) -> Any:
        import datasets

        images = self._column(splits, split, self.image_column)
        try:
            return images.cast_column(self.image_column, datasets.Image(decode=False))
        # What pyarrow and the library raise of a column that is none of images, by its type; told with their reason.
        except (TypeError, ValueError, NotImplementedError) as error:
            holds = f"holds no images but {images.features[self.image_column]}"
            raise ValueError(f"data.image_column = {self.image_column!r}: {holds}: {error}") from None

    def _labels(self, splits: dict[str, Any], split: str) -> tuple[Int64[np.ndarray, "N"] | None, tuple[str, ...]]:
        if self.label_column is None:
            return None, ()
        import datasets

        knob = f"data.label_column = {self.label_column!r}"
        values, kinds = {}, {}
        for name in (self.train_split, split):
            table = self._column(splits, name, self.label_column)
            column, kinds[name] = table.with_format("arrow")[:][self.label_column], table.features[self.label_column]
            if not isinstance(kinds[name], datasets.ClassLabel | datasets.Value):
                raise ValueError(f"{knob}: holds no classes but {kinds[name]}")
            values[name] = column.to_numpy()
            # The hub's test splits have -1 where the labels are secret.
            is_named = isinstance(kinds[name], datasets.ClassLabel)
            if column.null_count or (is_named and values[name].min() < 0):
                raise ValueError(f"{knob}: images without a label in {self.path}, split {name}")
        if not isinstance(kinds[split], datasets.ClassLabel):
            classes = names_of(values[self.train_split])
            return numbered(values[split], classes, f"{self.path}, split {split}"), classes
        if kinds[split] != kinds[self.train_split]:
            raise ValueError(f"{knob}: {split} and {self.train_split} of {self.path} differ in classes")
        return values[split].astype(np.int64), tuple(kinds[split].names)


@dataclass(frozen=True)
class Rows:
    """The images of a table, as bytes."""

    table: Any
    split: str
    column: str

    def __len__(self) -> int:
        return len(self.table)

    def name(self, i: int) -> str:
        return f"{self.split}[{i}]"

    def read(self, i: int) -> bytes:
        image = self.table[i][self.column]
        if image is None:
            raise BadImage("a row without an image")
        return bytes(image["bytes"]) if image["bytes"] is not None else Path(image["path"]).read_bytes()
