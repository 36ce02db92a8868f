from collections import Counter
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import stats
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from dino_lab.core.data.crops import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    MEAN,
    SATURATION,
    STD,
    Crops,
    Draws,
    apply,
    blend,
    blurred,
    draw,
    multi_crop,
    resized,
    shift_hue,
    solarized,
    whole,
)
from dino_lab.core.settings import KnobError

SMALL = Crops(global_crops_size=32, local_crops_size=16, local_crops_number=3)
PLAIN = SMALL.but(
    {
        "flip_probability": 0.0,
        "jitter_probability": 0.0,
        "grayscale_probability": 0.0,
        "blur_probability": [0.0, 0.0, 0.0],
        "solarize_probability": [0.0, 0.0, 0.0],
    }
)


def pictures(number: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.randint(
        0, 256, (number, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(7)
    )


def values(number: int, size: int = 24) -> Tensor:
    return torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(7))


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def normalised(crops: Tensor) -> Tensor:
    return F.normalize(crops, list(MEAN), list(STD))


# ------------------------------------------------------------------------- each operation, as the libraries do it


@pytest.mark.parametrize("size", [8, 24, 40])
@pytest.mark.parametrize("box", [(0, 0, 30, 44), (3, 5, 20, 31), (29, 43, 1, 1), (10, 0, 7, 44)])
@pytest.mark.parametrize("flip", [False, True])
def test_resizing_is_torchvisions_antialiased_bicubic(size: int, box: tuple[int, int, int, int], flip: bool) -> None:
    images = pictures(2, 30, 44)
    ours = resized(images, np.array([[box], [box]]), np.array([[flip], [flip]]), size=size)
    theirs = F.resized_crop(
        images.permute(0, 3, 1, 2).double() / 255,
        *box,
        [size, size],
        interpolation=InterpolationMode.BICUBIC,
        antialias=True,
    ).clamp(0, 1)
    # In double, as our weights are made: torchvision's own in float32 are 2e-6 away.
    close(ours.double(), F.hflip(theirs) if flip else theirs, 1e-6)


@pytest.mark.parametrize("size", [8, 40])
def test_resizing_is_pils_but_for_its_rounding_to_8_bits(size: int) -> None:
    # Values from which bicubic does not leave 0 to 255, which PIL would cut off between its two passes.
    image = pictures(1, 30, 44)[0] // 2 + 64
    ours = resized(image[None], np.array([[[3, 5, 20, 31]]]), np.array([[False]]), size=size)[0]
    picture = Image.fromarray(image.numpy()).crop((5, 3, 36, 23)).resize((size, size), Image.Resampling.BICUBIC)
    close(ours, F.to_tensor(picture), 1.6 / 255)


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
    close(solarized(grays.expand(1, 3, 1, 256))[0, 0, 0], expected, 1e-7)


# -------------------------------------------------------------------------------- together, against a plain loop


def one_crop(image: Tensor, draws: Draws, at: tuple[int, int], size: int) -> Tensor:
    top, left, height, width = draws.boxes[at].tolist()
    crop = F.resized_crop(
        image.permute(2, 0, 1) / 255,
        top,
        left,
        height,
        width,
        [size, size],
        interpolation=InterpolationMode.BICUBIC,
        antialias=True,
    ).clamp(0, 1)
    if draws.flip[at]:
        crop = F.hflip(crop)
    if draws.jitter[at]:
        adjust = {
            BRIGHTNESS: F.adjust_brightness,
            CONTRAST: F.adjust_contrast,
            SATURATION: F.adjust_saturation,
            HUE: F.adjust_hue,
        }
        for operation in draws.order[at]:
            crop = adjust[operation](crop, draws.factors[at][operation])
    if draws.grayscale[at]:
        crop = F.rgb_to_grayscale(crop, num_output_channels=3)
    if draws.blur[at]:
        crop = blurred(crop[None], draws.sigma[at][None])[0]
    if draws.solarize[at]:
        crop = F.solarize(crop, 128 / 255)
    return normalised(crop)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hue": 0.0},
        {"contrast": 0.0, "saturation": 0.0},
        {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0},
        {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0},
        {"jitter_probability": 1.0, "solarize_probability": [1.0, 0.0, 0.5]},
    ],
)
def test_a_batch_of_crops_is_a_loop_over_torchvision(changes) -> None:
    crops = SMALL.but(changes)
    images = pictures(20, 40, 28)
    indices = np.arange(100, 120)
    for drawn, got, size in zip(
        draw(indices, seed=1, epoch=2, crops=crops, height=40, width=28),
        multi_crop(images, indices, seed=1, epoch=2, crops=crops),
        (32, 16),
        strict=True,
    ):
        for image in range(20):
            for crop in range(len(got)):
                close(got[crop, image], one_crop(images[image], drawn, (image, crop), size), 5e-5)


