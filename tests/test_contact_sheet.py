from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_lab.contact_sheet import contact_sheet
from dino_lab.core.data.crops import MEAN, STD, Crops, multi_crop
from dino_lab.core.data.sources import ImageFolder, Shapes

CROPS = Crops(global_crops_size=112, local_crops_size=56, local_crops_number=3)


def test_a_sheet_shows_images_and_the_crops_that_a_trial_would_see_of_them(tmp_path: Path) -> None:
    images = Shapes(image_size=112, train_images=8, test_images=1).build("train", tmp_path)
    sheet = np.array(contact_sheet(images, CROPS, rows=2, seed=3))
    assert sheet.shape == (36 + 2 * (112 + 16 + 6), 6 + 3 * (112 + 6) + 3 * (56 + 6), 3)
    first, second = np.array([0]), np.array([1])
    assert np.array_equal(sheet[36:148, 6:118], images.images(first)[0].numpy())
    below = 36 + 112 + 16 + 6
    assert np.array_equal(sheet[below : below + 112, 6:118], images.images(second)[0].numpy())
    global_crops, local_crops = multi_crop(images.images(second), second, seed=3, epoch=0, crops=CROPS)
    for made, left, side in ((global_crops[1], 6 + 2 * 118, 112), (local_crops[2], 6 + 3 * 118 + 2 * 62, 56)):
        shown = torch.from_numpy(sheet[below : below + side, left : left + side]).permute(2, 0, 1) / 255
        seen = (made[0] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)).clamp(0, 1)
        assert (shown - seen).abs().max() < 0.6 / 255


@pytest.mark.parametrize("size", [(300, 20), (20, 300), (1, 1)])
def test_photographs_of_any_shape_and_without_labels_fit(size: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    Image.new("RGB", size, "red").save(tmp_path / "train" / "only.png")
    images = ImageFolder(root=str(tmp_path)).build("train", tmp_path / "data")
    sheet = np.array(contact_sheet(images, CROPS.but({"local_crops_number": 0}), rows=8, seed=0))
    assert sheet.shape == (36 + 112 + 16 + 6, 6 + 3 * (112 + 6), 3)
    red = (sheet[36:148, 6:118] == (255, 0, 0)).all(axis=-1)
    width, height = (round(112 * side / max(size)) for side in size)
    assert red.sum() == max(1, width) * max(1, height)
