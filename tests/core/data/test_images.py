"""The cache: what is made once, found again, and made again where it is broken."""

import errno
import multiprocessing
import os
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from dino_lab.core.data import downloads, encoded
from dino_lab.core.data.embedded import Shapes
from dino_lab.core.data.images import Made, kept, mapped

SMALL = Shapes(image_size=16, train_images=12, test_images=9)
# Forked, so that none has to import torch first and all ask at the same moment.
PROCESSES = multiprocessing.get_context("fork")


def only_folder(cache_dir: Path) -> Path:
    (folder,) = (path for path in cache_dir.iterdir() if not path.name.startswith("."))
    return folder


def test_what_is_kept_is_what_was_made(tmp_path):
    def make(folder: Path) -> Made:
        mapped = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=(2, 3))
        mapped[:] = [[1, 2, 3], [4, 5, 6]]
        return {"images": mapped, "labels": np.array([7, 8])}, {"third.png": "is broken"}

    for _ in range(2):
        copy = kept(tmp_path, {"kind": "some"}, make)
        assert copy.arrays["images"].tolist() == [[1, 2, 3], [4, 5, 6]]
        assert copy.arrays["labels"].tolist() == [7, 8]
        assert copy.skipped == {"third.png": "is broken"}


def test_a_drawing_is_found_again_and_not_drawn_again(tmp_path):
    first = SMALL.build("train", tmp_path)
    files = sorted(only_folder(tmp_path).iterdir())
    before = [(file.stat().st_mtime_ns, file.stat().st_ino) for file in files]
    second = SMALL.build("train", tmp_path)
    assert [(file.stat().st_mtime_ns, file.stat().st_ino) for file in files] == before
    assert torch.equal(first.pixels, second.pixels)
    assert first.digest == second.digest


@pytest.mark.parametrize("file", ["images.npy", "labels.npy", "masks.npy", "about.json"])
@pytest.mark.parametrize("kept_bytes", [0, 40, -1], ids=["empty", "header cut", "last byte missing"])
def test_a_file_cut_short_is_noticed_and_drawn_again(file, kept_bytes, tmp_path):
    whole = SMALL.build("train", tmp_path).pixels.clone()
    path = only_folder(tmp_path) / file
    os.truncate(path, kept_bytes % path.stat().st_size if kept_bytes else 0)
    assert torch.equal(SMALL.build("train", tmp_path).pixels, whole)
    assert path.stat().st_size > 0
    only_folder(tmp_path)  # the broken one is gone


def test_a_missing_file_is_drawn_again(tmp_path):
    SMALL.build("train", tmp_path)
    (only_folder(tmp_path) / "labels.npy").unlink()
    assert len(SMALL.build("train", tmp_path).labels["class"]) == 12


def test_a_cache_that_cannot_be_written_to_can_be_read(tmp_path, monkeypatch):
    digest = SMALL.build("train", tmp_path).digest
    # Tests may run as root, whom modes of folders do not stop.
    monkeypatch.setattr("filelock.FileLock", lambda path: pytest.fail("the lock was asked for"))
    assert SMALL.build("train", tmp_path).digest == digest


def test_writing_to_the_images_leaves_the_cache_as_it_was(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of arrays that are not writable
        images = SMALL.build("train", tmp_path).pixels
    before = images.clone()
    images.zero_()
    assert torch.equal(SMALL.build("train", tmp_path).pixels, before)


def test_processes_that_ask_at_once_make_it_once(tmp_path):
    start, digests = PROCESSES.Barrier(3), PROCESSES.SimpleQueue()
    made = tmp_path / "made"

    def make(folder: Path) -> Made:
        with made.open("a") as file:
            file.write("once\n")
        time.sleep(0.3)
        return {"images": np.full(5, os.getpid())}, {}

    def ask() -> None:
        start.wait()
        digests.put(kept(tmp_path / "data", {"kind": "race"}, make).digest)

    processes = [PROCESSES.Process(target=ask) for _ in range(3)]
    for process in processes:
        process.start()
    found = {digests.get() for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1
    assert made.read_text() == "once\n"


def test_what_a_killed_process_left_is_made_again_and_removed(tmp_path):
    begun = PROCESSES.Event()

    def never(folder: Path) -> Made:
        (folder / "images.npy").write_bytes(b"half")
        begun.set()
        time.sleep(60)
        raise AssertionError

    process = PROCESSES.Process(target=kept, args=(tmp_path, {"kind": "some"}, never))
    process.start()
    begun.wait()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    copy = kept(tmp_path, {"kind": "some"}, lambda folder: ({"images": np.ones(3)}, {}))
    assert copy.arrays["images"].tolist() == [1, 1, 1]
    only_folder(tmp_path)
    assert [path for path in tmp_path.iterdir() if path.suffix == ".fresh"] == []


def test_a_map_has_its_room_on_the_disk_before_it_is_written_to(tmp_path):
    array = mapped(tmp_path / "images.npy", (50, 1000))
    assert (tmp_path / "images.npy").stat().st_blocks * 512 >= array.nbytes == 50_000
    assert not array.any()


@pytest.mark.parametrize(
    ("name", "module", "number"), [("imagefolder", encoded, 36 * 16), ("cifar10", downloads, 3200)]
)
def test_a_full_disk_is_told_before_the_first_image(name, module, number, write, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = write(name)
    monkeypatch.setattr("os.posix_fallocate", full)
    made: list[int] = []
    monkeypatch.setattr(module, "square", lambda *_: made.append(1))
    needed = number * source.image_size * 3
    with pytest.raises(ValueError, match=rf"{tmp_path}/data: {needed} bytes are needed .*: No space left on device"):
        source.build("train", tmp_path / "data")
    assert made == []
    assert [path for path in (tmp_path / "data").iterdir() if path.suffix != ".lock"] == []


def test_a_drawing_that_fails_leaves_nothing(tmp_path):
    def fail(folder: Path) -> Made:
        (folder / "images.npy").write_bytes(b"half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        kept(tmp_path, {"kind": "some"}, fail)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
