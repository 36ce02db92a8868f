"""Each operation on pixels, as the libraries do it on one picture."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import stats
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from dino_lab.core.data.draws import BRIGHTNESS, CONTRAST, SATURATION
from dino_lab.core.data.pixels import add_noise, blend, blurred, resized, resized_each, rotated, shift_hue, solarized


def pictures(number: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.randint(
        0, 256, (number, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(7)
    )


def values(number: int, size: int = 24) -> Tensor:
    return torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(7))


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [8, 24, 40])
@pytest.mark.parametrize("box", [(0, 0, 30, 44), (3, 5, 20, 31), (29, 43, 1, 1), (10, 0, 7, 44)])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resizing_is_torchvisions_with_antialias(
    size: int, box: tuple[int, int, int, int], flip: bool, interpolation: str
) -> None:
    images = pictures(2, 30, 44)
    boxes, flips = np.array([[box], [box]]), np.array([[flip], [flip]])
    ours = resized(images, boxes, flips, size=size, interpolation=interpolation)
    theirs = F.resized_crop(
        images.permute(0, 3, 1, 2).double() / 255,
        *box,
        [size, size],
        interpolation=InterpolationMode(interpolation),
        antialias=True,
    ).clamp(0, 1)
    # In double, as our weights are made: torchvision's own in float32 are 2e-6 away.
    close(ours.double(), F.hflip(theirs) if flip else theirs, 1e-6)


@pytest.mark.parametrize("size", [8, 40])
@pytest.mark.parametrize("interpolation", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize("resize", [resized, resized_each])
def test_resizing_is_pils_but_for_its_rounding_to_8_bits(size: int, interpolation: Image.Resampling, resize) -> None:
    # Values from which bicubic does not leave 0 to 255, which PIL would cut off between its two passes.
    image = pictures(1, 30, 44)[0] // 2 + 64
    box, name = np.array([[[3, 5, 20, 31]]]), interpolation.name.lower()
    ours = resize(image[None], box, np.array([[False]]), size=size, interpolation=name)[0]
    picture = Image.fromarray(image.numpy()).crop((5, 3, 36, 23)).resize((size, size), interpolation)
    close(ours, F.to_tensor(picture), 1.6 / 255)


def test_boxes_of_images_of_any_size_are_those_of_each_alone() -> None:
    images = [pictures(1, 30, 44)[0], pictures(1, 1, 1)[0], pictures(1, 9, 200)[0]]
    boxes = np.array([[[3, 5, 20, 31], [0, 0, 30, 44]], [[0, 0, 1, 1]] * 2, [[2, 150, 7, 3], [0, 0, 9, 200]]])
    flips = np.array([[True, False], [False, True], [True, True]])
    together = resized_each(images, boxes, flips, size=12, interpolation="bicubic").view(3, 2, 3, 12, 12)
    for i, image in enumerate(images):
        for crop in range(2):
            alone = resized(
                image[None],
                boxes[i : i + 1, crop : crop + 1],
                flips[i : i + 1, crop : crop + 1],
                size=12,
                interpolation="bicubic",
            )
            # Rounded to 8 bits, and cut off there, after each of the two passes.
            assert (together[i, crop] - alone[0]).abs().mean() < 1.5 / 255


@pytest.mark.parametrize(
    ("operation", "adjust"),
    [(BRIGHTNESS, F.adjust_brightness), (CONTRAST, F.adjust_contrast), (SATURATION, F.adjust_saturation)],
)
def test_blends_are_torchvisions(operation, adjust) -> None:
    factors = np.array([0.0, 0.6, 1.0, 1.7])
    crops = values(4)
    expected = torch.stack([adjust(crop, factor) for crop, factor in zip(crops, factors, strict=True)])
    blend(crops, np.full(4, operation), factors)
    close(crops, expected, 1e-6)


def test_hue_is_torchvisions() -> None:
    shifts = np.array([-0.5, -0.1, 0.0, 0.07, 0.5])
    crops = values(5)
    crops[:, :, :4] = crops[:, :1, :4]  # greys, whose hue is not defined
    crops[:, :, 4:6] = (crops[:, :, 4:6] > 0.5).float()  # the corners of the cube
    expected = torch.stack([F.adjust_hue(crop, shift) for crop, shift in zip(crops, shifts, strict=True)])
    shift_hue(crops, shifts)
    close(crops, expected, 2e-6)


@pytest.mark.parametrize("size", [4, 24])
def test_blur_is_a_gaussian_over_an_image_that_goes_on_at_its_edges(size: int) -> None:
    sigmas = np.array([0.1, 0.5, 1.3, 2.0])
    crops = values(4, size)
    expected = []
    for crop, sigma in zip(crops, sigmas, strict=True):
        radius = int(4 * sigma)
        edged = F.pad(crop, [radius], padding_mode="edge")
        edged = F.gaussian_blur(edged, [2 * radius + 1] * 2, [sigma] * 2) if radius else edged
        expected.append(edged[:, radius : radius + size, radius : radius + size])
    close(blurred(crops, sigmas), torch.stack(expected), 2e-6)


@pytest.mark.parametrize("radius", [0.1, 0.5, 1.0, 2.0])
def test_blur_has_the_strength_of_pils_radius(radius: float) -> None:
    line = torch.zeros(3, 32, 32)
    line[:, :, :16] = 1
    ours = blurred(line[None], np.array([radius]))[0, 0, 16]
    picture = F.to_pil_image(line).filter(ImageFilter.GaussianBlur(radius))
    # PIL's Gaussian is three boxes.
    close(ours, F.to_tensor(picture)[0, 16], 0.035)


def test_solarise_inverts_from_128_on_as_pil_does() -> None:
    grays = torch.arange(256) / 255
    expected = torch.tensor([255 - v if v >= 128 else v for v in range(256)]) / 255
    close(solarized(grays.expand(1, 3, 1, 256), 128)[0, 0, 0], expected, 1e-7)


@pytest.mark.parametrize("threshold", [0, 77, 255])
def test_solarise_has_torchvisions_threshold(threshold: int) -> None:
    crops = values(2)
    close(solarized(crops, threshold), F.solarize(crops, threshold / 255), 1e-7)


@pytest.mark.parametrize("size", [9, 24])
def test_rotation_is_torchvisions(size: int) -> None:
    degrees = np.array([-180.0, -31.0, 0.0, 5.5, 90.0])
    crops = values(5, size)
    expected = [F.rotate(crop, angle, InterpolationMode.BILINEAR) for crop, angle in zip(crops, degrees, strict=True)]
    close(rotated(crops, degrees), torch.stack(expected), 2e-5)


def test_noise_is_gaussian_of_its_std_and_each_seeds_own() -> None:
    gray = torch.full((3, 3, 64, 64), 0.5)
    noise = add_noise(gray, 0.1, np.array([4, 5, 4])) - gray
    assert torch.equal(noise[0], noise[2])
    for one in noise[:2]:
        assert stats.kstest(one.flatten().numpy() / 0.1, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1]) < 4 / np.sqrt(noise[0].numel())
    assert torch.equal(gray, torch.full((3, 3, 64, 64), 0.5))


def test_noise_stays_between_black_and_white() -> None:
    noisy = add_noise(values(2), 1.0, np.array([0, 1]))
    assert (noisy.min(), noisy.max()) == (0, 1)
