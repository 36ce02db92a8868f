"""Checkpoints: plain dicts of tensors and numbers; files that are written whole or not at all."""

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

CHECKPOINT = "checkpoint.pt"
"""Its name in a trial's folder."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Replaces the checkpoint in one act."""
    with replacing(path) as file:
        torch.save(state, file)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that replaces `path` in one act: a reader, or a crash, sees the old or the new, never a part."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    # The rename is durable only once the folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def load(path: Path, *, device: torch.device | None = None) -> dict[str, Any]:
    """Reads a checkpoint without running code from it, onto the device, by default the host.

    Raises:
        RuntimeError: the file is not a whole checkpoint, or not as it was written.
    """
    try:
        if zipfile.is_zipfile(path):  # others are torch's older format, of which released weights may be
            with zipfile.ZipFile(path) as parts:
                if damaged := parts.testzip():  # torch itself compares no check sums
                    raise zipfile.BadZipFile(f"{damaged} is damaged")
        state: dict[str, Any] = torch.load(path, map_location=device or "cpu", weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what is no checkpoint ends in nearly any
        raise RuntimeError(f"checkpoint {path} cannot be read: {error}") from error
    return state