def test_jitter_keeps_each_crops_own_order() -> None:
    drawn, _ = draw(np.arange(24), seed=0, epoch=0, crops=SMALL.but({"brightness": 0.9}), height=32, width=32)
    order = np.array(list(permutations(range(4))))
    everyone = np.ones((24, 2), dtype=bool)
    drawn = replace(drawn, jitter=everyone, order=np.stack((order, order[::-1]), axis=1), solarize=~everyone)
    images = pictures(24)
    got = apply(images, drawn, size=32)
    for image in range(24):
        for crop in range(2):
            close(got[crop, image], one_crop(images[image], drawn, (image, crop), 32), 2e-5)


def test_whole_is_torchvisions_resize_normalised() -> None:
    images = pictures(3, 30, 44)
    expected = F.resize(
        images.permute(0, 3, 1, 2) / 255, [20, 20], interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    close(whole(images, 20), normalised(expected.clamp(0, 1)), 1e-5)


def test_crops_of_everything_without_operations_are_the_whole_image() -> None:
    same = PLAIN.but({"global_crops_scale": [1.0, 1.0], "local_crops_scale": [1.0, 1.0], "ratio": [1.0, 1.0]})
    images = pictures(5, 48, 48)
    global_crops, local_crops = multi_crop(images, np.arange(5), seed=0, epoch=0, crops=same)
    assert torch.equal(global_crops, whole(images, 32).expand(2, -1, -1, -1, -1))
    assert torch.equal(local_crops, whole(images, 16).expand(3, -1, -1, -1, -1))


# --------------------------------------------------------------------------------------------- who gets which crop


def test_an_image_gets_the_same_bits_in_any_batch() -> None:
    images, indices = pictures(100), np.arange(1000, 1100)  # more than are worked on at once
    together = multi_crop(images, indices, seed=3, epoch=1, crops=SMALL)
    shuffled = np.random.default_rng(0).permutation(100)
    for crops, moved in zip(
        together, multi_crop(images[shuffled], indices[shuffled], seed=3, epoch=1, crops=SMALL), strict=True
    ):
        assert torch.equal(crops[:, shuffled], moved)
    for image in range(0, 100, 3):
        alone = multi_crop(images[image : image + 1], indices[image : image + 1], seed=3, epoch=1, crops=SMALL)
        for crops, crop in zip(together, alone, strict=True):
            assert torch.equal(crops[:, image : image + 1], crop)


def test_the_numbers_of_crops_change_no_crop() -> None:
    images, indices = pictures(4), np.arange(4)
    few = multi_crop(images, indices, seed=0, epoch=0, crops=SMALL)
    many = multi_crop(
        images, indices, seed=0, epoch=0, crops=SMALL.but({"global_crops_number": 4, "local_crops_number": 5})
    )
    assert torch.equal(few[0], many[0][:2])
    assert torch.equal(few[1], many[1][:3])


def test_seeds_epochs_images_and_crops_all_differ() -> None:
    same_picture = pictures(1).expand(2, -1, -1, -1)

    def crops_of(seed: int, epoch: int) -> list[Tensor]:
        global_crops, local_crops = multi_crop(
            same_picture, np.array([0, 1]), seed=seed, epoch=epoch, crops=SMALL.but({"local_crops_size": 32})
        )
        return [crop for crops in (global_crops, local_crops) for of_images in crops for crop in of_images]

    everything = [crop for seed, epoch in ((0, 0), (0, 1), (1, 0)) for crop in crops_of(seed, epoch)]
    assert len({crop.numpy().tobytes() for crop in everything}) == len(everything) == 3 * 2 * 5


def test_no_local_crops_is_an_empty_tensor_of_their_shape() -> None:
    global_crops, local_crops = multi_crop(
        pictures(4), np.arange(4), seed=0, epoch=0, crops=SMALL.but({"local_crops_number": 0})
    )
    assert global_crops.shape == (2, 4, 3, 32, 32)
    assert local_crops.shape == (0, 4, 3, 16, 16)
    assert global_crops.dtype == local_crops.dtype == torch.float32


# ------------------------------------------------------------------------------------------- what is drawn how often

MANY = 20_000


def drawn_for(crops: Crops, height: int = 256, width: int = 256) -> tuple[Draws, Draws]:
    return draw(np.arange(MANY), seed=5, epoch=0, crops=crops, height=height, width=width)


def evenly(sample: np.ndarray, low: float, high: float) -> None:
    assert low <= sample.min()
    assert sample.max() <= high
    assert stats.kstest(sample, "uniform", args=(low, high - low)).pvalue > 1e-3


def often(sample: np.ndarray, probability: float) -> None:
    assert stats.binomtest(int(sample.sum()), sample.size, probability).pvalue > 1e-3


def test_area_and_log_ratio_are_even_between_their_bounds() -> None:
    # Boxes of up to 0.4 of the area fit at the first try; of a large image, so that rounding does not show.
    _, local_draws = drawn_for(SMALL, 100_000, 100_000)
    _, _, height, width = np.moveaxis(local_draws.boxes.astype(np.float64), -1, 0)
    slack = 1e-3
    area, ratio = height * width / 1e10, np.log(width / height)
    for crop in range(3):
        assert stats.kstest(area[:, crop], "uniform", args=(0.05, 0.35)).pvalue > 1e-3
        bound = np.log(4 / 3)
        assert stats.kstest(ratio[:, crop], "uniform", args=(-bound, 2 * bound)).pvalue > 1e-3
    assert area.min() > 0.05 - slack
    assert area.max() < 0.4 + slack


@pytest.mark.parametrize(
    ("scale", "ratio", "height", "width"),
    [
        ((0.4, 1.0), (3 / 4, 4 / 3), 256, 256),
        ((0.4, 1.0), (3 / 4, 4 / 3), 200, 320),
        ((0.7, 1.0), (1 / 2, 2.0), 320, 150),
        ((0.05, 0.4), (3 / 4, 4 / 3), 32, 32),
    ],
)
def test_boxes_are_distributed_as_torchvisions(
    scale: tuple[float, float], ratio: tuple[float, float], height: int, width: int
) -> None:
    crops = SMALL.but({"global_crops_scale": list(scale), "ratio": list(ratio)})
    ours = drawn_for(crops, height, width)[0].boxes[:, 0]
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(4000)])
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert stats.ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 1e-3
    # Every place that a box can have, the last pixel included.
    assert (ours[:, 0] + ours[:, 2]).max() == height
    assert (ours[:, 1] + ours[:, 3]).max() == width
    assert ours[:, :2].min() == 0


