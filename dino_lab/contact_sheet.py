"""A contact sheet: images, and beside each the crops that student and teacher would see of it."""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dino_lab.core.data.crops import Crops, as_pixels, multi_crop
from dino_lab.core.data.images import ImageSet

_SIDE = 112
"""Of a picture on the sheet, in pixels; a local crop has its share of it."""
_GAP, _HEADER, _CAPTION = 6, 36, 16


def contact_sheet(images: ImageSet, crops: Crops, *, rows: int, seed: int, epoch: int = 0) -> Image.Image:
    """The first `rows` images, a row each: the image and its class, then the global and the local crops."""
    chosen = np.arange(min(rows, len(images)))
    pictures = images.images(chosen)
    global_crops, local_crops = multi_crop(pictures, chosen, seed=seed, epoch=epoch, crops=crops)
    local_side = max(1, round(_SIDE * min(1.0, crops.local_crops_size / crops.global_crops_size)))
    columns = [("image", _SIDE, [_thumbnail(picture) for picture in pictures])]
    for kind, made, side in (("global", global_crops, _SIDE), ("local", local_crops, local_side)):
        columns += [(f"{kind} {i + 1}", side, [_picture(crop, side) for crop in of]) for i, of in enumerate(made)]

    width = _GAP + sum(side + _GAP for _, side, _ in columns)
    height = _HEADER + len(chosen) * (_SIDE + _CAPTION + _GAP)
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    seers = {"global 1": "teacher and student", "local 1": "student alone"}
    left = _GAP
    for title, side, column in columns:
        pen.text((left, 3), seers.get(title, ""), fill="#444444", font=font)
        pen.text((left, 18), title, fill="black", font=font)
        for row, picture in enumerate(column):
            sheet.paste(picture, (left, _HEADER + row * (_SIDE + _CAPTION + _GAP)))
        left += side + _GAP
    if images.labels:
        names = images.classes["class"]
        for row, label in enumerate(images.labels["class"][: len(chosen)].tolist()):
            top = _HEADER + row * (_SIDE + _CAPTION + _GAP) + _SIDE + 1
            pen.text((_GAP, top), names[label], fill="#444444", font=font)
    return sheet


def _thumbnail(picture: UInt8[Tensor, "H W 3"]) -> Image.Image:
    """The whole picture, enlarged without smoothing or shrunk, so that its longer side fits."""
    image = Image.fromarray(picture.numpy())
    scale = _SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _picture(crop: Float[Tensor, "3 S S"], side: int) -> Image.Image:
    image = Image.fromarray(as_pixels(crop[None])[0].numpy())
    return image.resize((side, side), Image.Resampling.NEAREST if side > image.width else Image.Resampling.LANCZOS)
