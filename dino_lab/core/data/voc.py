"""PASCAL VOC's folders: photographs in which the pixels of each object are marked, to judge attention maps by."""

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from pydantic import Field
from torch import Tensor

from dino_lab.core.data.decoding import BadImage, decode, square
from dino_lab.core.data.images import ImageSet, Made, kept, mapped
from dino_lab.core.data.source import Progress, Read, Source, Split

_NEEDED = "a folder of PASCAL VOC has JPEGImages, SegmentationObject and ImageSets/Segmentation"
_Decoded = TypeVar("_Decoded")


class PascalVOC(Source):
    """The photographs of PASCAL VOC's segmentation task, train and val, with a mask of objects; they have no labels.

    A mask is 0 on the background, 255 where an object's border is void, and each object's own number elsewhere.

    Source: Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge" (IJCV 2010).
    """

    has_masks = True

    kind: Literal["voc"] = "voc"
    """Which data set."""
    root: str = Field(min_length=1)
    """The folder that holds JPEGImages, SegmentationObject and ImageSets: VOCdevkit/VOC2012, where it is unpacked."""
    image_size: int = Field(default=224, ge=8, le=1024)
    """Side in pixels of the squares that are kept, decoded once: the shorter side is resized to it, bicubic, or of a
    mask by the nearest pixel, and the middle cut out."""
    digest: str | None = Field(default=None, pattern="^[0-9a-f]{16}(-[0-9a-f]{16})?$")
    """What train and val hold, masks too; filled in when a trial is prepared. None takes what lies there."""

    def _unidentified(self) -> frozenset[str]:
        return self.not_identity | (frozenset({"root"}) if self.digest else frozenset())

    def told_apart(self, read: Read) -> Self:
        splits: tuple[Split, ...] = ("train", "test") if self.evaluation_split == "test" else ("train",)
        return self.but({"digest": "-".join(read(split).digest[:16] for split in splits)})

    def read(self, split: Split, data_dir: Path, *, download: bool, progress: Progress) -> ImageSet:
        part = f"ImageSets/Segmentation/{'val' if split == 'test' else 'train'}.txt"
        names, key = self._listed(part)
        number, size = len(names), self.image_size

        def make(folder: Path) -> Made:
            progress(0, number)  # before anything is written, for who only wants to know whether it would be
            images = mapped(folder / "images.npy", (number, size, size, 3))
            objects = mapped(folder / "objects.npy", (number, size, size))
            for i, name in enumerate(names):
                image, mask = self._opened(name)
                images[i], objects[i] = square(image, size), square_mask(mask, size)
                if (i + 1) % 64 == 0 or i + 1 == number:
                    progress(i + 1, number)
            if not ((objects > 0) & (objects < 255)).any():
                raise ValueError(f"{self._knob}: no mask of {part} has an object, 1 to 254, in its middle square")
            # Not as "masks", which are no part of a digest: these are drawn by people, and may change by themselves.
            return {"images": images, "objects": objects}, {}

        copy = kept(data_dir, {"kind": self.kind, "image_size": size, "files": key}, make)
        images_of_split = ImageSet(
            name=self.kind,
            split=split,
            pixels=copy.arrays["images"],
            places=np.arange(number),
            labels={},
            classes={},
            masks=copy.arrays["objects"],
            digest=copy.digest,
            source=f"{self.root}, {part}",
            skipped={},
        )
        self.check_digest(self.digest, split, images_of_split)
        return images_of_split

    @property
    def _knob(self) -> str:
        return f"data.root = {self.root!r}"

    def _listed(self, part: str) -> tuple[list[str], str]:
        """The names in a list of images; and a key that changes when one of their files does.

        Raises:
            ValueError: the list or a file is not there.
        """
        root = Path(self.root)
        try:
            names = (root / part).read_text(errors="surrogateescape").split()
        except (FileNotFoundError, NotADirectoryError):
            there = f"; it has {sorted(os.listdir(root))[:10]}" if root.is_dir() else ""
            raise ValueError(f"{self._knob}: no {part} there{there}; {_NEEDED}") from None
        except OSError as error:
            raise ValueError(f"{self._knob}: cannot be listed: {error}") from None
        if not names:
            raise ValueError(f"{self._knob}: {part} lists no image")
        files = [file for name in names for file in _files(name)]
        if missing := [file for file in files if not (root / file).is_file()]:
            raise ValueError(
                f"{self._knob}: {len(missing)} files of images that {part} lists are not there: "
                f"{', '.join(missing[:3])}; each needs a photograph and a mask"
            )
        about = [(file, (root / file).stat()) for file in files]
        key = repr([str(root.resolve()), [(file, each.st_size, each.st_mtime_ns) for file, each in about]])
        return names, hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()

    def _opened(self, name: str) -> tuple[UInt8[Tensor, "H W 3"], UInt8[np.ndarray, "H W"]]:
        image_file, mask_file = _files(name)
        image, mask = self._decoded(image_file, decode), self._decoded(mask_file, decode_mask)
        if mask.shape != image.shape[:2]:
            sizes = [f"{width} x {height}" for height, width in (mask.shape, image.shape[:2])]
            raise ValueError(
                f"{self._knob}: {mask_file} has {sizes[0]} pixels, {image_file} {sizes[1]}; they must be alike"
            )
        return image, mask

    def _decoded(self, file: str, decoded: Callable[[bytes], _Decoded]) -> _Decoded:
        try:
            return decoded((Path(self.root) / file).read_bytes())
        except BadImage as error:
            raise ValueError(f"{self._knob}: {file}: cannot be decoded: {error}") from None
        except (OSError, MemoryError) as error:  # which may pass: nothing is kept
            raise ValueError(f"{self._knob}: {file}: cannot be read: {type(error).__name__}: {error}") from None


def _files(name: str) -> tuple[str, str]:
    """An image's photograph and its mask."""
    return f"JPEGImages/{name}.jpg", f"SegmentationObject/{name}.png"


def decode_mask(data: bytes) -> UInt8[np.ndarray, "H W"]:
    """The values of an image of one channel, of colours their places in the palette.

    Raises:
        BadImage: with the reason.
    """
    decode(data)  # which says what is wrong with files of any kind
    with Image.open(io.BytesIO(data)) as image:
        if image.mode not in ("P", "L"):
            raise BadImage(
                f"has pixels of mode {image.mode}; allowed are 8 bits that number the objects, modes P and L"
            )
        return np.array(image)


def square_mask(mask: UInt8[np.ndarray, "H W"], size: int) -> UInt8[np.ndarray, "size size"]:
    """The middle of a mask whose shorter side is resized to `size` by the nearest pixel; as `square` of its image.

    Source: torchvision, Resize and CenterCrop on a PIL image, to the last bit.
    """
    shorter = min(mask.shape)
    height, width = (int(size * length / shorter) for length in mask.shape)
    top, left = round((height - size) / 2), round((width - size) / 2)
    resized = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    return np.array(resized.crop((left, top, left + size, top + size)))