@pytest.mark.parametrize(
    ("ratio", "height", "width"),
    [((3.0, 4.0), 40, 32), ((0.1, 0.2), 40, 32), ((0.75, 1.25), 40, 41), ((1.0, 1.0), 9, 9)],
)
def test_where_no_try_fits_the_box_is_torchvisions_central_one(
    ratio: tuple[float, float], height: int, width: int
) -> None:
    crops = SMALL.but({"global_crops_scale": [1.0, 1.0], "ratio": list(ratio)})
    boxes = draw(np.arange(500), seed=0, epoch=0, crops=crops, height=height, width=width)[0].boxes.reshape(-1, 4)
    image = torch.zeros(3, height, width)
    theirs = Counter(RandomResizedCrop.get_params(image, [1.0, 1.0], list(ratio)) for _ in range(100))
    # A try that is rounded down to fit is rare, not impossible.
    ours = Counter(tuple(box) for box in boxes.tolist())
    assert ours.most_common(1)[0][0] == theirs.most_common(1)[0][0]
    assert ours.most_common(1)[0][1] > 0.9 * len(boxes)


def test_each_operation_is_drawn_with_its_probability() -> None:
    crops = SMALL.but({"global_crops_number": 3, "solarize_probability": [0.05, 0.2, 0.1], "flip_probability": 0.4})
    for drawn, blur, solarize in zip(
        drawn_for(crops), ((1.0, 0.1, 0.1), (0.5,) * 3), ((0.05, 0.2, 0.2), (0.1,) * 3), strict=True
    ):
        for crop in range(3):
            often(drawn.flip[:, crop], 0.4)
            often(drawn.jitter[:, crop], 0.8)
            often(drawn.grayscale[:, crop], 0.2)
            often(drawn.blur[:, crop], blur[crop])
            often(drawn.solarize[:, crop], solarize[crop])


def test_strengths_are_even_between_their_bounds() -> None:
    for drawn in drawn_for(SMALL.but({"contrast": 1.5, "blur_sigma": [0.3, 1.2]})):
        for crop in range(drawn.flip.shape[1]):
            evenly(drawn.factors[:, crop, BRIGHTNESS], 0.6, 1.4)
            evenly(drawn.factors[:, crop, CONTRAST], 0.0, 2.5)
            evenly(drawn.factors[:, crop, SATURATION], 0.8, 1.2)
            evenly(drawn.factors[:, crop, HUE], -0.1, 0.1)
            evenly(drawn.sigma[:, crop], 0.3, 1.2)


def test_every_order_of_jitter_is_equally_likely() -> None:
    for crop in range(2):
        counts = np.unique(drawn_for(SMALL)[0].order[:, crop], axis=0, return_counts=True)[1]
        assert len(counts) == 24
        assert stats.chisquare(counts).pvalue > 1e-3
    two = drawn_for(SMALL.but({"brightness": 0.0, "saturation": 0.0}))[0].order[:, 0]
    assert set(map(tuple, two.tolist())) == {(CONTRAST, HUE), (HUE, CONTRAST)}
    often(two[:, 0] == HUE, 0.5)


def test_draws_of_a_crop_and_of_two_crops_are_uncorrelated() -> None:
    drawn, _ = drawn_for(SMALL.but({"blur_probability": [0.5, 0.5, 0.5], "solarize_probability": [0.5, 0.5, 0.5]}))
    columns = [
        np.concatenate(
            [
                drawn.boxes[:, crop],
                drawn.factors[:, crop],
                np.stack(
                    [
                        drawn.flip[:, crop],
                        drawn.jitter[:, crop],
                        drawn.order[:, crop, 0] == HUE,
                        drawn.grayscale[:, crop],
                        drawn.blur[:, crop],
                        drawn.sigma[:, crop],
                        drawn.solarize[:, crop],
                    ],
                    axis=1,
                ),
            ],
            axis=1,
        )
        for crop in range(2)
    ]
    correlation = np.abs(np.corrcoef(np.concatenate(columns, axis=1), rowvar=False))
    # Place and size of one box belong together; each of the rest is on its own.
    for start in (0, 15):
        correlation[start : start + 4, start : start + 4] = 0
    np.fill_diagonal(correlation, 0)
    assert correlation.max() < 4.5 / np.sqrt(MANY)


# ------------------------------------------------------------------------------------------------------- its knobs


def test_defaults_are_the_references() -> None:
    assert Crops().flat() == {
        "global_crops_size": 224,
        "local_crops_size": 96,
        "global_crops_number": 2,
        "local_crops_number": 8,
        "global_crops_scale": [0.4, 1.0],
        "local_crops_scale": [0.05, 0.4],
        "ratio": [3 / 4, 4 / 3],
        "flip_probability": 0.5,
        "jitter_probability": 0.8,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.2,
        "hue": 0.1,
        "grayscale_probability": 0.2,
        "blur_probability": [1.0, 0.1, 0.5],
        "blur_sigma": [0.1, 2.0],
        "solarize_probability": [0.0, 0.2, 0.0],
    }


@pytest.mark.parametrize(
    ("knob", "value", "allowed"),
    [
        ("global_crops_scale", [0.0, 1.0], "0 < min <= max <= 1"),
        ("global_crops_scale", [0.4, 1.1], "0 < min <= max <= 1"),
        ("local_crops_scale", [0.4, 0.05], "0 < min <= max <= 1"),
        ("ratio", [2.0, 1.0], "0 < min <= max"),
        ("ratio", [0.0, 1.0], "0 < min <= max"),
        ("blur_sigma", [0.0, 1.0], "0 < min <= max"),
        ("blur_probability", [1.0, 0.1, 1.5], "0 to 1"),
        ("solarize_probability", [-0.1, 0.1, 0.5], "0 to 1"),
    ],
)
def test_a_wrong_range_is_told_with_its_knob_value_and_what_is_allowed(knob: str, value: list, allowed: str) -> None:
    with pytest.raises(KnobError) as error:
        SMALL.but({knob: value})
    assert f"crops.{knob} = {tuple(value)}" in str(error.value)
    assert allowed in str(error.value)


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("global_crops_number", 1),
        ("local_crops_number", -1),
        ("global_crops_size", 0),
        ("local_crops_size", 0),
        ("hue", 0.6),
        ("brightness", -0.1),
        ("flip_probability", 1.1),
    ],
)
def test_a_value_out_of_bounds_is_refused(knob: str, value: float) -> None:
    with pytest.raises(KnobError, match=knob):
        SMALL.but({knob: value})
